"""Draw windows of whole genomes, by seed, as a table that says which species each is of: for launchers/finetune.py.

examples: python launchers/species.py human=hg38.fa.gz mouse=mm39.fa.gz worm=ce11.fa.gz --length 32768 \\
              --val-contigs human.chr1,mouse.chr1,worm.V --test-contigs human.chr5,mouse.chr5,worm.X \\
              --out tables/species
          hyena-dist species human=chr2.fa.gz yeast=r64.fa.gz --length 1024 --held-out held-out.bed --out tables/species
          python launchers/finetune.py --config finetune/species finetune.table=tables/species finetune.from=runs/mine
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hyena_dist.cli.status import exit_status
from hyena_dist.runtime.signals import raise_interrupts


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="Windows of train, val and test share no base (docs/species.md).")
    parser.add_argument("files", nargs="+", metavar="SPECIES=FILE", help="genome of a species, FASTA or another kind")
    parser.add_argument("--length", type=_count, required=True, metavar="BASES", help="of every window")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory to write")
    for split, number in (("train", 2000), ("val", 200), ("test", 500)):
        parser.add_argument(f"--{split}", type=_count, default=number, metavar="N",
                            help=f"windows of each species in {split} ({number})")
    for split in ("val", "test"):
        parser.add_argument(f"--{split}-contigs", default="", metavar="A,B",
                            help=f"contigs of {split}, as human.chr5; all others train")
    parser.add_argument("--held-out", type=Path, metavar="BED",
                        help="stretches that do not train: contig (as human.chr5), start, end, val or test")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the windows (0)")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 a mistake of the user's, 130 or 143 interrupted."""
    args = parse_args(argv)
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    raise_interrupts()
    # Imported here: numpy takes a second, --help should not.
    from hyena_dist.config.errors import ConfigError
    from hyena_dist.data.bed import Bed
    from hyena_dist.data.contigs import Source
    from hyena_dist.tasks.species import HeldOut, draw

    if args.seed < 0:
        raise ConfigError(f"--seed must be 0 or greater, got {args.seed}")
    listed = {split: [name for name in getattr(args, f"{split}_contigs").split(",") if name] for split in
              ("val", "test")}
    bed = None if args.held_out is None else Bed(args.held_out, least=4, columns="contig, start, end, val or test")
    counts = {split: getattr(args, split) for split in ("train", "val", "test")}
    content = draw([Source.parse(file) for file in args.files], HeldOut(listed, bed), length=args.length, counts=counts,
                   seed=args.seed, out=args.out)
    for split, species in content["splits"].items():
        said = ", ".join(f"{name} {part['windows']:,} of {part['bases']:,} bases" for name, part in species.items())
        print(f"{split}: {said}")
    for note in content["notes"]:
        print(f"note: {note}")
    print(f"written: {args.out}")
    return 0
