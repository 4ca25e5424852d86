"""Genomic Benchmarks (Gresova et al. 2023), by two protocols: that of Caduceus, whose table is cited most, and that of
HyenaDNA, whose settings were never published in full.

People have the data in three forms: a directory of one bare sequence a file, as the pip package writes it; intervals
as in the repository, which are cut out of genomes; and the tables of the mirrors at Hugging Face.
"""

from collections.abc import Iterator
from pathlib import Path

import yaml

from hyena_dist.config.errors import one_line
from hyena_dist.config.plain import open_regular
from hyena_dist.data.blocks import said_in_one_line
from hyena_dist.data.contigs import sequence
from hyena_dist.data.errors import DataError
from hyena_dist.data.tables import Example, reverse_complement
from hyena_dist.tasks.suites.description import MissingFiles, Published, Suite, Task
from hyena_dist.tasks.suites.rows import TABLES, Interval, cut, example_of, table_rows, whole_number, with_ending

WHERE = ("its authors publish it at https://github.com/ML-Bioinfo-CEITEC/genomic_benchmarks; `pip install "
         "genomic-benchmarks` writes the sequences into ~/.genomic_benchmarks, which is then --data")
_SPLITS = ("train", "test")
_INTERVALS = ("id", "region", "start", "end", "strand")


def files(task: Task, data: Path) -> list[Path]:
    """The directory of a data set with what its intervals are cut out of, or the tables of a mirror."""
    places = [data / task.name, data / "datasets" / task.name, *[data] * (data.name == task.name)]
    for place in places:
        if (place / "train").is_dir():
            return [place, *_genomes(place, data)]
        for base in (place, place / "data"):
            tables = [with_ending(base / split, TABLES) for split in _SPLITS] if base.is_dir() else []
            if tables and all(tables):
                return [path for paths in tables for path in paths]
    if whole := with_ending(data / task.name, TABLES):  # one table with a column of splits
        return whole
    raise MissingFiles(f"{data / task.name}: the directory of this data set is not there", WHERE)


def _genomes(place: Path, data: Path) -> list[Path]:
    """The FASTA files that the intervals of a directory are cut out of; none where it holds sequences."""
    if not list((place / "train").glob("*.csv*")):
        return []
    found: dict[str, Path] = {}
    for name, entry in _metadata(place).items():
        file = str(entry.get("url", "")).rpartition("/")[2]
        folders = (place, data, data / "fasta", data / "genomes", data.parent / "fasta")
        candidates = [folder / file for folder in folders]
        path = next((candidate for candidate in candidates if file and candidate.is_file()), None)
        if path is None:
            raise MissingFiles(f"{data / file}: the genome that the class {name!r} of {place.name} is cut out of is "
                               "not there", f"its authors name {entry.get('url')}")
        found[str(path)] = path
    return list(found.values())


def _metadata(place: Path) -> dict[str, dict[str, object]]:
    """What metadata.yaml says of each class."""
    path = place / "metadata.yaml"
    if not path.is_file():
        raise MissingFiles(f"{path}: the file that names the genomes of intervals is not there", WHERE)
    with said_in_one_line(path), open_regular(path) as file:
        try:
            found = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise DataError(f"{path}: is no valid YAML ({one_line(error)}): copy or download it again") from None
    classes = found.get("classes") if isinstance(found, dict) else None
    if not isinstance(classes, dict) or not all(isinstance(entry, dict) for entry in classes.values()):
        raise DataError(f"{path}: has no `classes` with a url each: copy or download it again")
    return {str(name): entry for name, entry in classes.items()}


def read(task: Task, paths: list[Path], notes: list[str]) -> Iterator[Example]:
    """See `description.Reader`."""
    if not paths[0].is_dir():
        yield from _tables(paths)
    elif len(paths) > 1:
        yield from _intervals(task, paths[0], paths[1:])
    else:
        for split in _SPLITS:
            for name in _classes(task, paths[0] / split, ""):
                yield from _texts(paths[0] / split / name, name, split)
    del notes


