"""Attention over context ranks, and its mixer over tensor and context ranks, equal one rank."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from hyena_dist.config.sections.model import ModelSection
from hyena_dist.model import attention
from hyena_dist.model.config import hyena_config
from hyena_dist.parallel.collectives import count_bytes
from hyena_dist.parallel.groups import Axis, Groups, init_groups
from tests.compare import rel
from tests.dist.harness import run_distributed

TOLERANCE = 1e-12
BATCH, HEADS, LENGTH, WIDTH = 2, 8, 48, 6
NAMES = ("y", "dq", "dk", "dv")


def _case() -> torch.Tensor:
    """q, k, v and the gradient from above: [4, B, H, L, Dh]."""
    return torch.randn(4, BATCH, HEADS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _results(qkv_and_gradient: torch.Tensor, context: Axis) -> torch.Tensor:
    """[4, B, H, l, Dh] -> y and the gradients of q, k, v: [4, B, H, l, Dh]."""
    *inputs, gradient = qkv_and_gradient.unbind()
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = attention.context_attention(*inputs, context)
    return torch.stack([y.detach(), *torch.autograd.grad(y, inputs, gradient)])


def _slices(size: int) -> dict[str, torch.Tensor | int]:
    context = Axis.of(dist.group.WORLD)
    mine = _case().chunk(size, dim=3)[context.rank]
    with count_bytes() as traffic:
        right = _results(mine, context)
    rotary = attention.rotary
    with mock.patch.object(attention, "rotary", lambda x, start: rotary(x, 0)):
        wrong = _results(mine, context)
    return {"right": right, "wrong": wrong, "sent": traffic.total}


@pytest.mark.parametrize("size", [2, 4])
def test_context_ranks_equal_one_rank(size: int) -> None:
    expected = _results(_case(), Axis())
    ranks = run_distributed(_slices, size, size)
    right, wrong = (torch.cat([rank[kind] for rank in ranks], dim=3) for kind in ("right", "wrong"))
    for i, name in enumerate(NAMES):
        error, control = rel(right[i], expected[i]), rel(wrong[i], expected[i])
        print(f"{name} on {size} ranks: {error:.1e}, tolerance {TOLERANCE}; every slice from position 0: {control:.1e}")
        assert error < TOLERANCE
        assert control > 1e-2
    # q, k, v there and y back, and their gradients: 8 slices, of which each rank keeps its own part
    assert {rank["sent"] for rank in ranks} == {8 * expected[0].numel() * 8 // size * (size - 1) // size}


def _mixer(groups: Groups, sequence_parallel: bool, blocks: int = 3) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """This rank's part of the output and of each gradient, and the places of its elements in the whole.

    The rows of the projection are split over the tensor ranks in `blocks`; 3 is right.
    """
    tensor, context, width = groups.tensor, groups.context, 24
    config = hyena_config(ModelSection(num_layers=1, hidden_size=width, num_attention_heads=4, max_seq_len=LENGTH,
                                       layer_pattern="A"), params_dtype=torch.float64)
    config.sequence_parallel = sequence_parallel
    module = attention.AttentionMixer(config, 1, pg_collection=groups.collection())

    def rows(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (blocks, tensor.size, -1))[:, tensor.rank].flatten(0, 1)

    def tokens(x: torch.Tensor) -> torch.Tensor:
        x = x.chunk(context.size)[context.rank]
        return x.chunk(tensor.size)[tensor.rank] if sequence_parallel else x

    shapes = {"y": (LENGTH, BATCH, width), "x": (LENGTH, BATCH, width), "qkv_proj.weight": (3 * width, width),
              "qkv_proj.bias": (3 * width,), "out_proj.weight": (width, width), "out_proj.bias": (width,)}
    cuts = {"y": tokens, "x": tokens, "qkv_proj.weight": rows, "qkv_proj.bias": rows,
            "out_proj.weight": lambda x: x.chunk(tensor.size, 1)[tensor.rank], "out_proj.bias": lambda x: x}
    generator = torch.Generator().manual_seed(0)
    parts = {name: cuts[name](torch.randn(shape, generator=generator, dtype=torch.float64)).clone().requires_grad_()
             for name, shape in shapes.items()}
    weights = list(shapes)[2:]
    y, _ = torch.func.functional_call(module, {name: parts[name] for name in weights}, parts["x"])
    y.backward(parts["y"].detach())
    results = {"y": y.detach(), **{name: parts[name].grad for name in ("x", *weights)}}
    return {name: (cuts[name](torch.arange(torch.Size(shape).numel()).view(shape)), results[name])
            for name, shape in shapes.items()}


def _mixers() -> dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    groups = init_groups(tensor=2, context=2)
    return {"tensor": _mixer(groups, False), "sequence": _mixer(groups, True), "one block": _mixer(groups, False, 1)}


def _assembled(ranks: list[dict[str, tuple[torch.Tensor, torch.Tensor]]], name: str, tensor: int) -> torch.Tensor:
    """The whole, flat: parts of context ranks are added, those of tensor ranks are pieces of one or copies."""
    size = max(int(rank[name][0].max()) for rank in ranks) + 1
    whole = torch.zeros(len(ranks) // tensor, size, dtype=torch.float64)
    for i, rank in enumerate(ranks):  # the tensor rank runs fastest
        places, values = rank[name]
        whole[i // tensor, places.flatten()] = values.flatten()
    return whole.sum(0)


def test_the_mixer_on_tensor_and_context_ranks_equals_one_rank() -> None:
    one = _mixer(Groups.single(), False)
    ranks = run_distributed(_mixers, 4)
    for name in one:
        expected = _assembled([one], name, 1)
        errors = {case: rel(_assembled([rank[case] for rank in ranks], name, 2), expected) for case in ranks[0]}
        print(f"{name} on 2 x 2 ranks: {errors['tensor']:.1e}, sequence parallel {errors['sequence']:.1e}, tolerance "
              f"{TOLERANCE}; q|k|v split as one block {errors['one block']:.1e}")
        assert max(errors["tensor"], errors["sequence"]) < TOLERANCE
        if name != "out_proj.bias":  # its gradient is a sum of the gradient from above
            assert errors["one block"] > 1e-2
