"""A tiny model on a device computes what a CPU computes in float64: logits, loss and every gradient; and on the same
device the same bits twice."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from hyena_dist.config.sections.model import ModelSection
from hyena_dist.model.config import hyena_config
from hyena_dist.model.initial import initialize
from hyena_dist.model.loss import token_loss
from hyena_dist.model.model import HyenaModel
from hyena_dist.ops import chunking, implicit_filter, long_conv
from hyena_dist.ops.dropout import DropoutKey
from tests.compare import rel
from tests.gpu.devices import CPU, CUDA, DEVICES, GPU

LENGTH, BATCH = 517, 3
TOLERANCE = {"fp64": 1e-9, "fp32": 2e-5, "bf16": 6e-2, "fp16": 2e-2}


@dataclass(frozen=True)
class Case:
    """A way to compute the same."""

    precision: str = "fp32"
    recompute: str = "none"
    order: int = 2
    pattern: str = "H"
    offload: bool = False
    small_chunks: bool = False
    method: str = "auto"
    backend: str = "auto"

    def __str__(self) -> str:
        return "-".join(str(value) for value in (
            self.precision, self.recompute, f"order{self.order}", self.pattern, *["offload"] * self.offload,
            *["chunks"] * self.small_chunks, *(name for name in (self.method, self.backend) if name != "auto")))


CASES = [*(Case(precision, recompute) for precision in ("fp32", "bf16")
           for recompute in ("none", "selective", "block", "full")),
         Case("fp64"), Case("fp16"), Case(offload=True), Case("bf16", "block", offload=True), Case(order=3),
         Case("bf16", order=3), Case(pattern="HA"), Case("bf16", "full", pattern="HA"), Case(small_chunks=True),
         Case("bf16", small_chunks=True), Case(method="right_angle"), Case(method="rfft"), Case("bf16", method="rfft"),
         *(Case(precision, recompute, backend="triton") for precision, recompute in (
             ("fp32", "none"), ("bf16", "none"), ("fp16", "selective"), ("bf16", "full"))),
         Case(order=3, backend="triton"), Case("bf16", "full", order=3, backend="triton")]
ON_CPU = [Case("bf16"), Case("fp16"), Case("bf16", "full", order=3, pattern="HA"), Case(small_chunks=True)]
"""Enough to try the test; what a CPU computes has tests of its own."""


def build(case: Case) -> HyenaModel:
    section = ModelSection(num_layers=2, hidden_size=32, max_seq_len=LENGTH, filter_order=16, embed_dropout=0.2,
                           resid_dropout=0.1, num_attention_heads=4, layer_pattern=case.pattern, hyena_order=case.order)
    double = case.precision == "fp64"
    config = hyena_config(section, precision="fp32" if double else case.precision,
                          activation_checkpointing=case.recompute, offload_activations=case.offload,
                          params_dtype=torch.float64 if double else torch.float32, backend=case.backend)
    model = HyenaModel(config)
    initialize(model, model.placement(), model.tensor, seed=5)
    with torch.no_grad():  # initial biases are 0: nothing would show that one is forgotten
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and "conv_bias" not in name:
                parameter.add_(0.01)
    return model.train()


def computed(case: Case, device: torch.device, *, dropout_seed: int = 1) -> dict[str, Tensor]:
    """Logits, loss and every gradient by name, on the CPU."""
    with ExitStack() as stack:
        if case.small_chunks:
            for module, values in ((chunking, {"CHUNK_ELEMENTS": 64, "LEAST_TOKENS": 64}),
                                   (implicit_filter, {"LAGS_PER_CHUNK": 2})):
                stack.enter_context(mock.patch.multiple(module, **values))
        if case.method != "auto":
            stack.enter_context(mock.patch.dict(long_conv._FASTEST, {device.type: case.method}))
        return _forward_backward(build(case).to(device), device, dropout_seed)


def _forward_backward(model: HyenaModel, device: torch.device, dropout_seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(7, 11, (BATCH, LENGTH + 1), generator=generator)
    targets = ids[:, 1:].masked_fill(torch.rand(BATCH, LENGTH, generator=generator) < 0.3, -100)
    key = DropoutKey(dropout_seed, 2, torch.arange(BATCH, device=device))
    logits = model(ids[:, :-1].to(device), key)
    total, count = token_loss(logits, targets.to(device))
    scale = 2.0**12 if model.config.compute_dtype is torch.float16 else 1.0  # as a loss scale does
    (scale * total / count).backward()
    found = {"logits": logits, "loss": total / count}
    found |= {name: parameter.grad / scale for name, parameter in model.named_parameters()}
    return {name: value.detach().cpu() for name, value in found.items()}


@cache
def exact(order: int, pattern: str) -> dict[str, Tensor]:
    return computed(Case("fp64", order=order, pattern=pattern), CPU)


def worst(found: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[float, str]:
    assert found.keys() == reference.keys()
    return max((rel(found[name], reference[name]), name) for name in reference)


@pytest.mark.parametrize(("case", "device"), [
    *(pytest.param(case, CPU, id=f"{case}-cpu") for case in ON_CPU),
    *(pytest.param(case, CUDA, id=f"{case}-cuda", marks=GPU) for case in CASES)])
def test_a_device_computes_what_the_cpu_computes_in_float64(case: Case, device: torch.device,
                                                            record_property: Any) -> None:
    first, again = computed(case, device), computed(case, device)
    error, name = worst(first, exact(case.order, case.pattern))
    record_property("error", error)
    print(f"{case} on {device}: worst {name} {error:.1e}, tolerance {TOLERANCE[case.precision]}")
    assert error < TOLERANCE[case.precision], name
    differ = [name for name in first if not torch.equal(first[name], again[name])]
    assert not differ, f"not the same bits twice: {differ}"


@pytest.mark.parametrize("device", DEVICES)
def test_controls_of_the_comparison(device: torch.device) -> None:
    """Another draw of dropout, and one gradient without its last token, are far beyond the tolerances."""
    found = computed(Case(), device, dropout_seed=9)
    error, name = worst(found, exact(2, "H"))
    print(f"another dropout moves {name} by {error:.1e}, tolerance {TOLERANCE['fp32']} to {TOLERANCE['bf16']}")
    assert error > 3 * TOLERANCE["bf16"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [1024, 32768, 2**20])
def test_positions_and_rates_have_the_cpus_bits(device: torch.device, length: int) -> None:
    """A checkpoint that moves between devices computes the same filter."""
    shape = implicit_filter.FilterShape(length, 5, 0.05)
    for make in (lambda where: implicit_filter.positional_features(shape, slice(0, length), torch.float32, where),
                 lambda where: implicit_filter.time(shape, slice(0, length), torch.float32, where),
                 lambda where: implicit_filter.decay_rates(256, torch.float32, where)):
        on_device, on_cpu = make(device).cpu(), make(CPU)
        assert torch.equal(on_device, on_cpu), int((on_device != on_cpu).sum())
