"""Readers go on when a launcher signals every process of a rank, end with their own rank, and are missed when they die.
"""

import gc
import itertools
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import traceback
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest
from torch.utils.data import DataLoader, Dataset

from hyena_dist.data import manifest as manifest_module
from hyena_dist.data import workers
from hyena_dist.data.errors import DataError
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.stream import TrainStream
from hyena_dist.data.tokenizer import encode
from hyena_dist.data.workers import read_ahead
from tests.genomes import genome, shards

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def _signal(pid: int, number: signal.Signals) -> None:
    """As a launcher: from another process than the reader's own."""
    psutil.Popen(["kill", f"-{int(number)}", str(pid)]).wait()


def _read() -> int:
    """Batches read when the readers are signalled after the fifth."""
    with closing(read_ahead(_squares, _From(), 2)) as results:
        for read, _ in enumerate(itertools.islice(results, 40), 1):
            if read == 5:
                for worker in multiprocessing.active_children():
                    for number in SIGNALS:
                        _signal(worker.pid, number)
    return read


def _bare() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def test_readers_outlive_the_signals_of_a_launcher(monkeypatch):
    assert _read() == 40
    monkeypatch.setattr(workers, "keep_reading", _bare)  # the control
    with pytest.raises(DataError, match=r"^reader process \d of 2 .* has ended: killed by SIG(TERM|USR1|INT|HUP)"):
        _read()
    assert multiprocessing.active_children() == []


def test_their_own_rank_can_end_them():
    """As Python does at exit with a process that does not end by itself."""
    with closing(read_ahead(_squares, _From(), 1)) as results:
        next(results)
        [worker] = multiprocessing.active_children()
        worker.terminate()
        worker.join(60)
        assert worker.exitcode == 0  # by its own handler; one that passed over the signal would still live


def _squares(number: int) -> tuple[int, np.ndarray]:
    return number * number, np.full(200_000, number)


class _From:
    """Tasks without end, or with an error."""

    def __init__(self, bad: int = -1) -> None:
        self.bad = bad

    def __iter__(self):
        return itertools.count()

    def read(self, number: int):
        if number == self.bad:
            raise self.error
        return _squares(number)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_results_come_in_order(count):
    with closing(read_ahead(_squares, _From(), count)) as results:
        for number, (square, array) in zip(range(23), results, strict=False):
            assert square == number * number
            assert (array == number).all()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("error", [DataError("shard x is damaged"), OSError(5, "Input/output error"), MemoryError()])
def test_an_error_of_a_reader_is_one_line(error):
    tasks = _From(3)
    tasks.error = error
    with closing(read_ahead(tasks.read, tasks, 2)) as results:
        assert [next(results)[0] for _ in range(3)] == [0, 1, 4]
        with pytest.raises(DataError) as caught:
            next(results)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("shard x" if isinstance(error, DataError) else "a reader process failed: ")
    assert multiprocessing.active_children() == []


def _second(results) -> psutil.Process:
    next(results)
    [process] = [child for child in multiprocessing.active_children() if "2 of 3" in child.name]
    return psutil.Process(process.pid)


@pytest.mark.parametrize(("number", "why"), [(signal.SIGKILL, "killed by SIGKILL, as the system does when memory"),
                                             (signal.SIGXCPU, "killed by SIGXCPU")])
def test_a_reader_that_dies_is_named(number, why):
    with closing(read_ahead(_squares, _From(), 3)) as results:
        reader = _second(results)
        reader.send_signal(number)
        with pytest.raises(DataError, match=rf"^reader process 2 of 3 \(process {reader.pid}\) has ended: {why}"):
            list(itertools.islice(results, 100))
    assert multiprocessing.active_children() == []


