"""Readers of suites whose labels are numbers of bins or of pairs of bins, on small files made by hand; their tables are
those that fine-tuning reads."""

import dataclasses
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from hyena_dist.config.errors import UserError
from hyena_dist.config.sections.finetune import FinetuneSection
from hyena_dist.data.labelled import read_labelled
from hyena_dist.data.places import Values
from hyena_dist.data.tables import Columns, Example, read_table, reverse_complement
from hyena_dist.tasks.suites import SUITES, basenji
from hyena_dist.tasks.suites.description import Suite
from hyena_dist.tasks.suites.prepare import look, prepare
from hyena_dist.tasks.suites.tfrecords import records
from hyena_dist.tasks.suites.writer import Writer, thin

GENOME = b"ACGTTGCAAC" * 300


def varint(value: int) -> bytes:
    found = b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def record(**features: bytes) -> bytes:
    """As TensorFlow writes an Example; the checksums are not looked at."""
    entries = b"".join(field(1, field(1, name.encode()) + field(2, field(1, field(1, value))))
                       for name, value in features.items())
    example = field(1, entries)
    return struct.pack("<Q", len(example)) + b"CRC1" + example + b"CRC2"


def tfr(path: Path, *found: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zlib.compress(b"".join(found)))


def one_hot(bases: bytes) -> bytes:
    return (np.frombuffer(bases, np.uint8)[:, None] == np.frombuffer(b"ACGT", np.uint8)).astype(np.uint8).tobytes()


def fasta(path: Path, **contigs: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(b">%s\n%s\n" % (name.encode(), bases) for name, bases in contigs.items()))


