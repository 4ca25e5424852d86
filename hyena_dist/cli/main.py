"""Every command of the project under one name, for where it is installed: `hyena-dist pretrain --config quickstart` is
`python launchers/pretrain.py --config configs/quickstart.yaml`.

commands: pretrain   train a model on shards
          plan       what fits on which GPUs, and how long it takes
          finetune   a pretrained model, on labelled sequences, judged on a test split
          predict    what a fine-tuned model says of new sequences
          suite      fine-tune on every task of a benchmark, one table beside published numbers
          needle     a table for finetune that shows how far a context reaches
          species    windows of genomes, for fine-tuning to tell species apart
          evaluate   score a run on held-out bases
          generate   sequence by a trained model, one base after the other
          embed      sequences, by a trained model: its hidden states
          score      variants by a trained model, and reports on the scores; perplexity, distance, substitutions: what a
                     model knows of held-out bases, how far it looks, whether it notices single changed ones
          convert    a run, checkpoint or published weights, to any of their formats
          build      shards of files of sequence
          verify     shards, against their index and the files they came from
          sweep      many runs as one: plan, run, status, report, fork
          doctor     look at the machines of a run: what to change before it is started
          show       what is in shards: composition, splits, some of the bases
          scaling    scaling laws from finished runs, and learning rates across widths

examples: hyena-dist pretrain --config quickstart --dry-run
          torchrun --nproc_per_node 2 -m hyena_dist.cli.main pretrain --config quickstart

Each command has a --help of its own.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

from hyena_dist.runtime.signals import PROCESS, die_of_interrupts

COMMANDS = ("pretrain", "finetune", "predict", "suite", "needle", "species", "plan", "evaluate", "score", "generate",
            "embed", "convert", "sweep", "scaling", "build", "verify", "doctor", "show")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: that of the command, or 2 where there is none of that name."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    before = arguments[:1] if arguments[:1] and arguments[0].startswith("--local_rank") else []  # deepspeed's own
    name, *rest = arguments[len(before):] or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}: use one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if name in ("pretrain", "finetune"):
        PROCESS.install()  # before the other imports, which take seconds
    sys.argv[0] = f"hyena-dist {name}"  # what --help and mistakes call it
    return import_module(f"hyena_dist.cli.{name}").main([*before, *rest])


def run() -> None:
    """End the process with the command's status; a run that failed does not wait for its peers."""
    die_of_interrupts()  # a training run catches them
    from hyena_dist.runtime.launcher import leave

    status = main()
    if status:
        leave(status)


if __name__ == "__main__":
    run()
