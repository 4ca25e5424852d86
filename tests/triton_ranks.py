"""The operator over context ranks by kernels in Triton's interpreter, against torch's operations in float64 on the same
ranks: `python -m tests.triton_ranks` prints {case: {what: the largest error of any rank}} as JSON."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import json
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from hyena_dist.config.sections.ops import OpsSection
from hyena_dist.ops.triton import across, arrived
from hyena_dist.parallel.groups import Axis
from tests import triton_bounds
from tests.compare import rel
from tests.context_operator import Sizes, computed
from tests.dist.test_engine_model import STEPS, TOPOLOGIES, groups_of, make, run_config, train, train_plain
from tests.dist.toy import Record

RANKS = 2
SIZES = Sizes(length=30, batch=3, width=6, channels=4)
"""Three windows of two channels of a group are three rows for each rank: a channel and a half."""
CASES: dict[str, dict[str, Any]] = {
    "whole": {}, "recomputed": {"recompute": True},
    "segments": {"segments": ((0, 29, 31, 32, 60), (0, 60), (0, 30, 45, 60))},
    "order 3": {"order": 3},
    "order 4, segments, recomputed": {"order": 4, "recompute": True,
                                      "segments": ((0, 29, 31, 32, 60), (0, 60), (0, 30, 45, 60))}}
ENGINES = ((3, "data", False), ("fsdp", "context", True), (1, "tensor", False))
NORMS = "final_norm.weight", "layers.0.input_norm.weight"
"""They begin as 1: what they moved by is compared."""


def trained(engine: int | str, topology: str, *, recompute: bool) -> dict[str, float]:
    """Three steps of a whole model by kernels under an engine, against one plain process by torch's operations: losses,
    norms of gradients, and weights."""
    groups = groups_of(topology)
    config = run_config(engine, TOPOLOGIES[topology], recompute=recompute)
    model, made = make(replace(config, ops=OpsSection(backend="triton")), groups)
    found = train(model, made, groups, STEPS)
    want, weights = plainly_trained()
    pairs = [(a.loss, b.loss) for a, b in zip(found, want, strict=True)]
    pairs += [(a.grad_norm, b.grad_norm) for a, b in zip(found, want, strict=True)]
    moved = {name: rel(made.export_parameter(name)["weight"] - 1, weights[name] - 1) for name in NORMS}
    return {"training": max(abs(a / b - 1) for a, b in pairs), **moved}


@cache
def plainly_trained() -> tuple[list[Record], dict[str, Tensor]]:
    return train_plain()


def run(rank: int, place: str) -> None:
    torch.set_num_threads(1)
    triton_bounds.check()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=RANKS)
    axis = Axis.of(dist.group.WORLD)
    errors = {f"{engine}, {topology}": trained(engine, topology, recompute=recompute)
              for engine, topology, recompute in ENGINES}
    results: dict[str, tuple[Tensor, Tensor]] = {}
    for name, options in CASES.items():
        with (mock.patch.object(arrived, "convolve", wraps=arrived.convolve) as rows,
              mock.patch.object(across, "enter", wraps=across.enter) as halo):
            found = computed(axis, "triton", torch.float32, SIZES, **options)
            assert rows.called
            assert halo.called
        want = computed(axis, "torch", torch.float64, SIZES, **options)
        errors[name] = {what: rel(found[what], want[what]) for what in want}
        results[name] = found["y"], want["y"]
    errors["control"] = {"borders left out": rel(results["whole"][0], results["segments"][1])}
    Path(place, str(rank)).write_text(json.dumps(errors), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(run, (directory,), nprocs=RANKS)
        ranks = [json.loads(Path(directory, str(rank)).read_text(encoding="utf-8")) for rank in range(RANKS)]
    print(json.dumps({case: {what: max(found[case][what] for found in ranks) for what in ranks[0][case]}
                      for case in ranks[0]}))
