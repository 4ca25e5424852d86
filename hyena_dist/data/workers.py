"""Reader processes outlive the signals that a run stops for, because it still takes steps until it has saved."""

import os
import signal
import threading


def keep_reading(_worker_id: int) -> None:
    """For a DataLoader's `worker_init_fn`: signals that stop a run count only when the process that reads from this
    worker sends them.

    Launchers signal every process of a rank, its readers too; a reader that ended would fail the rank's next batch, and
    the checkpoint would never be written. The loader itself ends a reader that does not by SIGTERM.
    """
    signals = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    reader = os.getppid()

    def judge() -> None:
        while signal.sigwaitinfo(signals).si_pid != reader:
            pass
        os._exit(0)

    threading.Thread(target=judge, name="signals", daemon=True).start()
