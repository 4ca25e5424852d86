"""Every kind of answer through the trainer: over tensor and context ranks, under ZeRO-3 and FSDP2, losses and gradients
are those of one rank; stopped or killed and resumed it is bit-equal; and it learns."""

import json
import os
import signal
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from hyena_dist.checkpoint.format import split_parts
from hyena_dist.checkpoint.reader import TensorReader
from hyena_dist.config.schema import Config
from hyena_dist.model.model import build_model
from hyena_dist.parallel.groups import Groups, init_groups
from hyena_dist.train.answers import WholeAnswers
from hyena_dist.train.finetuning import Finetuning
from hyena_dist.train.place_answers import PlaceAnswers
from tests.checkpoints import latest
from tests.compare import rel
from tests.dist.every_head import PLACES, SECTIONS, config, pretrained, tables
from tests.dist.harness import run_distributed
from tests.dist.test_finetuning import rows, run

STEPS, STOP, KILL = 20, 7, 13
"""A run that is killed has saved its fifth and tenth step."""
LOSS, GRADIENT = 1e-5, 2e-5
SMALL = 0.1
"""Losses below it may be off by LOSS of it."""
SLOW_TO_LEARN = ("max", "prompt")
"""Of so short a run nothing is asked of them but that it is the same on several ranks."""
def saved(run_dir: Path) -> dict[str, torch.Tensor]:
    reader = TensorReader(latest(run_dir / "seed-0" / "checkpoints"))
    return reader.read(reader.shapes)


def moments(run_dir: Path) -> dict[str, torch.Tensor]:
    """Of a checkpoint after one step: a tenth of each gradient, clipped."""
    return {key: value for key, value in saved(run_dir).items()
            if key.startswith("optim/exp_avg/") and value.abs().max() > 0}


def _run(directory: Path, name: str, kind: str, groups: Groups, *, stop_at: int = 0, **of: Any) -> str | None:
    found = config(directory, name, kind, **{"eval_every": 10, "steps": STEPS, **of})
    return run(found, stop_at, groups, weights=pretrained(found))


def _alone(directory: Path, kinds: Collection[str]) -> None:
    groups = init_groups()
    for kind in kinds:
        _run(directory, f"{kind}-alone-one", kind, groups, steps=1)
        _run(directory, f"{kind}-alone", kind, groups)


def _split(directory: Path, kinds: Collection[str], tensor: int, context: int, **of: Any) -> None:
    groups, of = init_groups(tensor=tensor, context=context), {"tensor": tensor, "context": context, **of}
    for kind in kinds:
        assert _run(directory, f"{kind}-one", kind, groups, steps=1, **of) is None
        assert _run(directory, f"{kind}-whole", kind, groups, **of) is None
        assert _run(directory, f"{kind}-cut", kind, groups, stop_at=STOP, **of) is not None
        assert _run(directory, f"{kind}-cut", kind, groups, **of) is None
    # The control: ranks that count labels that are another's.
    first = next(iter(kinds))
    answers: Any = PlaceAnswers if first in PLACES else WholeAnswers
    scored = answers.scored
    with patch.object(answers, "scored", lambda *args: 2 * scored(*args)):
        _run(directory, "wrong", first, groups, **of)


def _killed(directory: Path, kind: str, engine: int | str) -> None:
    """A run that saves now and then, whose first rank ends as if its machine had failed."""
    groups, steps = init_groups(context=2), Finetuning.next_step

    def next_step(self: Finetuning) -> Any:
        if self._taken + 1 == KILL and groups.world.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return steps(self)

    with patch.object(Finetuning, "next_step", next_step):
        _saving(directory, f"{kind}-killed", kind, engine, groups)


def _saving(directory: Path, name: str, kind: str, engine: int | str, groups: Groups) -> None:
    assert _run(directory, name, kind, groups, context=2, engine=engine, save_every=5) is None


