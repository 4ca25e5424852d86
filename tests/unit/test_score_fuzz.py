"""Thousands of made-up rows of VCF, tables, BED and annotations: each is refused in one line or counted, and no allele
is put into a window otherwise than by cutting and joining strings."""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from hyena_dist.cli.score import main
from hyena_dist.config.errors import UserError
from hyena_dist.convert import write_model
from hyena_dist.data.gff import CLASSES, Gff
from hyena_dist.data.reference import Reference, read_reference
from hyena_dist.data.regions import OUTSIDE, Regions
from hyena_dist.data.tokenizer import decode
from hyena_dist.data.variants import OUTCOMES, Judged, Variants, judge
from hyena_dist.tasks.score.output import read_scores
from hyena_dist.tasks.score.windows import batches
from tests.unit.test_score_perplexity import model_of

WINDOW, FIRST, LENGTH = 48, 1001, 400
BASES = "".join(np.random.default_rng(5).choice(list("ACGT"), LENGTH - 1)) + "N"
JUNK = st.one_of(st.sampled_from(["", ".", "*", "<DEL>", "<*>", "A[2:3[", "]2:3]A", "N", "R", "-1", "0", "1e3",
                                  "\uff11", "nan", "A,C", "99999999999999999999", "chr", "#x", '"', "A\x0b", "\x00",
                                  "\xe9"]),
                 st.text(max_size=5).map(lambda text: re.sub(r"[\t\r\n]", "?", text)))
