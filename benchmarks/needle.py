"""Whether a small model finds a needle up to 8,192 bases back over four context ranks, and only by what the ranks tell
each other: the stages that teach it, its answers with the exchange cut, and the page of docs/results."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from hyena_dist.config.errors import ConfigError
from hyena_dist.config.plain import read_object
from hyena_dist.runtime.files import write_whole
from hyena_dist.tasks.needle import accuracy_by_slice

logger = logging.getLogger(__name__)

RANKS, LENGTH = 4, 8192
SAME = 40
"""Test sequences of which the answers with the exchange must be those of the run, before it is cut."""


@dataclass(frozen=True)
class Stage:
    """A table, and a fine-tuning on it that starts from the stage before.

    Args:
        table: options of `hyena-dist needle`.
        keys: of `hyena-dist finetune`.
    """

    name: str
    table: str
    keys: str


LONG = ("finetune.epochs=1 optim.warmup_steps=5 optim.min_lr=2e-5 train.micro_batch_size=8 "
        f"train.global_batch_size=8 parallel.context={RANKS}")
STAGES = (
    Stage("256", "--length 256 --distractors 0 --copies 4 --train 1600 --valid 120 --test 120",
          "parallel.context=1"),
    Stage("1k", "--length 1024 --copies 4 --train 2400 --test 300",
          "finetune.epochs=1 optim.lr=1.5e-3 optim.warmup_steps=5 train.micro_batch_size=4"),
    Stage("2k", "--length 2048 --copies 4 --train 1200 --valid 72 --test 90",
          "finetune.epochs=1 optim.lr=1e-3 optim.warmup_steps=5 train.micro_batch_size=4"),
    Stage("4k", "--length 4096 --copies 4 --train 1200 --valid 48 --test 90",
          "finetune.epochs=1 optim.lr=7e-4 optim.warmup_steps=5 train.micro_batch_size=2 train.global_batch_size=8"),
    Stage("8k", f"--length {LENGTH} --copies 4 --train 2000 --valid 72 --test 72", f"{LONG} optim.lr=5e-4"),
    Stage("8k-one", f"--length {LENGTH} --train 2400 --valid 198 --test 3000", f"{LONG} optim.lr=3e-4"),
)
"""Longer and longer sequences, with several motifs in those that train. In the last stage all have one, and its test
sequences are those of the page."""


def commands(out: Path) -> list[list[str]]:
    """Every command, in order. A fine-tuning that is finished ends at once; a table that is there is not made again."""
    found = []
    for number, stage in enumerate(STAGES):
        table, run = out / f"needle-{stage.name}", out / stage.name
        if not table.exists():
            found.append([sys.executable, "-m", "hyena_dist.cli.main", "needle", str(table), *stage.table.split()])
        start = ["torchrun", f"--nproc_per_node={RANKS}"] if number else [sys.executable]
        before = [f"finetune.from={out / STAGES[number - 1].name / 'seed-0'}"] if number else []
        found.append([*start, "launchers/finetune.py", "--config", "finetune/needle", f"finetune.table={table}",
                      *before, f"train.run_dir={run}", *stage.keys.split()])
    found.append(["torchrun", f"--nproc_per_node={RANKS}", "-m", "benchmarks.needle", str(run / "seed-0"), str(table),
                  str(out / "cut.tsv")])
    return found


@contextmanager
def severed() -> Iterator[None]:
    """Every context rank has zeros in place of what the others would send it in a layer; the answer, which is summed
    over the ranks at the end, is still the last rank's."""
    import torch
    from torch import Tensor

    from hyena_dist.parallel import collectives
    from hyena_dist.parallel.groups import Axis

    def start_all_to_all(x: Tensor, axis: Axis) -> tuple[Tensor, Any]:
        kept = torch.zeros_like(x, memory_format=torch.contiguous_format)
        kept[axis.rank] = x[axis.rank]
        return kept, SimpleNamespace(wait=lambda: None)

    def shift(x: Tensor, _axis: Axis, _step: int) -> Tensor:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)

    with patch.object(collectives, "start_all_to_all", start_all_to_all), patch.object(collectives, "_shift", shift):
        yield


