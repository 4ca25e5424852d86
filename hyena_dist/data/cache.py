"""A copy of shards on the disk of a node, for file systems that many ranks read from at once. It is made by one of the
node's ranks while the others wait, and is used only when every byte has the digest that the index says."""

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hyena_dist.config.digests import file_sha256
from hyena_dist.data.errors import DataError
from hyena_dist.data.index import FILE_NAME, Index, open_shard, read_index

logger = logging.getLogger(__name__)

SPARE_BYTES = 2**30
"""What is left free on the disk."""


def cached(directory: Path, cache: Path, limit: float | None = None) -> Path:
    """Where to read shards from: their copy in the cache, made now if it is not there, or the directory itself where
    the copy cannot be made; it is said why. Nothing that is in the cache is ever deleted.

    Args:
        limit: bytes that everything in the cache may have; None: what the disk has, less a gibibyte.

    Raises:
        DataError: the shards cannot be read, or are damaged.
    """
    index = read_index(directory / FILE_NAME)
    with (directory / FILE_NAME).open("rb") as file:
        place = cache / file_sha256(file)[:32]
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / "lock"):
            if not (place / FILE_NAME).exists():  # it comes last: with it all the others are there
                problem = _copy(directory, place, index, cache, limit)
                if problem:
                    logger.warning("data.cache=%s: %s; %s is read itself", cache, problem, directory)
                    return directory
    except OSError as error:
        logger.warning("data.cache=%s: no copy can be made (%s); %s is read itself", cache, error, directory)
        return directory
    return place


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process of the node; when that ends in whatever way, another goes on with what it has copied."""
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _copy(directory: Path, place: Path, index: Index, cache: Path, limit: float | None) -> str | None:
    """Copy what is missing; what is there has been verified. Returns why it does not fit, or None."""
    place.mkdir(exist_ok=True)
    missing = [shard for shard in index.shards if not (place / shard.url).exists()]
    wanted = sum(shard.filesize for shard in missing)
    held = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    room = shutil.disk_usage(cache).free - SPARE_BYTES
    if limit is not None:
        room = min(room, int(limit) - held)
    if wanted > room:
        return (f"{wanted:,} bytes do not fit: {max(room, 0):,} are left beside the {held:,} that are there: delete "
                "what is not needed in it, or raise data.cache_gb")
    logger.info("data.cache: copying %s bytes of %s to %s", f"{wanted:,}", directory, place)
    for shard in missing:
        aside = place / f"{shard.url}.part"
        with os.fdopen(open_shard(directory, shard), "rb") as source, aside.open("w+b") as target:
            shutil.copyfileobj(source, target, 2**20)
            target.flush()
            os.fsync(target.fileno())
            target.seek(0)
            if file_sha256(target) != shard.sha256:
                raise DataError(f"{directory / shard.url}: its sha256 is not the one in {FILE_NAME}: the shard was "
                                "altered; copy or build the shard again")
        aside.rename(place / shard.url)
    aside = place / f"{FILE_NAME}.part"
    shutil.copyfile(directory / FILE_NAME, aside)
    aside.rename(place / FILE_NAME)
    return None
