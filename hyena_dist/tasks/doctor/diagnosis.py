"""What is wrong with the machines of a run, and what to do: from the facts alone."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from hyena_dist.runtime.peers import name_places

MOST_SKEW = 5.0
"""Seconds that clocks may differ: checkpoints, logs and file servers are dated by them."""
SHARED_BYTES = 64 * 2**20
"""Of /dev/shm, for each rank of a machine: what NCCL may take."""
DESCRIPTORS = 512
"""Files that a rank needs besides its connections to the others."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong."""

    what: str
    where: str
    """The ranks and hosts."""
    remedy: str


def diagnose(facts: Mapping[int, dict[str, Any]], ranks: int, *,
             hosts: Mapping[int, str] | None = None) -> list[Finding]:
    """Everything that is wrong; what is wrong in the same way on several ranks once.

    Args:
        facts: of each rank that came: as `facts.gather` and `examine` found them.
        ranks: how many there should be.
        hosts: where each rank should be, as far as that is known.
    """
    local = Counter(of_rank["host"] for of_rank in facts.values())
    shared = _shared_gpus(facts)
    found = [*_missing(facts, ranks, hosts or {}), *_differences(facts)]
    wrong: dict[tuple[str, str], list[int]] = {}
    clock = _true_clock(facts)
    for rank, of_rank in sorted(facts.items()):
        alone = not any(rank in which for which in shared.values())
        for problem in _of_rank(of_rank, ranks, local, clock, alone=alone):
            wrong.setdefault(problem, []).append(rank)
    found += [Finding(what, names(which, facts), remedy) for (what, remedy), which in wrong.items()]
    return found + [Finding(f"share the GPU {gpu}", names(which, facts), "start one rank for each GPU")
                    for gpu, which in shared.items()]


def _missing(facts: Mapping[int, Any], ranks: int, hosts: Mapping[int, str]) -> list[Finding]:
    missing = [rank for rank in range(ranks) if rank not in facts]
    return [Finding(f"did not come: {len(missing)} of {ranks} ranks", name_places(missing, hosts),
        "see whether its process was started and what it said; whether its host can open a connection to MASTER_ADDR, "
        "MASTER_PORT; and a firewall between them")] if missing else []


def _differences(facts: Mapping[int, dict[str, Any]]) -> list[Finding]:
    """What must be the same on all ranks."""
    tables: dict[str, dict[int, str]] = {}
    for rank, of_rank in facts.items():
        for name, version in of_rank["versions"].items():
            tables.setdefault(f"version of {name}", {})[rank] = version
        if isinstance(of_rank["shards"], str):
            tables.setdefault("shards", {})[rank] = of_rank["shards"][:16]
    found = []
    for name, values in tables.items():
        if len(set(values.values())) > 1:
            remedy = ("copy the same shards to every node" if name == "shards" else
                      "install the same versions on every node, with constraints.txt")
            found.append(Finding(f"{name} differ{'' if name == 'shards' else 's'}", "; ".join(
                f"{value} on {names([rank for rank, its in values.items() if its == value], facts)}"
                for value in sorted(set(values.values()))), remedy))
    return found


def _true_clock(facts: Mapping[int, dict[str, Any]]) -> float:
    """How far most hosts' clocks are from that of rank 0: where its own is the one that is wrong, the others are not to
    be blamed. Of two hosts it is taken for right."""
    by_host = {fact["host"]: fact.get("skew", 0.0) for fact in reversed(list(facts.values()))}
    return median(by_host.values()) if len(by_host) > 2 else 0.0


