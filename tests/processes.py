"""Processes that may end at any moment, also between a look at them and the next call."""

import signal
from collections.abc import Iterable
from contextlib import suppress

import psutil


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that nobody has waited for yet does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def send(number: int, processes: Iterable[psutil.Process | int]) -> None:
    """A signal to those of them that are there."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            (psutil.Process(process) if isinstance(process, int) else process).send_signal(number)


def kill(processes: Iterable[psutil.Process | int]) -> None:
    send(signal.SIGKILL, processes)
