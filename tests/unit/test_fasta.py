import bz2
import gzip
import io
import lzma
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from hyena_dist.data import blocks, fasta
from hyena_dist.data.build import build
from hyena_dist.data.contigs import Source
from hyena_dist.data.errors import DataError
from hyena_dist.data.sources import read_contigs
from hyena_dist.data.splits import Splits
from hyena_dist.data.verify import records, verify
from tests.genomes import bgzip, fasta_text, genome

GOOD = b">a\nACGTACGT\nACGT\n"


def tar_of(content):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        info = tarfile.TarInfo("a.fa")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def read(*paths, label=""):
    return {contig.name: contig.bases.tobytes() for contig in read_contigs([Source(path, label) for path in paths])}


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bgzip], ids=["plain", "gzip", "bgzip"])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("block", [1, 7, 61, 1 << 20])
def test_every_byte_comes_back(tmp_path, monkeypatch, pack, line_end, block):
    contigs = genome(block, 1, 59, 60, 61, 3000)
    path = tmp_path / "name_says_nothing"
    path.write_bytes(pack(fasta_text(contigs, line_end=line_end)))
    monkeypatch.setattr(blocks, "_BLOCK", block)
    assert read(path) == contigs


MIXED = {
    "a CR file with LF behind": (b">mito d\rACGTACGTACGT\rGGGG\r>chr2\nTTTTTTTT\n",
                                 {"mito": b"ACGTACGTACGTGGGG", "chr2": b"TTTTTTTT"}),
    "a header edited on a Mac": (b">a\nAC\n>b words\rGGGG\nTT\n", {"a": b"AC", "b": b"GGGGTT"}),
    "each line its own": (b">a\r\nAC\rGT\nNN\r\n>b x\rTT\r\r\nA\r>c\n\rGG", {"a": b"ACGTNN", "b": b"TTA", "c": b"GG"}),
    "CR at the very end": (b">a\nACGT\r", {"a": b"ACGT"}),
    "LF CR": (b">a\n\rAC\n\rGT\n\r", {"a": b"ACGT"}),
}


@pytest.mark.parametrize(("text", "contigs"), MIXED.values(), ids=MIXED.keys())
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("block", [1, 2, 3, 1 << 20])
def test_mixed_line_ends(tmp_path, monkeypatch, text, contigs, pack, block):
    path = tmp_path / "mixed.fa"
    path.write_bytes(pack(text))
    monkeypatch.setattr(blocks, "_BLOCK", block)
    assert read(path) == contigs
    again = {name: bases.tobytes() for name, bases in records(Source(path))}
    assert again == contigs, "the other reader, of verification"


def test_verification_reads_with_another_reader(tmp_path, monkeypatch):
    """Where the reader of builds loses a line, shards and FASTA differ. The control: read by itself it agrees."""
    path = tmp_path / "a.fa"
    path.write_bytes(b">a words\rGGGG\nACGT\n>b\nAC\n")
    monkeypatch.setattr(fasta, "with_line_feeds", lambda blocks: (block.replace(b"\r", b"") for block in blocks))
    manifest = build([Source(path)], tmp_path / "out", Splits())
    assert read(path) == {"a": b"ACGT", "b": b"AC"}
    assert [info.bases for info in manifest.contigs] == [4, 2]
    with pytest.raises(DataError, match="contig 'a' of 8 bases is not in"):
        verify(manifest.directory, [Source(path)])


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.fa")
    with pytest.raises(DataError, match="a.fa: cannot be read .*but a pipe.; a pipe can be read only once, .* a file"):
        read(tmp_path / "a.fa")


def test_a_process_substitution_and_a_directory_are_named(tmp_path):
    """What `<(zcat genome.fa.gz)` gives a command: the end of a pipe."""
    reading, writing = os.pipe()
    os.write(writing, GOOD)
    os.close(writing)
    with pytest.raises(DataError, match=f"^/dev/fd/{reading}: cannot be read .*but a pipe.; .*`COMMAND > genome.fa`"):
        read(Path(f"/dev/fd/{reading}"))
    os.close(reading)
    with pytest.raises(DataError, match="but a directory.; give the FASTA files in it"):
        read(tmp_path)


@pytest.mark.parametrize("parts", [
    (bgzip, gzip.compress), (bgzip, bgzip), (gzip.compress, bgzip), (bgzip, gzip.compress, bgzip), (gzip.compress,) * 3,
], ids=lambda parts: "+".join(part.__name__ for part in parts))
@pytest.mark.parametrize("padding", [0, 1, 512, 1 << 17])
def test_files_that_were_joined_and_padded_with_zeros_are_read(tmp_path, parts, padding):
    """As `cat a.fa.gz b.fa.gz` joins them, and tapes and some downloads pad them; by the other reader, too."""
    contigs = genome(3, 9000, 20, 7000)
    path = tmp_path / "joined.fa.gz"
    texts = [fasta_text({name: bases}) for name, bases in contigs.items()][: len(parts)]
    path.write_bytes(b"".join(part(text) for part, text in zip(parts, texts, strict=True)) + bytes(padding))
    expected = dict(list(contigs.items())[: len(parts)])
    assert read(path) == expected
    assert {name: bases.tobytes() for name, bases in records(Source(path))} == expected


