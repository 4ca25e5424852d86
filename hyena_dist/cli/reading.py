"""What the commands that read a trained model have in common: its options, and the ranks that it is read by."""

import argparse
import logging
import os
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING

from hyena_dist.config.errors import ConfigError, UserError, agreed, of_machine

if TYPE_CHECKING:
    import torch

    from hyena_dist.model.trained import Trained
    from hyena_dist.parallel.groups import Groups


def add_model_options(command: argparse.ArgumentParser) -> None:
    """--from, --checkpoint and --precision."""
    command.add_argument("--from", required=True, dest="source", metavar="M",
                         help="a run, a checkpoint, or an exported directory")
    command.add_argument("--checkpoint", choices=("latest", "best"), help="which checkpoint of a run (latest)")
    command.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32",
                         help="of the arithmetic (fp32)")


def add_context_option(command: argparse.ArgumentParser, what: str) -> None:
    """--context: how many ranks share each `what`, a sequence or a window."""
    command.add_argument("--context", type=int, default=1, metavar="P", help=f"so many ranks share each {what}, for "
                         "those that are too long for one (1)")


def quiet() -> None:
    """Nothing but our own warnings on the terminal."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)


def open_model(args: argparse.Namespace, *, single_bases: bool) -> "tuple[Trained, Groups]":
    """The model of `add_model_options`, and of --context where there is one, over the ranks that were started.

    Raises:
        UserError: the model cannot be read, or the ranks cannot share a sequence as asked.
    """
    # Imported here: torch and megatron-core take seconds, --help should not.
    from hyena_dist.convert.trained import load_trained

    context = getattr(args, "context", 1)
    check_context(context)
    try:
        trained = load_trained(args.source, args.checkpoint, single_bases=single_bases)
    except UserError as error:
        raise of_machine(error) from None
    device, groups = open_ranks(context)
    return trained.to(device, args.precision, groups), groups


def check_context(context: int) -> None:
    """Raises ConfigError: the ranks that were started cannot share a sequence by so many."""
    ranks = _ranks()
    if context < 1 or ranks % context:
        raise agreed(ConfigError(f"--context {context}: {ranks} ranks cannot share a sequence by so many: start a "
                                 "multiple of it with torchrun --nproc_per_node, or srun"))


def open_ranks(context: int) -> "tuple[torch.device, Groups]":
    """This rank's device, a GPU if there is one, and the groups of the ranks that torchrun or srun started."""
    import torch

    from hyena_dist.parallel.groups import Groups, init_groups
    from hyena_dist.runtime.launch import init_distributed

    if _ranks() == 1:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu"), Groups.single()
    device = init_distributed(timedelta(days=7))  # ranks are apart by as much as a chunk takes
    return device, init_groups(context=context)


def _ranks() -> int:
    from hyena_dist.runtime.launcher import rank_environment

    return int(rank_environment(os.environ)["WORLD_SIZE"])
