"""A run that goes on differently: prolonged, changed, branched with all of its state or with its weights alone."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hyena_dist.checkpoint.directory import step_directory
from hyena_dist.checkpoint.format import take_snapshot
from hyena_dist.checkpoint.reader import TensorReader
from hyena_dist.config.errors import TrainingError, UserError
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.engine import EngineSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.parallel.groups import init_groups
from hyena_dist.train.metrics import read_rows
from hyena_dist.train.schedules import learning_rate
from hyena_dist.train.session import open_trainer
from tests.dist.harness import run_distributed
from tests.dist.test_lost_steps import _poison, _record_windows, config_of

SAVE, LOSS = 4, 1e-5
WSD = {"schedule": "wsd", "cooldown": 4.0, "warmup_steps": 2}
FSDP = {"engine": EngineSection(name="fsdp"), "parallel": ParallelSection(tensor=2)}


def _config(shards: str, run_dir: Path, optim: dict[str, Any], data: dict[str, Any] | None = None,
            model: dict[str, Any] | None = None, **train: Any) -> Config:
    settings = {"save_every": SAVE, "keep_every": SAVE, "eval_every": SAVE, "seed": 7}
    config = config_of(shards, run_dir, **(settings | train))
    return replace(config, optim=replace(config.optim, **optim), data=replace(config.data, **(data or {})),
                   model=replace(config.model, **(model or {})))


@dataclass
class Seen:
    """What a start did, or why it did nothing."""

    refused: str | None = None
    began: int = 0
    count: int = 0
    """Adam's."""
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    """Weights and moments before the first step: those that this rank would write into a checkpoint."""
    windows: dict[int, list[int]] = field(default_factory=dict)


def _start(config: Config, prepare: Callable[[], Any], lost: set[int]) -> Seen:
    groups = init_groups(tensor=config.parallel.tensor)
    torch.distributed.barrier()
    if groups.world.rank == 0:
        prepare()
    torch.distributed.barrier()
    try:
        with open_trainer(config, groups, torch.device("cpu")) as trainer:
            seen = Seen(began=trainer.status.step, count=trainer.engine.optimizer_step_count,
                        state=take_snapshot(trainer.engine, trainer.objective.table, groups, {}).tensors,
                        windows=_record_windows(trainer))
            _poison(trainer, lost)
            trainer.fit()
    except (UserError, TrainingError) as error:
        return Seen(refused=str(error))
    return seen


