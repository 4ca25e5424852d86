"""What a generated base costs, with a memory of what was read (`model.decode`) and by a full forward pass over it all.

With the memory every base is made. A forward pass for each is too much, so that some prefixes are measured, evenly
spaced from one base to the last, and the mean over all is that of the straight lines between them.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.models import Size
from benchmarks.timing import timed
from hyena_dist.model.config import hyena_config
from hyena_dist.model.decode import Decoder
from hyena_dist.model.model import HyenaModel

PREFIXES = 9
TOLERANCE = 1e-4
"""Relative, of the last step's predictions in float32; a sum that is left out changes them by more than 1e-3."""
MEMORY, FORWARD = "with a memory", "a forward pass each"


@dataclass(frozen=True)
class Row:
    """One side at one length, of one sequence in float32; medians of the rounds."""

    side: str
    size: str
    length: int
    ms_per_base: float
    cpu_ms_per_base: float
    """What all threads worked: a busy machine moves it less than the clock."""
    ratio: float
    """Times that with a memory, by the clock,"""
    cpu_ratio: float
    """and by the threads' work."""


def run(lengths: list[int], *, width: int, layers: int, rounds: int, device: torch.device) -> list[Row]:
    """Measure both sides at each length, in turns.

    Raises:
        AssertionError: their predictions differ.
    """
    rows = []
    for length in lengths:
        size = Size(length, width, 1, layers)
        model = HyenaModel(hyena_config(size.section())).to(device).eval()
        ids = torch.randint(7, 11, (length,), generator=torch.Generator().manual_seed(0)).to(device)
        _compare(model, ids)
        turns = [(_with_memory(model, ids, device), _by_forward_passes(model, ids, device)) for _ in range(rounds)]
        memory, forward = ([statistics.median(turn[side][clock] for turn in turns) for clock in (0, 1)]
                           for side in (0, 1))
        for side, times in ((MEMORY, memory), (FORWARD, forward)):
            rows.append(Row(side, f"{layers}x{width}", length, times[0] * 1e3, times[1] * 1e3, times[0] / memory[0],
                            times[1] / memory[1]))
    return rows


def _steps(model: HyenaModel, ids: torch.Tensor) -> torch.Tensor:
    """Read a base at a time; the last predictions."""
    decoder = Decoder(model, [ids[:1]], max(len(ids) - 1, 1))
    for token in ids[1:, None]:
        decoder.step(token)
    return decoder.logits


@torch.no_grad()
def _compare(model: HyenaModel, ids: torch.Tensor) -> None:
    ids = ids[:512]
    found, wanted = _steps(model, ids)[0].double(), model(ids[None])[0, -1].double()
    error = float((found - wanted).abs().max() / wanted.abs().max())
    assert error < TOLERANCE, f"predictions with and without a memory differ by {error:.1e}, tolerance {TOLERANCE}"


def _with_memory(model: HyenaModel, ids: torch.Tensor, device: torch.device) -> tuple[float, float]:
    """Seconds a base, by the clock and by the threads' work."""
    wall, cpu = timed(lambda: _steps(model, ids), device)
    return wall / len(ids), cpu / len(ids)


@torch.no_grad()
def _by_forward_passes(model: HyenaModel, ids: torch.Tensor, device: torch.device) -> tuple[float, float]:
    """The mean of forward passes over all prefixes."""
    lengths = np.unique(np.linspace(1, len(ids), PREFIXES).round().astype(int))
    times = np.array([timed(lambda count=count: model(ids[None, :count]), device) for count in lengths])
    every = np.arange(1, len(ids) + 1)
    wall, cpu = (np.interp(every, lengths, column).mean() for column in times.T)
    return float(wall), float(cpu)


def draw(path: Path) -> Path:
    """The picture of a written result, beside it: milliseconds a base against the length."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = result["rows"]
    figure, axes = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
    for side, colour, marker in ((MEMORY, "tab:blue", "o"), (FORWARD, "tab:red", "s")):
        found = [row for row in rows if row["side"] == side]
        axes.plot([row["length"] for row in found], [row["ms_per_base"] for row in found], marker=marker, color=colour,
                  label=side)
        for row in found if side == FORWARD else []:
            axes.annotate(f"{row['ratio']:,.0f}", (row["length"], row["ms_per_base"]), textcoords="offset points",
                          xytext=(0, 7), ha="center", color=colour)
    lengths = sorted({row["length"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.margins(y=0.15)
    axes.grid(alpha=0.3)
    axes.set(xlabel="bases of the sequence (log)", ylabel="milliseconds a base, mean over the sequence (log)",
             title=f"Generation, {rows[0]['size']} (layers x channels), one sequence, float32\n"
                   f"{result['machine']['device']}; numbers: times that with a memory")
    axes.legend()
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    return picture
