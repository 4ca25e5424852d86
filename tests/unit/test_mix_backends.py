"""What a backend of the operator is: anything that computes `mix` and its gradients, and says what it cannot."""

import pytest
import torch
from torch import Tensor

from hyena_dist.model.context import DistributedFft
from hyena_dist.ops import hyena as hyena_module
from hyena_dist.ops.across import Across
from hyena_dist.ops.backends import across_kernels, mix_kernels
from hyena_dist.ops.hyena import HyenaWeights, hyena, hyena_reference
from hyena_dist.ops.mix import Asked, MixWeights, mix_reference
from hyena_dist.ops.segments import Segments
from hyena_dist.parallel.groups import Axis
from tests.compare import rel

D, C, LENGTH = 6, 4, 30


class Plain:
    """A backend of the slow reference, of its own gradient by autograd; it keeps u, to use what it keeps."""

    keeps_spectra = False

    def __init__(self, sign: int = 1) -> None:
        self.sign, self.calls = sign, []

    def refusal(self, _asked: Asked) -> str | None:
        return None

    def mix(self, p: Tensor, weights: MixWeights, segments: Segments | None) -> tuple[Tensor, list[Tensor]]:
        self.calls.append("forward")
        u = mix_reference(p, weights, segments)
        return u, [u]

    def mix_backward(self, p: Tensor, dy: Tensor, weights: MixWeights, segments: Segments | None,
                     kept: list[Tensor]) -> MixWeights:
        self.calls.append("backward")
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (p, *weights)]
            u = mix_reference(leaves[0], MixWeights(*leaves[1:]), segments)
        dp, *gradients = torch.autograd.grad(u, leaves, self.sign * dy)
        p.copy_(dp)
        dy.copy_(kept[0])
        return MixWeights(*gradients)


def leaves() -> list[Tensor]:
    shapes = [(LENGTH, 2, D), (3 * C, D), (3 * C,), (3 * C, 3), (3 * C,), (1, C, LENGTH), (1, C), (D, C), (D,)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def values_and_gradients(function, **options) -> list[Tensor]:
    tensors = leaves()
    y = function(tensors[0], HyenaWeights(*tensors[1:]), **options)
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return [y, *torch.autograd.grad(y, tensors, dy)]


@pytest.mark.parametrize("segments", [None, (0, 11, LENGTH)])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_operator_takes_another_backend(monkeypatch, segments, recompute):
    """The control: one whose gradients have another sign is another function."""
    expected, errors = values_and_gradients(hyena_reference, segments=segments), {}
    for sign in (1, -1):
        backend = Plain(sign)
        monkeypatch.setattr(hyena_module, "mix_kernels", lambda _name, _asked, taken=backend: taken)
        found = values_and_gradients(hyena, segments=segments, recompute=recompute)
        errors[sign] = max(rel(a.detach(), b.detach()) for a, b in zip(found, expected, strict=True))
        assert backend.calls == ["forward", "backward"]
    assert errors[1] < 1e-12 < 1 < errors[-1]


def test_kernels_take_segments_and_orders_where_they_are_asked_for(monkeypatch):
    """But `auto` does not: neither was measured on a GPU. The control: of order 2 and whole rows it takes them."""
    kernels = pytest.importorskip("hyena_dist.ops.triton.operator", reason="needs the extra `kernels`")
    plain = Asked(torch.device("cpu"), torch.bfloat16, order=2, taps=3, length=1024)
    monkeypatch.setattr("hyena_dist.ops.backends._interpreted", lambda: True)
    monkeypatch.setattr("hyena_dist.ops.backends._capability", lambda _device: (9, 0))
    assert mix_kernels("auto", plain) is kernels
    for asked in (plain._replace(segmented=True), plain._replace(order=3)):
        assert mix_kernels("triton", asked) is kernels
        assert mix_kernels("auto", asked) is None


def test_over_context_ranks_kernels_take_any_order_where_they_are_asked_for(monkeypatch):
    """But `auto` takes none. The control: more taps than they take are refused, of any order."""
    kernels = pytest.importorskip("hyena_dist.ops.triton.across", reason="needs the extra `kernels`")
    monkeypatch.setattr("hyena_dist.ops.backends._interpreted", lambda: True)
    monkeypatch.setattr("hyena_dist.ops.backends._capability", lambda _device: (9, 0))
    for order in (2, 3, 5):
        asked = Asked(torch.device("cpu"), torch.bfloat16, order=order, taps=3, length=1024, segmented=True)
        assert across_kernels("triton", asked) is kernels
        assert across_kernels("triton", asked._replace(taps=9)) is None
        assert across_kernels("auto", asked) is None


def test_a_slice_refuses_segments_and_fewer_tokens_than_the_short_convolution_reaches():
    across, asked = Across(None), Asked(torch.device("cpu"), torch.float32, order=2, taps=3, length=1)
    assert "has 1 tokens" in across.refusal(asked)
    assert across.refusal(asked._replace(length=2)) is None
    tensors = leaves()
    with pytest.raises(ValueError, match="does not know segments: take parallel.context_method=all_to_all"):
        hyena(tensors[0], HyenaWeights(*tensors[1:]), segments=(0, 11, 2 * LENGTH),
              exchange=DistributedFft(Axis(None, rank=0, size=2)))