def _run_all(shards: str, directory: Path) -> dict[str, Seen]:
    """Two ranks; every start in the order of its name here."""
    found: dict[str, Seen] = {}

    def start(name: str, optim: dict[str, Any], *, run: str = "", changes: dict[str, Any] | None = None,
              prepare: Callable[[], Any] = lambda: None, lost: set[int] = frozenset(), **keys: Any) -> None:
        config = _config(shards, directory / (run or name), optim, **keys)
        found[name] = _start(replace(config, **(changes or {})), prepare, lost)

    def at(run: str, step: int) -> str:
        return str(step_directory(directory / run / "checkpoints", step))

    constant = {"schedule": "constant", "warmup_steps": 2}
    start("straight", constant, steps=12)
    start("prolonged", constant, steps=8)
    start("prolonged again", constant, run="prolonged", steps=12)
    changed = {"schedule": "cosine", "warmup_steps": 3, "lr": 1e-3, "betas": (0.8, 0.9), "weight_decay": 0.0,
               "eps": 1e-5, "grad_clip": 0.5, "min_lr": 1e-5}
    start("changed", changed, run="prolonged", steps=16, data={"val_seq_len": 64}, model={"embed_dropout": 0.3})

    start("wsd", WSD, steps=16)
    for step in (4, 8):
        start(f"cooled at {step}", WSD, steps=step + 4, resume=at("wsd", step), save_every=2, keep_every=0)
    start("other engine", WSD, steps=16, resume=at("wsd", 8), changes=FSDP)
    start("newest", WSD, steps=20, resume=str(directory / "wsd"))
    start("weights", WSD, steps=6, resume=f"weights:{at('wsd', 8)}", data={"seed": 5}, seed=3)

    back = {"on_nonfinite": "rollback", "save_every": 0, "keep_every": 0}
    start("rolled back", WSD, steps=16, resume=at("wsd", 8), lost={10}, **back)
    start("weights rolled back", WSD, steps=6, resume=f"weights:{at('wsd', 8)}", lost={2}, **back)
    start("nothing to roll back to", WSD, steps=6, lost={2}, **back)

    # The branch goes on by itself where its command is given again, also without its origin.
    start("again", WSD, run="cooled at 4", steps=8, resume=at("wsd", 4), save_every=2, keep_every=0,
          prepare=lambda: (shutil.rmtree(at("cooled at 4", 8)), shutil.move(at("wsd", 4), directory / "away")))
    start("weights again", WSD, run="weights", steps=8, resume=f"weights:{at('wsd', 8)}", data={"seed": 5}, seed=3)

    start("gone", WSD, steps=16, resume=at("wsd", 6))
    start("another origin", WSD, run="cooled at 4", steps=8, resume=at("wsd", 8))
    start("not its origin", WSD, run="straight", steps=12, resume=at("wsd", 8))
    start("weights, not state", WSD, run="cooled at 8", steps=12, resume=f"weights:{at('wsd', 8)}")
    start("own weights", WSD, run="wsd", steps=16, resume=f"weights:{at('wsd', 16)}")
    start("fewer steps", WSD, run="few", steps=6, resume=at("wsd", 8))
    start("other data", WSD, run="data", steps=12, resume=at("wsd", 8), data={"seed": 5})
    start("other model", WSD, run="model", steps=12, resume=f"weights:{at('wsd', 8)}", model={"filter_shift": 0.0})
    start("older of its own", WSD, run="wsd", steps=16, resume=at("wsd", 8))
    return found


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Seen]]]:
    directory = tmp_path_factory.mktemp("going-on")
    return directory, run_distributed(_run_all, 2, str(shards), directory)


def rows(run_dir: Path, split: str = "train") -> dict[int, Any]:
    found = [row for row in read_rows(run_dir / "metrics.jsonl") if row.split == split]
    assert len({row.step for row in found}) == len(found), "a step has one row"
    return {row.step: row for row in found}


def losses(run_dir: Path) -> dict[int, float]:
    return {step: row.loss for step, row in rows(run_dir).items()}


def history(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "history.jsonl").read_text().splitlines()]


def differing(state: dict[str, torch.Tensor], checkpoint: Path) -> set[str]:
    """Kinds of tensors (model, optim/exp_avg, optim/exp_avg_sq) of which a bit differs from a checkpoint's."""
    reader = TensorReader(checkpoint)
    saved = reader.read({key: reader.shapes[key] for key in state})
    return {"/".join(key.split("/")[:2]) if key.startswith("optim") else "model"
            for key, value in state.items() if not torch.equal(value, saved[key])}


def origin(directory: Path, step: int) -> Path:
    moved = directory / "away"
    return moved if step == 4 else step_directory(directory / "wsd" / "checkpoints", step)


def test_a_prolonged_run_is_the_longer_run_bit_for_bit(runs):
    directory, ranks = runs
    straight, prolonged = directory / "straight", directory / "prolonged"
    assert [losses(prolonged)[step] for step in range(1, 13)] == list(losses(straight).values())
    for rank in ranks:
        assert rank["prolonged again"].began == 8
        assert rank["prolonged again"].windows == {step: rank["straight"].windows[step] for step in range(9, 13)}
    assert history(prolonged)[1]["changed"] == {"train.steps": [8, 12]}


