"""The doctor finds what is wrong with the machines of a run, says what to do, and never hangs."""

import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hyena_dist.cli.build import main as build_shards
from hyena_dist.config.schema import Config
from hyena_dist.tasks.doctor import examine as examining
from hyena_dist.tasks.doctor import facts as facts_of
from hyena_dist.tasks.doctor.files import Probe, look
from tests.conftest import SAMPLE
from tests.dist.harness import fork_server
from tests.dist.test_killed import config_of
from tests.dist.test_rendezvous import port


def _doctor(rank: int, ranks: int, where: str, config: Config | None, seconds: float = 10.0) -> Any:
    environment = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": where}
    return examining.examine(environment, config, seconds=seconds, hosts={2: "node3"})


def _interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")


def _versions(monkeypatch: pytest.MonkeyPatch) -> None:
    known = facts_of.library_version
    monkeypatch.setattr(facts_of, "library_version", lambda name: "2.0.1" if name == "torch" else known(name))


def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts_of, "wall_clock", lambda: time.time() + 90)


def _descriptors(_monkeypatch: pytest.MonkeyPatch) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))  # the last fault: it is not undone


def _one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts_of, "gpus", lambda: ["GPU-1"])


def _shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    full = facts_of.shutil.disk_usage("/")._replace(free=4096)
    monkeypatch.setattr(facts_of.shutil, "disk_usage", lambda _path: full)


def _collective(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: Any) -> None:
        raise RuntimeError("Connection closed by peer. And more")
    monkeypatch.setattr(examining, "measure", measure)


def _nothing(_monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str, str]] = {
    # Planted on rank 1, the collective on both, what is found, and what is said to do.
    "nothing": (_nothing, "", ""),
    "clock": (_clock, "its clock is +90 s off that of rank 0", "NTP"),
    "versions": (_versions, "version of torch differs", "install the same versions"),
    "interface": (_interface, "GLOO_SOCKET_IFNAME=ib7: no such interface is up", "set GLOO_SOCKET_IFNAME to one of"),
    "collective": (_collective, "a collective over all ranks failed (Connection closed by peer)", "GLOO_SOCKET_IFNAME"),
    "one GPU": (_one_gpu, "sees one GPU, beside 1 other rank:", "--gpus-per-node"),
    "shared memory": (_shared_memory, "/dev/shm: 0 MiB free, 2 ranks want 128 MiB", "--ipc=host"),
    "shards": (_nothing, "shards differ", "copy the same shards"),
    "run directory": (_nothing, "cannot be written, synced and renamed in", "another train.run_dir"),
    "descriptors": (_descriptors, "may open 256 files, and needs 520", "ulimit -n"),
}


def _rank(rank: int, directory: str, ports: dict[str, str], config: Config, other: str) -> None:
    """Every fault in turn; rank 0 leaves what it found, and both end at once, whatever hangs."""
    found: dict[str, Any] = {}
    for name, (plant, _, _) in FAULTS.items():
        own = config
        if rank and name == "shards":
            own = replace(config, data=replace(config.data, shards=other))
        if name == "run directory":  # nobody can write there, not even root
            own = replace(config, train=replace(config.train, run_dir="/proc/sys/run"))
        with pytest.MonkeyPatch.context() as monkeypatch:
            if rank or name == "collective":
                plant(monkeypatch)
            if name == "interface":  # gloo would refuse it, too
                monkeypatch.setattr(examining, "measure", lambda *_: [])
            report = _doctor(rank, 2, ports[name], own)
        found[name] = [vars(finding) for finding in report.findings], report.bandwidth
    # The store of a run that rank 2 does not come to, and of one whose port is taken.
    report = _doctor(rank, 3, ports["missing"], None, seconds=3.0)
    found["missing"] = [vars(finding) for finding in report.findings], report.bandwidth
    if rank == 0:
        with socket.socket() as other_run:
            other_run.bind(("127.0.0.1", int(ports["port"])))
            other_run.listen()
            report = _doctor(0, 2, ports["port"], None, seconds=3.0)
        found["port"] = [vars(finding) for finding in report.findings], report.bandwidth
        Path(directory, "found").write_text(json.dumps(found))
    os._exit(0)


@pytest.fixture(scope="module")
def found(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("doctor")
    other = str(directory / "other")
    assert build_shards([str(SAMPLE / "phix174.fa.gz"), "--val-fraction", "0.1", "--out", other]) == 0
    ports = {name: port() for name in (*FAULTS, "missing", "port")}
    config = config_of(shards, directory / "run")
    ranks = [fork_server().Process(target=_rank, args=(rank, str(directory), ports, config, other))
             for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
    assert not list(directory.glob(".doctor*"))
    return json.loads((directory / "found").read_text())


@pytest.mark.parametrize("name", FAULTS)
def test_each_planted_fault_is_found_with_what_to_do(found: dict[str, Any], name: str) -> None:
    findings, bandwidth = found[name]
    _, what, remedy = FAULTS[name]
    print(findings)
    if name == "nothing":
        assert findings == []
        assert [row["what"] for row in bandwidth] == ["copy", "all-reduce", "all-to-all"]
        assert all(row["gigabytes_per_second"] > 0 for row in bandwidth)
    else:
        [finding] = findings  # and nothing else
        assert what in finding["what"]
        assert remedy in finding["remedy"]
        where = {"run directory": "rank 0", "collective": "ranks 0, 1"}
        assert where.get(name, "rank 1") in finding["where"]


def test_a_rank_that_does_not_come_is_named_with_its_host(found: dict[str, Any]) -> None:
    (finding, *_), bandwidth = found["missing"]  # and the limit of descriptors, which stays
    assert finding["what"] == "did not come: 1 of 3 ranks"
    assert finding["where"] == "rank 2 (host node3)"
    assert bandwidth == []


def test_a_port_that_another_has_is_named(found: dict[str, Any]) -> None:
    [finding], _ = found["port"]
    assert finding["what"].startswith("port 127.0.0.1:")
    assert "MASTER_PORT" in finding["remedy"]


def test_another_directory_and_locks_that_do_not_hold_are_seen() -> None:
    with tempfile.TemporaryDirectory() as place:
        probe = Probe(Path(place) / "run")
        path = Path(probe.make())
        assert look(path.with_name(".doctor-0"), "1")[0]["what"].endswith("what rank 0 has just written is not there")
        (path / "token").write_text("another")
        assert "is another directory" in look(path, "1")[0]["what"]
        (path / "token").write_text(path.name)
        # Within one process a POSIX lock keeps nobody out: as a file system that has none.
        assert "does not hold" in look(path, "1")[0]["what"]
        code = ("import sys; from pathlib import Path; from hyena_dist.tasks.doctor.files import look; "
                "print(look(Path(sys.argv[1]), '2'))")
        probe.remove()
        probe.make()  # the lock was dropped with the file that this process opened
        other = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True,
                               env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])})
        assert other.stdout == "[]\n"  # the control
        probe.remove()
        assert list(Path(place).iterdir()) == []


def test_a_look_that_does_not_return_is_given_up() -> None:
    assert facts_of.bounded(lambda: time.sleep(60), 0.05) == {"error": "no answer in 0 s"}
    assert facts_of.bounded(lambda: 7, 5.0) == 7
    assert facts_of.bounded(lambda: Path("/nonexistent").stat(), 5.0)["error"].startswith("[Errno 2]")
