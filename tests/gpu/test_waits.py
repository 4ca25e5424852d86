"""A steady training step does not wait for the device, but where it reads the numbers of the step before."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.measure import counted_waits, place
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.engine import EngineSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.optim import OptimSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.parallel.groups import init_groups
from hyena_dist.train.session import open_trainer
from tests.gpu.devices import DEVICES
from tests.gpu.ranks import run_ranks

WARM, COUNTED = 3, 4
LATE = "hyena_dist/train/late.py:read"
"""Reads the loss and the norm of the step before, which the device has done by then."""
OF_THE_HOST = {"hyena_dist/model/vocabulary.py:refuse_outside"}
"""Look at token ids where those are on the host, which is everywhere on a CPU."""
ENGINES = {"zero0": EngineSection(zero_stage=0), "zero1": EngineSection(zero_stage=1),
           "zero3": EngineSection(zero_stage=3), "fsdp": EngineSection(name="fsdp")}
READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.nonzero.default,
         torch.ops.aten.masked_select.default, torch.ops.aten._unique2.default}
"""Operators whose result, or its shape, the host must know."""


class _HostReads(TorchDispatchMode):
    """Counts, on a CPU, where the host reads a tensor: on a GPU each of these is a wait."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype is torch.bool for index in args[1])
        if by_mask or func in READS:
            self.found[place()] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _watched(device: torch.device) -> Iterator[Counter[str]]:
    with counted_waits() as found:
        if device.type == "cpu":
            with _HostReads(found):
                yield found
        else:
            yield found


def _waits(device: torch.device, configs: dict[str, Config]) -> dict[str, dict[str, int]]:
    """Of some steady steps of each run, by place."""
    found = {}
    for name, config in configs.items():
        with open_trainer(config, init_groups(), device) as trainer:
            step, stack = trainer._train_step, ExitStack()

            def train_step(trainer: Any = trainer, step: Any = step, stack: ExitStack = stack, name: str = name) -> Any:
                if trainer.status.step == WARM:
                    found[name] = stack.enter_context(_watched(device))
                elif trainer.status.step == WARM + COUNTED:
                    stack.close()
                return step()

            trainer._train_step = train_step  # type: ignore[method-assign]
            trainer.fit()
    return {name: dict(places) for name, places in found.items()}


@pytest.mark.parametrize("device", DEVICES)
def test_a_steady_step_waits_only_for_the_step_before(device: torch.device, shards: Path, tmp_path: Path,
                                                      record_property: Any) -> None:
    configs = {name: Config(
        model=ModelSection(num_layers=1, hidden_size=16, max_seq_len=128, filter_order=8, layer_pattern="H"),
        data=DataSection(shards=str(shards), seq_len=128, num_workers=0),
        train=TrainSection(run_dir=str(tmp_path / name), steps=WARM + COUNTED + 2, micro_batch_size=2,
                           global_batch_size=4, eval_every=0, save_every=0, precision="bf16"),
        optim=OptimSection(warmup_steps=2), engine=engine) for name, engine in ENGINES.items()}
    for name, places in run_ranks(device, _waits, 1, configs)[0].items():
        record_property(name, places)
        print(f"{name}: {places}")
        assert places.get(LATE, 0) >= COUNTED, "the control: the one wait that there must be is seen"
        allowed = {LATE, *OF_THE_HOST} if device.type == "cpu" else {LATE}
        ours = {where: count for where, count in places.items()
                if where.startswith("hyena_dist/") and where not in allowed}
        assert not ours, (name, ours)
