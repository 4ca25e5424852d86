"""Borders inside a row of tokens that no convolution of the operator crosses: the operator with segments equals the
operator on each segment alone, in values and every gradient."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hyena_dist.ops import chunking
from hyena_dist.ops import hyena as hyena_module
from hyena_dist.ops.hyena import HyenaWeights, hyena, hyena_reference
from hyena_dist.ops.mix import spans
from hyena_dist.ops.norm import NormWeights
from tests.compare import rel

TOLERANCE = 1e-12
D, C, TAPS, BATCH, LENGTH = 6, 4, 3, 2, 61
SEGMENTS = {"two": (0, 23, 61), "many, one of them shorter than the taps": (0, 1, 3, 20, 40, 61), "one": (0, 61)}


def leaves(order: int, lags: int) -> list[Tensor]:
    """x, the weights, and those of the norm."""
    blocks = (order + 1) * C
    shapes = [(LENGTH, BATCH, D), (blocks, D), (blocks,), (blocks, TAPS), (blocks,), (order - 1, C, lags),
              (order - 1, C), (D, C), (D,), (D,), (D,)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def values_and_gradients(function, tensors: list[Tensor]) -> list[Tensor]:
    x, *rest = tensors
    y = function(x, HyenaWeights(*rest[:8]), NormWeights(*rest[8:], 1e-5))
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return [y.detach(), *torch.autograd.grad(y, tensors, dy)]


def apart(segments: tuple[int, ...]):
    """The operator on each segment as a sequence of its own."""
    def function(x: Tensor, weights: HyenaWeights, norm: NormWeights) -> Tensor:
        return torch.cat([hyena(x[start:stop], weights._replace(filters=weights.filters[..., : stop - start]), norm)
                          for start, stop in pairwise(segments)])
    return function


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(rel(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("chunk", [100, 2**18])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", SEGMENTS)
def test_segments_equal_sequences_of_their_own(name, order, chunk, monkeypatch):
    monkeypatch.setattr(chunking, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(chunking, "LEAST_SEQUENCES", 1)
    segments = SEGMENTS[name]
    longest = max(stop - start for start, stop in pairwise(segments))
    for lags in {longest, LENGTH}:  # lags that no token reaches change nothing
        tensors = leaves(order, lags)
        expected = values_and_gradients(apart(segments), tensors)
        for recompute in (False, True):
            found = values_and_gradients(
                lambda *a, again=recompute: hyena(*a, segments=segments, recompute=again), tensors)
            assert worst(found, expected) < TOLERANCE
    if len(segments) > 2:  # the controls: no border, and a border one token off
        moved = (0, segments[1] + 1, *segments[2:])
        for wrong in (None, moved):
            found = values_and_gradients(lambda *a, wrong=wrong: hyena(*a, segments=wrong), leaves(order, LENGTH))
            error = worst(found, values_and_gradients(apart(segments), leaves(order, LENGTH)))
            print(f"{name}: borders {wrong} instead move values or gradients by {error:.1e}, tolerance {TOLERANCE}")
            assert error > 1e-3


def test_the_reference_knows_segments():
    tensors, segments = leaves(3, LENGTH), SEGMENTS["two"]
    found = values_and_gradients(lambda *a: hyena_reference(*a, segments=segments), tensors)
    assert worst(found, values_and_gradients(apart(segments), tensors)) < TOLERANCE


def test_the_short_convolution_is_not_folded_across_borders(monkeypatch):
    """As on a GPU in half precision, where one product does both."""
    monkeypatch.setattr(hyena_module, "folds", lambda *_: True)
    tensors, segments = leaves(2, LENGTH), SEGMENTS["two"]
    found = values_and_gradients(lambda *a: hyena(*a, segments=segments), tensors)
    assert worst(found, values_and_gradients(apart(segments), tensors)) < TOLERANCE


@pytest.mark.parametrize("segments", [(0,), (), (1, 61), (0, 60), (0, 30, 30, 61), (0, 40, 20, 61), (0, 62)])
def test_offsets_that_are_no_segments_are_refused(segments):
    with pytest.raises(ValueError, match=r"segments of 61 tokens must be offsets that grow from 0 to 61, got"):
        spans(segments, 61)


def test_filters_that_are_too_short_are_refused():
    tensors = leaves(2, 37)
    with pytest.raises(ValueError, match=r"the longest segment has 38 tokens, the filters have only 37 lags"):
        values_and_gradients(lambda *a: hyena(*a, segments=SEGMENTS["two"]), tensors)