@pytest.mark.parametrize("behind", [b"", bytes(100), gzip.compress(b">z\nACGT\n", mtime=0),
                                    b"junk of a failed download"])
def test_a_bgzip_file_that_lost_its_end_is_refused_whatever_follows(tmp_path, behind):
    path = tmp_path / "cut.fa.gz"
    path.write_bytes(bgzip(TEXT)[:-28] + behind)
    with pytest.raises(DataError, match="the bgzip file is cut short .no end marker"):
        read(path)
    path.write_bytes(bgzip(TEXT) + b"junk")
    with pytest.raises(DataError, match="the gzip file is damaged"):
        read(path)


UTF16 = GOOD.decode()
KINDS = {
    "UTF-16": (UTF16.encode("utf-16"), "is text in UTF-16: convert it with `iconv -f UTF-16 -t UTF-8"),
    "UTF-16 BE": (b"\xfe\xff" + UTF16.encode("utf-16-be"), "is text in UTF-16: "),
    "UTF-16 without a mark": (UTF16.encode("utf-16-le"), "without a mark: convert it with `iconv -f UTF-16LE"),
    "UTF-16 BE without a mark": (UTF16.encode("utf-16-be"), "without a mark: convert it with `iconv -f UTF-16BE"),
    "UTF-32": (UTF16.encode("utf-32"), "is text in UTF-32: "),
    "BOM": (b"\xef\xbb\xbf" + GOOD, "byte order mark .BOM.: convert it with `tail -c .4"),
    "zip": (b"PK\x03\x04" + bytes(100), "is a zip archive: convert it with `unzip -p"),
    "xz": (lzma.compress(GOOD), "is compressed by xz: convert it with `xz -dc"),
    "lzma": (lzma.compress(GOOD, format=lzma.FORMAT_ALONE), "is compressed by lzma: "),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(50), "is compressed by zstd: convert it with `zstd -dc"),
    "bzip2": (bz2.compress(GOOD), "is compressed by bzip2: convert it with `bzip2 -dc"),
    "CRAM": (b"CRAM\x03\x00" + bytes(50), "is CRAM: convert it with `samtools fasta"),
    "BAM": (bgzip(b"BAM\x01" + bytes(50)), "is BAM, inside gzip: convert it with `samtools fasta"),
    "tar": (tar_of(GOOD), "is a tar archive: convert it with `tar -xOf"),
    "tar in gzip": (gzip.compress(tar_of(GOOD)), "is a tar archive, inside gzip: convert it with `tar -xOf"),
    "BOM in gzip": (gzip.compress(b"\xef\xbb\xbf" + GOOD), "inside gzip: .* `gzip -dc .* | tail -c .4 > "),
    "gzip in gzip": (gzip.compress(gzip.compress(GOOD)), "compressed by gzip twice, inside gzip: "),
    "zip in gzip": (gzip.compress(b"PK\x03\x04" + bytes(9)), "`gzip -dc .* > unpacked && unzip -p unpacked > "),
    "FASTQ": (b"@r\nACGT\n+\nIIII\n", "is FASTQ: convert it with `seqtk seq -A"),
    "EMBL": (b"ID   X56734; SV 1; linear; mRNA; STD; PLN; 1859 BP.\n", "is EMBL: "),
    "a failed download": (b"<!DOCTYPE html>\n", "is a web page and not the file itself: download"),
    "a failed download, inside gzip": (gzip.compress(b"\n<html>\n"), "is a web page .* inside gzip: download"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer .*`git lfs pull`"),
}


