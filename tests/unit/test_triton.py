"""Triton's kernels in its interpreter, values and every gradient against float64, and the backend's choice."""

import importlib.util
import json
import logging
import os
import subprocess
import sys

import pytest
import torch

from hyena_dist.config.schema import Config
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.ops import OpsSection
from hyena_dist.model.model import build_model
from hyena_dist.ops import backends
from hyena_dist.ops.mix import Asked
from hyena_dist.parallel.groups import Groups

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the extra `kernels`")

# 2-norms of errors. Rounding results to bfloat16 alone makes 1.7e-3. Of order 3 float16's errors go through two
# convolutions. Gates in each other's place make an error above 0.1.
FLOAT32, FLOAT16, BFLOAT16, WRONG, EQUAL = 2e-6, 1.5e-3, 5e-3, 0.1, 1e-300
FAST = {
    "cufft 97": FLOAT32, "cufft 1021, 1 tap": FLOAT32, "cufft 2500, 4 taps": FLOAT32, "cufft bf16": BFLOAT16,
    "cufft fp16": FLOAT16, "operator": FLOAT32, "operator, recomputed": FLOAT32,
    "one kernel 97": FLOAT16, "one kernel 97, float32": FLOAT32, "one kernel 1021, 1 tap": FLOAT16,
    "one kernel bf16": BFLOAT16, "three kernels 601": FLOAT16, "bytes, one kernel": 0.05, "order 3": FLOAT32,
    "segments": FLOAT32, "one kernel 251, no taps": FLOAT32, "slices": FLOAT32, "a slice in segments": FLOAT32,
    "kept spectra": EQUAL,
    "a slice of order 3": FLOAT32, "rows with a gate": FLOAT32, "bytes, around a slice of order 3": 0.05,
}
CONTROLS = ("control", "control of tables", "control of segments", "control of spectra", "control of addresses",
            "control of inner gates")
HARD = {f"{what}, {name}": FLOAT32 if "float32" in name else BFLOAT16
        for what in ("zeros", "constant", "tone", "loud", "huge", "tiny", "nan")
        for name in ("one kernel", "one kernel, float32", "three kernels", "three kernels, float32")}
SIZES = "three kernels", "one kernel", "columns of 64", "order 3", "around"
SLOW = HARD | {f"sizes, {name}": FLOAT32 for name in SIZES} | {
    "three kernels 1021, float32": FLOAT32, "three kernels, blocks": BFLOAT16,
    "one kernel 256, five rows": FLOAT16, "three kernels 1000, five rows, no taps": FLOAT16,
    "three kernels 601, order 3, no taps": FLOAT32, "order 3, three kernels": 2 * FLOAT16, "order 3, cufft": FLOAT32,
    "slices of half precision": FLOAT16, "slices, three kernels": FLOAT16, "slices, cufft": FLOAT32,
    "slices in segments": FLOAT32, "a slice": FLOAT32, "a slice of 4 taps": FLOAT32, "a slice of one tap": FLOAT32,
    "a slice of half precision": 3 * FLOAT16, "a slice of order 3, half precision": 3 * FLOAT16,
    "a slice of order 4, channel by channel": FLOAT32, "rows with a gate, half precision": FLOAT16,
    "rows with a gate, three kernels": FLOAT16, "rows with a gate, cufft": FLOAT32,
    "rows with a gate in segments": FLOAT32, "segments, order 3": FLOAT32, "bytes, around a slice": 0.05,
    "bytes, around a slice of order 4, channel by channel": 0.05, "bytes, rows with a gate": 0.05,
    "registration over context ranks": FLOAT32,
    "segments, three kernels": FLOAT16, "segments, cufft": FLOAT32,
    "three kernels 9973": FLOAT16, "three kernels 9973, float32": FLOAT32, "three tokens": 2 * FLOAT16,
    "one token": FLOAT32, "operator of order 3": FLOAT32, "operator in segments": FLOAT32, "far apart": FLOAT16,
    "registration": FLOAT32, "bytes, order 3": 0.05, "kept spectra, order 3": EQUAL,
    "registration of spectra": 0.05,
    **{f"bytes, {name}": 0.05 for name in ("one kernel, float32", "three kernels", "three kernels, float32")}}


WEIGHTS = 1e-4
"""What Adam makes of gradients' errors of 1e-6."""


