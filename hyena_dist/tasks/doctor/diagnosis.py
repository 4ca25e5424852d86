"""What is wrong with the machines of a run, and what to do: from the facts alone."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

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
    """Everything that is wrong.

    Args:
        facts: of each rank that came: as `facts.gather` and `examine` found them.
        ranks: how many there should be.
        hosts: where each rank should be, as far as that is known.
    """
    local = Counter(of_rank["host"] for of_rank in facts.values())
    found = list(_missing(facts, ranks, hosts or {}))
    found += _differences(facts)
    for rank, of_rank in sorted(facts.items()):
        found += [Finding(what, f"rank {rank} ({of_rank['host']})", remedy)
                  for what, remedy in _of_rank(of_rank, ranks, local)]
    found += _shared_gpus(facts)
    return found


def _missing(facts: Mapping[int, Any], ranks: int, hosts: Mapping[int, str]) -> list[Finding]:
    missing = [rank for rank in range(ranks) if rank not in facts]
    return [Finding(f"did not come: {len(missing)} of {ranks} ranks", ", ".join(
        f"rank {rank}" + (f" ({hosts[rank]})" if rank in hosts else "") for rank in missing[:8]),
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
            found.append(Finding(f"{name} differs", "; ".join(
                f"{value} on {_names([rank for rank, its in values.items() if its == value], facts)}"
                for value in sorted(set(values.values()))), remedy))
    return found


def _of_rank(fact: dict[str, Any], ranks: int, local: Mapping[str, int]) -> list[tuple[str, str]]:
    """What is wrong with a rank, and the remedy."""
    found = []
    beside = local[fact["host"]]
    if isinstance(fact["shards"], dict):
        found.append((f"cannot read the shards: {fact['shards']['error']}", "correct data.shards, or copy them there"))
    free = fact["shared_memory"]
    if not isinstance(free, int) or free < beside * SHARED_BYTES:
        said = free["error"] if isinstance(free, dict) else f"{free / 2**20:.0f} MiB free"
        found.append((f"/dev/shm: {said}, {beside} ranks want {beside * SHARED_BYTES // 2**20} MiB",
                      "delete what is left there, or start the container with --ipc=host or a larger --shm-size"))
    if 0 <= fact["descriptors"] < DESCRIPTORS + 4 * ranks:
        found.append((f"may open {fact['descriptors']} files, and needs {DESCRIPTORS + 4 * ranks}",
                      "raise the limit: ulimit -n, or LimitNOFILE of the service that starts jobs"))
    if abs(fact.get("skew", 0.0)) > MOST_SKEW:
        found.append((f"its clock is {fact['skew']:+.0f} s off that of rank 0", "let NTP (chrony) set the clocks"))
    if fact["driver"] and not fact["gpus"]:
        found.append(("NVIDIA's driver is there, and torch sees no GPU",
                      "correct CUDA_VISIBLE_DEVICES, or install a torch for this CUDA"))
    if len(fact["gpus"]) == 1 and beside > 1:
        found.append((f"sees one GPU, beside {beside - 1} other ranks: NCCL may not reach theirs directly",
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


def _shared_gpus(facts: Mapping[int, dict[str, Any]]) -> list[Finding]:
    """Ranks that have no other GPU than one that another has as well."""
    own: dict[str, list[int]] = {}
    for rank, fact in facts.items():
        if len(fact["gpus"]) == 1:
            own.setdefault(fact["gpus"][0], []).append(rank)
    return [Finding(f"share the GPU {gpu}", _names(ranks, facts), "start one rank for each GPU")
            for gpu, ranks in own.items() if len(ranks) > 1]


def _names(ranks: Collection[int], facts: Mapping[int, dict[str, Any]]) -> str:
    some = sorted(ranks)
    more = f" and {len(some) - 4} more" if len(some) > 4 else ""
    return ", ".join(f"rank {rank} ({facts[rank]['host']})" for rank in some[:4]) + more
