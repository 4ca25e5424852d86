"""Score all finished points of a sweep on the same held-out bases, and compare them group by group: tables in Markdown
and a picture. The reports in docs/studies were made with it.

example: python launchers/studies.py configs/studies/kmers.yaml --shards runs/studies/all --by species --out kmers
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks stand beside the package, not in it

from hyena_dist.config.errors import ConfigError, UserError, one_line
from hyena_dist.runtime.files import check_directory


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="the sweep's file")
    parser.add_argument("--shards", required=True, metavar="DIR", help="the shards whose held-out bases are scored")
    parser.add_argument("--split", default="val", choices=("val", "test"), help="which of them (val)")
    parser.add_argument("--regions", type=Path, metavar="BED", help="rows of contig, start, end, class")
    parser.add_argument("--by", nargs="*", default=[], metavar="WHAT", help="species, 'G and C', case or region")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="of the settings, in the order of the file")
    parser.add_argument("--against", metavar="NAME", help="the setting that others are compared with (the first)")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="write PATH.md and PATH-WHAT.png")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 for a mistake of the user's."""
    args = parse_args(argv)
    from benchmarks.studies import draw, score_sweep, tables  # numpy and torch take seconds, --help should not

    try:
        check_directory("--out", args.out)
        scores = score_sweep(args.config, args.names, shards=args.shards, split=args.split, regions=args.regions,
                             by=args.by)
        base = next((each for each in scores if each.name == (args.against or scores[0].name)), None)
        if base is None:
            raise ConfigError(f"--against {args.against}: finished settings are {', '.join(s.name for s in scores)}")
        text = tables(scores, base)
        print(text)
        args.out.with_suffix(".md").write_text(text, encoding="utf-8")
        for what in args.by or ["all"]:
            draw(Path(f"{args.out}-{what.replace(' ', '-').lower()}.png"), scores, base, what)
    except (UserError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
