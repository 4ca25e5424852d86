"""Every reader of a suite on small files of the true form, made by hand, with the headers and quirks of its publisher;
and on broken ones, which are refused in one line that names the file."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hyena_dist.config.errors import UserError
from hyena_dist.data.errors import DataError
from hyena_dist.data.tables import Example, reverse_complement
from hyena_dist.tasks.suites import SUITES
from hyena_dist.tasks.suites.description import MissingFiles
from hyena_dist.tasks.suites.prepare import look, prepare

Files = dict[str, str | bytes]


def write(directory: Path, files: Files) -> Path:
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") and content[:2] != b"\x1f\x8b" else content)
    return directory


def read(suite: str, task: str, data: Path) -> tuple[list[Example], list[str]]:
    found, notes = SUITES[suite].task(task), list[str]()
    return list(SUITES[suite].read(found, SUITES[suite].files(found, data), notes)), notes


def said(examples: list[Example]) -> set[tuple[str, bytes, str]]:
    return {(example.split, example.bases, example.label) for example in examples}


GUE: Files = {"GUE/mouse/0/train.csv": "sequence,label\nACGTAC,0\nTTGACA,1\n",
              "GUE/mouse/0/dev.csv": "sequence,label\r\nGGGCCC,1\r\n",
              "GUE/mouse/0/test.csv": "sequence,label\nTATAATN,0\n"}
GUE_HOLDS = {("train", b"ACGTAC", "0"), ("train", b"TTGACA", "1"), ("valid", b"GGGCCC", "1"), ("test", b"TATAATN", "0")}

WORM = "demo_human_or_worm"
TEXTS: Files = {f"{WORM}/train/human/0.txt": "ACGTacgt", f"{WORM}/train/human/10.txt": "CCNN\n",
                f"{WORM}/train/worm/1.txt": "TTTT", f"{WORM}/test/human/2.txt": "GGGG", f"{WORM}/test/worm/3.txt":
                "AAAC",
                f"{WORM}/.DS_Store": "x", f"{WORM}/train/.DS_Store": "x"}
TEXTS_HOLD = {("train", b"ACGTacgt", "human"), ("train", b"CCNN", "human"), ("train", b"TTTT", "worm"),
              ("test", b"GGGG", "human"), ("test", b"AAAC", "worm")}
ROWS = "id,region,start,end,strand\n"
INTERVALS: Files = {
    f"datasets/{WORM}/metadata.yaml": """version: 0
classes:
  human:
    type: fa.gz
    url: http://ftp.ensembl.org/pub/release-97/fasta/homo_sapiens/dna/Homo_sapiens.GRCh38.dna.toplevel.fa.gz
    extra_processing: ENSEMBL_HUMAN_GENOME
  worm:
    type: fa.gz
    url: http://ftp.ensembl.org/pub/release-104/fasta/Caenorhabditis_elegans.WBcel235.dna.toplevel.fa.gz
    extra_processing: null
