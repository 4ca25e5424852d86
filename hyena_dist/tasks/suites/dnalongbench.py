"""DNALONGBENCH (Cheng et al. 2025). Its published loader of regulatory activity takes the test split where it is asked
for the validation split; here weights are always chosen by `valid`.

Enhancer and target gene are a table of pairs with a column `subset`, a genome, and a BED of all enhancers: the sequence
reaches from the region that is tested to the start of the gene, and other enhancers in between are masked.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from hyena_dist.data.bed import Bed, Span, text_rows
from hyena_dist.data.errors import DataError
from hyena_dist.data.tables import Example, reverse_complement
from hyena_dist.tasks.suites import basenji
from hyena_dist.tasks.suites.description import Published, Suite, Task, first_of
from hyena_dist.tasks.suites.rows import Interval, cut, table_rows, whole_number

WHERE = ("its authors publish it by links in the README of https://github.com/wenduocheng/DNALongBench; give the "
         "directory with enhancer_target_gene, eQTL and the others as --data")
_CONFIG = "config/CRISPRi_EPI_K562_hg19.config"
_COLUMNS = ("gene_chrom", "gene_start", "gene_end", "region_chrom", "region_start", "region_end", "gene_strand",
            "target", "subset")
_NUMBERS = ("seq_len_cutoff", "tss_flank_upstream", "tss_flank_downstream", "region_flank_upstream",
            "region_flank_downstream")
_FILES = ("EPI_file", "genome_fa", "enhancer_tabix_file")


def files(task: Task, data: Path) -> list[Path]:
    """Of enhancer and target gene the configuration, and the three files that it names; of the others see `basenji`."""
    if task.name.startswith("contact_map/"):
        return basenji.contact_files(data, WHERE)
    if task.name.startswith("regulatory_activity/"):
        return basenji.activity_files(task, data, WHERE)
    config = first_of([data / "enhancer_target_gene" / _CONFIG, data / _CONFIG, data / Path(_CONFIG).name],
                      f"the configuration of {task.name}", WHERE)
    root = config.parent.parent if config.parent.name == "config" else config.parent
    keys = _keys(config)
    return [config, *(first_of([root / keys[name], root / Path(keys[name]).name],
                               f"the file that {config} calls {name}", WHERE) for name in _FILES)]


def _keys(path: Path) -> dict[str, str]:
    """The values of a configuration, which has lines of key, value and type.

    Raises:
        DataError: one that is needed is missing, or no number where it must be one.
    """
    found = {fields[0]: fields[1] for _, fields in text_rows(path, "a configuration") if len(fields) > 1}
    for name in (*_FILES, *_NUMBERS):
        if name not in found:
            raise DataError(f"{path}: has no {name}: copy or download it again")
        if name in _NUMBERS and not re.fullmatch("[0-9]{1,18}", found[name]):
            raise DataError(f"{path}: {name} is {found[name]!r}, no whole number: copy or download it again")
    return found


def read(task: Task, paths: list[Path], notes: list[str]) -> Iterator[Example]:
    """See `description.Reader`."""
    if task.name.startswith("contact_map/"):
        yield from basenji.contacts(task, paths)
        return
    if task.name.startswith("regulatory_activity/"):
        yield from basenji.activity(paths)
        return
    config, table, genome, enhancers = paths
    numbers = {name: int(value) for name, value in _keys(config).items() if name in _NUMBERS}
    masked = Bed(enhancers).rows
    pairs, gaps, flipped, left_out = _pairs(table, numbers)
    if left_out:
        notes.append(f"{left_out:,} pairs are left out, as the suite's loader does: gene and region lie on two "
                     f"chromosomes, or more than {numbers['seq_len_cutoff']:,} bases apart, or the strand is not known")
    for interval, bases in cut(pairs, genome, outside="fill"):
        hidden = bytearray(bases)
        start, end = gaps[interval.where]
        for row in masked.get(interval.contig, []):
            if row.start < end and row.end > start and interval.start < row.start and row.end < interval.end:
                hidden[row.start - interval.start : row.end - interval.start] = b"N" * (row.end - row.start)
        found = reverse_complement(bytes(hidden)) if interval.where in flipped else bytes(hidden)
        yield Example(interval.name, found[: numbers["seq_len_cutoff"]], interval.label, interval.where, interval.split,
                      interval.contig)


def _pairs(table: Path, numbers: dict[str, int]) -> tuple[list[Interval], dict[str, Span], set[str], int]:
    """The stretch of each pair, the gap in it between region and gene by its place in the table, the places of those
    that are read from the other strand, and how many pairs were left out."""
    pairs: list[Interval] = []
    gaps: dict[str, Span] = {}
    flipped: set[str] = set()
    left_out = 0
    for where, values in table_rows(table, _COLUMNS):
        subset, target, strand = values["subset"], values["target"], values["gene_strand"]
        if subset not in ("train", "valid", "test"):
            raise DataError(f"{where}: subset {subset!r} must be train, valid or test")
        if target not in ("positive", "negative"):
            raise DataError(f"{where}: target {target!r} must be positive or negative")
        gene, gene_end, start, end = (whole_number(values, name, where) for name in (
            "gene_start", "gene_end", "region_start", "region_end"))
        tss = gene if strand == "+" else gene_end - 1
        tss_start, tss_end = tss - numbers["tss_flank_upstream"], tss + 1 + numbers["tss_flank_downstream"]
        start, end = start - numbers["region_flank_upstream"], end + numbers["region_flank_downstream"]
        distance = max(0, max(tss_start, start) - min(tss_end, end))
        if (values["gene_chrom"] != values["region_chrom"] or strand not in ("+", "-")
                or distance > numbers["seq_len_cutoff"]):
            left_out += 1
            continue
        pairs.append(Interval(values["region_chrom"], min(tss_start, start), max(tss_end, end), target, subset, where))
        gaps[where] = (end, tss_start) if tss_start > end else (tss_end, start)
        if gene > end:
            flipped.add(where)
    return pairs, gaps, flipped, left_out


_PAIR = "a head for pairs of sequences, the one with the variant and the one without"
_TISSUES = ("Adipose_Subcutaneous", "Artery_Tibial", "Cells_Cultured_fibroblasts", "Muscle_Skeletal", "Nerve_Tibial",
            "Skin_Not_Sun_Exposed_Suprapubic", "Skin_Sun_Exposed_Lower_leg", "Thyroid", "Whole_Blood")
_EQTL = tuple(f"eqtl/{tissue}" for tissue in _TISSUES)
_ETGP = "enhancer_target_gene"

DNALONGBENCH = Suite(
    name="dnalongbench",
    protocol="the published train, valid and test splits; batch 32, learning rate 6e-4, weight decay 0.1, cosine with "
             "1 % of warm-up, the whole model trained; weights by the loss on `valid`; AUROC on test; 3 seeds",
    differs="the true validation split chooses: the published loader of regulatory activity takes the test split for "
            "it, so that published numbers may be selected on test; sequences have their true lengths, no N behind",
    where=WHERE,
    tasks=(
        Task(name=_ETGP, metric="auroc", splits=basenji.SPLITS),
        *(Task(name=name, metric="auroc", lacks=_PAIR) for name in _EQTL),
        *(Task(name=f"contact_map/{cells}", metric="pearson", splits=basenji.SPLITS, keys={
            "finetune.task": "pairs", "finetune.bin_size": 2048, "finetune.bins_cut": basenji.CONTACT_CUT,
            "finetune.diagonals": 2}) for cells in basenji.CELLS),
        *(Task(name=f"regulatory_activity/{organism}", metric="pearson", splits=basenji.SPLITS, keys={
            "finetune.task": "binned", "finetune.bin_size": 128, "finetune.loss": "poisson",
            "finetune.bins_cut": (basenji.ACTIVITY_WINDOW // 128 - basenji.ACTIVITY_BINS) // 2})
          for organism in ("human", "mouse")),
        Task(name="transcription_initiation", metric="pearson", lacks="a reader of bigWig tracks"),
    ),
    keys={"finetune.task": "classification", "finetune.pooling": "mean", "finetune.rc": "none", "finetune.seeds": 3,
          "finetune.epochs": 10, "train.global_batch_size": 32, "optim.lr": 6e-4, "optim.weight_decay": 0.1},
    grid={}, files=files, read=read,
    published=(
        Published(model="HyenaDNA", source="README of the suite", values={_ETGP: .828}),
        Published(model="expert model", source="README of the suite", values={_ETGP: .926}),
        Published(model="CNN", source="README of the suite", values={_ETGP: .797}),
        Published(model="Caduceus-Ph", source="README of the suite; eQTL from the README of JanusDNA", values={
            _ETGP: .826, **dict(zip(_EQTL, (.759, .690, .689, .789, .841, .812, .691, .703, .768), strict=True))}),
        Published(model="JanusDNA", source="README of JanusDNA", values=dict(zip(
            _EQTL, (.768, .851, .801, .864, .913, .903, .845, .792, .821), strict=True)))))
