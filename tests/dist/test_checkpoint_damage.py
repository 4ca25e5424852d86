"""Checkpoints that a disk, a file system or a hand has damaged: passed over for the one before, in every reader."""

import errno
import json
import logging
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hyena_dist.checkpoint.directory import (
    choose_checkpoint,
    find_best,
    find_latest,
    open_checkpoint,
    prune,
    step_directory,
)
from hyena_dist.checkpoint.format import load_checkpoint, load_model_weights, save_checkpoint
from hyena_dist.checkpoint.reader import CheckpointError, DamagedError
from hyena_dist.model.placement import Placement
from hyena_dist.parallel.groups import Groups
from tests.checkpoints import edit_metadata, flip, latest, without_digests
from tests.dist.test_checkpoint import DictEngine, same, write_toy
from tests.dist.toy import TABLE, Toy


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_toy(tmp_path)


@pytest.fixture
def two(checkpoint: Path) -> tuple[Path, Path]:
    """A checkpoint, and one of step 6 after it whose weights are larger by one."""
    engine = DictEngine.random({name: tuple(parameter.shape) for name, parameter in Toy().named_parameters()})
    for fields in engine.state.values():
        fields["weight"] += 1
    after = step_directory(checkpoint.parent, 6)
    save_checkpoint(after, engine, TABLE, Groups.single(), {"step": 6, "identity": {"seed": 1}, "val_loss": 0.5})
    return checkpoint, after


def weights(path: Path) -> dict[str, torch.Tensor]:
    model = Toy(seed=8)
    load_model_weights(path, model, TABLE)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "metadata.json", "COMPLETE"])
