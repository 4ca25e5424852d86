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
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from hyena_dist.config.errors import ConfigError, UserError, agreed, is_agreed, one_line
from hyena_dist.runtime.signals import raise_interrupts

PRECISIONS = ("fp32", "bf16", "fp16")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", required=True, dest="source", metavar="M",
                        help="a run, a checkpoint, or an exported directory")
    parser.add_argument("--checkpoint", choices=("latest", "best"), help="which checkpoint of a run (latest)")
    parser.add_argument("--fasta", type=Path, required=True, metavar="F", help="a file of sequence: each record is "
                        "embedded, or it is the reference of --bed")
    parser.add_argument("--bed", type=Path, metavar="B", help="regions of it; the sixth column is the strand")
    parser.add_argument("--region", metavar="C:FIRST-LAST", help="with --bed: where a slice lies (default: as its "
                        "header says)")
    parser.add_argument("--bin", type=int, metavar="N", help="a row for every N bases, their mean; 1: for each base "
                        "(default: one row for a sequence)")
    parser.add_argument("--layer", type=int, metavar="K", help="after the K-th layer, before any norm; 0: the "
                        "embedding (default: what the head reads)")
    parser.add_argument("--context", type=int, default=1, metavar="P", help="so many ranks share each sequence, for "
                        "those that are too long for one (1)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the arithmetic (fp32)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE",
                        help="a new .npy or .parquet; its index is written to FILE.tsv")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 a mistake of the user's, 130 interrupted."""
    args = parse_args(argv)
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        return _run(args)
    except (UserError, OSError) as error:
        if int(os.environ.get("RANK", "0")) == 0 or not is_agreed(error):
            print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(args: argparse.Namespace) -> int:
    # Imported here: torch and megatron-core take seconds, --help should not.
    import torch

    from hyena_dist.convert.trained import load_trained
    from hyena_dist.data.reference import Region, read_reference
    from hyena_dist.parallel.groups import Groups, init_groups
    from hyena_dist.runtime.launch import init_distributed
    from hyena_dist.tasks.embed.embeddings import Request, write_embeddings
    from hyena_dist.tasks.embed.inputs import OUTCOMES, Records, Regions

    raise_interrupts()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if args.context < 1 or ranks % args.context:
        raise agreed(ConfigError(f"--context {args.context}: {ranks} ranks cannot share sequences by so many: start a "
                                 "multiple of it with torchrun --nproc_per_node"))
    if args.region is not None and args.bed is None:
        raise agreed(ConfigError("--region says where the regions of --bed are looked up: give --bed, or leave it out"))
    region = None if args.region is None else Region.parse(args.region)
    trained = load_trained(args.source, args.checkpoint, single_bases=True)
    inputs = (Records(args.fasta) if args.bed is None else Regions(args.bed, read_reference(args.fasta, region)))
    request = Request(inputs, args.out, args.fasta.name, args.bin, args.layer)
    if ranks > 1:
        device = init_distributed(timedelta(days=7))  # ranks are apart by as much as a chunk takes
        groups = init_groups(context=args.context)
    else:
        device, groups = torch.device("cuda" if torch.cuda.is_available() else "cpu"), Groups.single()
    result = write_embeddings(trained.to(device, args.precision, groups), request, groups)
    if groups.world.rank == 0:
        print(f"{args.out}: {result.rows:,} rows of {trained.section.hidden_size} channels, of "
              f"{result.outcomes['embedded']:,} of {sum(result.outcomes.values()):,} sequences; index: {request.index}")
        for name, count in result.outcomes.items():
            if count and name != "embedded":
                print(f"  {count:,} {name}: {OUTCOMES[name]}")
        if result.bases_now:
            print(f"  {result.bases_now / result.seconds:,.0f} bases a second")
    return 0
