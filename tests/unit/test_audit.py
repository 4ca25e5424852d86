"""What a build counts, against plain counting; and that the number of its processes changes nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hyena_dist.cli.build import main as build_command
from hyena_dist.data import build as build_module
from hyena_dist.data.audit import n50
from hyena_dist.data.build import build
from hyena_dist.data.contigs import Source
from hyena_dist.data.crew import Crew
from hyena_dist.data.splits import BedSplits, FractionSplits
from tests.genomes import genome, write_fasta

ROOT = Path(__file__).parents[2]


def counted(texts):
    """The fields of an audit that count letters, one letter at a time."""
    text = b"".join(texts)
    upper = text.upper()
    known = sum(upper.count(base) for base in b"ACGT")
    codes = {chr(code): upper.count(code) for code in b"BDHKMRSUVWY" if upper.count(code)}
    return {"bases": len(text), "gc_share": round((upper.count(b"G") + upper.count(b"C")) / known, 6),
            "n": upper.count(b"N"), "lower_case": sum(97 <= letter for letter in text), "other_codes": codes}


def test_an_audit_counts_every_base(tmp_path):
    one, two = genome(1, 5000, 700, 3000), {"x": b"acgtnRYU" * 30}
    files = [Source(write_fasta(tmp_path / "one.fa", one), "human"), Source(write_fasta(tmp_path / "two.fa", two))]
    bed = tmp_path / "a.bed"
    bed.write_text("human.chr1 100 2000 train\nhuman.chr1 2000 2600 val\nhuman.chr3 0 3000 train\nx 7 100 test\n")
    build(files, tmp_path / "out", BedSplits(bed))
    audit = json.loads((tmp_path / "out/audit.json").read_text())
    assert audit["assemblies"] == [
        {"assembly": "one", "species": "human", "contigs": 3, "longest": 5000, "n50": 5000, **counted(one.values())},
        {"assembly": "two", "species": "two", "contigs": 1, "longest": 240, "n50": 240, **counted(two.values())}]
    parts = {"train": [one["chr1"][100:2000], one["chr3"]], "val": [one["chr1"][2000:2600]], "test": [two["x"][7:100]],
             "none": [one["chr1"][:100], one["chr1"][2600:], one["chr2"], two["x"][:7], two["x"][100:]]}
    for split, texts in parts.items():
        found = dict(audit["splits"][split])
        scored = found.pop("scored")
        assert found == counted(texts), split
        if split != "none":
            assert scored == sum(sum(text[1:].upper().count(base) for base in b"ACGT") for text in texts)


def test_n50_is_of_half_the_bases():
    assert n50([1, 1, 8]) == 8
    assert n50([5, 4, 3, 2, 2]) == 4
    assert n50([7]) == 7


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Contigs of all sizes: short ones that share samples, and one of many samples."""
    directory = tmp_path_factory.mktemp("many")
    contigs = genome(4, *[200] * 300, 60_000, *range(1, 400, 3))
    return Source(write_fasta(directory / "a.fa", contigs), "yeast")


def test_any_number_of_processes_writes_the_same_bytes(tmp_path, monkeypatch, many):
    monkeypatch.setattr(build_module, "_SMALL", 0)
    monkeypatch.setattr(build_module, "_BATCH_BASES", 5000)
    written = []
    for workers in (1, 2, 3):
        out = tmp_path / str(workers) / "out"
        build([many], out, FractionSplits(0.1), workers=workers, segment_bases=4000, shard_bases=50_000)
        written.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert len(written[0]) == 2 + 3
    assert written[0] == written[1] == written[2]


def test_a_crew_hands_on_results_in_order_and_its_errors():
    """Also where the first takes longest."""
    for workers in (1, 3):
        seen = []
        with Crew(workers) as crew:
            for delay in (0.3, 0.0, 0.1, 0.0):
                crew.do(_wait, delay, size=1, then=seen.append)
            crew.finish()
            assert seen == [0.3, 0.0, 0.1, 0.0]
            with pytest.raises(ZeroDivisionError):  # noqa: PT012
                crew.do(divmod, 1, 0, size=1, then=seen.append)
                crew.finish()


def _wait(delay):
    time.sleep(delay)
    return delay


def test_a_worker_that_is_killed_ends_the_build_in_one_line(tmp_path, monkeypatch, capsys, many):
    """As a system does that has no memory left; nothing is left behind."""
    monkeypatch.setattr(build_module, "_SMALL", 0)
    monkeypatch.setattr(build_module, "measure", _die)
    assert build_command([str(many.path), "--out", str(tmp_path / "out"), "--workers", "2"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: a worker of the build was ended from outside")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def _die(_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_worker_outlives_a_build_that_was_killed():
    """And the build is done again from the start."""
    code = ("import sys, time; from hyena_dist.data.crew import Crew\n"
            "with Crew(2) as crew:\n    print(*crew._pool._processes, flush=True)\n    time.sleep(60)")
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    workers = [int(word) for word in parent.stdout.readline().split()]
    assert len(workers) == 2
    assert all(Path(f"/proc/{worker}").exists() for worker in workers)
    parent.kill()
    parent.wait()
    end = time.monotonic() + 30
    while time.monotonic() < end and any(_runs(worker) for worker in workers):
        time.sleep(0.1)
    assert not any(_runs(worker) for worker in workers)


def _runs(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("number", ["0", "-1"])
def test_workers_are_at_least_one(tmp_path, capsys, number):
    path = write_fasta(tmp_path / "a.fa", {"a": np.full(9, 65, np.uint8).tobytes()})
    assert build_command([str(path), "--out", str(tmp_path / "out"), "--workers", number]) == 2
    assert "--workers must be 1 or more" in capsys.readouterr().err