""",
    f"datasets/{WORM}/train/human.csv.gz": ROWS + "0,chr1,1,5,+\n1,chr1,4,8,-\n",
    f"datasets/{WORM}/train/worm.csv.gz": ROWS + "0,II,0,3,+\n",
    f"datasets/{WORM}/test/human.csv.gz": ROWS + "7,chrX,0,4,+\n",
    f"datasets/{WORM}/test/worm.csv.gz": ROWS + "9,I,2,6,-\n",
    "fasta/Homo_sapiens.GRCh38.dna.toplevel.fa.gz": ">1 dna:chromosome\nAACCGGTTA\n>X\nTTTTA\n",
    "fasta/Caenorhabditis_elegans.WBcel235.dna.toplevel.fa.gz": ">I\nGGGACA\n>II\nCATCAT\n"}
INTERVALS_HOLD = {("train", b"ACCG", "human"), ("train", reverse_complement(b"GGTT"), "human"), ("train", b"CAT",
"worm"),
                  ("test", b"TTTT", "human"), ("test", reverse_complement(b"GACA"), "worm")}
MIRROR: Files = {f"{WORM}/train.csv": "seq,label\nACGT,0\n", f"{WORM}/test.csv": "seq,label\nTTTT,1\n"}

NT = "nucleotide_transformer_downstream_tasks"
FASTA: Files = {f"{NT}/H3/train.fna": ">YAL001C|3|0\nACGT\nAC\n>x|1\nTTTT\n", f"{NT}/H3/test.fna": ">y|10\nGGGN\n",
                f"{NT}_revised/H3K4me3/train.fna": ">z|1\nCCCC\n", f"{NT}_revised/H3K4me3/test.fna": ">z|0\nAAAA\n"}
FASTA_HOLDS = {("train", b"ACGTAC", "0"), ("train", b"TTTT", "1"), ("test", b"GGGN", "10")}

LRB: Files = {
    "regulatory_elements/promoter_dataset.csv":
        "CHROM,START,STOP,label,split\nchr1,1001,1201,1,train\nchr1,10,20,0,train\nchr1,3001,3101,0,test\n",
    "chromatin_features/histones_and_dnase.csv":
        'CHROM,POS,HISTONES,DNASE,split\nchr1,1101,"[0, 1, 1]","[1]",train\nchr1,2001,"[0, 0, 0]","[0]",test\n',
    "hg38.fa.gz": ">chr1\n" + "ACGTTGCAAC" * 500 + "\n", "hg19.fa.gz": ">chr1\n" + "ACGTTGCAAC" * 500 + "\n"}

CONFIG = """genome_fa hg19.fa str
EPI_file data/pairs.txt str
enhancer_tabix_file data/enhancers.bed.gz str
seq_len_cutoff 60 int
tss_flank_upstream 2 int
tss_flank_downstream 2 int
region_flank_upstream 1 int
region_flank_downstream 1 int
"""
PAIRS = ("gene_chrom\tgene_start\tgene_end\tregion_chrom\tregion_start\tregion_end\tgene_id\tgene_strand\tregion_id\t"
         "target\tsubset\tpvalue\n")
ETGP: Files = {
    "enhancer_target_gene/config/CRISPRi_EPI_K562_hg19.config": CONFIG,
    "enhancer_target_gene/data/pairs.txt": PAIRS
    + "chr1\t40\t60\tchr1\t11\t15\tg\t+\tr\tpositive\ttrain\t0.1\n"     # the gene lies behind: the other strand
    + "chr1\t5\t11\tchr1\t31\t34\tg\t-\tr\tnegative\tvalid\t0.1\n"      # the gene lies in front, on the minus strand
    + "chr1\t40\t60\tchr2\t11\t15\tg\t+\tr\tpositive\ttrain\t0.1\n"     # two chromosomes
    + "chr1\t2\t9\tchr1\t11\t15\tg\t+\tr\tnegative\ttest\t0.1\n",       # reaches past the contig's beginning
    "enhancer_target_gene/data/enhancers.bed.gz": "chr1\t11\t15\te1\nchr1\t20\t24\te2\n",
    "enhancer_target_gene/hg19.fa": ">chr1\n" + "ACGTTGCAAC" * 6 + "\n>chr2\nACGT\n"}

KINDS: dict[str, tuple[str, str, Files, set[tuple[str, bytes, str]] | None]] = {
    "gue": ("gue-dnabert2", "mouse/0", GUE, GUE_HOLDS),
    "gue side by side": ("gue-dnabert2", "mouse/0", {
        f"mouse_0_{Path(name).name}.gz": content for name, content in GUE.items()}, GUE_HOLDS),
    "gb texts": ("caduceus-gb", WORM, TEXTS, TEXTS_HOLD),
    "gb intervals": ("hyenadna-gb", WORM, INTERVALS, INTERVALS_HOLD),
    "gb mirror": ("caduceus-gb", WORM, MIRROR, {("train", b"ACGT", "0"), ("test", b"TTTT", "1")}),
    "nt": ("caduceus-nt", "original/H3", FASTA, FASTA_HOLDS),
    "nt revised": ("caduceus-nt", "revised/H3K4me3", FASTA, {("train", b"CCCC", "1"), ("test", b"AAAA", "0")}),
    "lrb": ("lrb", "regulatory_element_promoter", LRB, None),
    "lrb several": ("lrb", "chromatin_features_histone_marks", LRB, None),
    "etgp": ("dnalongbench", "enhancer_target_gene", ETGP, None),
}


@pytest.mark.parametrize("kind", [kind for kind, case in KINDS.items() if case[3] is not None])
def test_the_published_form_is_read(tmp_path: Path, kind: str) -> None:
    suite, task, files, holds = KINDS[kind]
    found, notes = read(suite, task, write(tmp_path, files))
    assert said(found) == holds
    assert notes == []


def test_the_order_is_of_the_names_not_of_the_directory(tmp_path: Path) -> None:
    found, _ = read("caduceus-gb", WORM, write(tmp_path, TEXTS))
    assert [example.name for example in found] == ["human/0", "human/10", "worm/1", "human/2", "worm/3"]


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


def test_the_two_collections_are_kept_apart(tmp_path: Path) -> None:
    """A task of the same name in the other collection is another task."""
    write(tmp_path, FASTA)
    with pytest.raises(MissingFiles, match="original/H3K4me3 is not there"):
        read("caduceus-nt", "original/H3K4me3", tmp_path)
    mixed = tmp_path / "mine"
    shutil.copytree(tmp_path / NT, mixed)
    assert len(read("caduceus-nt", "original/H3", mixed)[0]) == 3, "the control: its tasks show what it is"
    with pytest.raises(MissingFiles):
        read("caduceus-nt", "revised/enhancers", mixed)
    shutil.copytree(tmp_path / f"{NT}_revised" / "H3K4me3", mixed / "H2AFZ")
    with pytest.raises(UserError, match="holds H2AFZ, which is of the revised collection alone"):
        read("caduceus-nt", "original/H3", mixed)


def test_windows_of_the_long_range_benchmark_are_centred(tmp_path: Path) -> None:
    suite = SUITES["lrb"].of_length(100)
    write(tmp_path, LRB)
    task, notes, genome = suite.task("regulatory_element_promoter"), list[str](), b"ACGTTGCAAC" * 500
    found = list(suite.read(task, suite.files(task, tmp_path), notes))
    assert [(e.split, e.label, e.bases) for e in found] == [
        ("train", "1", genome[1050:1150]), ("test", "0", genome[3000:3100])]
    assert "1 of 3 windows reach past their contig and are left out" in notes[0]
    task = suite.task("chromatin_features_histone_marks")
    found = list(suite.read(task, suite.files(task, tmp_path), []))
    assert [(e.split, e.label, e.bases) for e in found] == [
        ("train", "1;2", genome[1050:1150]), ("test", "-", genome[1950:2050])]
    with pytest.raises(UserError, match="the sequences of caduceus-gb have a length of their own"):
        SUITES["caduceus-gb"].of_length(100)


def test_enhancer_and_target_gene(tmp_path: Path) -> None:
    """The stretch from region to gene, other enhancers masked, from the side of the gene."""
    found, notes = read("dnalongbench", "enhancer_target_gene", write(tmp_path, ETGP))
    genome = b"ACGTTGCAAC" * 6
    hidden = genome[:20] + b"NNNN" + genome[24:]
    by_split = {example.split: example for example in found}
    assert by_split["train"].bases == reverse_complement(hidden[10:43]), "region 10 to 16, gene 38 to 43"
    both = hidden[:11] + b"NNNN" + hidden[15:]
    assert by_split["valid"].bases == both[8:35], "gene 8 to 13, region 30 to 35, one enhancer from 11 on"
    assert by_split["test"].bases == genome[:16], "gene 0 to 5, region 10 to 16"
    assert [example.label for example in found] == ["positive", "negative", "negative"]
    assert "1 pairs are left out" in notes[0]


def test_a_missing_file_says_where_its_authors_publish_it(tmp_path: Path) -> None:
    for suite in SUITES.values():
        task = next(task for task in suite.tasks if not task.lacks)
        with pytest.raises(MissingFiles, match="is not there: .*https://") as caught:
            suite.files(task, tmp_path)
        assert "\n" not in str(caught.value)


Change = Callable[[Files], Files]


def put(name: str, content: str | bytes) -> Change:
    return lambda files: {**files, name: content}


def swap(old: str, new: str, part: str = "") -> Change:
    """Replace text in every file whose name has `part` in it."""
    return lambda files: {name: content.replace(old, new, 1) if part in name and isinstance(content, str) else content
                          for name, content in files.items()}


def drop(part: str) -> Change:
    return lambda files: {name: content for name, content in files.items() if part not in name}


def cut_short(part: str) -> Change:
    def change(files: Files) -> Files:
        [name] = [name for name in files if part in name]
        content = files[name]
        assert isinstance(content, str)
        return {**files, name: gzip.compress(content.encode())[:-6]}
    return change


EPI = "enhancer_target_gene/data/pairs.txt"
BROKEN: dict[str, list[tuple[Change, str]]] = {
    "gue": [
        (drop("dev"), "the dev file of mouse/0 is not there"), (put("GUE/mouse/0/dev.csv", ""), "the file is empty"),
        (swap("sequence,label", "seq,label", "train"), "column 'sequence' is not in the header"),
        (swap("ACGTAC,0", "ACGTAC", "train"), "line 2: has 1 columns and the header has 2"),
        (swap("ACGTAC", "AC-TAC", "train"), "line 2: byte b'-' at base 3"),
        (swap("ACGTAC,", ",", "train"), "line 2: has no sequence"), (swap("TTGACA,1", "TTGACA,", "train"),
        "has no label"),
        (put("GUE/mouse/0/train.csv", b"sequence,label\nACGT,\xff\n"), "not text of UTF-8"),
        (put("GUE/mouse/0/train.csv", b"PK\x03\x04rest"), "zip archive"),
        (put("GUE/mouse/0/train.csv.gz", GUE["GUE/mouse/0/train.csv"]), "are all of train"),
        (put("GUE/mouse/0/test.csv", "version https://git-lfs.github.com/spec/v1\n"), "git-lfs pointer"),
        (swap("sequence,label", "sequence,label,label", "test"), "'label' is twice in the header"),
    ],
    "gb texts": [
        (drop("test/worm"), "lacks 'worm': the classes"), (drop("test"), "lacks 'human'"),
        (put(f"{WORM}/train/mouse/1.txt", "AC"), "has 'mouse': the classes"),
        (put(f"{WORM}/train/worm/1.txt", ""), "1.txt: has no sequence"),
        (put(f"{WORM}/train/worm/1.txt", ">seq\nACGT\n"), "1.txt: is FASTA"),
        (put(f"{WORM}/train/worm/1.txt", "ACGT*"), "byte b'\\*' at base 5"),
        (put(f"{WORM}/train/worm/1.txt", b"\xff\xfe"), "is not an IUPAC code"),
        (put(f"{WORM}/train/worm/1.txt", "PK\x03\x04"), "is not an IUPAC code"),
        (lambda files: {("x.txt" in name and name) or name.replace("worm/3.txt", "worm/3.fa"): content
                        for name, content in files.items()}, "holds no .txt files"),
        (lambda _: {f"{WORM}/readme": "x"}, "directory of this data set is not there"),
    ],
    "gb intervals": [
        (drop("metadata"), "the file that names the genomes of intervals is not there"),
        (swap("classes:", "klasses:", "metadata"), "has no `classes`"),
        (put(f"datasets/{WORM}/metadata.yaml", "classes: [\n"), "is no valid YAML"),
        (drop("Homo_sapiens"), "the genome that the class 'human'.*its authors name http"),
        (drop("test/worm"), "lacks 'worm'"), (swap("chr1,1,5", "chr1,1,50", "train/human"), "lies outside the 9 bases"),
        (swap("chr1,1,5", "chr7,1,5", "train/human"), "contig 'chr7' is not in"),
        (swap("chr1,1,5", "chr1,5,5", "train/human"), "start 5 is not below end 5"),
        (swap("chr1,1,5", "chr1,one,5", "train/human"), "start is 'one', no whole number"),
        (swap("5,+", "5,*", "train/human"), "strand '\\*' must be"),
        (swap("strand", "direction", "train/human"), "column 'strand' is not in the header"),
        (lambda files: {name.replace("train/human.csv.gz", "train/human"): content for name, content in files.items()},
         "train/human.csv: the intervals of this class are not there"),
        (cut_short("test/human"), "cut short"),
    ],
    "gb mirror": [
        (drop("test"), "directory of this data set is not there"), (swap("seq,", "dna,", "train"),
        "no column `sequence` or"),
        (swap("label", "class", "test"), "column 'label' is not in"), (swap("ACGT", "AC T", "train"),
        "byte b' ' at base 3"),
    ],
    "nt": [
        (drop("H3/test"), "the test file of original/H3 is not there"), (put(f"{NT}/H3/train.fna", ""),
        "the file is empty"),
        (swap(">x|1", ">x", "H3/train"), "the header 'x' has no label"), (swap("TTTT", "", "H3/train"),
        "has no sequence"),
        (swap("TTTT", "TTXT", "H3/train"), "byte b'X' at base 3"), (swap(">y|10", ">y|", "H3/test"), "has no label"),
        (swap(">y|10", ">", "H3/test"), "a header without a name"), (put(f"{NT}/H3/test.fna", b"PAR1 and"),
        "is damaged"),
        (put(f"{NT}/H3/test.csv", "sequence,label\nAC,1\n"), "are all of test"),
        (put(f"{NT}/H3/test.fna", "version https://git-lfs.github.com/spec/v1\n"), "git-lfs"),
    ],
    "lrb": [
        (drop("hg38"), "the genome hg38 of regulatory_element_promoter is not there"),
        (drop("promoter_dataset"), "the table of regulatory_element_promoter is not there"),
        (swap("CHROM", "chrom", "promoter"), "'CHROM' is not in the header"), (swap("1001", "x", "promoter"),
        "START is 'x'"),
        (swap("1001,1201", "1201,1001", "promoter"), "STOP 1001 is not behind START 1201"),
        (swap("1,train", ",train", "promoter"), "has no label"), (swap("1,train", "1,training", "promoter"),
        "split 'training'"),
        (swap("chr1,1001", "chr9,1001", "promoter"), "contig 'chr9' is not in"), (put("hg38.fa.gz", "ACGT"),
        "hg38.fa.gz"),
        (cut_short("hg38"), "cut short"),
    ],
    "lrb several": [
        (swap("[0, 1, 1]", "[0, 1", "chromatin"), "is no list of 0 and 1"),
        (swap("[0, 1, 1]", "[0, 2, 1]", "chromatin"), "is no list of 0 and 1"),
        (swap("[0, 1, 1]", "__import__('os')", "chromatin"), "is no list of 0 and 1"),
        (swap("[0, 1, 1]", "[]", "chromatin"), "is no list of 0 and 1"),
        (swap("[0, 1, 1]", "{[0]: 1}", "chromatin"), "is no list of 0 and 1"),
        (swap("HISTONES", "MARKS", "chromatin"), "'HISTONES' is not in the header"),
    ],
    "etgp": [
        (drop(".config"), "the configuration of enhancer_target_gene is not there"),
        (drop("pairs"), "calls EPI_file is not there"), (drop("hg19.fa"), "calls genome_fa is not there"),
        (swap("seq_len_cutoff 60 int\n", "", "config"), "has no seq_len_cutoff"),
        (swap("cutoff 60", "cutoff long", "config"), "seq_len_cutoff is 'long'"),
        (swap("cutoff 60", "cutoff " + "6" * 5000, "config"), "seq_len_cutoff is '6666"),
        (swap("positive", "yes", "pairs"), "target 'yes' must be"), (swap("train", "fit", "pairs"),
        "subset 'fit' must be"),
        (swap("\t40\t", "\t-\t", "pairs"), "gene_start is '-'"), (swap("subset", "part", "pairs"),
        "'subset' is not in"),
        (swap("chr1\t11\t15\te1", "chr1\t15\t11", "enhancers"), "start < end"),
        (swap(">chr1\n", ">1\n", "hg19"), "contig 'chr1' is not in"),
    ],
}


@pytest.mark.parametrize(("kind", "number"), [(kind, n) for kind, cases in BROKEN.items() for n in range(len(cases))])
def test_broken_files_are_one_line(tmp_path: Path, kind: str, number: int) -> None:
    suite, task, files, _ = KINDS[kind]
    change, wanted = BROKEN[kind][number]
    with pytest.raises(UserError, match=wanted) as caught:
        read(suite, task, write(tmp_path, change(files)))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


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


def test_every_suite_and_task_is_as_the_table_needs_it() -> None:
    from hyena_dist.train.predictions import METRICS

    metrics = {metric for names in METRICS.values() for metric in names}
    assert len(SUITES["gue-dnabert2"].tasks) == 28
    for suite in SUITES.values():
        names = [task.name for task in suite.tasks]
        assert len(set(names)) == len(names)
        assert {task.metric for task in suite.tasks} <= metrics
        for row in suite.published:
            assert set(row.values) <= set(names), f"{suite.name}: {row.model}"
            assert all(0 < value < 1 for value in row.values.values())


@pytest.mark.parametrize(("suite", "model", "values"), [
    ("caduceus-gb", "HyenaDNA (2x128, pretrained by Caduceus)", {
        "human_nontata_promoters": .944, "human_ocr_ensembl": .783, "human_ensembl_regulatory": .869}),
    ("hyenadna-gb", "HyenaDNA (2x128)", {"human_nontata_promoters": .966, "human_ocr_ensembl": .809}),
    ("hyenadna-gb", "CNN", {"human_ensembl_regulatory": .933, "human_ocr_ensembl": .680}),
    ("caduceus-nt", "HyenaDNA (2x256)", {"original/H3K4me3": .612, "original/H4ac": .637,
                                         "original/promoter_tata": .967, "original/splice_sites_acceptors": .966}),
    ("caduceus-nt", "NT-2.5B multi-species", {"original/H3K14ac": .550, "original/splice_sites_donors": .984}),
    ("gue-dnabert2", "DNABERT-2 (117M)", {"EMP/H3": .7827, "tf/2": .6652, "prom/prom_300_notata": .9427}),
    ("dnalongbench", "JanusDNA", {"eqtl/Nerve_Tibial": .913, "eqtl/Skin_Sun_Exposed_Lower_leg": .845}),
])
def test_published_numbers_stand_at_their_tasks(suite: str, model: str, values: dict[str, float]) -> None:
    """A row of numbers in another order than the tasks would be believed."""
    [row] = [row for row in SUITES[suite].published if row.model == model]
    assert {task: row.values[task] for task in values} == values
