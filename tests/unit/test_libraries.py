"""cuDNN's and FlashFFTConv's long convolutions as backends of the operator and as sides of `bench.py conv`.

Both need a GPU. Stand-ins with their signatures and their checks of the arguments show which calls they would get, and
that what stands around the calls is right; nothing here says how fast or how exact the libraries are.
"""

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks import operators
from benchmarks.compare import differences
from benchmarks.models import Size
from hyena_dist.config.errors import ConfigError
from hyena_dist.ops import backends, libraries
from hyena_dist.ops.libraries import Library
from hyena_dist.ops.mix import Asked, MixWeights, mix_reference
from tests.compare import rel

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
B, C, LENGTH = 2, 4, 128


def by_fft(u: Tensor, h: Tensor) -> Tensor:
    size = 2 * u.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(u.double(), size) * torch.fft.rfft(h.double(), size), size)[..., : size // 2]


@pytest.fixture
def seen(monkeypatch) -> list[tuple]:
    """The calls that stand-ins of both libraries got."""
    calls: list[tuple] = []

    def fft_causal_conv1d(x: Tensor, weight: Tensor) -> Tensor:
        assert (x.dim(), weight.dim(), x.shape[1]) == (3, 2, weight.shape[0])
        if x.dtype != weight.dtype:
            raise TypeError(f"x and weight must have the same dtype; got {x.dtype} and {weight.dtype}.")
        calls.append(("cudnn", x.dtype, weight.shape[1]))
        return by_fft(x, weight).to(x.dtype)

    class FlashFFTConv:
        def __init__(self, seqlen: int, dtype: torch.dtype = torch.float16, use_32_butterfly: bool = True) -> None:
            assert dtype in (torch.bfloat16, torch.float16)
            assert use_32_butterfly
            self.seqlen, self.dtype = seqlen, dtype

        def to(self, _device: torch.device) -> "FlashFFTConv":
            return self

        def __call__(self, u: Tensor, k: Tensor) -> Tensor:
            assert u.is_contiguous()
            assert (u.dtype, 2 * u.shape[-1]) == (self.dtype, self.seqlen)
            calls.append(("flashfftconv", u.dtype, k.shape[1]))
            return by_fft(u, k).to(u.dtype)

    def module(name: str, **values) -> None:
        found = ModuleType(name)
        found.__spec__ = SimpleNamespace(name=name)
        vars(found).update(values)
        monkeypatch.setitem(sys.modules, name, found)

    module("cudnn", backend_version=lambda: 92800, fft_causal_conv1d_forward=None)
    module("cudnn.ops")
    module("cudnn.ops.fft_causal_conv1d", fft_causal_conv1d=fft_causal_conv1d)
    module("flashfftconv", FlashFFTConv=FlashFFTConv)
    monkeypatch.setattr(libraries, "_flash", lambda size, dtype, device: FlashFFTConv(size, dtype=dtype).to(device))
    backends.say_once.cache_clear()
    return calls


def values_and_gradients(name: str, order: int, dtype: torch.dtype, *, exact: bool) -> list[Tensor]:
    """Of `mix`, by a library, or by the slow reference in float64."""
    draw, blocks = torch.Generator().manual_seed(0), (order + 1) * C
    p, dy, *weights = (torch.randn(shape, generator=draw) for shape in (
        (B, blocks, LENGTH), (B, C, LENGTH), (blocks, 3), (blocks,), (order - 1, C, LENGTH), (order - 1, C)))
    p, dy = p.to(dtype), dy.to(dtype)
    if exact:
        leaves = [t.double().requires_grad_() for t in (p, *weights)]
        y = mix_reference(leaves[0], MixWeights(*leaves[1:]))
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]
    backend, given = Library(name, dtype), MixWeights(*weights)
    y, kept = backend.mix(p, given, None)
    gradients = backend.mix_backward(p, dy, given, None, kept)
    return [y, p, *gradients]


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(("name", "dtype", "tolerance"), [
    ("cudnn", torch.float32, 2e-6), ("cudnn", torch.bfloat16, 5e-3), ("flashfftconv", torch.bfloat16, 2e-2)])
