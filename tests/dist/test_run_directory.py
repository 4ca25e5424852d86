"""The directory of a run: damaged, moved, deleted or unwritable, and what the next start does about it."""

import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from hyena_dist.checkpoint import directory as checkpoint_directory
from hyena_dist.checkpoint.directory import Checkpoint, find_latest, open_checkpoint, step_directory
from hyena_dist.checkpoint.reader import CheckpointError
from hyena_dist.checkpoint.saver import CheckpointSaver
from hyena_dist.config.errors import ConfigError, UserError
from hyena_dist.config.schema import Config
from hyena_dist.convert import write_model
from hyena_dist.model.config import hyena_config
from hyena_dist.model.model import HyenaModel
from hyena_dist.parallel.groups import Groups, init_groups
from hyena_dist.train.history import Start, note_start, read_beginning
from hyena_dist.train.metrics import read_rows
from hyena_dist.train.run_directory import RunDirectory
from hyena_dist.train.session import open_trainer
from tests.checkpoints import edit_metadata, flip, latest
from tests.dist.harness import run_distributed
from tests.dist.test_lost_steps import config_of

SETTINGS = {"steps": 9, "save_every": 3}


def _fit(config: Config, groups: Groups) -> str | None:
    """A run from its start to its end; the refusal, if it was refused."""
    try:
        with open_trainer(config, groups, torch.device("cpu")) as trainer:
            trainer.fit()
    except (UserError, OSError) as error:
        return str(error)
    return None


def _losses(run_dir: Path) -> dict[int, float]:
    return {row.step: row.loss for row in read_rows(run_dir / "metrics.jsonl") if row.split == "train"}


def _flip_all(run_dir: Path, names: tuple[str, ...]) -> None:
    for path in (run_dir / "checkpoints").iterdir():
        if path.name in names:
            flip(path / ".metadata", 200)


def _dangle(run_dir: Path) -> None:
    shutil.move(run_dir / "checkpoints", run_dir.parent / f"{run_dir.name}-away")
    (run_dir / "checkpoints").symlink_to(run_dir.parent / "nowhere")


