"""What context parallelism costs a rank against the number of ranks P: bytes sent, peak tensor memory and time of a
model's forward and backward pass. Gradient averaging is not in it: every kind of data parallelism has that.

A row is refused when the logits or a gradient differ from those of one rank. One process per rank: gloo on CPU cores,
or NCCL on as many GPUs.
"""

import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks.memory import peak_tensor_bytes
from hyena_dist.config.schema import ModelSection, ParallelSection
from hyena_dist.model.config import hyena_config
from hyena_dist.model.initial import initialize
from hyena_dist.model.loss import token_loss
from hyena_dist.model.model import HyenaModel
from hyena_dist.parallel.collectives import all_reduce, count_bytes
from hyena_dist.parallel.groups import Axis, Groups, init_groups
from hyena_dist.parallel.tokens import slice_tokens

METHODS = ("all_to_all", "distributed_fft")
ONE_RANK = "one rank"
TOLERANCE = 2e-5
RANKS = (1, 2, 4, 8)
KERNEL = 3  # taps of the short convolution


@dataclass(frozen=True)
class Size:
    """A model in float32 and its batch of one sequence."""

    length: int = 65536
    width: int = 64
    layers: int = 2


@dataclass(frozen=True)
class Row:
    """Of the rank with the largest number."""

    ranks: int
    method: str
    sent_bytes: int
    formula_bytes: int
    peak_tensor_bytes: int
    seconds: float
    """Median over the repetitions, forward and backward."""
    largest_difference: float
    """Of the logits and every gradient from those of one rank, max|a - b| / max|b|."""


@dataclass(frozen=True)
class Result:
    """What one rank measured with one method."""

    sent_bytes: int
    formula_bytes: int
    peak_tensor_bytes: int
    seconds: float
    logits: Tensor
    gradients: dict[str, Tensor]


def mixer_bytes(method: str, *, channels: int, tokens: int, batch: int, ranks: int, itemsize: int,
                order: int = 2) -> tuple[int, int]:
    """What the long convolutions of one mixer send from a rank: (forward, backward).

    `channels` are those of a tensor rank, `tokens` those of a context rank's slice, `itemsize` the bytes of an
    activation. all_to_all moves u, the gates between two convolutions, and the result back; distributed_fft moves u
    and y as they are and three spectra, or five backward, as complex numbers of float32.
    """
    away = channels * tokens * (ranks - 1) // ranks
    if method == "all_to_all":
        return order * batch * itemsize * away, order * batch * itemsize * away
    forward = 2 * batch * itemsize + 8 * (2 * batch + 1)
    backward = 3 * batch * itemsize + 8 * (3 * batch + 2)
    return (order - 1) * forward * away, (order - 1) * backward * away


def halo_bytes(*, channels: int, batch: int, itemsize: int, axis: Axis, order: int = 2) -> tuple[int, int]:
    """What the short convolution of one mixer sends from a rank: forward to the right, backward to the left."""
    message = (KERNEL - 1) * (order + 1) * channels * batch * itemsize
    return message * (axis.rank < axis.size - 1), message * (axis.rank > 0)


def build(size: Size, groups: Groups, method: str, device: torch.device) -> HyenaModel:
    """The model with its initial values, the same on any number of ranks."""
    section = ModelSection(num_layers=size.layers, hidden_size=size.width, max_seq_len=size.length, embed_dropout=0.0,
                           short_conv_kernel=KERNEL)
    parallel = ParallelSection(context=groups.context.size, context_method="auto" if method == ONE_RANK else method)
    config = hyena_config(section, parallel=parallel)
    model = HyenaModel(config, groups.collection())
    initialize(model, config, model.placement(), model.tensor, seed=0)
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
    cuda = torch.cuda.device_count() >= max(ranks)
    (reference,) = _spawn(size, 1, repetitions, cuda)[ONE_RANK]
    rows = [_row(1, ONE_RANK, [reference], reference)]
    for count in sorted(set(ranks) - {1}):
        rows += [_row(count, method, found, reference) for method, found in
                 _spawn(size, count, repetitions, cuda).items()]
    return rows


def _row(ranks: int, method: str, found: list[Result], reference: Result) -> Row:
    worst, name = max(differences(found, reference))
    if not worst <= TOLERANCE:
        raise ValueError(f"{method} on {ranks} ranks: {name} differs from that of one rank by {worst:.1e}, "
                         f"tolerance {TOLERANCE:.0e}")
    busiest = max(found, key=lambda result: result.sent_bytes)
    return Row(ranks, method, busiest.sent_bytes, busiest.formula_bytes,
               max(result.peak_tensor_bytes for result in found), max(result.seconds for result in found), worst)


def differences(found: list[Result], reference: Result) -> list[tuple[float, str]]:
    """The difference from one rank of the ranks' logits, side by side, and of the sum of their gradients."""
    pairs = [("logits", torch.cat([result.logits for result in found], 1), reference.logits)]
    pairs += [(name, sum(result.gradients[name] for result in found), whole)
              for name, whole in reference.gradients.items()]
    return [(float((a - b).abs().max() / b.abs().max()), name) for name, a, b in pairs]


def _spawn(size: Size, ranks: int, repetitions: int, cuda: bool) -> dict[str, list[Result]]:
    """By method, what every rank measured."""
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(_rank_main, (size, ranks, repetitions, cuda, directory), nprocs=ranks)
        by_rank = [torch.load(Path(directory, f"result.{rank}"), weights_only=False) for rank in range(ranks)]
    return {method: [results[method] for results in by_rank] for method in by_rank[0]}


def _rank_main(rank: int, size: Size, ranks: int, repetitions: int, cuda: bool, directory: str) -> None:
    warnings.filterwarnings("ignore", module=r"megatron\.")
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=f"file://{directory}/store", rank=rank,
                            world_size=ranks)
    groups = init_groups(context=ranks)
    methods = METHODS if ranks > 1 else (ONE_RANK,)
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
    mixer = mixer_bytes(method, channels=size.width, tokens=size.length // axis.size, batch=1, ranks=axis.size,
                        itemsize=4)
    halo = halo_bytes(channels=size.width, batch=1, itemsize=4, axis=axis)
    seconds = []
    for _ in range(repetitions):
        model.zero_grad()
        dist.barrier()
        started = time.perf_counter()
        forward_backward(model, axis, size.length)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return Result(traffic.total, size.layers * (sum(mixer) + sum(halo)), peak.bytes,
                  statistics.median(seconds) if seconds else 0.0, logits.cpu(), gradients)
