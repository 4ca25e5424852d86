"""The measured variants of BRCA1, from the table and a slice of the chromosome to AUROC, against a plain loop."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hyena_dist.cli.score import main
from hyena_dist.convert import write_model
from hyena_dist.data.tokenizer import encode
from hyena_dist.tasks.score.report import auroc
from tests.unit.test_score_perplexity import L, model_of

BRCA1 = Path(__file__).parents[1] / "brca1"
FIRST = 41196313
"""The place of the first base, counted from 1; the header of the slice counts from 0."""
TOLERANCE = 1e-6  # of a window's mean log-likelihood; one strand alone is off by more than 1e-3
AUROC = 0.35197
"""Of `model_of`, which has learnt nothing. One pair of the 608 in another order is 0.0016."""


@torch.no_grad()
def by_hand(rows: list[dict[str, str]]) -> np.ndarray:
    """float64 [n, 2], llr_mean of each strand."""
    with gzip.open(BRCA1 / "reference.fa.gz", "rt") as file:
        next(file)
        text = "".join(line.strip() for line in file)
    model, found = model_of().model, []
    for row in rows:
        at = int(row["pos"]) - FIRST
        start = at - L // 2
        plain = text[start : start + L]
        assert plain[L // 2] == row["ref"]
        changed = plain[: L // 2] + row["alt"] + plain[L // 2 + 1 :]
        means = []
        for sequence in (plain, changed):
            for strand in (sequence, sequence[::-1].translate(str.maketrans("ACGT", "TGCA"))):
                ids = torch.from_numpy(encode(strand)).long()
                log_p = model(ids[None])[0].double().log_softmax(-1)
                means.append(log_p[:-1].gather(1, ids[1:, None]).mean().item())
        found.append((means[2] - means[0], means[3] - means[1]))
    return np.array(found)


def rows_of(path: Path) -> list[dict[str, str]]:
    names, *rows = [line.split("\t") for line in path.read_text().splitlines() if not line.startswith("##")]
    return [dict(zip(names, row, strict=True)) for row in rows]


def scored(table: Path, model: Path, capsys: pytest.CaptureFixture) -> tuple[list[dict[str, str]], dict[str, float]]:
    """The rows of the file, and the AUROC of llr_mean by group."""
    out, found = table.with_suffix(".scores.tsv"), table.with_suffix(".json")
    assert main(["variants", "--from", str(model), "--table", str(table), "--fasta", f"{BRCA1}/reference.fa.gz",
                 "--window", str(L), "--out", str(out)]) == 0, capsys.readouterr().err
    assert main(["report", str(out), "--preset", "brca1", "--json", str(found)]) == 0, capsys.readouterr().err
    worth = json.loads(found.read_text())["worth"]
    return rows_of(out), {each["group"]: each["auroc"] for each in worth if each["score"] == "llr_mean"}


def test_auroc_of_brca1_is_that_of_a_plain_loop(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Also of each half of the positions, whose rows have the scores that they have in the whole table."""
    trained = model_of()
    write_model(tmp_path / "model", "safetensors", trained.section, trained.model)
    head, *lines = (BRCA1 / "sge.tsv").read_text().splitlines()
    places = sorted({line.split("\t")[1] for line in lines})
    for name, chosen in (("whole", places), ("half", places[::2]), ("other", places[1::2])):
        some = [line for line in lines if line.split("\t")[1] in chosen]
        (tmp_path / f"{name}.tsv").write_text("\n".join([head, *some]) + "\n")
    rows, areas = scored(tmp_path / "whole.tsv", tmp_path / "model", capsys)
    assert [row["outcome"] for row in rows] == ["scored"] * len(lines)
    wanted, harmful = by_hand(rows), np.array([row["func_class"] == "LOF" for row in rows])
    llr = np.array([float(row["llr_mean"]) for row in rows])
    assert np.abs(llr - wanted.mean(1)).max() < TOLERANCE
    assert np.abs(llr - wanted[:, 0]).max() > 1000 * TOLERANCE, "the control: one strand alone"
    assert areas["all"] == pytest.approx(auroc(harmful, -wanted.mean(1)), abs=1e-12)
    assert areas["all"] == pytest.approx(AUROC, abs=0.002)
    assert abs(auroc(harmful, -wanted[:, 0]) - AUROC) > 0.004, "the control: one strand alone"
    missense = np.array([row["consequence"] == "Missense" for row in rows])
    assert areas["Missense"] == pytest.approx(auroc(harmful[missense], -llr[missense]), abs=1e-12)
    halves = [scored(tmp_path / f"{name}.tsv", tmp_path / "model", capsys) for name in ("half", "other")]
    both = {(row["pos"], row["alt"]): row for half, _ in halves for row in half}
    assert len(both) == len(lines)
    for row in rows:
        assert float(both[row["pos"], row["alt"]]["llr_mean"]) == pytest.approx(float(row["llr_mean"]), abs=TOLERANCE)
    assert all(0 <= found["all"] <= 1 for _, found in halves)
