"""Pretrain a HyenaDNA model on shards.

examples: deepspeed --num_gpus 8 launchers/pretrain.py --config configs/hyenadna-32k.yaml data.shards=shards/mine
          torchrun --nproc_per_node 2 launchers/pretrain.py --config configs/quickstart.yaml train.run_dir=runs/first
          WORLD_SIZE=8 python launchers/pretrain.py --config configs/hyenadna-32k.yaml --dry-run
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from hyena_dist.cli.status import is_first, print_error
from hyena_dist.config.errors import (
    ConfigError,
    TrainingError,
    UserError,
    first_sentence,
    is_out_of_memory,
    of_machine,
    one_line,
)
from hyena_dist.config.load import dump_config, load_config
from hyena_dist.config.presets import find, names
from hyena_dist.runtime.signals import EXIT_REQUEUE, PROCESS, die_of_interrupts

logger = logging.getLogger("pretrain")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Runs under deepspeed, torchrun, srun, or plain python as one process. A run directory that holds a "
               "checkpoint is resumed, also with other steps, learning rates or engines; train.resume=PATH in a new "
               "one branches another run, train.resume=weights:PATH takes its weights (docs/training.md).")
    add_run_arguments(parser, "check configuration, shards, checkpoints and memory, and print the configuration; train "
                              "nothing. WORLD_SIZE says for how many ranks")
    parser.add_argument("--gpu", metavar="NAME",
                        help="with --dry-run: refuse what does not fit this kind of GPU, as h100 or a100-40 "
                             "(launchers/plan.py has the others); left out: that of this machine, if it has one")
    return parser.parse_intermixed_args(argv)


def add_run_arguments(parser: argparse.ArgumentParser, dry_run: str) -> None:
    """What every command that trains takes.

    Args:
        dry_run: what its --dry-run does.
    """
    parser.add_argument("--config", required=True, metavar="YAML",
                        help=f"the run's configuration: a file, or the name of a preset ({', '.join(names())})")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys that replace the file's")
    parser.add_argument("--dry-run", action="store_true", help=dry_run)
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; not needed otherwise")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 trained, 1 the run failed, 2 a mistake of the user's, 85 saved and stopped before its end, 130
    interrupted twice from the keyboard."""
    return exit_status(parse_args(argv), _run)


def exit_status(args: argparse.Namespace, run: Callable[[argparse.Namespace], int]) -> int:
    """Run a command that trains; the status that it ends with, as `main` says."""
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    logging.basicConfig(level=logging.INFO if is_first() else logging.ERROR, format="%(asctime)s %(message)s",
                        datefmt="%H:%M:%S", stream=sys.stderr)
    for library in ("megatron", "deepspeed"):  # their chatter about optional parts
        logging.getLogger(library).setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", module=rf"{library}\.")
    try:
        return run(args)
    except (UserError, TrainingError, OSError) as error:  # the last: a full disk, a peer that is gone
        if isinstance(error, ConnectionError):
            PROCESS.end_alone()
        print_error(error)
        return 2 if isinstance(error, UserError) else 1
    except Exception as error:  # noqa: BLE001 - a defect: its traceback is wanted, and the end of this process
        PROCESS.end_alone()
        if is_out_of_memory(error):
            print(f"error: out of memory ({first_sentence(error)}): lower train.micro_batch_size, set "
                  "train.activation_checkpointing=full, or split sequences over more ranks with parallel.context",
                  file=sys.stderr)
            return 1
        logger.exception("this rank failed")
        return 1


def _dry_run(args: argparse.Namespace) -> int:
    """Check all that can be checked here, and print the configuration."""
    # Imported here: some of it needs torch, a mistyped key should not.
    from hyena_dist.cli.dry_run import check_ranks, look, memory, packing
    from hyena_dist.engine.deepspeed_config import check_raw_section
    from hyena_dist.runtime.launcher import collective_timeout, dry_run_ranks

    asked = dry_run_ranks()
    collective_timeout()
    if not is_first():
        return 0  # the first rank says it
    config = load_config(find(args.config), args.overrides)
    ranks, notes = check_ranks(config, asked)
    check_raw_section(config.engine.deepspeed)
    notes = [memory(config, ranks, args.gpu), *notes]
    warnings = list(look(config, ranks))
    notes += packing(config, ranks)
    print(dump_config(config), end="")
    for kind, lines in (("warning", warnings), ("note", notes)):
        for line in lines:
            print(f"{kind}: {one_line(line)}", file=sys.stderr)
    return 0


def _run(args: argparse.Namespace) -> int:
    if args.gpu and not args.dry_run:
        raise ConfigError("--gpu is of --dry-run: a run takes the GPUs that are there: leave it out, or add --dry-run")
    if args.dry_run:
        if PROCESS.installed:  # there is nothing to save
            PROCESS.uninstall()
            die_of_interrupts()
        return _dry_run(args) if PROCESS.reason is None else 130
    # Imported here: torch, megatron-core and DeepSpeed take seconds, --help and a mistyped key should not.
    from hyena_dist.engine.deepspeed_config import check_raw_section
    from hyena_dist.model.kinds import check
    from hyena_dist.runtime.launcher import launcher_processes, rank_environment
    from hyena_dist.runtime.requeue import end_alone
    from hyena_dist.train.weights_and_biases import check_installed

    launchers = launcher_processes()

    environment = rank_environment(os.environ)  # a mistake in it may be of this rank alone
    try:
        config = load_config(find(args.config), args.overrides)
        check(config, world_size=int(environment["WORLD_SIZE"]))
        check_raw_section(config.engine.deepspeed)
        check_installed(config.train.wandb)
    except UserError as error:
        raise of_machine(error) from None
    first = environment["RANK"] == "0"
    PROCESS.until_first_step(partial(end_alone, Path(config.train.run_dir), first), first=first)
    if first:
        from hyena_dist.train.banner import banner

        for line in banner(config, environment):
            logger.info(line)
    import torch.distributed as dist

    from hyena_dist.parallel.groups import Axis, init_groups
    from hyena_dist.runtime.launch import init_distributed
    from hyena_dist.runtime.startup import check_same_start
    from hyena_dist.train.session import open_trainer

    device = init_distributed(dump_dir=Path(config.train.run_dir) / "logs")
    check_same_start(config, Axis.of(dist.group.WORLD))
    groups = init_groups(tensor=config.parallel.tensor, context=config.parallel.context)
    with open_trainer(config, groups, device, launchers=launchers) as trainer:
        reason = trainer.fit()
    dist.destroy_process_group()
    return 0 if reason is None else EXIT_REQUEUE
