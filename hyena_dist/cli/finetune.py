"""Fine-tune a pretrained model on labelled sequences, and judge it on a test split that nothing else has read.

examples: python launchers/finetune.py --config finetune/gue finetune.from=runs/quickstart \\
              finetune.table=GUE/mouse/0 train.run_dir=runs/mouse-0
          hyena-dist finetune --config finetune/gue finetune.table=peaks.tsv finetune.genome=mm39.fa.gz \\
              finetune.test_chromosomes=chr8,chr9 train.run_dir=runs/peaks
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyena_dist.cli.pretrain import add_run_arguments, exit_status, logger
from hyena_dist.config.errors import UserError, of_machine, one_line
from hyena_dist.config.load import dump_config, load_config
from hyena_dist.config.presets import find
from hyena_dist.config.schema import Config
from hyena_dist.runtime.signals import EXIT_REQUEUE, PROCESS, die_of_interrupts

if TYPE_CHECKING:
    from hyena_dist.data.labelled import Labelled

NOT_READ = {"data": {"shards": "none"}}
"""Keys that a fine-tuning has no use for, and that need a value all the same."""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="A table is CSV, TSV or parquet with the columns sequence and label, FASTA with '>name|label', "
               "intervals with finetune.genome, or a directory with train, dev and test. The same command resumes a "
               "run that was stopped. The answer is in result.json and predictions.tsv of train.run_dir; "
               "predict asks the run for new sequences (docs/finetuning.md).")
    add_run_arguments(parser, "check configuration, model and table, say what is in them, and train nothing")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: as that of `cli.pretrain.main`."""
    return exit_status(parse_args(argv), _run)


