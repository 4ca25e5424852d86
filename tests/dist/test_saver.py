"""Saving in the background: values of the moment, full disks, kills at any moment, and which checkpoints are kept."""

import json
import logging
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hyena_dist.checkpoint import saver as saver_module
from hyena_dist.checkpoint.directory import (
    find_best,
    find_latest,
    is_whole,
    open_checkpoint,
    prune,
    read_metadata,
    step_directory,
)
from hyena_dist.checkpoint.format import Snapshot, load_checkpoint, save_checkpoint, write_snapshot
from hyena_dist.checkpoint.metadata import seal
from hyena_dist.checkpoint.reader import CheckpointError
from hyena_dist.checkpoint.saver import CheckpointSaver
from hyena_dist.model.placement import Placement
from hyena_dist.parallel.groups import Groups
from tests.checkpoints import flip, latest, write_metadata
from tests.dist.harness import fork_server, run_distributed
from tests.dist.test_checkpoint import DictEngine
from tests.dist.toy import data_groups

SHAPES = {f"w{i}": (100, 100) for i in range(4)}
TABLE = dict.fromkeys(SHAPES, Placement())


def filled(value: float) -> DictEngine:
    """An engine whose every number is this one."""
    return DictEngine({name: {field: torch.full(shape, float(value)) for field in ("weight", "exp_avg", "exp_avg_sq")}
                       for name, shape in SHAPES.items()}, steps=int(value))


def overwrite(engine: DictEngine, value: float) -> None:
    for fields in engine.state.values():
        for tensor in fields.values():
            tensor.fill_(value)


def content(path: Path, groups: Groups) -> set[float]:
    """The numbers in a checkpoint."""
    engine = filled(-1)
    load_checkpoint(path, engine, TABLE, groups)
    return {number for fields in engine.state.values() for tensor in fields.values()
            for number in tensor.unique().tolist()}


def best_path(directory: Path) -> Path | None:
    found = find_best(directory)
    return found and found.path


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def _two_ranks(directory: str) -> dict[str, Any]:
    groups, found = data_groups(), {}
    errors: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: errors.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hyena_dist.checkpoint.saver").addHandler(handler)
    saver = CheckpointSaver(directory, groups)
    engine = filled(1)

    with _held_back() as release:
        saver.save(engine, TABLE, 1, {"step": 1})
        overwrite(engine, 2)
        total = torch.ones(1)
        for _ in range(20):  # the training's collectives, while the thread has its own
            dist.all_reduce(total)
        found["nothing yet"] = not step_directory(directory, 1).exists()
        dist.barrier()
        release()
        found["training"] = float(total)
        found["first"] = saver.wait()
    found["copied"] = content(step_directory(directory, 1), groups)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if groups.world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    for step in (2, 3):
        saver.save(engine, TABLE, step, {"step": step})
    found["full"] = str(saver.wait())
    found["attribute"] = saver.failure is saver.wait()
    found["left"] = names(Path(directory))
    found["logged"] = list(errors)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    saver.save(engine, TABLE, 4, {"step": 4})
    found["room again"] = saver.wait(), names(Path(directory)), content(step_directory(directory, 4), groups)
    before = step_directory(directory, 4).stat().st_ino
    overwrite(engine, 5)
    saver.save(engine, TABLE, 4, {"step": 4})
    found["again"] = saver.close(), step_directory(directory, 4).stat().st_ino == before
    return found


class _held_back:  # noqa: N801 - a context manager, used as one
    """Background writes wait until `release` is called."""

    def __enter__(self) -> Callable[[], None]:
        event, original = threading.Event(), saver_module.write_snapshot

        def waiting(*args: Any) -> None:
            assert event.wait(60)
            original(*args)

        self._original = original
        saver_module.write_snapshot = waiting
        return event.set

    def __exit__(self, *_: object) -> None:
        saver_module.write_snapshot = self._original


@pytest.fixture(scope="module")
def at_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_distributed(_two_ranks, 2, str(tmp_path_factory.mktemp("saver")))


