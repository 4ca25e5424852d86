"""Seeded damage to every file of a checkpoint: no weight changes in silence, nothing ends in a traceback."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hyena_dist.checkpoint.directory import find_best, find_latest, step_directory
from hyena_dist.checkpoint.format import load_checkpoint, save_checkpoint
from hyena_dist.config.errors import UserError
from hyena_dist.config.load import dump_config
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.convert import read_model
from hyena_dist.model.model import HyenaModel, build_model
from hyena_dist.parallel.groups import Groups, init_groups
from hyena_dist.tasks.evaluate import load_run
from hyena_dist.train.session import open_trainer
from tests.dist.harness import run_distributed
from tests.dist.test_lost_steps import config_of
from tests.dist.test_run_directory import _fit, _losses
from tests.unit.test_convert_directory import _Weights

SECTION = ModelSection(num_layers=1, hidden_size=32, filter_order=4, max_seq_len=32)
CONFIG = Config(model=SECTION, data=DataSection(shards="unused", seq_len=32), train=TrainSection(run_dir="unused"))
STEPS = (10, 20)
State = dict[str, Any]


def damage(path: Path, seed: int) -> str:
    """One byte, or four in a row, become others."""
    draw = random.Random(seed)
    files = sorted(file for file in path.iterdir())
    file = files[seed % len(files)]
    content = bytearray(file.read_bytes())
    length = draw.choice((1, 4))
    offset = draw.randrange(len(content) - length + 1)
    old = bytes(content[offset:offset + length])
    while bytes(content[offset:offset + length]) == old:
        content[offset:offset + length] = draw.randbytes(length)
    file.write_bytes(content)
    return f"{length} bytes at {offset} of {file.name}"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corruption") / "run"
    for step in STEPS:
        model = build_model(replace(CONFIG, train=replace(CONFIG.train, seed=step)), Groups.single())
        metadata = {"step": step, "val_loss": 1.0 / step, "best_val_loss": 1.0 / step,
                    "data": {"step": step, "index": 7}, "loss_scale": {"scale": 65536.0, "good_steps": 3},
                    "seconds": 12.25, "config": None,
                    "identity": {f"model.{key}": value for key, value in asdict(SECTION).items()}}
        save_checkpoint(step_directory(directory / "checkpoints", step), _Weights(model), model.placement(),
                        Groups.single(), metadata)
    (directory / "config.yaml").write_text(dump_config(CONFIG))
    return directory


def bits(model: HyenaModel) -> State:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def of_engine(path: Path) -> State:
    """Weights, moments and metadata, as a resume takes them."""
    model = build_model(CONFIG, Groups.single())
    engine = _Weights(model)
    metadata = load_checkpoint(path, engine, model.placement(), Groups.single())  # type: ignore[arg-type]
    fields = {f"{name}/{field}": value for name, parts in engine.state.items() for field, value in parts.items()}
    return fields | {"metadata": json.dumps(metadata, sort_keys=True), "steps": engine.optimizer_step_count}


READERS: dict[str, Callable[[Path], State]] = {
    "load_checkpoint": lambda run: of_engine(step_directory(run / "checkpoints", STEPS[-1])),
    "evaluate": lambda run: bits(load_run(run)[1]),
    "evaluate the best": lambda run: bits(load_run(run, "best")[1]),
    "convert a run": lambda run: bits(read_model(run)[1]),
    "convert a checkpoint": lambda run: bits(read_model(step_directory(run / "checkpoints", STEPS[-1]))[1]),
    "latest": lambda run: {"metadata": json.dumps(getattr(find_latest(run / "checkpoints"), "metadata", None))},
    "best": lambda run: {"metadata": json.dumps(getattr(find_best(run / "checkpoints"), "metadata", None))},
}


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key] for key in a)


@pytest.mark.parametrize("cases", [range(12), pytest.param(range(12, 204), marks=pytest.mark.slow)])
def test_no_weight_changes_in_silence(run_dir: Path, tmp_path: Path, cases: range) -> None:
    newest = {name: read(run_dir) for name, read in READERS.items()}
    shutil.copytree(run_dir, tmp_path / "before")
    shutil.rmtree(step_directory(tmp_path / "before" / "checkpoints", STEPS[-1]))
    before = {name: read(tmp_path / "before") for name, read in READERS.items() if "checkpoint" not in name}
    before |= {name: READERS[name](_only_first(tmp_path)) for name in newest.keys() - before.keys()}
    assert not any(same(newest[name], before[name]) for name in newest), "control: the two differ"
    outcomes: Counter[str] = Counter()
    for seed in cases:
        work = tmp_path / "work"
        shutil.copytree(run_dir, work)
        what = damage(step_directory(work / "checkpoints", STEPS[-1]), seed)
        for name, read in READERS.items():
            outcome = _outcome(partial(read, work), newest[name], before[name])
            assert outcome in ("refused", "passed over", "without effect"), f"case {seed}: {what}: {name}: {outcome}"
            outcomes[outcome] += 1
        shutil.rmtree(work)
    print(f"{len(cases)} cases through {len(READERS)} readers: {dict(outcomes)}")
    assert outcomes["passed over"] > len(cases)


def _outcome(read: Callable[[], State], newest: State, before: State) -> str:
    try:
        found = read()
    except UserError as error:
        return "refused" if "\n" not in str(error) else f"{error}"
    return "passed over" if same(found, before) else "without effect" if same(found, newest) else "CHANGED"


def _only_first(tmp_path: Path) -> Path:
    """A run whose last checkpoint has what the first has: what readers of a path give that pass it over."""
    run = tmp_path / "first"
    if not run.exists():
        shutil.copytree(tmp_path / "before", run)
        last = step_directory(run / "checkpoints", STEPS[-1])
        last.mkdir()
        (last / "COMPLETE").write_text("damaged")
    return run


def test_the_damage_is_real(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without digests, weights do change in silence."""
    monkeypatch.setattr("hyena_dist.checkpoint.directory.changed_file", lambda *_: None)
    newest, changed = READERS["load_checkpoint"](run_dir), 0
    for seed in range(2, 62, 4):  # the tensors' file
        shutil.copytree(run_dir, tmp_path / "work")
        assert "distcp" in damage(step_directory(tmp_path / "work" / "checkpoints", STEPS[-1]), seed)
        try:
            found = READERS["load_checkpoint"](tmp_path / "work")
            changed += not same(found, newest) and '"step": 20' in found["metadata"]
        except UserError:
            pass
        shutil.rmtree(tmp_path / "work")
    print(f"{changed} of 15 changes of the tensors' file were loaded in silence")
    assert changed >= 3


def _whole_runs(shards: str, directory: Path, cases: range) -> list[tuple[str, str | None, dict[int, float]]]:
    groups = init_groups()
    config = config_of(shards, directory / "whole", steps=9, save_every=3)
    assert _fit(config, groups) is None
    found = []
    for seed in cases:
        run = directory / str(seed)
        what = ""
        if groups.world.rank == 0:
            shutil.copytree(directory / "whole", run)
            what = damage(step_directory(run / "checkpoints", 9), seed)
        torch.distributed.barrier()
        config = replace(config, train=replace(config.train, run_dir=str(run)))
        found.append((what, _fit(config, groups), _losses(run)))
        with open_trainer(config, groups, torch.device("cpu")) as trainer:  # from what it has left
            assert trainer.status.step == 9
            trainer.fit()
    return found


@pytest.mark.slow
def test_whole_runs_go_on_from_the_checkpoint_before(shards: Path, tmp_path: Path) -> None:
    found = run_distributed(_whole_runs, 2, str(shards), tmp_path, range(20))[0]
    whole = _losses(tmp_path / "whole")
    assert sorted(whole) == list(range(1, 10))
    for what, error, losses in found:
        assert (error, losses) == (None, whole), what
