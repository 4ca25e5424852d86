"""Borders inside a row of tokens that no convolution of the operator crosses: the operator with segments equals the
operator on each segment alone, in values and every gradient."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hyena_dist.ops import chunking
from hyena_dist.ops import hyena as hyena_module
from hyena_dist.ops import segments as segments_module
from hyena_dist.ops.hyena import HyenaWeights, hyena, hyena_reference
from hyena_dist.ops.norm import NormWeights
from hyena_dist.ops.segments import Segments
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
    monkeypatch.setattr(segments_module, "LEAST_SIZE", 2)  # so that there are several groups
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


def of_rows(rows: tuple[tuple[int, ...], ...]):
    """The operator on each segment of each row as a sequence of its own."""
    def function(x: Tensor, weights: HyenaWeights, norm: NormWeights) -> Tensor:
        return torch.cat([apart(edges)(x[:, row, None], weights, norm) for row, edges in enumerate(rows)], dim=1)
    return function


@pytest.mark.parametrize("method", ["rfft", "right_angle"])
@pytest.mark.parametrize("order", [2, 3])
def test_each_row_has_segments_of_its_own(order, method):
    rows = ((0, 7, 61), (0, 30, 33, 50, 61))
    tensors = leaves(order, 54)
    expected = values_and_gradients(of_rows(rows), tensors)
    for function, options in ((hyena, {"method": method}), (hyena_reference, {})):
        found = values_and_gradients(lambda *a, f=function, o=options: f(*a, segments=rows, **o), tensors)
        assert worst(found, expected) < TOLERANCE
    tensors = leaves(order, 61)
    error = worst(values_and_gradients(lambda *a: hyena(*a, segments=rows[::-1], method=method), tensors),
                  values_and_gradients(of_rows(rows), tensors))
    print(f"the rows' segments exchanged: {error:.1e}, tolerance {TOLERANCE}")
    assert error > 1e-3


def test_segments_of_half_precision_are_computed_in_float32():
    single = [tensor.detach().float().requires_grad_() for tensor in leaves(2, LENGTH)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (values_and_gradients(function, single) for function in (
            lambda *a: hyena(*a, segments=SEGMENTS["two"]), apart(SEGMENTS["two"])))
    assert worst(found, expected) < 2e-2


def test_segments_of_other_rows_are_refused():
    x, *rest = leaves(2, LENGTH)
    other = Segments((0, 30), 2, 30)
    for wrong, message in ((((0, 61),) * 3, "segments are of 3 rows, the batch has 2"),
                           (other, "the segments are of 2 rows of 30 tokens, the input has 2 of 61")):
        with pytest.raises(ValueError, match=message):
            hyena(x, HyenaWeights(*rest[:8]), segments=wrong)


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
        Segments([segments], 1, 61)


def test_filters_that_are_too_short_are_refused():
    tensors = leaves(2, 37)
    with pytest.raises(ValueError, match=r"the longest segment has 38 tokens, the filters have only 37 lags"):
        values_and_gradients(lambda *a: hyena(*a, segments=SEGMENTS["two"]), tensors)
