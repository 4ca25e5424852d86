"""What the doctor says of facts that no single machine has: many hosts, GPUs, several faults at once."""

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hyena_dist.cli.doctor import _print, read_hostfile
from hyena_dist.config.errors import ConfigError
from hyena_dist.tasks.doctor.diagnosis import Finding, diagnose
from hyena_dist.tasks.doctor.examine import Report
from hyena_dist.tasks.doctor.files import problem

SOUND: dict[str, Any] = {"versions": {"torch": "2.13"}, "gpus": [], "driver": False, "asked": {}, "shards": "a" * 64,
                         "interfaces": {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"], "ib0": ["10.1.0.1"]},
                         "shared_memory": 2**34, "descriptors": 65536, "towards": "10.0.0.1", "first_host": False}


def cluster(hosts: int = 3, beside: int = 2, **of_host_1: Any) -> dict[int, dict[str, Any]]:
    """The facts of all ranks; those of the second host have something else."""
    return {rank: SOUND | {"host": f"node{rank // beside}", "first_host": rank < beside}
            | (of_host_1 if rank // beside == 1 else {}) for rank in range(hosts * beside)}


def found(facts: Mapping[int, dict[str, Any]], ranks: int | None = None) -> list[tuple[str, str, str]]:
    return [(one.what, one.where, one.remedy) for one in diagnose(facts, ranks or len(facts))]


def test_a_sound_cluster_has_nothing() -> None:
    assert found(cluster()) == []


def test_what_is_wrong_with_all_ranks_of_a_host_is_said_once() -> None:
    assert found(cluster(beside=8, descriptors=256)) == [
        ("may open 256 files, and needs 608", "ranks 8, 9, 10, 11 and 4 more (host node1)",
         "raise the limit: ulimit -n, or LimitNOFILE of the service that starts jobs")]
    assert found(cluster(descriptors=-1)) == []  # no limit


def test_two_faults_and_a_missing_host_are_all_found() -> None:
    facts = cluster(shared_memory=2**20, shards="b" * 64)
    del facts[4], facts[5]
    whats = [what for what, _, _ in found(facts, 6)]
    assert whats == ["did not come: 2 of 6 ranks", "shards differ", "/dev/shm: 1 MiB free, 2 ranks want 128 MiB"]
    _, where, _ = found(facts, 6)[1]
    assert where == f"{'a' * 16} on ranks 0, 1 (host node0); {'b' * 16} on ranks 2, 3 (host node1)"


@pytest.mark.parametrize("skew", [90.0, -90.0])
def test_the_host_whose_clock_is_off_is_named_also_where_it_is_the_first(skew: float) -> None:
    assert found(cluster(skew=skew)) == [
        (f"its clock is {skew:+.0f} s off that of the other hosts", "ranks 2, 3 (host node1)",
         "let NTP (chrony) set the clocks")]
    first = {rank: fact | {"skew": skew if rank > 1 else 0.0} for rank, fact in cluster().items()}
    [(what, where, _)] = found(first)
    assert (what, where) == (f"its clock is {-skew:+.0f} s off that of the other hosts", "ranks 0, 1 (host node0)")
    [(what, _, _)] = found(cluster(hosts=2, skew=skew))
    assert what == f"its clock is {skew:+.0f} s off that of rank 0"
    assert found(cluster(skew=4.0)) == []


@pytest.mark.parametrize(("name", "value", "what"), [
    ("GLOO_SOCKET_IFNAME", "ib7", ": no such interface is up"),
    ("GLOO_SOCKET_IFNAME", "ib", ": no such interface is up"),  # gloo wants whole names, NCCL their beginnings
    ("GLOO_SOCKET_IFNAME", "ib7,eth0", None),
    ("GLOO_SOCKET_IFNAME", "lo", " reaches no other host"),
    ("NCCL_SOCKET_IFNAME", "ib", None),
    ("NCCL_SOCKET_IFNAME", "=ib", ": no such interface is up"),
    ("NCCL_SOCKET_IFNAME", "=ib0", None),
    ("NCCL_SOCKET_IFNAME", "^lo,docker", None),
])
def test_an_interface_that_is_none_or_leads_nowhere(name: str, value: str, what: str | None) -> None:
    whats = [what for what, _, _ in found(cluster(asked={name: value}))]
    assert whats == ([] if what is None else [f"{name}={value}{what}"])


def test_an_address_of_the_first_rank_that_means_each_host_itself() -> None:
    [(what, where, remedy)] = found(cluster(towards="127.0.0.1"))
    assert (what, where) == ("MASTER_ADDR is this host itself, and rank 0 is on another", "ranks 2, 3 (host node1)")
    assert "an address that every host can reach" in remedy
    [(what, _, _)] = found(cluster(towards=None))
    assert what == "has no way to MASTER_ADDR"


def test_gpus() -> None:
    def seen(*gpus: list[str]) -> list[str]:
        facts = {rank: SOUND | {"host": "node0", "first_host": True, "driver": True, "gpus": its}
                 for rank, its in enumerate(gpus)}
        return [f"{what} | {where}" for what, where, _ in found(facts)]

    assert seen(["A", "B"], ["A", "B"]) == []
    assert seen(["A"]) == []
    assert seen(["A"], ["B"]) == ["sees one GPU, beside 1 other rank: NCCL may not reach theirs directly | "
                                  "ranks 0, 1 (host node0)"]
    assert seen(["A"], ["A"]) == ["share the GPU A | ranks 0, 1 (host node0)"]  # and nothing about --gpus-per-task
    assert seen(["A", "B"], [], ["A", "B"]) == [
        "sees 2 GPUs, and 3 ranks are on its host | ranks 0, 2 (host node0)",
        "NVIDIA's driver is there, and torch sees no GPU | rank 1 (host node0)"]


@pytest.mark.parametrize(("number", "remedy"), [
    (errno.ENOSPC, "make room there or"), (errno.EACCES, "get permission to write there or"),
    (errno.EROFS, "remount it for writing, or choose another train.run_dir"),
    (errno.ESTALE, "have its disk or file server looked at or")])
def test_a_directory_that_cannot_be_written_has_the_remedy_of_its_error(number: int, remedy: str) -> None:
    said = problem(Path("/runs/a/.doctor-1"), OSError(number, os.strerror(number), "/runs/a/.doctor-1/token"))
    assert said["what"] == f"/runs/a: cannot be written, synced and renamed in ({os.strerror(number)})"
    assert said["remedy"].startswith(remedy)


def test_the_table_shows_what_is_in_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    _print(Report(4, cluster(hosts=2), [Finding("no [/dev/x] and no [eth0]", "rank 0", "look")], []))
    said = capsys.readouterr().out
    assert "no [/dev/x] and no [eth0]" in said
    assert "4 of 4 ranks, on 2 hosts" in said
    assert "1 thing is wrong" in said
    assert "/dev/shm 16.0 GiB free" in said


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("# our nodes\n\nnode1 slots=4\n  node2   slots=2  # the small one\n")
    assert read_hostfile(hostfile) == {"node1": 4, "node2": 2}


@pytest.mark.parametrize("line", ["node1", "node1 slots=0", "node1 slots=-1", "node1 slots=two", "node1 slots=",
                                  "node1 4", "node1 slots=4 more", "node2 slots=1", "node1 slots = 4"])
def test_a_line_of_a_hostfile_that_is_none_is_named(tmp_path: Path, line: str) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text(f"node2 slots=4\n{line}\n")
    with pytest.raises(ConfigError, match=f"line 2, '{line}', must be HOST slots=N, each host once"):
        read_hostfile(hostfile)


@pytest.mark.parametrize(("content", "why"), [(b"", "has no host"), (b"# none\n", "has no host"),
                                              (b"\xff\xfe", "cannot be read"), (None, "cannot be read")])
def test_a_hostfile_without_hosts_says_what_it_should_be(tmp_path: Path, content: bytes | None, why: str) -> None:
    if content is not None:
        (tmp_path / "hostfile").write_bytes(content)
    with pytest.raises(ConfigError, match=why):
        read_hostfile(tmp_path / "hostfile")
