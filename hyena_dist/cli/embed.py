"""What a trained model makes of sequences: its hidden states, of every base, of bins or of whole sequences. On a GPU if
there is one; under torchrun the ranks share the sequences, or with --context each sequence, and write the same file.
What is killed goes on where it was: give the same command again.

examples: python launchers/embed.py --from runs/mine --fasta promoters.fa --out promoters.npy
          python launchers/embed.py --from exported/mine --fasta hg38.fa.gz --bed genes.bed --bin 128 --layer 4 \\
              --out genes.parquet
          torchrun --nproc_per_node 4 launchers/embed.py --from runs/mine --fasta long.fa --bin 1 --context 4 \\
              --out long.npy
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hyena_dist.cli.reading import add_context_option, add_model_options, open_model, quiet
from hyena_dist.cli.status import exit_status
from hyena_dist.config.errors import ConfigError, agreed
from hyena_dist.runtime.signals import raise_interrupts


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--fasta", type=Path, required=True, metavar="F", help="a file of sequence: each record is "
                        "embedded, or it is the reference of --bed")
    parser.add_argument("--bed", type=Path, metavar="B", help="regions of it; the sixth column, or of five the last, "
                        "is the strand")
    parser.add_argument("--region", metavar="C:FIRST-LAST", help="with --bed: where a slice lies (default: as its "
                        "header says)")
    parser.add_argument("--bin", type=int, metavar="N", help="a row for every N bases, their mean; 1: for each base "
                        "(default: one row for a sequence)")
    parser.add_argument("--layer", type=int, metavar="K", help="after the K-th layer, before any norm; 0: the "
                        "embedding (default: what the head reads)")
    add_context_option(parser, "sequence")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE",
                        help="a new .npy or .parquet; its index is written to FILE.tsv")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 a mistake of the user's, 130 or 143 interrupted."""
    args = parse_args(argv)
    quiet()
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    # Imported here: torch and megatron-core take seconds, --help should not.
    from hyena_dist.data.reference import Region, read_reference
    from hyena_dist.tasks.embed.embeddings import Request, write_embeddings
    from hyena_dist.tasks.embed.inputs import OUTCOMES, Records, Regions

    raise_interrupts()
    if args.region is not None and args.bed is None:
        raise agreed(ConfigError("--region says where the regions of --bed are looked up: give --bed, or leave it out"))
    region = None if args.region is None else Region.parse(args.region)
    inputs = (Records(args.fasta) if args.bed is None else Regions(args.bed, read_reference(args.fasta, region)))
    request = Request(inputs, args.out, args.fasta.name, args.bin, args.layer)
    trained, groups = open_model(args, single_bases=True)
    result = write_embeddings(trained, request, groups)
    if groups.world.rank == 0:
        print(f"{args.out}: {result.rows:,} rows of {trained.section.hidden_size} channels, of "
              f"{result.outcomes['embedded']:,} of {sum(result.outcomes.values()):,} sequences; index: {request.index}")
        for name, count in result.outcomes.items():
            if count and name != "embedded":
                print(f"  {count:,} {name}: {OUTCOMES[name]}")
        if result.bases_now:
            print(f"  {result.bases_now / result.seconds:,.0f} bases a second")
    return 0
