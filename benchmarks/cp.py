"""What context parallelism costs a rank against the number of ranks P: bytes sent, peak tensor memory and time of a
model's forward and backward pass. Gradient averaging is not in it: every kind of data parallelism has that.

Results are compared with those of one rank in float64, because one rank's own float32 can be the less exact side: it
sums a gradient over all tokens in one run. A row is refused when it is wrong. One process per rank: gloo on CPU cores,
or NCCL on as many GPUs.
"""

import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks.memory import peak_tensor_bytes
from benchmarks.timing import timed
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.model.config import hyena_config
from hyena_dist.model.initial import initialize
from hyena_dist.model.kinds import mixer_kind
from hyena_dist.model.kinds.formulas import FP32, Split
from hyena_dist.model.loss import token_loss
from hyena_dist.model.model import HyenaModel
from hyena_dist.parallel.collectives import count_bytes
from hyena_dist.parallel.groups import Axis, Groups, init_groups
from hyena_dist.parallel.tokens import slice_tokens

METHODS = ("all_to_all", "distributed_fft")
ONE_RANK, EXACT = "one rank", "one rank in float64"
TOLERANCE = 2e-5
RANKS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Size:
    """A model in float32 and its batch of one sequence."""

    length: int = 65536
    width: int = 64
    layers: int = 2

    def __str__(self) -> str:
        return f"{self.layers}x{self.width} at {self.length}"


@dataclass(frozen=True)
class Row:
    """Of the rank with the largest number."""

    size: str
    ranks: int
    method: str
    sent_bytes: int
    formula_bytes: int
    peak_tensor_bytes: int
    seconds: float
    """Median over the repetitions, forward and backward."""
    largest_difference: float
    """Of the logits and every gradient from those of one rank in float64, max|a - b| / max|b|."""


@dataclass(frozen=True)
class Result:
    """What one rank measured with one method."""

    sent_bytes: int
    formula_bytes: int
    peak_tensor_bytes: int
    seconds: float
    logits: Tensor
    gradients: dict[str, Tensor]


def section_of(size: Size) -> ModelSection:
    """The model of a size."""
    return ModelSection(num_layers=size.layers, hidden_size=size.width, max_seq_len=size.length, embed_dropout=0.0)


def build(size: Size, groups: Groups, method: str, device: torch.device) -> HyenaModel:
    """The model with its initial values, the same on any number of ranks."""
    section = section_of(size)
    parallel = ParallelSection(context=groups.context.size, context_method=method if method in METHODS else "auto")
    config = hyena_config(section, parallel=parallel,
                          params_dtype=torch.float64 if method == EXACT else torch.float32)
    model = HyenaModel(config, groups.collection())
    initialize(model, model.placement(), model.tensor, seed=0)
    return model.to(device)


def forward_backward(model: HyenaModel, axis: Axis, length: int) -> Tensor:
    """The mean loss of this rank's slice of one sequence, and its gradients; returns the logits."""
    device = model.final_norm.weight.device
    ids = torch.randint(7, 11, (1, length + 1), generator=torch.Generator().manual_seed(1))
    inputs, targets = (slice_tokens(x, axis, multiple=model.token_multiple, fill=4).to(device)
                       for x in (ids[:, :-1], ids[:, 1:]))
    logits = model(inputs)
    total, _ = token_loss(logits, targets)
    (total / length).backward()
    return logits.detach()


def run(size: Size, *, ranks: tuple[int, ...] = RANKS, repetitions: int = 3) -> list[Row]:
    """Measure one rank, then every number of ranks with both methods.

    Raises:
        ValueError: the length is not a multiple of P^2 or the width of P, or results differ from those of one rank.
    """
    for count in ranks:
        if size.length % count**2 or size.width % count:
            raise ValueError(f"{count} ranks need a length that is a multiple of {count**2} and a width that is one of "
                             f"{count}, got {size.length} and {size.width}")
    cuda = on_gpus(ranks)
    one = _spawn(size, 1, repetitions, cuda)
    (exact,), own = one[EXACT], one[ONE_RANK]
    noise = differences(own, exact)
    rows = [_row(size, 1, ONE_RANK, own, noise)]
    for count in sorted(set(ranks) - {1}):
        for method, found in _spawn(size, count, repetitions, cuda).items():
            errors = differences(found, exact)
            check(errors, noise, f"{method} on {count} ranks")
            rows.append(_row(size, count, method, found, errors))
    return rows


def on_gpus(ranks: tuple[int, ...]) -> bool:
    """Whether there is a GPU for each rank; without, all run on the CPU."""
    return torch.cuda.device_count() >= max(ranks)


def _row(size: Size, ranks: int, method: str, found: list[Result], errors: dict[str, float]) -> Row:
    busiest = max(found, key=lambda result: result.sent_bytes)
    return Row(str(size), ranks, method, busiest.sent_bytes, busiest.formula_bytes,
               max(result.peak_tensor_bytes for result in found), max(result.seconds for result in found),
               max(errors.values()))


