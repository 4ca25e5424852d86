"""The table and the picture of docs/studies/prompts.md, from the runs that its commands make:
python docs/studies/prompts.py runs/prompts"""

import json
import re
import sys
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt

NAMES = {"prompt": ("vectors of the soft prompt", "soft prompt, frozen model"),
         "shots": ("examples of each class", "examples, whole model trained")}


def main() -> None:
    runs = Path(sys.argv[1])
    found: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
    for path in sorted(runs.glob("*/result.json")):
        match = re.fullmatch(r"(.+)-(prompt|shots)-(\d+)", path.parent.name)
        if match is None:
            continue
        result = json.loads(path.read_text("utf-8"))
        count = result["seeds"][0]["scores"][result["judged_on"]]["sequences"]
        accuracy, classes, seeds = result["metrics"]["accuracy"]["mean"], len(result["classes"]), len(result["seeds"])
        spread = result["metrics"]["accuracy"]["deviation"] or 0.0
        error = (accuracy * (1 - accuracy) / count + spread**2 / seeds) ** 0.5
        found.setdefault((match[2], f"{match[1]}, {classes} classes"), []).append((int(match[3]), accuracy, error))
        cells = (match[1], str(classes), NAMES[match[2]][1], match[3], f"{accuracy:.3f} ± {error:.3f}",
                 f"{1 / classes:.3f}", str(seeds), str(len(result["collapsed_seeds"])))
        sys.stdout.write(f"| {' | '.join(cells)} |\n")
    matplotlib.use("Agg")
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    tasks = sorted({task for _, task in found})
    for axis, (kind, (label, title)) in zip(axes, NAMES.items(), strict=True):
        for task in tasks:
            x, y, error = zip(*sorted(found.get((kind, task), [(float("nan"),) * 3])), strict=True)
            axis.errorbar(x, y, error, marker="o", label=task, capsize=3, color=f"C{tasks.index(task)}")
            axis.axhline(1 / int(task.split()[-2]), color="grey", linestyle=":", linewidth=0.8)  # chance
        axis.set(xlabel=label, title=title)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="test accuracy (chance dotted)", xscale="log", ylim=(0, 1))
    axes[1].set_xticks(range(5))
    axes[1].legend(loc="lower right", fontsize="small")
    figure.savefig(Path(__file__).with_name("prompts.png"), dpi=110)


if __name__ == "__main__":
    main()
