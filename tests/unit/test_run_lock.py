"""One run per directory; a killed run leaves it free at once."""

import fcntl
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from hyena_dist.config.errors import ConfigError
from hyena_dist.runtime.requeue import in_use
from hyena_dist.runtime.run_lock import RunLock
from tests.dist.harness import fork_server


def _hold(run_dir: str) -> None:
    lock = RunLock(Path(run_dir))
    with open(f"{run_dir}/inherited", "w") as control:
        fcntl.flock(control, fcntl.LOCK_EX)
        reader = os.fork()  # as a data loader's worker, which outlives a killed run for some seconds
        if reader == 0:
            time.sleep(20)
            os._exit(0)
        Path(run_dir, "reader").write_text(str(reader))
        time.sleep(60)
    lock.release()


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path):
    holder = fork_server().Process(target=_hold, args=(str(tmp_path),))
    holder.start()
    try:
        _wait_for(tmp_path / "reader")
        with pytest.raises(ConfigError) as refused:
            RunLock(tmp_path)
        message = str(refused.value)
        assert message.startswith(f"train.run_dir={tmp_path} is in use by another run (host {socket.gethostname()}, "
                                  f"process {holder.pid}")
        assert ", since 20" in message
        assert message.endswith("choose another train.run_dir")
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
    RunLock(tmp_path).release()
    assert not (tmp_path / "lock").exists()
    # The control: a lock that forked readers inherit would still be held.
    with (tmp_path / "inherited").open("w") as control, pytest.raises(BlockingIOError):
        fcntl.flock(control, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.kill(int((tmp_path / "reader").read_text()), signal.SIGKILL)


def test_the_slurm_job_of_the_holder_is_named(tmp_path):
    lock = RunLock(tmp_path)
    lock._file.truncate(0)
    lock._file.write('{"host": "gpu07", "pid": 3, "job": "4711", "since": "2026-01-02 03:04:05"}')
    lock._file.flush()
    holder = fork_server().Process(target=_refused, args=(str(tmp_path),))
    holder.start()
    holder.join()
    assert holder.exitcode == 0
    assert "(host gpu07, process 3, SLURM job 4711, since 2026-01-02 03:04:05)" in (tmp_path / "said").read_text()
    lock.release()


def _refused(run_dir: str) -> None:
    with pytest.raises(ConfigError) as refused:
        RunLock(Path(run_dir))
    Path(run_dir, "said").write_text(str(refused.value))


def _look(run_dir: str) -> None:
    Path(run_dir, "seen").write_text(str(in_use(Path(run_dir))))


def _seen_by_another(run_dir: Path) -> bool:
    process = fork_server().Process(target=_look, args=(str(run_dir),))
    process.start()
    process.join()
    return (run_dir / "seen").read_text() == "True"


def test_whoever_looks_whether_it_is_still_his_keeps_it(tmp_path):
    lock = RunLock(tmp_path)
    assert lock.is_ours()
    assert _seen_by_another(tmp_path)
    (tmp_path / "lock").open().close()
    assert not _seen_by_another(tmp_path), "the control: a process that closes another descriptor loses its lock"
    lock.release()


def test_where_inodes_change_it_is_known_by_its_text_and_kept(tmp_path, monkeypatch):
    """As on some FUSE file systems."""
    lock = RunLock(tmp_path)
    monkeypatch.setattr(os.path, "samestat", lambda *_: False)
    assert lock.is_ours()
    monkeypatch.undo()
    assert _seen_by_another(tmp_path)
    lock.release()


@pytest.mark.parametrize("change", [lambda path: path.write_text("{}\n"), lambda path: path.unlink(),
                                    lambda path: (path.unlink(), path.write_text("{}\n"))],
                         ids=["written over", "deleted", "replaced"])
def test_what_another_run_has_taken_is_not_his_and_is_left(tmp_path, change):
    """As where a file system has no locks."""
    lock = RunLock(tmp_path)
    change(lock.path)
    assert not lock.is_ours()
    there = lock.path.exists()
    lock.release()
    assert lock.path.exists() == there


def test_what_stands_in_its_place_is_not_waited_for(tmp_path):
    lock = RunLock(tmp_path)
    assert lock.is_ours(), "control"
    lock.path.unlink()
    os.mkfifo(lock.path)
    assert lock.is_ours(), "it may be: nobody can tell"
    lock.release()


def test_where_it_cannot_be_written_is_said(tmp_path):
    with pytest.raises(OSError, match="lock: could not be written .*change train.run_dir"):
        RunLock(tmp_path / "missing")