def _of_rank(fact: dict[str, Any], ranks: int, local: Mapping[str, int], clock: float, *,
             alone: bool) -> list[tuple[str, str]]:
    """What is wrong with a rank, and the remedy.

    Args:
        local: how many ranks each host has.
        clock: the true time, in seconds after that of rank 0.
        alone: no other rank has the one GPU that this one sees.
    """
    found = []
    beside = local[fact["host"]]
    if isinstance(fact["shards"], dict):
        found.append((f"cannot read the shards: {fact['shards']['error']}", "correct data.shards, or copy them there"))
    free = fact["shared_memory"]
    if not isinstance(free, int) or free < beside * SHARED_BYTES:
        said = free["error"] if isinstance(free, dict) else f"{free / 2**20:.0f} MiB free"
        want = f"{beside} rank{' wants' if beside == 1 else 's want'} {beside * SHARED_BYTES // 2**20} MiB"
        found.append((f"/dev/shm: {said}, {want}",
                      "delete what is left there, or start the container with --ipc=host or a larger --shm-size"))
    if 0 <= fact["descriptors"] < DESCRIPTORS + 4 * ranks:
        found.append((f"may open {fact['descriptors']} files, and needs {DESCRIPTORS + 4 * ranks}",
                      "raise the limit: ulimit -n, or LimitNOFILE of the service that starts jobs"))
    skew = fact.get("skew", 0.0) - clock
    if abs(skew) > MOST_SKEW:
        found.append((f"its clock is {skew:+.0f} s off that of {'the other hosts' if len(local) > 2 else 'rank 0'}",
                      "let NTP (chrony) set the clocks"))
    if fact["driver"] and not fact["gpus"]:
        found.append(("NVIDIA's driver is there, and torch sees no GPU",
                      "correct CUDA_VISIBLE_DEVICES, or install a torch for this CUDA"))
    if 1 < len(fact["gpus"]) < beside:
        found.append((f"sees {len(fact['gpus'])} GPUs, and {beside} ranks are on its host",
                      f"start at most {len(fact['gpus'])} ranks there, or correct CUDA_VISIBLE_DEVICES"))
    if len(fact["gpus"]) == 1 and beside > 1 and alone:
        found.append((f"sees one GPU, beside {beside - 1} other rank{'s' * (beside > 2)}: NCCL may not reach theirs "
                      "directly",
                      "use --gpus-per-node in place of --gpus-per-task=1, and --gpu-bind=none"))
    found += _interfaces(fact, len(local))
    return found + [(problem["what"], problem["remedy"]) for problem in fact.get("problems", [])]


def _interfaces(fact: dict[str, Any], hosts: int) -> list[tuple[str, str]]:
    there = fact["interfaces"]
    found = []
    for variable, wanted in fact["asked"].items():
        if wanted.startswith("^"):
            continue
        names = wanted.removeprefix("=").split(",")
        exact = variable.startswith("GLOO") or wanted.startswith("=")
        chosen = [name for name in there if (name in names if exact else name.startswith(tuple(names)))]
        remedy = f"set {variable} to one of {', '.join(sorted(set(there) - {'lo'})) or 'lo'}, or unset it"
        if not chosen:
            found.append((f"{variable}={wanted}: no such interface is up", remedy))
        elif hosts > 1 and chosen == ["lo"]:
            found.append((f"{variable}={wanted} reaches no other host", remedy))
    if fact["towards"] is None:
        found.append(("has no way to MASTER_ADDR", "correct its name or address, and the network of this host"))
    elif hosts > 1 and fact["towards"].startswith("127.") and not fact.get("first_host"):
        found.append(("MASTER_ADDR is this host itself, and rank 0 is on another",
                      "set MASTER_ADDR to an address that every host can reach; look at /etc/hosts"))
    return found


def _shared_gpus(facts: Mapping[int, dict[str, Any]]) -> dict[str, list[int]]:
    """Ranks that have no other GPU than one that another has as well, by that GPU."""
    own: dict[str, list[int]] = {}
    for rank, fact in facts.items():
        if len(fact["gpus"]) == 1:
            own.setdefault(fact["gpus"][0], []).append(rank)
    return {gpu: ranks for gpu, ranks in own.items() if len(ranks) > 1}


def names(ranks: Collection[int], facts: Mapping[int, dict[str, Any]]) -> str:
    """`ranks 0, 1 (host a), rank 2 (host b)`."""
    return name_places(ranks, {rank: facts[rank]["host"] for rank in ranks})
