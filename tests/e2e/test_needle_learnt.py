"""A model finds the needle over four context ranks, and does not once they cannot hear each other: the first two stages
of the recipe, the second of them split over the ranks."""

import subprocess
from pathlib import Path

import pytest

from benchmarks.commands import run_all
from benchmarks.needle import RANKS, commands
from hyena_dist.tasks.needle import accuracy_by_slice


def right(predictions: Path) -> float:
    counts = accuracy_by_slice(predictions.read_text("utf-8").splitlines())
    return sum(right for right, _ in counts.values()) / sum(count for _, count in counts.values())


@pytest.mark.slow
def test_what_is_learnt_over_four_ranks_is_heard_through_the_exchange(tmp_path: Path,
                                                                      capfd: pytest.CaptureFixture[str]) -> None:
    stages = commands(tmp_path)[:4]
    stages[3] = [*stages[3], f"parallel.context={RANKS}", "train.micro_batch_size=16", "train.global_batch_size=16"]
    run_all(stages)
    table, run, cut = tmp_path / "needle-1k", tmp_path / "1k/seed-0", tmp_path / "cut.tsv"
    severed = ["torchrun", f"--nproc_per_node={RANKS}", "-m", "benchmarks.needle", str(run), str(table), str(cut)]
    run_all([severed])
    assert right(run / "predictions.tsv") > 0.9
    assert 0.4 < right(cut) < 0.6, "300 sequences answered by chance"
    predictions = run / "predictions.tsv"
    lines = predictions.read_text("utf-8").splitlines()
    wrong = lines[3].split("\t")
    wrong[2] = "10"[int(wrong[2])]
    predictions.write_text("\n".join([*lines[:3], "\t".join(wrong), *lines[4:]]) + "\n")
    capfd.readouterr()
    assert subprocess.run(severed, check=False).returncode
    assert "its predictions.tsv has other answers than its weights give" in capfd.readouterr().err
