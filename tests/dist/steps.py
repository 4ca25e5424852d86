"""Whole optimizer steps of a small model at a layout: the peak of a rank's tensors, and every byte that it sends."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.memory import peak_tensor_bytes
from hyena_dist.config.schema import Config
from hyena_dist.data.tokenizer import PAD
from hyena_dist.engine.protocol import Engine
from hyena_dist.model.loss import token_loss
from hyena_dist.model.model import build_model
from hyena_dist.ops.dropout import DropoutKey
from hyena_dist.parallel.groups import Groups
from hyena_dist.parallel.tokens import slice_tokens
from hyena_dist.train.build_engine import build_engine

Sent = Counter[tuple[tuple[int, ...], str]]
"""Bytes by the ranks of the group and the kind of collective."""


class SentBytes(TorchDispatchMode):
    """Counts what this rank sends, by torch's own calls: those of engines too. All collectives are taken as rings."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Sent = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is not torch.Tensor and kind is not torch.nn.Parameter for kind in types):
            return NotImplemented  # distributed tensors first become plain ones
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        group = next(dist.ProcessGroup.unbox(arg) for arg in args
                     if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
        ranks = tuple(dist.get_process_group_ranks(group))
        kind, place, share = CALLS[name]
        size = sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(args[place])
                   if isinstance(leaf, torch.Tensor))
        self.sent[ranks, kind] += share(size, len(ranks))


def _whole(size: int, _: int) -> int:
    return size


def _nothing(_: int, __: int) -> int:
    return 0


Call = tuple[str, int, Callable[[int, int], int]]
CALLS: dict[str, Call] = {
    "allreduce_": ("all_reduce", 0, lambda size, n: 2 * (n - 1) * size // n),
    "_allgather_base_": ("all_gather", 1, lambda size, n: (n - 1) * size),
    "allgather_into_tensor_coalesced_": ("all_gather", 1, lambda size, n: (n - 1) * size),
    "allgather_": ("all_gather", 1, lambda size, n: (n - 1) * size),
    "_reduce_scatter_base_": ("reduce_scatter", 1, lambda size, n: (n - 1) * size // n),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1, lambda size, n: (n - 1) * size // n),
    "alltoall_base_": ("all_to_all", 1, lambda size, n: (n - 1) * size // n),
    "broadcast_": ("broadcast", 0, _whole), "send": ("halo", 0, _whole), "recv_": ("halo", 0, _nothing),
    "barrier": ("barrier", 0, _nothing),
}
"""Calls of c10d: the kind of collective, which argument is what a rank gives, and how much of it it sends."""


@dataclass
class Measured:
    """What one rank found."""

    peak: int
    """Bytes of all tensors that lived at one time, from before the model was built, over two steps."""
    sent: dict[tuple[str, str], int]
    """Bytes of a third step, by axis and kind of collective."""
    context_rank: int


def one_step(config: Config, engine: Engine, groups: Groups, multiple: int) -> None:
    """As the trainer: every micro-batch forward and backward, then the update."""
    train, length = config.train, config.data.seq_len
    count = train.global_batch_size // (train.micro_batch_size * groups.data.size)
    scored, total = torch.full((), float(length), dtype=torch.float64), torch.zeros(())
    _sum_over_data(scored, groups)
    engine.module.train()
    engine.accumulation_steps = count
    for number in range(count):
        ids = torch.randint(7, 11, (train.micro_batch_size, length + 1))
        inputs, targets = (slice_tokens(x, groups.context, multiple=multiple, fill=PAD)
                           for x in (ids[:, :-1], ids[:, 1:]))
        key = DropoutKey(0, number, torch.arange(train.micro_batch_size))
        loss, _ = token_loss(engine.module(inputs, key), targets, groups.tensor)
        engine.backward(loss / length)
        total += loss.detach()
        del loss
    engine.step(1e-3)
    _sum_over_data(total, groups)


def _sum_over_data(tensor: torch.Tensor, groups: Groups) -> None:
    if groups.data_context.size > 1:
        dist.all_reduce(tensor, group=groups.data_context.group)


def measure(config: Config, groups: Groups) -> Measured:
    """A rank's peak, and what it sends in a step. Its groups have the sizes of the configuration."""
    with peak_tensor_bytes() as peak:
        model = build_model(config, groups)
        multiple = model.token_multiple
        engine = build_engine(config, model, model.placement(), groups)
        for _ in range(2):
            one_step(config, engine, groups, multiple)
    with SentBytes() as counted:
        one_step(config, engine, groups, multiple)
    axes = {tuple(dist.get_process_group_ranks(axis.group)): name for name, axis in
            (("data", groups.data_context), ("context", groups.context), ("tensor", groups.tensor))
            if axis.group is not None and axis.size > 1}
    sent: dict[tuple[str, str], int] = {}
    for (ranks, kind), size in counted.sent.items():
        if size:
            name = axes.get(ranks, str(ranks))
            if name == "context" and kind not in ("all_to_all", "halo"):
                name = "data"  # where there is one data rank the two are the same ranks
            sent[name, kind] = sent.get((name, kind), 0) + size
    return Measured(peak.bytes, sent, groups.context.rank)
