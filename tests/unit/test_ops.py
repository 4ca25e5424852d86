"""Every fast operator against its slow reference: values and every gradient."""

from functools import partial

import pytest
import torch

from hyena_dist.ops import chunking, embedding, implicit_filter, long_conv
from hyena_dist.ops import dropout as dropout_module
from hyena_dist.ops.dropout import DropoutKey, dropout
from hyena_dist.ops.implicit_filter import FilterShape, decay_rates, positional_features
from hyena_dist.ops.long_conv import causal_conv, causal_conv_reference
from hyena_dist.ops.short_conv import ShortConvTape, short_conv_reference
from hyena_dist.ops.workspace import Workspace
from tests.compare import rel

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def randoms(*shapes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def values_and_grads(function, tensors, dy):
    y = function(*tensors)
    return [y, *torch.autograd.grad(y, tensors, dy.to(y.dtype))]


def worst(found, expected):
    return max(rel(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks so small that every loop runs several times, the last time on a remainder."""
    monkeypatch.setattr(chunking, "CHUNK_ELEMENTS", 300)
    monkeypatch.setattr(implicit_filter, "LAGS_PER_CHUNK", 7)


def test_transforms_have_sequences_for_all_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(chunking, "CHUNK_ELEMENTS", 1024)
    device = torch.device("cpu")

    def sequences(length: int) -> int:
        part = next(chunking.channel_chunks(10**6, 1, length, device))
        return part.stop

    assert sequences(64) == 2 * 1024 / 64, "a chunk for each thread"
    assert sequences(512) == sequences(1024) == 8
    assert sequences(4096) == 2, "a bound on the memory comes first"
    assert sequences(10**6) == 1


def test_a_chunk_has_the_memory_of_the_one_before():
    work = Workspace(torch.float32, torch.device("cpu"))
    first, other = work("first", 4, 5), work("other", 4, 5)
    assert work("first", 10).data_ptr() == first.data_ptr() != other.data_ptr()
    assert work("first", 3, 50).shape == (3, 50)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 97])  # 97 is prime: N > L
def test_long_conv(length, gated, dtype):
    shapes = [(2, 5, length), (5, length), (5,), (2, 5, length)][: 4 if gated else 3]
    exact = randoms(*shapes, dtype=torch.float64)
    dy = torch.randn(2, 5, length, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    expected = values_and_grads(causal_conv_reference, exact, dy)
    tensors = [t.detach().to(dtype).requires_grad_() for t in exact]
    found = values_and_grads(lambda *a: causal_conv(*a, method="right_angle"), tensors, dy)
    assert worst(found, expected) < TOLERANCE[dtype]


def test_long_conv_is_the_sum_it_says():
    """Against the definition, written as loops; the control is a convolution that wraps around."""
    u, h, bias, gate = (t.detach() for t in randoms((1, 2, 9), (2, 9), (2,), (1, 2, 9), dtype=torch.float64))
    y = torch.zeros_like(u)
    for t in range(9):
        y[..., t] = gate[..., t] * (sum(h[:, t - s] * u[..., s] for s in range(t + 1)) + bias * u[..., t])
    assert rel(causal_conv(u, h, bias, gate), y) < 1e-14
    wrapped = gate * (torch.fft.irfft(torch.fft.rfft(u) * torch.fft.rfft(h), n=9) + bias[:, None] * u)
    assert rel(wrapped, y) > 0.1


def test_long_conv_in_bfloat16_computes_in_float32():
    exact = randoms((2, 4, 500), (4, 500), (4,), (2, 4, 500), dtype=torch.float32)
    half = [exact[0].bfloat16(), exact[1], exact[2], exact[3].bfloat16()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = causal_conv(*half)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, causal_conv(half[0].float(), half[1], half[2], half[3].float()).bfloat16())


def test_long_conv_at_length_one_million():
    u, h, bias = randoms((1, 1, 1_000_003), (1, 1_000_003), (1,), dtype=torch.float64, seed=1)
    h = h.detach() * torch.linspace(0, -12, 1_000_003, dtype=torch.float64).exp()
    exact = causal_conv_reference(u, h, bias)
    single = causal_conv(u.float(), h.float(), bias.float())
    assert rel(single, exact) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("shapes", "method"), [
    ([(1, 2, 8), (2, 7), (2,)], "auto"), ([(1, 2, 8), (2, 8), (3,)], "auto"),
    ([(1, 2, 8), (2, 8), (2,), (1, 2, 7)], "auto"), ([(1, 2, 8), (2, 8), (2,)], "circular"),
])
def test_long_conv_refuses(shapes, method):
    with pytest.raises(ValueError, match="needs h|must be one of"):
        causal_conv(*(torch.zeros(shape) for shape in shapes), method=method)


def test_every_method_is_the_same_function():
    tensors = randoms((2, 5, 97), (5, 97), (5,), (2, 5, 97), dtype=torch.float64)
    dy = torch.randn(2, 5, 97, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    expected = values_and_grads(causal_conv_reference, tensors, dy)
    for method in set(long_conv.METHODS) - {"auto"}:
        found = values_and_grads(lambda *a, method=method: causal_conv(*a, method=method), tensors, dy)
        assert worst(found, expected) < TOLERANCE[torch.float64], method


def test_auto_takes_only_what_was_measured():
    assert long_conv._FASTEST.keys() <= {"cpu", "cuda", "meta"}, "add a kind of device with its benchmark and test"


@pytest.mark.parametrize("with_halo", [True, False])
@pytest.mark.parametrize("kernel", [1, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 50])
def test_short_conv(length, kernel, with_halo):
    if with_halo and length < kernel:
        pytest.skip("a slice has at least as many tokens as the halo")
    x, halo, weight, bias = randoms((2, 6, length), (2, 6, kernel - 1), (6, kernel), (6,), dtype=torch.float64)
    halo = halo if with_halo else None
    inputs = [t for t in (x, weight, bias, halo) if t is not None]
    dy = torch.randn(2, 6, length, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    expected = values_and_grads(lambda *_: short_conv_reference(x, weight, bias, halo), inputs, dy)
    tape, found = ShortConvTape(weight.detach(), bias.detach(), torch.float64), [[], [], []]
    with torch.no_grad():
        for rows in (slice(0, 4), slice(4, 6)):
            left, dx = None if halo is None else halo[:, rows], x[:, rows].clone()
            results = tape.forward(dx, rows, left), dx, tape.backward(dy[:, rows], dx, rows, dx, left)
            for result, pieces in zip(results, found, strict=True):
                pieces.append(result)
    y, dx, dhalo = (torch.cat(pieces, 1 if halo is not None or pieces[0].ndim == 3 else 0) for pieces in found)
    pairs = zip([y, dx, tape.dweight, tape.dbias, *[dhalo] * with_halo], expected, strict=True)
    # Taps beyond the sequence and an empty halo have no gradient on which a relative error can be formed.
    assert max(rel(a, b) for a, b in pairs if b.numel() and b.abs().max() > 0) < TOLERANCE[torch.float64]


def filter_weights(dtype, emb_dim=5, width=8, rows=6, inner=2):
    shapes = [(width, emb_dim if i == 0 else width) for i in range(inner + 1)]
    trunk = [tuple(randoms(shape, (width,), dtype=dtype, seed=i)) for i, shape in enumerate(shapes)]
    return trunk, *randoms((width,), (rows, width), dtype=dtype, seed=7), decay_rates(rows, dtype, torch.device("cpu"))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lags", [slice(0, 40), slice(3, 33), slice(14, 15)])
@pytest.mark.parametrize("recompute", [True, False])
def test_filter(recompute, lags, dtype):
    shape = FilterShape(seq_len=40, emb_dim=5, shift=0.05)
    results = []
    for function, of in ((implicit_filter.implicit_filter_reference, torch.float64),
                         (partial(implicit_filter.implicit_filter, recompute=recompute), dtype)):
        trunk, freq, last, decay = filter_weights(of)
        h = function(trunk, freq, last, decay, shape, lags)
        dh = torch.randn(h.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(of)
        results.append([h, *torch.autograd.grad(h, [freq, last, *(t for pair in trunk for t in pair)], dh)])
    assert worst(results[1], results[0]) < TOLERANCE[dtype]


@pytest.mark.parametrize("emb_dim", [3, 5, 9])
def test_filter_pieces_are_the_whole_bit_for_bit(emb_dim):
    """Any rows at any lags: what parallel ranks generate is what one rank does."""
    shape = FilterShape(seq_len=50_001, emb_dim=emb_dim, shift=0.0)
    cpu = torch.device("cpu")
    whole = positional_features(shape, slice(0, shape.seq_len), torch.float32, cpu)
    for lags in (slice(0, 1), slice(777, 8195), slice(49_990, 50_001)):
        assert torch.equal(positional_features(shape, lags, torch.float32, cpu), whole[lags])
    trunk, freq, last, decay = filter_weights(torch.float64, emb_dim)
    h = implicit_filter.implicit_filter(trunk, freq, last, decay, shape, slice(0, 30_000))
    piece = implicit_filter.implicit_filter(trunk, freq, last[2:4], decay[2:4], shape, slice(9_000, 20_000))
    assert rel(piece, h[2:4, 9_000:20_000]) < 1e-14


def saved_by_filter(**how) -> int:
    """Elements of the largest tensor that autograd saves for the backward pass."""
    trunk, freq, last, decay = filter_weights(torch.float32)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        implicit_filter.implicit_filter(trunk, freq, last, decay, FilterShape(9000, 5, 0.05), slice(0, 9000), **how)
    return max(sizes)


def test_filter_keeps_a_trunk_where_it_is_told_to():
    """Else what is saved is the weights: nothing of the size of the lags."""
    assert 0 < saved_by_filter() < 100
    assert saved_by_filter(recompute=False) > 2048


def key(step=3, windows=(5, 11), seed=1):
    return DropoutKey(seed, step, torch.tensor(windows))


def test_dropout_rate_scale_and_gradient():
    x = torch.ones(4000, 2, 40, requires_grad=True)
    y = dropout(x, 0.3, key(), site=0)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert abs((y == 0).float().mean().item() - 0.3) < 0.003
    per_channel = (y == 0).float().mean((0, 1))
    assert (per_channel - 0.3).abs().max() < 0.03
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_dropout_depends_on_the_place_only(monkeypatch):
    x = torch.ones(60, 2, 8)
    y = dropout(x, 0.5, key(), site=0)
    monkeypatch.setattr(chunking, "CHUNK_ELEMENTS", 16)
    assert torch.equal(dropout(x, 0.5, key(), site=0), y)
    assert torch.equal(dropout(x[:, 1:], 0.5, key(windows=(11,)), site=0), y[:, 1:])
    for other in (key(step=4), key(seed=2), key(windows=(6, 12)), key(windows=(5 + 2**32, 11 + 2**32))):
        agreement = (dropout(x, 0.5, other, site=0) == y).float().mean()
        assert 0.4 < agreement < 0.6
    assert 0.4 < (dropout(x, 0.5, key(), site=1) == y).float().mean() < 0.6
    assert 0.4 < (y[:-1] == y[1:]).float().mean() < 0.6
    assert 0.4 < (y[..., :-1] == y[..., 1:]).float().mean() < 0.6


@pytest.mark.parametrize("threshold", [0, 1, int(0.1 * 2**32), 2**31 - 1, 2**31, 2**31 + 5, 2**32 - 1])
def test_the_dropout_hash_in_32_bits_is_that_in_64(threshold):
    state = torch.randint(0, 2**32, (200, 3), generator=torch.Generator().manual_seed(0))
    state[0] = torch.tensor([0, 2**32 - 1, 2**31])
    columns = torch.arange(70)
    expected = dropout_module._hash(state[..., None], columns) >= threshold
    assert torch.equal(dropout_module._at_least(state, columns, threshold), expected)
    assert dropout_module._at_least(state, columns, 2**31).float().mean().sub(0.5).abs() < 0.02, "half of them"


def test_embeddings_gradient_as_a_product():
    ids = torch.randint(0, 9, (300,), generator=torch.Generator().manual_seed(0))
    x = torch.randn(300, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = embedding.sums_reference(ids, x, 12)
    assert rel(embedding.sums(ids, x, 12), expected) < TOLERANCE[torch.float64] < rel(expected.roll(1, 0), expected)


def test_positions_are_those_of_the_cpu_on_every_device():
    """What a GPU keeps is cut from what the CPU computes, past the end of the grid too."""
    shape = implicit_filter.FilterShape(100, 5, 0.05)
    for lags in (slice(3, 40), slice(90, 130), slice(0, 100)):
        t, z = (kept[lags] for kept in implicit_filter._kept(shape, lags, torch.device("cpu")))
        assert torch.equal(t, implicit_filter.time(shape, lags, torch.float32, torch.device("cpu")))
        assert torch.equal(z, implicit_filter.positional_features(shape, lags, torch.float32, torch.device("cpu")))
