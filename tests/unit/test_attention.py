"""The attention mixer on one rank: against plain formulas, its causality, its positions, and what it refuses."""

import math

import pytest
import torch

from hyena_dist.config.sections.model import ModelSection
from hyena_dist.model.attention import AttentionMixer, context_attention, rotary
from hyena_dist.model.config import hyena_config
from hyena_dist.parallel.groups import Axis
from tests.compare import rel

TOLERANCE = 1e-12
WIDTH, HEADS, LENGTH, BATCH = 24, 3, 37, 2


def turned(x, start=0):
    """[l, Dh], channel i and i + Dh/2 as a complex number, times exp(i t theta)."""
    half = x.shape[1] // 2
    theta = torch.tensor([10000.0 ** (-2 * i / x.shape[1]) for i in range(half)], dtype=torch.float64)
    angles = torch.arange(start, start + len(x))[:, None] * theta
    z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((z.real, z.imag), dim=1)


def plain_mixer(x, weights, turn=turned):
    """x [L, B, D] -> [L, B, D], one sequence and one head at a time, every score written out."""
    width = WIDTH // HEADS
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    outputs = []
    for sequence in x.unbind(1):
        heads = []
        for head in range(HEADS):
            q, k, v = (sequence @ weights["qkv_proj.weight"][rows].T + weights["qkv_proj.bias"][rows]
                       for block in range(3) for rows in [slice(block * WIDTH + head * width,
                                                                block * WIDTH + (head + 1) * width)])
            scores = (turn(q) @ turn(k).T / math.sqrt(width)).masked_fill(future, -math.inf).exp()
            heads.append(scores / scores.sum(1, keepdim=True) @ v)
        outputs.append(torch.cat(heads, dim=1) @ weights["out_proj.weight"].T + weights["out_proj.bias"])
    return torch.stack(outputs, dim=1)


def mixer(dtype=torch.float64, **model):
    section = ModelSection(**{**dict(num_layers=1, hidden_size=WIDTH, num_attention_heads=HEADS, max_seq_len=64,
                                     layer_pattern="A"), **model})
    module = AttentionMixer(hyena_config(section, params_dtype=dtype), 1)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return module


def normal(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_gradients(fn, x, weights):
    """Values and the gradients of x and of each weight, under a fixed random gradient from above."""
    x = x.clone().requires_grad_()
    y = fn(x)
    return {"y": y, **dict(zip(["x", *weights], torch.autograd.grad(y, [x, *weights.values()], normal(*y.shape)),
                               strict=True))}


def test_equals_the_plain_formulas():
    module, x = mixer(), normal(LENGTH, BATCH, WIDTH)
    weights = dict(module.named_parameters())
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == {
        "qkv_proj.weight": (3 * WIDTH, WIDTH), "qkv_proj.bias": (3 * WIDTH,),
        "out_proj.weight": (WIDTH, WIDTH), "out_proj.bias": (WIDTH,)}
    got = with_gradients(lambda x: module(x)[0], x, weights)
    expected = with_gradients(lambda x: plain_mixer(x, weights), x, weights)
    control = with_gradients(lambda x: plain_mixer(x, weights, turn=lambda x: x), x, weights)
    pairs = with_gradients(lambda x: plain_mixer(x, weights, turn=turned_by_neighbours), x, weights)
    for name in expected:
        error, wrong, neighbours = (rel(other[name], expected[name]) for other in (got, control, pairs))
        print(f"{name}: {error:.1e}, tolerance {TOLERANCE}; no positions {wrong:.1e}, other pairs {neighbours:.1e}")
        assert error < TOLERANCE
        if name != "out_proj.bias":  # its gradient is a sum of the gradient from above
            assert min(wrong, neighbours) > 1e-2


def turned_by_neighbours(x):
    """Channels 2i and 2i + 1 turn together: the other form of rotary positions, a different function."""
    order = torch.arange(x.shape[1]).view(-1, 2).T.flatten()
    return turned(x[:, order])


def test_causal():
    module, x = mixer(), normal(LENGTH, BATCH, WIDTH)
    other = x.clone()
    other[20] += 1
    difference = (module(x)[0] - module(other)[0]).abs().amax((1, 2))
    assert difference[:20].max() == 0
    assert difference[20:].min() > 1e-4
    padded = torch.cat((x, normal(11, BATCH, WIDTH, seed=2)))
    assert rel(module(padded)[0][:LENGTH], module(x)[0]) < TOLERANCE


def test_depends_on_relative_positions_only():
    q, k, v = normal(3, BATCH, HEADS, LENGTH, 8)
    expected = context_attention(q, k, v, Axis())
    shifted = rel(context_attention(q, k, v, Axis(rank=5)), expected)  # as of size 1: all tokens, from 5 l on
    apart = rel(context_attention(rotary(q, 5), k, v, Axis()), expected)
    print(f"all shifted by {5 * LENGTH}: {shifted:.1e}, tolerance {TOLERANCE}; queries alone by 5: {apart:.1e}")
    assert shifted < TOLERANCE
    assert apart > 1e-2
    assert torch.equal(rotary(q, 0)[..., 7:, :], rotary(q[..., 7:, :], 7))


def test_positions_are_float32_in_half_precision():
    x, start = normal(LENGTH, 8, dtype=torch.float32), 100_000
    expected = rotary(x, start)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rotary(x, start), expected)
        half = rotary(x.bfloat16(), start)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, rotary(x.bfloat16().float(), start).bfloat16())
    error, coarse = (rel(y, turned(x.double(), start)) for y in (expected, turned(x.double(), 99_840)))
    print(f"token {start} in float32: {error:.1e}, tolerance 2e-3; its position rounded to bfloat16: {coarse:.1e}")
    assert error < 2e-3 < 0.1 < coarse


def test_under_autocast():
    module, x = mixer(torch.float32), normal(LENGTH, BATCH, WIDTH, dtype=torch.float32)
    weights = dict(module.named_parameters())
    expected = with_gradients(lambda x: module(x)[0], x, weights)

    def lowered(x):
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = module(x)
        assert y.dtype == torch.bfloat16
        return y.float()
    got = with_gradients(lowered, x, weights)
    for name in expected:
        assert got[name].dtype == torch.float32, name
        assert rel(got[name], expected[name]) < 0.1, name


@pytest.mark.parametrize("argument", ["attention_mask", "rotary_pos_emb", "inference_context"])
def test_refuses_arguments_that_it_would_ignore(argument):
    module, x = mixer(), normal(4, 1, WIDTH)
    with pytest.raises(ValueError, match=rf"AttentionMixer .*{argument}"):
        module(x, **{argument: torch.ones(1)})
    assert module(x, **{argument: None})[1] is None


def test_refuses_heads_that_do_not_fit():
    q = normal(BATCH, HEADS, LENGTH, 8)
    with pytest.raises(ValueError, match=r"3 heads .*parallel.context=2"):
        context_attention(q, q, q, Axis(size=2))
    with pytest.raises(ValueError, match=r"hidden_size=24 .*num_attention_heads=8 "):
        mixer(num_attention_heads=8)
