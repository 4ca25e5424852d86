"""The peak of a process is its own, whoever started it."""

import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import resource
from types import SimpleNamespace
from hyena_dist.runtime.memory import peak_memory_bytes
device, held = SimpleNamespace(type="cpu"), []
before = peak_memory_bytes(device)
held.append(b"1" * (64 << 20))
held.clear()
print(before, peak_memory_bytes(device), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
MIB = 1 << 20


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the mark of a process is read from /proc")
def test_a_process_that_a_large_one_has_started_reads_its_own_peak() -> None:
    large = b"1" * (256 * MIB)
    run = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    before, after, of_getrusage = map(int, run.stdout.split())
    assert before < 100 * MIB
    assert 63 * MIB < after - before < 70 * MIB, "what was held, and is free again, counts"
    assert of_getrusage > len(large), "the control: the mark that is inherited"
