"""All ranks start with the same configuration, code and data, or none does."""

import hashlib
import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch.distributed as dist

import hyena_dist
from hyena_dist.config.errors import ConfigError, agreed
from hyena_dist.config.schema import Config
from hyena_dist.config.versions import library_version, own_version
from hyena_dist.parallel.groups import Axis
from hyena_dist.runtime.peers import name_ranks

LIBRARIES = ("torch", "numpy", "deepspeed", "megatron-core")
"""Whose versions must be the same: they decide numbers, the order of windows, and who talks to whom."""

MAY_DIFFER = frozenset({"data.shards", "data.cache"})
"""Each machine may have its own copy; what is in it is compared."""


def check_same_start(config: Config, axis: Axis) -> None:
    """Refuse ranks that start with different configurations or code. Collective; before groups are made from the
    configuration, which would hang.

    Raises:
        ConfigError: the same on every rank; names each key, its values and the ranks that have them.
    """
    keys = {f"{section}.{key}": json.dumps(value) for section, content in asdict(config).items()
            for key, value in content.items()}
    versions = {library: library_version(library) for library in LIBRARIES}
    own = f"{own_version()}, source {source_hash()}"
    refuse_differences({key: value for key, value in keys.items() if key not in MAY_DIFFER}, axis,
                       remedy="start every rank with the same --config and overrides")
    refuse_differences({**versions, "hyena_dist": own}, axis, remedy="install the same versions on every machine")


def check_same_data(identity: str, axis: Axis) -> None:
    """Refuse ranks that read different shards (`Manifest.identity`). Collective.

    Raises:
        ConfigError: the same on every rank.
    """
    refuse_differences({"data.shards (sha256 of their content)": identity[:16]}, axis,
                       remedy="copy the same shards to every machine")


def check_same_weights(key: str, path: Path, digest: Callable[[], str], axis: Axis) -> None:
    """Refuse ranks that have read different weights: the run that they are of may save while ranks read. Collective.

    Args:
        key: by which the weights were given.
        path: where this rank has found them.
        digest: sha256 of them; asked for where there are other ranks.

    Raises:
        ConfigError: the same on every rank.
    """
    if axis.size > 1:
        refuse_differences({f"{key} (weights and their sha256)": f"{path.name} {digest()[:16]}"}, axis,
                           remedy="name the checkpoint itself, and have the same files on every machine")


def refuse_differences(facts: Mapping[str, str], axis: Axis, *, remedy: str) -> None:
    """Compare facts over the ranks of an axis. Collective.

    Raises:
        ConfigError: the same on every rank, marked as `agreed`.
    """
    if axis.size == 1:
        return
    own = (socket.gethostname(), dict(facts))
    ranks = [own] * axis.size
    dist.all_gather_object(ranks, own, group=axis.group)
    everything = sorted(set().union(*(of_rank for _, of_rank in ranks)))
    different = []
    for key in everything:
        values: dict[str, list[int]] = {}
        for rank, (_, of_rank) in enumerate(ranks):
            values.setdefault(of_rank.get(key, "not known"), []).append(rank)
        if len(values) > 1:
            hosts = [host for host, _ in ranks]
            different.append(f"{key} is " + ", ".join(f"{value} on {name_ranks(which, hosts)}"
                                                       for value, which in values.items()))
    if different:
        raise agreed(ConfigError(f"the ranks differ: {'; '.join(different)}: {remedy}"))


@cache
def source_hash(root: Path = Path(hyena_dist.__file__).parent) -> str:
    """Of the Python files of this package; edited code has another."""
    content = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return content.hexdigest()[:12]
