"""Made-up and damaged files for every reader: sequence or one line on what is wrong, never another error, a hang, or
memory out of proportion to the file."""

import gzip
import io
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hyena_dist.config.errors import UserError
from hyena_dist.data import segment
from hyena_dist.data.bed import Bed
from hyena_dist.data.build import build
from hyena_dist.data.contigs import ALLOWED, Source
from hyena_dist.data.homology import read_regions
from hyena_dist.data.index import read_index
from hyena_dist.data.plain_webdataset import decode_segment
from hyena_dist.data.regions import Regions
from hyena_dist.data.sources import contigs_of
from hyena_dist.data.splits import BedSplits, Splits
from tests.genomes import bgzip, fasta_text, genome, write_fasta
from tests.sequence_files import genbank, json_lines, two_bit

CONTIGS = genome(5, 90, 1, 700)
PACKED = np.frombuffer(CONTIGS["chr3"], np.uint8)
KNOWN = {name: bases.translate(bytes.maketrans(b"URYSWKMBDHVuryswkmbdhv", b"A" * 22))
         for name, bases in CONTIGS.items()}
VCF = (b"##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\tS1\n"
       + b"".join(b"c\t%d\t.\tA\t%s\t.\t.\t.\tGT:DP\t%s:3\n" % row for row in (
           (1, b"C", b"0|1"), (5, b"AT,G", b"1|2"), (9, b"<DEL>", b"1/1"), (13, b"C", b".|."), (17, b"G", b"1"))))
BED = b"track name=x\nchr1 0 10 train\nchr1\t20\t30\tval\t0\t+\n# x\nchr2 5 7 test\n"
BLAST = (b"chr1\tchr2\t97.5\t300\t2\t0\t501\t800\t1\t300\t1e-50\t550\n"
         b"chr1:4-90\tchr2\t99.0\t9\t0\t0\t1\t9\t30\t22\t0\t9\n")


def _parquet_bytes():
    import pyarrow
    import pyarrow.parquet
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"record": list(CONTIGS), "text": [bases.decode() for bases in
                                                                                 CONTIGS.values()]}), sink)
    return sink.getvalue()


def read_sequence(path):
    """The bases of all contigs, which are IUPAC codes and no more than a file can hold."""
    total = 0
    for contig in contigs_of(Source(path)):
        assert contig.name
        assert contig.name.isprintable()
        assert not contig.bases.tobytes().translate(None, ALLOWED)
        total += contig.bases.size
    assert total <= 1100 * path.stat().st_size  # of deflate
    return total


def read_calls(path):
    reference = write_fasta(path.with_name("reference.fa"), {"c": b"AAAT" * 9})
    return sum(contig.bases.size for contig in contigs_of(Source(reference, "", path, "S1")))


def read_classes(path):
    """Each base has a label, and each label is of some class."""
    contigs = {"chr1": 40, "chr2": 10}
    regions = Regions(path, contigs)
    for contig, bases in contigs.items():
        labels = regions.labels(contig, 3, bases)
        assert labels.size == bases - 3
        assert all(regions.classes[label] for label in labels)
        assert labels.tolist() == [regions.labels(contig, base, base + 1).item() for base in range(3, bases)]


READERS = {
    "FASTA": (read_sequence, [fasta_text(CONTIGS), fasta_text(CONTIGS, line_end=b"\r\n"), bgzip(fasta_text(CONTIGS))]),
    "GenBank": (read_sequence, [genbank(CONTIGS), gzip.compress(genbank(CONTIGS))]),
    "2bit": (read_sequence, [two_bit(KNOWN), two_bit(KNOWN, ">"), two_bit(KNOWN, version=1)]),
    "JSON lines": (read_sequence, [json_lines(CONTIGS), gzip.compress(json_lines(CONTIGS))]),
    "parquet": (read_sequence, [_parquet_bytes()]),
    "VCF": (read_calls, [VCF, bgzip(VCF)]),
    "BED": (Bed, [BED, gzip.compress(BED)]),
    "BED of splits": (BedSplits, [BED]),
    "BED of classes": (read_classes, [BED, b"chr1 0 10 a\nchr1 5 70 b\nchr2 9 10 a\nchrX 1 2 c\n"]),
    "homology": (read_regions, [BLAST, b"chr1 0 9 A\nchr2 4 7 A\n", b"chr1:0-9 chr2:4-7 60\n"]),
}
BYTES = st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([
    b"\n", b"\r", b">", b"\t", b"\0", b"-1", b"9" * 19, b"9" * 5000, b"//\n", b"ORIGIN\n", b"[" * 3000,
    b"\xff\xff\xff\x7f", b"\x1f\x8b", b"NaN", b"1e999", b'"', b"{}", b"null", b"|", b".", b",", b"\xef\xbb\xbf",
    b"\xff\xfe"]))


@st.composite
def damaged(draw, files):
    """One of these files with some bytes replaced, put in, taken out or repeated; or the first bytes of one with
    anything behind them."""
    content = bytearray(draw(st.sampled_from(files)))
    if draw(st.integers(0, 5)) == 0:
        return bytes(content[: draw(st.integers(0, 40))]) + draw(st.binary(max_size=200))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content)))
        end = min(len(content), place + draw(st.one_of(st.integers(0, 8), st.integers(0, len(content)))))
        content[place:end] = draw(st.one_of(BYTES, st.just(b""), st.just(bytes(content[place:end]) * 2)))
    return bytes(content)


def told(read, *arguments):
    """What a user is told; nothing where it is read."""
    try:
        read(*arguments)
    except UserError as error:
        return str(error)
    return ""


def survives(name, content, path):
    """Read a file; only what a user is told may be raised."""
    read, _ = READERS[name]
    path.write_bytes(content)
    tracemalloc.start()
    try:
        said = told(read, path)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert "\n" not in said
    assert not said or str(path.parent) in said
    assert peak < 64_000_000 + 100 * len(content)


def fuzz(name, examples, tmp_path):
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None,
              suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example])
    @given(damaged(READERS[name][1]))
    def run(content):
        survives(name, content, tmp_path / "file")

    run()


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused(name, tmp_path):
    """The control: the files as they are are read."""
    for content in READERS[name][1]:
        (tmp_path / "whole").write_bytes(content)
        READERS[name][0](tmp_path / "whole")
    fuzz(name, 40, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_files_are_read_or_refused(name, tmp_path):
    fuzz(name, 3000, tmp_path)


@given(damaged([segment.encode(PACKED)]), damaged([json.dumps(
    {"contig": "c", "start": 0, "end": 700, "split": "val", "species": "s"}).encode()]))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_a_damaged_segment_is_noticed(content, about):
    """Nothing else than the bases that were packed is ever read, wherever the damage is."""
    def exactly(data):
        assert np.array_equal(segment.decode(data), PACKED)

    told(exactly, content)
    assert not told(exactly, segment.encode(PACKED)), "the control"
    said = told(decode_segment, {"json": about, "seg": segment.encode(PACKED)})
    assert not said or "is no sample of segments" in said


def test_a_damaged_index_is_refused(tmp_path):
    """Or is the index that it was, to the value."""
    build([Source(write_fasta(tmp_path / "a.fa", CONTIGS))], tmp_path / "shards", Splits())
    path = tmp_path / "shards/shards.json"
    whole, index = path.read_bytes(), read_index(path)

    def the_same():
        assert read_index(path) == index

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(damaged([whole]))
    def run(content):
        path.write_bytes(content)
        assert "\n" not in told(the_same)

    run()
