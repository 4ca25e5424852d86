"""Labelled sequences from every kind of file, with the headers and quirks that their publishers give them; what is no
labelled sequence is refused where it stands, and nothing odd passes in silence."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyena_dist.config.sections.finetune import FinetuneSection
from hyena_dist.data.errors import DataError
from hyena_dist.data.labelled import Labelled, read_labelled, reader_of
from hyena_dist.data.partition import draw
from hyena_dist.data.tables import Columns, read_table, reverse_complement

GUE = "sequence,label\nACGTAC,0\nTTGACA,1\nGGGCCC,0\nTATAAT,1\n"
"""As GUE has it."""


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def read(table: Path, seed: int = 0, most: int = 100, **keys: Any) -> Labelled:
    return read_labelled(FinetuneSection(table=str(table), **keys), seed=seed, most=most)


@pytest.mark.parametrize(("name", "content"), [
    ("t.csv", GUE), ("t.csv", GUE.replace("\n", "\r\n")), ("t.csv", "\ufeff" + GUE), ("t.csv", GUE + "\n\n"),
    ("t.tsv", GUE.replace(",", "\t")), ("t.csv.gz", gzip.compress(GUE.encode(), mtime=0)), ("odd-name", GUE),
    ("t.csv", GUE.replace("ACGTAC", '"ACGTAC"')),
    ("t.fna", ">a|0\nACG\nTAC\n>b|1\nTTGACA\n>c d|0\nGGGCCC\n>d|1\nTATAAT\n"),
])
def test_every_kind_holds_the_same(tmp_path: Path, name: str, content: str | bytes) -> None:
    found = read_table(write(tmp_path / name, content), Columns())
    assert [example.bases for example in found] == [b"ACGTAC", b"TTGACA", b"GGGCCC", b"TATAAT"]
    assert [example.label for example in found] == ["0", "1", "0", "1"]


def test_parquet_as_of_hugging_face(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"sequence": ["ACGT", "GGCC"], "name": ["x|1", "y|0"], "label": [1, 0]}),
                        tmp_path / "t.parquet")
    found = read_table(tmp_path / "t.parquet", Columns())
    assert [(example.name, example.bases, example.label) for example in found] == [
        ("x|1", b"ACGT", "1"), ("y|0", b"GGCC", "0")]


def test_a_label_of_two_digits_is_whole(tmp_path: Path) -> None:
    """The published reader takes the last letter of the header, which is wrong from the eleventh class on."""
    [found] = read_table(write(tmp_path / "t.fna", ">chr1|100|200|12\nACGT\n"), Columns())
    assert (found.name, found.label) == ("chr1|100|200", "12")


@pytest.mark.parametrize("content", [
    "chr1\t1\t5\tpeak\t-\nchr1\t0\t4\trest\t+\n",
    "#chrom\tstart\tend\tlabel\tstrand\nchr1\t1\t5\tpeak\t-\nchr1\t0\t4\trest\t+\n",
    "chrom,start,end,strand,label\nchr1,1,5,-,peak\nchr1,0,4,+,rest\n",
    "label,id,Region,end,start,Strand\npeak,7,chr1,5,1,-\nrest,8,chr1,4,0,+\n",
    "# peaks\n\ntrack name=x\nchr1\t1\t5\tpeak\t0\t-\nchr1\t0\t4\trest\t0\t+\n",
    "chr1\t1\t5\tpeak\t.\t-\nchr1\t0\t4\trest\t.\t.\n", "chr1 1 5  peak -\nchr1 0 4 rest +\n",
])
def test_intervals_are_cut_out_of_a_genome(tmp_path: Path, content: str) -> None:
    genome = write(tmp_path / "g.fa", ">chr1\nAACCGTTT\n")
    found = read_table(write(tmp_path / "t.bed", content), Columns(), genome)
    assert [(example.bases, example.label) for example in found] == [
        (reverse_complement(b"ACCG"), "peak"), (b"AACC", "rest")]
    assert found[0].bases == b"CGGT"


@pytest.mark.parametrize(("content", "said"), [
    ("", "the file is empty"), ("sequence,label\n", "holds no labelled sequences"),
    ("seq,label\nACGT,1\n", "column 'sequence' is not in the header.*finetune.sequence_column"),
    ("sequence,sequence,label\nA,C,1\n", "is twice in the header"),
    ("sequence,label\nACGT,1\nACGT\n", "line 3: has 1 columns and the header has 2"),
    ("sequence,label\nAC-T,1\n", r"line 2: byte b'-' at base 3 is not an IUPAC code"),
    ("sequence,label\n,1\n", "line 2: has no sequence"), ("sequence,label\nACGT,\n", "line 2: has no label"),
    ('sequence,label\n"ACGT,1\n', "is no row of a table"), (b"sequence,label\nACGT,\xff\n", "not text of UTF-8"),
    ("\ufeff>a\nACGT\n", "line 1: the header 'a' has no label"),
    ("sequence,label,split\nACGT,1,fold1\n", "line 2: the split 'fold1' is not known"),
    (">a|1\n>b|0\nACGT\n", "line 1: has no sequence"),
    (b"PAR1 and no more", "is damaged"), (b"PK\x03\x04rest", "zip archive"),
    (gzip.compress(GUE.encode(), mtime=0)[:-9], "cut short"), ("version https://git-lfs\n", "git-lfs pointer"),
])
def test_broken_files_are_one_line(tmp_path: Path, content: str | bytes, said: str) -> None:
    path = write(tmp_path / "t.csv", content)
    with pytest.raises(DataError, match=said) as caught:
        read_table(path, Columns())
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("row", "said"), [
    ("chr2\t0\t4\tx", r"contig 'chr2' is not in .*, which has chr1: check"),
    ("chr1\t4\t4\tx", "start < end"), ("chr1\t0\t9\tx", "reaches past"),
    ("chr1\t-1\t4\tx", "whole numbers"), ("chr1\t0\t4", "has 3 columns"), ("chr1\t0\t4\t\t+", "has no label"),
])
def test_broken_intervals_are_one_line(tmp_path: Path, row: str, said: str) -> None:
    genome = write(tmp_path / "g.fa", ">chr1\nAACCGTTT\n")
    with pytest.raises(DataError, match=f"t.bed: line 2: .*{said}"):
        read_table(write(tmp_path / "t.bed", f"chr1\t0\t4\tx\n{row}\n"), Columns(), genome)


@pytest.mark.parametrize(("first", "row"), [
    ("chr1\t0\t4\tx", "chr1\t0\t4\ty\t0\t-"), ("chr1\t0\t4\tx", "chr1\t0\t4\ty\t-"),
    ("chr1\t0\t4\tx\t.", "chr1\t0\t4\ty\t.\t-"), ("chr1\t0\t4\tx\t0\tNA", "chr1\t0\t4\ty\t0\t-"),
])
def test_a_strand_that_the_first_row_has_no_column_for_is_not_passed_over(tmp_path: Path, first: str, row: str) -> None:
    """The first row says where the strand is; a later row must not be read forward against what it says itself."""
    genome = write(tmp_path / "g.fa", ">chr1\nAACCGTTT\n")
    with pytest.raises(DataError, match="t.bed: line 3: .* line 2, the first row"):
        read_table(write(tmp_path / "t.bed", f"# peaks\n{first}\n{row}\n"), Columns(), genome)
    found = read_table(write(tmp_path / "t.bed", f"{first}\n{row[:-1]}+\n"), Columns(), genome)
    assert [example.bases for example in found] == [b"AACC"] * 2, "the control: forward is forward by both"


def rows(count: int, first: int = 0) -> str:
    """Different sequences of two classes."""
    letters = np.array(list("ACGT"))
    return "".join(f"{''.join(letters[[n >> 2 * place & 3 for place in range(8)]])},{n % 2}\n"
                   for n in range(first, first + count))


@pytest.mark.parametrize(("header", "said"), [
    ("chrom\tlabel\tend", "no column of the start: one must be called"),
    ("chrom\tchr\tstart\tend\tlabel", "2 columns of the contig"),
    ("chrom\tstart\tend\tname", "'label' is not in the header"),
    ("name\tplace\tlabel", "neither an interval nor a header"),
])
def test_headers_of_intervals_without_a_column_are_refused(tmp_path: Path, header: str, said: str) -> None:
    genome = write(tmp_path / "g.fa", ">chr1\nAACCGTTT\n")
    with pytest.raises(DataError, match=f"line 1: .*{said}"):
        read_table(write(tmp_path / "t.tsv", header + "\nchr1\t0\t4\t1\t1\n"), Columns(), genome)


def test_rna_is_read_as_dna(tmp_path: Path) -> None:
    found = read_table(write(tmp_path / "t.csv", "sequence,label\nACGU,1\nacgu,0\n"), Columns())
    assert [example.bases for example in found] == [b"ACGT", b"acgt"]


def test_a_column_of_splits_is_read_and_may_not_contradict_its_file(tmp_path: Path) -> None:
    rows = "sequence,label,split\nACGT,1,train\nCCGT,0,train\nGGTT,1,train\nTTTA,0,test\n"
    found = read(write(tmp_path / "t.csv", rows))
    assert [example.bases for example in found.splits["test"]] == [b"TTTA"]
    (tmp_path / "t.csv").rename(tmp_path / "train.csv")
    with pytest.raises(DataError, match="line 5: is of split test, in the file of train"):
        read(tmp_path)
    write(tmp_path / "train.csv", GUE)
    write(tmp_path / "dev.csv", GUE)
    with pytest.raises(DataError, match=r"finetune.valid: .*dev.csv is of valid already"):
        read(tmp_path, valid=str(tmp_path / "train.csv"))


def test_a_directory_of_gue_is_three_splits(tmp_path: Path) -> None:
    for number, name in enumerate(("train", "dev", "test")):
        write(tmp_path / f"{name}.csv", "sequence,label\n" + rows(10, 10 * number))
    found = read(tmp_path)
    assert {name: len(examples) for name, examples in found.splits.items()} == {"train": 10, "valid": 10, "test": 10}
    assert (found.classes, found.notes) == (["0", "1"], [])
    write(tmp_path / "train.tsv", "x")
    with pytest.raises(DataError, match="are both of train"):
        read(tmp_path)


def test_a_random_part_is_drawn_by_seed_and_copies_stay_together(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", "sequence,label\n" + rows(40) * 2)
    one, same, other = (read(table, seed=seed) for seed in (0, 0, 1))
    assert one.digest() == same.digest() != other.digest()
    assert len(one.splits["valid"]) == 8
    assert one.notes == [], "no sequence is on both sides"


@pytest.mark.parametrize(("task", "label"), [
    ("classification", "{}"), ("multilabel", "x;{}"), ("per_base", "{0}{0}{0}{0}{0}{0}{0}{0}")])
def test_a_random_part_leaves_every_class_to_train_on(tmp_path: Path, task: str, label: str) -> None:
    """Two copies of the rarest sequence are on one side, and that is where classes are learnt."""
    lines = [f"{line.partition(',')[0]},{label.format('ab'[n % 2])}\n" for n, line in enumerate(rows(30).splitlines())]
    rare = [f"{bases},{label.format('c')}\n" for bases in ("ACACACGT", "ACACACGT", "GTGTGTTT")]
    table = write(tmp_path / "t.csv", "sequence,label\n" + "".join(lines + rare))
    read_seed = reader_of(FinetuneSection(table=str(table), task=task, valid_fraction=0.4), most=100)
    found = [read_seed(seed) for seed in range(12)]
    assert all("c" in one.classes for one in found)
    assert any("c" in example.label for one in found for example in one.splits["valid"])
    examples = [example for split in found[0].splits.values() for example in split]
    bare = [draw(examples, 0.4, seed, same=lambda e: e.key, classes=lambda _: ())[0] for seed in range(12)]
    assert any(not any("c" in example.label for example in train) for train in bare), "the control"


def test_too_few_sequences_to_draw_a_part_from(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", "sequence,label\nACGT,0.5\nACGT,0.7\n")
    with pytest.raises(DataError, match=r"no sequences to validate by \(2 of train, 0 of valid, 0 of test\)"):
        read(table, task="regression")


def test_a_split_column_and_chromosomes(tmp_path: Path) -> None:
    lines = rows(6).splitlines()
    table = write(tmp_path / "t.csv", "sequence,label,part\n" + "".join(
        f"{line},{part}\n" for line, part in zip(lines, ("train", "Train", "dev", "val", "test", "test"), strict=True)))
    found = read(table, split_column="part")
    assert [len(found.splits[name]) for name in ("train", "valid", "test")] == [2, 2, 2]
    genome = write(tmp_path / "g.fa", "".join(f">chr{n}\nACGTACGTACGT\n" for n in (1, 2, 3)))
    bed = write(tmp_path / "t.bed", "".join(f"chr{n}\t{at}\t{at + 4 + n}\tc{at % 2}\n" for n in (1, 2, 3)
                                            for at in range(4)))
    found = read(bed, genome=str(genome), valid_chromosomes="chr2", test_chromosomes="chr3")
    assert {name: {e.chromosome for e in examples} for name, examples in found.splits.items()} == {
        "train": {"chr1"}, "valid": {"chr2"}, "test": {"chr3"}}
    with pytest.raises(DataError, match="no training sequence is of 'chr9'"):
        read(bed, genome=str(genome), test_chromosomes="chr9")


def test_what_is_odd_is_counted(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", "sequence,label\n" + rows(8) + "ACNNAC,2\nACGTTT,2\n")
    test = write(tmp_path / "test.csv", "sequence,label\n" + rows(3))
    found = read(table, test=str(test))
    assert "2 of 90" not in " ".join(found.notes)
    assert any("different sequences are in" in note and "in test" in note for note in found.notes)
    assert any(note.startswith("2 of ") and "no A, C, G or T" in note for note in found.notes)
    assert "class '2' has no sequence in test" in found.notes


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", "sequence,label\n" + rows(20))
    strange = write(tmp_path / "test.csv", "sequence,label\nACGT,7\n")
    with pytest.raises(DataError, match="test.csv: line 2: the label '7' of test is of no training sequence"):
        read(table, test=str(strange))
    with pytest.raises(DataError, match="has 8 bases, and the model takes 6.*finetune.longer"):
        read(table, most=6)
    with pytest.raises(DataError, match="a classifier needs two"):
        read(write(tmp_path / "one.csv", "sequence,label\nAA,x\nAC,x\nAG,x\n"))
    with pytest.raises(DataError, match="line 3: the label 'high' is no number"):
        read(write(tmp_path / "r.csv", "sequence,label\nAA,1.5\nAC,high\nAG,2\n"), task="regression")


@pytest.mark.parametrize(("side", "kept"), [("left", b"AAACCC"), ("center", b"AACCCG"), ("right", b"CCCGGG")])
def test_what_is_too_long_is_cropped_as_asked(tmp_path: Path, side: str, kept: bytes) -> None:
    table = write(tmp_path / "t.csv", "sequence,label\n" + rows(6).replace(rows(1).split(",")[0], "AAACCCGGG"))
    found = read(table, most=6, longer=side)
    assert any(example.bases == kept for examples in found.splits.values() for example in examples)
    assert found.notes[0] == f"6 sequences were longer than 6 bases, and their {side} part was kept"


def test_classes_are_sorted_and_written_as_numbers(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", "sequence,label\n" + "".join(
        f"{line.partition(',')[0]},{(10, 9, 2)[n % 3]}\n" for n, line in enumerate(rows(30).splitlines())))
    found = read(table)
    assert found.classes == ["2", "9", "10"]
    assert [found.classes[number] for number in found.targets("train")] == [e.label for e in found.splits["train"]]


def test_several_labels_of_a_row(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", "sequence,label\n" + "".join(
        f"{line.partition(',')[0]},{('b;a', 'a', '-')[n % 3]}\n" for n, line in enumerate(rows(30).splitlines())))
    found = read(table, task="multilabel")
    assert found.classes == ["a", "b"]
    wanted = {"b;a": [1, 1], "a": [1, 0], "-": [0, 0]}
    assert found.targets("train").tolist() == [wanted[example.label] for example in found.splits["train"]]


def test_several_labels_may_be_vectors(tmp_path: Path) -> None:
    """As of DeepSEA: a 0 or 1 for each class; the control, rows of two lengths in which a label comes twice, is
    refused."""
    rows = [("AAAA", "0;1;0;1"), ("CCCC", "0;0;0;0"), ("GGGG", "1;0;0;0"), ("TTTT", "0;1;0;1"), ("ACAC", "1;0;0;1")]
    table = "sequence,label,split\n" + "".join(f"{bases},{label},{split}\n" for (bases, label), split in zip(
        rows, ["train", "train", "train", "valid", "train"], strict=True))
    found = read(write(tmp_path / "t.csv", table), task="multilabel")
    assert found.classes == ["0", "1", "3"]
    assert found.targets("train").tolist() == [[0, 1, 1], [0, 0, 0], [1, 0, 0], [1, 0, 1]]
    assert "labels are vectors of 4 numbers" in found.notes[-1] + "".join(found.notes)
    with pytest.raises(DataError, match="line 2: a label comes twice"):
        read(write(tmp_path / "t.csv", table.replace("0;0;0;0", "0;0")), task="multilabel")
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    parquet.write_table(pyarrow.table({"sequence": ["ACGT", "GGCC", "TTTT"], "label": [["a", "b"], [], ["b"]],
                                       "split": ["train", "train", "valid"]}), tmp_path / "t.parquet")
    found = read(tmp_path / "t.parquet", task="multilabel")
    assert found.targets("train").tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize("label", ["1_5", "nan", "1e999", "0x1", "1,5"])
def test_only_numbers_as_people_write_them(tmp_path: Path, label: str) -> None:
    with pytest.raises(DataError, match="is no number"):
        read(write(tmp_path / "t.csv", f'sequence,label\nACGT,"{label}"\nCCGT,0\n'), task="regression")


def test_a_number_written_two_ways_is_noted(tmp_path: Path) -> None:
    found = read(write(tmp_path / "t.csv", GUE + "ACCC,01\nCCCC,01\nTTCC,0\n"), seed=3)
    assert any("labels '01' and '1'" in note or "labels '1' and '01'" in note for note in found.notes), found.notes
