"""Reader processes: they read ahead, each every so-manieth batch, and send it through a socket of its own.

Nothing of this lies in shared memory, of which a container may have next to none, and no batch takes a file descriptor:
what they run out of would be noticed by nobody. A reader that dies closes its socket, and one that stands still is not
waited for for ever; both end in one line.
"""

import logging
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Generator, Iterable
from itertools import islice
from typing import Any, TypeVar

from hyena_dist.data.errors import DataError

BATCH_SECONDS = 300.0
"""How long a batch may take. Reading one takes milliseconds; a busy file system answers within minutes."""
LOOK_SECONDS = 30.0
"""After which it is said that one is waited for."""
_SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP}
logger = logging.getLogger(__name__)

_SIZE = struct.Struct("<Q")
T = TypeVar("T")


def keep_reading() -> None:
    """For the start of a reader: signals that a run stops for count only when they are sent by the process that reads
    from it.

    Launchers and terminals signal every process of a rank, its readers too; a reader that ended would fail the rank's
    next batch, and the checkpoint would never be written.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    reader = os.getppid()

    def judge() -> None:
        while signal.sigwaitinfo(_SIGNALS).si_pid != reader:
            pass
        os._exit(0)

    threading.Thread(target=judge, name="signals", daemon=True).start()


class _Reader:
    """One process and the socket that its batches come from."""

    def __init__(self, number: int, count: int, read: Callable[[T], Any], tasks: Iterable[T], others: list["_Reader"]):
        self.name = f"reader process {number + 1} of {count}"
        self.socket, sending = socket.socketpair()
        inherited = [self.socket, *(other.socket for other in others)]
        own = islice(tasks, number, None, count)
        context = multiprocessing.get_context("fork")  # a reader touches no device, and starts at once
        self.process = context.Process(target=_serve, args=(read, own, sending, inherited), daemon=True, name=self.name)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until the reader does so itself
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            sending.close()

    def receive(self) -> Any:
        """The next result. Raises DataError: the process has died or stands still."""
        try:
            return pickle.loads(self._exactly(_SIZE.unpack(self._exactly(_SIZE.size))[0]))
        except TimeoutError:
            why = (f"has sent nothing for {BATCH_SECONDS:.0f} s: it was stopped, or the file system of the shards does "
                   f"not answer")
        except (EOFError, ConnectionError):
            self.process.join(5)
            why = f"has ended: {_reason(self.process.exitcode)}"
        raise DataError(f"{self.name} (process {self.process.pid}) {why}; resume with the same command, and with fewer "
                        f"data.num_workers where memory is short (0 reads without)")

    def _exactly(self, size: int) -> bytearray:
        self.socket.settimeout(LOOK_SECONDS)
        data = bytearray(size)
        rest, last = memoryview(data), time.monotonic()
        while rest:
            try:
                count = self.socket.recv_into(rest)
            except TimeoutError:
                waited = time.monotonic() - last
                if waited >= BATCH_SECONDS:
                    raise
                logger.warning("waited %.0f s for a batch of %s (process %d), and wait on", waited, self.name,
                               self.process.pid)
                continue
            if not count:
                raise EOFError
            rest, last = rest[count:], time.monotonic()
        return data

    def end(self) -> None:
        self.socket.close()
        self.process.kill()  # it holds nothing that would have to be put away
        self.process.join(5)


def _reason(status: int | None) -> str:
    if status is None or status >= 0:
        return f"status {status}, its own error stands above"
    killed = signal.Signals(-status).name if -status in signal.valid_signals() else f"signal {-status}"
    return f"killed by {killed}" + (", as the system does when memory is short" if -status == signal.SIGKILL else "")


def _serve(read: Callable[[T], Any], tasks: Iterable[T], sending: socket.socket,
           inherited: list[socket.socket]) -> None:
    """The life of a reader: until nobody takes its results."""
    keep_reading()
    for other in inherited:  # or the death of this rank would not be seen by its readers
        other.close()
    try:
        for task in tasks:
            data = pickle.dumps(_result(read, task), protocol=5)
            sending.sendall(_SIZE.pack(len(data)))
            sending.sendall(data)
    except ConnectionError:
        pass


def _result(read: Callable[[T], Any], task: T) -> Any:
    try:
        return read(task)
    except DataError as error:  # a value: the reader of the results raises it
        return error
    except (OSError, MemoryError) as error:
        return DataError(f"a reader process failed: {error!r}; resume with fewer data.num_workers")


def read_ahead(read: Callable[[T], Any], tasks: Iterable[T], count: int) -> Generator[Any]:
    """`map(read, tasks)` by this many processes, without end; closing the generator ends them.

    Args:
        read: its results are picked up in order, and may be read long before. They should hold no tensors.
        tasks: the same whenever it is gone through.

    Raises:
        DataError: of `read`, or a process that has died or stands still, by name.
    """
    readers: list[_Reader] = []
    try:
        _start(readers, read, tasks, count)
        while True:
            for reader in readers:
                result = reader.receive()
                if isinstance(result, DataError):
                    raise result
                yield result
    finally:
        for reader in readers:
            reader.end()


def _start(readers: list[_Reader], read: Callable[[T], Any], tasks: Iterable[T], count: int) -> None:
    try:
        for number in range(count):
            readers.append(_Reader(number, count, read, tasks, readers))
    except OSError as error:
        raise DataError(f"reader process {number + 1} of {count} cannot be started ({error.strerror}); lower "
                        f"data.num_workers, or raise the limit (`ulimit -a`)") from None