def keys_of(suite: Suite, task: str) -> dict[str, object]:
    return {key.partition(".")[2]: value for key, value in suite.task(task).keys.items()}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and maps of the true form, but of few bins: the sizes are the only thing that is made up."""
    monkeypatch.setattr(basenji, "ACTIVITY_WINDOW", 128 * 6)
    monkeypatch.setattr(basenji, "ACTIVITY_BINS", 2)
    monkeypatch.setattr(basenji, "CONTACT_BINS", 6)
    monkeypatch.setattr(basenji, "CONTACTS", 3)


def activity(directory: Path) -> np.ndarray:
    """Three records in the order of a BED that is not that of the contigs; the last window reaches past its contig."""
    base = directory / "regulatory_sequence_activity_prediction" / "human"
    fasta(base / "seqs" / "hg38.ml.fa", chr1=GENOME, chr2=GENOME[::-1])
    (base / "sequences.bed").write_text("chr2\t1000\t1256\ttrain\nchr1\t1000\t1256\ttrain\nchr1\t2000\t2256\tvalid\n"
                                        "chr1\t0\t256\ttest\n", encoding="utf-8")
    (base / "statistics.json").write_text(json.dumps({"num_targets": 3, "target_length": 2, "pool_width": 128,
                                                      "seq_length": 768, "crop_bp": 256}), encoding="utf-8")
    targets = np.arange(24, dtype=np.float16).reshape(4, 2, 3)
    for name, number in (("train-0", 0), ("train-1", 1), ("valid-0", 2), ("test-0", 3)):
        tfr(base / "tfrecords" / f"{name}.tfr", record(sequence=b"\x01", target=targets[number].tobytes()))
    return targets


@pytest.mark.usefixtures("small")
def test_regulatory_activity_is_a_table_of_bins(tmp_path: Path) -> None:
    suite, targets = SUITES["dnalongbench"], activity(tmp_path)
    task = suite.task("regulatory_activity/human")
    found = prepare(suite, task, tmp_path, tmp_path / "out")
    assert found.sizes == {"train": 2, "valid": 1, "test": 1}
    keys = keys_of(suite, task.name) | {"bins_cut": 2}
    labelled = read_labelled(FinetuneSection(table=str(tmp_path / "out/table"), **keys), seed=0, most=1000)
    train, test = labelled.splits["train"], labelled.splits["test"]
    assert [example.bases for example in train] == [GENOME[::-1][744:1512], GENOME[744:1512]]
    assert test[0].bases == b"N" * 256 + GENOME[:512]
    assert np.array_equal([example.values.array() for example in train], targets[:2])
    assert np.array_equal(test[0].values.array(), targets[3])
    assert keys["loss"] == "poisson"


@pytest.mark.usefixtures("small")
def test_the_validation_split_is_the_true_one(tmp_path: Path) -> None:
    """The published loader takes the test split for it."""
    suite, _ = SUITES["dnalongbench"], activity(tmp_path)
    task = suite.task("regulatory_activity/human")
    found = list(suite.read(task, suite.files(task, tmp_path), []))
    assert [(example.split, example.name) for example in found if example.split != "train"] == [
        ("valid", "chr1:1744-2512"), ("test", "chr1:-256-512")]


@pytest.mark.usefixtures("small")
def test_contact_maps_are_a_table_of_pairs(tmp_path: Path) -> None:
    suite, bases = SUITES["dnalongbench"], (b"ACGTN" * 2458)[: 6 * 2048]
    target = np.arange(15, dtype=np.float16).reshape(3, 5)
    folder = tmp_path / "contact_map_prediction" / "targets"
    for split, count in (("train", 2), ("valid", 1), ("test", 1)):
        tfr(folder / f"{split}-0.tfr", *[record(target=target.tobytes(), sequence=one_hot(bases))] * count)
    prepare(suite, suite.task("contact_map/GM12878"), tmp_path, tmp_path / "out")
    keys = keys_of(suite, "contact_map/GM12878") | {"bins_cut": 1}
    labelled = read_labelled(FinetuneSection(table=str(tmp_path / "out/table"), **keys), seed=0, most=1 << 20)
    assert labelled.splits["test"][0].bases == bases
    assert np.array_equal(labelled.splits["valid"][0].values.array(), [2, 7, 12]), "the third kind of cells"
    assert (basenji.ACTIVITY_WINDOW, keys_of(suite, "regulatory_activity/mouse")["bins_cut"]) == (768, 320)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("bases", "rows", "columns", "said"), [
    (6 * 2048 - 1, 3, 5, "has 12,287 bases and 3 contacts, and a contact map has 12,288 and 3"),
    (6 * 2048, 4, 5, "has 12,288 bases and 4 contacts"),
    (6 * 2048, 3, 4, "its target is no array of <f2 with 5 columns"),
])
def test_contact_maps_of_another_size_are_one_line(tmp_path: Path, bases: int, rows: int, columns: int,
                                                   said: str) -> None:
    suite, folder = SUITES["dnalongbench"], tmp_path / "contact_map_prediction" / "targets"
    target = np.zeros((rows, columns), dtype=np.float16).tobytes()
    for split in ("train", "valid", "test"):
        tfr(folder / f"{split}-0.tfr", record(target=target, sequence=one_hot(b"A" * bases)))
    with pytest.raises(UserError, match=said):
        look(suite, suite.task("contact_map/HFF"), tmp_path)


def lrb(directory: Path) -> Path:
    fasta(directory / "hg19.fa", chr1=GENOME)
    fasta(directory / "hg38.fa", chr1=GENOME)
    bulk, cage = directory / "bulk_rna_expression", directory / "cage_prediction"
    for folder in (bulk, cage / "targets_subset"):
        folder.mkdir(parents=True)
    (bulk / "gene_coordinates.csv").write_text("id,chrom,CAGE_representative_TSS,strand,split\n"
        "a,chr1,1001,+,train\nb,chr1,1201,-,test\nc,chr1,50,+,train\n", encoding="utf-8")
    (bulk / "rna_expression_values.csv").write_text("Adipose,Artery\n0.5,1\n2,-3.5\n7,8\n", encoding="utf-8")
    (cage / "sequences_coordinates.csv").write_text("chrom,start,stop,split,npy_idx\nchr1,1001,1201,train,0\n"
        "chr1,1401,1601,validation,0\nchr1,1501,1701,test,1000\n", encoding="utf-8")
    for split, first in (("train", 0), ("valid", 0), ("test", 1000)):
        array = np.arange(896 * 2, dtype=np.float32).reshape(1, 896, 2) + first
        np.savez(cage / "targets_subset" / f"targets-{split}-{first}-{first + 9}.npz",
                 **{f"target-{split}-{first}.npy": array})
    return directory


def test_bulk_rna_and_cage_are_tables_of_bins(tmp_path: Path) -> None:
    suite, data = SUITES["lrb"].of_length(512), lrb(tmp_path / "lrb")
    bulk, cage = suite.task("bulk_rna_expression"), suite.task("cage_prediction")
    assert (bulk.keys["finetune.bin_size"], cage.keys["finetune.bin_size"]) == (512, 128)
    notes: list[str] = []
    found = list(suite.read(bulk, suite.files(bulk, data), notes))
    assert [(e.split, e.bases, e.values.array().tolist()) for e in found] == [
        ("train", GENOME[744:1256], [[0.5, 1.0]]), ("test", reverse_complement(GENOME[944:1456]), [[2.0, -3.5]])]
    assert "1 of 3 windows reach past" in notes[0]
    assert look(suite, cage, data).sizes == {"train": 1, "valid": 1, "test": 1}
    prepare(suite, cage, data, tmp_path / "out")
    labelled = read_labelled(FinetuneSection(table=str(tmp_path / "out/table"), **keys_of(suite, cage.name)), seed=0,
                             most=512)
    middle = np.log1p(np.arange(446 * 2, 450 * 2, dtype=np.float32).reshape(4, 2))
    assert np.allclose(labelled.splits["train"][0].values.array(), middle)
    assert np.allclose(labelled.splits["test"][0].values.array(), np.log1p(np.expm1(middle) + 1000), rtol=1e-5)


def test_the_rows_that_are_drawn_keep_their_numbers(tmp_path: Path) -> None:
    suite, data = SUITES["lrb"].of_length(64), lrb(tmp_path / "lrb")
    rows = "".join(f"g{n},chr1,{100 + n},+,{'train' if n < 20 else 'test'}\n" for n in range(24))
    folder = data / "bulk_rna_expression"
    (folder / "gene_coordinates.csv").write_text(f"id,chrom,CAGE_representative_TSS,strand,split\n{rows}")
    (folder / "rna_expression_values.csv").write_text("a\n" + "".join(f"{n}\n" for n in range(24)))
    found = prepare(suite, suite.task("bulk_rna_expression"), data, tmp_path / "out", most=5)
    assert found.sizes["train"] == 5
    array = np.load(tmp_path / "out/table/train.npy")
    names = [line.split(",")[2] for line in (tmp_path / "out/table/train.csv").read_text().splitlines()[1:]]
    assert [int(name.partition(":")[2].partition("-")[0]) - 67 for name in names] == array[:, 0, 0].tolist()


def test_rows_are_drawn_whole_whatever_breaks_their_names(tmp_path: Path) -> None:
    bases = b"ACGT" * 40_000  # a field of more than the csv module takes by itself
    with Writer(tmp_path) as writer:
        for row in range(8):
            name = f'{row},"a\u2028b\x85c\nd'
            writer.write(Example(name, bases, "-", "here", "train", values=Values(np.full((1, 2), row), "here")), bases)
    assert thin(tmp_path, 5) == "5 of 8 training sequences were drawn at random, and only these are used"
    found = read_table(tmp_path / "train.csv", Columns())
    rows = [int(example.name[0]) for example in found]
    assert len(set(rows)) == 5
    assert rows == np.load(tmp_path / "train.npy")[:, 0, 0].tolist()
    assert {example.bases for example in found} == {bases}
    assert {example.name[1:] for example in found} == {',"a\u2028b\x85c\nd'}


GOOD = np.arange(6, dtype=np.float16).tobytes()
PART, ONE = "tfrecords/train-0.tfr", record(sequence=b"\x01", target=GOOD)
FAULTS: dict[str, tuple[str, bytes | None]] = {
    "no zlib": (PART, ONE), "cut": (PART, zlib.compress(ONE)[:-8]), "empty": (PART, zlib.compress(b"")),
    "record cut": (PART, zlib.compress(ONE[:-6])),
    "no example": (PART, zlib.compress(struct.pack("<Q", 3) + b"CRC1" + b"\xff\xff\xff" + b"CRC2")),
    "length": (PART, zlib.compress(b"\xff" * 40)),
    "columns": (PART, zlib.compress(record(sequence=b"\x01", target=GOOD[:-2]))),
    "bins": (PART, zlib.compress(record(sequence=b"\x01", target=GOOD * 2))),
    "no target": (PART, zlib.compress(record(sequence=b"\x01"))), "more": (PART, zlib.compress(ONE * 2)),
    "fewer": ("tfrecords/train-1.tfr", None), "gap": (PART, None),
    "sizes": ("statistics.json", b'{"num_targets": 3, "target_length": 7, "pool_width": 128}'),
    "split": ("sequences.bed", b"chr2\t1000\t1256\tfold0\n"),
    "digit": ("sequences.bed", "chr2\t1000\t125\u00b2\ttrain\n".encode()),
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("name", "said"), [
    ("no zlib", "train-0.tfr: is no TFRecord file of zlib"), ("cut", "train-0.tfr: .*is cut short"),
    ("empty", "train-0.tfr: holds no records"), ("record cut", "train-0.tfr: record 1: is cut short"),
    ("no example", "train-0.tfr: record 1: is no Example"), ("length", "train-0.tfr: record 1: is no record"),
    ("columns", "its target is no array of <f2 with 3 columns"), ("bins", "has 4 bins, not 2"),
    ("no target", "its target is no array"), ("more", "sequences.bed: has fewer rows of train than there are records"),
    ("fewer", "there are fewer records of train than rows"), ("gap", "train-0.tfr: the records of train are not there"),
    ("sizes", "statistics.json: says target_length 7"), ("split", "sequences.bed: line 1: must be contig"),
    ("digit", "sequences.bed: line 1: must be contig"),
])
def test_broken_tracks_are_one_line(tmp_path: Path, name: str, said: str) -> None:
    suite, _ = SUITES["dnalongbench"], activity(tmp_path)
    file, content = FAULTS[name]
    path = tmp_path / "regulatory_sequence_activity_prediction" / "human" / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        look(suite, suite.task("regulatory_activity/human"), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("file", "old", "new", "said"), [
    ("bulk_rna_expression/gene_coordinates.csv", ",+,", ",*,", "line 2: strand '\\*' must be"),
    ("bulk_rna_expression/gene_coordinates.csv", "1001", "x", "CAGE_representative_TSS is 'x'"),
    ("bulk_rna_expression/rna_expression_values.csv", "0.5", "high", "line 2: holds something else than numbers"),
    ("bulk_rna_expression/rna_expression_values.csv", "7,8\n", "", "has 2 rows, and gene_coordinates.csv has 3"),
    ("cage_prediction/sequences_coordinates.csv", "train,0", "train,77", "array target-train-77.npy is in none"),
    ("cage_prediction/sequences_coordinates.csv", "npy_idx", "idx", "'npy_idx' is not in the header"),
    ("cage_prediction/targets_subset/targets-train-0-9.npz", None, "PK", "targets-train-0-9.npz: is damaged"),
    ("cage_prediction/targets_subset/targets-train-0-9 (1)-x.npz", None, "", "is not called targets-SPLIT-FIRST-LAST"),
    ("cage_prediction/targets_subset/targets-train-0-\u00b2.npz", None, "", "is not called targets-SPLIT-FIRST-LAST"),
])
def test_broken_numbers_are_one_line(tmp_path: Path, file: str, old: str | None, new: str, said: str) -> None:
    suite, data = SUITES["lrb"].of_length(512), lrb(tmp_path / "lrb")
    path = data / file
    path.write_text(new if old is None else path.read_text("utf-8").replace(old, new, 1), encoding="utf-8")
    task = suite.task(file.partition("/")[0])
    with pytest.raises(UserError, match=said) as caught:
        look(suite, task, data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["an array", "a packed array that is damaged", "no array"])
def test_files_that_are_no_npz_are_one_line(tmp_path: Path, kind: str) -> None:
    suite, data = SUITES["lrb"].of_length(512), lrb(tmp_path / "lrb")
    path = data / "cage_prediction/targets_subset/targets-train-0-9.npz"
    if kind == "an array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif kind == "no array":
        path.write_bytes(b"")
    else:
        np.savez_compressed(path, **{"target-train-0.npy": np.random.default_rng(0).random((1, 896, 2))})
        content = bytearray(path.read_bytes())
        content[200:260] = b"\xff" * 60
        path.write_bytes(content)
    with pytest.raises(UserError, match="targets-train-0-9.npz: is damaged"):
        look(suite, suite.task("cage_prediction"), data)


def test_a_length_of_no_whole_bins_is_refused(tmp_path: Path) -> None:
    suite = SUITES["lrb"].of_length(1000)
    with pytest.raises(UserError, match="--length 1000: windows of cage_prediction are at most 114,688 bases"):
        look(suite, suite.task("cage_prediction"), lrb(tmp_path / "lrb"))
    assert dataclasses.replace(suite.task("cage_prediction"), window=256).window == 256


def test_records_over_many_blocks(tmp_path: Path) -> None:
    """Sizes that no block of the reader divides."""
    rng = np.random.default_rng(0)
    wanted = [rng.bytes(size) for size in (1, 3_000_001, 0x7F, 0x80, 1_500_000)]
    tfr(tmp_path / "a.tfr", *[record(target=value) for value in wanted])
    assert [features["target"] for features in records(tmp_path / "a.tfr")] == wanted
