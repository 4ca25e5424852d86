"""All finished points of a sweep on the same held-out bases, compared group by group: tables in Markdown and a
picture. `launchers/studies.py` is its command."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hyena_dist.config.errors import ConfigError

BLOCK = 4
"""Neighbouring windows that the bootstrap draws together, since neighbours are alike."""
RESAMPLES = 2000
PERCENT = 100
ALL = ("all", "all")
"""The group of all scored bases."""
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:olive", "tab:cyan")


@dataclass(frozen=True)
class Scores:
    """What the models of one setting give to the held-out bases."""

    name: str
    groups: dict[tuple[str, str], np.ndarray]
    """By what bases are told apart and by group: float64 [seeds, 2, windows], the sum of the losses in nats and the
    number of the scored bases of each window."""

    def mean(self, group: tuple[str, str], windows: int | None = None) -> np.ndarray:
        """[2, blocks], the mean over seeds of blocks of windows that have a base of the group.

        Args:
            windows: of so many longer windows, each of which is as many of these as every other; None: of these.
        """
        sums = self.groups[group].mean(0)
        if windows is not None and sums.shape[1] % windows == 0:
            sums = sums.reshape(2, windows, -1).sum(-1)
        sums = np.add.reduceat(sums, np.arange(0, sums.shape[1], BLOCK), axis=1)
        return sums[:, sums[1] > 0]

    def perplexity(self, group: tuple[str, str]) -> float:
        total, bases = self.mean(group).sum(1)
        return float(np.exp(total / bases))

    def seed_range(self, group: tuple[str, str]) -> float:
        """How far the perplexities of the seeds lie apart, in percent of their mean."""
        total, bases = self.groups[group].sum(2).T
        found = np.exp(total / bases)
        return float(PERCENT * np.ptp(found) / found.mean())


@dataclass(frozen=True)
class Difference:
    """How much higher a perplexity is than another, in percent, with a 95 % interval."""

    percent: float
    low: float
    high: float


def difference(scores: Scores, base: Scores, group: tuple[str, str]) -> Difference:
    """Of one group, with both models on the same resamples of the blocks of windows. Where one has longer windows of
    the same bases, blocks are of these.

    Raises:
        ConfigError: their windows do not hold the same bases.
    """
    counts = [each.groups[group].shape[2] for each in (scores, base)]
    windows = min(counts) if len(set(counts)) > 1 else None
    (own, bases), (others, other_bases) = scores.mean(group, windows), base.mean(group, windows)
    if own.size != others.size or (windows is not None and not np.array_equal(bases, other_bases)):
        raise ConfigError(f"{scores.name} and {base.name} have other windows of {group[1]}: compare models whose "
                          "windows have as many bases, or where those of one are whole numbers of the other's")
    drawn = np.random.default_rng(0).multinomial(own.size, np.full(own.size, 1 / own.size), RESAMPLES)
    drawn = np.concatenate([np.ones((1, own.size)), drawn])  # the first is what was measured
    change = PERCENT * np.expm1(drawn @ own / (drawn @ bases) - drawn @ others / (drawn @ other_bases))
    low, high = np.quantile(change[1:], (0.025, 0.975))
    return Difference(float(change[0]), float(low), float(high))


def score_run(run_dir: str, shards: str, split: str, regions: Path | None, by: Sequence[str]
              ) -> dict[tuple[str, str], np.ndarray]:
    """float64 [2, windows] of every group, as in `Scores`, of one run.

    Raises:
        UserError: no such run, shards or regions.
    """
    from hyena_dist.data.manifest import Manifest
    from hyena_dist.data.pool import Pool
    from hyena_dist.data.tokenizer import tokenizer_of
    from hyena_dist.model.evaluate import evaluate_split
    from hyena_dist.parallel.groups import Groups
    from hyena_dist.tasks.evaluate import load_run, rows_per_batch
    from hyena_dist.tasks.held_out import HeldOut

    config, model, _ = load_run(run_dir)
    seq_len = config.data.val_seq_len or config.data.seq_len
    held_out = HeldOut([Pool(Manifest.load(shards))], split=split, seq_len=seq_len, regions=regions,
                       batch_size=rows_per_batch(config.model, seq_len), tokenizer=tokenizer_of(config.model))
    windows = len(held_out.batches.windows)
    found = evaluate_split(model, held_out.batches, Groups.single(), next(model.parameters()).device,
                           class_of=range(windows), classes=windows, kinds=held_out.kinds, kinds_of=held_out.kinds_of)
    if found is None:
        raise ConfigError(f"{shards}: split {split} has no base to score: build the shards with some")
    groups = {ALL: found.sums.sum(1)}
    for what in by:
        if what in held_out.of_kinds:
            groups |= {(what, name): found.sums[:, inside].sum(1)
                       for name, inside in _members(held_out.of_kinds[what])}
        elif what in held_out.of_classes:
            names = [held_out.of_classes[what][number] for number in held_out.class_of]
            groups |= {(what, name): found.sums.sum(1) * inside for name, inside in _members(names)}
        else:
            raise ConfigError(f"--by {what}: bases are told apart by {', '.join(held_out.of_classes)}, case and, with "
                              "--regions, region")
    return {group: sums for group, sums in groups.items() if sums[1].any()}


def _members(names: Sequence[Iterable[str]]) -> list[tuple[str, np.ndarray]]:
    """Each name with a mask of the places that have it; decile 10 comes behind decile 9."""
    every = sorted({name for of_place in names for name in of_place},
                   key=lambda name: (name.startswith("decile 10"), name))
    return [(name, np.array([name in of_place for of_place in names])) for name in every]


def score_sweep(config: Path, names: Sequence[str] | None, **how: Any) -> list[Scores]:
    """Every setting of a sweep, in the order of its file, over the seeds that are finished.

    Raises:
        UserError: as `score_run`; nothing is finished; there are not as many names as settings.
    """
    from hyena_dist.tasks.sweep.expand import expand
    from hyena_dist.tasks.sweep.file import read_sweep
    from hyena_dist.tasks.sweep.state import read_state

    sweep = read_sweep(config)
    settings: dict[str, list[dict[tuple[str, str], np.ndarray]]] = {}
    for point in expand(sweep):
        own = {key: value for key, value in point.set.items() if key not in (*sweep.set, "train.seed", "data.seed")}
        runs = settings.setdefault(", ".join(f"{key.split('.')[-1]}={value}" for key, value in own.items()), [])
        state = read_state(point.directory)
        if state is not None and state["status"] == "finished":
            sys.stderr.write(f"scoring {state['run_dir']}\n")
            runs.append(score_run(state["run_dir"], **how))
    if names is not None and len(names) != len(settings):
        raise ConfigError(f"--names has {len(names)}, and {config} has {len(settings)} settings: {'; '.join(settings)}")
    found = [Scores(name, {group: np.stack([run[group] for run in runs]) for group in runs[0]})
             for name, runs in zip(names or settings, settings.values(), strict=True) if runs]
    if not found:
        raise ConfigError(f"{config}: no point is finished: run it with launchers/sweep.py")
    return found


def tables(scores: Sequence[Scores], base: Scores) -> str:
    """Perplexities and differences of every group, in Markdown."""
    parts = []
    for what in dict.fromkeys(what for what, _ in base.groups if what != "all" or len(base.groups) == 1):
        groups = [ALL, *(group for group in base.groups if group[0] == what and what != "all")]
        bases = {group: int(base.mean(group)[1].sum()) for group in groups}
        rows = [[what, "bases", *(each.name for each in scores)], ["---", *["---:"] * (len(scores) + 1)]]
        rows += [[group[1], f"{bases[group]:,}", *(f"{each.perplexity(group):.3f}" for each in scores)]
                 for group in groups]
        others = [each for each in scores if each is not base]
        rows += [[], [f"% against {base.name}", *(each.name for each in others)], ["---", *["---:"] * len(others)]]
        rows += [[group[1], *(_words(difference(each, base, group)) for each in others)] for group in groups]
        parts.append("\n".join(f"| {' | '.join(row)} |" if row else "" for row in rows) + "\n")
        if any(len(each.groups[ALL]) > 1 for each in scores):
            apart = max(each.seed_range(group) for each in scores for group in groups)
            parts.append(f"Seeds of one setting lie at most {apart:.2f} % apart in a row of this table.\n")
    seeds = ", ".join(f"{each.name} {len(each.groups[ALL])}" for each in scores)
    return "\n".join(parts) + f"\nSeeds: {seeds}.\n"


def _words(change: Difference) -> str:
    return f"{change.percent:+.2f} ({change.low:+.2f} to {change.high:+.2f})"


def draw(path: Path, scores: Sequence[Scores], base: Scores, what: str) -> None:
    """Perplexities of the groups, and their differences to one setting with intervals, side by side."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    groups = [group for group in base.groups if group[0] == what]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 1.6 + 0.13 * len(groups) * (len(scores) + 1)), sharey=True,
                                         layout="constrained")
    heights = np.arange(len(groups))
    for number, each in enumerate(scores):
        places = heights + 0.7 * ((number + 0.5) / len(scores) - 0.5)
        colour = COLOURS[number % len(COLOURS)]
        left.plot([each.perplexity(group) for group in groups], places, "o", color=colour, label=each.name)
        if each is not base:
            found = [difference(each, base, group) for group in groups]
            sides = [[each.percent - each.low for each in found], [each.high - each.percent for each in found]]
            right.errorbar([each.percent for each in found], places, xerr=sides, fmt="o", color=colour, capsize=2)
    right.axvline(0, color="black", linewidth=0.8)
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
        for height in heights[1:]:
            axes.axhline(height - 0.5, color="lightgrey", linewidth=0.8)
    left.set(yticks=heights, yticklabels=[name for _, name in groups], xlabel="perplexity per base", ylabel=what)
    left.invert_yaxis()
    right.set_xlabel(f"% above {base.name} (95 % of block bootstrap)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=len(scores), frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
