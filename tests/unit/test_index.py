"""shards.json is read strictly: whatever is in it, opening and verifying end well or in one line."""

import contextlib
import json
import os
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from hyena_dist.cli.verify import main as verify_command
from hyena_dist.data.errors import DataError
from hyena_dist.data.index import checksum
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.splits import BedSplits
from hyena_dist.data.tokenizer import encode
from hyena_dist.data.verify import verify
from tests.genomes import genome, shards

CONTIGS = genome(3, 5000, 1, 2999, 4000)
FORMAT_1 = Path(__file__).parents[1] / "format1"


@pytest.fixture
def directory(tmp_path):
    return shards(tmp_path, CONTIGS).directory


@pytest.fixture
def format_1(tmp_path):
    return Path(shutil.copytree(FORMAT_1, tmp_path / "format1"))


def rewrite(directory, change, *, seal=True):
    """Alter the index; with `seal` so that its checksum fits, as a stranger would."""
    path = directory / "shards.json"
    content = json.loads(path.read_text())
    change(content)
    if seal and "checksum" in content:
        content["checksum"] = checksum(content)
    path.write_text(json.dumps(content))


def put(*path):
    """A change of one place of the index: keys, and the new value last."""
    *way, last, value = path

    def change(content):
        for key in way:
            content = content[key]
        content[last] = value
    return change


def keep_one_shard(content):
    """As a directory of which the last shards were not copied, with an index that knows only the first."""
    count = content["shardlist"][0]["nsamples"]
    content["shardlist"] = content["shardlist"][:1]
    kept = content["samples"][:count] if "samples" in content else None
    segments = sum(row[3] for row in kept) if kept else count
    content["segments"] = content["segments"][:segments]
    if kept:
        content["samples"] = kept


