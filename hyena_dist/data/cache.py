"""A copy of shards on the disk of a node, for file systems that many ranks read from at once. It is made by one of the
node's ranks while the others wait. It is used only when its index is that of the shards, and every byte of them had the
digest that this says: when this user copied it, or, where another user has left it, now."""

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from hyena_dist.config.digests import file_sha256
from hyena_dist.config.plain import open_regular
from hyena_dist.data.errors import DataError
from hyena_dist.data.index import FILE_NAME, Index, Shard, open_shard, read_index

logger = logging.getLogger(__name__)

SPARE_BYTES = 2**30
"""What is left free on the disk."""
SILENT_SECONDS = 10.0
"""How long to wait for another process before that is said."""


def cached(directory: Path, cache: Path, limit: float | None = None) -> Path:
    """Where to read shards from: their copy in the cache, made now if it is not there, or the directory itself where
    the copy cannot be made; it is said why. Nothing that is in the cache is deleted but what is no copy where one
    belongs: that is copied anew.

    Args:
        limit: bytes that everything in the cache may have; None: what the disk has, less a gibibyte.

    Raises:
        DataError: the shards cannot be read, or are damaged.
    """
    index = read_index(directory / FILE_NAME)
    with (directory / FILE_NAME).open("rb") as file:
        digest = file_sha256(file)
    place = cache / digest[:32]
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / "lock"):
            problem = _complete(directory, place, index, digest, cache, limit)
    except OSError as error:
        problem = f"no copy can be made ({error})"
    if problem:
        logger.warning("data.cache=%s: %s; %s is read itself", cache, problem, directory)
        return directory
    return place


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process of the node; when that ends in whatever way, another goes on with what it has copied. A
    long wait is said."""
    with path.open("a", encoding="utf-8") as file:
        due = time.monotonic() + SILENT_SECONDS
        while not _took(file):
            time.sleep(0.05)
            if time.monotonic() > due:
                logger.info("data.cache: waiting for the process that holds %s, which copies or verifies shards; "
                            "`lslocks` names it", path)
                fcntl.flock(file, fcntl.LOCK_EX)
                break
        yield


def _took(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _complete(directory: Path, place: Path, index: Index, digest: str, cache: Path, limit: float | None) -> str | None:
    """Copy what is missing, the index last. Returns why it does not fit, or None."""
    place.mkdir(exist_ok=True)
    missing = [shard for shard in index.shards if not _is_whole(place, shard)]
    if missing:
        wanted = sum(shard.filesize for shard in missing)
        held = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
        room = shutil.disk_usage(cache).free - SPARE_BYTES
        if limit is not None:
            room = min(room, int(limit) - held)
        if wanted > room:
            return (f"{wanted:,} bytes do not fit: {max(room, 0):,} are left beside the {held:,} that are there: "
                    "delete what is not needed in it, or raise data.cache_gb")
        logger.info("data.cache: copying %s bytes of %s to %s", f"{wanted:,}", directory, place)
    for shard in missing:
        with os.fdopen(open_shard(directory, shard), "rb") as source:
            if not _copy(source, place / shard.url, shard.sha256):
                raise DataError(f"{directory / shard.url}: its sha256 is not the one in {FILE_NAME}: the shard was "
                                "altered; copy or build the shard again")
    if not _has(place / FILE_NAME, digest):
        with (directory / FILE_NAME).open("rb") as source:
            if not _copy(source, place / FILE_NAME, digest):
                raise DataError(f"{directory / FILE_NAME}: has changed while the shards were copied: start again")
    return None


def _is_whole(place: Path, shard: Shard) -> bool:
    """Whether a shard is there and verified: this user does that before a copy has its name, others may not."""
    try:
        descriptor = open_shard(place, shard)
    except DataError:
        return False
    with os.fdopen(descriptor, "rb") as file:
        return os.fstat(descriptor).st_uid == os.getuid() or file_sha256(file) == shard.sha256


def _has(path: Path, digest: str) -> bool:
    """Whether a file is there with a digest."""
    try:
        with open_regular(path) as file:
            return file_sha256(file) == digest
    except OSError:
        return False


def _copy(source: BinaryIO, path: Path, digest: str) -> bool:
    """Copy a file, and give the copy its name when it is on the disk; False: it has another digest."""
    aside = path.with_name(f"{path.name}.part")
    aside.unlink(missing_ok=True)  # it may be cut off, or a link of somebody else's
    with aside.open("x+b") as target:
        shutil.copyfileobj(source, target, 2**20)
        target.flush()
        os.fsync(target.fileno())
        target.seek(0)
        if file_sha256(target) != digest:
            return False
    aside.rename(path)
    return True
