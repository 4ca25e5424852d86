"""A rank that can only hang ends in seconds and says why; one that works is left alone. Real processes, killed."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from hyena_dist.parallel.groups import Axis, gloo_copy
from hyena_dist.runtime.launcher import launcher_processes, leave
from hyena_dist.runtime.logs import RankLog
from hyena_dist.runtime.signals import EXIT_REQUEUE
from hyena_dist.runtime.stop import StopSignal
from hyena_dist.runtime.watchdog import Patience, Watchdog
from tests.dist.harness import fork_server
from tests.processes import is_alive, kill


@dataclass
class Rank:
    """What a rank's function gets."""

    rank: int
    axis: Axis
    stop: StopSignal
    watchdog: Watchdog
    directory: Path


class _Counted(Watchdog):
    """Writes a byte for each look at everything, of which there is at most one in a period: tests wait for looks, and
    count them, where a clock would judge how busy the machine is."""

    looks: Path

    def _look_at_stop(self) -> None:
        super()._look_at_stop()
        with self.looks.open("ab") as file:
            file.write(b".")


PATIENCE = Patience(period=0.1, peer=0.4, stop=1.0, start=1.0, still=0.5, note=0.5, batch=1.5)
HUNG = 30.0
MANY = 15
"""Looks in which every patience but that for a start would have ended."""


def _ranks(fn: Callable[..., int], directory: Path, launchers: list[psutil.Process] | None = None) -> None:
    """This process becomes two ranks of `fn`; the first is its child. Ends with the status that `fn` returns."""
    rank = 0 if os.fork() == 0 else 1
    _join(fn, rank, directory, launchers or [])


def _set_clock(seconds: float) -> None:
    """What psutil derives from the clock, the time of the boot, as if the clock was set just now."""
    linux = psutil._psplatform
    real = linux.boot_time
    linux.boot_time = lambda: real() + seconds


def _join(fn: Callable[..., int], rank: int, directory: Path, launchers: list[psutil.Process]) -> None:
    (directory / f"pid.{rank}").write_text(str(os.getpid()))
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2,
                            timeout=timedelta(seconds=2 * HUNG))
    axis = gloo_copy(Axis.of(dist.group.WORLD))
    if fn is _other_clock and rank == 1:
        before = psutil.Process().create_time()
        _set_clock(1.0)
        (directory / "clock").write_text(str(psutil.Process().create_time() - before))
    status = 1
    _Counted.looks = directory / f"looks.{rank}"
    try:
        with RankLog(directory, rank), StopSignal(axis) as stop, \
                _Counted(axis, stop, launchers=launchers, patience=PATIENCE) as watchdog:
            (directory / f"ready.{rank}").touch()
            status = fn(Rank(rank, axis, stop, watchdog, directory))
    finally:
        leave(status)


def _compute(me: Rank) -> int:
    """No collective that could fail, and signals only set a flag."""
    while not (me.directory / "enough").exists():
        time.sleep(0.02)
    return 0


def _stuck(me: Rank) -> int:
    """Rank 1 waits for rank 0, which never comes."""
    if me.rank == 0:
        return _compute(me)
    me.watchdog.beat()
    dist.barrier(group=me.axis.group)
    return 0


