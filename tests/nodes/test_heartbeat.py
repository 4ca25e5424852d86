"""What is known of a rank on another machine, and how soon."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.nodes.machines import Machine, cabled_machines, two_machines


class Ranks:
    """One on each machine, in their order, which wait for nothing but are watched."""

    def __init__(self, machines: Sequence[Machine], directory: Path) -> None:
        self.machines, self.directory = machines, directory
        world = [f"WORLD_SIZE={len(machines)}", "LOCAL_RANK=0", "MASTER_ADDR=alder", "MASTER_PORT=29500"]
        self._processes = [subprocess.Popen(machine.enter("env", *world, f"RANK={rank}", sys.executable, "-m",
                                                          "tests.nodes.rank", str(directory)))
                           for rank, machine in enumerate(machines)]
        wait_for(lambda: all((directory / f"ready.{rank}").exists() for rank in range(len(machines))), 120)

    def wait(self, rank: int, seconds: float = 60) -> int:
        return self._processes[rank].wait(seconds)

    def runs(self, rank: int) -> bool:
        return self._processes[rank].poll() is None

    def log(self, rank: int) -> str:
        return (self.directory / "logs" / f"rank-{rank:05d}.log").read_text()


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


@pytest.fixture
def ranks(tmp_path) -> Iterator[Ranks]:
    with two_machines(tmp_path) as machines:
        yield Ranks(machines, tmp_path)


def test_a_rank_that_stands_still_and_then_is_killed_is_named_with_its_machine(ranks):
    time.sleep(1.5)  # the control: a peer that lives ends nobody
    assert ranks.runs(0)
    assert ranks.log(0) == ""
    process, = (p for p in ranks.machines[1].processes() if p.name().startswith("python"))
    process.send_signal(signal.SIGSTOP)
    wait_for(lambda: "has said nothing for 2 s" in ranks.log(0))
    assert "rank 1 (host birch, process " in ranks.log(0)
    process.send_signal(signal.SIGCONT)
    wait_for(lambda: "is heard of again" in ranks.log(0))
    assert ranks.runs(0)
    killed = time.monotonic()
    ranks.machines[1].kill_all()
    assert ranks.wait(0) == 1
    print(f"ended after {time.monotonic() - killed:.1f} s; patience is 1 s")
    assert "rank 1 (host birch, process " in ranks.log(0).splitlines()[-1] + ranks.log(0)
    assert ") has ended, and this rank waits for it: its log says why" in ranks.log(0)


@pytest.mark.slow
def test_a_rank_that_holds_pythons_lock_is_not_taken_for_lost(ranks):
    """For longer than it takes until a machine that does not answer is lost: its kernel does answer."""
    (ranks.directory / "hold.1").touch()
    wait_for(lambda: "has said nothing for 2 s" in ranks.log(0))
    wait_for(lambda: "is heard of again" in ranks.log(0))
    (ranks.directory / "enough").touch()
    assert ranks.wait(0) == ranks.wait(1) == 0
    assert "cannot be reached" not in ranks.log(0) + ranks.log(1)


@pytest.mark.slow
def test_a_machine_that_is_unplugged_ends_both_sides_which_name_each_other(ranks):
    unplugged = time.monotonic()
    ranks.machines[1].unplug()
    assert ranks.wait(0) == ranks.wait(1) == 1
    print(f"ended after {time.monotonic() - unplugged:.1f} s; a machine is lost after 6 s, patience is 1 s")
    assert time.monotonic() - unplugged < 20
    for rank, other, host in ((0, 1, "birch"), (1, 0, "alder")):
        assert f"rank {other} (host {host}, process " in ranks.log(rank)
        assert f"cannot be reached any more: host {host} is down, or the network" in ranks.log(rank)


@pytest.mark.slow
def test_two_machines_that_do_not_reach_each_other_are_named_though_the_first_rank_reaches_both(tmp_path):
    with cabled_machines(tmp_path, 3) as (machines, cable):
        ranks = Ranks(machines, tmp_path)
        time.sleep(1.5)  # the control: they reach each other
        assert all(map(ranks.runs, range(3)))
        began = time.monotonic()
        cable.set(cut=[(1, 2)])
        assert [ranks.wait(rank) for rank in range(3)] == [1, 1, 1]
        print(f"ended after {time.monotonic() - began:.1f} s; a machine is lost after 6 s, patience is 1 s")
        assert time.monotonic() - began < 20
        for rank in range(3):
            assert "(host birch, process " in ranks.log(rank)
            assert "(host cedar, process " in ranks.log(rank)
            assert "cannot reach each other any more, though both reach rank 0 (host alder, process " in ranks.log(rank)


@pytest.mark.slow
def test_a_machine_that_no_other_reaches_is_lost_and_not_cut_off_from_one(tmp_path):
    with cabled_machines(tmp_path, 3) as (machines, _):
        ranks = Ranks(machines, tmp_path)
        machines[2].unplug()
        assert [ranks.wait(rank) for rank in range(3)] == [1, 1, 1]
        for rank in range(2):
            assert "rank 2 (host cedar, process " in ranks.log(rank)
            assert "cannot be reached any more: host cedar is down" in ranks.log(rank)
            assert "each other" not in ranks.log(rank)
