"""Shards are copied to a node once, whole and verified, or read from where they are."""

import os
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
from hyena_dist.data.index import FILE_NAME, Shard
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.pool import open_pools


def copies(monkeypatch: pytest.MonkeyPatch, shards: Path) -> list[Shard]:
    """Fills with each shard that is copied."""
    seen: list[Shard] = []
    real = cache_module.open_shard

    def opened(directory: Path, shard: Shard) -> int:
        if directory == shards:
            seen.append(shard)
        return real(directory, shard)
    monkeypatch.setattr(cache_module, "open_shard", opened)
    return seen


def test_a_copy_is_made_once_and_is_the_same(shards, tmp_path, monkeypatch):
    seen = copies(monkeypatch, shards)
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
    seen = copies(monkeypatch, shards)
    assert cached(shards, cache) == place
    assert seen == []


def test_what_another_left_where_a_copy_belongs_is_not_believed(shards, tmp_path, monkeypatch):
    cache, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    [shard] = Manifest.load(shards).shards
    place = cached(shards, cache)
    (place / FILE_NAME).write_text("{}")
    elsewhere.write_text("kept")
    (place / f"{FILE_NAME}.part").symlink_to(elsewhere)
    seen = copies(monkeypatch, shards)
    assert cached(shards, cache) == place
    assert (place / FILE_NAME).read_bytes() == (shards / FILE_NAME).read_bytes()
    assert elsewhere.read_text() == "kept", "what a link leads to is not written"

    content = bytearray((place / shard.url).read_bytes())
    content[5000] ^= 1
    (place / shard.url).write_bytes(content)
    assert cached(shards, cache) == place
    assert seen == [], "control: as long as it is this user's it was verified"
    monkeypatch.setattr(os, "getuid", lambda: -1)
    assert cached(shards, cache) == cached(shards, cache) == place
    assert (place / shard.url).read_bytes() == (shards / shard.url).read_bytes()
    assert seen == [shard], "another's that is verified is used"


def test_an_index_that_changes_while_shards_are_copied_is_an_error(shards, tmp_path, monkeypatch):
    shutil.copytree(shards, tmp_path / "shards")
    real = cache_module.open_shard

    def open_and_change(directory: Path, shard: Shard) -> int:
        if directory == tmp_path / "shards":
            (directory / FILE_NAME).write_text("{}")
        return real(directory, shard)
    monkeypatch.setattr(cache_module, "open_shard", open_and_change)
    with pytest.raises(DataError, match="shards.json: has changed while the shards were copied: start again"):
        cached(tmp_path / "shards", tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob(FILE_NAME))


def test_a_copy_is_on_the_disk_before_it_has_its_name(shards, tmp_path, monkeypatch):
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.readlink(f"/proc/self/fd/{file}")) or fsync(file))
    monkeypatch.setattr(Path, "rename", lambda path, to: done.append(str(to)) or rename(path, to))
    place = cached(shards, tmp_path / "cache")
    names = [*(shard.url for shard in Manifest.load(shards).shards), FILE_NAME]
    assert done == [str(place / each) for name in names for each in (f"{name}.part", name)]


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


def test_a_rank_waits_while_another_copies_and_says_so(shards, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache_module, "SILENT_SECONDS", 0.1)
    caplog.set_level("INFO")
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
        rank.join(0.5)
        assert rank.is_alive()
        assert f"waiting for the process that holds {cache / 'lock'}, which copies or verifies shards" in caplog.text
        other.kill()  # killed in the middle: the lock goes with it
        rank.join(30)
        assert not rank.is_alive()


def test_a_limit_without_a_cache_is_refused():
    with pytest.raises(ValueError, match="data.cache_gb limits data.cache, which is empty"):
        DataSection(shards="x", cache_gb=1.0)
