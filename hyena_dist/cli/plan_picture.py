"""The picture of a plan: what a rank holds against the length of the windows."""

from dataclasses import replace
from pathlib import Path

from hyena_dist.cli.plan_table import how
from hyena_dist.costs.plan import Plan, at_length
from hyena_dist.tasks.scaling.pictures import figure

LENGTHS = 48
"""Lengths that are asked for, from 0 to FARTHEST times that of the plan."""
FARTHEST = 2
COLOURS = {"weights": "#20639b", "gradients": "#5b9bd5", "optimizer": "#9dc3e6", "engine's copies": "#bcbddc",
           "buckets": "#756bb1", "saved activations": "#c8453b", "workspace": "#f0965a", "exchange buffers": "#f6c667",
           "cuFFT": "#4f8f5b", "CUDA context": "#7f7f7f", "NCCL": "#a6a6a6", "allocator's gaps": "#d0d0d0"}


def bytes_by_length(plan: Plan) -> dict[int, dict[str, float]]:
    """Bytes of a rank by what they are, at lengths around that of the plan: the same layout, without a warm-up."""
    config, length = plan.config, plan.config.data.seq_len
    config = replace(config, train=replace(config.train, seq_len_warmup="none", seq_len_warmup_steps=None))
    lengths = {max(1, round(FARTHEST * length * step / LENGTHS)) for step in range(1, LENGTHS + 1)} | {length}
    return {each: Plan(at_length(config, each), plan.machines).categories for each in sorted(lengths)}


def draw_bytes(plan: Plan, path: Path) -> None:
    """Draw the bytes of a rank by what they are, one on the other, against the length of the windows.

    Raises:
        OSError: the file cannot be written.
    """
    found = bytes_by_length(plan)
    lengths, gpu = list(found), plan.machines.gpu
    highest = max(sum(of.values()) for of in found.values())
    names = [name for name in COLOURS if max(of.get(name, 0.0) for of in found.values()) > 0.002 * highest]
    with figure(path, width=9.0, height=4.6) as (drawn, (axes,)):
        axes.stackplot(lengths, [[of.get(name, 0.0) / 2**30 for of in found.values()] for name in names], labels=names,
                       colors=[COLOURS[name] for name in names], linewidth=0)
        axes.axhline(gpu.memory / 2**30, color="black", linestyle="--", linewidth=1.2, label=f"memory of {gpu.name}")
        axes.axvline(plan.config.data.seq_len, color="black", linewidth=0.8, label="length of the plan")
        axes.set(xlim=(lengths[0], lengths[-1]), ylim=(0, 1.05 * max(highest, min(gpu.memory, 2 * highest)) / 2**30),
                 xlabel="tokens of a window (data.seq_len)", ylabel="GiB of a rank, where it is the most in a step")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_title(f"{plan.machines.gpus} x {gpu.name}: {how(plan)}")
        handles, labels = axes.get_legend_handles_labels()
        drawn.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False, fontsize=8)