def answer_severed(run: Path, table: Path, dest: Path) -> None:
    """Write the answers of a fine-tuned run to the test sequences of its table with the exchange between context ranks
    cut, in the columns of its predictions.tsv. Collective, over the ranks that torchrun started.

    Raises:
        ConfigError: as they are, the ranks do not give the answers that the run has written.
    """
    import torch

    from hyena_dist.config.schema import Config
    from hyena_dist.config.sections.finetune import FinetuneSection
    from hyena_dist.config.sections.parallel import ParallelSection
    from hyena_dist.convert.start import HEAD, read_start
    from hyena_dist.data.labelled import encoded, read_labelled
    from hyena_dist.data.tokenizer import PAD, tokenizer_of
    from hyena_dist.model.model import build_model
    from hyena_dist.model.pooled import PooledModel
    from hyena_dist.parallel.groups import init_groups
    from hyena_dist.parallel.tokens import slice_tokens
    from hyena_dist.runtime.launch import init_distributed

    init_distributed(timedelta(minutes=10))
    groups = init_groups(context=RANKS)
    section, weights, _ = read_start(run)
    config = Config(model=section, parallel=ParallelSection(context=RANKS))
    model = PooledModel(build_model(config, groups), outputs=2, pooling="last", seed=0)
    model.backbone.load_state_dict({name: weight for name, weight in weights.items() if not name.startswith(HEAD)},
                                   strict=False)
    model.head.load_state_dict({name.removeprefix(f"{HEAD}head."): weight for name, weight in weights.items()
                                if name.startswith(HEAD)})
    examples = read_labelled(FinetuneSection(table=str(table)), seed=0, most=LENGTH).splits["test"]
    tokenizer = tokenizer_of(section)

    @torch.no_grad()
    def said(first: int, count: int) -> list[int]:
        ids = torch.stack([torch.from_numpy(encoded(example, tokenizer).astype("int64"))
                           for example in examples[first : first + count]])
        local = slice_tokens(ids, groups.context, multiple=model.token_multiple, fill=PAD)
        return model(local, torch.full((len(ids),), ids.shape[1])).argmax(1).tolist()

    written = [line.split("\t")[2] for line in (run / "predictions.tsv").read_text("utf-8").splitlines()[1:]]
    count = 10
    for first in range(0, min(SAME, len(examples)), count):
        if [str(answer) for answer in said(first, count)] != written[first : first + count]:
            raise ConfigError(f"{run}: its predictions.tsv has other answers than its weights give")
    lines = ["name\tlabel\tpredicted"]
    with severed():
        for first in range(0, len(examples), count):
            lines += [f"{example.name}\t{example.label}\t{answer}" for example, answer in zip(
                examples[first : first + count], said(first, count), strict=True)]
            if groups.world.rank == 0 and first % 500 == 0:
                logger.info("%d of %d sequences with the exchange cut", first, len(examples))
    if groups.world.rank == 0:
        write_whole(dest, lambda aside: aside.write_text("\n".join(lines) + "\n", encoding="utf-8"))


def page(out: Path, docs: Path) -> Path:
    """Write needle.md, which is returned, and needle.png into a directory.

    Raises:
        ConfigError: what the page is of is not there.
    """
    last = out / STAGES[-1].name / "seed-0"
    try:
        whole, cut = (path.read_text("utf-8").splitlines() for path in (last / "predictions.tsv", out / "cut.tsv"))
        minutes = [read_object(out / stage.name / "seed-0/summary.json")["seconds"] / 60 for stage in STAGES]
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename}: is not there: run it first") from None
    docs.mkdir(parents=True, exist_ok=True)
    text = markdown(accuracy_by_slice(whole), accuracy_by_slice(cut), minutes)
    write_whole(docs / "needle.md", lambda aside: aside.write_text(text, encoding="utf-8"))
    _draw(docs / "needle.png", {"four ranks": whole, "exchange between ranks cut": cut})
    return docs / "needle.md"


def markdown(whole: dict[int, tuple[int, int]], cut: dict[int, tuple[int, int]], minutes: Sequence[float]) -> str:
    """The page: right answers and all of each slice, and how long each stage trained."""
    rights, all_of = (sum(counts) for counts in zip(*cut.values(), strict=True))
    return "\n".join([
        "# A needle in 8,192 bases, over four ranks", "",
        f"A model of 2 layers and width 64, taught in {len(STAGES)} stages on two CPU cores "
        f"({', '.join(f'{stage.name}: {took:.0f}' for stage, took in zip(STAGES, minutes, strict=True))}; together "
        f"{sum(minutes):.0f} minutes of training), reads test sequences of {LENGTH:,} bases over "
        f"{RANKS} context ranks, and answers from the last base alone. *Cut*: every rank has zeros in place of what "
        "the others would send it. What is asked and why is in [how far the context reaches](../long-context.md).", "",
        "| the motif lies in the slice of | right | with the exchange cut |", "|---|---:|---:|",
        *(f"| rank {part} | {right} of {count}, {right / count:.1%} | {cut[part][0] / cut[part][1]:.1%} |"
          for part, (right, count) in sorted(whole.items())),
        f"| all | {sum(right for right, _ in whole.values())} of {all_of} | {rights / all_of:.1%} |", "",
        "![right answers by distance](needle.png)", "", "To run it again:", "",
        "    python launchers/long_context.py --out runs/needle", ""])


def _draw(path: Path, answers: dict[str, list[str]]) -> None:
    """Right answers by the distance from the last base to the motif's begin."""
    from hyena_dist.tasks.scaling.pictures import figure

    step = LENGTH // 16
    with figure(path, width=7.0, height=3.6) as (_, [axes]):
        for name, lines in answers.items():
            by_distance: dict[int, list[bool]] = {}
            for line in lines[1:]:
                named, label, said, *_ = line.split("\t")
                by_distance.setdefault((LENGTH - 1 - int(named.split("-")[3])) // step, []).append(label == said)
            at = sorted(by_distance)
            rights = [100 * sum(by_distance[number]) / len(by_distance[number]) for number in at]
            axes.plot([(number + 0.5) * step for number in at], rights, marker="o", label=name)
        for border in range(LENGTH // RANKS, LENGTH + 1, LENGTH // RANKS):
            axes.axvline(border, color="0.85", zorder=0)
        axes.axhline(50, color="0.7", ls=":", zorder=0)
        axes.set_ylim(40, 102)
        axes.set_xlabel("bases from the begin of the motif to the last base (grey: borders of ranks)")
        axes.set_ylabel("right answers, %")
        axes.legend(loc="center right")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    answer_severed(*map(Path, sys.argv[1:]))
