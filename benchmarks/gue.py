"""What a model that was pretrained for minutes knows of GUE, beside models that were not: the runs, one after the
other, and the page of docs/results that shows them."""

import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyena_dist.config.errors import ConfigError
from hyena_dist.config.plain import read_object
from hyena_dist.runtime.files import write_whole
from hyena_dist.tasks.suites.gue import GUE

MODELS = {"pretrained": ["model.kmer=5", "model.kmer_overlap=true"], "pretrained-bases": []}
"""What is pretrained, with the keys of its tokens: overlapping 5-mers, one for each base, or single bases."""
WAYS = {"all": "fine-tuned", "lora": "adapters (LoRA)", "probe": "probe, frozen", "bases": "fine-tuned, single bases"}
"""Ways to train a pretrained model, each a suite of its own; the first three train that of 5-mers."""
BESIDE = {"scratch": "from nothing", "kmers": "k-mers", "cnn": "CNN"}
"""What `finetune.baselines` puts beside the first."""


@dataclass(frozen=True)
class Plan:
    """What is run.

    Args:
        genomes: SPECIES=FILE, to pretrain on.
        gue: directory of the data sets.
        out: everything but the page is written in here.
        steps: of pretraining.
        most: training sequences of a task.
        tasks: of GUE; () all whose files are there.
        ranks: processes of the pretraining.
        keys: section.key=value of every fine-tuning, behind the plan's own.
    """

    genomes: tuple[str, ...]
    gue: str
    out: Path
    steps: int
    most: int
    tasks: tuple[str, ...]
    ranks: int
    keys: tuple[str, ...]


def commands(plan: Plan) -> list[list[str]]:
    """Every command, in order; each goes on, or ends at once, where an earlier start has been through it."""
    python, shards = sys.executable, plan.out / "shards"
    start = [python] if plan.ranks == 1 else ["torchrun", f"--nproc_per_node={plan.ranks}"]
    found = [] if shards.exists() else [[python, "shards/build.py", *plan.genomes, "--out", str(shards),
                                         "--val-fraction", "0.02", "--allow-copies", "1"]]
    found += [[*start, "launchers/pretrain.py", "--config", "quickstart", *tokens, f"data.shards={shards}",
               f"train.run_dir={plan.out / model}", f"train.steps={plan.steps}", f"train.eval_every={plan.steps // 4}",
               f"train.save_every={plan.steps // 4}", f"optim.warmup_steps={min(100, plan.steps // 4)}"]
              for model, tokens in MODELS.items()]
    for way in WAYS:
        model, trained = ("pretrained-bases", "all") if way == "bases" else ("pretrained", way)
        beside = ",".join(BESIDE) if way == "all" else ""
        found.append([python, "launchers/suite.py", GUE.name, "--data", plan.gue, "--from", str(plan.out / model),
                      "--out", str(plan.out / way), "--most", str(plan.most),
                      *(["--tasks", *plan.tasks] if plan.tasks else []), f"finetune.trained={trained}",
                      f"finetune.baselines={beside or chr(39) * 2}", "finetune.epochs=3", "finetune.seeds=3",
                      "finetune.rc=average", "train.global_batch_size=8", "train.micro_batch_size=8", "optim.lr=0.001",
                      *plan.keys])
    return found