def run_cases(names: list[str], module: str = "tests.triton_cases") -> dict[str, dict[str, float]]:
    """In processes of the interpreter."""
    done = subprocess.run([sys.executable, "-m", module, *names], capture_output=True, text=True,
                          env=os.environ | {"TRITON_INTERPRET": "1"}, timeout=1100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def largest(errors: dict[str, float]) -> float:
    """Of the errors; a sum over all tokens may be small beside its summands, which are rounded: half of its error."""
    return max(error / 2 if what in ("dweight", "dbias", "ddirect") else error for what, error in errors.items())


@pytest.fixture(scope="module")
def fast() -> dict[str, dict[str, float]]:
    return run_cases([*FAST, *CONTROLS])


MODELS = {"training": 1e-3, "golden tiny": FLOAT32, "golden wide": FLOAT32, "bf16, all recomputed": 2e-2,
          "fp16, some recomputed": 5e-3}
"""Whole models: the published model's numbers, and 50 steps beside torch's operations."""


@pytest.fixture(scope="module")
def models() -> dict[str, dict[str, float]]:
    return run_cases([*MODELS])


@pytest.fixture(scope="module")
def slow() -> dict[str, dict[str, float]]:
    return run_cases([*SLOW])


@needs_triton
@pytest.mark.parametrize("name", FAST)
def test_values_and_gradients(fast, name):
    print(name, fast[name], "allowed", FAST[name], "a wrong gate", WRONG)
    assert largest(fast[name]) < FAST[name]


@needs_triton
@pytest.mark.parametrize("name", CONTROLS)
def test_wrong_gates_tables_and_borders_are_seen(fast, name):
    assert fast[name]["y"] > WRONG


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("name", SLOW)
def test_hard_rows_long_rows_and_training(slow, name):
    print(name, slow[name], "allowed", SLOW[name], "a wrong gate", WRONG)
    assert largest(slow[name]) < SLOW[name]


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("name", MODELS)
def test_whole_models(models, name):
    print(name, models[name], "allowed", MODELS[name])
    assert max(models[name].values()) < MODELS[name]


@pytest.mark.slow
@needs_triton
def test_context_ranks_by_kernels():
    """Two ranks exchange rows, which kernels convolve, of orders 2 to 4; and whole models are trained under ZeRO and
    FSDP2, over data, context and tensor ranks, also with recomputation, as by one process with torch's operations."""
    found = run_cases([], "tests.triton_ranks")
    print(found)
    assert min(found.pop("control").values()) > WRONG
    assert set(found) == {"whole", "recomputed", "segments", "order 3", "order 4, segments, recomputed", "3, data",
                          "fsdp, context", "1, tensor"}
    for errors in found.values():
        assert largest(errors) < (WEIGHTS if "training" in errors else FLOAT32)


def model_with(backend: str):
    return build_model(Config(model=ModelSection(num_layers=1, hidden_size=8, max_seq_len=64),
                              ops=OpsSection(backend=backend)), Groups.single())


def test_a_missing_triton_is_named_when_the_model_is_built(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *rest: None if name == "triton" else find(name, *rest))
    with pytest.raises(ValueError, match=r"ops\.backend=triton needs Triton.*hyena-dist\[kernels\]") as refused:
        model_with("triton")
    assert "\n" not in str(refused.value)
    model_with("auto")


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"ops\.backend must be one of auto, torch, triton, .*, got 'cuda'"):
        OpsSection(backend="cuda")


@needs_triton
def test_where_triton_cannot_torch_does_and_the_log_says_why_once(caplog):
    """The control: with `auto` nothing is said."""
    backends.say_once.cache_clear()
    ids = torch.randint(7, 11, (1, 32))
    results = []
    with caplog.at_level(logging.WARNING):
        for backend in ("auto", "triton", "triton"):
            results.append(model_with(backend).eval()(ids))
            assert len(caplog.records) == (backend == "triton")
    assert "not on cpu" in caplog.text
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize(("order", "taps", "dtype", "message"), [
    (2, 9, torch.float32, "at most 8 taps, got 9"),
    (2, 3, torch.float64, "no float64"),
])
@needs_triton
def test_what_the_kernels_cannot_is_left_to_torch(caplog, monkeypatch, order, taps, dtype, message):
    monkeypatch.setattr(backends, "_interpreted", lambda: True)
    backends.say_once.cache_clear()
    device = torch.device("cpu")
    assert backends.mix_kernels("triton", Asked(device, dtype, order, taps, length=8)) is None
    assert message in caplog.text
    assert backends.mix_kernels("triton", Asked(device, torch.float32, 2, 3, length=8)) is not None  # the control
