"""HyenaModel with frozen weights, under every engine and over data, tensor and context ranks, against one plain process
with the same weights frozen."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hyena_dist.checkpoint.format import load_checkpoint, save_checkpoint, split_parts, take_snapshot
from hyena_dist.checkpoint.reader import TensorReader
from hyena_dist.config.schema import Config
from hyena_dist.model.model import build_model
from hyena_dist.model.placement import Placement
from hyena_dist.parallel.groups import Axis, Groups
from tests.compare import rel
from tests.dist.harness import run_distributed
from tests.dist.test_engine_model import (
    ENGINES,
    STEPS,
    TOLERANCE,
    TOPOLOGIES,
    difference,
    groups_of,
    make,
    run_config,
    train,
    train_plain,
)
from tests.dist.toy import Record

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "all but the head"
"""Which is one of its own here, and tied to the embedding everywhere else."""
FROZEN: dict[str, Callable[[str], bool]] = {
    HEAD: lambda name: not name.startswith("head."),
    "all but the last block": lambda name: not name.startswith("layers.1."),
    "the embedding": lambda name: name == EMBEDDING,
    "all but biases": lambda name: not name.endswith("bias"),
    "all but the embedding": lambda name: name != EMBEDDING,
    "the filters": lambda name: ".filter." in name,
    "all but the final norm": lambda name: not name.startswith("final_norm."),
}
MEMORY = ("none", "selective", "block", "full")
OFFLOADS: tuple[tuple[int | str, str], ...] = ((2, "optimizer"), (3, "parameters"), ("fsdp", "parameters"))
FAST = [(2, "data", HEAD, "none", "none"),
        (3, "sequence", "all but the last block", "full", "none"),
        ("fsdp", "data", "all but the last block", "full", "none"),
        ("fsdp", "context", "all but biases", "selective", "none")]
# Every engine, topology and set of weights; what is recomputed goes round.
WHOLE = [(engine, topology, what, MEMORY[index % len(MEMORY)], offload) for index, (engine, offload, topology, what)
         in enumerate((engine, offload, topology, what)
                      for engine, offload in [*((engine, "none") for engine in ENGINES), *OFFLOADS]
                      for topology in TOPOLOGIES for what in FROZEN)]
Case = tuple[int | str, str, str, str, str]
Found = tuple[list[Record], dict[str, torch.Tensor]]
"""What each step gave, and the content of a checkpoint after the last."""


def _config(case: Case) -> Config:
    engine, topology, what, memory, offload = case
    config = run_config(engine, TOPOLOGIES[topology], offload=offload, tied=what != HEAD)
    # Of itself DeepSpeed keeps weights as small as these whole, at stage 3 too.
    deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if engine == 3 else {}
    return replace(config, train=replace(config.train, activation_checkpointing=memory),
                   engine=replace(config.engine, deepspeed=deepspeed))


def _run(case: Case) -> Found:
    groups = groups_of(case[1])
    model, engine = make(_config(case), groups, FROZEN[case[2]])
    records = train(model, engine, groups, STEPS)
    everything = replace(groups, world=Axis())  # of which every rank would write all
    return records, take_snapshot(engine, model.placement(), everything, {}).tensors


def _through_checkpoints(directory: str, what: str) -> Found:
    """A step in each of: ZeRO-3 over data ranks, FSDP2 over tensor ranks, ZeRO-1 over context ranks."""
    records: list[Record] = []
    for step, (engine_name, topology) in enumerate(((3, "data"), ("fsdp", "sequence"), (1, "context"))):
        groups = groups_of(topology)
        config = run_config(engine_name, TOPOLOGIES[topology], tied=what != HEAD)
        model, engine = make(config, groups, FROZEN[what])
        if step:
            load_checkpoint(Path(directory, f"step-{step:08d}"), engine, model.placement(), groups)
        records += train(model, engine, groups, (step,))
        save_checkpoint(Path(directory, f"step-{step + 1:08d}"), engine, model.placement(), groups, {})
    reader = TensorReader(Path(directory, "step-00000003"))
    return records, reader.read(reader.shapes)


def _on_each_rank(cases: list[Case], sets: list[str], directory: str) -> dict[Any, Any]:
    return ({case: _run(case) for case in cases}
            | {what: _through_checkpoints(str(Path(directory, str(index))), what) for index, what in enumerate(sets)})


def _keys(weights: dict[str, torch.Tensor], table: dict[str, Placement]) -> dict[str, torch.Tensor]:
    """Weights by the keys under which a checkpoint has them."""
    return {f"model/{name}{suffix}": part for name, weight in weights.items()
            for suffix, part in split_parts(weight, table[name]).items()}


def _check(cases: list[Case], sets: Iterable[str], directory: Path) -> None:
    ranks = run_distributed(_on_each_rank, 2, cases, list(sets), str(directory), timeout=1800)
    for what in dict.fromkeys([*(case[2] for case in cases), *sets]):
        frozen, tied = FROZEN[what], what != HEAD
        model = build_model(run_config(0, TOPOLOGIES["alone"], tied=tied), Groups.single())
        initial = {name: weight.detach() for name, weight in model.named_parameters()}
        records, weights = train_plain(frozen, tied=tied)
        thawed = [name for name in initial if frozen(name)][-1]
        control = difference(train_plain(_but(frozen, thawed), tied=tied)[0], records)
        print(f"{what} frozen, but {thawed}: off by {control:.1e}, tolerance {TOLERANCE}")
        assert control > 10 * TOLERANCE, "control: a weight that is thawed is seen"
        still = _keys({name: weight for name, weight in initial.items() if frozen(name)}, model.placement())
        moved = _keys({name: weight for name, weight in weights.items() if not frozen(name)}, model.placement())
        for case in [*(case for case in cases if case[2] == what), *([what] if what in sets else [])]:
            for rank in ranks:
                _compare(case, rank[case], records, still, moved)


def _compare(case: Case | str, found: Found, records: list[Record], still: dict[str, torch.Tensor],
             moved: dict[str, torch.Tensor]) -> None:
    """What a case found is what one process gave: records, frozen weights, trained ones, and no other moments."""
    error = difference(found[0], records)
    errors = {key: rel(found[1][key], weight) for key, weight in moved.items()}
    worst = max(errors, key=errors.__getitem__)
    print(f"{case}: losses and norms off by {error:.1e}, tolerance {TOLERANCE}; {worst} by {errors[worst]:.1e}")
    assert error < TOLERANCE
    assert errors[worst] < 10 * TOLERANCE  # as the weights of Adam's steps: they are small
    assert all(torch.equal(found[1][key], weight) for key, weight in still.items()), "bit for bit"
    moments = {f"optim/{moment}{key.removeprefix('model')}" for key in moved for moment in ("exp_avg", "exp_avg_sq")}
    assert found[1].keys() == still.keys() | moved.keys() | moments


def _but(frozen: Callable[[str], bool], thawed: str) -> Callable[[str], bool]:
    return lambda name: frozen(name) and name != thawed


def test_a_frozen_backbone_trains_its_head(tmp_path: Path) -> None:
    _check(FAST, [HEAD], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "offload"), [*((engine, "none") for engine in ENGINES), *OFFLOADS])
def test_every_engine_topology_and_set_of_weights(engine: int | str, offload: str, tmp_path: Path) -> None:
    cases = [case for case in WHOLE if (case[0], case[4]) == (engine, offload)]
    _check(cases, FROZEN if (engine, offload) == (3, "none") else (), tmp_path)
