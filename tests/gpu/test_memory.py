"""The peak of a GPU's allocator against the formula of a training step's memory. tests/unit/test_training_memory.py
asks the same of a CPU's tensors."""

from typing import Any

import pytest
import torch

from benchmarks.gpu.measure import Size, cost, forget_peak
from hyena_dist.costs.memory import training_memory
from hyena_dist.costs.utilisation import COPY_BYTES, copy_bandwidth
from hyena_dist.runtime.memory import peak_memory_bytes
from tests.gpu.devices import CUDA, GPU

TOLERANCE = 0.1
SIZES = [Size(4, 256, 131072, checkpointing=checkpointing) for checkpointing in ("none", "selective", "block", "full")]
SIZES += [Size(4, 256, 131072, precision="fp32"), Size(2, 256, 32768, 4), Size(2, 128, 65536, pattern="HA")]


@pytest.mark.parametrize("size", [pytest.param(size, id=str(size), marks=GPU) for size in SIZES])
def test_the_formula_is_the_measured_peak(size: Size, record_property: Any) -> None:
    forget_peak()
    found, _ = cost(size, rounds=2)
    record_property("of the formula", found.peak_bytes / found.formula_bytes)
    print(f"{size}: peak {found.peak_bytes / 2**30:.3f} GiB, formula {found.formula_bytes / 2**30:.3f}")
    assert found.peak_bytes == pytest.approx(found.formula_bytes, rel=TOLERANCE)
    other = "full" if size.checkpointing != "full" else "none"
    wrong = training_memory(size.section(), size.length, size.batch, precision=size.precision,
                            activation_checkpointing=other).total
    assert abs(wrong - found.peak_bytes) > TOLERANCE * found.formula_bytes, "the control: recomputation is seen"


@pytest.mark.parametrize("device", [pytest.param(CUDA, id="cuda", marks=GPU)])
def test_measuring_the_bandwidth_leaves_no_peak(device: torch.device) -> None:
    forget_peak()
    assert copy_bandwidth(device) > 0
    assert peak_memory_bytes(device) < COPY_BYTES
