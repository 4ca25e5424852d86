"""Runs whose data fails under them: one line that says what and where, and no step on wrong bases."""

import re
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from hyena_dist.data.manifest import Manifest
from tests.e2e.test_pretrain import ENVIRONMENT, ROOT, command, losses, run, wait_for

DAMAGE = re.compile(r"error: .*shard-00000\.tar: sample 0000000\d \(from .* on\) is damaged: block \d+ \(its bases "
                    r"[\d,]+ to [\d,]+\) does not match its checksum; run shards/verify.py, copy or build the shard")


def damaged(shards: Path, directory: Path) -> Path:
    """A copy with one byte changed in every block but the first of each sample."""
    copy = Path(shutil.copytree(shards, directory))
    index = Manifest.load(copy).index
    data = bytearray((copy / "shard-00000.tar").read_bytes())
    for sample in index.samples:
        for at in range(sample.offset + 20_000, sample.offset + sample.nbytes, 16_000):
            data[at] ^= 1
    (copy / "shard-00000.tar").write_bytes(data)
    return copy


@pytest.mark.parametrize(("launcher", "workers"), [
    ("python", 1), pytest.param("deepspeed", 0, marks=pytest.mark.slow),
    pytest.param("torchrun", 2, marks=pytest.mark.slow)])
def test_a_damaged_shard_ends_a_run(shards, tmp_path, launcher, workers):
    result = run(command(launcher, damaged(shards, tmp_path / "shards"), tmp_path / "run", "train.steps=100",
                         "train.eval_every=0", "train.save_every=0", f"data.num_workers={workers}"))
    assert result.returncode != 0
    if launcher == "python":
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if "is damaged" in line and "error: " in line]
    assert lines, "the rank that reads it says it, or each that does"
    assert all(map(DAMAGE.search, lines)), lines


@pytest.mark.slow
def test_a_reader_that_is_killed_ends_a_run(shards, tmp_path):
    """As by the system when memory is short."""
    process = subprocess.Popen(command("python", shards, tmp_path / "run", "train.steps=4000", "train.eval_every=0",
                                       "train.save_every=0", "data.num_workers=2"), cwd=ROOT, env=ENVIRONMENT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists() and len(losses(tmp_path / "run")) > 2, process)
    reader = psutil.Process(process.pid).children()[0]
    reader.kill()
    started = time.monotonic()
    _, errors = process.communicate(timeout=120)
    print(f"ended after {time.monotonic() - started:.1f} s")
    assert process.returncode == 2
    assert re.search(rf"error: reader process . of 2 \(process {reader.pid}\) has ended: killed by SIGKILL", errors)
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_container_of_little_shared_memory_trains(shards, tmp_path):
    """64 KB of it and 100 files, where a loader that shares tensors waits for ever."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("a mount of its own needs the rights of a container's root")
    train = command("python", shards, tmp_path / "run", "train.steps=4", "train.eval_every=0", "train.save_every=0",
                    "data.num_workers=3", "model.max_seq_len=131072", "data.seq_len=131072", "data.val_seq_len=1024",
                    "model.num_layers=1")
    limited = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && ulimit -n 100 && "$@"'
    result = run(["unshare", "--mount", "sh", "-c", limited, "sh", *train])
    assert result.returncode == 0, result.stderr
    assert len(losses(tmp_path / "run")) == 4
