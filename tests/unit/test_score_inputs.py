"""Files of variants as people have them: variants in several rows, tables of any program, annotated and damaged."""

import json
from pathlib import Path

import numpy as np
import pysam
import pytest

from hyena_dist.cli.score import main
from hyena_dist.convert import write_model
from hyena_dist.data.errors import DataError
from hyena_dist.data.reference import read_reference
from hyena_dist.data.seen import Seen
from hyena_dist.data.variants import Judged, Variants, judge
from hyena_dist.tasks.score import variants as task
from hyena_dist.tasks.score.observe import SCORES
from hyena_dist.tasks.score.output import Table, read_scores
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