def test_the_operator_by_a_library(seen, name, order, dtype, tolerance):
    """cuDNN gets float32 whatever the activations are: a lowered filter would be another one."""
    found, want = (values_and_gradients(name, order, dtype, exact=exact) for exact in (False, True))
    errors = [rel(a, b) for a, b in zip(found, want, strict=True)]
    print(name, order, dtype, errors, "allowed", tolerance)
    assert max(errors) < tolerance
    assert {call[:2] for call in seen} == {(name, torch.float32 if name == "cudnn" else dtype)}


def asked(device: torch.device = CUDA, dtype: torch.dtype = torch.bfloat16, length: int = 4096, **rest) -> Asked:
    return Asked(device, dtype, order=2, taps=3, length=length, **rest)


@pytest.mark.usefixtures("seen")
@pytest.mark.parametrize(("name", "given", "message"), [
    ("cudnn", asked(CPU), "runs on CUDA, not on cpu"),
    ("cudnn", asked(segmented=True), "does not know segments"),
    ("cudnn", asked(length=2**24 + 1), "at most 16,777,216 tokens, got 16,777,217"),
    ("cudnn", asked(dtype=torch.float64, length=2**23 + 1), "at most 8,388,608 tokens"),
    ("flashfftconv", asked(dtype=torch.float32), "half precision only"),
    ("flashfftconv", asked(length=1000), "powers of two from 128 to 2,097,152 only, got 1,000"),
])
def test_what_a_library_cannot_is_left_to_torch_and_the_log_says_why(caplog, name, given, message):
    """The control: what it can is its own, and norms and filters are torch's."""
    with caplog.at_level(logging.WARNING):
        assert backends.mix_kernels(name, given) is None
        assert backends.mix_kernels(name, given) is None
    (record,) = caplog.records
    assert message in record.getMessage()
    assert f"ops.backend={name}: torch does its work here" in record.getMessage()
    assert isinstance(backends.mix_kernels(name, asked()), Library)
    assert backends.gelu_kernels(name, CUDA, torch.bfloat16) is None


@pytest.mark.usefixtures("seen")
@pytest.mark.parametrize(("change", "message"), [
    ({"backend_version": lambda: 92400}, "this is cuDNN 92400: torch pins nvidia-cudnn"),
    ({"backend_version": lambda: 92800, "fft_causal_conv1d_forward": ...}, "a front end built for that"),
])
def test_a_cudnn_that_is_too_old_is_left_to_torch(caplog, monkeypatch, change, message):
    for name, value in change.items():
        if value is ...:
            monkeypatch.delattr(sys.modules["cudnn"], name)
        else:
            monkeypatch.setattr(sys.modules["cudnn"], name, value)
    assert backends.mix_kernels("cudnn", asked()) is None
    assert message in caplog.text


@pytest.mark.parametrize(("name", "package"), [("cudnn", "nvidia-cudnn-frontend"), ("flashfftconv", "flashfftconv")])
def test_a_library_that_is_not_installed_is_named(name, package):
    with pytest.raises(ConfigError, match=f"ops.backend={name} needs {package}, which is not installed") as refused:
        backends.check_backend(name)
    assert "\n" not in str(refused.value)
    assert operators.library_conv(name, 256, CPU, "bf16") == f"{name} is not installed"


def test_no_library_is_taken_by_itself(seen):
    """Even where it is installed."""
    assert backends.mix_kernels("auto", asked(CPU)) is None
    assert not seen


@pytest.mark.parametrize("name", ["cudnn", "flashfftconv"])
def test_a_side_of_the_benchmark(seen, monkeypatch, name):
    assert "on CUDA, not on cpu" in operators.library_conv(name, 256, CPU, "bf16")
    monkeypatch.setattr(libraries, "refusal", lambda _name, _asked: None)
    u, h, bias, gate, _ = operators.conv(Size(256, 8, 2), CPU, "bf16").inputs(0)
    found = operators.library_conv(name, 256, CPU, "bf16")(u, h, bias, gate)
    expected = operators._plain_conv(u, h, bias, gate)
    assert found.dtype == u.dtype
    assert differences({"y": found}, {"y": expected.double()})["y"] < 1e-2
    assert seen == [(name, torch.float32 if name == "cudnn" else torch.bfloat16, 256)]