CHANGES = {
    "url: command": (put("shardlist", 0, "url", "e.tar::pipe:touch ran"), "not a plain file name"),
    "url: pipe": (put("shardlist", 0, "url", "pipe:touch ran"), "not a plain file name"),
    "url: other directory": (put("shardlist", 0, "url", "../x.tar"), "not a plain file name"),
    "url: absolute": (put("shardlist", 0, "url", "/etc/passwd"), "not a plain file name"),
    "url: scheme": (put("shardlist", 0, "url", "https://x/y.tar"), "not a plain file name"),
    "url: braces": (put("shardlist", 0, "url", "shard-{0..9}.tar"), "not a plain file name"),
    "url: dots": (put("shardlist", 0, "url", ".."), "not a plain file name"),
    "url: line": (put("shardlist", 0, "url", "a.tar\nb"), "not a plain file name"),
    "url: number": (put("shardlist", 0, "url", 7), "not a plain file name"),
    "url: twice": (lambda c: put("shardlist", 1, "url", c["shardlist"][0]["url"])(c), "listed twice"),
    "sha256": (put("shardlist", 0, "sha256", "0" * 64), "its sha256 is not"),
    "sha256 short": (put("shardlist", 0, "sha256", "ab"), "sha256 of .* is none"),
    "nsamples": (put("shardlist", 0, "nsamples", 1), "holds . samples, not 1"),
    "filesize": (put("shardlist", 0, "filesize", 10**6), "has .* bytes, shards.json says 1000000"),
    "bases of a shard": (put("shardlist", 0, "bases", 2999), "holds .* bases, not 2999"),
    "bases as text": (put("shardlist", 0, "bases", "2999"), "not whole"),
    "assembly": (put("assembly", ["hg38"]), "assembly is not"),
    "splits": (put("splits", "val", 5), "splits are not"),
    "splits: true": (lambda c: put("splits", "val", bool(c["splits"]["val"]))(c), "splits are not"),
    "no contigs": (lambda c: c.pop("contigs"), "has no key 'contigs'"),
    "unknown key": (put("contigz", 1), "unknown key 'contigz'"),
    "version": (put("version", 9), "version 9, this code reads"),
    "version as text": (put("version", "1"), "version '1', this code reads"),
    "format": (put("format", "x"), "format 'x'"),
    "wids": (put("wids_version", 2), "wids_version"),
    "contig of no name": (put("contigs", 0, 0, ""), "contig 0 is not"),
    "contig of two lines": (put("contigs", 0, 0, "a\nb"), "contig 0 is not"),
    "contig of a surrogate": (put("contigs", 0, 0, "\ud800"), "contig 0 is not"),
    "contig renamed": (put("contigs", 0, 0, "other"), "describes itself otherwise"),
    "contigs of one name": (lambda c: put("contigs", 1, 0, c["contigs"][0][0])(c), "two contigs have one name"),
    "contig of -1": (put("contigs", 0, 1, -1), "contig 0 is not"),
    "contig too short": (put("contigs", 0, 1, 10), "leaves its contig"),
    "contig of 1 column": (put("contigs", 0, ["x"]), "row 0 of contigs"),
    "segment of text": (put("segments", 0, 2, "700"), "row 0 of segments"),
    "segment of a float": (put("segments", 0, 2, 7e2), "row 0 of segments"),
    "segment of no split": (put("segments", 0, 3, 9), "refers to nothing"),
    "segment of another split": (put("segments", 0, 3, 1), "splits are not"),
    "segment of no contig": (put("segments", 0, 0, 99), "out of order|refers to nothing"),
    "segments overlap": (put("segments", 1, 1, 0), "out of order, overlaps"),
    "segments gone": (lambda c: c["segments"].pop(), "number of segments|holds . samples"),
    "all but one shard gone": (keep_one_shard, "splits are not"),
}
OF_FORMAT_2 = {
    "contig longer": (put("contigs", 0, 1, 5001), "describes itself otherwise"),
    "species": (put("sources", 0, 1, "mouse"), "describes itself otherwise"),
    "no such source": (put("contigs", 0, 2, 7), "no source '7'"),
    "nbytes": (lambda c: put("samples", 1, 2, c["samples"][1][2] + 1)(c), "is not where|overlaps"),
    "offset": (lambda c: put("samples", 1, 1, c["samples"][1][1] + 1)(c), "is not where|overlaps"),
    "offset -1": (put("samples", 1, 1, -1), "row 1 of samples"),
    "sample without segments": (put("samples", 1, 3, 0), "number of segments|empty"),
    "no such shard": (put("samples", 1, 0, 99), "refers to nothing"),
}
OF_FORMAT_1 = {
    "nbytes": (lambda c: put("segments", 1, 6, c["segments"][1][6] - 1)(c), "is not where"),
    "offset": (lambda c: put("segments", 1, 5, c["segments"][1][5] + 512)(c), "is not where|overlaps"),
    "species": (put("contigs", 0, 3, "mouse"), "describes itself otherwise"),
}


