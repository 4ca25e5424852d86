"""What is in a directory of shards: its audit, how much of each contig is in which split, and some of its bases.

Example:
    python shards/show.py shards/hg38
    python shards/show.py shards/hg38 --windows 10 --picture hg38.png
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyena_dist.cli.status import interrupt_status
from hyena_dist.config.errors import UserError, one_line, write_remedy
from hyena_dist.runtime.files import check_picture
from hyena_dist.runtime.signals import raise_interrupts

if TYPE_CHECKING:  # numpy takes a second: --help should not
    from hyena_dist.data.manifest import Manifest

_SHOWN_BASES = 60


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR", help="directory that shards/build.py wrote")
    parser.add_argument("--contigs", type=int, default=20, metavar="N", help="show the N longest contigs (default 20)")
    parser.add_argument("--windows", type=int, default=3, metavar="N",
                        help=f"windows of {_SHOWN_BASES} bases to show of each split, at equal distances (default 3)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw splits along the contigs into this PNG or "
                                                                     "PDF; needs matplotlib")
    args = parser.parse_args(argv)
    if args.contigs < 0 or args.windows < 0:
        parser.error("--contigs and --windows must be 0 or more")
    return args


def longest(manifest: "Manifest", count: int) -> list[int]:
    """Numbers of the longest contigs, in their order in the shards."""
    numbers = sorted(range(len(manifest.contigs)), key=lambda number: -manifest.contigs[number].bases)
    return sorted(numbers[:count])


def coverage(manifest: "Manifest") -> dict[int, list[int]]:
    """Of each contig, by its number, the bases in each split."""
    from hyena_dist.data.splits import SPLITS
    found = {number: [0] * len(SPLITS) for number in range(len(manifest.contigs))}
    for row in manifest.segments:
        found[row.contig][row.split] += row.end - row.start
    return found


def examples(manifest: "Manifest", split: str, count: int) -> list[tuple[str, int, str]]:
    """Contig, first base and bases, with their case and codes, of windows at equal distances in a split."""
    from hyena_dist.data.splits import SPLITS
    rows = [(number, row) for number, row in enumerate(manifest.segments) if SPLITS[row.split] == split]
    total, found, passed = sum(row.end - row.start for _, row in rows), [], 0
    places = [total * (2 * i + 1) // (2 * count) for i in range(count)] if total else []
    for _, row in rows:
        size = row.end - row.start
        while places and places[0] < passed + size:
            start = min(places.pop(0) - passed, max(size - _SHOWN_BASES, 0))
            bases = manifest.read_sample(row.sample)[row.place + start : row.place + min(size, start + _SHOWN_BASES)]
            found.append((manifest.contigs[row.contig].name, row.start + start, bases.tobytes().decode()))
        passed += size
    return list(dict.fromkeys(found))


def _read_audit(directory: Path, manifest: "Manifest") -> dict[str, Any] | None:
    """The audit beside the shards; None where they were built before there was one."""
    from hyena_dist.config.plain import read_object
    from hyena_dist.data.audit import AUDIT
    from hyena_dist.data.errors import DataError
    path = directory / AUDIT
    if not path.exists():
        print(f"{path}: is not there: the shards were built without an audit; build them again to have one")
        return None
    try:
        content = read_object(path)
        bases = {split: row["bases"] for split, row in content["splits"].items() if split != "none"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: is damaged ({error!r}); remove it, or build the shards again") from None
    if bases != manifest.index.split_bases:
        raise DataError(f"{path}: is of other shards than those beside it; remove it, or build the shards again")
    return content


def _print_contigs(manifest: "Manifest", count: int) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    from hyena_dist.data.splits import SPLITS
    covered, shown = coverage(manifest), longest(manifest, count)
    table = Table(Column("contig", overflow="fold"), *(Column(name, justify="right") for name in ("bases", *SPLITS)))
    for number in shown:
        info = manifest.contigs[number]
        table.add_row(info.name, f"{info.bases:,}", *(f"{100 * bases / info.bases:.1f} %" for bases in covered[number]))
    console = Console()
    console.width = max(console.width, 100)
    console.print(table)
    if len(shown) < len(manifest.contigs):
        print(f"and {len(manifest.contigs) - len(shown):,} shorter contigs")


def run(args: argparse.Namespace) -> None:
    from hyena_dist.cli.tables import print_audit
    from hyena_dist.data.errors import DataError
    from hyena_dist.data.manifest import Manifest
    from hyena_dist.data.splits import SPLITS
    raise_interrupts()
    check_picture(args.picture)
    manifest = Manifest.load(args.directory)
    audit = _read_audit(args.directory, manifest)
    if audit is not None:
        try:
            print_audit(audit)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{args.directory / 'audit.json'}: is damaged ({error!r}); remove it, or build the shards "
                            f"again") from None
    _print_contigs(manifest, args.contigs)
    for split in SPLITS:
        for contig, start, bases in examples(manifest, split, args.windows):
            print(f"{split:5} {contig}:{start + 1:,} {bases}")
    if args.picture:
        from hyena_dist.cli.picture import draw
        try:
            draw(manifest, longest(manifest, args.contigs or 1), args.picture)
        except OSError as error:
            raise OSError(f"{args.picture}: cannot be written ({error}); "
                          f"{write_remedy(error, 'change --picture')}") from error
        print(f"{args.picture}: written")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        return interrupt_status(interrupt)
    except OSError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0
