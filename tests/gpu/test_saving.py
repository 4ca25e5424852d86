"""A checkpoint that is written while the training goes on holds the values of the moment at which it was asked for."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hyena_dist.checkpoint.directory import step_directory
from hyena_dist.checkpoint.reader import TensorReader
from hyena_dist.checkpoint.saver import CheckpointSaver
from hyena_dist.engine.protocol import FIELDS
from hyena_dist.model.placement import Placement
from hyena_dist.parallel.groups import Groups
from tests.dist.test_checkpoint import DictEngine
from tests.gpu.devices import DEVICES

SHAPE, WEIGHTS, SAVES = (1024, 1024), 6, 3
PRODUCTS = 40
"""On a GPU some milliseconds of work, which is still under way when the save is asked for."""
TABLE = {f"w{i}": Placement() for i in range(WEIGHTS)}


def work(x: Tensor) -> Tensor:
    """Something that takes long and gives zeros."""
    for _ in range(PRODUCTS if x.is_cuda else 1):
        x = x @ x
    return x * 0


@pytest.mark.parametrize("device", DEVICES)
def test_saving_goes_on_beside_the_training(device: torch.device, tmp_path: Path) -> None:
    size = 4096 if device.type == "cuda" else 64
    zeros = torch.zeros(size, size, device=device)
    state = {name: {field: torch.zeros(SHAPE, device=device) for field in FIELDS} for name in TABLE}
    engine = DictEngine(state)
    saver = CheckpointSaver(tmp_path, Groups.single(), keep=SAVES)

    def train(value: float) -> None:
        """Set every number once a long computation, which gives nothing, has ended."""
        nothing = work(zeros)[0, 0]
        for fields in state.values():
            for tensor in fields.values():
                tensor.copy_(nothing + value)

    for step in range(1, SAVES + 1):
        train(step)
        saver.save(engine, TABLE, step, {"step": step})
        train(-step)  # while it is written
    assert saver.close() is None
    for step in range(1, SAVES + 1):
        reader = TensorReader(step_directory(tmp_path, step))
        found = reader.read(reader.shapes)
        assert len(found) == WEIGHTS * len(FIELDS)
        assert all(bool((tensor == step).all()) for tensor in found.values()), step