def test_the_values_of_the_moment_are_saved(at_two: list[dict[str, Any]], tmp_path: Path) -> None:
    for rank in at_two:
        assert rank["nothing yet"]
        assert rank["training"] == 2.0 ** 20
        assert rank["first"] is None
        assert rank["copied"] == {1.0}
    engine = filled(1)
    snapshot = Snapshot({f"{kind}/{name}": fields[field] for name, fields in engine.state.items() for kind, field in
                         (("model", "weight"), ("optim/exp_avg", "exp_avg"), ("optim/exp_avg_sq", "exp_avg_sq"))},
                        seal({"optimizer_step_count": 1}))
    overwrite(engine, 2)
    write_snapshot(tmp_path / "step-00000001", snapshot, Groups.single())
    assert content(tmp_path / "step-00000001", Groups.single()) == {2.0}, "control: without copies, those of later"


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_alive(at_two: list[dict[str, Any]]) -> None:
    for rank in at_two:
        print(rank["full"])
        assert "step-00000003: the checkpoint could not be written (rank 1: [Errno 27] File too large)" in rank["full"]
        assert rank["full"] == at_two[0]["full"]
        assert rank["attribute"]
        assert rank["left"] == ["step-00000001"]
        assert rank["room again"] == (None, ["step-00000001", "step-00000004"], {2.0})
    assert [message.count("\n") for message in at_two[0]["logged"]] == [0, 0], "a line for each of the two"
    assert at_two[1]["logged"] == []


def test_a_step_that_is_saved_is_not_saved_again(at_two: list[dict[str, Any]]) -> None:
    assert [rank["again"] for rank in at_two] == [(None, True)] * 2


KILLED_SAVES = {1: 3.0, 2: 1.0, 3: 2.0}
"""Validation losses by step: the save of the last deletes the first."""


def _save_until_killed(directory: str, kill_at: int) -> None:
    """Saves of several steps; at the n-th call that changes or syncs something on the disk, die."""
    calls = 0
    reported = Path(directory, "calls")

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call

    for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    saver = CheckpointSaver(Path(directory, "checkpoints"), Groups.single())
    for step, loss in KILLED_SAVES.items():
        saver.save(filled(step), TABLE, step, {"step": step, "val_loss": loss})
        assert saver.wait() is None
        Path(directory, "saved").write_text(str(step))
    saver.close()
    reported.write_text(str(calls))


def test_a_kill_at_any_moment_leaves_whole_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = fork_server()

    def run(kill_at: int) -> Path:
        directory = tmp_path / str(kill_at)
        directory.mkdir()
        process = context.Process(target=_save_until_killed, args=(str(directory), kill_at))
        process.start()
        process.join(60)
        assert process.exitcode == (0 if kill_at == 0 else -signal.SIGKILL)
        return directory

    whole = run(0)
    assert names(whole / "checkpoints") == ["step-00000002", "step-00000003"]
    calls = int((whole / "calls").read_text())
    torn = 0
    for kill_at in range(1, calls + 1, 2):
        directory = run(kill_at)
        checkpoints = directory / "checkpoints"
        saved = int((directory / "saved").read_text()) if (directory / "saved").exists() else 0
        newest = latest(checkpoints)
        step = 0 if newest is None else read_metadata(newest)["step"]
        assert saved <= step <= saved + 1, f"killed at call {kill_at}"
        if newest is not None:
            assert content(newest, Groups.single()) == {float(step)}
            assert step == 1 or is_whole(step_directory(checkpoints, step - 1)), "the one before"
        torn += not all(name.startswith("step-") and len(name) == 13 for name in
                        (names(checkpoints) if checkpoints.exists() else ()))
        prune(checkpoints)
        left = names(checkpoints) if checkpoints.exists() else []
        assert len(left) <= 3
        assert all(is_whole(checkpoints / name) for name in left)
        shutil.rmtree(directory)
    print(f"killed at {len(range(1, calls + 1, 2))} of {calls} calls; {torn} of them left something aside")
    assert torn > 5, "control: kills do come in the middle of a save"
    assert not caplog.records


