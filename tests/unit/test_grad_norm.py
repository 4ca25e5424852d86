"""Clipping divides all gradients by one factor in one call."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hyena_dist.engine.grad_norm import clip_gradients


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ARG002 - torch's signature
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_all_gradients_are_multiplied_by_one_call():
    gradients = {f"w{i}": torch.full((2, i + 1), 3.0) for i in range(20)}
    with _Calls() as calls:
        clip_gradients(gradients.values(), torch.tensor(4.0), 1.0, loss_scale=2.0)
    print(calls.names)
    assert len(calls.names) < len(gradients)
    want = 3.0 / (4.0 + 1e-6) / 2.0
    assert all(torch.allclose(gradient, torch.tensor(want), rtol=1e-6) for gradient in gradients.values())
    assert not torch.allclose(gradients["w0"], torch.tensor(3.0)), "control: they were clipped"


def test_nothing_to_clip():
    clip_gradients({}.values(), torch.tensor(1.0), 1.0)
    gradient = torch.ones(2)
    clip_gradients([gradient], torch.tensor(0.5), 1.0)
    assert torch.equal(gradient, torch.ones(2))
