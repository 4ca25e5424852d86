"""Shards are copied to a node once, whole and verified, or read from where they are."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hyena_dist.config.sections.data import DataSection
from hyena_dist.data import cache as cache_module
from hyena_dist.data.cache import cached
from hyena_dist.data.errors import DataError
from hyena_dist.data.index import FILE_NAME
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.pool import open_pools


def copies(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Fills with each shard that is copied."""
    seen: list[Path] = []
    real = cache_module.open_shard
    monkeypatch.setattr(cache_module, "open_shard",
                        lambda directory, shard: seen.append(shard) or real(directory, shard))
    return seen


def test_a_copy_is_made_once_and_is_the_same(shards, tmp_path, monkeypatch):
    seen = copies(monkeypatch)
    found: list[Path] = []
    ranks = [threading.Thread(target=lambda: found.append(cached(shards, tmp_path / "cache"))) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(set(found)) == 1
    assert len(seen) == len(Manifest.load(shards).shards)
    assert Manifest.load(found[0]).identity == Manifest.load(shards).identity
    assert found[0] != shards
    [pool] = open_pools(DataSection(shards=str(shards), cache=str(tmp_path / "cache")), copy=True)
    assert pool.manifest.directory == found[0]
    [pool] = open_pools(DataSection(shards=str(shards), cache=str(tmp_path / "cache")))  # who only looks copies nothing
    assert pool.manifest.directory == shards


def test_what_does_not_fit_is_read_from_where_it_is_and_nothing_is_deleted(shards, tmp_path, caplog):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "another").write_bytes(bytes(1000))
    assert cached(shards, cache, limit=2000) == shards
    assert "bytes do not fit: 1,000 are left beside the 1,000 that are there" in caplog.text
    assert "raise data.cache_gb" in caplog.text
    assert (cache / "another").exists()
    assert cached(shards, cache, limit=10**7) != shards  # the control


def test_a_copy_that_was_cut_off_goes_on(shards, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    place = cached(shards, cache)
    [shard] = Manifest.load(shards).shards
    (place / FILE_NAME).unlink()
    (place / shard.url).rename(place / f"{shard.url}.part")  # killed before the shard was whole
    (place / f"{shard.url}.part").write_bytes(b"half")
    assert cached(shards, cache) == place
    assert (place / shard.url).read_bytes() == (shards / shard.url).read_bytes()
    (place / FILE_NAME).unlink()  # killed after it
    seen = copies(monkeypatch)
    assert cached(shards, cache) == place
    assert seen == []


def test_a_damaged_shard_is_not_copied(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "shards")
    [shard] = Manifest.load(shards).shards
    content = bytearray((tmp_path / "shards" / shard.url).read_bytes())
    content[5000] ^= 1
    (tmp_path / "shards" / shard.url).write_bytes(content)
    with pytest.raises(DataError, match="its sha256 is not the one in shards.json"):
        cached(tmp_path / "shards", tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob(FILE_NAME))


def test_a_cache_that_cannot_be_written_is_said(shards, caplog):
    assert cached(shards, Path("/proc/sys/cache")) == shards
    assert "no copy can be made" in caplog.text


def test_a_rank_waits_while_another_copies(shards, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    code = ("import fcntl, sys\nfile = open(sys.argv[1], 'a')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
            "print('held', flush=True)\nsys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code, cache / "lock"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        rank = threading.Thread(target=cached, args=(shards, cache), daemon=True)
        rank.start()
        rank.join(0.3)
        assert rank.is_alive()
        other.kill()  # killed in the middle: the lock goes with it
        rank.join(30)
        assert not rank.is_alive()


def test_a_limit_without_a_cache_is_refused():
    with pytest.raises(ValueError, match="data.cache_gb limits data.cache, which is empty"):
        DataSection(shards="x", cache_gb=1.0)
