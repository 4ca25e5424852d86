"""Readers go on when a launcher signals every process of a rank, and end when their own rank tells them to."""

import signal
import time

import psutil
import pytest
from torch.utils.data import DataLoader, Dataset

from hyena_dist.data.workers import keep_reading


class _Slow(Dataset[int]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        time.sleep(0.01)
        return index


def _signal(pid: int, number: signal.Signals) -> None:
    """As a launcher: from another process than the reader's own."""
    psutil.Popen(["kill", f"-{int(number)}", str(pid)]).wait()


def _read(init) -> int:
    """Batches read when the readers are signalled after the fifth."""
    iterator = iter(DataLoader(_Slow(), num_workers=2, worker_init_fn=init))
    for read, _ in enumerate(iterator, 1):
        if read == 5:
            for worker in iterator._workers:
                _signal(worker.pid, signal.SIGTERM)
                _signal(worker.pid, signal.SIGUSR1)
    return read


def test_readers_outlive_the_signals_of_a_launcher():
    assert _read(keep_reading) == 40
    with pytest.raises(RuntimeError, match="exited unexpectedly|killed by signal"):  # the control: bare readers
        _read(None)


def test_their_own_rank_can_end_them():
    """As the loader does at exit with one that does not end by itself."""
    iterator = iter(DataLoader(_Slow(), num_workers=1, worker_init_fn=keep_reading))
    next(iterator)
    [worker] = iterator._workers
    started = time.monotonic()
    worker.terminate()
    worker.join(20)
    seconds = time.monotonic() - started
    print(f"ended after {seconds:.2f} s, limit 2 s")
    assert worker.exitcode == 0
    assert seconds < 2
