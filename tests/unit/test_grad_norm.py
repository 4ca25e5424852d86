"""Clipping divides all gradients by one factor in one call."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hyena_dist.engine.grad_norm import clip_gradients, global_grad_norm
from hyena_dist.parallel.groups import Axis


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


def test_the_norm_of_one_rank_is_made_on_the_device():
    """On meta tensors, which stand for a GPU's: a number that is made on the host would be copied there."""
    gradients = {f"w{i}": torch.full((3, i + 1), 3.0 + i) for i in range(20)}
    squares = sum(gradient.double().square().sum() for gradient in gradients.values())
    norm = global_grad_norm(gradients, None, Axis(), device=torch.device("cpu"))
    assert norm.dtype == torch.float32
    assert torch.allclose(norm.double(), squares.sqrt(), rtol=1e-6)
    meta = {name: gradient.to("meta") for name, gradient in gradients.items()}
    with _Calls() as calls:
        global_grad_norm(meta, None, Axis(), device=torch.device("meta"))
    assert "lift_fresh.default" not in calls.names
    with _Calls() as calls:
        torch.nn.utils.get_total_norm([])
    assert "lift_fresh.default" in calls.names, "the control: the norm of nothing"


def test_nothing_to_clip():
    clip_gradients({}.values(), torch.tensor(1.0), 1.0)
    gradient = torch.ones(2)
    clip_gradients([gradient], torch.tensor(0.5), 1.0)
    assert torch.equal(gradient, torch.ones(2))
