"""Two or three machines on one: namespaces with a network, host names, process numbers and mounts of their own.

Nothing of it outlives the tests: a machine is the processes in it, of which the first is killed by the kernel when the
tests end in whatever way, and takes the others and its network with it.
"""

import ctypes
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.processes import kill

_UNSHARE = ["unshare", "--net", "--uts", "--pid", "--ipc", "--mount", "--fork", "--kill-child", "--mount-proc"]
_PR_SET_PDEATHSIG = 1


def die_with_the_tests() -> None:
    """For the child, before it becomes another program."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def skip_without_namespaces() -> None:
    """Skip the test, and say why, where this user may not make namespaces."""
    for program in ("unshare", "nsenter", "ip"):
        if shutil.which(program) is None:
            pytest.skip(f"two machines on one need `{program}`, which is not installed (util-linux, iproute2)")
    tried = subprocess.run([*_UNSHARE, "ip", "link", "set", "lo", "up"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"two machines on one need namespaces, which this user may not make: {tried.stderr.strip()}")


class Machine:
    """One of them.

    Args:
        name: of the host.
        address: of its only network interface, eth0.
    """

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        self._process = subprocess.Popen([*_UNSHARE, "sleep", "infinity"], preexec_fn=die_with_the_tests)
        deadline = time.monotonic() + 30
        while not (children := psutil.Process(self._process.pid).children()) or children[0].name() != "sleep":
            assert time.monotonic() < deadline, "the namespaces were not made"
            time.sleep(0.02)
        self.pid = children[0].pid
        self.call("hostname", name)
        self.call("ip", "link", "set", "lo", "up")

    def enter(self, *command: str) -> list[str]:
        """A command, as one that runs in this machine, in the present directory."""
        return ["nsenter", f"--target={self.pid}", "--net", "--uts", "--pid", "--ipc", "--mount", f"--wd={Path.cwd()}",
                *command]

    def call(self, *command: str) -> str:
        return subprocess.run(self.enter(*command), capture_output=True, text=True, check=True).stdout

    def processes(self) -> list[psutil.Process]:
        """All that run in it, but its first."""
        own = Path(f"/proc/{self.pid}/ns/pid").readlink()
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid != self.pid and Path(f"/proc/{process.pid}/ns/pid").readlink() == own:
                    found.append(process)
            except OSError:
                pass
        return found

    def kill_all(self) -> None:
        """Every process at once, and the network stays: the machine runs on."""
        kill(self.processes())

    def unplug(self) -> None:
        """The link goes down for good."""
        self.call("ip", "link", "set", "eth0", "down")

    def clean_up(self) -> None:
        self._process.kill()
        self._process.wait()


class Cable:
    """Between machines: it carries every packet through a process of ours, late or not at all, where the kernel may
    have no netem."""

    def __init__(self, machines: Sequence[Machine]) -> None:
        self._process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("cable.py")),
                                          *(str(machine.pid) for machine in machines)], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, text=True, preexec_fn=die_with_the_tests)
        self.set()

    def set(self, *, delay: float = 0.0, loss: float = 0.0, cut: Sequence[tuple[int, int]] = ()) -> int:
        """How late packets come in seconds, each way, which part of them never does, and between which machines, by
        their numbers from 0, none. Returns how many were lost so far."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(" ".join([f"{delay} {loss}", *(f"{one}-{other}" for one, other in cut)]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def clean_up(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def machines(directory: Path, count: int = 2) -> Iterator[list[Machine]]:
    """Machines `alder`, `birch`, `cedar`, that know each other by name and have no network yet.

    Args:
        directory: for their file of hosts.
    """
    skip_without_namespaces()
    made: list[Machine] = []
    try:
        for number, name in enumerate(("alder", "birch", "cedar")[:count], start=1):
            made.append(Machine(name, f"10.77.0.{number}"))
        hosts = directory / "hosts"
        hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{m.address} {m.name}\n" for m in made))
        for machine in made:
            machine.call("mount", "--bind", str(hosts), "/etc/hosts")
        yield made
    finally:
        for machine in made:
            machine.clean_up()


@contextmanager
def two_machines(directory: Path) -> Iterator[list[Machine]]:
    """`alder` and `birch`, joined by a pair of virtual interfaces."""
    with machines(directory) as made:
        first, second = (str(machine.pid) for machine in made)
        subprocess.run(["ip", "link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns",
                        second], check=True)
        _switch_on(made)
        yield made


@contextmanager
def cabled_machines(directory: Path, count: int = 2) -> Iterator[tuple[list[Machine], Cable]]:
    """Machines joined by a cable that can be bad."""
    with machines(directory, count) as made:
        cable = Cable(made)
        try:
            _switch_on(made)
            yield made, cable
        finally:
            cable.clean_up()


def _switch_on(machines: Sequence[Machine]) -> None:
    for machine in machines:
        machine.call("ip", "address", "add", f"{machine.address}/24", "dev", "eth0")
        machine.call("ip", "link", "set", "eth0", "up")
