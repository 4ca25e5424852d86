"""Write genomes as WebDataset shards of 2-bit segments, with an index for training.

Example:
    python shards/build.py hg38.fa.gz --out shards/hg38 --val-contigs chr14,chrX
    python shards/build.py human=hg38.fa.gz mouse=mm10.fa.gz --out shards/both --val-fraction 0.02

A FILE is FASTA or GenBank (plain, gzip or bgzip), UCSC's 2bit, JSON lines or parquet; what it is, it says itself.
FASTA::VCF::SAMPLE is the two haplotypes of a person, whose splits are those of the FASTA.
NAME=FILE names the species, and calls its contigs NAME.contig. Without any option on splits, every base trains.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING

from hyena_dist.cli.status import interrupt_status
from hyena_dist.config.errors import UserError, one_line, write_remedy
from hyena_dist.runtime.signals import raise_interrupts

_MOST_WORKERS = 4
"""By default: one process reads, which is two fifths of the work, so that more would have nothing to do."""

if TYPE_CHECKING:  # numpy and webdataset take a second: --help should not
    from hyena_dist.data.census import Census
    from hyena_dist.data.contigs import Source
    from hyena_dist.data.splits import Splits


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="[NAME=]FILE[::VCF::SAMPLE]",
                        help="file of sequence, a name for its species, and the calls of a person")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="new directory to write")
    splits = parser.add_mutually_exclusive_group()
    splits.add_argument("--bed", type=Path, help="rows of contig, start, end, split (train, val or valid, test); "
                                                 "bases in no row are not used")
    splits.add_argument("--val-contigs", action="append", metavar="A,B",
                        help="contigs that validate; all others train. May be given several times; a name that has a "
                             "comma in it wants an option of its own")
    splits.add_argument("--val-fraction", type=float, metavar="F",
                        help="share of each contig, as one stretch at a place drawn from its name, that validates")
    parser.add_argument("--include", type=Path, action="append", default=[], metavar="BED",
                        help="only bases in the rows of this BED, as exons; of each, where several are given")
    parser.add_argument("--exclude", type=Path, action="append", default=[], metavar="BED",
                        help="no base in the rows of this BED, as gaps or a blacklist; of any, where several are given")
    parser.add_argument("--homology", type=Path, metavar="FILE",
                        help="homologous regions: a BED whose rows of one name are alike, BLAST hits (-outfmt 6), or "
                             "hashFrag's pairs; what is alike to held-out bases does not train")
    parser.add_argument("--cut-bed", action="store_true",
                        help="rows of any BED that reach past their contig are cut, and those of contigs that are not "
                             "in the files are left out, and both are counted; without it they are refused")
    parser.add_argument("--allow-copies", type=float, default=0.0, metavar="SHARE",
                        help="share of the held-out sequence of which copies may train, by sampled windows, on either "
                             "strand (default: 0); what there is, is counted. Repeats alone are some hundredths")
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=min(cores, _MOST_WORKERS), metavar="N",
                        help=f"processes to build with (default: all cores, at most {_MOST_WORKERS}); the shards are "
                             f"the same with any number")
    parser.add_argument("--dry-run", action="store_true", help="read and check everything, write nothing")
    return parser.parse_args(argv)


def choose_splits(args: argparse.Namespace, sources: "Sequence[Source]") -> "Splits":
    from hyena_dist.data.bed import Bed
    from hyena_dist.data.build import lengths
    from hyena_dist.data.homology import Apart
    from hyena_dist.data.splits import BedSplits, ContigSplits, FractionSplits, Splits, Within
    if args.bed is not None:
        splits: Splits = BedSplits(args.bed, cut=args.cut_bed)
    elif args.val_contigs is not None:
        splits = ContigSplits(args.val_contigs)
    elif args.val_fraction is not None:
        splits = FractionSplits(args.val_fraction)
    else:
        splits = Splits()
    if args.include or args.exclude:
        splits = Within(splits, *([Bed(path, cut=args.cut_bed) for path in paths]
                                  for paths in (args.include, args.exclude)))
    if args.homology is not None:
        splits = Apart(splits, args.homology, lengths(sources), cut=args.cut_bed)
    return splits


def print_summary(census: "Census", splits: "Splits") -> None:
    from hyena_dist.cli.tables import print_audit
    from hyena_dist.data.audit import audit
    print_audit(audit(census))
    for note in census.notes(splits):
        print(f"note: {note}")


def run(args: argparse.Namespace) -> None:
    from hyena_dist.data.build import SHARD_BASES, build, survey
    from hyena_dist.data.census import Census
    from hyena_dist.data.contigs import Source
    from hyena_dist.data.index import FILE_NAME
    raise_interrupts()
    sources = [Source.parse(argument) for argument in args.files]
    splits = choose_splits(args, sources)
    if args.dry_run:
        census = survey(sources, splits, workers=args.workers, allow_copies=args.allow_copies)
        print_summary(census, splits)
        bases = sum(census.bases.values())
        print(f"{args.out}: not written (dry run); it would hold {bases:,} bases in {-(-bases // SHARD_BASES)} shards, "
              f"of some {bases // 4:,} bytes and more where there are soft-masked bases and codes")
        return
    census = Census()
    manifest = build(sources, args.out, splits, census=census, workers=args.workers,
                     allow_copies=args.allow_copies)
    print_summary(census, splits)
    size = sum(shard.filesize for shard in manifest.shards) + (args.out / FILE_NAME).stat().st_size
    print(f"{args.out}: {len(manifest.shards)} shards, {len(manifest.segments)} segments, {size:,} bytes, "
          f"{size / sum(census.bases.values()):.4f} bytes per base")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.workers < 1:
        print(f"error: --workers must be 1 or more, got {args.workers}", file=sys.stderr)
        return 2
    if not 0 <= args.allow_copies <= 1:
        print(f"error: --allow-copies must be a share from 0 to 1, got {args.allow_copies:g}", file=sys.stderr)
        return 2
    try:
        run(args)
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print("error: a worker of the build was ended from outside, as a system does that has no memory left: nothing "
              "is left behind; build again, with fewer --workers", file=sys.stderr)
        return 1
    except MemoryError:
        print("error: out of memory: a contig is held whole, and so are the tables of all contigs: build on a machine "
              "with more memory", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        return interrupt_status(interrupt)
    except OSError as error:
        print(f"error: {args.out}: cannot be written ({error}): nothing is left behind; "
              f"{write_remedy(error, 'change --out')}", file=sys.stderr)
        return 1
    return 0