def test_what_may_change_changes_and_the_moments_stay(runs):
    directory, ranks = runs
    run_dir = directory / "prolonged"
    for rank in ranks:
        assert (rank["changed"].began, rank["changed"].count) == (12, 12)
        assert rank["changed"].state
        assert differing(rank["changed"].state, step_directory(run_dir / "checkpoints", 12)) == set()
        assert differing(rank["changed"].state, step_directory(run_dir / "checkpoints", 8)) == {
            "model", "optim/exp_avg", "optim/exp_avg_sq"}, "control"
    last = history(run_dir)[-1]
    assert (last["step"], last["from"]) == (12, str(step_directory(run_dir / "checkpoints", 12)))
    assert last["changed"] == {
        "data.val_seq_len": [None, 64], "model.embed_dropout": [0.1, 0.3], "train.steps": [12, 16],
        "optim.betas": [[0.9, 0.999], [0.8, 0.9]], "optim.eps": [1e-4, 1e-5], "optim.grad_clip": [1.0, 0.5],
        "optim.lr": [2e-3, 1e-3], "optim.min_lr": [None, 1e-5], "optim.schedule": ["constant", "cosine"],
        "optim.warmup_steps": [2, 3], "optim.weight_decay": [0.1, 0.0]}
    found = rows(run_dir)
    assert list(found) == list(range(1, 17))
    assert [found[step].lr for step in (12, 16)] == [2e-3, pytest.approx(1e-5)]
    assert "; optim.lr: was 0.002, is 0.001; " in (run_dir / "logs" / "rank-00000.log").read_text()


def test_losses_over_other_windows_are_not_compared(runs):
    """The best of a run whose validation has changed is the best since."""
    directory, _ = runs
    measured = {(row.step, row.seq_len): row.perplexity
                for row in read_rows(directory / "prolonged" / "metrics.jsonl") if row.split == "val"}
    assert [key for key in measured if key[1] == 64] == [(12, 64), (16, 64)]
    summary = json.loads((directory / "prolonged" / "summary.json").read_text())
    assert summary["best_val_perplexity"] == min(measured[12, 64], measured[16, 64])


@pytest.mark.parametrize("step", [4, 8])
def test_a_cool_down_is_branched_off_a_wsd_run(runs, step):
    directory, ranks = runs
    run_dir, whole = directory / f"cooled at {step}", directory / "wsd"
    for rank in ranks:
        seen = rank[f"cooled at {step}"]
        assert (seen.began, seen.count) == (step, step)
        assert differing(seen.state, origin(directory, step)) == set()
        assert seen.windows == {n: rank["wsd"].windows[n] for n in range(step + 1, step + 5)}
    found, of_origin = rows(run_dir), rows(whole)
    assert list(found) == list(range(step + 1, step + 5))
    optim = _config("unused", run_dir, WSD).optim
    assert [row.lr for row in found.values()] == [learning_rate(n, optim=optim, steps=step + 4)
                                                  for n in range(step, step + 4)]
    assert found[step + 4].lr == 0.0
    assert found[step + 1].loss == of_origin[step + 1].loss, "its first loss is before any update of its own"
    assert found[step + 2].loss != of_origin[step + 2].loss, "control: then it cools down"
    assert [row.tokens for row in found.values()] == [of_origin[n].tokens for n in found]
    began = history(run_dir)[0]
    named = str(step_directory(whole / "checkpoints", step))
    assert began == {"begins": True, "step": step, "takes": "state", "from": named, "resume": named,
                     "time": began["time"], "changed": {"train.steps": [16, step + 4], "train.save_every": [4, 2],
                                                        "train.keep_every": [4, 0]}}
    assert json.loads((run_dir / "summary.json").read_text())["branch"] == {
        key: began[key] for key in ("from", "step", "takes")}
    assert json.loads((whole / "summary.json").read_text())["branch"] is None


def test_a_branch_under_another_engine_and_layout(runs):
    directory, ranks = runs
    for rank in ranks:
        seen = rank["other engine"]
        assert differing(seen.state, origin(directory, 8)) == set()
        assert sorted(seen.windows) == list(range(9, 17))
    # Two data ranks share the windows that both tensor ranks have.
    assert set(ranks[0]["other engine"].windows[9]) == {*ranks[0]["wsd"].windows[9], *ranks[1]["wsd"].windows[9]}
    found, whole = losses(directory / "other engine"), losses(directory / "wsd")
    worst = max(abs(found[step] - whole[step]) / whole[step] for step in range(9, 17))
    print(f"losses differ by {worst:.1e}, tolerance {LOSS}")
    assert worst < LOSS
    cooled = losses(directory / "cooled at 8")
    assert max(abs(cooled[step] - whole[step]) / whole[step] for step in range(9, 13)) > LOSS, "control"
    assert history(directory / "other engine")[0]["changed"] == {"engine.name": ["deepspeed", "fsdp"],
                                                                 "parallel.tensor": [1, 2]}


