"""The picture of a plan: what a rank holds against the length of the windows."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from hyena_dist.cli.plan_table import how
from hyena_dist.costs.plan import Plan, at_length, longest_of
from hyena_dist.tasks.scaling.pictures import figure

LENGTHS = 48
"""Lengths that are asked for."""
AHEAD = 8
"""How many times the length of the plan still lies on a linear axis."""
COLOURS = {"weights": "#20639b", "gradients": "#5b9bd5", "optimizer": "#9dc3e6", "engine's copies": "#bcbddc",
           "buckets": "#756bb1", "saved activations": "#c8453b", "workspace": "#f0965a", "exchange buffers": "#f6c667",
           "cuFFT": "#4f8f5b", "CUDA context": "#7f7f7f", "NCCL": "#a6a6a6", "allocator's gaps": "#d0d0d0"}


def lengths_around(length: int, longest: int) -> list[int]:
    """Lengths around that of the plan and the longest one that fits: at even distances, or at even ratios where the
    longest is far ahead."""
    farthest = max(2 * length, round(1.25 * longest))
    if farthest > AHEAD * length:
        found = np.geomspace(max(1, length // AHEAD), farthest, LENGTHS)
    else:
        found = np.linspace(farthest / LENGTHS, farthest, LENGTHS)
    return sorted({max(1, round(each)) for each in found} | {length})


def bytes_by_length(plan: Plan, lengths: Sequence[int]) -> dict[int, dict[str, float]]:
    """Bytes of a rank by what they are, at each length."""
    return {each: Plan(at_length(plan.config, each), plan.machines).categories for each in lengths}


def draw_bytes(plan: Plan, path: Path) -> None:
    """Draw the bytes of a rank by what they are, one on the other, against the length of the windows, up to where they
    are more than its memory: the same layout, without a warm-up.

    Raises:
        OSError: the file cannot be written.
    """
    train = replace(plan.config.train, seq_len_warmup="none", seq_len_warmup_steps=None)
    plan, length = replace(plan, config=replace(plan.config, train=train)), plan.config.data.seq_len
    longest = longest_of(plan.config, plan.machines)
    found = bytes_by_length(plan, lengths_around(length, longest))
    lengths, gpu = list(found), plan.machines.gpu
    highest = max(sum(of.values()) for of in found.values())
    names = [name for name in COLOURS if max(of.get(name, 0.0) for of in found.values()) > 0.002 * highest]
    with figure(path, width=9.0, height=4.6) as (drawn, (axes,)):
        axes.stackplot(lengths, [[of.get(name, 0.0) / 2**30 for of in found.values()] for name in names], labels=names,
                       colors=[COLOURS[name] for name in names], linewidth=0)
        axes.axhline(gpu.memory / 2**30, color="black", linestyle="--", linewidth=1.2, label=f"memory of {gpu.name}")
        axes.axvline(length, color="black", linewidth=0.8, label=f"length of the plan: {length:,}")
        if longest:
            axes.axvline(longest, color="black", linestyle=":", linewidth=1.2, label=f"longest that fits: {longest:,}")
        if lengths[-1] > AHEAD * length:
            axes.set_xscale("log", base=2)
            axes.xaxis.get_major_locator().set_params(numticks=7)  # numbers of eight digits have room beside each other
        axes.set(xlim=(lengths[0], lengths[-1]), ylim=(0, 1.05 * max(highest, gpu.memory) / 2**30),
                 xlabel="tokens of a window (data.seq_len)", ylabel="GiB of a rank, where it is the most in a step")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_title(f"{plan.machines.gpus} x {gpu.name}: {how(plan)}")
        handles, labels = axes.get_legend_handles_labels()
        drawn.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False, fontsize=8)