def _classes(task: Task, folder: Path, ending: str) -> tuple[str, ...]:
    """The classes of a data set, each of which has its directory, or its file with this ending, and no other has.

    Raises:
        DataError: they are others than those that its authors publish.
    """
    found = {path.name.removesuffix(".gz").removesuffix(ending) for path in folder.glob("*")
             if not path.name.startswith(".") and (path.is_dir() or ending)}
    if found != set(task.classes):
        odd = sorted(found ^ set(task.classes))[0]
        raise DataError(f"{folder}: {'has' if odd in found else 'lacks'} {odd!r}: the classes of {task.name} are "
                        f"{', '.join(task.classes)}")
    return task.classes


def _texts(folder: Path, label: str, split: str) -> Iterator[Example]:
    """One bare sequence a file, in the order of their names: that of a directory differs between machines."""
    names = sorted(path.name for path in folder.glob("*.txt"))
    if not names:
        raise DataError(f"{folder}: holds no .txt files of sequences: {WHERE}")
    for name in names:
        path = folder / name
        with said_in_one_line(path), open_regular(path) as file:
            text = file.read()
        if text.lstrip().startswith(b">"):
            raise DataError(f"{path}: is FASTA, and the data set has bare sequences: write it without the header")
        yield Example(f"{label}/{path.stem}", sequence(b"".join(text.split()), str(path)).tobytes(), label, str(path),
                      split)


def _intervals(task: Task, place: Path, genomes: list[Path]) -> Iterator[Example]:
    """Intervals of CLASS.csv.gz: 0-based, half-open, of the other strand where it is "-"."""
    of_genome: dict[Path, list[Interval]] = {path: [] for path in genomes}
    metadata = _metadata(place)
    for split in _SPLITS:
        for label in _classes(task, place / split, ".csv"):
            entry = metadata.get(label)
            if entry is None:
                raise DataError(f"{place / 'metadata.yaml'}: does not name the class {label!r}: copy it again")
            genome = next(path for path in genomes if path.name == str(entry["url"]).rpartition("/")[2])
            tables = with_ending(place / split / label, (".csv", ".csv.gz"))
            if not tables:
                raise DataError(f"{place / split / label}.csv: the intervals of this class are not there, only "
                                "something else of its name: copy or download them again")
            of_genome[genome] += [_interval(values, where, label, split) for path in tables for where, values in
                                  table_rows(path, _INTERVALS)]
    for genome, intervals in of_genome.items():
        for interval, bases in cut(intervals, genome, outside="refuse", spellings=_spellings):
            yield Example(interval.name, reverse_complement(bases) if interval.reverse else bases, interval.label,
                          interval.where, interval.split, interval.contig)


def _interval(values: dict[str, str], where: str, label: str, split: str) -> Interval:
    start, end = (whole_number(values, column, where) for column in ("start", "end"))
    if start >= end:
        raise DataError(f"{where}: start {start} is not below end {end}: copy or download the file again")
    if values["strand"] not in ("+", "-", ".", ""):
        raise DataError(f"{where}: strand {values['strand']!r} must be + or -: copy or download the file again")
    return Interval(values["region"], start, end, label, split, where, reverse=values["strand"] == "-")


def _spellings(name: str) -> tuple[str, ...]:
    """What the data set may call a contig of Ensembl's file: chromosomes of human have "chr" in front there,
    transcripts no version."""
    return name, f"chr{name}", name.partition(".")[0]


def _tables(paths: list[Path]) -> Iterator[Example]:
    """Rows of `seq` or `sequence` and `label`, of a file for each split, or with a column `split`."""
    for path in paths:
        name = path.name.partition(".")[0].partition("-")[0]
        split = name if name in _SPLITS else ""
        columns: list[str] = []
        for where, values in table_rows(path, ("label",) if split else ("label", "split")):
            columns = columns or [column for column in ("sequence", "seq") if column in values]
            if not columns:
                raise DataError(f"{path}: line 1: has no column `sequence` or `seq`: give it as its authors publish it")
            if not split and values["split"] not in _SPLITS:
                raise DataError(f"{where}: split {values['split']!r} must be train or test")
            yield example_of(values, where, split or values["split"], bases=columns[0])


