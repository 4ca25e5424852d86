"""The two haplotypes of a person, of a reference and a VCF."""

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest

from hyena_dist.cli.build import main as build_command
from hyena_dist.cli.verify import main as verify_command
from hyena_dist.data.contigs import Source
from hyena_dist.data.errors import DataError
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.sources import contigs_of
from tests.genomes import bgzip, write_fasta

BRCA1 = Path(__file__).parents[1] / "brca1"
OF_BCFTOOLS = {
    "HG00096": ("39db11956ed08f9e10ce785631a8a5117e5ad1f1af51884a233519038b7bddb7",
                "ded104523dbc4f2e34d7f127b901b0b0a5af754065dd0b16eb52078cc10d5467"),
    "HG00099": ("39db11956ed08f9e10ce785631a8a5117e5ad1f1af51884a233519038b7bddb7",
                "b73cbc36a8e9954bee14e2b5e2a0836c5d777f428b2d5f8c7fefa83ce4f637bf"),
    "HG00101": ("56492dee87e93360eaa7ba498b4a0b42fcc09e8d14643eb8487b2a555b93a5d3",
                "2741fa6790f3fa15fa03c60d59af3ccf8d572ee577df7a3a30bed7d1e382e95c"),
}
HEADER = "##fileformat=VCFv4.2\n##contig=<ID=c>\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\tS1\tS2\n"


