"""An error of one rank is every rank's, so that none is left waiting, and the first rank can say it."""

from pathlib import Path

import pytest
import torch

from hyena_dist.config.schema import Config, DataSection, ModelSection, TrainSection
from hyena_dist.data.errors import DataError
from hyena_dist.parallel.groups import Groups, init_groups
from hyena_dist.train.agree import agree, broadcast
from hyena_dist.train.trainer import Trainer
from tests.dist.harness import run_distributed


def _refuse(rank: int, groups: Groups) -> str:
    if groups.world.rank == rank:
        raise DataError(f"rank {rank} refuses")
    return f"rank {groups.world.rank} would not"


def _on_each_rank(shards: str, run_dir: str) -> list[str]:
    groups = init_groups()
    found = [broadcast(f"rank {groups.world.rank}", groups), agree(lambda: _refuse(9, groups), groups)]
    with pytest.raises(DataError) as caught:
        agree(lambda: _refuse(1, groups), groups)
    # A directory that only the first rank's machine has.
    here = shards if groups.world.rank == 0 else "/nonexistent"
    config = Config(model=ModelSection(hidden_size=8), data=DataSection(shards=here),
                    train=TrainSection(run_dir=run_dir, global_batch_size=2))
    with pytest.raises(DataError) as missing:
        Trainer(config, groups, torch.device("cpu"))
    return [*found, str(caught.value), str(missing.value)]


def test_an_error_of_one_rank_is_raised_on_all(shards: Path, tmp_path: Path) -> None:
    first, second = run_distributed(_on_each_rank, 2, str(shards), str(tmp_path))
    assert first[:2] == ["rank 0", "rank 0 would not"]
    assert second[:2] == ["rank 0", "rank 1 would not"]
    assert first[2] == second[2] == "rank 1 refuses"
    assert first[3] == second[3]
    assert "/nonexistent/shards.json: cannot be read" in first[3]
