"""Shards as a picture: which stretches of the contigs are in which split."""

from collections.abc import Sequence
from pathlib import Path

from hyena_dist.data.manifest import Manifest
from hyena_dist.data.splits import SPLITS

COLORS = {"train": "tab:blue", "val": "tab:red", "test": "tab:orange"}


def draw(manifest: Manifest, contigs: Sequence[int], path: Path) -> None:
    """Draw some contigs, a line each, with their splits in colours and what is in none in grey.

    Args:
        contigs: their numbers in the index.

    Raises:
        OSError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import EngFormatter

    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.28 * len(contigs)), layout="constrained")
    rows = {number: row for row, number in enumerate(contigs)}
    names = [manifest.contigs[number].name for number in contigs]
    axes.barh(range(len(contigs)), [manifest.contigs[number].bases for number in contigs], color="lightgrey",
              label="in no split")
    row_of = {manifest.contigs[number].name: row for number, row in rows.items()}
    for split in SPLITS:
        spans = [interval for interval in manifest.intervals(split) if interval.contig in row_of]
        if spans:
            axes.barh([row_of[span.contig] for span in spans], [span.bases for span in spans],
                      left=[span.start for span in spans], color=COLORS[split], label=split)
    axes.set_yticks(range(len(contigs)), [name if len(name) < 40 else name[:37] + "..." for name in names], fontsize=7)
    axes.invert_yaxis()
    bases = ", ".join(f"{split} {count:,}" for split, count in manifest.index.split_bases.items() if count)
    axes.set_title(f"{manifest.directory.name}: {bases} bases", fontsize=10)
    axes.xaxis.set_major_formatter(EngFormatter("b", sep=" "))
    figure.legend(fontsize=7, loc="outside right upper")
    try:
        figure.savefig(path, dpi=110)
    finally:
        plt.close(figure)