@pytest.mark.parametrize(("content", "message"), KINDS.values(), ids=KINDS.keys())
def test_a_file_of_another_kind_is_named_with_the_command_that_converts_it(tmp_path, content, message):
    """By builds and by verification."""
    path = tmp_path / "genome.fa"
    path.write_bytes(GOOD)
    manifest = build([Source(path)], tmp_path / "out", Splits())
    verify(manifest.directory, [Source(path)])  # the control
    path.write_bytes(content)
    for attempt in (lambda: read(path), lambda: verify(manifest.directory, [Source(path)])):
        with pytest.raises(DataError, match=message) as caught:
            attempt()
        assert str(caught.value).startswith(f"{path}: is ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["UTF-16", "UTF-16 without a mark", "BOM", "xz", "bzip2", "BOM in gzip", "tar"])
def test_the_command_converts_it(tmp_path, monkeypatch, kind):
    """Those whose programs are everywhere, run as they are printed."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "the genome.fa"
    path.write_bytes(KINDS[kind][0])
    with pytest.raises(DataError) as caught:
        read(path)
    subprocess.run(str(caught.value).split("`")[1], shell=True, check=True)
    assert read(tmp_path / "converted.fa") == {"a": b"ACGTACGTACGT"}


def test_titles_joined_by_ctrl_a_are_a_header(tmp_path):
    """As NCBI joins those of one sequence. The bases are those of the other reader too."""
    path = tmp_path / "nt.fa"
    path.write_bytes(b">chr1 foo\x01gi|2 bar\x01gi|3\nACGT\n>chr2\t\x01x\xff\nGG\n")
    assert read(path) == {"chr1": b"ACGT", "chr2": b"GG"}
    manifest = build([Source(path)], tmp_path / "out", Splits())
    verify(manifest.directory, [Source(path)])


def test_one_long_line_and_blank_lines_and_no_last_line_end(tmp_path):
    path = tmp_path / "a.fa"
    path.write_bytes(b"\n>a\n" + b"ACGT" * 5000 + b"\n\n>b\n\nAC\n\nGT")
    assert read(path) == {"a": b"ACGT" * 5000, "b": b"ACGT"}


def test_label_goes_before_the_name(tmp_path):
    path = tmp_path / "a=b.fa"
    path.write_bytes(b">chr1\nACGT\n")
    assert list(read(path, label="mouse")) == ["mouse.chr1"]
    assert Source.parse(str(path)) == Source(path)
    assert Source.parse("mouse=mm10.fa").label == "mouse"


def test_progress_adds_up_to_the_file_size(tmp_path):
    path = tmp_path / "a.fa.gz"
    path.write_bytes(gzip.compress(fasta_text(genome(0, 5000))))
    counts = []
    list(read_contigs([Source(path)], counts.append))
    assert sum(counts) == path.stat().st_size


TEXT = fasta_text(genome(1, 20000))
BAD = {
    "empty": (b"", "is empty"),
    "empty gzip": (gzip.compress(b""), "holds no sequence"),
    "only blank lines": (b"\n\n", "holds no sequence"),
    "no header": (b"ACGT\n", "line 1: does not start with a '>' header"),
    "binary": (bytes(range(256)) * 10, "byte 0x00 before the first '>' header"),
    "binary after a header": (GOOD + bytes(100), r"line 4: byte b'\\x00' at base 13 of 'a'"),
    "gap": (b">a\nAC\nA-T\n", "line 3: byte b'-' at base 4 of 'a' is not an IUPAC code"),
    "stop": (b">a\nAC*\n", r"byte b'\*'"),
    "protein": (b">a\nMKLVE\n", "byte b'L'"),
    "blank inside": (b">a\nAC GT\n", "byte b' '"),
    "header without a name": (b">\nACGT\n", "line 1: a header without a name"),
    "empty record": (b">a\n>b\nACGT\n", "record 'a' has no sequence"),
    "ends after a header": (b">a\nACGT\n>b\n", "record 'b' has no sequence"),
    "ends inside a header": (b">a\nACGT\n>b", "ends inside a header"),
    "control character in a header": (b">b\nAC\n>a d\x0bACGT\nAC\n", "line 3: byte 0x0b at place 4 of the header"),
    "delete in a header": (b">a d\x7f\nAC\n", "line 1: byte 0x7f at place 4 of the header 'a' is a control character"),
    "zeros in a header": (b">a\x01\0\nAC\n", r"line 1: byte 0x01 at place 2 of the header 'a.x01.x00' is a control"),
    "zero behind a Ctrl-A": (b">a b\x01\0\nAC\n", "line 1: byte 0x00 at place 5 of the header 'a' is a control"),
    "form feed behind the name": (b">a\x0cb\nAC\n", "line 1: byte 0x0c at place 2 of the header 'a' is a control"),
    "Ctrl-A in a name": (b">gi|1\x01gi|2 foo\nAC\n", "line 1: byte 0x01 at place 5 of the header 'gi|1"),
    "name of no UTF-8": (b">a\xff\nAC\n", "line 1: byte 0xff at place 2 of the name .* is not of UTF-8 text"),
    "name that cannot be seen": (">a\u2028b\nAC\n".encode(), r"line 1: '.u2028' in the name .* is not a character"),
    "bad byte behind CR lines": (b">a\rACGT\rAC\r\nG!\n", r"line 4: byte b'!' at base 8 of 'a'"),
    "gzip cut short": (gzip.compress(TEXT)[:-2000], "gzip file is cut short"),
    "bgzip cut at a member": (bgzip(TEXT)[:-28], "bgzip file is cut short"),
    "gzip damaged": (gzip.compress(TEXT)[:500] + bytes(9000), "gzip file is (damaged|cut short)"),
    "twice": (GOOD + GOOD, "contig 'a' comes twice"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD.keys())
def test_bad_files_are_refused_in_one_line_that_names_them(tmp_path, content, message):
    path = tmp_path / "bad.fa"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_duplicates_across_files_name_both(tmp_path):
    first, second = tmp_path / "1.fa", tmp_path / "2.fa"
    first.write_bytes(GOOD)
    second.write_bytes(GOOD)
    with pytest.raises(DataError, match=f"{second}: contig 'a' comes in {first} too"):
        read(first, second)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "none.fa")
