"""An audit of shards as tables for people."""

from typing import Any


def _share(count: int, of: int) -> str:
    return f"{100 * count / of:.1f} %" if of else "-"


def _counts(row: dict[str, Any]) -> list[str]:
    gc = "-" if row["gc_share"] is None else f"{100 * row['gc_share']:.1f} %"
    return [f"{row['bases']:,}", gc, _share(row["n"], row["bases"]), _share(row["lower_case"], row["bases"]),
            f"{sum(row['other_codes'].values()):,}"]


def print_audit(content: dict[str, Any]) -> None:
    """Print what `data.audit.audit` says: a row for each assembly, and one for each split."""
    from rich.console import Console
    from rich.table import Column, Table

    columns = [Column(name, justify="right", no_wrap=True) for name in ("bases", "G and C", "N", "lower", "codes")]
    console = Console()
    console.width = max(console.width, 120)  # a file has no width
    names = [Column(name, overflow="fold") for name in ("assembly", "species")]
    assemblies = Table(*names, "contigs", "N50", *columns)
    for row in content["assemblies"]:
        assemblies.add_row(row["assembly"], row["species"], f"{row['contigs']:,}", f"{row['n50']:,}", *_counts(row))
    console.print(assemblies)
    copies = content["copies"]
    splits = Table("split", *(column.copy() for column in columns), "windows", "again in split", "also train")
    for name, row in content["splits"].items():
        again = copies["splits"].get(name, {})
        if name != "none" or row["bases"]:
            splits.add_row(name, *_counts(row), *(f"{again[key]:,}" if key in again else "-" for key in
                                                  ("windows", "again_in_split", "also_train")))
    console.print(splits)
    console.print(f"windows of {copies['window_bases']} bases, at one place in {copies['sampled_one_in']}, of "
                  f"either strand; lower is soft-masked, codes are IUPAC's but N", soft_wrap=True)