def results(out: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Mean, deviation, range and seeds of each task's metric on test, by task and by kind of model.

    Raises:
        ConfigError: no task has a result.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for way in WAYS:
        for task in GUE.tasks:
            path = out / way / task.name / "run" / "result.json"
            if not path.is_file():
                continue
            result = read_object(path)
            kinds = found.setdefault(task.name, {})
            kinds[way] = {**result["metrics"][task.metric], "collapsed": result["collapsed_seeds"]}
            kinds.update({name: result["baselines"][name][task.metric] for name in BESIDE
                          if name in result["baselines"]})
    if not found:
        raise ConfigError(f"{out}: has no results of a task: run it first")
    return found


def page(plan: Plan, docs: Path) -> Path:
    """Write gue.md, which is returned, gue.csv and gue.png into a directory."""
    found = results(plan.out)
    kinds = [kind for kind in (*WAYS, *BESIDE) if any(kind in of_task for of_task in found.values())]
    docs.mkdir(parents=True, exist_ok=True)
    text = markdown(plan, found, kinds)
    write_whole(docs / "gue.md", lambda aside: aside.write_text(text, encoding="utf-8"))
    lines = _csv(found, kinds)
    write_whole(docs / "gue.csv", lambda aside: aside.write_text(lines, encoding="utf-8"))
    _draw(docs / "gue.png", found, kinds)
    return docs / "gue.md"


def markdown(plan: Plan, found: dict[str, dict[str, dict[str, Any]]], kinds: Sequence[str]) -> str:
    """The page."""
    took = " and ".join(_minutes(plan.out / model / "summary.json") for model in MODELS)
    names, keys = WAYS | BESIDE, " ".join(plan.keys)
    genomes = " ".join(f"{name}={Path(file).name}" for name, _, file in (
        genome.partition("=") for genome in plan.genomes))
    lines = ["# GUE, by a model that was pretrained for minutes", "",
             "Two HyenaDNA models of 2 layers and width 128, one whose tokens are overlapping 5-mers, one for each "
             f"base, and one of single bases, were pretrained for {took}, on {plan.ranks} processes, on "
             f"{', '.join(genome.partition('=')[0] for genome in plan.genomes)}, and then given at most "
             f"{plan.most:,} training sequences of each task of GUE whose training file was there, "
             f"for 3 epochs in batches of 8, answers averaged over both strands, with {_seeds(found)} "
             f"seeds{' (' * bool(keys)}{keys}{')' * bool(keys)}. Where a column does not say single bases, its model "
             "reads 5-mers. MCC on the test "
             "file (covid: macro F1), mean ± standard deviation; weights, k and regularisations are "
             "chosen by the dev file alone, and the test file is read once for each seed. The CNN and the model from "
             "nothing had as many steps.", "", "![MCC of every task](gue.png)", "",
             "| task | " + " | ".join(names[kind] for kind in kinds) + " |", "|" + "---|" * (1 + len(kinds))]
    for task, of_task in found.items():
        best = max((_mean(values) for values in of_task.values()), default=0.0)
        lines.append(f"| {task} | " + " | ".join(_cell(of_task.get(kind), best) for kind in kinds) + " |")
    lines += ["", *_verdict(found, kinds), "", "To run it again:", "",
              f"    python launchers/gue.py --genomes {genomes} --gue GUE --out runs/gue-results {keys}".rstrip(), ""]
    return "\n".join(lines)


def _minutes(summary: Path) -> str:
    return f"{read_object(summary)['seconds'] / 60:.0f} minutes" if summary.is_file() else "an unknown time"


def _seeds(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """How many there are of the fine-tuned model, 3 or 1 to 3."""
    counts = sorted({of_task["all"]["seeds"] for of_task in found.values() if "all" in of_task})
    return f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(*counts)


def _mean(values: dict[str, Any]) -> float:
    return -1.0 if values["mean"] is None else values["mean"]


def _cell(values: dict[str, Any] | None, best: float) -> str:
    if values is None or values["mean"] is None:
        return ""
    said = f"{values['mean']:.3f}" + (f" ± {values['deviation']:.3f}" if values["deviation"] is not None else "")
    said += f" ({len(values['collapsed'])} collapsed)" if values.get("collapsed") else ""
    return f"**{said}**" if values["mean"] == best else said


def _verdict(found: dict[str, dict[str, dict[str, Any]]], kinds: Sequence[str]) -> list[str]:
    """On how many tasks the fine-tuned model is better than each of the others."""
    lines = []
    for kind in kinds:
        both = [of_task for of_task in found.values() if kind in of_task and "all" in of_task]
        if kind == "all" or not both:
            continue
        better = sum(_mean(of_task["all"]) > _mean(of_task[kind]) for of_task in both)
        difference = sum(_mean(of_task["all"]) - _mean(of_task[kind]) for of_task in both) / len(both)
        lines.append(f"- Fine-tuned beside {(WAYS | BESIDE)[kind]}: better on {better} of {len(both)} tasks, "
                     f"{difference:+.3f} on average.")
    return lines


def _csv(found: dict[str, dict[str, dict[str, Any]]], kinds: Sequence[str]) -> str:
    said = io.StringIO()
    writer = csv.writer(said, lineterminator="\n")
    writer.writerow(["task", "model", "mean", "deviation", "lowest", "highest", "seeds", "collapsed_seeds"])
    for task, of_task in found.items():
        for kind in kinds:
            if values := of_task.get(kind):
                numbers = [values.get(name) for name in ("mean", "deviation", "lowest", "highest", "seeds")]
                writer.writerow([task, kind, *("" if value is None else value for value in numbers),
                                 json.dumps(values.get("collapsed", []))])
    return said.getvalue()


def _draw(path: Path, found: dict[str, dict[str, dict[str, Any]]], kinds: Sequence[str]) -> None:
    from hyena_dist.tasks.scaling.pictures import figure

    with figure(path, width=9.0, height=4.2) as (_, [axes]):
        width = 0.8 / len(kinds)
        for number, kind in enumerate(kinds):
            at = [place + (number - (len(kinds) - 1) / 2) * width for place in range(len(found))]
            values = [of_task.get(kind, {"mean": None, "deviation": None}) for of_task in found.values()]
            axes.bar(at, [value["mean"] or 0 for value in values], width, label=(WAYS | BESIDE)[kind],
                     yerr=[value["deviation"] or 0 for value in values], error_kw={"lw": 0.8})
        axes.set_xticks(range(len(found)), list(found), rotation=20, ha="right")
        axes.set_ylabel("MCC on test")
        axes.legend(ncols=3, fontsize=8)
