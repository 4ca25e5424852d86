"""Heads of bases, bins and pairs through the trainer: over tensor and context ranks, under ZeRO-3 and FSDP2, losses and
gradients are those of one rank; stopped and resumed it is bit-equal; and they learn."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hyena_dist.checkpoint.reader import TensorReader
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.finetune import FinetuneSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.parallel.groups import init_groups
from hyena_dist.train.place_answers import PlaceAnswers
from tests.checkpoints import latest
from tests.dist.harness import run_distributed
from tests.dist.test_finetuning import config_of, rows, run
from tests.dist.toy import engine_section

STEPS, STOP = 20, 7
BINS, BIN_SIZE = 5, 12
"""On two context ranks of 32 tokens the third bin lies on both."""
SECTIONS = {
    "per_base": FinetuneSection(task="per_base", rc="average"),
    "binned": FinetuneSection(task="binned", bin_size=BIN_SIZE, rc="average"),
    "poisson": FinetuneSection(task="binned", bin_size=BIN_SIZE, loss="poisson"),
    "pairs": FinetuneSection(task="pairs", bin_size=BIN_SIZE, diagonals=1, rc="average"),
}
METRIC = {"per_base": "accuracy", "binned": "pearson", "poisson": "pearson", "pairs": "pearson"}


def table(directory: Path, kind: str) -> Path:
    """Bases whose classes, bins whose two tracks and pairs whose numbers follow from which bases are G or C."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 32), ("dev", 9), ("test", 9)):
        odds = rng.choice([0.1, 0.4], (count, BINS, 1))
        strong = rng.random((count, BINS, BIN_SIZE)) < 2 * odds
        bases = np.where(strong, rng.choice(list("GC"), strong.shape), rng.choice(list("AT"), strong.shape))
        share, known = strong.mean(2), 1 + int(rng.integers(BINS))
        lines = ["sequence,label" if kind in ("per_base", "pairs") else "sequence"]
        for row in range(count):
            sequence, label = "".join(bases[row].flat), ""
            if kind == "per_base":
                length = int(rng.integers(33, BINS * BIN_SIZE))
                label = "," + "".join("sw"[int(not value)] for value in strong[row].flat[:length - 1]) + "."
                sequence = sequence[:length]
            elif kind == "pairs":
                values = np.outer(share[row], share[row])[np.triu_indices(BINS, 1)]
                label = "," + " ".join(f"{value:.4f}" for value in values)
            lines.append(sequence + label)
        tracks = np.stack([8 * share, 4 - 3 * share], 2)
        tracks[0, known - 1, 0] = np.nan
        if kind in ("binned", "poisson"):
            np.save(directory / f"{name}.npy", tracks)
        (directory / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


def config(directory: Path, name: str, kind: str, engine: int | str, *, tensor: int = 1, context: int = 1,
           sequence: bool = False, **train: Any) -> Config:
    found = config_of(directory, name, engine)
    return replace(found, finetune=replace(SECTIONS[kind], table=str(directory / kind)),
                   train=replace(found.train, **{"steps": STEPS, "eval_every": 10, **train}),
                   optim=replace(found.optim, lr=1e-2), engine=engine_section(engine),
                   parallel=ParallelSection(tensor=tensor, context=context, sequence=sequence))


def saved(run_dir: Path) -> dict[str, torch.Tensor]:
    reader = TensorReader(latest(run_dir / "seed-0" / "checkpoints"))
    return reader.read(reader.shapes)


def moments(run_dir: Path) -> dict[str, torch.Tensor]:
    """Of a checkpoint after one step: a tenth of each gradient, clipped."""
    return {key: value for key, value in saved(run_dir).items()
            if key.startswith("optim/exp_avg/") and value.abs().max() > 0}


def _split(directory: Path, kinds: list[str], engines: list[int | str], tensor: int, context: int,
           sequence: bool) -> None:
    groups = init_groups(tensor=tensor, context=context)
    for kind in kinds:
        for engine in engines:
            of = {"tensor": tensor, "context": context, "sequence": sequence}
            assert run(config(directory, f"{kind}-{engine}-one", kind, engine, **of, steps=1), groups=groups) is None
            assert run(config(directory, f"{kind}-{engine}", kind, engine, **of), groups=groups) is None
            cut = config(directory, f"{kind}-{engine}-cut", kind, engine, **of)
            assert run(cut, STOP, groups) is not None
            assert run(cut, groups=groups) is None
    if sequence:
        return
    # The control: a rank that counts labels that are another's.
    scored = PlaceAnswers.scored
    PlaceAnswers.scored = lambda *args: 2 * scored(*args)  # type: ignore[method-assign]
    run(config(directory, "wrong", kinds[0], engines[0], tensor=tensor, context=context), groups=groups)
    PlaceAnswers.scored = scored  # type: ignore[method-assign]


def _alone(directory: Path, kinds: list[str]) -> None:
    for kind in kinds:
        run(config(directory, f"{kind}-alone-one", kind, 1, steps=1))
        run(config(directory, f"{kind}-alone", kind, 1))


def check(directory: Path, kinds: list[str], engines: list[int | str], tensor: int, context: int, *,
          sequence: bool = False) -> None:
    for kind in kinds:
        table(directory / kind, kind)
    run_distributed(_alone, 1, directory, kinds, timeout=900.0)
    run_distributed(_split, tensor * context, directory, kinds, engines, tensor, context, sequence, timeout=1800.0)
    for kind in kinds:
        alone = rows(directory / f"{kind}-alone")
        expected = moments(directory / f"{kind}-alone-one")
        assert len(alone) == STEPS + 2
        assert len(expected) > 20
        for engine in engines:
            found = rows(directory / f"{kind}-{engine}")
            assert [row.loss for row in found] == pytest.approx([row.loss for row in alone], rel=1e-5), (kind, engine)
            assert [row.scored for row in found] == [row.scored for row in alone]
            gradients = moments(directory / f"{kind}-{engine}-one")
            assert gradients.keys() == expected.keys()
            largest = max(float(value.abs().max()) for value in expected.values())
            assert max(float((gradients[key] - expected[key]).abs().max()) for key in expected) < 2e-5 * largest
            whole, cut = (saved(directory / f"{kind}-{engine}{end}") for end in ("", "-cut"))
            assert whole.keys() == cut.keys()
            assert all(torch.equal(whole[key], cut[key]) for key in whole), "stopped and resumed"
        result = json.loads((directory / f"{kind}-alone" / "result.json").read_text("utf-8"))
        assert result["metrics"][METRIC[kind]]["mean"] > 0.3, kind
        assert result["baselines"] == {}
        assert not result["collapsed_seeds"]
        assert alone[-1].loss < 0.8 * alone[0].loss, kind
    if not sequence:
        wrong = [row.loss for row in rows(directory / "wrong")]
        assert wrong != pytest.approx([row.loss for row in rows(directory / f"{kinds[0]}-alone")], rel=1e-3), "control"


def test_bins_over_two_context_ranks_learn_as_on_one(tmp_path: Path) -> None:
    check(tmp_path, ["binned"], [1], 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [3, "fsdp"])
def test_every_head_over_tensor_and_context_ranks_learns_as_on_one(tmp_path: Path, engine: int | str) -> None:
    check(tmp_path, [*SECTIONS], [engine], 2, 2)


@pytest.mark.slow
def test_every_head_under_sequence_parallelism_learns_as_on_one(tmp_path: Path) -> None:
    check(tmp_path, ["per_base", "binned", "pairs"], [1], 2, 2, sequence=True)
