"""Readers of a model killed by the system, `kill -9`, and started again: the same files, byte for byte."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hyena_dist.data.build import build
from hyena_dist.data.contigs import Source
from hyena_dist.data.splits import FractionSplits
from tests.genomes import write_fasta
from tests.unit.test_generate import save

ROOT = Path(__file__).parents[2]
SEQUENCES = 6000


def inputs(folder: Path, task: str) -> list[str]:
    """Arguments of a call that takes some seconds, and has several parts."""
    save(folder / "model", max_seq_len=400)
    if task == "generate":
        return ["--from", f"{folder}/model", "--bases", "300", "--samples", "8", "--batch", "1"]
    draw = np.random.default_rng(0)
    (folder / "some.fa").write_text("".join(f">s{name}\n{''.join(draw.choice(list('ACGT'), 100))}\n"
                                            for name in range(SEQUENCES)))
    return ["--from", f"{folder}/model", "--fasta", f"{folder}/some.fa", "--bin", "10"]


def inputs_of_shards(folder: Path, command: str) -> list[str]:
    """The same of a call of `score.py` that reads shards, of two species."""
    save(folder / "model", max_seq_len=400)
    draw = np.random.default_rng(0)
    bases = 3_000_000 if command == "perplexity" else 400_000
    sources = [Source(write_fasta(folder / f"{name}.fa", {"c": "".join(draw.choice(list("ACGT"), bases)).encode()}),
                      name) for name in ("left", "right")]
    build(sources, folder / "shards", FractionSplits(0.4))
    return [command, "--from", f"{folder}/model", "--shards", f"{folder}/shards",
            *(() if command == "perplexity" else ("--most", "300"))]


def killed(command: list[str], parts: Path, least: int) -> None:
    """Start a command, and kill it when so many parts are there."""
    process = subprocess.Popen(command, cwd=ROOT)
    deadline = time.monotonic() + 500
    while len(list(parts.glob("*.npz"))) < least and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert process.poll() is None, "it was done before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command", ["perplexity", "distance", "substitutions"])
def test_score_killed_at_any_part_goes_on(command: str, tmp_path: Path) -> None:
    """Twice, at parts that are drawn by chance."""
    arguments, draw = inputs_of_shards(tmp_path, command), random.Random()
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()

    def call(name: str) -> list[str]:
        return [sys.executable, "launchers/score.py", *arguments, "--out", f"{tmp_path}/{name}/p.tsv"]
    subprocess.run(call("whole"), check=True, cwd=ROOT, timeout=900)
    parts = tmp_path / "killed/p.tsv.parts"
    first = draw.randint(1, 2)
    second = first + draw.randint(1, 2)
    print(f"killed when {first} and when {second} parts are there")
    for least in (first, second):
        killed(call("killed"), parts, least)
        assert [path.name for path in parts.parent.iterdir()] == ["p.tsv.parts"]
    assert len(list(parts.glob("*.npz"))) >= second
    subprocess.run(call("killed"), check=True, cwd=ROOT, timeout=900)
    assert sorted(path.name for path in parts.parent.iterdir()) == ["p.md", "p.png", "p.tsv"]
    for path in parts.parent.iterdir():
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes(), path


@pytest.mark.slow
@pytest.mark.parametrize(("task", "ending", "beside"), [("generate", "fa", "tsv"), ("embed", "npy", "npy.tsv")])
def test_killed_by_the_system_it_goes_on(task: str, ending: str, beside: str, tmp_path: Path) -> None:
    arguments = inputs(tmp_path, task)

    def command(name: str) -> list[str]:
        more = ["--likelihoods", f"{tmp_path}/{name}.tsv"] if task == "generate" else []
        return [sys.executable, f"launchers/{task}.py", *arguments, "--out", f"{tmp_path}/{name}.{ending}", *more]

    subprocess.run(command("whole"), check=True, cwd=ROOT, timeout=300)
    killed(command("killed"), tmp_path / f"killed.{ending}.parts", 2)
    assert not (tmp_path / f"killed.{ending}").exists()
    subprocess.run(command("killed"), check=True, cwd=ROOT, timeout=300)
    for end in (ending, beside):
        assert (tmp_path / f"killed.{end}").read_bytes() == (tmp_path / f"whole.{end}").read_bytes()
