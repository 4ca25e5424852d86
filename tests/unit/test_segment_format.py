"""What shards take on disk, short contigs in one sample, and sets of format 1."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset

from hyena_dist.data.build import build
from hyena_dist.data.contigs import Source
from hyena_dist.data.errors import DataError
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.splits import FractionSplits, Splits
from hyena_dist.data.stream import TrainStream
from hyena_dist.data.tokenizer import decode, encode
from hyena_dist.data.verify import verify
from tests.genomes import genome, sequence, shards, write_fasta

ROOT = Path(__file__).parents[2]
FORMAT_1 = ROOT / "tests" / "format1"


def bytes_per_base(directory, bases):
    return sum(path.stat().st_size for path in directory.iterdir()) / bases


def scaffolds(directory, count, bases=500):
    """A FASTA file of many short contigs."""
    rng = np.random.default_rng(0)
    rows = rng.choice(np.frombuffer(b"ACGT", np.uint8), (count, bases))
    path = directory / "scaffolds.fa"
    path.write_bytes(b"".join(b">scaffold_%d\n%s\n" % (i, row.tobytes()) for i, row in enumerate(rows)))
    return path, rows


@pytest.mark.parametrize("count", [4_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_short_contigs_share_samples(tmp_path, count):
    """At most 0.5 byte a base, and 10 seconds for 100,000 of them, of this process: the machine may be shared."""
    build([Source(scaffolds(tmp_path, 1)[0])], tmp_path / "before", Splits())  # what it imports is not counted
    path, rows = scaffolds(tmp_path, count)
    started = time.process_time()
    manifest = build([Source(path)], tmp_path / "out", Splits())
    seconds = time.process_time() - started
    size = bytes_per_base(tmp_path / "out", rows.size)
    print(f"{count} contigs: {seconds:.1f} s, limit {10 * count / 100_000 + 1:.1f}; {size:.3f} byte a base, limit 0.5")
    assert size <= 0.5
    assert seconds < 10 * count / 100_000 + 1
    assert len(manifest.index.samples) == -(-rows.size // 1_048_500)
    for i in range(0, count, count // 50):
        assert np.array_equal(manifest.read(f"scaffold_{i}", 0, 500), encode(rows[i].tobytes()))
    assert {i.bases for i in manifest.intervals("train")} == {500}


def test_short_contigs_of_many_files_and_splits_share_samples(tmp_path):
    contigs = [genome(i, 300) for i in range(40)]
    sources = [Source(write_fasta(tmp_path / f"{i}.fa", contig), f"s{i}") for i, contig in enumerate(contigs)]
    manifest = build(sources, tmp_path / "out", FractionSplits(0.1))
    assert len(manifest.index.samples) == 1
    assert len(manifest.segments) > 80
    verify(manifest.directory, sources)
    assert [(info.assembly, info.species) for info in manifest.contigs] == [(str(i), f"s{i}") for i in range(40)]
    for i, contig in enumerate(contigs):
        assert np.array_equal(manifest.read(f"s{i}.chr1", 0, 300), encode(contig["chr1"]))


def test_contigs_of_256_kb_take_at_most_027_byte_a_base(tmp_path):
    contigs = {f"chr{i}": sequence(np.random.default_rng(i), 256_000) for i in range(3)}
    for name, text in contigs.items():  # soft-masked as a mammal, N at the ends, few other codes
        bases = np.frombuffer(text.upper().replace(b"N", b"A"), np.uint8).copy()
        bases[~np.isin(bases, np.frombuffer(b"ACGT", np.uint8))] = ord("C")
        for start in range(0, bases.size, 600):
            bases[start : start + 300] |= 0x20
        bases[:10_000] = ord("N")
        contigs[name] = bases.tobytes()
    directory = build([Source(write_fasta(tmp_path / "a.fa", contigs))], tmp_path / "out", Splits()).directory
    size = bytes_per_base(directory, 3 * 256_000)
    print(f"{size:.4f} byte a base, limit 0.27")
    assert size <= 0.27


def format_1_contigs():
    lines = (FORMAT_1 / "genome.fa").read_bytes().split(b">")[1:]
    return {f"made.{text.split()[0].decode()}": b"".join(text.split(b"\n")[1:]) for text in lines}


def test_format_1_is_read(caplog):
    contigs, manifest = format_1_contigs(), Manifest.load(FORMAT_1)
    assert "shards of format 1 have no checksums" in caplog.text
    assert manifest.index.version == 1
    for name, text in contigs.items():
        assert np.array_equal(manifest.read(name, 0, len(text)), encode(text))
        assert np.array_equal(manifest.read(name, len(text) // 3, len(text) // 2),
                              encode(text[len(text) // 3 : len(text) // 2]))
    for number, sample in enumerate(manifest.index.samples):
        row = manifest.segments[sample.first]
        text = contigs[manifest.contigs[row.contig].name][row.start : row.end]
        assert manifest.read_sample(number).tobytes() == text
    verify(FORMAT_1, [Source(FORMAT_1 / "genome.fa", "made")])


def test_the_length_of_a_contig_of_format_1_is_checked_by_its_fasta(tmp_path):
    """Where its last bases are in no split, only there. The control: as it was written."""
    directory = tmp_path / "f1"
    shutil.copytree(FORMAT_1, directory)
    source, index = Source(FORMAT_1 / "genome.fa", "made"), directory / "shards.json"
    verify(directory, [source])
    content = json.loads(index.read_text())
    content["contigs"][0][1] += 1
    index.chmod(0o644)
    index.write_text(json.dumps(content))
    verify(directory)
    with pytest.raises(DataError, match="contig .* is not in"):
        verify(directory, [source])


def test_both_formats_give_the_same_windows(tmp_path):
    path = Path(shutil.copy(FORMAT_1 / "genome.fa", tmp_path))
    new = build([Source(path, "made")], tmp_path / "out", FractionSplits(0.1))
    windows = []
    for manifest in (Manifest.load(FORMAT_1), new):
        stream = TrainStream(manifest, seq_len=100, seed=1, rc_augment=True)
        batches = stream.batches(stream.start(), micro_batch_size=50, global_batch_size=50)
        windows.append([next(batches).ids.tolist() for _ in range(3)])
    assert windows[0] == windows[1]
    assert "ACGT" in decode(np.array(windows[0][0][0]))
    assert new.identity != Manifest.load(FORMAT_1).identity


def test_the_json_of_a_sample_says_what_is_in_it(tmp_path):
    """One value for all where the segments agree, else one for each."""
    manifest = shards(tmp_path, {"a": b"ACGT" * 50, "b": b"AC" * 10, "c": b"G" * 30}, segment_bases=200)
    abouts = [json.loads(sample["json"]) for sample in webdataset.WebDataset(
        [str(manifest.directory / shard.url) for shard in manifest.shards], shardshuffle=False)]
    assert abouts == [
        {"assembly": "genome", "contig": "a", "contig_bases": 200, "start": 0, "end": 200, "split": "train",
         "species": "genome"},
        {"assembly": "genome", "contig": ["b", "c"], "contig_bases": [20, 30], "start": 0, "end": [20, 30],
         "split": "train", "species": "genome"}]


def test_the_program_in_the_documentation_reads_shards(tmp_path):
    program, loop = re.findall(r"```python\n(.*?)```", (ROOT / "docs/shards.md").read_text(), re.DOTALL)
    contigs = {"a": b"ACGT" * 50, "b": b"AC" * 10, "c": b"GNNNa" * 6}
    manifest = shards(tmp_path, contigs, FractionSplits(0.1), segment_bases=200)
    (tmp_path / "read.py").write_text(program)
    shard = str(manifest.directory / manifest.shards[0].url)
    lines = subprocess.run([sys.executable, "read.py", shard], cwd=tmp_path, capture_output=True, text=True, check=True,
                           env={**os.environ, "PYTHONPATH": str(ROOT)}).stdout
    rows = [(manifest.contigs[row.contig].name, row.start, row.end, ("train", "val", "test")[row.split])
            for row in manifest.segments]
    (tmp_path / "loop.py").write_text(loop.replace("1024", "8"))
    subprocess.run([sys.executable, "loop.py", shard], cwd=tmp_path, check=True,
                   env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert lines.splitlines() == [f"{contig} {start} {end} {split} {contigs[contig][start:end][:20].decode()}"
                                  for contig, start, end, split in rows]
