"""What a rank sends in an optimizer step, byte by byte, by formula: of the model's own collectives and of the engine's.

Every collective is taken as a ring, which is the least that it can send: an all-reduce sends its tensor 2 (n - 1) / n
times, a reduce-scatter half of that, an all-gather its piece n - 1 times, an all-to-all (n - 1) / n of its tensor.
Flags of a byte or two, by which ranks agree on stopping and saving, are left out.

`tests/dist/test_traffic.py` counts the same in real steps. Legend: B sequences of l tokens on a context rank, D
channels, T tensor ranks, E bytes of an element of a product; the residual stream is float32.
"""

from collections import Counter
from collections.abc import Iterable

from hyena_dist.config.schema import Config
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.warmup import Stage, stages
from hyena_dist.costs.engines import Layout, engine_traffic
from hyena_dist.model.kinds import kinds_of, mixer_kind
from hyena_dist.model.kinds.formulas import FP32, Split, ring
from hyena_dist.parallel.tokens import padded_length, token_multiple

Traffic = Counter[tuple[str, str]]
"""Bytes by axis (tensor, context, or data: data x context, over which gradients are averaged) and collective."""

FP64 = 8


def step_traffic(config: Config, world_size: int, *, context_rank: int | None = None) -> Traffic:
    """Bytes that a rank sends in an optimizer step at data.seq_len, without validation and saving.

    Args:
        context_rank: the rank's place among those of its sequence, whose halos differ at both ends; None: the one that
            sends the most.
    """
    layout = Layout.of(config, world_size)
    stage = stages(config, data_ranks=layout.data)[-1]
    sent: Traffic = Counter()
    for key, size in _micro_batch(config, stage, context_rank).items():
        sent[key] += layout.micro_batches * size
    sent += engine_traffic(config, layout)
    # The trainer sums what the ranks score, before the step, and their losses after it.
    sent["data", "all_reduce"] += ring("all_reduce", FP64, layout.shards) + ring("all_reduce", FP32, layout.shards)
    return Counter({key: size for key, size in sent.items() if size})


def _micro_batch(config: Config, stage: Stage, context_rank: int | None) -> Traffic:
    """Of the forward and backward pass of one micro-batch."""
    section, parallel, train = config.model, config.parallel, config.train
    split, batch = Split.of(config, stage.micro_batch_size), stage.micro_batch_size
    itemsize = FP32 if train.precision == "fp32" else 2
    seq_len = padded_length(stage.seq_len, token_multiple(context=parallel.context, tensor=parallel.tensor,
                                                          sequence=parallel.sequence))
    passes = 2 if train.activation_checkpointing in ("block", "full") else 1  # forward passes of a block
    sent: Traffic = Counter()
    for letter, layers in kinds_of(section).items():
        kind = mixer_kind(letter)
        for name, (forward, backward) in kind.exchanged(section, seq_len, batch, itemsize=itemsize, split=split,
                                                        rank=context_rank).items():
            sent["context", name] += layers * (passes * forward + backward)
        if split.tensor > 1:
            sent["tensor", "all_reduce"] += layers * _summed((FP32 * size for size in kind.shared(section)), split)
    if split.tensor > 1:
        tokens = batch * seq_len // split.context
        sent += _tensor(section, tokens, passes, itemsize=itemsize, split=split)
    return sent


def _summed(sizes: Iterable[int], split: Split) -> int:
    return sum(ring("all_reduce", size, split.tensor) for size in sizes)


def _tensor(section: ModelSection, tokens: int, passes: int, *, itemsize: int, split: Split) -> Traffic:
    """Over the tensor ranks: what enters and leaves the products of each half of a block, the embedding and the head,
    the gradients of norms, and the loss of a split vocabulary."""
    D, T, layers = section.hidden_size, split.tensor, section.num_layers
    stream, out = FP32 * tokens * D, itemsize * tokens * D
    # Recomputation goes through the first half of a block; in the second it stops before what leaves it.
    again = (passes - 1) * layers
    sent: Traffic = Counter()
    if split.sequence:
        gather = {size: ring("all_gather", size // T, T) for size in (stream, out)}
        scatter = {size: ring("reduce_scatter", size, T) for size in (stream, out)}
        sent["tensor", "all_gather"] = ((2 * layers + 1) * gather[stream] + 2 * layers * gather[out] + gather[stream]
                                        + again * 2 * gather[stream])
        sent["tensor", "reduce_scatter"] = ((2 * layers + 1) * scatter[stream] + 2 * layers * scatter[out]
                                            + scatter[stream] + again * scatter[out])
        sent["tensor", "all_reduce"] = 2 * layers * _summed([FP32 * D], split)  # the biases after the products
    else:
        sent["tensor", "all_reduce"] = ((2 * layers + 2) * _summed([stream], split)
                                        + (2 * layers + again) * _summed([out], split))
    sent["tensor", "all_reduce"] += 2 * (2 * layers + 1) * _summed([FP32 * D], split)  # weight and bias of each norm
    sent["tensor", "all_reduce"] += _summed([FP32 * tokens, 2 * FP32 * tokens], split)  # the loss
    return sent


def links(traffic: Traffic, config: Config, world_size: int, gpus_per_node: int) -> dict[str, float]:
    """The same by the kind of link, of the rank that sends the most over the slower: inside a node, or between nodes.

    Ranks fill nodes in their order. Of a ring a node's last rank sends everything to the next node; of an all-to-all
    each rank sends a share to every other.
    """
    tensor, context = config.parallel.tensor, config.parallel.context
    ranks = {"tensor": range(tensor), "context": range(0, tensor * context, tensor),
             "data": range(0, world_size, tensor)}
    found = {"inside": 0.0, "between": 0.0}
    for (axis, kind), size in traffic.items():
        first, last = ranks[axis][0] // gpus_per_node, ranks[axis][-1] // gpus_per_node
        share = 0.0 if first == last else 1.0
        if share and kind == "all_to_all":
            beside = Counter(rank // gpus_per_node for rank in ranks[axis])
            share = (len(ranks[axis]) - min(beside.values())) / (len(ranks[axis]) - 1)
        found["between"] += share * size
        found["inside"] += (1 - share) * size
    return found
