"""Every engine trains on a device as ZeRO-0 does on a CPU, and a checkpoint of any goes on under any other, there and
back. tests/dist/test_crossings.py asks the same of numbers of ranks, on CPUs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hyena_dist.checkpoint.directory import step_directory
from hyena_dist.config.schema import Config
from hyena_dist.parallel.groups import init_groups
from hyena_dist.train.session import open_trainer
from tests.compare import rel
from tests.dist.test_crossings import CANONICAL, CUT, LOWERED, Row, config_of, difference, losses, state
from tests.gpu.devices import CPU, SLOW_DEVICES
from tests.gpu.ranks import run_ranks

TOLERANCE = 5e-5
"""Relative, of losses and of weights and moments: another device sums in another order, and Adam divides by small
numbers. A resume without Adam's moments is off by 1e-3."""
ZERO_1, FSDP = Row(stage=1), Row("fsdp")
ROWS = [Row(stage=0), ZERO_1, Row(stage=2), Row(stage=3), FSDP, Row(stage=2, offload="optimizer"),
        Row("fsdp", offload="parameters"), Row(stage=3, precision="bf16"), Row(stage=0, precision="fp16")]
RESUMED = [ZERO_1, Row(stage=3), FSDP, ROWS[-1]]
"""From the CPU's checkpoint."""


def _train(device: torch.device, configs: list[Config]) -> None:
    for config in configs:
        with open_trainer(config, init_groups(), device) as trainer:
            trainer.fit()


@pytest.mark.parametrize("device", SLOW_DEVICES)
def test_engines_and_devices_go_on_from_each_other(device: torch.device, shards: Path, tmp_path: Path,
                                                   record_property: Any) -> None:
    def checkpoint(run: str) -> Path:
        return step_directory(tmp_path / run / "checkpoints", CUT)

    def own(row: Row) -> Config:
        return config_of(row, shards, tmp_path / row.name)

    def resumed(source: str, row: Row) -> Config:
        return config_of(row, shards, tmp_path / f"{source}--{row.name}", checkpoint(source))

    run_ranks(CPU, _train, 1, [config_of(CANONICAL, shards, tmp_path / "cpu")])
    run_ranks(device, _train, 1, [
        *map(own, ROWS), *(resumed("cpu", row) for row in RESUMED), resumed(ZERO_1.name, ZERO_1),
        resumed(ZERO_1.name, FSDP), resumed(FSDP.name, Row(stage=3))])
    run_ranks(CPU, _train, 1, [resumed(FSDP.name, CANONICAL)])

    expected, canonical = losses(tmp_path / "cpu"), state(checkpoint("cpu"))
    for row in ROWS:
        limit = max(TOLERANCE, LOWERED[row.precision])
        saved = state(checkpoint(row.name))
        states = max(rel(saved[key], canonical[key]) for key in canonical)
        runs = [row.name, *([f"cpu--{row.name}"] if row in RESUMED else [])]
        found = [difference(losses(tmp_path / run), expected) for run in runs]
        record_property(row.name, [*found, states])
        print(f"{runs}: losses {found}, state {states:.1e}, limit {limit}")
        assert max(found) < limit, row
        assert row.precision != "fp32" or states < TOLERANCE, row
    for run in (f"{ZERO_1.name}--{FSDP.name}", f"{FSDP.name}--{Row(stage=3).name}", f"{FSDP.name}--{CANONICAL.name}"):
        found = difference(losses(tmp_path / run), expected)
        record_property(run, found)
        assert found < TOLERANCE, run
    same, first = losses(tmp_path / f"{ZERO_1.name}--{ZERO_1.name}"), losses(tmp_path / ZERO_1.name)
    assert all(same[step] == first[step] for step in same), "not bit for bit on the same device and engine"
    assert difference({step: loss * 1.001 for step, loss in expected.items()}, expected) > TOLERANCE, "the control"