def _resolved(args: argparse.Namespace
              ) -> tuple[Config, "Callable[[int], Labelled]", Mapping[str, Any] | None, Path | None]:
    """The configuration with all that model and table decide, the reader of each seed's sequences, and the weights with
    the place where they were. The sequences of every seed are looked at, so that none is refused after others have
    been trained on.

    Raises:
        UserError: one of them cannot be used.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise UserError("scikit-learn, which measures how good the answers are, is not installed: install it with "
                        "pip install 'hyena-dist[tasks]'") from None
    from hyena_dist.data.labelled import reader_of
    from hyena_dist.data.tokenizer import tokenizer_of

    config = load_config(find(args.config), args.overrides, base=NOT_READ)
    weights = path = None
    if config.finetune.from_ is not None:
        from hyena_dist.convert.start import read_start, without_other_head

        section, weights, path = read_start(config.finetune.from_)
        logger.info("starting from %s", path)
        dropouts = {key: getattr(config.model, key) for key in ("embed_dropout", "resid_dropout")}
        config = replace(config, model=replace(section, **dropouts))
    tokenizer = tokenizer_of(config.model)
    read = reader_of(config.finetune, most=tokenizer.bases(config.model.max_seq_len))
    labelled = read(config.train.seed)
    if weights is not None and path is not None:
        weights = without_other_head(weights, path, config.finetune, labelled.classes)
    shortest, longest = (choose(example.length for examples in labelled.splits.values() for example in examples)
                         for choose in (min, max))
    if not tokenizer.tokens(shortest):
        raise UserError(f"finetune.table has a sequence of {shortest} bases, less than the {tokenizer.k} of a token: "
                        "remove it")
    if labelled.places is not None and tokenizer.k > 1:
        raise UserError(f"finetune.task={labelled.task} has labels for places, and the tokens of this model are "
                        f"{tokenizer.k}-mers (model.kmer): take a model of single bases")
    config = replace(config, data=replace(config.data, seq_len=tokenizer.tokens(longest)))
    config = _of_all_seeds(config, read)
    if (epochs := config.finetune.epochs) is not None:
        steps = max(1, round(epochs * len(labelled.splits["train"]) / config.train.global_batch_size))
        config = replace(config, train=replace(config.train, steps=steps))
    return config, read, weights, path


def _of_all_seeds(config: Config, read: "Callable[[int], Labelled]") -> Config:
    """With the tokens of the longest row that comes in any run.

    Raises:
        UserError: the sequences of a seed, in their splits, cannot be learnt.
    """
    first, longest = config.train.seed, config.data.seq_len
    for seed in range(first, first + config.finetune.seeds):
        try:
            labelled = read(seed)
            if config.finetune.by_tokens:
                from hyena_dist.train.prompting import check_prompting, row_tokens

                check_prompting(config, labelled)
                longest = max(longest, row_tokens(config.finetune, labelled))
        except UserError as error:
            raise error if seed == first else UserError(f"seed {seed}: {error}") from None
    return replace(config, data=replace(config.data, seq_len=longest))


def contents(config: Config, labelled: "Labelled") -> list[str]:
    """What is in a table, a line each."""
    sizes = ", ".join(f"{len(examples):,} {name}" for name, examples in labelled.splits.items())
    classes = ", ".join(labelled.classes)[:200]
    what = f"{len(labelled.classes)} classes ({classes})" if classes else "numbers"
    if labelled.places is not None:
        what += {"per_base": " of bases", "pairs": f" of pairs of bins of {labelled.places.bin_size:,} bases",
                 "binned": f" of bins of {labelled.places.bin_size:,} bases, {labelled.places.tracks:,} tracks"}[
                     labelled.task]
    return [f"sequences: {sizes}; {what}; at most {config.data.seq_len:,} tokens; {config.train.steps:,} steps"]


def _run(args: argparse.Namespace) -> int:
    if args.dry_run and PROCESS.installed:  # there is nothing to save
        PROCESS.uninstall()
        die_of_interrupts()
    from hyena_dist.engine.deepspeed_config import check_raw_section
    from hyena_dist.model.kinds import check
    from hyena_dist.runtime.launcher import dry_run_ranks, launcher_processes, rank_environment
    from hyena_dist.runtime.requeue import end_alone

    launchers = launcher_processes()
    environment = rank_environment(os.environ)
    try:
        config, read, weights, path = _resolved(args)
        labelled = read(config.train.seed)
        check(config, world_size=(dry_run_ranks() or 1) if args.dry_run else int(environment["WORLD_SIZE"]))
        check_raw_section(config.engine.deepspeed)
        if args.dry_run:
            from hyena_dist.tasks.finetune import check_runs

            check_runs(config, read=read, weights=weights)
    except UserError as error:
        raise of_machine(error) from None
    if args.dry_run:
        print(dump_config(config), end="")
        for kind, lines in (("note", contents(config, labelled)), ("warning", labelled.notes)):
            for line in lines:
                print(f"{kind}: {one_line(line)}", file=sys.stderr)
        return 0
    first = environment["RANK"] == "0"
    PROCESS.until_first_step(partial(end_alone, Path(config.train.run_dir), first), first=first)
    for line in contents(config, labelled):
        logger.info("%s", line)
    for line in labelled.notes:
        logger.warning("%s", line)
    import torch.distributed as dist

    from hyena_dist.model.trained import tensors_digest
    from hyena_dist.parallel.groups import Axis, init_groups
    from hyena_dist.runtime.launch import init_distributed
    from hyena_dist.runtime.startup import check_same_start, check_same_weights
    from hyena_dist.tasks.finetune import finetune

    device = init_distributed(dump_dir=Path(config.train.run_dir) / "logs")
    check_same_start(config, Axis.of(dist.group.WORLD))
    if weights is not None and path is not None:
        check_same_weights("finetune.from", path, partial(tensors_digest, weights), Axis.of(dist.group.WORLD))
    groups = init_groups(tensor=config.parallel.tensor, context=config.parallel.context)
    reason = finetune(config, groups, device, read=read, weights=weights, launchers=launchers)
    dist.destroy_process_group()
    return 0 if reason is None else EXIT_REQUEUE
