import bz2
import errno
import gzip
import hashlib
import importlib
import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from hyena_dist.data import build as build_module
from hyena_dist.data import segment
from hyena_dist.data.build import build
from hyena_dist.data.contigs import Source
from hyena_dist.data.errors import DataError
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.splits import BedSplits, ContigSplits, FractionSplits, Splits
from hyena_dist.data.tokenizer import encode
from hyena_dist.data.verify import verify
from tests.genomes import genome, shards, write_fasta

ROOT = Path(__file__).parents[2]
CONTIGS = genome(3, 5000, 1, 2999, 12000)


def command(name):
    main = importlib.import_module(f"hyena_dist.cli.{name}").main
    return lambda *arguments: main([str(argument) for argument in arguments])


build_command, verify_command = command("build"), command("verify")


def the_one_line(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def bases_of(manifest, split):
    return {(i.contig, base) for i in manifest.intervals(split) for base in range(i.start, i.end)}


def test_every_slice_is_the_slice_of_the_fasta(tmp_path):
    manifest = shards(tmp_path, CONTIGS)
    assert len(manifest.shards) > 3
    rng = np.random.default_rng(0)
    for name, text in CONTIGS.items():
        assert np.array_equal(manifest.read(name, 0, len(text)), encode(text))
        for _ in range(200):
            start, end = sorted(rng.integers(0, len(text) + 1, 2).tolist())
            assert np.array_equal(manifest.read(name, start, end), encode(text[start:end]))


def test_reading_outside_is_refused(tmp_path):
    (tmp_path / "a.bed").write_text("chr1\t100\t200\ttrain\nchr1\t300\t400\tval\n")
    manifest = shards(tmp_path, {"chr1": b"ACGT" * 200}, BedSplits(tmp_path / "a.bed"))
    for start, end, message in ((-1, 5, "outside its contig"), (0, 801, "outside its contig"), (0, 50, "holds no base"),
                                (150, 250, "in no split"), (250, 260, "in no split")):
        with pytest.raises(ValueError, match=message):
            manifest.read("chr1", start, end)
    with pytest.raises(ValueError, match="'chr2' is not in"):
        manifest.read("chr2", 0, 1)


def one_of_each(about, *fields):
    """The fields of each segment of a sample: a field is a list, or one value for all."""
    count = max(len(value) if isinstance(value, list) else 1 for value in about.values())
    columns = [about[field] if isinstance(about[field], list) else [about[field]] * count for field in fields]
    return list(zip(*columns, strict=True))


def test_plain_webdataset_reads_the_shards_and_the_index_is_wids(tmp_path):
    manifest = shards(tmp_path, CONTIGS)
    urls = [str(manifest.directory / shard.url) for shard in manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == len(manifest.index.samples) < len(manifest.segments)
    seen = []
    for sample in samples:
        about, bases = json.loads(sample["json"]), segment.decode(sample["seg"]).tobytes()
        assert set(about) == {"assembly", "contig", "contig_bases", "start", "end", "split", "species"}
        for contig, start, end in one_of_each(about, "contig", "start", "end"):
            assert bases[: end - start] == CONTIGS[contig][start:end]
            bases = bases[end - start :]
            seen.append((contig, start, end))
        assert not bases
    assert seen == [(manifest.contigs[row.contig].name, row.start, row.end) for row in manifest.segments]
    index = json.loads((manifest.directory / "shards.json").read_text())
    assert index["wids_version"] == 1
    for row in index["shardlist"]:
        data = (manifest.directory / row["url"]).read_bytes()
        assert row["filesize"] == len(data)
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        assert row["nsamples"] == len(tarfile.open(manifest.directory / row["url"]).getmembers()) / 2
    assert sum(row["bases"] for row in index["shardlist"]) == sum(map(len, CONTIGS.values()))


def test_same_input_gives_the_same_bytes(tmp_path):
    source = Source(write_fasta(tmp_path / "a.fa", CONTIGS))
    first, second = (build([source], tmp_path / name, Splits()) for name in "xy")
    assert first.identity == second.identity
    for shard in first.shards:
        assert (tmp_path / "x" / shard.url).read_bytes() == (tmp_path / "y" / shard.url).read_bytes()
    assert shards(tmp_path, CONTIGS, FractionSplits(0.1)).identity != first.identity


def test_contigs_of_256_kb_take_at_most_027_bytes_per_base(tmp_path):
    rng = np.random.default_rng(0)
    bases = rng.choice(np.frombuffer(b"ACGT", dtype=np.uint8), 256_000)
    for start in range(0, bases.size, 600):
        bases[start : start + int(rng.integers(30, 400))] |= 0x20
    build([Source(write_fasta(tmp_path / "a.fa", {"chr1": bases.tobytes()}))], tmp_path / "out", Splits())
    assert sum(file.stat().st_size for file in (tmp_path / "out").iterdir() if file.name != "audit.json") \
        <= 0.27 * bases.size


def test_whole_contigs_validate(tmp_path):
    manifest = shards(tmp_path, CONTIGS, ContigSplits(["chr1", "chr3"]))
    assert {i.contig for i in manifest.intervals("val")} == {"chr1", "chr3"}
    assert {i.contig for i in manifest.intervals("train")} == {"chr2", "chr4"}


def test_a_fraction_of_each_contig_validates(tmp_path):
    manifest = shards(tmp_path, CONTIGS, FractionSplits(0.1))
    train, val = bases_of(manifest, "train"), bases_of(manifest, "val")
    assert not train & val
    assert len(train) + len(val) == sum(map(len, CONTIGS.values()))
    assert sum(contig == "chr4" for contig, _ in val) == 1200


def test_bed_rows_are_the_splits(tmp_path):
    bed = tmp_path / "a.bed"
    bed.write_text("track name=x\n# comment\n\nchr4 0 3000 train\nchr4 2500 3500 train\nchr4 3500 3600 valid\n"
                   "chr4 3600 4000 train\nchr1 10 20 test\n")
    manifest = shards(tmp_path, CONTIGS, BedSplits(bed))
    assert bases_of(manifest, "train") == {("chr4", i) for i in [*range(3500), *range(3600, 4000)]}
    assert bases_of(manifest, "val") == {("chr4", i) for i in range(3500, 3600)}
    assert bases_of(manifest, "test") == {("chr1", i) for i in range(10, 20)}


def test_rows_of_contigs_that_are_called_as_lines_for_a_browser_count(tmp_path):
    contigs = dict(zip(("track", "tiny", "browser"), CONTIGS.values(), strict=False))
    bed = tmp_path / "a.bed"
    bed.write_text("track name=x\ntrack\nbrowser position chr7:1-20\nbrowser hide all\ntrack 0 90 train\n"
                   "browser 5 50 val\n")
    manifest = shards(tmp_path, contigs, BedSplits(bed))
    assert bases_of(manifest, "train") == {("track", i) for i in range(90)}
    assert bases_of(manifest, "val") == {("browser", i) for i in range(5, 50)}


def test_a_contig_with_a_comma_in_its_name_is_held_out(tmp_path, capsys):
    """By an option of its own; beside others in one list it would be two names."""
    fasta = write_fasta(tmp_path / "a.fa", dict(zip(("odd,one", "two", "three"), CONTIGS.values(), strict=False)))
    assert build_command(fasta, "--out", tmp_path / "out", "--val-contigs", "odd,one", "--val-contigs", "two") == 0
    manifest = Manifest.load(tmp_path / "out")
    assert {interval.contig for interval in manifest.intervals("val")} == {"odd,one", "two"}
    capsys.readouterr()
    assert build_command(fasta, "--out", tmp_path / "no", "--val-contigs", "two,odd,one") == 2
    assert re.search("'odd' is in none of the files; .* of its own", the_one_line(capsys))
    both = write_fasta(tmp_path / "b.fa", dict(zip(("odd,one", "one", "three"), CONTIGS.values(), strict=False)))
    assert build_command(both, "--out", tmp_path / "no", "--val-contigs", "odd,one") == 2
    assert "'odd,one' is a contig, and so is 'one'" in the_one_line(capsys)


BAD_BEDS = {
    "outside": ("chr1 0 100 train\nchr1 4000 5001 val\n", "line 2: chr1:4000-5001 lies outside its contig of 5000"),
    "unknown contig": ("chrZ 0 10 train\n", "line 1: contig 'chrZ' is in none of the files"),
    "overlap": ("chr1 0 100 train\nchr1 50 150 val\n", "line 2: chr1:50-150 .val. overlaps line 1"),
    "overlap inside": ("chr1 0 100 train\nchr1 20 40 train\nchr1 90 95 test\n", "line 3: .* overlaps"),
    "columns": ("chr1 0 10\n", "line 1: has 3 columns"),
    "split": ("chr1 0 10 dev\n", "line 1: split 'dev' is not one of"),
    "numbers": ("chr1 zero 10 train\n", "line 1: start 'zero'"),
    "empty row": ("chr1 10 10 train\n", "line 1: start '10'"),
    "other digits": ("chr1 0 \u00b2 train\n", "line 1: start '0' and end"),
    "endless number": (f"chr1 0 {'9' * 5000} train\n", "line 1: start '0' and end"),
    "negative": ("chr1 -5 10 train\n", "line 1: start '-5'"),
    "no rows": ("# nothing\n", "holds no rows"),
    "a track of nothing": ("track -5 10 train\n", "line 1: start '-5'"),
}


@pytest.mark.parametrize(("text", "message"), BAD_BEDS.values(), ids=BAD_BEDS.keys())
def test_bad_beds_end_in_one_line_and_status_2(tmp_path, capsys, text, message):
    fasta, bed = write_fasta(tmp_path / "a.fa", CONTIGS), tmp_path / "a.bed"
    bed.write_text(text, encoding="utf-8")
    for dry_run in ([], ["--dry-run"]):
        assert build_command(fasta, "--out", tmp_path / "out", "--bed", bed, *dry_run) == 2
        assert re.search(message, the_one_line(capsys))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bed", "a.fa"]


@pytest.mark.parametrize(("content", "message"), [
    (b"\xef\xbb\xbfchr1 0 100 train\n", "is text behind a byte order mark .BOM.: convert it with `tail -c"),
    (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer .*: run `git lfs pull`"),
    ("chr1 0 100 train\n".encode("utf-16"), "is text in UTF-16: convert it with `iconv -f UTF-16 -t UTF-8 .*a.bed > "),
    (gzip.compress(b"chr1 0 100 train\n", mtime=0)[:-4], "the gzip file is cut short"),
    (bz2.compress(b"chr1 0 100 train\n"), "is compressed by bzip2"),
    (b"chr1\xff 0 100 train\n", "cannot be read: line 1: .*give a BED file as plain text of UTF-8"),
])
def test_a_bed_of_another_kind_is_named(tmp_path, capsys, content, message):
    fasta, bed = write_fasta(tmp_path / "a.fa", CONTIGS), tmp_path / "a.bed"
    bed.write_bytes(content)
    assert build_command(fasta, "--out", tmp_path / "out", "--bed", bed) == 2
    assert re.search(message, the_one_line(capsys))
    bed.write_text("LOCUS 0 100 train\n")  # the control: text is text, though GenBank's files begin so
    assert build_command(fasta, "--out", tmp_path / "out", "--bed", bed) == 2
    assert "contig 'LOCUS' is in none" in the_one_line(capsys)


@pytest.mark.parametrize("arguments", [["--val-contigs", "chr1,chrZ"], ["--val-contigs", ","],
                                       ["--val-fraction", "1.5"], ["--bed", "none.bed"]])
def test_other_mistakes_end_in_one_line_and_status_2(tmp_path, capsys, arguments):
    fasta = write_fasta(tmp_path / "a.fa", CONTIGS)
    assert build_command(fasta, "--out", tmp_path / "out", *arguments) == 2
    the_one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["a.fa"]


def test_bad_fasta_and_existing_output_end_in_one_line_and_status_2(tmp_path, capsys):
    good, bad, out = write_fasta(tmp_path / "a.fa", CONTIGS), tmp_path / "b.fa", tmp_path / "out"
    assert build_command(good, "--out", good / "out") == 2
    assert f"{good / 'out'}: no such directory can be made" in the_one_line(capsys)
    bad.write_bytes(b">x\nAC!T\n")
    assert build_command(good, bad, "--out", out) == 2
    assert str(bad) in the_one_line(capsys)
    assert not out.exists()
    out.mkdir()
    assert build_command(good, "--out", out) == 2
    assert f"{out}: exists" in the_one_line(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.fa", "b.fa", "out"]


def test_dry_run_writes_nothing_and_a_build_says_what_it_wrote(tmp_path, capsys):
    fasta = write_fasta(tmp_path / "a.fa.gz", CONTIGS)
    assert build_command(fasta, "--out", tmp_path / "out", "--val-fraction", "0.1", "--dry-run") == 0
    assert "not written (dry run); it would hold 20,000 bases in 1 shards, of some 5,000" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert build_command(fasta, f"mouse={fasta}", "--out", tmp_path / "new/out", "--val-contigs",
                         "chr1,mouse.chr1") == 0
    printed = capsys.readouterr().out
    assert sum(" 4 " in line for line in printed.splitlines() if "│ a " in line) == 2
    assert "bytes per base" in printed
    assert verify_command(tmp_path / "new/out", "--fasta", fasta, f"mouse={fasta}") == 0
    contigs = Manifest.load(tmp_path / "new/out").contigs
    assert [(info.assembly, info.species) for info in contigs[3:5]] == [("a", "a"), ("a", "mouse")]


def test_a_full_disk_leaves_nothing(tmp_path):
    fasta = write_fasta(tmp_path / "a.fa", genome(0, 400_000))
    limit = (50_000, 50_000)
    done = subprocess.run([sys.executable, str(ROOT / "shards/build.py"), str(fasta), "--out", str(tmp_path / "out")],
                          capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'out'}: cannot be written")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.fa"]


def test_a_killed_build_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    fasta = write_fasta(tmp_path / "a.fa", CONTIGS)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if killed: nothing tidies up
    monkeypatch.setattr(build_module._ShardWriter, "close", lambda _: os.close(-1))
    with pytest.raises(OSError, match="Bad file"):
        build([Source(fasta)], tmp_path / "out", Splits())
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("shards.json"))


@pytest.mark.parametrize(("code", "of_files", "built"), [
    *((code, False, True) for code in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF,
                                       errno.ENOTTY)),
    (errno.EIO, False, False), (errno.EINVAL, True, False)])
def test_a_file_system_that_syncs_no_directories_holds_shards(tmp_path, monkeypatch, code, of_files, built):
    """As CIFS and some of FUSE answer. The controls: a disk that fails, and files that are not synced."""
    fasta, fsync = write_fasta(tmp_path / "a.fa", CONTIGS), os.fsync

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) != of_files:
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    assert build_command(fasta, "--out", tmp_path / "out") == (0 if built else 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.fa", "out"][: 1 + built]


def test_what_was_made_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    """A rename would replace an empty directory."""
    fasta, close = write_fasta(tmp_path / "a.fa", CONTIGS), build_module._ShardWriter.close

    def meanwhile(writer):
        (tmp_path / "out").mkdir()
        return close(writer)

    monkeypatch.setattr(build_module._ShardWriter, "close", meanwhile)
    with pytest.raises(FileExistsError):
        build([Source(fasta)], tmp_path / "out", Splits())
    assert not list((tmp_path / "out").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.fa", "out"]


def test_verify_accepts_what_build_wrote_and_the_fasta(tmp_path):
    manifest = shards(tmp_path, CONTIGS, FractionSplits(0.2))
    assert verify(manifest.directory, [Source(tmp_path / "genome.fa")]).identity == manifest.identity


def rewrite(path, change):
    path.chmod(0o644)
    path.write_bytes(change(path.read_bytes()))


def flip(data, position):
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.999])
def test_verify_finds_any_altered_byte(tmp_path, capsys, share):
    manifest = shards(tmp_path, CONTIGS)
    path = manifest.directory / manifest.shards[1].url
    rewrite(path, lambda data: flip(data, int(share * len(data))))
    assert verify_command(manifest.directory) == 2
    assert f"{path}: its sha256 is not" in the_one_line(capsys)