_NAMES = {
    "dummy_mouse_enhancers_ensembl": (("negative", "positive"), 1024),
    "demo_coding_vs_intergenomic_seqs": (("coding_seqs", "intergenomic_seqs"), 200),
    "demo_human_or_worm": (("human", "worm"), 200),
    "human_enhancers_cohn": (("negative", "positive"), 500),
    "human_enhancers_ensembl": (("negative", "positive"), 512),
    "human_ensembl_regulatory": (("enhancer", "ocr", "promoter"), 512),
    "human_nontata_promoters": (("negative", "positive"), 251),
    "human_ocr_ensembl": (("negative", "positive"), 512),
}
"""Of the eight data sets that both papers have: classes, and bases that Caduceus keeps."""


def _row(*values: float) -> dict[str, float]:
    return dict(zip(_NAMES, values, strict=True))


_COMMON: dict[str, object] = {"finetune.task": "classification", "finetune.pooling": "mean", "train.seed": 1,
                              "finetune.seeds": 5, "finetune.valid_fraction": 0.1, "optim.weight_decay": 0.1}

CADUCEUS = Suite(
    name="caduceus-gb",
    protocol='what Caduceus calls 5-fold cross-validation: seeds 1 to 5, each with a random 90:10 split of the train '
             'part; 10 epochs, cosine with 1 % of warm-up, weight decay 0.1; batch of 128 or 256 and reverse '
             'complements in training or not, chosen on the validation parts; accuracy on the test part, read once for '
             'each seed',
    differs="weights are kept by the validation loss, not its accuracy; float32, not fp16; right padding, which is "
            "neither scored nor pooled; classes are numbered by their sorted names; longer sequences are cut behind",
    where=WHERE,
    tasks=tuple(Task(name=name, metric="accuracy", classes=classes, crop=crop)
                for name, (classes, crop) in _NAMES.items()),
    keys={**_COMMON, "finetune.epochs": 10, "optim.lr": 6e-4},
    grid={"finetune.rc": ("none", "augment"), "train.global_batch_size": (128, 256)}, files=files, read=read,
    published=(Published(model="HyenaDNA (2x128, pretrained by Caduceus)", checked=False,
                         source="Schiff et al. 2024, arXiv 2403.03234, Table 1",
                         values=_row(.780, .904, .964, .729, .849, .869, .944, .783)),))

HYENADNA = Suite(
    name="hyenadna-gb",
    protocol="5 seeds, each with a random 90:10 split of the train part; 100 epochs, batch 256, weight decay 0.1, mean "
             "pooling, reverse complements in training; learning rate of 1e-4 or 6e-4, chosen on the validation parts; "
             "accuracy on the test part, read once for each seed",
    differs="HyenaDNA's numbers are the best epoch by the TEST part, with settings for each data set that were never "
            "published: they flatter, and nobody can run them again; here the test part chooses nothing",
    where=WHERE,
    tasks=tuple(Task(name=name, metric="accuracy", classes=classes) for name, (classes, _) in _NAMES.items()),
    keys={**_COMMON, "finetune.epochs": 100, "finetune.rc": "augment", "train.global_batch_size": 256},
    grid={"optim.lr": (1e-4, 6e-4)}, files=files, read=read,
    published=tuple(Published(model=model, source="Nguyen et al. 2023, arXiv 2306.15794, Table 4.1",
                              values=_row(*values)) for model, values in (
        ("HyenaDNA (2x128)", (.851, .913, .966, .742, .892, .938, .966, .809)),
        ("CNN", (.690, .876, .930, .695, .689, .933, .846, .680)),
        ("DNABERT", (.669, .925, .965, .740, .857, .881, .856, .751)),
        ("GPT", (.801, .888, .956, .705, .835, .915, .877, .730)))))