def test_a_run_directory_means_its_newest_checkpoint(runs):
    directory, ranks = runs
    assert all(rank["newest"].began == 16 for rank in ranks)
    assert history(directory / "newest")[0]["from"] == str(origin(directory, 16))
    assert list(losses(directory / "newest")) == [17, 18, 19, 20]


def test_weights_alone_start_afresh(runs):
    directory, ranks = runs
    for rank in ranks:
        seen = rank["weights"]
        assert (seen.began, seen.count) == (0, 0)
        assert differing(seen.state, origin(directory, 8)) == {"optim/exp_avg", "optim/exp_avg_sq"}
        assert not any(value.any() for key, value in seen.state.items() if key.startswith("optim/"))
        assert sorted(seen.windows) == [1, 2, 3, 4, 5, 6]
        assert seen.windows[1] == rank["straight"].windows[1], "from the start of its data"
        assert seen.windows[1] != rank["wsd"].windows[9], "control: those that come next"
    assert rows(directory / "weights")[1].lr == 1e-3, "its warm-up"
    assert history(directory / "weights")[0]["takes"] == "weights"


def test_the_same_command_again_resumes_the_branch_itself(runs):
    directory, ranks = runs
    assert not step_directory(directory / "wsd" / "checkpoints", 4).exists(), "its origin is gone"
    for rank in ranks:
        assert rank["again"].began == 6
        assert rank["again"].windows == {step: rank["cooled at 4"].windows[step] for step in (7, 8)}
        assert (rank["weights again"].began, rank["weights again"].count) == (6, 6)
    assert list(losses(directory / "cooled at 4")) == [5, 6, 7, 8]
    assert [(line["step"], line["begins"]) for line in history(directory / "cooled at 4")] == [(4, True), (6, False)]


def test_a_branch_rolls_back_to_what_it_began_with(runs):
    for rank in runs[1]:
        assert rank["rolled back"].refused is None
        assert rank["rolled back"].windows[9] == rank["wsd"].windows[11], "past the windows of the lost steps"
        assert rank["weights rolled back"].refused is None
        assert rank["weights rolled back"].windows[1] == rank["wsd"].windows[3]
        assert "no checkpoint to go back to" in rank["nothing to roll back to"].refused, "control"
    found = losses(runs[0] / "rolled back")
    assert list(found) == list(range(9, 17))


REFUSED = {
    "gone": "/step-00000006: no such checkpoint: choose one that is kept in {wsd} (step-00000016, "
            "step-00000012, step-00000008); train.keep_every=N lets a run keep every N-th step",
    "another origin": "cooled at 4 holds a run that began with the state of ",
    "not its origin": "straight holds a run that began afresh, not at train.resume=",
    "weights, not state": "cooled at 8 holds a run that began with the state of ",
    "own weights": "and weights start a run of their own: choose another train.run_dir",
    "fewer steps": "train.steps=6 is less than the 8 steps that ",
    "other data": "cannot be resumed with another configuration: data.seed: saved 0, now 5: set these keys as saved, "
                  "or take the weights alone with train.resume=weights:",
    "other model": "another configuration: model.filter_shift: saved 0.05, now 0.0: set these keys as saved",
    "older of its own": "or branch from the older one in another train.run_dir",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_on_is_refused_in_one_line_on_every_rank(runs, name):
    for rank in runs[1]:
        message = rank[name].refused
        print(message)
        assert message is not None
        assert REFUSED[name].replace("{wsd}", str(runs[0] / "wsd" / "checkpoints")) in message
        assert "\n" not in message
