"""The learning rates of each schedule, and cool-downs that are branched off a long run: docs/schedules.png.

example: python -m benchmarks.schedules docs/schedules.png
"""

import sys
from pathlib import Path

from hyena_dist.config.sections.optim import OptimSection
from hyena_dist.train.schedules import learning_rate

LR, WARMUP, STEPS, COOLDOWN, BRANCHES = 6e-4, 500, 10_000, 1_000, (4_000, 7_000)


def curves() -> dict[str, dict[int, float]]:
    """Of each schedule and each branch, the learning rate by step, counted from 0."""
    found = {name: _rates(OptimSection(lr=LR, warmup_steps=WARMUP, schedule=name), 0, STEPS)
             for name in ("cosine", "constant", "wsd")}
    cooled = OptimSection(lr=LR, warmup_steps=WARMUP, schedule="wsd", cooldown=COOLDOWN)
    return found | {f"wsd, branched at {step:,}": _rates(cooled, step, step + COOLDOWN) for step in BRANCHES}


def _rates(optim: OptimSection, first: int, steps: int) -> dict[int, float]:
    return {step: learning_rate(step, optim=optim, steps=steps) for step in range(first, steps)}


def draw(path: Path) -> None:
    """Write the picture."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    styles = {"cosine": ("tab:blue", "-"), "constant": ("tab:gray", ":"), "wsd": ("tab:red", "-")}
    for name, rates in curves().items():
        colour, style = styles.get(name, ("tab:red", "--"))
        axes.plot(list(rates), list(rates.values()), color=colour, linestyle=style, linewidth=1.6, label=name)
    axes.set(xlabel="optimizer step", ylabel="learning rate", ylim=(-2e-5, 1.15 * LR),
             title=f"train.steps={STEPS}, optim.lr={LR:g}, optim.warmup_steps={WARMUP}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", bbox_to_anchor=(0.1, 0.03), fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
