"""What fits, how long it takes and how it is best laid out, before a GPU is paid for: every legal way to split a run
over GPUs, with the bytes a rank needs, the bytes it sends and the seconds of a step. Nothing is trained, on no GPU.

example: python launchers/plan.py --size 8x256 --length 1048576 --gpus 64 --gpu h200
         python launchers/plan.py --config configs/hyenadna-32k.yaml --gpus 8 --gpu a100-40 --out runs/planned.yaml
         hyena-dist plan --size 8x256 --length 131072 --gpus 4 --gpu rtx4090 --global-batch 16 train.steps=20000
"""

import argparse
import json
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hyena_dist.cli.status import interrupt_status
from hyena_dist.config.errors import ConfigError, UserError, one_line, write_remedy
from hyena_dist.config.load import dump_config, load_config
from hyena_dist.config.presets import find, names
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.runtime.files import check_picture
from hyena_dist.runtime.signals import raise_interrupts

if TYPE_CHECKING:
    from hyena_dist.costs.plan import Machines, Plan

GPUS_PER_NODE = 8
MOST = 2**30
"""Of every number that is given; of GPUs MOST_GPUS."""
MOST_GPUS = 2**14
PLANNED = ("parallel.tensor", "parallel.context", "parallel.sequence", "parallel.context_method", "engine.name",
           "engine.zero_stage", "train.micro_batch_size", "train.activation_checkpointing")