def is_refused(directory, capsys, message):
    assert verify_command([str(directory)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    with pytest.raises(DataError, match=message):
        verify(directory)


@pytest.mark.parametrize(("change", "message"), [*CHANGES.values(), *OF_FORMAT_2.values()],
                         ids=[*CHANGES, *OF_FORMAT_2])
def test_every_field_is_compared(directory, capsys, change, message):
    verify(directory)
    rewrite(directory, change)
    is_refused(directory, capsys, message)


@pytest.mark.parametrize(("change", "message"), [*CHANGES.values(), *OF_FORMAT_1.values()],
                         ids=[*CHANGES, *OF_FORMAT_1])
def test_every_field_of_format_1_is_compared(format_1, capsys, change, message):
    verify(format_1)
    rewrite(format_1, change)
    is_refused(format_1, capsys, message)


@pytest.mark.parametrize("text", ["{", "[]", "null", "[" * 100_000, '{"version": ' + "9" * 5000 + "}", "\ud800"])
def test_what_is_not_an_index_is_refused(directory, capsys, text):
    (directory / "shards.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    is_refused(directory, capsys, "shards.json: (is|has)")


@pytest.mark.parametrize("name", ["shards.json", "shard-00001.tar"])
def test_a_named_pipe_is_not_waited_for(directory, capsys, name):
    (directory / name).unlink()
    os.mkfifo(directory / name)
    is_refused(directory, capsys, f"{name}: cannot be read .it is no regular file.")


@pytest.mark.parametrize("name", ["shards.json", "shard-00001.tar"])
def test_what_becomes_a_named_pipe_meanwhile_is_not_waited_for(directory, monkeypatch, name):
    """Between a look at it and its opening."""
    def and_now(path, *arguments, **options):
        if Path(path).name == name:
            Path(path).unlink()
            os.mkfifo(path)
        return open_it(path, *arguments, **options)

    open_it = os.open
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", and_now)
        with pytest.raises(DataError, match=f"{name}: cannot be read .it is no regular file."):
            Manifest.load(directory)


def test_a_shard_that_the_index_does_not_name_is_refused(directory, capsys):
    """With an index of which all that belongs to the last shards was taken out, no table tells."""
    (directory / "shard-00009.tar").write_bytes((directory / "shard-00000.tar").read_bytes())
    is_refused(directory, capsys, "shard-00009.tar: is not in shards.json")


@pytest.mark.parametrize("name", ["a{1,2}", "x::y", "#h", "pipe:touch ran", "a b%20"])
def test_no_name_of_a_directory_is_a_pattern_or_a_command(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    directory = shards(tmp_path, CONTIGS).directory.rename(tmp_path / name)
    assert verify_command([name, "--fasta", "genome.fa"]) == 0
    assert np.array_equal(Manifest.load(name).read("chr1", 0, 5000), encode(CONTIGS["chr1"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "genome.fa"])
    assert directory.is_dir()


@pytest.mark.parametrize("url", ["e.tar::pipe:touch ran", "pipe:touch ran; cat shard-00000.tar"])
def test_no_index_runs_a_command(directory, monkeypatch, url):
    """Even where a file of that very name is there. The control: plain WebDataset runs it."""
    monkeypatch.chdir(directory)
    shutil.copy("shard-00000.tar", url)
    rewrite(directory, put("shardlist", 0, "url", url))
    assert verify_command(["."]) == 2
    assert not Path("ran").exists()
    shutil.copy("shard-00000.tar", "e.tar")
    with contextlib.suppress(OSError, ValueError, tarfile.ReadError):
        list(webdataset.WebDataset(url, shardshuffle=False))
    assert Path("ran").exists()


def flips(directory, count, seed):
    """The index with one byte replaced, many times."""
    path, rng = directory / "shards.json", random.Random(seed)
    text = path.read_bytes()
    for _ in range(count):
        at = rng.randrange(len(text))
        path.write_bytes(text[:at] + bytes([text[at] ^ rng.randrange(1, 256)]) + text[at + 1 :])
        yield at
    path.write_bytes(text)


def passing(directory, count, seed):
    """Places where a flip is not noticed; any error but ours fails."""
    passed, lines = [], []
    for at in flips(directory, count, seed):
        try:
            verify(directory)
            passed.append(at)
        except DataError as error:
            lines.append(str(error))
    assert not any("\n" in line for line in lines)
    return passed


def test_a_flipped_byte_of_the_index_is_noticed(directory):
    assert passing(directory, 300, 0) == []
    verify(directory)


def test_a_flipped_byte_of_format_1_is_noticed(format_1):
    """But in the name of the set, which nothing depends on, and in the length of a contig, which format 1 has only
    there: longer than its last segment it may be."""
    text = (format_1 / "shards.json").read_bytes()
    free = {*range(text.index(b'"f1"') + 1, text.index(b'"f1"') + 3)}
    for contig in (b'chr1",', b'chr2",', b'chr3",'):
        start = text.index(contig) + len(contig)
        free |= set(range(start, text.index(b",", start)))
    assert set(passing(format_1, 300, 0)) <= free
    verify(format_1)


def test_bases_in_no_split_do_not_matter(tmp_path):
    """A contig that no row of a BED names has no segment; it stays in the index."""
    (tmp_path / "a.bed").write_text("chr1 100 900 train\n")
    manifest = shards(tmp_path, CONTIGS, BedSplits(tmp_path / "a.bed"))
    assert len(manifest.contigs) == 4
    verify(manifest.directory)
    os.mkfifo(tmp_path / "pipe.bed")  # not waited for
    with pytest.raises(DataError, match=r"pipe.bed: cannot be read \(.*it is no regular file"):
        BedSplits(tmp_path / "pipe.bed")
