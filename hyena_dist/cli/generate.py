"""Go on with sequences as a trained model expects them to, one base after the other. On a GPU if there is one; under
torchrun the ranks share the sequences and write the same file. What is killed goes on where it was: give the same
command again.

examples: python launchers/generate.py --from runs/mine --bases 1000 --out made.fa
          python launchers/generate.py --from runs/mine --prompt ACGTTGCA --bases 500 --samples 8 --temperature 0.8 \\
              --top-p 0.95 --seed 1 --out made.fa --likelihoods made.tsv
          torchrun --nproc_per_node 2 launchers/generate.py --from exported/mine --prompts starts.fa --bases 4000 \\
              --out made.fa
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hyena_dist.cli.reading import add_model_options, open_model, quiet
from hyena_dist.cli.status import exit_status
from hyena_dist.runtime.signals import raise_interrupts


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--prompt", default="", metavar="BASES", help="what the sequences begin with (nothing: the "
                       "first base is drawn evenly)")
    start.add_argument("--prompts", type=Path, metavar="FASTA", help="a file of sequence; each record is a prompt")
    parser.add_argument("--bases", type=int, required=True, metavar="N", help="to make behind each prompt")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="sequences of each prompt (1)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T",
                        help="below 1 likely bases become likelier, 0: always the likeliest (1)")
    parser.add_argument("--top-k", type=int, default=4, metavar="K", help="draw from the K likeliest bases (4)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P",
                        help="draw from the likeliest bases that have probability P together (1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (0)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="sequences at a time (8)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new .fa, .fasta or .fna")
    parser.add_argument("--likelihoods", type=Path, metavar="FILE",
                        help="also write the log-likelihood of every base to a new .tsv or .parquet")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 a mistake of the user's, 130 or 143 interrupted."""
    args = parse_args(argv)
    quiet()
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    # Imported here: torch and megatron-core take seconds, --help should not.
    from hyena_dist.tasks.generate.sampling import Sampling
    from hyena_dist.tasks.generate.sequences import Request, generate, prompt_of_text, prompts_of_file

    raise_interrupts()
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    prompts = [prompt_of_text(args.prompt)] if args.prompts is None else prompts_of_file(args.prompts)
    request = Request(prompts, args.samples, args.bases, sampling, args.seed, args.batch, args.out, args.likelihoods)
    trained, groups = open_model(args, single_bases=True)
    result = generate(trained, request, groups)
    if groups.world.rank == 0:
        print(f"{args.out}: {result.sequences:,} sequences, {args.bases:,} new bases each, seed {args.seed}")
        if unread := sum(prompt.unread for prompt in prompts):
            print(f"  note: {unread:,} letters of the prompts are none of A, C, G, T and N: the model reads each as "
                  "[UNK], which says nothing of the base")
        if args.likelihoods is not None:
            print(f"{args.likelihoods}: log-likelihood of every base")
        if result.made_now:
            print(f"  {1000 * result.seconds / result.made_now:.3f} ms a base")
    return 0
