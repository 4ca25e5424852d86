"""Damaged shards: no base changes unseen, and every error is one line of ours.

Each case overwrites one byte, or four in a row, of a payload, of a tar header, of a sample's JSON or of the index, and
reads everything by random access and by verification.
"""

import hashlib
import json
import random
import shutil
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest

from hyena_dist.data import segment
from hyena_dist.data.errors import DataError
from hyena_dist.data.index import checksum
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.splits import FractionSplits
from hyena_dist.data.tokenizer import encode
from hyena_dist.data.verify import verify
from tests.genomes import genome, shards

CONTIGS = genome(4, 90_000, 300, 40, 1, 200, 70_000)
FORMAT_1 = Path(__file__).parents[1] / "format1"
CASES = 300
FAST = 60


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return shards(tmp_path_factory.mktemp("whole"), CONTIGS, FractionSplits(0.1), segment_bases=80_000,
                  shard_bases=90_000).directory


def bases_of(directory):
    """Every base of every stretch, as ids."""
    manifest = Manifest.load(directory)
    return [(i.contig, i.start, split, manifest.read(i.contig, i.start, i.end).tobytes())
            for split in ("train", "val", "test") for i in manifest.intervals(split)]


REFUSED = "refused"


def or_one_line(use, directory):
    """What is read, or REFUSED by an error of ours; any other error fails."""
    try:
        return use(directory)
    except DataError as error:
        line = str(error)
    assert "\n" not in line
    return REFUSED


def regions(path):
    """What lies where in a shard: kind, start, end."""
    with tarfile.open(path) as tar:
        for member in tar:
            yield "header", member.offset, member.offset_data
            yield member.name.rpartition(".")[2], member.offset_data, member.offset_data + member.size


def damage(directory, kind, rng):
    """Overwrite bytes of this kind by others; the file, the place and what was there."""
    if kind == "index":
        path = directory / "shards.json"
        start, end = 0, path.stat().st_size
    else:
        path = rng.choice(sorted(directory.glob("*.tar")))
        _, start, end = rng.choice([row for row in regions(path) if row[0] == kind])
    count = rng.choice((1, 4))
    at = rng.randrange(start, max(start + 1, end - count + 1))
    count = min(count, end - at)
    data = bytearray(path.read_bytes())
    before = bytes(data)
    data[at] ^= rng.randrange(1, 256)
    for i in range(at + 1, at + count):
        data[i] = rng.randrange(256)
    path.write_bytes(data)
    return path, at, before


@pytest.mark.parametrize(("first", "count"), [
    (0, FAST), pytest.param(FAST, CASES - FAST, marks=pytest.mark.slow)])
def test_no_base_changes_unseen(whole, tmp_path, first, count):
    """Random access refuses what it touches; what it does not touch (tar headers, JSON) verification refuses."""
    directory = Path(shutil.copytree(whole, tmp_path / "copy"))
    want, outcome = bases_of(directory), {}
    for case in range(first, first + count):
        rng = random.Random(case)
        kind = ("seg", "index", "header", "json", "seg")[case % 5]
        path, at, before = damage(directory, kind, rng)
        found = or_one_line(bases_of, directory)
        assert found in (want, REFUSED), f"case {case}: {kind}, byte {at} of {path}"
        read = "refused" if found == REFUSED else "read"
        assert or_one_line(verify, directory) == REFUSED
        outcome[kind, read] = outcome.get((kind, read), 0) + 1
        path.write_bytes(before)
    print(outcome)
    assert set(outcome) == {("seg", "refused"), ("index", "refused"), ("header", "read"), ("json", "read")}
    assert bases_of(directory) == want


def test_control_format_1_has_no_checksums(tmp_path):
    """There a damaged payload is read as other bases; only verification knows."""
    directory = Path(shutil.copytree(FORMAT_1, tmp_path / "copy"))
    want, changed = bases_of(directory), 0
    for case in range(20):
        path, _, before = damage(directory, "seg", random.Random(case))
        changed += or_one_line(bases_of, directory) not in (want, REFUSED)
        with pytest.raises(DataError, match="its sha256 is not"):
            verify(directory)
        path.write_bytes(before)
    assert changed > 3


def fill(data, start, ids, bases):
    """As random access reads a segment."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        layout = segment.BlockLayout.read(segment.Place(file.fileno(), 0, len(data)), bases)
        layout.fill(file.fileno(), 0, start, ids)
    return layout


@pytest.mark.parametrize(("first", "count"), [(0, 40), pytest.param(40, 200, marks=pytest.mark.slow)])
def test_verification_does_not_lean_on_the_digest(whole, tmp_path, first, count):
    """A stranger's shard has the digest that it should: what is wrong in it is still told in one line, and what passes
    has the same bases."""
    directory = Path(shutil.copytree(whole, tmp_path / "copy"))
    index, want, passed = (directory / "shards.json").read_text(), bases_of(directory), 0
    for case in range(first, first + count):
        path, at, before = damage(directory, ("header", "json", "seg", "header")[case % 4], random.Random(case))
        content = json.loads(index)
        [row] = [row for row in content["shardlist"] if row["url"] == path.name]
        row["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        content["checksum"] = checksum(content)
        (directory / "shards.json").write_text(json.dumps(content))
        if or_one_line(verify, directory) != REFUSED:
            passed += 1
            assert bases_of(directory) == want, f"case {case}: byte {at} of {path}"
        path.write_bytes(before)
    assert passed < count / 4


def test_no_byte_of_a_segment_may_change():
    """Each byte once, by every reader of a segment; the ends too."""
    text = CONTIGS["chr2"] + b"N" * 30 + b"acgt" * 9
    data = segment.encode(np.frombuffer(text, np.uint8))
    want = segment.decode(data).tobytes()
    assert want == text
    for at in range(len(data)):
        changed = data[:at] + bytes([data[at] ^ (1 + at % 255)]) + data[at + 1 :]
        with pytest.raises(DataError):
            segment.decode(changed)
        with pytest.raises(DataError):
            fill(changed, 0, np.empty(len(text), np.uint8), len(text))
    for other in (b"", data[:5], data[:-1], data + b"\0", data[:12]):
        with pytest.raises(DataError):
            segment.decode(other)


@pytest.mark.parametrize("start", [0, 5, segment.BLOCK_BASES - 1, segment.BLOCK_BASES, 2 * segment.BLOCK_BASES + 99])
@pytest.mark.parametrize("count", [1, 2, 1000, segment.BLOCK_BASES, 2 * segment.BLOCK_BASES + 3])
def test_a_window_checks_the_blocks_that_it_touches_and_no_other(start, count):
    (text,) = genome(6, 5 * segment.BLOCK_BASES - 7).values()
    bases = np.frombuffer(text, np.uint8)
    data = bytearray(segment.encode(bases))
    want = np.empty(count, np.uint8)
    layout = fill(data, start, want, bases.size)
    assert np.array_equal(want, encode(text[start : start + count]))
    touched = range(start // segment.BLOCK_BASES, (start + count - 1) // segment.BLOCK_BASES + 1)
    for block in range(5):
        for at in (layout.offsets[block], layout.offsets[block + 1] - 1):  # its first base, and its last lower case
            data[at] ^= 4
            ids = np.empty(count, np.uint8)
            if block in touched:
                with pytest.raises(DataError, match=f"block {block} .* does not match"):
                    fill(data, start, ids, bases.size)
            else:
                fill(data, start, ids, bases.size)
                assert np.array_equal(ids, want)
            data[at] ^= 4
