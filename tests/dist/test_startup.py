"""Ranks that start differently are refused on every rank, with the difference; a slow rank is named."""

import dataclasses
import gc
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from hyena_dist.config.errors import ConfigError
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.optim import OptimSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.parallel import groups
from hyena_dist.parallel.groups import Axis, give_back, gloo_copy, init_groups
from hyena_dist.runtime import startup
from hyena_dist.runtime.agree import agree
from hyena_dist.runtime.logs import StepTimes
from hyena_dist.runtime.run_lock import RunLock
from hyena_dist.runtime.startup import check_same_data, check_same_start, check_same_weights, source_hash
from tests.dist.harness import run_distributed


def _refusal(check: Any, *args: Any) -> str:
    try:
        check(*args)
    except ConfigError as error:
        return str(error)
    return "accepted"


def _starts(axis: Axis) -> dict[str, str]:
    config = Config(data=DataSection(shards=f"/scratch/{axis.rank}"), train=TrainSection(run_dir="runs/x"))
    odd = axis.rank == 1
    other = dataclasses.replace(config, optim=OptimSection(lr=0.5 if odd else 0.25),
                                train=TrainSection(run_dir="runs/y" if odd else "runs/x"))
    found = {"same": _refusal(check_same_start, config, axis), "config": _refusal(check_same_start, other, axis)}
    own, startup.source_hash = startup.source_hash, (lambda: "edited") if odd else startup.source_hash
    found["source"] = _refusal(check_same_start, config, axis)
    startup.source_hash = own
    version, startup.library_version = startup.library_version, (
        (lambda name: "2.7.0" if name == "torch" else version(name)) if odd else startup.library_version)
    found["torch"] = _refusal(check_same_start, config, axis)
    startup.library_version = version
    found["same data"] = _refusal(check_same_data, "0123456789abcdef", axis)
    found["data"] = _refusal(check_same_data, "fedcba9876543210" if odd else "0123456789abcdef", axis)
    latest = Path("runs/a/checkpoints", "step-00000008" if odd else "step-00000004")
    for what, path in (("same weights", latest.parent), ("weights", latest)):
        found[what] = _refusal(check_same_weights, "finetune.from", path,
                               lambda path=path: path.name.rjust(16, "0"), axis)
    return found


def _warnings(axis: Axis, slow: int | None) -> list[str]:
    """What is logged while one rank needs three times as long for its batches."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hyena_dist.runtime.logs").addHandler(handler)
    times = StepTimes(axis, steps=5)
    for _ in range(30):
        times.add(loading=0.3 if axis.rank == slow else 0.1, forward=1.0)
    logging.getLogger("hyena_dist.runtime.logs").removeHandler(handler)
    return said


def _threads(world: Axis) -> tuple[int, int]:
    """How many more there are with a copy of a group, and after it."""
    def count() -> int:
        return len(os.listdir("/proc/self/task"))

    before = count()
    copy = gloo_copy(world)
    more = count() - before
    give_back(copy)
    del copy
    gc.collect()
    return more, count() - before


def _short_groups(world: Axis) -> int:
    """Groups that are ended as soon as they are made, while others may still be connecting them."""
    for _ in range(50):
        give_back(gloo_copy(world))
    return 50


def _cases(run_dir: str) -> dict[str, Any]:
    split = init_groups()
    axis = gloo_copy(split.world)

    def lock() -> RunLock | None:
        return RunLock(Path(run_dir)) if axis.rank == 0 else None

    return {"starts": _starts(split.world), "slow": _warnings(axis, 1), "equal": _warnings(axis, None),
            "threads": _threads(split.world), "short": _short_groups(split.world),
            "locked": _refusal(lambda: agree(lock, split))}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    run_dir = tmp_path_factory.mktemp("run")
    held = RunLock(run_dir)
    try:
        return run_distributed(_cases, 3, str(run_dir))
    finally:
        held.release()


def test_differences_are_named_on_every_rank(ranks):
    starts = ranks[0]["starts"]
    assert all(rank["starts"] == starts for rank in ranks)
    for what, said in starts.items():
        print(f"{what}: {said}")
    assert starts["same"] == starts["same data"] == starts["same weights"] == "accepted"  # the control
    assert "optim.lr is 0.25 on ranks 0, 2 (host " in starts["config"]
    assert "), 0.5 on rank 1 (host " in starts["config"]
    assert 'train.run_dir is "runs/x" on ranks 0, 2' in starts["config"]
    assert "train.steps" not in starts["config"]
    assert starts["config"].endswith("start every rank with the same --config and overrides")
    assert "hyena_dist is " in starts["source"]
    assert "source edited on rank 1" in starts["source"]
    assert "torch is " in starts["torch"]
    assert "2.7.0 on rank 1" in starts["torch"]
    assert "hyena_dist" not in starts["torch"].partition(": ")[2]
    assert "data.shards (sha256 of their content) is 0123456789abcdef on ranks 0, 2" in starts["data"]
    assert "finetune.from (weights and their sha256) is step-00000004 000step-00000004 on ranks 0, 2" in starts[
        "weights"]
    assert "step-00000008 000step-00000008 on rank 1" in starts["weights"]


def test_a_slow_rank_is_named_once_by_the_first(ranks):
    [said] = ranks[0]["slow"]
    print(said)
    assert said.startswith("rank 1 (host ")
    assert "loading data takes it 0.300 s per step, 3.0 times the ranks' median of 0.100 s" in said
    assert ranks[1]["slow"] == ranks[2]["slow"] == []
    assert [rank["equal"] for rank in ranks] == [[], [], []]  # the control


def test_a_group_may_be_given_back_as_soon_as_it_is_made(ranks):
    """Each was connected on every rank first; one that is torn down in between fails the rank that still connects."""
    assert [rank["short"] for rank in ranks] == [50, 50, 50]


@pytest.mark.parametrize(("backends", "meet"), [("cpu:gloo", True), ("cpu:gloo,cuda:nccl", True), ("cuda:nccl", False)])
def test_ranks_meet_where_gloo_connects_them_whatever_the_group_is_called(monkeypatch, backends, meet):
    """A group that was made without the name of a backend has gloo for CPUs."""
    met: list[str] = []
    monkeypatch.setattr(dist, "get_backend_config", lambda _: backends)
    monkeypatch.setattr(dist, "all_reduce", lambda x, group: met.append(x.device.type))
    groups._meet()
    assert met == ["cpu"] * meet


def test_a_locked_run_directory_is_refused_on_every_rank(ranks):
    assert all("is in use by another run (host " in rank["locked"] for rank in ranks)


def test_a_copy_of_a_group_leaves_no_thread_behind(ranks):
    """A process that trains many models has two of them for each."""
    for rank in ranks:
        with_copy, after = rank["threads"]
        assert with_copy > after == 0


def test_edited_code_has_another_hash(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    before = source_hash(tmp_path)
    source_hash.cache_clear()
    (tmp_path / "notes.txt").write_text("no code")
    assert source_hash(tmp_path) == before
    source_hash.cache_clear()
    (tmp_path / "a.py").write_text("x = 2\n")
    assert source_hash(tmp_path) != before


def test_one_rank_has_nobody_to_differ_from():
    check_same_start(Config(data=DataSection(shards="x"), train=TrainSection(run_dir="y")), Axis())
    StepTimes(Axis()).add(loading=1.0, forward=1.0)
    assert not dist.is_initialized()