"""Keys that a plan sets; what a configuration says of them is not looked at."""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every figure says whether it was MEASURED (--probe) or is ESTIMATED, by a table of GPUs and links; "
               "bytes sent are exact. docs/planning.md says what stands behind the numbers.")
    parser.add_argument("--config", metavar="YAML", help=f"a run's configuration, or a preset ({', '.join(names())})")
    parser.add_argument("--size", metavar="LAYERSxWIDTH", help="instead of a configuration: a new model, as 8x256")
    parser.add_argument("--length", type=int, metavar="L", help="tokens of a training window (data.seq_len)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of all nodes together (1)")
    parser.add_argument("--nodes", type=int, metavar="N", help=f"nodes (as few as hold {GPUS_PER_NODE} GPUs each)")
    parser.add_argument("--gpu", metavar="NAME", help="kind of GPU, as h100 or a100-40; left out: that of this machine")
    parser.add_argument("--global-batch", type=int, metavar="B",
                        help="windows of an optimizer step (those of the configuration; with --size one for each GPU)")
    parser.add_argument("--probe", action="store_true",
                        help="measure this machine's rates for some seconds, and plan for machines like it")
    parser.add_argument("--top", type=int, default=8, metavar="N", help="rows of the table (8)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the configuration of the first row")
    parser.add_argument("--picture", type=Path, metavar="FILE",
                        help="draw the bytes of a rank against the length, laid out as in the first row: a .png")
    parser.add_argument("--json", action="store_true", help="print everything as JSON instead of tables")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys that replace the file's")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 nothing fits or the file could not be written, 2 a mistake of the user's, 130 or 143
    interrupted."""
    args = parse_args(argv)
    warnings.filterwarnings("ignore", module=r"megatron\.")
    try:
        return _run(args)
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        return interrupt_status(interrupt)


def _run(args: argparse.Namespace) -> int:
    config, nodes = _config(args), _nodes(args)
    # Imported here: the formulas ask torch-based modules for their chunks.
    from hyena_dist.cli.plan_table import answers, as_json, print_plans
    from hyena_dist.costs.plan import best_of_each, candidates, fastest
    raise_interrupts()
    machines = _machines(args, config, nodes)
    plans = list(candidates(config, machines))
    if not plans:
        raise ConfigError(_why_none(config, machines))
    ranked = fastest(_watched(plans))
    said, shown = answers(config, machines, plans, ranked), best_of_each(ranked)[: args.top]
    if args.json:
        print(json.dumps(as_json(shown, said, legal=len(plans), fitting=len(ranked)), indent=1))
    else:
        print_plans(shown, said, machines, legal=len(plans), fitting=len(ranked))
    if args.picture:
        from hyena_dist.cli.plan_picture import draw_bytes
        draw_bytes(ranked[0] if ranked else min(plans, key=lambda plan: plan.bytes), args.picture)
        print(f"written: {args.picture}", file=sys.stderr)
    if not ranked:
        return 1
    if args.out:
        _write(args.out, ranked[0])
    return 0


def _config(args: argparse.Namespace) -> Config:
    """The run to plan, without its layout."""
    for name in ("gpus", "nodes", "length", "global_batch", "top"):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= MOST:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be from 1 to {MOST:,}")
    for override in args.overrides:
        if override.partition("=")[0] in PLANNED:
            raise ConfigError(f"argument {override!r}: this is what a plan chooses: leave it out, or ask about one "
                              "layout with pretrain.py --dry-run --gpu NAME")
    check_picture(args.picture, (".png",))
    if args.out is not None and args.out.exists():
        raise ConfigError(f"--out {args.out}: is there already: give another name, or remove it")
    if (args.config is None) == (args.size is None):
        raise ConfigError("give either --config YAML or --size LAYERSxWIDTH, such as --size 8x256")
    if args.config is not None:
        config = load_config(find(args.config), args.overrides)
        batch = args.global_batch or config.train.global_batch_size
    else:
        config, batch = _of_size(args.size, args.overrides), args.global_batch or args.gpus
    length = args.length or config.data.seq_len
    try:
        return replace(config, model=replace(config.model, max_seq_len=max(length, config.model.max_seq_len)),
                       data=replace(config.data, seq_len=length),
                       train=replace(config.train, global_batch_size=batch))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _of_size(size: str, overrides: Sequence[str]) -> Config:
    """A configuration of a model like 8x256, with what is not said as in a new run in bf16."""
    import tempfile
    found = re.fullmatch(r"(\d+)x(\d+)", size)
    if not found:
        raise ConfigError(f"--size {size}: must be LAYERSxWIDTH, such as 8x256")
    layers, width = map(int, found.groups())
    try:
        base = Config(model=ModelSection(num_layers=layers, hidden_size=width), data=DataSection(shards="shards/mine"),
                      train=TrainSection(run_dir="runs/planned", precision="bf16"))
    except ValueError as error:
        raise ConfigError(f"--size {size}: {error}") from error
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "size.yaml")
        path.write_text(dump_config(base), encoding="utf-8")
        return load_config(path, overrides)


def _nodes(args: argparse.Namespace) -> int:
    if args.gpus > MOST_GPUS:
        raise ConfigError(f"--gpus {args.gpus}: must be from 1 to {MOST_GPUS:,}")
    nodes = args.nodes or -(-args.gpus // GPUS_PER_NODE)
    if args.gpus % nodes:
        raise ConfigError(f"--gpus {args.gpus}: is not a multiple of --nodes {nodes}: give as many GPUs to each node")
    return nodes


def _machines(args: argparse.Namespace, config: Config, nodes: int) -> "Machines":
    from hyena_dist.costs.devices import CPU, find_gpu
    from hyena_dist.costs.plan import Machines
    from hyena_dist.costs.probe import probe, this_machine
    gpu = find_gpu(args.gpu) if args.gpu else this_machine(may_be_a_cpu=args.probe)
    if gpu.name == CPU:  # all ranks of a machine share its memory
        gpu = replace(gpu, memory=gpu.memory / (args.gpus // nodes))
    rates = probe(config, gpu, several=args.gpus > 1) if args.probe else None
    return Machines(gpu, args.gpus, args.gpus // nodes, rates)


def _why_none(config: Config, machines: "Machines") -> str:
    from hyena_dist.model.kinds import check
    try:
        check(config, world_size=machines.gpus)
    except ConfigError as error:
        return f"no layout on {machines.gpus} GPUs is legal; as it stands: {error}"
    return f"no layout on {machines.gpus} GPUs is legal: change --gpus or --global-batch"


def _watched(plans: Sequence["Plan"]) -> Iterator["Plan"]:
    """The same, with a bar where somebody looks on."""
    from rich.console import Console
    from rich.progress import track
    yield from track(plans, "layouts", console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def _write(path: Path, plan: "Plan") -> None:
    """Write the configuration of a plan, which `pretrain --dry-run` takes on as many ranks.

    Raises:
        OSError: it cannot be written.
    """
    text = f"# Planned for {plan.machines.gpus} x {plan.machines.gpu.name}.\n{dump_config(plan.config)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise OSError(f"{path}: could not be written ({error.strerror or error}): "
                      f"{write_remedy(error, 'change --out')}") from error
    print(f"written: {path}: check it with WORLD_SIZE={plan.machines.gpus} python launchers/pretrain.py --config {path}"
          f" --dry-run --gpu {plan.machines.gpu.name}", file=sys.stderr)
