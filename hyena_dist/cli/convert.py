"""Convert a HyenaDNA model: a run, a checkpoint, published weights, Hugging Face's, or safetensors, to any of them.

example: python launchers/convert.py runs/mine exported/mine --to huggingface --checkpoint best
         python launchers/convert.py hyenadna-small-32k-seqlen start/small-32k --to checkpoint
         python launchers/convert.py runs/mine start/longer --to checkpoint --max-seq-len 65536 --filter keep
"""

import argparse
import json
import shlex
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hyena_dist.cli.status import exit_status
from hyena_dist.config.errors import ConfigError
from hyena_dist.config.extend import extended
from hyena_dist.config.formats import FORMATS
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.runtime.signals import raise_interrupts


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="formats:\n" + "\n".join(f"  {name:12} {text}" for name, text in FORMATS.items()))
    parser.add_argument("source", metavar="SOURCE", help="a directory: a run, a checkpoint, or a format listed below; "
                        "or a file of weights with its config.json beside it")
    parser.add_argument("dest", metavar="DEST", help="the directory to write; it must not exist")
    parser.add_argument("--to", default="safetensors", choices=FORMATS, help="format to write (safetensors)")
    parser.add_argument("--checkpoint", choices=("latest", "best"), help="which checkpoint of a run (latest)")
    parser.add_argument("--max-seq-len", type=int, metavar="N", help="extend the model's context; needs --filter")
    parser.add_argument("--filter", choices=("keep", "stretch"),
                        help="of an extended model: keep the filters and let them go on, or stretch them over N lags")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 a mistake of the user's, 130 or 143 interrupted."""
    args = parse_args(argv)
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    return exit_status(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    if (args.max_seq_len is None) != (args.filter is None):
        raise ConfigError("--max-seq-len and --filter belong together: how long, and what becomes of the filters")
    # Imported here: torch and megatron-core take seconds, --help should not.
    from hyena_dist.convert import read_model, resized, write_model

    raise_interrupts()
    section, model, found = read_model(args.source, args.checkpoint)
    if args.max_seq_len is not None:
        section = extended(section, args.max_seq_len, filter=args.filter)
        model = resized(section, model)
    files = write_model(args.dest, args.to, section, model, source=str(found))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.dest}: {args.to} of {parameters:,} parameters, max_seq_len {section.max_seq_len}, from {found}: "
          f"{', '.join(files)}")
    if args.to == "checkpoint":
        print("train from it, with this configuration or another: python launchers/pretrain.py --config "
              f"configs/quickstart.yaml {shlex.join(_overrides(section, args.dest))}")


def _overrides(section: ModelSection, dest: str) -> list[str]:
    """The arguments of pretrain.py that start a run from this checkpoint, whatever the model and the lengths of the
    configuration are: every key of the model, and windows as long as it takes."""
    values: dict[str, Any] = {"train.run_dir": f"runs/{Path(dest).name}", "train.resume": f"weights:{dest}",
                              "train.seq_len_warmup": "none", "train.seq_len_warmup_steps": None,
                              "data.seq_len": section.max_seq_len, "data.val_seq_len": None}
    values |= {f"model.{key}": value for key, value in asdict(section).items()}
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]