def test_a_shard_cut_short_or_missing_is_refused_when_opened(tmp_path):
    manifest = shards(tmp_path, CONTIGS)
    path = manifest.directory / manifest.shards[1].url
    opened = Manifest.load(manifest.directory)
    rewrite(path, lambda data: data[:-1024])
    for use in (Manifest.load, verify):
        with pytest.raises(DataError, match=f"{path}: has .* bytes, shards.json says .* cut short or altered"):
            use(manifest.directory)
    with pytest.raises(DataError, match="cut short or altered"):
        opened.read("chr1", 0, 5000)
    path.unlink()
    with pytest.raises(DataError, match=f"{path}: cannot be read"):
        Manifest.load(manifest.directory)


def test_a_shard_cut_short_while_in_use_is_noticed(tmp_path):
    manifest = shards(tmp_path, CONTIGS)
    manifest.read("chr4", 0, 12000)
    os.truncate(manifest.directory / manifest.shards[2].url, 600)
    with pytest.raises(DataError, match="cut short while in use"):
        manifest.read("chr4", 0, 12000)


def test_verify_compares_with_the_fasta(tmp_path, capsys):
    manifest = shards(tmp_path, CONTIGS)
    other = dict(CONTIGS)
    text = bytearray(other["chr4"])
    text[8000] ^= 0x20
    other["chr4"] = bytes(text)
    fasta = write_fasta(tmp_path / "other.fa", other)
    with pytest.raises(DataError, match=r"differs from .*other.fa at chr4:8001"):
        verify(manifest.directory, [Source(fasta)])
    write_fasta(fasta, {name: CONTIGS[name] for name in ("chr1", "chr2", "chr3")})
    assert verify_command(manifest.directory, "--fasta", fasta) == 2
    assert "contig 'chr4' is in none" in the_one_line(capsys)
    write_fasta(fasta, {**CONTIGS, "chr5": b"ACGT"})
    assert verify_command(manifest.directory, "--fasta", fasta) == 2
    assert "contig 'chr5' of 4 bases is not in" in the_one_line(capsys)
