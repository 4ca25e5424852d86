"""Which files a suite takes for those of a task, whatever they are called, and what they must give: a split that is not
there is never drawn from another."""

import json
import os
from pathlib import Path

import pytest

from hyena_dist.config.errors import UserError
from hyena_dist.data.errors import DataError
from hyena_dist.tasks.suites import SUITES
from hyena_dist.tasks.suites.prepare import look, prepare
from hyena_dist.tasks.suites.table import left_out, write_table
from tests.unit.test_suite_readers import ETGP, GUE, KINDS, LRB, NT, TEXTS, WORM, drop, put, read, swap, write


def hugging_face(folder: Path, names: dict[str, int]) -> Path:
    """A file of each name, whose rows of H2AFZ have this label."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder.mkdir(parents=True, exist_ok=True)
    for name, label in names.items():
        parquet.write_table(pyarrow.table({"sequence": ["ACGT", "CCCC"], "name": ["a", "b"], "label": [label, 1],
                                           "task": ["H2AFZ", "H3K9ac"]}), folder / f"{name}.parquet")
    return folder


OLD, OTHER = "-a09b74b3ef9c3b56", "-0123456789abcdef"
"""What Hugging Face used to put behind the numbers of a part."""


def test_a_file_whose_name_is_no_text(tmp_path: Path) -> None:
    """It is read as any other, and named in messages and tables."""
    data, suite = write(tmp_path / os.fsdecode(b"da\xffta"), TEXTS), SUITES["caduceus-gb"]
    (data / WORM / "train/human/0.txt").rename(data / WORM / "train/human" / os.fsdecode(b"\xff.txt"))
    task = suite.task(WORM)
    prepare(suite, task, data, tmp_path / "out")
    rows = (tmp_path / "out/table/train.csv").read_text("utf-8")
    assert "ACGTacgt,human,human/\\udcff\n" in rows
    assert "CCNN,human,human/10\n" in rows, "the control"
    write_table(tmp_path, suite, str(data), {}, [left_out(suite, task, "refused", f"{data}: lacks 'worm'")])
    assert "da\\udcffta: lacks 'worm'" in (tmp_path / "table.md").read_text("utf-8")


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("behind", ["", OLD])
def test_parquet_of_hugging_face(tmp_path: Path, parts: int, behind: str) -> None:
    names = {f"train-{part:05d}-of-{parts:05d}{behind}": part for part in range(parts)}
    folder = hugging_face(tmp_path / f"{NT}_revised" / "data", {**names, "test-00000-of-00001": 0})
    found, _ = read("caduceus-nt", "revised/H2AFZ", tmp_path)
    assert [(e.split, e.bases, e.label) for e in found] == [
        *(("train", b"ACGT", str(part)) for part in range(parts)), ("test", b"ACGT", "0")]
    with pytest.raises(UserError, match="no row has 'H4K20me1' in its column `task`"):
        read("caduceus-nt", "revised/H4K20me1", tmp_path)
    if parts == 2:
        (folder / f"train-00000-of-00002{behind}.parquet").unlink()
        with pytest.raises(UserError, match="train has 1 of 2 parts"):
            read("caduceus-nt", "revised/H2AFZ", tmp_path)


@pytest.mark.parametrize("names", [
    (f"train-00000-of-00001{OLD}", f"train-00000-of-00001{OTHER}"), ("train-00000-of-00001", "train-00000-of-00002"),
    (f"train-00000-of-00001{OLD}", "train-00000-of-00001")])
def test_parts_of_two_downloads_are_not_mixed(tmp_path: Path, names: tuple[str, ...]) -> None:
    folder = hugging_face(tmp_path / f"{NT}_revised" / "data", dict.fromkeys((*names, "test-00000-of-00001"), 1))
    with pytest.raises(UserError, match="are parts of train from several downloads"):
        read("caduceus-nt", "revised/H2AFZ", tmp_path)
    (folder / f"{names[1]}.parquet").unlink()
    hugging_face(folder, {"train-1-of-2": 0, "train-00000-of-00001 (1)": 0, "train-00000-of-00001-x": 0})
    assert len(read("caduceus-nt", "revised/H2AFZ", tmp_path)[0]) == 2, "the control: other files are none of it"


def test_a_split_that_the_protocol_needs_is_not_drawn_from_another(tmp_path: Path) -> None:
    """A file may be there and give nothing of its split."""
    for kind, (change, said) in {
        "gue": (put("GUE/mouse/0/dev.csv", "sequence,label\n"), "mouse/0 give no sequences of valid, .*its authors"),
        "etgp": (swap("\tvalid", "\ttrain", "pairs"), "enhancer_target_gene give no sequences of valid"),
        "nt": (put(f"{NT}/H3/test.csv", "sequence,label\n"), "original/H3 give no sequences of test"),
    }.items():
        suite, task, files, _ = KINDS[kind]
        files = drop("H3/test.fna")(files) if kind == "nt" else files
        found = SUITES[suite].task(task)
        with pytest.raises(DataError, match=f"the files of {said}"):
            look(SUITES[suite], found, write(tmp_path / f"{kind}-less", change(files)))
        if kind != "nt":
            assert look(SUITES[suite], found, write(tmp_path / kind, files)).sizes["valid"], "the control"
    far = swap("chr1\t5\t11\tchr1", "chr1\t5\t11\tchr2", "pairs")(ETGP)  # left out: the data are whole
    with pytest.raises(DataError, match="no sequences of valid, .* 2 pairs are left out, as the suite's loader does"):
        look(SUITES["dnalongbench"], SUITES["dnalongbench"].task("enhancer_target_gene"), write(tmp_path / "far", far))


def test_a_table_of_an_earlier_version_without_a_split_is_refused(tmp_path: Path) -> None:
    suite, task, out = SUITES["gue-dnabert2"], SUITES["gue-dnabert2"].task("mouse/0"), tmp_path / "out"
    data = write(tmp_path / "data", GUE)
    prepare(suite, task, data, out)
    assert prepare(suite, task, data, out).sizes["valid"] == 1, "the control"
    source = json.loads((out / "table/source.json").read_text("utf-8"))
    del source["sizes"]["valid"]
    (out / "table/source.json").write_text(json.dumps(source), encoding="utf-8")
    with pytest.raises(DataError, match="the files of mouse/0 give no sequences of valid"):
        prepare(suite, task, data, out)


@pytest.mark.parametrize(("length", "lost"), [(8192, "test and of train and of valid"), (3000, "valid"), (100, "")])
def test_windows_that_lose_a_split_are_refused(tmp_path: Path, length: int, lost: str) -> None:
    """Validation would else be a random part of train, as where the table has none."""
    suite = SUITES["lrb"].of_length(length)
    rows = "".join(f"chr1,{place},{place + 200},{n},{split}\n" for split, place in (
        ("train", 2400), ("validation", 1000), ("test", 2401)) for n in (0, 1))
    files = LRB | {"regulatory_elements/promoter_dataset.csv": "CHROM,START,STOP,label,split\n" + rows}
    task = suite.task("regulatory_element_promoter")
    if lost:
        with pytest.raises(DataError, match=f"every window of {length:,} bases of {lost} reaches past its contig.*"
                                            "take a shorter --length"):
            look(suite, task, write(tmp_path, files))
    else:
        assert look(suite, task, write(tmp_path, files)).sizes == {"train": 2, "valid": 2, "test": 2}
        files = swap("validation", "train")(swap("validation", "train")(files))
        assert look(suite, task, write(tmp_path, files)).sizes == {"train": 4, "test": 2}, "there is none to lose"
