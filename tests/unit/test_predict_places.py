"""What a fine-tuned run says of the places of new sequences: an array of each, of which the numbers are those that its
evaluation measured."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyena_dist.cli.predict import main
from tests.finished import config_of, finish
from tests.unit.test_predict import read

BIN, CUT, APART = 4, 1, 2
TASKS: dict[str, dict[str, Any]] = {
    "per_base": {"task": "per_base", "rc": "average"},
    "binned": {"task": "binned", "bin_size": BIN, "bins_cut": CUT, "loss": "poisson", "rc": "average"},
    "pairs": {"task": "pairs", "bin_size": BIN, "bins_cut": CUT, "diagonals": APART, "rc": "average"},
}
SIZES = {"train": (48, 64, 40), "dev": (48, 32), "test": (64, 32, 48, 40, 64, 52)}


def label_of(task: str, bases: int, draw: np.random.Generator) -> tuple[str, np.ndarray]:
    """As it stands in a table, and as an array in the shape of the answers."""
    if task == "per_base":
        letters = draw.integers(0, 2, bases)
        return "".join("ie"[letter] for letter in letters), 1 - letters  # classes are e and i
    bins = bases // BIN - 2 * CUT
    values = draw.integers(0, 9, bins if task == "binned" else (bins - APART) * (bins - APART + 1) // 2).astype(float)
    text = " ".join(map(str, values))
    if task == "binned":
        return text, values[:, None]
    found = np.full((bins, bins), np.nan)
    found[np.triu_indices(bins, APART)] = values
    return text, found


@pytest.mark.parametrize("task", TASKS)
def test_of_its_own_test_split_it_says_what_the_evaluation_measured(task: str, tmp_path: Path,
                                                                    capsys: pytest.CaptureFixture[str]) -> None:
    draw, table, labels = np.random.default_rng(2), tmp_path / "table", {}
    table.mkdir()
    for split, sizes in SIZES.items():
        lines = ["name,sequence,label"]
        for number, bases in enumerate(sizes):
            text, labels[number] = label_of(task, bases, draw)
            lines.append(f"s/{number},{''.join(draw.choice(list('ACGT'), bases))},{text}")
        (table / f"{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    run, out = finish(config_of(tmp_path / "run", table, **TASKS[task])), tmp_path / "answers.npz"
    command = ["--from", str(run), "--sequences", str(table / "test.csv"), "--out", str(out)]
    assert main(command) == 0
    index, arrays = read(tmp_path / "answers.npz.tsv"), np.load(out)
    assert [row["name"] for row in index] == list(arrays) == [f"s/{number}" for number in range(len(SIZES["test"]))]
    judged = read(run / "seed-0/predictions.tsv")
    for number, (row, of_run) in enumerate(zip(index, judged, strict=True)):
        found, wanted = arrays[row["name"]], labels[number]
        assert row["shape"] == " ".join(map(str, found.shape))
        assert found.dtype == np.float32
        if task == "per_base":
            assert found.shape == (SIZES["test"][number], 2)
            assert found.sum(1) == pytest.approx(1, abs=1e-6)
            chance = np.take_along_axis(found, wanted[:, None], 1)
            assert (chance > 0.5).mean() == pytest.approx(float(of_run["accuracy"]), rel=1e-5)
            assert -np.log(chance).mean() == pytest.approx(float(of_run["loss"]), rel=1e-4)
            continue
        assert found.shape == wanted.shape
        assert (np.isnan(found) == np.isnan(wanted)).all()
        there = ~np.isnan(wanted)
        measured = np.corrcoef(found[there], wanted[there])[0, 1]
        assert measured == pytest.approx(float(of_run["pearson"]), abs=1e-4)
        turned = np.corrcoef(found[there][::-1], wanted[there])[0, 1]
        assert abs(turned - measured) > 1e-3, "the control"
    (table / "test.csv").write_text("name,sequence\na,ACGTACGTACGTACGTACGT\na,ACGTACGTACGTACGTACGT\n", encoding="utf-8")
    for other, said in (("other.npz", "2 sequences are called 'a'"), ("a.tsv", "name a file that ends in .npz")):
        assert main([*command[:-1], str(tmp_path / other)]) == 2
        assert said in capsys.readouterr().err
    (table / "test.csv").write_text("name,sequence\na,ACGTACGTACGTACGTACGTA\n", encoding="utf-8")
    status = main([*command[:-1], str(tmp_path / "odd.npz")])
    assert status == (0 if task == "per_base" else 2)
    assert ("21 bases are not whole bins of 4" in capsys.readouterr().err) == bool(status)