def test_one_flipped_bit_and_the_checkpoint_before_is_taken_everywhere(two: tuple[Path, Path], name: str,
                                                                       caplog: pytest.LogCaptureFixture) -> None:
    before, after = two
    good, better = weights(before), weights(after)
    assert not torch.equal(good["filter"], better["filter"]), "control: undamaged, the second is taken"
    size = (after / name).stat().st_size
    flip(after / name, {"COMPLETE": size - 10, "metadata.json": 90}.get(name, size // 2))
    with caplog.at_level(logging.WARNING):
        assert same(weights(after), good)
    assert f"{after} is passed over" in caplog.text
    engine = DictEngine.random({name: tuple(value.shape) for name, value in good.items()}, seed=4)
    assert load_checkpoint(after, engine, TABLE, Groups.single())["step"] == 5
    assert all(torch.equal(engine.state[name]["weight"], value) for name, value in good.items())
    assert latest(before.parent) == before
    edit_metadata(before, val_loss=0.9)
    assert choose_checkpoint(before.parent.parent, str(after)).path == before
    best = find_best(before.parent)
    assert best is not None
    assert best.path == before
    flip(before / "__0_0.distcp", 700)
    assert latest(before.parent) is None
    with pytest.raises(DamagedError, match=rf"^{after}: .*: choose another checkpoint$"):
        weights(after)


def test_what_may_not_be_read_is_neither_damaged_nor_passed_over(two: tuple[Path, Path],
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    _, after = two
    opened = os.open

    def refuse(error: int, name: str) -> None:
        def fail(path: Any, *arguments: Any, **options: Any) -> int:
            if Path(path) == after / name:
                raise OSError(error, os.strerror(error), str(path))
            return opened(path, *arguments, **options)

        monkeypatch.setattr(os, "open", fail)

    for name in (".metadata", "__0_0.distcp", "metadata.json", "COMPLETE"):
        for code, remedy in ((errno.EACCES, "let this user read it"), (errno.ESTALE, "start again when it can be read"),
                             (errno.EMFILE, "start again when it can be read")):
            refuse(code, name)
            for read in (weights, open_checkpoint, lambda path: find_latest(path.parent)):
                with pytest.raises(CheckpointError, match=f"{after / name}: {os.strerror(code)}: {remedy}") as refused:
                    read(after)
                assert not isinstance(refused.value, DamagedError)
        refuse(errno.EIO, name)
        assert latest(after.parent) == two[0], "control: nobody can read it"


@pytest.mark.parametrize("kind", ["deleted since it was listed", "a link to nothing", "a link to itself", "a file"])
def test_what_is_listed_and_not_there_is_passed_over(two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch,
                                                     kind: str) -> None:
    """A run that deletes its older checkpoints may be listed by an evaluation at the same time."""
    before, after = two
    gone = step_directory(before.parent, 9)
    if kind.startswith("deleted"):
        listed = os.listdir
        monkeypatch.setattr(os, "listdir", lambda path: [*listed(path), gone.name])
    elif kind == "a file":
        gone.write_text("")
    else:
        gone.symlink_to("nowhere" if kind.endswith("nothing") else gone.name)
    assert latest(before.parent) == after
    best = find_best(before.parent)
    assert best is not None
    assert best.path == after
    prune(before.parent, keep=2)
    assert before.is_dir()
    assert after.is_dir()
    with pytest.raises(CheckpointError, match=f"^{gone}: no such checkpoint") as refused:
        open_checkpoint(gone)
    assert not isinstance(refused.value, DamagedError), "control: what the user names is not replaced by another"


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "metadata.json", "COMPLETE"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: Path(path).symlink_to("/dev/zero"),
                                  lambda path: Path(path).symlink_to("nowhere")])
def test_what_is_no_file_is_not_waited_for(two: tuple[Path, Path], name: str, make: Callable[[Path], Any]) -> None:
    before, after = two
    (after / name).unlink()
    make(after / name)
    assert latest(before.parent) == before
    assert open_checkpoint(after).path == before


def test_checkpoints_without_digests_are_read_and_it_is_said_once(two: tuple[Path, Path],
                                                                  caplog: pytest.LogCaptureFixture) -> None:
    before, after = two
    good, better = weights(before), weights(after)
    for path in two:
        without_digests(path)
    assert same(weights(after), better)
    assert same(weights(before), good)
    assert caplog.text.count("without digests") == 1
    flip(after / ".metadata", (after / ".metadata").stat().st_size // 2, 0xFF, length=40)
    assert same(weights(after), good), "what can be seen without them is passed over too"
    mixed = json.loads((before / "COMPLETE").read_text())
    (before / "COMPLETE").write_text(json.dumps(mixed | {"__0_0.distcp": {"bytes": 1, "sha256": "0"}}))
    assert latest(before.parent) is None


def test_a_file_that_the_marker_does_not_name_is_not_read(two: tuple[Path, Path]) -> None:
    """Or the digest of the one that was changed could be left out."""
    before, after = two
    listed = json.loads((after / "COMPLETE").read_text())
    del listed["__0_0.distcp"]
    (after / "COMPLETE").write_text(json.dumps(listed))
    with pytest.raises(DamagedError, match="COMPLETE does not name __0_0.distcp"):
        open_checkpoint(shutil.move(after, before.parent / "moved"))


def test_metadata_that_would_not_be_read_back_is_not_written(checkpoint: Path) -> None:
    for field in ({"val_loss": float("nan")}, {"step": "5"}, {"seconds": -1.0}, {"data": []}):
        with pytest.raises(ValueError, match=r"its metadata.json has|Out of range float"):
            save_checkpoint(checkpoint.parent / "other", DictEngine.random({"w": (2,)}), {"w": Placement()},
                            Groups.single(), field)
        assert not (checkpoint.parent / "other").exists()


def test_a_directory_that_cannot_be_synced_costs_no_checkpoint(checkpoint: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """As CIFS and some file systems of FUSE answer."""
    fsync, codes = os.fsync, [errno.EINVAL, errno.ENOTSUP, errno.EIO]

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(codes[0], os.strerror(codes[0]))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    table = {"w": Placement()}
    for step in (7, 8):
        save_checkpoint(step_directory(checkpoint.parent, step), DictEngine.random({"w": (2,)}), table, Groups.single(),
                        {"step": step})
        assert latest(checkpoint.parent) == step_directory(checkpoint.parent, step)
        del codes[0]
    with pytest.raises(OSError, match="Input/output error"):
        save_checkpoint(step_directory(checkpoint.parent, 9), DictEngine.random({"w": (2,)}), table, Groups.single(),
                        {"step": 9})