def test_the_best_stays_and_no_loss_is_none(tmp_path: Path) -> None:
    losses: list[Any] = [3.0, 1.5, None, 2.0, None, 4, 2.5]
    for step, loss in enumerate(losses, start=1):
        save_checkpoint(step_directory(tmp_path, step), filled(step), TABLE, Groups.single(), {"val_loss": loss})
    assert best_path(tmp_path) == step_directory(tmp_path, 2)
    prune(tmp_path, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000006", "step-00000007"]
    shutil.rmtree(step_directory(tmp_path, 2))
    assert best_path(tmp_path) == step_directory(tmp_path, 7)
    for step in (6, 7):
        shutil.rmtree(step_directory(tmp_path, step))
    assert find_best(tmp_path) is None
    assert find_best(tmp_path / "nowhere") is None


def test_every_n_th_is_kept_for_good_also_by_a_run_that_keeps_others(tmp_path: Path) -> None:
    for step in range(0, 8):
        identity = {"train.keep_every": 3} if step < 5 else {}
        save_checkpoint(step_directory(tmp_path, step), filled(step), TABLE, Groups.single(), {"identity": identity})
    prune(tmp_path, keep=2, keep_every=4)
    assert names(tmp_path) == [f"step-0000000{step}" for step in (3, 4, 6, 7)], "3 was promised, 6 is of the newest"
    save_checkpoint(step_directory(tmp_path, 9), filled(9), TABLE, Groups.single(), {})
    prune(tmp_path, keep=2)
    assert names(tmp_path) == [f"step-0000000{step}" for step in (3, 7, 9)], "4 was promised by none, once none asks"


def test_the_best_of_each_way_to_measure_is_kept_and_only_alike_are_compared(tmp_path: Path) -> None:
    for step, (length, loss) in enumerate([(64, 1.0), (64, 1.5), (128, 3.0), (128, 2.5), (128, None), (128, 2.7)]):
        save_checkpoint(step_directory(tmp_path, step), filled(step), TABLE, Groups.single(),
                        {"val_loss": loss, "identity": {"data.val_seq_len": length}})
    assert best_path(tmp_path) == step_directory(tmp_path, 3), "the lowest of all is of other windows"
    prune(tmp_path, keep=2)
    assert names(tmp_path) == [f"step-0000000{step}" for step in (0, 3, 4, 5)]


def test_a_run_stands_for_its_newest_and_what_is_gone_names_what_is_kept(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for step in range(1, 12):
        save_checkpoint(step_directory(checkpoints, step), filled(step), TABLE, Groups.single(), {"step": step})
    for path in (tmp_path, checkpoints):
        assert open_checkpoint(path).metadata["step"] == 11
    flip(step_directory(checkpoints, 11) / ".metadata", 100)
    assert open_checkpoint(tmp_path).metadata["step"] == 10
    for place in (checkpoints, tmp_path):
        with pytest.raises(CheckpointError, match="step-00000099: no such checkpoint: choose one that is kept in "
                           rf"{checkpoints} \(step-00000011, step-00000010, .*, step-00000004 and 3 older ones\); "
                           "train.keep_every=N"):
            open_checkpoint(step_directory(place, 99))
    with pytest.raises(CheckpointError, match="no such checkpoint: choose another checkpoint$"):
        open_checkpoint(step_directory(checkpoints, 10) / "COMPLETE" / "x")
    with pytest.raises(CheckpointError, match="nowhere: no such checkpoint: choose another checkpoint$"):
        open_checkpoint(tmp_path / "elsewhere" / "nowhere")
    with pytest.raises(CheckpointError, match="empty: this run has no checkpoint: let it save one first"):
        open_checkpoint(tmp_path / "empty")


def test_two_are_kept_at_least(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2, got 1"):
        CheckpointSaver(tmp_path, Groups.single(), keep=1)


def test_a_defect_is_not_taken_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = CheckpointSaver(tmp_path, Groups.single())

    def broken(*_: Any) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(saver_module, "write_snapshot", broken)
    saver.save(filled(1), TABLE, 1, {})
    with pytest.raises(KeyError, match="a defect"):
        saver.wait()
    assert saver.close() is None


def test_an_unreadable_directory_is_an_error_and_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: cannot be searched.*Not a directory.*train.run_dir"):
        find_latest(tmp_path / "file")

    def forbidden(_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", forbidden)
    with pytest.raises(CheckpointError, match="cannot be searched for checkpoints .Permission denied"):
        find_latest(tmp_path)


@pytest.mark.parametrize(("file", "text", "reason"), [
    ("COMPLETE", "[]", "holds a list, not an object"),
    ("COMPLETE", "null", "holds a NoneType, not an object"),
    ("COMPLETE", "{}", "no list of files"),
    ("COMPLETE", '{"a": 1, "b": {"bytes": 1, "sha256": ""}}', "no list of files"),
    ("COMPLETE", '{"a": 1}', "its file a is missing"),
    ("COMPLETE", '{"a": {"bytes": 1, "sha256": ""}}', "its file a is missing"),
    ("COMPLETE", '{"a": {"bytes": 1}}', "which is no file's size and digest"),
    ("COMPLETE", '{"a": true}', "which is no file's size and digest"),
    ("COMPLETE", '{"../step-00000001/metadata.json": 1}', "which is no file's size and digest"),
    ("COMPLETE", "[" * 100_000, "nested too deeply"),
    ("COMPLETE", "\udcff", "decode"),
    ("metadata.json", "7", "holds a int, not an object"),
    ("metadata.json", "{", "line 1 column 2"),
    ("metadata.json", '{"format": 1}', "no optimizer_step_count that is a whole number"),
    *(("metadata.json", json.dumps({"format": 1, "optimizer_step_count": 1, "step": 2} | changes), reason)
      for changes, reason in (
          ({"optimizer_step_count": -1}, "no optimizer_step_count that is a whole number"),
          ({"step": "x"}, "has 'x' for step, which is not a whole number"),
          ({"step": True}, "for step"), ({"step": 2.0}, "for step"), ({"step": None}, "for step"),
          ({"step": 1}, "its metadata.json is of step 1"), ({"step": 10**9}, "its metadata.json is of step 1000000000"),
          ({"identity": []}, "for identity, which is not an object"),
          ({"identity": {"train.steps": 1}}, "has step 2 of a run of 1 steps"),
          ({"data": []}, "for data, which is not an object"),
          ({"data": {"step": 3}}, "has step 2, and data of step 3"),
          ({"data": {"index": -1}}, "for data.index"), ({"data": {"index": 10**30}}, "for data.index"),
          ({"optimizer_step_count": 2**63}, "no optimizer_step_count that is a whole number"),
          ({"data": {"epoch": "0"}}, "for data.epoch"),
          ({"data": {"step": 2, "passed": 10**15}}, "has data.passed 1000000000000000 after 2 steps"),
          ({"seconds": "abc"}, "has 'abc' for seconds, which is not a number of seconds"),
          ({"seconds": -1}, "for seconds"), ({"seconds": None}, "for seconds"),
          ({"val_loss": "1.0"}, "for val_loss, which is not a finite number"),
          ({"best_val_loss": {}}, "for best_val_loss"), ({"val_loss": float("nan")}, "NaN is no number of JSON"),
          ({"loss_scale": {"scale": 0.0, "good_steps": 1}}, "for loss_scale, which is not a scale from 1 to"),
          ({"loss_scale": {"scale": 2.0}}, "for loss_scale"), ({"config": 3}, "for config, which is not a text"))),
])
def test_strange_json_is_passed_over_and_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, text: str,
                                                 reason: str) -> None:
    for step in (1, 2):
        save_checkpoint(step_directory(tmp_path, step), filled(step), TABLE, Groups.single(), {"val_loss": 1.0})
    newest = step_directory(tmp_path, 2)
    if file == "metadata.json" and text != "{":
        write_metadata(newest, json.loads(text))
    else:
        (newest / file).write_text(text, errors="surrogateescape")
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path) == best_path(tmp_path) == step_directory(tmp_path, 1)
    assert reason in caplog.text
    with pytest.raises(CheckpointError, match="step-00000002: .*: choose another checkpoint$") as caught:
        read_metadata(newest)
    assert "\n" not in str(caught.value)


def test_the_thread_has_its_rank_s_device_and_a_stream_of_its_own(tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: which calls come from which thread. A new thread starts on device 0, on the training's stream."""
    calls: list[tuple[str, Any]] = []

    def record(name: str) -> Callable[[Any], None]:
        return lambda value: calls.append((threading.current_thread().name, (name, value)))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"new on {device}")
    monkeypatch.setattr(torch.cuda, "set_device", record("device"))
    monkeypatch.setattr(torch.cuda, "set_stream", record("stream"))
    monkeypatch.setattr(saver_module, "write_snapshot", lambda *_: record("write")(None))
    saver = CheckpointSaver(tmp_path, Groups.single())
    saver.save(filled(1), TABLE, 1, {})
    assert saver.close() is None
    assert calls == [("checkpoint_0", call) for call in (("device", 3), ("stream", "new on 3"), ("write", None))]