def test_a_reader_that_stands_still_is_not_waited_for_for_ever(monkeypatch, caplog):
    """Also in the midst of a batch: these are larger than what a socket holds. The control: it goes on in time."""
    monkeypatch.setattr(workers, "BATCH_SECONDS", 2.0)
    monkeypatch.setattr(workers, "LOOK_SECONDS", 0.2)
    with closing(read_ahead(_squares, _From(), 3)) as results:
        reader = _second(results)
        reader.send_signal(signal.SIGSTOP)
        _later = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -CONT {reader.pid}"])
        assert [square for square, _ in itertools.islice(results, 9)] == [i * i for i in range(1, 10)]
        _later.wait()
        assert f"s for a batch of reader process 2 of 3 (process {reader.pid})" in caplog.text
        reader.send_signal(signal.SIGSTOP)
        with pytest.raises(DataError, match="^reader process 2 of 3 .* has sent nothing for 2 s: .*; resume"):
            list(itertools.islice(results, 100))
    assert multiprocessing.active_children() == []


def test_readers_end_with_a_rank_that_was_killed():
    code = ("import itertools, multiprocessing, os, signal\n"
            "from hyena_dist.data.workers import read_ahead\n"
            "from tests.unit.test_workers import _From, _squares\n"
            "results = read_ahead(_squares, _From(), 3)\n"
            "next(results)\n"
            "print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          cwd=Path(__file__).parents[2])
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 3, done.stderr
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    assert not alive


def _shared_memory() -> set[str]:
    """What processes of this machine map or open of it."""
    found = set()
    for process in (psutil.Process(), *psutil.Process().children()):
        found |= {line.split(maxsplit=5)[-1] for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()
                  if "/dev/shm/" in line or "/torch_" in line or "memfd" in line}
    return found


def test_batches_need_no_shared_memory_and_no_file_descriptors(tmp_path):
    """A container may have 64 MB of the one, a login node 256 of the other. The control: torch's loader maps it."""
    manifest = shards(tmp_path, genome(1, 9000))
    stream = TrainStream(manifest, seq_len=64, seed=0)
    before = _shared_memory()
    with closing(stream.batches(stream.start(), micro_batch_size=4, global_batch_size=4, num_workers=2)) as batches:
        held = [next(batches) for _ in range(8)]
        gc.collect()  # garbage of other tests may hold descriptors
        opened = len(os.listdir("/proc/self/fd"))
        held += [next(batches) for _ in range(200)]
        assert len(os.listdir("/proc/self/fd")) == opened
        assert _shared_memory() == before
    assert len(held) == 208
    kept = list(itertools.islice(DataLoader(_Tensors(), num_workers=1), 3))
    assert _shared_memory() != before
    del kept


class _Tensors(Dataset[np.ndarray]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> np.ndarray:
        return np.full(100_000, index)


def _in_a_child(check) -> int:
    """Status of a forked process that does this: limits end with it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            check()
            status = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize(("soft", "hard", "most"), [(60, 60, 15), (60, 4096, 100), (1024, 4096, 100)])
def test_more_shards_than_files_that_may_be_open(tmp_path, monkeypatch, soft, hard, most):
    """The limit is raised, shards take turns, and most files are left to the rest of a run."""
    contigs = genome(2, 12_000)
    directory = shards(tmp_path, contigs, segment_bases=100, shard_bases=100).directory
    want = encode(contigs["chr1"])
    monkeypatch.setattr(manifest_module, "MOST_OPEN", 100)

    def check():
        manifest = Manifest.load(directory)
        assert len(manifest.shards) == 120
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(3):
            assert np.array_equal(manifest.read("chr1", 0, 12_000), want)
        assert len(manifest._files) == most
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == max(soft, min(hard, 512))
        assert len(os.listdir("/proc/self/fd")) < most + 30

    assert _in_a_child(check) == 0


def test_no_file_that_may_be_open_is_one_line(tmp_path):
    manifest = shards(tmp_path, genome(2, 500))

    def check():
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        with pytest.raises(DataError, match=r"\.tar: cannot be read \(Too many open files\); .*`ulimit -n`"):
            manifest.read("chr1", 0, 500)
        stream = TrainStream(manifest, seq_len=64, seed=0)
        with pytest.raises(DataError, match="reader process 1 of 2 cannot be started .Too many open files"):
            next(stream.batches(stream.start(), micro_batch_size=4, global_batch_size=4, num_workers=2))

    assert _in_a_child(check) == 0