def _goes_on(directory: Path, kind: str, engine: int | str) -> None:
    groups = init_groups(context=2)
    for name in ("killed", "whole"):
        _saving(directory, f"{kind}-{name}", kind, engine, groups)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind on one rank."""
    directory = tmp_path_factory.mktemp("alone")
    tables(directory, SECTIONS)
    run_distributed(_alone, 1, directory, [*SECTIONS], timeout=1800.0)
    return directory


def check(alone: Path, split: Path, kinds: Collection[str]) -> None:
    """That runs over several ranks, also those that were stopped, are those of one rank, and that these learn."""
    for kind in kinds:
        one, several = rows(alone / f"{kind}-alone"), rows(split / f"{kind}-whole")
        assert len(one) == len(several) == STEPS + 2
        loss = max(abs(found.loss - row.loss) / max(row.loss, SMALL) for found, row in zip(several, one, strict=True))
        expected, found = moments(alone / f"{kind}-alone-one"), moments(split / f"{kind}-one")
        assert expected.keys() == found.keys()
        assert len(expected) >= {"prompt": 1, "head": 2, "lora": 8}.get(kind, 20)
        gradient, name = max((rel(found[key], expected[key]), key) for key in expected)
        print(f"{kind}: losses {loss:.1e}, tolerance {LOSS}; gradients {gradient:.1e} in {name}, tolerance {GRADIENT}")
        assert loss < LOSS, kind
        assert gradient < GRADIENT, (kind, name)
        assert [row.scored for row in several] == [row.scored for row in one]
        assert one[-1].loss < 0.9 * one[0].loss or kind in SLOW_TO_LEARN, kind
        same(split / f"{kind}-whole", split / f"{kind}-cut")
    first = next(iter(kinds))
    wrong = max(abs(found.loss - row.loss) / row.loss for found, row in
                zip(rows(split / "wrong"), rows(alone / f"{first}-alone"), strict=True))
    assert wrong > 100 * LOSS, "the control"


def same(whole: Path, cut: Path) -> None:
    """Bit for bit, and the second went on once."""
    assert len((cut / "seed-0" / "history.jsonl").read_text("utf-8").splitlines()) == 2
    expected, found = saved(whole), saved(cut)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.slow
def test_bins_over_two_context_ranks_learn_as_on_one(tmp_path: Path) -> None:
    tables(tmp_path, ["binned"])
    run_distributed(_alone, 1, tmp_path, ["binned"])
    run_distributed(_split, 2, tmp_path, ["binned"], 1, 2)
    check(tmp_path, tmp_path, ["binned"])
    alone, split = (json.loads((tmp_path / f"binned-{name}" / "result.json").read_text("utf-8"))
                    for name in ("alone", "whole"))
    assert alone["baselines"] == split["baselines"]
    assert 0.5 < alone["baselines"]["kmers"]["pearson"]["mean"] < alone["metrics"]["pearson"]["mean"]
    assert alone["baselines"]["mean"]["pearson"]["mean"] == 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("engine", [1, 3, "fsdp"])
def test_every_kind_over_tensor_and_context_ranks_learns_as_on_one(alone: Path, tmp_path: Path, engine: int | str
                                                                   ) -> None:
    kinds = [*SECTIONS] if engine != 1 else ["lora"]
    tables(tmp_path, kinds)
    run_distributed(partial(_split, engine=engine), 4, tmp_path, kinds, 2, 2, timeout=3000.0)
    check(alone, tmp_path, kinds)
    for kind in kinds:
        if SECTIONS[kind].trained in ("lora", "head", "prompt"):
            untouched(tmp_path / f"{kind}-whole", config(tmp_path, "unused", kind))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_kind_of_place_under_sequence_parallelism_learns_as_on_one(alone: Path, tmp_path: Path) -> None:
    tables(tmp_path, PLACES)
    run_distributed(partial(_split, sequence=True), 4, tmp_path, [*PLACES], 2, 2, timeout=1700.0)
    check(alone, tmp_path, [*PLACES])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "engine"), [("binned", 3), ("lora", "fsdp")])
def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path: Path, kind: str, engine: int | str) -> None:
    tables(tmp_path, [kind])
    with pytest.raises(RuntimeError, match=r"exit code -9|rank 1 of 2 failed"):
        run_distributed(_killed, 2, tmp_path, kind, engine)
    assert 5 <= int(latest(tmp_path / f"{kind}-killed" / "seed-0" / "checkpoints").name[-2:]) < KILL, "the control"
    run_distributed(_goes_on, 2, tmp_path, kind, engine)
    same(tmp_path / f"{kind}-whole", tmp_path / f"{kind}-killed")


def untouched(run_dir: Path, started: Config) -> None:
    """That the frozen weights of a run are byte for byte those that it started from, and others are not."""
    weights, found = pretrained(started), saved(run_dir)
    assert weights is not None
    table = build_model(started, Groups.single()).placement()
    before = {f"model/backbone.{name}{suffix}": part for name, weight in weights.items()
              for suffix, part in split_parts(weight.detach(), table[name]).items()}
    assert len(before) > 20
    for key, weight in before.items():
        assert found[key].numpy().tobytes() == weight.numpy().tobytes(), key
    learnt = {key for key in found if key.startswith("model/")} - before.keys()
    moved = {"model/" + key.removeprefix("optim/exp_avg/") for key in found if key.startswith("optim/exp_avg/")}
    assert learnt == moved, "the control: all others have moments"
