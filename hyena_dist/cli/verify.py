"""Re-read shards and compare every byte with the index, and with the FASTA files if they are given.

Example:
    python shards/verify.py shards/hg38
    python shards/verify.py shards/hg38 --fasta hg38.fa.gz
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hyena_dist.cli.status import interrupt_status
from hyena_dist.config.errors import UserError, one_line
from hyena_dist.runtime.signals import raise_interrupts


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR", help="directory that shards/build.py wrote")
    parser.add_argument("--fasta", nargs="+", default=[], metavar="[NAME=]FILE[::VCF::SAMPLE]",
                        help="the files that the shards were built from, with the same names")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    # Imported here: numpy and webdataset take a second, --help should not.
    from hyena_dist.data.contigs import Source
    from hyena_dist.data.verify import verify
    raise_interrupts()
    try:
        manifest = verify(args.directory, [Source.parse(argument) for argument in args.fasta])
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        return interrupt_status(interrupt)
    except OSError as error:
        print(f"error: {args.directory}: cannot be read ({error})", file=sys.stderr)
        return 1
    print(f"{args.directory}: {len(manifest.shards)} shards, {len(manifest.segments)} segments, "
          f"{sum(shard.bases for shard in manifest.shards):,} bases: as the index says"
          + (", and as the FASTA" if args.fasta else ""))
    return 0