def _absent(me: Rank) -> int:
    """Rank 1 waits for rank 0 for no longer than a collective may take."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=1))
    if me.rank == 0:
        return _compute(me)
    me.watchdog.beat(allow=60)
    dist.barrier(group=group)
    return 0


def _in_vain(me: Rank) -> int:
    """Each waits for the other in another collective."""
    groups = [dist.new_group(backend="gloo", timeout=timedelta(seconds=1)) for _ in range(2)]
    me.watchdog.beat(allow=60)
    dist.barrier(group=groups[me.rank])
    return 0


def _steps(me: Rank) -> int:
    """A loop that saves for longer than the watchdog waits for a step, and tells it so."""
    for step in range(3000):
        time.sleep(0.02)
        me.watchdog.beat()
        reason = me.stop.agreed()
        if reason is not None:
            me.watchdog.beat(allow=60)
            time.sleep(1.7)
            (me.directory / f"saved.{me.rank}").write_text(f"{step} {reason}")
            return EXIT_REQUEUE
    return 0


def _defect(me: Rank) -> int:
    if me.rank == 0:
        raise ZeroDivisionError("a defect of rank 0")
    return _compute(me)


def _no_batch(me: Rank) -> int:
    """Rank 1 gets two batches in time, and no third; rank 0 waits for it in a collective."""
    def batches() -> Iterator[None]:
        for seconds in (0.7, 0.7, 100.0):
            time.sleep(seconds)
            with (me.directory / "batches").open("ab") as file:
                file.write(b".")
            yield

    if me.rank == 1:
        for _ in me.watchdog.each(batches(), "a batch", remedy="set data.num_workers=0"):
            time.sleep(0.1)
        return 0
    dist.barrier(group=me.axis.group)
    return 0


def _other_clock(me: Rank) -> int:
    """For rank 1 the machine was booted a second later, as after its clock was set."""
    me.watchdog.beat()
    return _compute(me)


def _early(me: Rank) -> int:
    """Rank 1 is done long before rank 0."""
    if me.rank == 0:
        time.sleep(1.7)
    return 0


def _launch(fn: Callable[..., int], directory: Path) -> None:
    """A launcher of two ranks, which ignores what becomes of them."""
    launcher = psutil.Process()
    for rank in (0, 1):
        if os.fork() == 0:
            _join(fn, rank, directory, [launcher])
    while True:
        time.sleep(1)


class Run:
    """Two ranks, and what becomes of them."""

    def __init__(self, directory: Path, fn: Callable[..., int], *, start: Callable[..., None] = _ranks) -> None:
        self.directory = directory
        self.top = fork_server().Process(target=start, args=(fn, directory))
        self.top.start()
        wait_for(lambda: all((directory / f"ready.{rank}").exists() for rank in (0, 1)))
        self.ranks = [psutil.Process(int((directory / f"pid.{rank}").read_text())) for rank in (0, 1)]

    def kill(self, rank: int, number: int) -> None:
        self.ranks[rank].send_signal(number)

    def alive(self, rank: int) -> bool:
        return is_alive(self.ranks[rank])

    def wait_until_ended(self, *ranks: int) -> None:
        wait_for(lambda: not any(self.alive(rank) for rank in ranks), HUNG)

    def looks(self, rank: int) -> int:
        """How often its watchdog has looked."""
        path = self.directory / f"looks.{rank}"
        return path.stat().st_size if path.exists() else 0

    def wait_for_looks(self, count: int, *ranks: int) -> None:
        """Until the watchdog of each of them, all of which live, has looked this often again."""
        wanted = {rank: self.looks(rank) + count for rank in ranks}
        wait_for(lambda: all(self.looks(rank) >= wanted[rank] or not self.alive(rank) for rank in ranks), HUNG)
        assert all(self.alive(rank) for rank in ranks)

    def log(self, rank: int) -> str:
        return (self.directory / "logs" / f"rank-{rank:05d}.log").read_text()

    def clean_up(self) -> None:
        kill(self.ranks)
        self.top.kill()
        self.top.join()


def wait_for(condition: Callable[[], Any], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path):
    runs = []

    def begin(*args, **kwargs) -> Run:
        runs.append(Run(tmp_path, *args, **kwargs))
        return runs[-1]

    yield begin
    for run in runs:
        run.clean_up()


def test_a_killed_peer_ends_this_rank(start):
    run = start(_compute)
    run.wait_for_looks(MANY, 0, 1)  # the control: while both live, nobody is ended
    before = run.looks(1)
    run.kill(0, signal.SIGKILL)
    run.kill(1, signal.SIGTERM)  # as a launcher then does: a flag, which nobody reads
    run.wait_until_ended(1)
    print(f"ended {run.looks(1) - before} looks after its peer; patience is 4 of them")
    assert run.looks(1) - before <= 6
    run.top.join()
    assert run.top.exitcode == 1
    assert "rank 0 (host " in run.log(1)
    assert f"process {run.ranks[0].pid}) has ended" in run.log(1)
    assert "in _compute" in run.log(1)  # where its main thread was


def test_a_peers_error_ends_this_rank_and_has_its_traceback_in_the_log(start):
    run = start(_defect)
    run.wait_until_ended(0, 1)
    assert "Traceback" in run.log(0)
    assert "ZeroDivisionError: a defect of rank 0" in run.log(0)
    assert "rank 0 (host " in run.log(1)


def test_a_collective_that_fails_because_of_a_peer_names_it(start):
    """Its own error has an address at most, and is kept in the log."""
    run = start(_stuck)
    run.wait_for_looks(MANY, 1)  # the control: it waits
    run.kill(0, signal.SIGKILL)
    run.wait_until_ended(1)
    assert "Connection closed by peer" in run.log(1)
    assert (f"ConnectionError: rank 0 (host {socket.gethostname()}, process {run.ranks[0].pid}) has ended, and this "
            "rank waits for it: its log says why") in run.log(1)


def test_a_rank_that_does_not_come_to_a_collective_is_named_though_it_lives(start):
    run = start(_absent)
    run.wait_until_ended(1)
    assert "Timed out" in run.log(1)  # all that gloo says
    assert f"ConnectionError: rank 0 (host {socket.gethostname()}) did not come to where this rank waited" in run.log(1)
    assert f"py-spy dump --pid {run.ranks[0].pid}" in run.log(1)


def test_ranks_that_all_wait_in_vain_name_their_hosts(start):
    run = start(_in_vain)
    run.wait_until_ended(0, 1)
    said = "all ranks waited for each other in vain: look at the network between"
    assert said in run.log(0) + run.log(1)  # the other may have seen its peer's end first


def test_a_rank_that_is_done_early_says_goodbye(start):
    run = start(_early)
    run.top.join()
    assert run.top.exitcode == 0  # rank 1
    run.wait_until_ended(0)
    assert run.log(0) == run.log(1) == ""


def test_a_batch_that_does_not_come_is_one_line_with_the_remedy(start):
    run = start(_no_batch)
    run.wait_until_ended(1)
    assert (run.directory / "batches").stat().st_size == 2  # the control: one that comes in time is waited for
    assert "this rank waits for a batch since " in run.log(1)
    last = run.log(1).splitlines()[-1]
    assert last.endswith("a batch did not come for 2 s: set data.num_workers=0")
    run.wait_until_ended(0)  # by its peer's end


def test_a_peer_that_stands_still_is_named(start):
    run = start(_compute)
    run.wait_for_looks(MANY, 1)
    assert run.log(1) == ""  # the control: it runs
    run.kill(0, signal.SIGSTOP)
    wait_for(lambda: "stands still" in run.log(1), HUNG)
    assert "rank 0 (host " in run.log(1)
    assert f"kill -CONT {run.ranks[0].pid} lets it go on" in run.log(1)
    run.wait_for_looks(MANY, 1)  # it may go on
    assert run.log(1).count("stands still") == 1
    run.kill(0, signal.SIGCONT)
    (run.directory / "enough").touch()
    run.wait_until_ended(0, 1)
    assert "has ended" not in run.log(1)


def test_clocks_that_differ_by_a_second_end_nobody(start):
    run = start(_other_clock)
    assert float((run.directory / "clock").read_text()) == pytest.approx(1.0)  # the control: psutil's times differ
    run.wait_for_looks(MANY, 0, 1)
    (run.directory / "enough").touch()
    run.wait_until_ended(0, 1)
    assert run.log(0) == run.log(1) == ""


def test_a_stop_that_hangs_ends_the_rank(start):
    run = start(_stuck)
    run.wait_for_looks(MANY, 1)  # the control: without a signal it may wait
    before = run.looks(1)
    run.kill(1, signal.SIGTERM)
    run.wait_until_ended(1)
    print(f"ended {run.looks(1) - before} looks after the signal; patience is 10 of them")
    assert run.looks(1) - before <= 12
    assert "SIGTERM, and no step ended for 1 s" in run.log(1)
    assert "in _stuck" in run.log(1)


def test_ranks_without_a_launcher_save_and_end(start):
    """Undisturbed, though the save takes longer than the watchdog waits for a step."""
    run = start(_steps, start=_launch)
    run.wait_for_looks(5, 0, 1)
    assert not list(run.directory.glob("saved.*"))  # the control: with a launcher they train
    run.top.kill()
    run.wait_until_ended(0, 1)
    saved = [(run.directory / f"saved.{rank}").read_text() for rank in (0, 1)]
    assert saved[0] == saved[1]
    assert saved[0].endswith("launcher gone")
    assert "the launcher (process " in run.log(0)


def test_launchers_are_told_from_shells(tmp_path):
    """The `deepspeed` command above a rank is one; the shell above it, or above plain python, is none."""
    for name in ("deepspeed", "sleep"):
        (tmp_path / name).write_text("import subprocess, sys\nsubprocess.run(sys.argv[1:])\n")
    command = ["bash", "-c", f"{psutil.Process().exe()} {tmp_path}/NAME sleep 60; true"]
    for name, expected in (("deepspeed", 1), ("sleep", 0)):
        shell = psutil.Popen([word.replace("NAME", name) for word in command])
        try:
            wait_for(lambda shell=shell: [child.name() for child in shell.children(recursive=True)][1:] == ["sleep"])
            rank = shell.children(recursive=True)[-1]
            assert len(launcher_processes(rank.pid)) == expected
        finally:
            kill(shell.children(recursive=True))
            shell.wait()
