"""Signals that ask a run to stop, noted from the first line of a program on. Nothing here imports more than Python's
own modules: a signal during the seconds of the other imports must not kill a job without its marker.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

EXIT_REQUEUE = 85
"""Exit status of a run that saved and stopped before its end. A launcher may change it: the marker is the truth."""

STARTED = time.monotonic()
"""When this program began, as near as one of its modules can tell."""

TIME_IS_UP = "train.max_hours"
LAUNCHER_GONE = "launcher gone"
REASONS = (TIME_IS_UP, "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGINT", "SIGTERM", LAUNCHER_GONE)
"""What a run stops for. When ranks have several, the last of this order is the answer of all."""

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
PATIENCE = 20.0
"""Seconds after a signal in which a run that has no step yet may agree with its ranks; then each ends by itself. A
launcher kills 30 seconds after its signal."""
TORCHRUN_ECHO = 2.0
"""torchrun passes a Ctrl-C on to ranks that the terminal has told already: seconds in which a second one is its."""


class Signals:
    """Notes `SIGNALS` between `install` and `uninstall`, which are for the main thread.

    Only the first counts: launchers repeat themselves while a run saves. A second SIGINT, of somebody at a keyboard,
    ends the process at once with status 130. A signal that was ignored when the program started, as under nohup or in a
    shell's background, stays ignored.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        """Why this process was asked to stop, one of `REASONS`; true at once also while the main thread is stuck."""
        self._since = 0.0
        self._alone: Callable[[str], None] | None = None
        self._patience = PATIENCE
        self._interrupted: float | None = None
        self._echo = TORCHRUN_ECHO if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
        self._pid = 0

    @property
    def installed(self) -> bool:
        return self._pid == os.getpid()

    def install(self) -> "Signals":
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._pid = os.getpid()
        # Python calls a handler between two bytecodes, so not while the main thread waits in a collective; the byte in
        # the pipe is there at once, for the thread.
        self._old_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._old_handlers = {number: signal.signal(number, self._handle) for number in SIGNALS
                              if signal.getsignal(number) != signal.SIG_IGN}
        os.register_at_fork(after_in_child=self._disown)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def uninstall(self) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        self._pid = 0
        os.close(self._write_end)  # ends the thread
        self._thread.join()
        os.close(self._read_end)

    def request(self, reason: str) -> None:
        """Ask for a stop, one of `REASONS`; from any thread. The first to ask is remembered."""
        REASONS.index(reason)
        if self.reason is None:
            self._since = time.monotonic()
            self.reason = reason

    def until_first_step(self, alone: Callable[[str], None] | None, *, first: bool = True) -> None:
        """What this process does by itself, in the thread, when a signal has had no answer for `PATIENCE`; None:
        nothing, because there is a step to be saved, and only all ranks together can.

        Args:
            first: of the ranks; the others wait longer, because its peers' end would end it before it can.
        """
        self._alone = alone
        self._patience = PATIENCE + (0.0 if first else 5.0)

    def end_alone(self) -> None:
        """Do that now, if a signal came and there is no step; for a failure that may be of peers which do the same."""
        alone, self._alone = self._alone, None
        if self.reason is not None and alone is not None:
            alone(self.reason)

    def _listen(self) -> None:
        while True:
            ready, _, _ = select.select([self._read_end], [], [], 1.0)
            received = os.read(self._read_end, 64) if ready else b""
            if ready and not received:
                return
            for number in received:
                if number in self._old_handlers:
                    self.request(signal.Signals(number).name)
                    self._count(number)
            if self.reason is not None and time.monotonic() - self._since > self._patience:
                self.end_alone()

    def _count(self, number: int) -> None:
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted is None:
            self._interrupted = now
        elif now - self._interrupted >= self._echo:
            os.write(2, b"interrupted twice: ended without a save\n")
            os._exit(130)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name)

    def _disown(self) -> None:
        """A forked child has the same pipe: a signal to it would count as one to this process."""
        if self._pid not in (0, os.getpid()):
            self._pid = 0
            signal.set_wakeup_fd(-1)


PROCESS = Signals()
"""Of this process. A program installs it in its first lines; without one it is whoever catches signals first."""


def die_of_interrupts() -> None:
    """Let Ctrl-C end this process at once and without a word, until `raise_interrupts`.

    For the first lines of a program: in the seconds of its imports Python's own KeyboardInterrupt is pages of
    traceback, and library code turns it into other errors.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # under nohup it stays ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


def raise_interrupts() -> None:
    """Let Ctrl-C be a KeyboardInterrupt again, and SIGTERM one too, so that what was begun can be cleaned up: a bar of
    progress has hidden the terminal's cursor."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers repeat themselves, in the middle of the cleaning up
    raise Terminated
