"""The measure of peak tensor memory, on sequences whose answer is known."""

import pytest
import torch

from benchmarks.memory import peak_tensor_bytes

KIB = 1024  # bytes of the tensors below: 256 float32


def make(kib: int = 1) -> torch.Tensor:
    return torch.ones(256 * kib)


def test_a_known_sequence_gives_the_exact_number():
    before = make(64)
    with peak_tensor_bytes() as peak:
        a = make(2)
        b = make(3)  # 5 live
        view = a.view(2, -1)[1:]
        del a  # its view holds it
        c = before.view(-1)[:256] + 1  # 6 live: neither `before` nor its views count
        del b, view  # 1
        c = c.add_(1)  # in place: still 1
        d = make(4)  # 5
        del d
    assert peak.bytes == 6 * KIB
    with peak_tensor_bytes() as peak:
        before.mul_(2)
        assert before.t() is not None
    assert peak.bytes == 0


def test_a_temporary_is_workspace():
    x = make()
    with peak_tensor_bytes() as peak:
        y = x * 2 + x * 3
        del y
        (x + 1).sum()
    assert peak.bytes == 3 * KIB


def test_a_saved_tensor_counts_until_backward():
    x = make().requires_grad_()
    with peak_tensor_bytes() as peak:
        y = x.exp()
        total = y.sum()  # y is saved, with or without its name
        del y
        make(7)
    assert peak.bytes == 8 * KIB + 4
    with peak_tensor_bytes() as peak:
        total = x.exp().sum()
        total.backward()
        x.grad = None
        make(8)
    assert peak.bytes == 8 * KIB + 4, "4: total"


def test_the_backward_pass_is_seen():
    x = make().requires_grad_()
    with peak_tensor_bytes() as peak:
        _Wasteful.apply(x).sum().backward()
    assert peak.bytes >= 100 * KIB


class _Wasteful(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, x):
        return x * 2

    @staticmethod
    def backward(_ctx, grad):
        return make(100)[:256] + grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_cuda_is_the_allocators_number():
    device = torch.device("cuda")
    before = torch.ones(1 << 20, device=device)
    with peak_tensor_bytes(device) as peak:
        a = before + 1
        b = before + 2
        del a, b
    assert peak.bytes == 8 << 20
