"""The convolution spread over ranks against the plain one on the whole sequence: values, gradients, bytes sent."""

import math
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hyena_dist.ops.long_conv import causal_conv, causal_conv_reference
from hyena_dist.parallel import distributed_fft
from hyena_dist.parallel.collectives import count_bytes
from hyena_dist.parallel.distributed_fft import distributed_causal_conv, length_multiple, strided_lags
from hyena_dist.parallel.groups import Axis
from tests.compare import rel
from tests.dist.harness import run_distributed

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
HALF = 2**-8 * 1.01  # one rounding of a result to the 8 bits of bfloat16
BUG = 1e-2  # every bug below is larger
LENGTHS = {1: (12, 64), 2: (64, 240, 65536), 3: (81, 144, 59049), 4: (256, 240, 480, 65536), 8: (512, 960, 65536)}
CHANNELS = 5
CHUNK_CHANNELS = 2  # 2, 2 and 1 channels in the forward pass


@dataclass(frozen=True)
class Case:
    batch: int
    length: int
    dtype: torch.dtype
    mode: str = "right"


def _cases(size: int) -> list[Case]:
    cases = [Case(batch, length, dtype) for length in LENGTHS[size] for batch in (1, 2)
             for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    length = LENGTHS[size][1]
    return cases + [Case(2, length, torch.float64, mode) for mode in (*BUGS, "impulse", "one_chunk")]


def _inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u, h, bias, dy of the whole sequence; u and dy in the dtype of the case, the filter in float32 at least."""
    generator = torch.Generator().manual_seed(case.length + case.batch)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = torch.promote_types(case.dtype, torch.float32)
    # The filter decays slowly: its wrapped tail is as large as the values, and without a direct term that dominates.
    h = draw(CHANNELS, case.length) * torch.linspace(1, 0.2, case.length, dtype=torch.float64)
    u, bias, dy = draw(case.batch, CHANNELS, case.length), draw(CHANNELS), draw(case.batch, CHANNELS, case.length)
    if case.mode == "impulse":
        bias.zero_()
    return u.to(case.dtype), h.to(wide), bias.to(wide), dy.to(case.dtype)


def _no_twist(tokens: int, rank: int, size: int, dtype: torch.dtype, _device: torch.device) -> tuple[Tensor, Tensor]:
    """The untwisted four-step transform: what wraps around the end comes back at the start."""
    n0 = rank * tokens // size + torch.arange(tokens // size)
    k1 = torch.arange(size).view(-1, 1, 1, 1)
    twiddle = torch.exp(-2j * math.pi * (n0 * k1).double() / (tokens * size)).to(dtype.to_complex())
    return torch.ones(size, 1, 1, 1, dtype=dtype.to_complex()), twiddle


def _wrong_twiddle(*args) -> tuple[Tensor, Tensor]:
    twist, twiddle = RIGHT_FACTORS(*args)
    return twist, twiddle.conj()


RIGHT_FACTORS = distributed_fft._factors
BUGS = {"no_twist": _no_twist, "wrong_twiddle": _wrong_twiddle, "contiguous_lags": RIGHT_FACTORS}


def _on_rank(case: Case, axis: Axis) -> dict[str, Tensor | int]:
    """The convolution and its gradients on this rank, with the bytes that each pass sends."""
    u, h, bias, dy = _inputs(case)
    tokens = case.length // axis.size
    mine = slice(axis.rank * tokens, (axis.rank + 1) * tokens)
    lags = [h[:, mine]] if case.mode == "contiguous_lags" else [
        h[:, lag] for lag in strided_lags(case.length, axis.rank, axis.size)]
    if case.mode == "impulse":
        u = torch.zeros_like(u)
        u[..., tokens - 1] = 1
    inputs = [u[..., mine].clone(), torch.cat(lags, -1).unflatten(-1, (axis.size, -1)), bias]
    leaves = [x.requires_grad_() for x in inputs]
    chunk = 2**20 if case.mode == "one_chunk" else CHUNK_CHANNELS * (case.batch + 1) * tokens
    with (mock.patch.object(distributed_fft, "_factors", BUGS.get(case.mode, RIGHT_FACTORS)),
          mock.patch.object(distributed_fft, "EXCHANGED_ELEMENTS", chunk)):
        parts = len(list(distributed_fft._channel_parts(CHANNELS, (case.batch + 1) * tokens)))
        with count_bytes() as forward:
            y = distributed_causal_conv(*leaves, axis)
        with count_bytes() as backward:
            gradients = torch.autograd.grad(y, leaves, dy[..., mine])
    values = dict(zip(("y", "du", "dh", "dbias"), (y.detach(), *gradients), strict=True))
    return values | {"forward": forward.total, "backward": backward.total, "parts": parts}


def _rank_main(size: int) -> dict[Case, dict[str, Tensor | int]]:
    axis = Axis(dist.group.WORLD, dist.get_rank(), size)
    return {case: _on_rank(case, axis) for case in _cases(size)}


def _whole(case: Case, ranks: list[dict]) -> dict[str, Tensor]:
    """The ranks' pieces put together; the parts of the bias gradient summed."""
    dh = torch.full((CHANNELS, case.length), math.nan, dtype=ranks[0]["dh"].dtype)
    for rank, result in enumerate(ranks):
        for n1, lag in enumerate(strided_lags(case.length, rank, len(ranks))):
            dh[:, lag] = result["dh"][:, n1]
    return {"y": torch.cat([r["y"] for r in ranks], -1), "du": torch.cat([r["du"] for r in ranks], -1), "dh": dh,
            "dbias": sum(r["dbias"] for r in ranks)}


def _reference(case: Case) -> dict[str, Tensor]:
    """One process, the whole sequence, padded real FFT through autograd, in float64."""
    u, h, bias, dy = (x.double() for x in _inputs(case))
    leaves = [x.requires_grad_() for x in (u, h, bias)]
    y = causal_conv_reference(*leaves)
    return dict(zip(("y", "du", "dh", "dbias"), (y.detach(), *torch.autograd.grad(y, leaves, dy)), strict=True))


def _errors(case: Case, ranks: list[dict]) -> dict[str, float]:
    whole, reference = _whole(case, ranks), _reference(case)
    return {name: rel(whole[name], reference[name]) for name in reference}


@pytest.fixture(scope="module", params=[2, 3, 4, pytest.param(8, marks=pytest.mark.slow)], ids="P={}".format)
def results(request) -> tuple[int, dict[Case, list[dict]]]:
    ranks = run_distributed(_rank_main, request.param, request.param)
    return request.param, {case: [rank[case] for rank in ranks] for case in _cases(request.param)}


def test_values_and_gradients(results) -> None:
    size, by_case = results
    worst: dict[tuple[torch.dtype, str], float] = {}
    for case, ranks in by_case.items():
        if case.mode == "right":
            assert ranks[0]["parts"] == 3, "the chunks are not small"
        if case.mode in ("right", "one_chunk"):
            for name, error in _errors(case, ranks).items():
                worst[case.dtype, name] = max(error, worst.get((case.dtype, name), 0.0))
    for (dtype, name), error in worst.items():
        # In half precision y and du are rounded once; the filter's gradient comes from exact products of its inputs.
        tolerance = HALF if dtype == torch.bfloat16 and name in ("y", "du") else TOLERANCE.get(dtype, 2e-5)
        print(f"P={size} {dtype} {name}: {error:.1e}, tolerance {tolerance:.1e}, a bug is over {BUG:.0e}")
        assert error < tolerance, (dtype, name)


def test_dtypes_are_those_of_the_inputs(results) -> None:
    for case, ranks in results[1].items():
        wide = torch.promote_types(case.dtype, torch.float32)
        for rank in ranks:
            assert [rank[name].dtype for name in ("y", "du", "dh", "dbias")] == [case.dtype, case.dtype, wide, wide]


def test_chunks_change_nothing(results) -> None:
    size, by_case = results
    length = LENGTHS[size][1]
    small, one = (_whole(c, by_case[c]) for c in (Case(2, length, torch.float64),
                                                  Case(2, length, torch.float64, "one_chunk")))
    assert max(rel(small[name], one[name]) for name in one) < 1e-14


def test_bugs_are_seen(results) -> None:
    """The controls: the same comparison finds what each likely mistake does, in the values and in the gradients."""
    size, by_case = results
    for case, ranks in by_case.items():
        if case.mode in BUGS:
            errors = _errors(case, ranks)
            # No transform is in dbias, and no filter in dh.
            for name in ("y", "du") if case.mode == "contiguous_lags" else ("y", "du", "dh"):
                print(f"P={size} {case.mode} {name}: {errors[name]:.1e}, tolerance {TOLERANCE[case.dtype]:.0e}")
                assert errors[name] > BUG, (case.mode, name)


def test_an_impulse_crosses_the_slices_and_goes_forward_only(results) -> None:
    """The last token of the first slice: nothing on that slice before it, the whole filter after it."""
    size, by_case = results
    case = next(case for case in by_case if case.mode == "impulse")
    at, h = case.length // size - 1, _inputs(case)[1]
    y = _whole(case, by_case[case])["y"]
    assert y[..., :at].abs().max() < 1e-12
    assert rel(y[..., at:], h[:, : case.length - at].expand(case.batch, -1, -1)) < 1e-12
    assert y[..., at + 1 : at + 1 + case.length // size].abs().max() > 0.1, "slice 1 hears nothing"


def test_bytes_are_those_of_the_formulas(results) -> None:
    """Per rank, with e bytes an element of u and B batch rows, of C l (P - 1) / P:

        forward   2 B e real ends  + 8 (B + 1) the spectra of u and h  + 8 B the product's way back
        backward  3 B e real ends  + 8 (2 B + 1) the spectra of u, dy and h  + 8 (B + 1) the gradients' way back

    complex numbers being of 8 bytes, or of 16 in float64. The filter never goes through a real exchange.
    """
    size, by_case = results
    for case, ranks in by_case.items():
        end, number = case.dtype.itemsize, 16 if case.dtype == torch.float64 else 8
        away = CHANNELS * (case.length // size) * (size - 1) // size
        forward = away * (2 * case.batch * (end + number) + number)
        backward = away * (3 * case.batch * end + number * (3 * case.batch + 2))
        if case.dtype == torch.float32 and case.batch == 2:  # per channel and token: 28 and 44, 42 and 66, 49 and 77
            assert (forward, backward) == (56 * away, 88 * away)
        assert [(r["forward"], r["backward"]) for r in ranks] == [(forward, backward)] * size, case


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("length", LENGTHS[1])
def test_one_rank_needs_no_group(dtype, length) -> None:
    case = Case(2, length, dtype)
    result = _on_rank(case, Axis())
    assert (result["forward"], result["backward"], result["parts"]) == (0, 0, 3)
    assert max(_errors(case, [result]).values()) < TOLERANCE[dtype]
    u, h, bias, _ = _inputs(case)
    assert rel(result["y"], causal_conv(u, h, bias, method="right_angle")) < TOLERANCE[dtype]


def test_autocast_does_not_reach_inside() -> None:
    case = Case(2, 64, torch.float32)
    outside = _on_rank(case, Axis())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = _on_rank(case, Axis())
    assert all(torch.equal(inside[name], outside[name]) for name in ("y", "du", "dh", "dbias"))


def test_only_the_inputs_are_saved() -> None:
    u, h, bias, _ = _inputs(Case(2, 64, torch.float32))
    leaves = [x.requires_grad_() for x in (u, h.unflatten(-1, (1, -1)), bias)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()), lambda x: x):
        distributed_causal_conv(*leaves, Axis())
    assert saved == [x.data_ptr() for x in leaves]


def test_lags_of_all_ranks_are_each_lag_once() -> None:
    assert strided_lags(16, 1, 2) == [slice(4, 8), slice(12, 16)]
    for size in (1, 2, 3, 8):
        length = 2 * length_multiple(size)
        lags = [n for rank in range(size) for lag in strided_lags(length, rank, size) for n in range(length)[lag]]
        assert sorted(lags) == list(range(length))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="length of 72 over 8 ranks must be a multiple of 64"):
        strided_lags(72, 0, 8)
    u, bias = torch.zeros(1, 3, 6), torch.zeros(3)
    with pytest.raises(ValueError, match="length of 24 over 4 ranks must be a multiple of 16"):
        distributed_causal_conv(u, torch.zeros(3, 4, 1), bias, Axis(size=4))
    with pytest.raises(ValueError, match=r"over 2 ranks needs h \[3, 2, 3\] and bias \[3\], got \(3, 6\)"):
        distributed_causal_conv(u, torch.zeros(3, 6), bias, Axis(size=2))
