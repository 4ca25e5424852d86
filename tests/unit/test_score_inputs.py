"""Files of variants as people have them: variants in several rows, tables of any program, annotated and damaged."""

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pysam
import pytest
from pyarrow import parquet

from hyena_dist.cli.score import main
from hyena_dist.convert import write_model
from hyena_dist.data import variant_tables
from hyena_dist.data.errors import DataError
from hyena_dist.data.reference import read_reference
from hyena_dist.data.seen import Seen
from hyena_dist.data.tokenizer import decode
from hyena_dist.data.variants import Judged, Row, Variants, judge
from hyena_dist.tasks.score import variants as task
from hyena_dist.tasks.score.observe import SCORES
from hyena_dist.tasks.score.output import OWN, Table, read_scores
from hyena_dist.tasks.score.report import labels_of, worths
from tests.unit.test_score_perplexity import model_of

WINDOW, LENGTH = 32, 3000
BASES = "".join(np.random.default_rng(5).choice(list("ACGT"), LENGTH))
HEAD = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"


def other(base: str, by: int = 1) -> str:
    return "ACGT"[("ACGT".index(base) + by) % 4]


def snv(pos: int, by: int = 1) -> list[str]:
    """chrom, pos, ref and alt."""
    return ["1", str(pos), BASES[pos - 1], other(BASES[pos - 1], by)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a reference."""
    directory, trained = tmp_path_factory.mktemp("inputs"), model_of()
    write_model(directory / "model", "safetensors", trained.section, trained.model)
    (directory / "r.fa").write_text(f">1\n{BASES}\n")
    return directory


def score(inputs: Path, option: str, file: Path, out: Path, window: int = WINDOW) -> int:
    return main(["variants", "--from", f"{inputs}/model", f"--{option}", f"{file}", "--fasta", f"{inputs}/r.fa",
                 "--window", f"{window}", "--out", f"{out}"])


def judged_of(inputs: Path, file: Path, *, is_vcf: bool = False) -> list[Judged]:
    return list(judge(Variants(file, is_vcf=is_vcf), read_reference(inputs / "r.fa"), WINDOW))


def column(table: Table, name: str) -> list[str]:
    return [row[table.names.index(name)] for row in table.rows]


def test_rows_of_one_variant_have_its_scores_in_any_order(inputs: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """A table has each variant for each of some tissues, with another label; its rows are in two orders."""
    monkeypatch.setattr(task, "CHUNK", 8)
    monkeypatch.setattr(task, "_HELD", 2)  # parts are read again
    rows = [[*snv(pos), tissue, str((pos // 50 + number) % 2)]
            for number, tissue in enumerate(("blood", "liver", "skin")) for pos in range(100, 1300, 50)]
    found = []
    for name, order in (("sorted", range(len(rows))), ("mixed", np.random.default_rng(3).permutation(len(rows)))):
        file = tmp_path / f"{name}.tsv"
        file.write_text("chrom\tpos\tref\talt\ttissue\tlabel\n" + "".join("\t".join(rows[at]) + "\n" for at in order))
        assert score(inputs, "table", file, tmp_path / f"{name}.out.tsv") == 0
        table = read_scores(tmp_path / f"{name}.out.tsv")
        first: dict[str, list[str]] = {}
        begin = table.names.index("ll_ref")
        for row, outcome in zip(table.rows, column(table, "outcome"), strict=True):
            values = row[begin : begin + len(SCORES) + 3]
            assert outcome == ("duplicate" if row[1] in first else "scored")
            assert values == first.setdefault(row[1], values)
            assert all(values)
        assert len({tuple(values) for values in first.values()}) == len(first), "the control: variants differ"
        assert json.loads(table.facts["counts"]) == {"scored": 24, "duplicate": 48}
        found.append(worths(table, labels_of(table, "label", "tissue"), []))
    for one, other_order in zip(*found, strict=True):
        assert (one.variants, one.positive) == (other_order.variants, other_order.positive)
        assert one.auroc == pytest.approx(other_order.auroc, abs=1e-12)
    assert {each.group: each.variants for each in found[0]} == {"all": 72, "blood": 24, "liver": 24, "skin": 24}


def test_a_variant_is_known_after_any_number_of_others() -> None:
    places = np.random.default_rng(6).permutation(15_000).tolist()
    with Seen() as seen:
        assert [seen.number(at, 1, b"\x07") for at in places] == [(number, True) for number in range(len(places))]
        again = [seen.number(at, 1, b"\x07") for at in reversed(places)]
        assert again == [(number, False) for number in reversed(range(len(places)))]
        assert seen.number(0, 1, b"\x08") == (len(places), True), "the control: another allele"


def test_a_full_disk_of_temporary_files_is_said_in_one_line() -> None:
    with Seen() as seen:
        seen._table.execute("PRAGMA max_page_count = 8")
        with pytest.raises(DataError, match="do not fit into a temporary file .*TMPDIR"):
            [seen.number(number, 1, b"\x07" * 20) for number in range(10_000)]


def records(path: Path) -> list[pysam.VariantRecord]:
    with pysam.VariantFile(str(path)) as file:
        return list(file)


def test_a_vcf_that_was_scored_before_has_the_new_scores(inputs: Path, tmp_path: Path) -> None:
    """And what others wrote stays: other keys of INFO, though they begin alike, and lines of the header."""
    pos = [200, 300, 400]
    head = HEAD.replace("#CHROM", '##contig=<ID=1>\n##INFO=<ID=HD_X,Number=1,Type=Integer,Description="another\'s">\n'
                        "##hyena=kept\n#CHROM")
    rows = [[*snv(at)[:2], ".", *snv(at)[2:], ".", ".", info] for at, info in zip(pos, (".", "HD_X=7", "HD_X=8"),
                                                                                 strict=True)]
    (tmp_path / "v.vcf").write_text(head + "".join("\t".join(row) + "\n" for row in rows))
    assert score(inputs, "vcf", tmp_path / "v.vcf", tmp_path / "first.vcf") == 0
    assert score(inputs, "vcf", tmp_path / "first.vcf", tmp_path / "second.vcf", window=64) == 0
    assert score(inputs, "vcf", tmp_path / "v.vcf", tmp_path / "wanted.vcf", window=64) == 0
    lines = [[line for line in (tmp_path / f"{name}.vcf").read_text().splitlines()
              if not line.startswith("##hyena_dist.variants")] for name in ("first", "second", "wanted")]
    assert lines[1] == lines[2]
    assert lines[0] != lines[1], "the control: another window"
    assert "##hyena=kept" in lines[1]
    first, second = (records(tmp_path / f"{name}.vcf") for name in ("first", "second"))
    assert [record.info.get("HD_X") for record in second] == [None, 7, 8]
    for old, new in zip(first, second, strict=True):
        assert (old.info["HD_window"], new.info["HD_window"]) == ((32,), (64,))
        assert old.info["HD_ll_ref"] != new.info["HD_ll_ref"]


@pytest.mark.parametrize("samples", [0, 2])
def test_an_annotated_vcf_ends_at_no_line_that_is_cut_short(samples: int, inputs: Path, tmp_path: Path) -> None:
    def line(pos: int, number: str | None = None) -> list[str]:
        chrom, place, ref, alt = snv(pos)
        return [chrom, number or place, ".", ref, alt, ".", ".", ".", *(["GT"] + ["0/1"] * samples if samples else [])]
    head = HEAD.replace("#CHROM", '##contig=<ID=1>\n##FORMAT=<ID=GT,Number=1,Type=String,Description="x">\n#CHROM')
    head = head.rstrip("\n") + ("\tFORMAT\ta\tb" if samples else "") + "\n"
    bad = [line(210)[:5], line(220)[:7], line(230, "2e2"), line(240, "-4"), line(250, "9" * 20), ["1"],
           [*line(260)[:3], "A\0", *line(260)[4:]], *([line(270)[:-1], line(280)[:-2]] if samples else [])]
    rows = [line(200), *bad, line(300), line(310)[:8], line(320)]
    (tmp_path / "v.vcf").write_text(head + "".join("\t".join(row) + "\n" for row in rows))
    for out in ("o.vcf", "o.vcf.gz", "o.tsv"):
        assert score(inputs, "vcf", tmp_path / "v.vcf", tmp_path / out) == 0
    for out in ("o.vcf", "o.vcf.gz"):
        assert [record.pos for record in records(tmp_path / out)] == [200, 300, 310, 320]
    said = f"##hyena_dist.left_out={len(bad)} lines with fewer columns"
    assert said in (tmp_path / "o.vcf").read_text()
    table = read_scores(tmp_path / "o.tsv")
    assert len(table.rows) == len(rows), "a table has them all"
    assert "left_out" not in table.facts
    with pytest.raises((OSError, ValueError)):  # the control
        records(tmp_path / "v.vcf")


def text_of(rows: list[list[str]], between: str = "\t", quote: str = "") -> str:
    return "".join(between.join(f"{quote}{value}{quote}" for value in row) + "\n" for row in rows)


NAMES, LABELS = ["chrom", "pos", "ref", "alt", "label"], ["1", "0", "1"]
THREE = [[*snv(pos), label] for pos, label in zip((200, 300, 1000), LABELS, strict=True)]
WRITTEN = {
    "tab": text_of([NAMES, *THREE]),
    "a mark before it, as Excel's": "\ufeff" + text_of([NAMES, *THREE], ","),
    "a mark and a title": "\ufeff" + text_of([["Table 1"], ["#CHROM", *NAMES[1:]], *THREE], ","),
    "semicolons": text_of([NAMES, *THREE], ";"),
    "quotes between tabs, as R's": text_of([NAMES, *THREE], quote='"'),
    "names of rows, as R's": text_of([NAMES, *([str(number), *row] for number, row in enumerate(THREE))], quote='"'),
    "blanks, as R's": text_of([NAMES, *THREE], " ", '"'),
    "places as pandas and R write them": text_of([NAMES, *([row[0], pos, *row[2:]] for row, pos in zip(
        THREE, ("200.0", "3e+02", "1e+03"), strict=True))]),
    "a quote that is a letter": text_of([[*NAMES, "note"], *([*row, note] for row, note in zip(
        THREE, ('5" end', '"open', 'shut"'), strict=True))]),
}


@pytest.mark.parametrize("text", WRITTEN.values(), ids=WRITTEN)
def test_tables_are_read_as_programs_write_them(text: str, inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    found = judged_of(inputs, tmp_path / "t.txt")
    assert [judged.outcome for judged in found] == ["scored"] * 3
    label = Variants(tmp_path / "t.txt", is_vcf=False).names.index("label")
    assert [judged.row.others[label] for judged in found] == LABELS
    assert [judged.row.pos for judged in found] == ["200", "300", "1000"]


def test_quotes_in_disorder_are_counted(inputs: Path, tmp_path: Path) -> None:
    """The control: an open quote would take in the columns behind it."""
    rows = [THREE[0], [*THREE[1][:4], '"1,x'], ["1", '"300', *THREE[1][2:]], THREE[2]]
    (tmp_path / "t.csv").write_text(text_of([[*NAMES, "more"], *rows], ","))
    assert [judged.outcome for judged in judged_of(inputs, tmp_path / "t.csv")] == ["scored", "malformed", "malformed",
                                                                                  "scored"]


def test_a_vcf_may_have_a_mark_before_it(inputs: Path, tmp_path: Path) -> None:
    chrom, pos, ref, alt = snv(200)
    (tmp_path / "v.vcf").write_text(f"\ufeff{HEAD}{chrom}\t{pos}\t.\t{ref}\t{alt}\t.\t.\t.\n", encoding="utf-8")
    assert score(inputs, "vcf", tmp_path / "v.vcf", tmp_path / "o.vcf") == 0
    assert (tmp_path / "o.vcf").read_bytes().startswith(b"##fileformat")


def table_of(path: Path, **columns: Any) -> Path:
    found = {name: [row[place] for row in THREE] for place, name in enumerate(NAMES)}
    parquet.write_table(pa.table({**found, **columns}), path)
    return path


def test_parquet_with_a_missing_place_is_read(inputs: Path, tmp_path: Path) -> None:
    """As pandas writes it: the places are no whole numbers by their kind."""
    path = table_of(tmp_path / "t.parquet", pos=[200.0, float("nan"), 1000.0], label=[1.0, 0.5, None])
    found = judged_of(inputs, path)
    assert [judged.outcome for judged in found] == ["scored", "malformed", "scored"]
    assert [judged.row.others for judged in found] == [["1.0"], ["0.5"], [""]]


def test_damaged_parquet_is_said_in_one_line(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Wherever a byte is lost: each file ends in one line with its name, or its rows are read."""
    path = table_of(tmp_path / "t.parquet", number=[1.5, 2.5, 3.5])
    content, said = path.read_bytes(), list[str]()
    for place in range(4, len(content), 37):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            judged_of(inputs, path)
        except DataError as error:
            said.append(str(error))
    assert len(said) > 5
    assert all(text.startswith(str(path)) and "\n" not in text for text in said)
    path.write_bytes(content[:40] + bytes(60) + content[100:])  # its end, by which it is opened, is whole
    assert score(inputs, "table", path, tmp_path / "o.tsv") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "t.parquet: is damaged" in error


@pytest.mark.parametrize(("name", "out"), [("t.tsv", "o.tsv"), ("t.tsv", "o.parquet"), ("t.parquet", "o.parquet"),
                                           ("v.vcf", "o.vcf")])
def test_a_file_without_a_row_makes_one_without_a_row(name: str, out: str, inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "v.vcf").write_text(HEAD)
    (tmp_path / "t.tsv").write_text(text_of([NAMES]))
    parquet.write_table(parquet.read_table(table_of(tmp_path / "t.parquet")).slice(0, 0), tmp_path / "t.parquet")
    assert score(inputs, "vcf" if out == "o.vcf" else "table", tmp_path / name, tmp_path / out) == 0
    if out == "o.vcf":
        assert records(tmp_path / out) == []
    else:
        table = read_scores(tmp_path / out)
        assert (table.rows, table.names[-1]) == ([], "label")


@pytest.mark.parametrize(("row", "remedy"), [
    (["1", "x", "A", "C"], "(1 malformed): write places as whole numbers"),
    (["9", "5", "A", "C"], "(1 unknown_contig; the file has 9 (1), the reference 1): "
     "give the reference that it was made with, or chromosomes by its names"),
    (["1", "50", BASES[49], "<DEL>"], "(1 symbolic): give variants of which both alleles are written in bases"),
    (["1", "50", BASES[49], "ACGT" * 9], "(1 too_long): give a longer --window")])
def test_what_is_to_be_done_depends_on_what_is_the_matter(row: list[str], remedy: str, inputs: Path, tmp_path: Path,
                                                          capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "t.tsv").write_text(text_of([NAMES[:4], row]))
    assert score(inputs, "table", tmp_path / "t.tsv", tmp_path / "o.tsv") == 2
    assert remedy in capsys.readouterr().err


def test_a_window_that_holds_no_variant_is_refused(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "t.tsv").write_text(WRITTEN["tab"])
    for window in (1, 3):
        assert score(inputs, "table", tmp_path / "t.tsv", tmp_path / "o.tsv", window) == 2
        assert f"--window {window}: is too short for a variant and a base on each side" in capsys.readouterr().err
    assert score(inputs, "table", tmp_path / "t.tsv", tmp_path / "o.tsv", 4) == 0
    assert column(read_scores(tmp_path / "o.tsv"), "outcome") == ["scored"] * 3


def test_one_change_written_at_any_place_of_a_repeat_is_one_variant(tmp_path: Path) -> None:
    """Insertions and deletions of one base, of a unit, and of a rotated unit, in runs longer than is looked at at once;
    the control: the same bases where they make another sequence."""
    text = BASES[:100] + "C" + "A" * 150 + "G" + BASES[300:350] + "T" + "ACG" * 40 + "T" + BASES[400:500]
    (tmp_path / "r.fa").write_text(f">1\n{text}\n")
    random, wanted = np.random.default_rng(8), dict[str, set[int | None]]()
    rows, first, second = [], 101, text.index("T" + "ACG" * 10) + 1
    for begin, unit, length in ((first, "A", 150), (second, "ACG", 120)):
        for at in random.integers(begin, begin + length - len(unit), 25).tolist():
            inserted = text[at : at + len(unit)]
            rows += [["1", str(at), text[at - 1], text[at - 1] + inserted],
                     ["1", str(at), text[at - 1] + inserted, text[at - 1]],
                     ["1", str(at), text[at - 1], text[at - 1] + "T"]]
    found = list(judge([Row(1, *row, []) for row in rows], read_reference(tmp_path / "r.fa"), 64))
    changed = [text[: int(pos) - 1] + alt + text[int(pos) - 1 + len(ref) :] for _, pos, ref, alt in rows]
    for judged, sequence in zip(found, changed, strict=True):
        wanted.setdefault(sequence, set()).add(judged.number)
        site = judged.repeated or judged.site
        assert site is not None
        assert text[: site.at] + decode(site.alt) + text[site.at + site.removed :] == sequence
        assert judged.number is not None
    assert all(len(numbers) == 1 for numbers in wanted.values()), "one sequence is one variant"
    assert len(set.union(*wanted.values())) == len(wanted), "and two sequences are two"
    assert {site.at for site in (judged.site for judged in found) if site is not None} >= {first, second}


def test_parquet_keeps_the_kinds_of_its_columns(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is read in several pieces, and of a column that is called as one of ours."""
    monkeypatch.setattr(variant_tables, "_ROWS", 2)
    days = [datetime.date(2020, 1, day) for day in (1, 2, 3)]
    path = table_of(tmp_path / "t.parquet", pos=[200, 300, 1000], label=[1, None, 0], outcome=[True, False, None],
                    lists=[[1.5], [], None], day=days, **{"func.class": pa.array(["a", "b", "a"]).dictionary_encode()})
    assert score(inputs, "table", path, tmp_path / "o.parquet") == 0
    before, found = parquet.read_table(path), parquet.read_table(tmp_path / "o.parquet")
    assert found["pos"].to_pylist() == [200, 300, 1000]
    for name in ("label", "outcome", "lists", "day", "func.class"):
        same = "given_outcome" if name == "outcome" else name
        assert found.schema.field(same).type == before.schema.field(name).type
        assert found[same].to_pylist() == before[name].to_pylist(), name
    assert score(inputs, "table", path, tmp_path / "o.tsv") == 0
    tsv, again = read_scores(tmp_path / "o.tsv"), read_scores(tmp_path / "o.parquet")
    assert [row[: len(OWN)] for row in tsv.rows] == [row[: len(OWN)] for row in again.rows]


def test_places_that_are_no_numbers_stay_as_they_are(inputs: Path, tmp_path: Path) -> None:
    """The control: where all are numbers they are so in the file, too."""
    for name, rows in (("numbers", THREE), ("text", [*THREE, ["1", "x", "A", "C", "0"]])):
        (tmp_path / f"{name}.tsv").write_text(text_of([NAMES, *rows]))
        assert score(inputs, "table", tmp_path / f"{name}.tsv", tmp_path / f"{name}.parquet") == 0
    found = [parquet.read_table(tmp_path / f"{name}.parquet") for name in ("numbers", "text")]
    assert found[0]["pos"].to_pylist() == [200, 300, 1000]
    assert found[1]["pos"].to_pylist() == ["200", "300", "1000", "x"]
    assert found[0]["label"].to_pylist() == LABELS
