"""An error of one rank is every rank's, so that none is left waiting, and the first rank can say it."""

import json
import os
import time
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
from hyena_dist.data.pool import Pool, open_pools
from hyena_dist.model.placement import Placement
from hyena_dist.parallel.groups import Groups, gloo_copy, init_groups
from hyena_dist.runtime.agree import agree, agree_at_length, broadcast
from hyena_dist.runtime.startup import check_same_data
from hyena_dist.tasks.finetune import Place, _kmers
from hyena_dist.train.pretraining import Pretraining
from hyena_dist.train.session import open_trainer
from tests.dist.harness import run_distributed
from tests.dist.test_checkpoint import DictEngine
from tests.dist.test_finetuning import config_of, labelled_of, table

TIMEOUT = 123.0
SHORT, LONG = 3.0, 4.5
"""Seconds that a collective may take, and that a baseline does."""


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


def _baseline(*_: Any, **__: Any) -> dict[str, Any]:
    assert dist.get_rank() == 0, "the first rank alone computes it"
    time.sleep(LONG)
    return {"k": 6}


def _short_groups(directory: Path) -> Groups:
    """Of the same ranks, whose collectives may take a few seconds."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2,
                            timeout=timedelta(seconds=SHORT))
    return init_groups()


def _short_of_time(directory: Path) -> None:
    """A baseline that takes longer than a collective may, and then the end of the rank that the other waits for."""
    groups, config, found = _short_groups(directory), config_of(directory, "run", 1), list[Any]()
    place = Place(groups, torch.device("cpu"), None, None)
    with mock.patch("hyena_dist.tasks.finetune.kmer_baseline", _baseline):
        for _ in range(2):
            start = time.monotonic()
            found += [_kmers(config, labelled_of(config), place)["kmers"]["k"], time.monotonic() - start]
    if groups.world.rank == 0:
        agree_at_length(lambda: os._exit(0), groups)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        agree_at_length(lambda: None, groups)
    (directory / "found.json").write_text(json.dumps([*found, time.monotonic() - start]), encoding="utf-8")
    os._exit(0)


def test_what_takes_longer_than_a_collective_may_is_waited_for_while_its_rank_is_there(tmp_path: Path) -> None:
    table(tmp_path / "table")
    with pytest.raises(FileNotFoundError, match=r"result\.0"):  # of a rank that has ended
        run_distributed(_short_of_time, 2, tmp_path)
    k, seconds, again, then, lost = json.loads((tmp_path / "found.json").read_text("utf-8"))
    assert k == again == 6
    assert seconds > SHORT, "the control"
    assert then < SHORT, "what the first rank has found is kept"
    assert lost < SHORT, "the other waits no longer than it is there"


def _copied(data: DataSection, *, copy: bool = False) -> list[Pool]:
    if dist.get_rank() == 1:
        time.sleep(LONG)
    return open_pools(data, copy=copy)


def _with_a_slow_copy(shards: str, directory: Path) -> int:
    groups = _short_groups(directory)
    config = Config(model=ModelSection(hidden_size=8), data=DataSection(shards=shards),
                    train=TrainSection(run_dir=str(directory / "run"), global_batch_size=2))
    with mock.patch("hyena_dist.train.pretraining.open_pools", _copied):
        return len(Pretraining(config, groups, torch.device("cpu")).pools)


@pytest.mark.slow
def test_nodes_wait_for_one_that_copies_its_shards_first(shards: Path, tmp_path: Path) -> None:
    assert run_distributed(_with_a_slow_copy, 2, str(shards), tmp_path) == [1, 1]
