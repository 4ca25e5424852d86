"""An error of one rank is every rank's, so that none is left waiting, and the first rank can say it."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from hyena_dist.checkpoint.format import load_checkpoint, save_checkpoint
from hyena_dist.checkpoint.reader import CheckpointError, TensorReader
from hyena_dist.config.errors import ConfigError, is_agreed
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.data.errors import DataError
from hyena_dist.model.placement import Placement
from hyena_dist.parallel.groups import Groups, gloo_copy, init_groups
from hyena_dist.runtime.agree import agree, broadcast
from hyena_dist.runtime.startup import check_same_data
from hyena_dist.train.session import open_trainer
from tests.dist.harness import run_distributed
from tests.dist.test_checkpoint import DictEngine

TIMEOUT = 123.0


def _refuse(rank: int, groups: Groups) -> str:
    if groups.world.rank == rank:
        raise DataError(f"rank {rank} refuses")
    return f"rank {groups.world.rank} would not"


def _timeouts(groups: Groups) -> set[timedelta]:
    return {axis.group._get_backend(torch.device("cpu")).options._timeout for axis in vars(groups).values()}


class _Gathering(DictEngine):
    """An import in which the ranks meet, as in those of ZeRO-3 and FSDP2."""

    def import_parameter(self, name: str, state: Mapping[str, torch.Tensor]) -> None:
        dist.monitored_barrier(timeout=timedelta(seconds=20))
        super().import_parameter(name, state)


def _unreadable(directory: str, groups: Groups) -> tuple[str, bool, list[str]]:
    """Rank 1 alone cannot read the second parameter: the refusal, whether it is all ranks', and what was set."""
    shapes = {f"w{i}": (2, 2) for i in range(3)}
    table = dict.fromkeys(shapes, Placement())
    path = f"{directory}/checkpoint"
    save_checkpoint(path, DictEngine.random(shapes), table, groups, {})
    engine = _Gathering.random(shapes, seed=1)
    before = dict(engine.state)
    read = TensorReader.read

    def fails(reader: TensorReader, wanted: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
        if groups.world.rank == 1 and "model/w1" in wanted:
            raise CheckpointError("rank 1 cannot read it")
        return read(reader, wanted)

    with mock.patch.object(TensorReader, "read", fails), pytest.raises(CheckpointError) as refused:
        load_checkpoint(path, engine, table, groups)
    changed = [name for name in shapes if not torch.equal(engine.state[name]["weight"], before[name]["weight"])]
    return str(refused.value), is_agreed(refused.value), changed


def _on_each_rank(shards: str, run_dir: str) -> list[Any]:
    groups = init_groups()
    found = [broadcast(f"rank {groups.world.rank}", groups), agree(lambda: _refuse(9, groups), groups)]
    with pytest.raises(DataError) as caught:
        agree(lambda: _refuse(1, groups), groups)
    # A directory that only the first rank's machine has.
    here = shards if groups.world.rank == 0 else "/nonexistent"
    config = Config(model=ModelSection(hidden_size=8), data=DataSection(shards=here),
                    train=TrainSection(run_dir=run_dir, global_batch_size=2))
    with pytest.raises(DataError) as missing:
        with open_trainer(config, groups, torch.device("cpu")):
            pass
    with pytest.raises(ConfigError) as different:
        check_same_data(f"shards {groups.world.rank}", groups.world)
    agreements = [is_agreed(error.value) for error in (caught, missing, different)]
    split = init_groups(tensor=2)
    copy = replace(split, world=gloo_copy(split.world))
    sizes = [axis.size for axis in vars(split).values()]
    return [*found, str(caught.value), str(missing.value), agreements, _timeouts(copy) | _timeouts(groups), sizes,
            _unreadable(run_dir, groups)]


def test_an_error_of_one_rank_is_raised_on_all(shards: Path, tmp_path: Path) -> None:
    first, second = run_distributed(_on_each_rank, 2, str(shards), str(tmp_path), timeout=TIMEOUT)
    assert first[:2] == ["rank 0", "rank 0 would not"]
    assert second[:2] == ["rank 0", "rank 1 would not"]
    assert first[2] == second[2] == "rank 1 refuses"
    assert first[3] == second[3]
    assert "/nonexistent/shards.json: cannot be read" in first[3]
    assert first[4] == second[4] == [True, True, True], "one rank is enough to print them"
    assert not is_agreed(DataError("of one rank"))  # the control
    assert first[5] == second[5] == {timedelta(seconds=TIMEOUT)}, "every group's time-out is the world's"
    assert first[6] == second[6] == [2, 1, 1, 1, 2]
    assert first[7] == second[7] == ("rank 1 cannot read it", True, ["w0"])