def vcf(path, *rows):
    """Rows of POS, REF, ALT, genotype of S1, and for some of S2."""
    text = HEADER
    for place, reference, other, genotype, *rest in rows:
        second = rest[0] if rest else "0|0"
        text += f"c\t{place}\t.\t{reference}\t{other}\t.\t.\t.\tGT:DP\t{genotype}:9\t{second}:9\n"
    path.write_bytes(bgzip(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read(reference, calls, sample="S1", label=""):
    return list(contigs_of(Source(reference, label, calls, sample)))


@pytest.mark.parametrize("sample", OF_BCFTOOLS)
def test_the_haplotypes_of_a_real_gene_are_those_of_bcftools(sample):
    found = read(BRCA1 / "reference.fa.gz", BRCA1 / "calls.vcf.gz", sample, "human")
    assert [contig.name for contig in found] == [f"human.{sample}.{number}.ref_brca1" for number in (1, 2)]
    assert tuple(hashlib.sha256(contig.bases.tobytes()).hexdigest() for contig in found) == OF_BCFTOOLS[sample]


def plainly(reference, changes):
    """A reference with first base, old and new bases of each change put in, from the last on."""
    text = reference
    for start, old, new in sorted(changes, reverse=True):
        assert text[start : start + len(old)].upper() == old
        first = text[max(start - (not old), 0) : max(start - (not old), 0) + 1]
        text = text[:start] + (new.lower() if first.islower() else new) + text[start + len(old) :]
    return text


def test_random_calls_are_put_in_where_they_belong(tmp_path):
    """SNVs, insertions, deletions and changes of several bases, against plain slicing; and every place of the reference
    is found again in the haplotype."""
    rng = np.random.default_rng(0)
    for case in range(30):
        text = "".join(rng.choice(list("ACGTacgt"), 400))
        rows, changes, place = [], ([], []), 1
        while place < 380:
            old = text[place : place + int(rng.integers(1, 5))].upper()
            new = old[0] + "".join(rng.choice(list("ACGT"), int(rng.integers(0, 5)))) if rng.random() < 0.7 else \
                "".join(rng.choice(list("ACGT"), len(old)))
            numbers = rng.integers(0, 2, 2).tolist()
            rows.append((place + 1, old, new, "|".join(map(str, numbers))))
            for number, own in zip(numbers, changes, strict=True):
                if number:
                    own.append((place, old, new))
            place += len(old) + int(rng.integers(1, 12))
        fasta = write_fasta(tmp_path / "a.fa", {"c": text.encode()})
        found = read(fasta, vcf(tmp_path / f"{case}.vcf.gz", *rows))
        for contig, own in zip(found, changes, strict=True):
            assert contig.bases.tobytes().decode().upper() == plainly(text, own).upper(), case
            touched = {base for start, old, _ in own for base in range(start, start + len(old))}
            places = [contig.origin.place(at) for at in range(len(text) + 1)]
            assert places == sorted(places)
            assert places[0] == 0
            assert places[-1] == contig.bases.size
            for base in set(range(len(text))) - touched:
                if base + 1 not in touched and base - 1 not in touched:
                    assert contig.bases[places[base + 1] - 1] == ord(text[base])


def test_new_bases_take_the_case_of_what_they_replace_or_follow(tmp_path):
    fasta = write_fasta(tmp_path / "a.fa", {"c": b"ACGTacgtACGT"})
    calls = vcf(tmp_path / "a.vcf", (2, "C", "T", "1|0"), (6, "C", "G", "1|0"), (8, "T", "TGG", "1|0"),
                (9, "ACG", "A", "0|1"))
    assert [contig.bases.tobytes() for contig in read(fasta, calls)] == [b"ATGTaggtggACGT", b"ACGTacgtAT"]


@pytest.mark.parametrize(("row", "why"), [
    ((3, "G", "A", "0/1"), "1 unphased"), ((3, "G", "A", ".|."), "1 missing"), ((3, "G", "A", "1|."), "1 missing"),
    ((3, "G", "<DEL>", "1|1"), "1 symbolic"), ((3, "G", "*", "0|1"), "1 symbolic"),
    ((12, "TA", "T", "1|1"), "2 outside"), ((30, "G", "A", "1|1"), "2 outside"),
    ((5, "N", "A", "1|1"), "none"), ((5, "A", "C", "1|1"), "1 of a reference that is not known"),
])
def test_what_cannot_be_put_in_is_left_as_the_reference_and_counted(tmp_path, row, why):
    fasta = write_fasta(tmp_path / "a.fa", {"c": b"ACGTNCGTACGT"})
    found = read(fasta, vcf(tmp_path / "a.vcf", row, (1, "A", "C", "1|1")))
    expected = b"CCGTACGTACGT" if why == "none" else b"CCGTNCGTACGT"
    assert [contig.bases.tobytes() for contig in found] == [expected] * 2
    [note] = found[0].origin.genotypes.notes()
    assert f"left as the reference: {why}" in note
    assert why == "none" or "the first in line 4" in note


def test_overlapping_changes_of_a_haplotype_keep_the_first(tmp_path):
    """Those of the two haplotypes do not overlap each other."""
    fasta = write_fasta(tmp_path / "a.fa", {"c": b"ACGTACGTACGT"})
    calls = vcf(tmp_path / "a.vcf", (2, "CGT", "C", "1|0"), (3, "G", "T", "1|1"), (8, "T", "TA", "1|0"),
                (8, "T", "TC", "1|0"))
    found = read(fasta, calls)
    assert [contig.bases.tobytes() for contig in found] == [b"ACACGTAACGT", b"ACTTACGTACGT"]
    assert "2 overlapping (the first in line 5)" in found[0].origin.genotypes.notes()[0]


def test_both_alleles_of_one_place_of_one_person_and_one_haplotype_alone(tmp_path):
    fasta = write_fasta(tmp_path / "a.fa", {"c": b"ACGTACGTACGT"})
    calls = vcf(tmp_path / "a.vcf", (3, "G", "A,T", "1|2", "2"), (5, "A", "C", "1/1", "0|0"))
    assert [contig.bases.tobytes() for contig in read(fasta, calls)] == [b"ACATCCGTACGT", b"ACTTCCGTACGT"]
    assert [contig.bases.tobytes() for contig in read(fasta, calls, "S2")] == [b"ACTTACGTACGT"] * 2


BAD = {
    "no VCF": (b"chr1\t1\n", "is no VCF, which begins with ##fileformat=VCF"),
    "BCF": (gzip.compress(b"BCF\x02\x02" + bytes(40)), "BCF"),
    "empty": (b"", "the file is empty; give a VCF"),
    "no header": (b"##fileformat=VCFv4.2\nc\t1\n", "line 2: comes before the line #CHROM"),
    "only a header": (b"##fileformat=VCFv4.2\n", "has no line #CHROM"),
    "another sample": (HEADER.replace("S1", "S9").encode(), "has no sample 'S1'; it has S9, S2"),
    "a sample twice": (HEADER.replace("S2", "S1").encode(), "has more than one sample 'S1'"),
    "cut short": (HEADER.encode() + b"c\t1\t.\tA\tC\n", "line 4: has 5 columns"),
    "place 0": (HEADER.encode() + b"c\t0\t.\tA\tC\t.\t.\t.\tGT\t1|1\t0|0\n", "line 4: has POS b'0'"),
    "three haplotypes": (HEADER.encode() + b"c\t1\t.\tA\tC\t.\t.\t.\tGT\t1|1|1\t0|0\n", "line 4: has the genotype"),
    "an allele that is not there": (HEADER.encode() + b"c\t1\t.\tA\tC\t.\t.\t.\tGT\t2|1\t0|0\n", "of 2 alleles"),
    "another assembly": (HEADER.encode() + b"c\t1\t.\tG\tC\t.\t.\t.\tGT\t1|1\t0|0\n",
                         "line 4: REF is G at c:1, the reference has A; give the reference that"),
    "another name": (HEADER.encode() + b"chrc\t1\t.\tA\tC\t.\t.\t.\tGT\t1|1\t0|0\n", "line 4: contig 'chrc' is not in"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD.keys())
def test_bad_calls_end_in_one_line(tmp_path, capsys, content, message):
    fasta, calls = write_fasta(tmp_path / "a.fa", {"c": b"ACGT"}), tmp_path / "a.vcf"
    calls.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(fasta, calls)
    assert build_command([f"{fasta}::{calls}::S1", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {calls}: ")
    assert error.count("\n") == 1


def test_splits_are_of_the_reference_and_carried_over(tmp_path, capsys):
    """The same stretch is held out of both haplotypes of two people, longer or shorter by what they have there; and the
    shards are verified against reference and calls."""
    text = np.random.default_rng(5).choice(np.frombuffer(b"ACGT", np.uint8), 3000).tobytes()
    fasta = write_fasta(tmp_path / "a.fa", {"c": text})
    one = text[499:500].decode()
    calls = vcf(tmp_path / "a.vcf.gz", (500, one, one + "GGGG", "0|1", "1|1"),
                (1000, text[999:1200].decode(), text[999:1000].decode(), "1|0", "0|0"),
                (1495, text[1494:1504].decode(), text[1494:1495].decode(), "0|0", "1|1"))
    bed = tmp_path / "a.bed"
    bed.write_text("human.c 0 900 train\nhuman.c 900 1500 val\nhuman.c 1500 3000 train\n")
    files = [f"human={fasta}::{calls}::{sample}" for sample in ("S1", "S2")]
    assert build_command([*files, "--bed", str(bed), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert f"note: {calls}: sample S1: 2 variants; left as the reference: none" in printed
    manifest = Manifest.load(tmp_path / "out")
    assert [(info.name, info.bases, info.assembly, info.species) for info in manifest.contigs] == [
        ("human.S1.1.c", 2800, "a.S1.1", "human"), ("human.S1.2.c", 3004, "a.S1.2", "human"),
        ("human.S2.1.c", 2995, "a.S2.1", "human"), ("human.S2.2.c", 2995, "a.S2.2", "human")]
    assert [tuple(row[:3]) for row in manifest.intervals("val")] == [
        ("human.S1.1.c", 900, 1300), ("human.S1.2.c", 904, 1504), ("human.S2.1.c", 904, 1499),
        ("human.S2.2.c", 904, 1499)]
    assert verify_command([str(tmp_path / "out"), "--fasta", *files]) == 0
    assert verify_command([str(tmp_path / "out"), "--fasta", files[0], files[0].replace("S1", "S2"), files[1]]) == 2
    bed.write_text("human.S1.1.c 0 900 train\n")
    capsys.readouterr()
    assert build_command([files[0], "--bed", str(bed), "--out", str(tmp_path / "no")]) == 2
    assert "contig 'human.S1.1.c' is in none of the files" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["a.fa::b.vcf", "a.fa::b.vcf::", "::b.vcf::S1", "a.fa::b::c::d"])
def test_an_argument_of_other_parts_is_refused(argument, capsys, tmp_path):
    assert build_command([argument, "--out", str(tmp_path / "out")]) == 2
    assert "write FASTA::VCF::SAMPLE" in capsys.readouterr().err


def test_a_file_whose_name_has_colons_is_itself(tmp_path):
    path = write_fasta(tmp_path / "a::b::c.fa", {"c": b"ACGT"})
    assert Source.parse(str(path)) == Source(path)
    assert Source.parse("human=x.fa::y.vcf::S1") == Source(Path("x.fa"), "human", Path("y.vcf"), "S1")