def differences(found: list[Result], exact: Result) -> dict[str, float]:
    """How far the ranks' logits, side by side, and the sums of their gradients are from those of one rank."""
    pairs = {"logits": (torch.cat([result.logits for result in found], 1), exact.logits)}
    for name, whole in exact.gradients.items():
        pairs[name] = torch.stack([result.gradients[name] for result in found]).sum(0), whole
    return {name: float((a - b).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()}


def check(errors: dict[str, float], noise: dict[str, float], what: str) -> None:
    """Refuse results that are wrong by more than the tolerance and by more than twice what one rank in the same
    precision is: two roundings of one size.

    Raises:
        ValueError: a quantity is.
    """
    for name, error in errors.items():
        allowed = max(TOLERANCE, 2 * noise[name])
        if not error <= allowed:
            raise ValueError(f"{what}: {name} differs from that of one rank by {error:.1e}, tolerance {allowed:.1e}")


def _spawn(size: Size, ranks: int, repetitions: int, cuda: bool) -> dict[str, list[Result]]:
    """By method, what every rank measured."""
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(_rank_main, (size, ranks, repetitions, cuda, directory), nprocs=ranks)
        by_rank = [torch.load(Path(directory, f"result.{rank}"), weights_only=False) for rank in range(ranks)]
    return {method: [results[method] for results in by_rank] for method in by_rank[0]}


def _rank_main(rank: int, size: Size, ranks: int, repetitions: int, cuda: bool, directory: str) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=f"file://{directory}/store", rank=rank,
                            world_size=ranks, device_id=device if cuda else None)
    groups = init_groups(context=ranks)
    methods = METHODS if ranks > 1 else (EXACT, ONE_RANK)
    results = {method: measure(size, groups, method, repetitions, device) for method in methods}
    torch.save(results, Path(directory, f"result.{rank}"))
    dist.barrier()
    dist.destroy_process_group()


def measure(size: Size, groups: Groups, method: str, repetitions: int, device: torch.device) -> Result:
    """One pass for bytes, memory and results, which is the warm-up too, then the timed ones."""
    model, axis = build(size, groups, method, device), groups.context
    with count_bytes() as traffic, peak_tensor_bytes(device) as peak:
        logits = forward_backward(model, axis, size.length)
    gradients = {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}
    sent = mixer_kind("H").exchanged(section_of(size), size.length, 1, itemsize=FP32, rank=axis.rank,
                                     split=Split(context=axis.size, method=method if axis.size > 1 else ""))
    formula = size.layers * sum(forward + backward for forward, backward in sent.values())
    seconds = []
    for _ in range(repetitions if method != EXACT else 0):
        model.zero_grad()
        dist.barrier()
        seconds.append(timed(lambda: forward_backward(model, axis, size.length), device)[0])
    return Result(traffic.total, formula, peak.bytes,
                  statistics.median(seconds) if seconds else 0.0, logits.cpu(), gradients)


def draw(path: Path) -> Path:
    """A picture of a written result, beside it: bytes, memory and time against the number of ranks."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    result = json.loads(path.read_text(encoding="utf-8"))
    rows, machine = result["rows"], result["machine"]
    one = next(row for row in rows if row["ranks"] == 1)
    ranks = sorted({row["ranks"] for row in rows})
    figure, (sent, memory, seconds) = plt.subplots(1, 3, figsize=(13, 4.6), layout="constrained")
    for method, colour, marker in zip(METHODS, ("tab:blue", "tab:orange"), "os", strict=True):
        found = [one, *(row for row in rows if row["method"] == method)]
        for axes, key, unit, line in ((sent, "sent_bytes", 2**20, "none"), (memory, "peak_tensor_bytes", 2**20, "-"),
                                      (seconds, "seconds", 1, "-")):
            axes.plot([row["ranks"] for row in found], [row[key] / unit for row in found], linestyle=line,
                      marker=marker, color=colour, label=f"{method}, measured")
        sent.plot([row["ranks"] for row in found], [row["formula_bytes"] / 2**20 for row in found], ":", color=colour,
                  label=f"{method}, formula")
    memory.plot(ranks, [one["peak_tensor_bytes"] / 2**20 / count for count in ranks], "k:", label="one rank's / P")
    memory.set_yscale("log")
    memory.set_yticks([one["peak_tensor_bytes"] / 2**20 / count for count in ranks])
    memory.yaxis.set_major_formatter("{x:,.0f}")
    for axes, title, label in ((sent, "Bytes that a rank sends", "MiB"), (seconds, "Time", "seconds"),
                               (memory, "Peak memory of a rank's tensors", "MiB (log; ticks: one rank's / P)")):
        axes.set(title=title, ylabel=label, xlabel="context ranks P, one process each")
        axes.set_xscale("log")
        axes.set_xticks(ranks, [str(count) for count in ranks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9, loc="upper right")
    for axes in (sent, seconds):
        axes.set_ylim(0, 1.4 * axes.dataLim.ymax)  # room for the legend
    title = f"Forward and backward pass in float32: {one['size']} tokens (layers x channels), {machine['device']}"
    if max(ranks) > machine["cores"]:
        title += f"\nP processes share {machine['cores']} cores: the time of more ranks is not that of as many devices"
    figure.suptitle(title)
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=120)
    plt.close(figure)
    return picture