SETTINGS = {"max_examples": 70, "deadline": None, "database": None,
            "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}
SEEN: Counter[str] = Counter()
"""Rows of each kind of file."""


@st.composite
def variant(draw: Any) -> list[str]:
    """chrom, pos, ref and alt of a variant that fits, or with a field of it that does not."""
    at, removed = draw(st.integers(0, LENGTH - 1)), draw(st.sampled_from([1, 1, 1, 2, 5, 30]))
    ref = BASES[at : at + removed]
    alt = draw(st.one_of(st.text("ACGT", min_size=1, max_size=4), st.text("acgtN", min_size=1, max_size=3),
                         st.text("ACGT", max_size=6).map(lambda more: ref[:1] + more),
                         st.sampled_from([ref, ref[:1], "A,C", "AC,*,<DEL>", "."])))
    row = [draw(st.sampled_from(["17", "chr17", "17", "18"])), str(FIRST + at), ref, alt]
    if draw(st.integers(0, 5)) == 0:
        row[draw(st.integers(0, 3))] = draw(JUNK)
    if draw(st.integers(0, 9)) == 0:
        row[2] = row[2].lower()
    return row


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    path = tmp_path_factory.mktemp("fuzz") / "r.fa"
    path.write_text(f">17:{FIRST}-{FIRST + LENGTH - 1}\n{BASES}\n")
    return read_reference(path)


def check_alleles(found: list[Judged], reference: Reference) -> int:
    """Cut and join strings for each row with scores, and compare with the windows of both alleles and strands."""
    sites, texts = [], []
    for judged in found:
        assert judged.outcome in OUTCOMES
        if judged.site is None:
            assert judged.outcome != "scored"
            continue
        ref, alt, at = judged.row.ref.upper(), judged.row.alt.upper(), int(judged.row.pos) - FIRST
        assert set(ref + alt) <= set("ACGT")
        assert BASES[at : at + len(ref)] == ref
        sites.append(judged.site)
        texts.append(BASES[:at] + alt + BASES[at + len(ref) :])
    if not sites:
        return 0
    seen = set()
    for batch in batches(sites, reference.ids, WINDOW, 16):
        for row, number, allele, strand in zip(batch.row, batch.variant, batch.allele, batch.strand, strict=True):
            text = decode(batch.ids[row, : batch.lengths[row]])
            if strand:
                text = text[::-1].translate(str.maketrans("ACGT", "TGCA"))
            start = max(sites[number].at - WINDOW // 2, 0)
            whole = texts[number] if allele else BASES
            assert text == whole[start : start + len(text)]
            assert len(text) == batch.lengths[row] <= WINDOW
            assert len(text) == min(WINDOW - max(WINDOW // 2 - sites[number].at, 0), LENGTH - start,
                                    len(texts[number]) - start)
            seen.add((number, allele, strand))
    assert len(seen) == 4 * len(sites)
    return len(sites)


def check_refusal(error: UserError, path: Path) -> None:
    assert "\n" not in str(error)
    assert str(path) in str(error)


def read(path: Path, reference: Reference, is_vcf: bool) -> list[Judged]:
    """What becomes of a file; nothing where it is refused in one line."""
    try:
        return list(judge(Variants(path, is_vcf=is_vcf), reference, WINDOW))
    except UserError as error:
        check_refusal(error, path)
        return []


@seed(1)
@settings(**SETTINGS)
@given(rows=st.lists(variant(), min_size=1, max_size=20), cut=st.integers(0, 30))
def test_rows_of_a_vcf(reference: Reference, tmp_path: Path, rows: list[list[str]], cut: int) -> None:
    lines = [f"{chrom}\t{pos}\t.\t{ref}\t{alt}\t.\t.\t." for chrom, pos, ref, alt in rows]
    lines[-1] = lines[-1][: max(1, len(lines[-1]) - (cut - 15 if cut > 15 else 0))]
    path = tmp_path / "v.vcf"
    path.write_text("\n".join(["##fileformat=VCFv4.2", "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO", *lines]) + "\n",
                    encoding="utf-8", errors="replace", newline="")
    found = read(path, reference, is_vcf=True)
    records = [line for line in lines if line and not line.startswith("#")]
    if found:
        assert len({judged.row.line for judged in found}) == len(records)
    SEEN["VCF"] += len(records)
    SEEN["scored"] += check_alleles(found, reference)


@seed(2)
@settings(**SETTINGS)
@given(rows=st.lists(variant(), min_size=1, max_size=20), kind=st.sampled_from(["tsv", "csv", "parquet", "xlsx"]))
def test_rows_of_a_table(reference: Reference, tmp_path: Path, rows: list[list[str]], kind: str) -> None:
    path, names = tmp_path / f"t.{kind}", ["label", "chrom", "pos", "ref", "alt"]
    rows = [["1", *row] for row in rows]
    if kind == "parquet":
        import pyarrow as pa
        from pyarrow import parquet
        values = [[value.encode("utf-8", "replace").decode() for value in column] for column in zip(*rows, strict=True)]
        parquet.write_table(pa.table(dict(zip(names, values, strict=True))), path)
    elif kind == "xlsx":
        from openpyxl import Workbook
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
        book = Workbook()
        for row in [names, *rows]:
            book.active.append([ILLEGAL_CHARACTERS_RE.sub("", value.encode("utf-8", "replace").decode()).lstrip("=")
                                for value in row])
        book.save(path)
    else:
        between = "\t" if kind == "tsv" else ","
        rows = [[value.replace(",", ";") if kind == "csv" else value for value in row] for row in rows]
        path.write_text("".join(between.join(row) + "\n" for row in [names, *rows]), encoding="utf-8", errors="replace",
                        newline="")
    found = read(path, reference, is_vcf=False)
    assert not found or len(found) == len(rows) or kind == "csv"  # an open quote may hold several lines
    SEEN["table"] += len(rows)
    SEEN["scored"] += check_alleles(found, reference)


def labels(regions: Regions) -> list[set[str]]:
    """The classes of each base."""
    return [set(regions.classes[label]) - {OUTSIDE} for label in regions.labels("c", 0, LENGTH)]


FIELD = st.one_of(st.integers(0, LENGTH + 20).map(str), st.integers(0, LENGTH + 20).map(str), JUNK)
NAME = st.sampled_from(["exon", "CDS", "repeat", "other"])


@seed(3)
@settings(**SETTINGS)
@given(rows=st.lists(st.tuples(st.sampled_from(["c", "c", "d"]), st.integers(0, LENGTH), st.integers(1, 60), NAME),
                     min_size=1, max_size=20), bad=st.one_of(st.none(), st.none(), st.tuples(FIELD, FIELD)))
def test_rows_of_a_bed(tmp_path: Path, rows: list[tuple[str, int, int, str]], bad: tuple[str, str] | None) -> None:
    lines = [f"{contig}\t{start}\t{start + bases}\t{name}" for contig, start, bases, name in rows]
    lines += [f"c\t{bad[0]}\t{bad[1]}\texon"] if bad else []
    path = tmp_path / "r.bed"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")
    SEEN["BED"] += len(lines)
    try:
        found = labels(Regions(path, {"c": LENGTH}))
    except UserError as error:
        check_refusal(error, path)
        return
    if bad:
        fields = lines[-1].split()
        rows = [*rows, ("c", int(fields[1]), int(fields[2]) - int(fields[1]), fields[3])]
    wanted: list[set[str]] = [set() for _ in range(LENGTH)]
    for contig, start, bases, name in rows:
        for at in range(start, min(start + bases, LENGTH)) if contig == "c" else ():
            wanted[at].add(name)
    assert found == wanted


@seed(4)
@settings(**SETTINGS)
@given(rows=st.lists(st.tuples(st.sampled_from([*CLASSES, "gene", "exon", "exon", "exon"]), st.integers(1, LENGTH),
                               st.integers(0, 60), st.sampled_from(["", "Parent=t", "Parent=t,u", 'transcript_id "v"',
                                                                    "ID=x;Parent=u"])), min_size=1, max_size=20),
       bad=st.one_of(st.none(), st.none(), st.tuples(FIELD, FIELD)))
def test_rows_of_an_annotation(tmp_path: Path, rows: list[tuple[str, int, int, str]],
                               bad: tuple[str, str] | None) -> None:
    lines = [f"c\tx\t{kind}\t{start}\t{start + more}\t.\t+\t.\t{notes}" for kind, start, more, notes in rows]
    lines += [f"c\tx\tCDS\t{bad[0]}\t{bad[1]}\t.\t+\t.\t"] if bad else []
    path = tmp_path / "r.gff3"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")
    SEEN["GFF"] += len(lines)
    try:
        Gff(path)
        found = labels(Regions(path, {"c": LENGTH}))
    except UserError as error:
        check_refusal(error, path)
        return
    if bad:
        rows = [*rows, ("CDS", int(bad[0]), int(bad[1]) - int(bad[0]), "")]
    wanted: list[set[str]] = [set() for _ in range(LENGTH)]
    exons: dict[str, set[int]] = defaultdict(set)
    for kind, start, more, notes in rows:
        places = range(start - 1, start + more)
        if kind in CLASSES:
            for at in places:
                if at < LENGTH:
                    wanted[at].add(CLASSES[kind])
        if kind == "exon":
            for parent in re.findall(r"\b[tuv]\b", notes):
                exons[parent] |= set(places)
    if exons:
        for at, classes in enumerate(wanted):
            classes.discard("intron")
            if "exon" not in classes and any(min(each) < at < max(each) for each in exons.values()):
                classes.add("intron")
    assert found == wanted


def test_the_command_counts_every_allele(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Many rows at once, from file to file: no row is lost, and the header's counts are those of the rows."""
    random, rows = np.random.default_rng(7), []
    for number in range(600):
        at = int(random.integers(0, LENGTH - 40))
        ref = BASES[at : at + int(random.choice([1, 1, 2, 7]))]
        alt = "".join(random.choice(list("ACGTN*"), int(random.integers(1, 4)))) if number % 9 else "<DEL>"
        chrom = ["17", "chr17", "x"][number % 20 // 18 + (number % 50 == 49)]
        alt += f",{ref[0]}" if number % 11 == 0 else ""
        rows.append(f"{chrom}\t{FIRST + at}\t.\t{ref.lower() if number % 7 == 0 else ref}\t{alt}\t.\t.\t.")
    (tmp_path / "v.vcf").write_text("##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
                                    + "".join(row + "\n" for row in rows))
    (tmp_path / "r.fa").write_text(f">17:{FIRST}-{FIRST + LENGTH - 1}\n{BASES}\n")
    trained = model_of()
    write_model(tmp_path / "model", "safetensors", trained.section, trained.model)
    assert main(["variants", "--from", str(tmp_path / "model"), "--vcf", str(tmp_path / "v.vcf"), "--fasta",
                 str(tmp_path / "r.fa"), "--window", str(WINDOW), "--out", str(tmp_path / "o.tsv")]) == 0
    assert "of 655 alleles scored" in capsys.readouterr().out
    table = read_scores(tmp_path / "o.tsv")
    found = Counter(row[table.names.index("outcome")] for row in table.rows)
    assert dict(found) == json.loads(table.facts["counts"])
    assert sum(found.values()) == sum(len(row.split("\t")[4].split(",")) for row in rows)
    assert found["scored"] > 100
    score = table.names.index("llr_mean")
    assert all(np.isfinite(float(row[score])) for row in table.rows if row[table.names.index("outcome")] == "scored")
    SEEN["VCF"] += len(rows)


def test_so_many_rows_were_seen() -> None:
    """Last: the others were not empty."""
    if {"VCF", "table", "BED", "GFF"} <= SEEN.keys():  # else a part of this file runs alone
        assert sum(SEEN[kind] for kind in ("VCF", "table", "BED", "GFF")) >= 2000
        assert min(SEEN[kind] for kind in ("VCF", "table", "BED", "GFF")) >= 300
        assert SEEN["scored"] >= 200
    print(dict(SEEN))
