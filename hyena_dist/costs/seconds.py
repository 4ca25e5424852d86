"""How long an optimizer step takes, by its operations and bytes and by the rates of a machine, given or measured.

A machine has a rate for each kind of unit: matrix products, FFTs, memory for all that is done per element, and each
kind of link. What one kind does is not taken to hide behind another.
"""

from dataclasses import dataclass, field

from hyena_dist.config.schema import Config
from hyena_dist.config.warmup import stages
from hyena_dist.costs.devices import ATTENTION_SHARE, COPY_SHARE, ESTIMATED, LINK_SHARE, PRODUCT_SHARE, Gpu
from hyena_dist.costs.engines import Layout
from hyena_dist.costs.flops import recomputed_flops
from hyena_dist.costs.roofline import ATTENTION, ENGINE, LONG_CONV, OPTIMIZER, fewest
from hyena_dist.model.kinds.formulas import Split

GPU_KERNELS = 2.93
"""How many times longer than its fewest bytes and operations take, one after the other, a pass needs on a GPU with
Triton's kernels: fitted to 8x256 at 1,048,576 tokens in bf16, whose step took 632 ms on an H100."""
GPU_TORCH = 10.0
"""The same by torch's own operations, which made the same step take 2.3 s."""
LAUNCHES, LAUNCHES_STEP = 5e-3, 7e-3
"""Seconds in which the host of a GPU launches what one layer does in both passes, and the rest of a step: 8x256 takes
51 ms at 16,384 tokens, 2x128 17 ms at 1,024."""
OVERLAP = 1.5
"""Host and GPU work at the same time, but wait for each other here and there: a step takes (host^p + gpu^p)^(1/p) with
this p. With it these constants give the nine steps that were measured on the H100 within 15 %."""
RECOMPUTED = {"none": 0.0, "selective": 0.06, "block": 0.30, "full": 0.36}
"""Which share of a pass recomputation adds, by train.activation_checkpointing: 8x256 at 1,048,576 tokens took 869, 923
and 1185 ms on an H100 with none, selective and full; block is between."""


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second."""

    copy: float
    """Bytes read and written by operations on single elements."""
    product: float
    """Operations of matrix products, in the run's precision."""
    attention: float
    """Operations of attention between tokens, in the run's precision: what a pass reaches, not made `slower`."""
    fft: float | None
    """Operations of FFTs, 5 n log2 n each; None: they are bound by `copy`."""
    inside: float
    """Bytes that a rank sends to others of its node."""
    between: float
    """Bytes that a rank sends to another node."""
    layer: float = 0.0
    """Seconds in which the host launches what a layer does, for every micro-batch."""
    step: float = 0.0
    """The same of the rest of a step."""
    slower: float = 1.0
    """How many times longer a pass takes than its units at these rates."""
    sources: dict[str, str] = field(default_factory=dict)
    """MEASURED or ESTIMATED, by rate; ESTIMATED where nothing is said."""

    def source(self, name: str) -> str:
        return self.sources.get(name, ESTIMATED)


def gpu_rates(gpu: Gpu, precision: str, *, kernels: bool) -> Rates:
    """Of a GPU of the table."""
    product = gpu.fp32 if precision == "fp32" else gpu.bf16
    return Rates(copy=COPY_SHARE * gpu.bandwidth, product=PRODUCT_SHARE * product,
                 attention=ATTENTION_SHARE * product, fft=None, inside=LINK_SHARE * gpu.node_link,
                 between=LINK_SHARE * gpu.between_link, layer=LAUNCHES, step=LAUNCHES_STEP,
                 slower=GPU_KERNELS if kernels else GPU_TORCH)


@dataclass(frozen=True)
class Work:
    """What a rank computes in an optimizer step."""

    products: float
    """Operations of matrix products, but those of attention between tokens."""
    attention: float
    ffts: float
    """Operations of FFTs."""
    bytes: float
    """That operations on single elements read and write, at least."""
    recomputed: float
    """Operations that the backward pass repeats, beside those."""
    weights: float
    """Bytes that the update reads and writes."""

    @property
    def flops(self) -> float:
        return self.products + self.attention + self.ffts


def step_work(config: Config, layout: Layout) -> Work:
    """Of one rank, at data.seq_len. What is split over tensor and context ranks is shared evenly."""
    train, section = config.train, config.model
    stage = stages(config, data_ranks=layout.data)[-1]
    costs = fewest(section, stage.seq_len, stage.micro_batch_size, precision=train.precision)
    ranks = layout.tensor * layout.context
    passes = [cost for name, cost in costs.items() if name not in (ENGINE, OPTIMIZER)]
    ffts, attention = (costs[part].flops if part in costs else 0.0 for part in (LONG_CONV, ATTENTION))
    again = recomputed_flops(section, stage.seq_len, stage.micro_batch_size, train.activation_checkpointing)
    share = layout.micro_batches / ranks
    # ZeRO 1 to 3 and FSDP2 update a share of the weights on each rank.
    sharded = 1 if config.engine.name == "deepspeed" and config.engine.zero_stage == 0 else layout.shards
    return Work(products=share * (sum(cost.flops for cost in passes) - ffts - attention),
                attention=share * attention, ffts=share * ffts, bytes=share * sum(cost.bytes for cost in passes),
                recomputed=share * again,
                weights=(costs[ENGINE].bytes + costs[OPTIMIZER].bytes / sharded) / layout.tensor)


def compute_seconds(config: Config, layout: Layout, rates: Rates) -> dict[str, float]:
    """Of a step on a rank by kind of unit, without what it sends."""
    work = step_work(config, layout)
    again = 1 + RECOMPUTED[config.train.activation_checkpointing]
    factor = rates.slower * again
    found = {"product": factor * work.products / rates.product + again * work.attention / rates.attention,
             "fft": factor * work.ffts / rates.fft if rates.fft else 0.0,
             "elements": factor * work.bytes / rates.copy + work.weights / rates.copy}
    busy, host = sum(found.values()), layout.micro_batches * config.model.num_layers * rates.layer + rates.step
    return {**found, "host": (busy**OVERLAP + host**OVERLAP) ** (1 / OVERLAP) - busy}


def send_seconds(sent: dict[str, float], rates: Rates) -> dict[str, float]:
    """Of what a rank sends inside its node and between nodes."""
    return {"inside": sent["inside"] / rates.inside, "between": sent["between"] / rates.between}


def uses_kernels(config: Config, gpu: Gpu) -> bool:
    """Whether the times of a step by Triton's kernels are known: in half precision; of the Hyena operator at one
    context rank, order 2 and the lengths that were measured. Elsewhere those of torch's operations stand in."""
    from hyena_dist.ops.triton.plans import measured
    section, seq_len, backend = config.model, config.data.seq_len, config.ops.backend
    if config.train.precision == "fp32" or (gpu.name not in ("h100", "h200") if backend == "auto" else
                                            backend != "triton"):
        return False
    if "H" not in section.layer_kinds:
        return True
    return section.hyena_order == 2 and Split.of(config, 1).context == 1 and measured(seq_len)
