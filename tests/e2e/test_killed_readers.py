"""Generation and embedding killed by the system, `kill -9`, and started again: the same files, byte for byte."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

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


@pytest.mark.slow
@pytest.mark.parametrize(("task", "ending", "beside"), [("generate", "fa", "tsv"), ("embed", "npy", "npy.tsv")])
def test_killed_by_the_system_it_goes_on(task: str, ending: str, beside: str, tmp_path: Path) -> None:
    arguments = inputs(tmp_path, task)

    def command(name: str) -> list[str]:
        more = ["--likelihoods", f"{tmp_path}/{name}.tsv"] if task == "generate" else []
        return [sys.executable, f"launchers/{task}.py", *arguments, "--out", f"{tmp_path}/{name}.{ending}", *more]

    subprocess.run(command("whole"), check=True, cwd=ROOT, timeout=300)
    process = subprocess.Popen(command("killed"), cwd=ROOT)
    parts, deadline = tmp_path / f"killed.{ending}.parts", time.monotonic() + 200
    while len(list(parts.glob("*.npz"))) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.poll() is None, "it was done before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / f"killed.{ending}").exists()
    subprocess.run(command("killed"), check=True, cwd=ROOT, timeout=300)
    for end in (ending, beside):
        assert (tmp_path / f"killed.{end}").read_bytes() == (tmp_path / f"whole.{end}").read_bytes()