def _empty(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").mkdir()


LOST: dict[str, Callable[[Path], Any]] = {
    "damaged": lambda run_dir: _flip_all(run_dir, ("step-00000006", "step-00000009")),
    "moved away": lambda run_dir: shutil.move(run_dir / "checkpoints", run_dir.parent / "away"),
    "emptied": _empty,
    "dangling": _dangle,
    "of a version that did not note it": lambda run_dir: ((run_dir / "last_checkpoint").unlink(), _empty(run_dir)),
}


def _runs(shards: str, directory: Path) -> dict[str, Any]:
    """Two ranks; every one of them sees and says the same."""
    groups, found = init_groups(), {}
    first = groups.world.rank == 0

    def on_first(action: Callable[[Path], Any], run_dir: Path) -> None:
        torch.distributed.barrier()
        if first:
            action(run_dir)
        torch.distributed.barrier()

    whole = config_of(shards, directory / "whole", **SETTINGS)
    assert _fit(whole, groups) is None
    for name, damage in LOST.items():
        run_dir = directory / name
        config = replace(whole, train=replace(whole.train, run_dir=str(run_dir)))
        on_first(lambda run_dir: shutil.copytree(directory / "whole", run_dir), run_dir)
        on_first(damage, run_dir)
        for choice in ("auto", str(directory / "whole" / "checkpoints" / "step-00000006")):
            found[f"{name}: {choice[:4]}"] = _fit(replace(config, train=replace(config.train, resume=choice)), groups)
        found[f"{name}: rows"] = len(_losses(run_dir))
    afresh = replace(config.train, run_dir=str(directory / "damaged"), resume="none")
    found["none"] = _fit(replace(whole, train=afresh), groups)
    for name, resume in (("rotten", "auto"), ("branch", str(directory / "rotten" / "checkpoints" / "step-00000009"))):
        run_dir = directory / name
        if name == "rotten":
            on_first(lambda run_dir: shutil.copytree(directory / "whole", run_dir), run_dir)
            on_first(lambda run_dir: _flip_all(run_dir, ("step-00000009",)), run_dir)
        config = replace(whole, train=replace(whole.train, run_dir=str(run_dir), resume=resume))
        if name == "branch":  # the one that `rotten` has written anew is damaged once more
            on_first(lambda _: _flip_all(directory / "rotten", ("step-00000009",)), run_dir)
        found[name] = _fit(config, groups)
    found["agreed"] = _one_rank_sees_damage(directory / "whole" / "checkpoints", groups)
    _with_wandb(config_of(shards, directory / "sent", **SETTINGS), groups)
    return found | {"deleted": _deleted(config_of(shards, directory / "deleted", **SETTINGS), groups),
                    "full": _full(config_of(shards, directory / "full", **SETTINGS), groups)}


class _Waits:
    """W&B whose network comes back when the second rank has left the run: when it closes, what is there is noted."""

    def __init__(self, _project: str, run_dir: Path, _settings: Any) -> None:
        self._run_dir = run_dir

    def add(self, _split: str, _values: Any, *, step: int) -> None:
        assert step > 0

    def close(self) -> None:
        deadline = time.monotonic() + 10
        while not (self._run_dir / "left").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        there = sorted({path.name for path in self._run_dir.iterdir()} & {"left", "summary.json"})
        (self._run_dir / "closed").write_text(json.dumps(there), encoding="utf-8")


def _with_wandb(config: Config, groups: Groups) -> None:
    with mock.patch("hyena_dist.train.metrics.WandbRun", _Waits):
        assert _fit(replace(config, train=replace(config.train, steps=1, wandb="mine")), groups) is None
    if groups.world.rank == 1:
        Path(config.train.run_dir, "left").touch()


def _one_rank_sees_damage(checkpoints: Path, groups: Groups) -> list[str]:
    """As where every machine has a copy of its own, or one of them a broken disk."""
    looked, names = checkpoint_directory.changed_file, []
    for rank in (None, 1):
        if groups.world.rank == rank:
            checkpoint_directory.changed_file = lambda path, listed: (
                "its file" if path.name == "step-00000009" else looked(path, listed))
        for found in (find_latest(checkpoints, groups), open_checkpoint(checkpoints / "step-00000009", groups)):
            assert found is not None
            names.append(found.path.name)
    checkpoint_directory.changed_file = looked
    return names


def _deleted(config: Config, groups: Groups) -> str | None:
    try:
        with open_trainer(config, groups, torch.device("cpu")) as trainer:
            take = trainer.objective.curriculum.take

            def deleting() -> Any:
                # Before the first save, which could write into it meanwhile.
                if trainer.status.step == 1 and groups.world.rank == 0:
                    shutil.rmtree(config.train.run_dir)
                return take()

            trainer.objective.curriculum.take = deleting  # type: ignore[method-assign]
            trainer.fit()
    except OSError as error:
        return str(error)
    return None


def _full(config: Config, groups: Groups) -> str | None:
    """Rank 1 cannot write a file of more than some bytes: a full disk that its first save would meet."""
    probe = CheckpointSaver.probe

    def limited(saver: CheckpointSaver) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if groups.world.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
        try:
            probe(saver)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    CheckpointSaver.probe = limited  # type: ignore[method-assign]
    return _fit(config, groups)


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("runs")
    ranks = run_distributed(_runs, 2, str(shards), directory)
    assert ranks[0] == ranks[1], "every rank says the same"
    return directory, ranks[0]


@pytest.mark.parametrize("name", LOST)
def test_a_run_whose_checkpoints_are_lost_does_not_start_afresh(runs: tuple[Path, dict[str, Any]], name: str) -> None:
    directory, found = runs
    for choice in ("auto", str(directory)[:4]):
        message = found[f"{name}: {choice}"]
        print(message)
        assert message.startswith(f"train.run_dir={directory / name} holds a run that cannot go on: ")
        assert message.endswith("or start this one afresh with train.resume=none")
    assert found[f"{name}: rows"] == 9, "the old metrics are as they were"


def test_afresh_where_it_is_said_so(runs: tuple[Path, dict[str, Any]]) -> None:
    directory, found = runs
    assert found["none"] is None
    assert _losses(directory / "damaged") == _losses(directory / "whole")


@pytest.mark.parametrize("name", ["rotten", "branch"])
def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(runs: tuple[Path, dict[str, Any]],
                                                                          name: str) -> None:
    """The run ends as if nothing had happened, and its last checkpoint is a sound one."""
    directory, found = runs
    assert found[name] is None
    steps = range(1, 10) if name == "rotten" else range(7, 10)
    whole = _losses(directory / "whole")
    assert _losses(directory / name) == {step: whole[step] for step in steps}
    names = {path.name for path in (directory / name / "checkpoints").iterdir()}
    assert names == {"step-00000006", "step-00000009"}, "a branch has what it began with as its own first checkpoint"
    if name == "branch":
        assert latest(directory / name / "checkpoints") == step_directory(directory / name / "checkpoints", 9)


def test_all_ranks_take_the_same_where_one_of_them_sees_damage(runs: tuple[Path, dict[str, Any]]) -> None:
    assert runs[1]["agreed"] == 2 * ["step-00000009"] + 2 * ["step-00000006"]


def test_a_directory_that_is_deleted_under_a_run_ends_it(runs: tuple[Path, dict[str, Any]]) -> None:
    directory, found = runs
    assert found["deleted"].startswith(f"train.run_dir={directory / 'deleted'} was deleted or moved under the run")


def test_whether_a_checkpoint_can_be_written_is_tried_before_the_first_step(runs: tuple[Path, dict[str, Any]]) -> None:
    directory, found = runs
    print(found["full"])
    assert "no checkpoint can be written: " in found["full"]
    assert "rank 1: [Errno 27] File too large" in found["full"]
    assert "\n" not in found["full"]
    assert _losses(directory / "full") == {}
    assert list((directory / "full" / "checkpoints").iterdir()) == []


def test_nobody_waits_while_wandb_sends_the_rest(runs: tuple[Path, dict[str, Any]]) -> None:
    assert json.loads((runs[0] / "sent/closed").read_text("utf-8")) == ["left", "summary.json"]


def test_the_trial_leaves_nothing_and_is_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = CheckpointSaver(tmp_path / "checkpoints", Groups.single())
    saver.probe()
    assert list((tmp_path / "checkpoints").iterdir()) == []
    rename = os.rename

    def refuse(source: Any, target: Any) -> None:
        if "checkpoints" in str(target):
            raise PermissionError(1, "Operation not permitted")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(ConfigError, match="no checkpoint can be written: .*Operation not permitted"):
        saver.probe()
    assert list((tmp_path / "checkpoints").iterdir()) == []
    saver.close()


def test_a_lock_of_another_run_is_not_taken_away(tmp_path: Path) -> None:
    """A directory that is deleted and made anew is another run's: it is neither written to nor unlocked."""
    run = RunDirectory(config_of("unused", tmp_path / "run"), first=True)
    run.claim()
    run.check_there()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(OSError, match="was deleted or moved under the run"):
        run.check_there()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").write_text("another's")
    with pytest.raises(OSError, match="or is another run's now"):
        run.check_there()
    run.release()
    assert (tmp_path / "run" / "lock").read_text() == "another's"


def test_weights_that_do_not_say_of_which_model_they_are_start_no_run(tmp_path: Path) -> None:
    config = config_of("unused", tmp_path / "run")
    model = HyenaModel(hyena_config(config.model))
    write_model(tmp_path / "start", "checkpoint", config.model, model)
    config = replace(config, train=replace(config.train, resume=str(tmp_path / "start")))
    run = RunDirectory(config, first=True)
    chosen = run.start_from(None, Groups.single())
    assert chosen is not None
    assert chosen.checkpoint.path == tmp_path / "start", "control"
    assert (chosen.takes, chosen.own, chosen.step) == ("weights", False, 0)
    with pytest.raises(CheckpointError, match="start: it has weights alone, and no run that could go on"):
        chosen.checkpoint.check_resumable()
    saved = {key: value for key, value in chosen.checkpoint.metadata["identity"].items() if key != "model.filter_shift"}
    edit_metadata(tmp_path / "start", identity=saved)
    with pytest.raises(ConfigError, match=r"another configuration: model.filter_shift: saved null, now 0.05: set"):
        run.start_from(None, Groups.single())
    write_model(run.checkpoints / "step-00000000", "checkpoint", config.model, model)
    auto = RunDirectory(replace(config, train=replace(config.train, resume="auto")), first=True)
    own = auto.start_from(auto.newest(Groups.single()), Groups.single())
    assert own is not None
    assert (own.takes, own.own, own.step) == ("weights", True, 0), "put there by hand"


def test_a_run_of_a_version_without_history_does_not_seem_to_begin_where_it_is_resumed(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "step-00000007", {"step": 7})
    note_start(tmp_path, Start(checkpoint), "auto")
    assert read_beginning(tmp_path) is None
    note_start(tmp_path, Start(checkpoint, own=False), "/elsewhere")
    note_start(tmp_path, Start(checkpoint), "auto")
    began = read_beginning(tmp_path)
    assert began is not None
    assert (began["step"], began["resume"]) == (7, "/elsewhere"), "control: a beginning replaces what was before it"
    for strange in (b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"begins": true}'):
        (tmp_path / "history.jsonl").write_bytes(strange + b"\n")
        assert read_beginning(tmp_path) is None
        note_start(tmp_path, Start(checkpoint), "auto")
        assert (tmp_path / "history.jsonl").read_bytes().startswith(strange), "what is not understood stays"


def _claim(directory: Path, names: list[str]) -> str | None:
    """What a rank is told of a run directory, by whose name on each rank the machines differ."""
    groups = init_groups()
    run = RunDirectory(config_of("none", directory / names[groups.world.rank]), first=groups.world.rank == 0)
    run.claim()
    try:
        run.check_shared(groups)
    except ConfigError as error:
        return str(error)
    finally:
        run.release()
    return None


def _claim_both(directory: Path) -> list[str | None]:
    return [_claim(directory, names) for names in (["here", "here"], ["here", "there"])]


def test_a_run_directory_that_another_machine_does_not_have_is_refused(tmp_path):
    first, second = run_distributed(_claim_both, 2, tmp_path)
    assert first[0] is second[0] is None  # the control: both see the same
    assert first[1] == second[1]
    assert f"does not see train.run_dir={tmp_path / 'there'} of rank 0 (host " in first[1]
    assert first[1].startswith("rank 1 (host ")
    assert not (tmp_path / "there").exists()
    assert list((tmp_path / "here").iterdir()) == []
