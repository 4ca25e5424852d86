"""The implicit filter (`ops.implicit_filter`) and its gradients: the filter in one kernel; the gradients by a kernel
that makes the trunk again and keeps what every layer takes the sine of, two for the last layer and one for each other.

Activations are channels first, [F, lags]; products are of float32's accuracy (three of tf32), and no lag's value
depends on its neighbours. Legend: E positional features, the first of them the time; F trunk width, FP of them with
padding; R rows; n lags.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hyena_dist.ops.costs import Cost, declare_cost

CHUNK = 2**20
"""Lags of which a backward pass keeps the trunk at a time: 1.1 GB at F = 64."""

PROGRAMS = 256
"""The most that sum a weight's gradient, each over its lags; as `norm.PROGRAMS`."""

ROWS = 64
_PI_A = tl.constexpr(3.140625)
_PI_B = tl.constexpr(0.0009670257568359375)
_PI_C = tl.constexpr(6.2771141529083251953e-07)
_PER_PI = tl.constexpr(0.3183098861837907)


@triton.jit
def sine_near_zero(r):
    """Within pi / 2, to the last bit but one."""
    s = r * r
    p = -2.4078247e-8 * s + 2.75363777e-6
    p = p * s - 1.98410853e-4
    p = p * s + 8.33333284e-3
    p = p * s - 1.66666672e-1
    return r + r * s * p


@triton.jit
def turned(r, half_turns):
    return tl.where((half_turns.to(tl.int32) & 1) == 1, -sine_near_zero(r), sine_near_zero(r))


@triton.jit
def sine(x):
    """sin x, for |x| up to some ten thousand: pi's parts are so short that their multiples are exact."""
    q = tl.floor(x * _PER_PI + 0.5)
    return turned(((x - q * _PI_A) - q * _PI_B) - q * _PI_C, q)


@triton.jit
def cosine(x):
    q = tl.floor(x * _PER_PI)
    h = q + 0.5
    return -turned(((x - h * _PI_A) - h * _PI_B) - h * _PI_C, q)


@triton.jit
def product(a, b):
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def column(P, f, F: tl.constexpr):
    """[FP, 1] of P [F]."""
    return tl.load(P + f, mask=f < F, other=0.0)[:, None]


@triton.jit
def square(W, f, F: tl.constexpr):
    """W [F, F] as [FP, FP]."""
    return tl.load(W + f[:, None] * F + f[None, :], mask=(f < F)[:, None] & (f < F)[None, :], other=0.0)


@triton.jit
def windowed(DH, DECAY, t, c, n, ok, R, stride, shift):
    """DH [R, n] times the window, of rows c and lags n: [rows, lags]."""
    window = tl.exp(t[None, :] * tl.load(DECAY + c, mask=c < R, other=0.0)[:, None]) + shift
    at = c.to(tl.int64)[:, None] * stride + n[None, :]
    return window * tl.load(DH + at, mask=(c < R)[:, None] & ok[None, :], other=0.0)


@triton.jit
def filter_forward(FEATURES, OUT, W0, W, B, FREQ, LAST, DECAY, shift, N, R, TAPED: tl.constexpr, LAYERS: tl.constexpr,
                   E: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, LAGS: tl.constexpr, ROWS: tl.constexpr):
    """The trunk at FEATURES [N, E]; W0 [F, E], W [LAYERS - 1, F, F], B [LAYERS, F]. TAPED: what every layer takes the
    sine of, OUT [LAYERS, F, N]; else the filter, OUT [R, N]. Grid (N / LAGS,)."""
    n = tl.program_id(0) * LAGS + tl.arange(0, LAGS)
    f = tl.arange(0, FP)
    ok = n < N
    inside = (f < F)[:, None] & ok[None, :]
    freq = column(FREQ, f, F)
    z = tl.zeros([FP, LAGS], tl.float32) + column(B, f, F)
    for e in tl.static_range(E):
        weight = tl.load(W0 + f * E + e, mask=f < F, other=0.0)[:, None]
        z += weight * tl.load(FEATURES + n * E + e, mask=ok, other=0.0)[None, :]
    for k in range(LAYERS - 1):
        if TAPED:
            tl.store(OUT + (k * F + f)[:, None] * N + n[None, :], z, mask=inside)
        z = product(square(W + k * F * F, f, F), sine(freq * z)) + column(B + (k + 1) * F, f, F)
    if TAPED:
        tl.store(OUT + ((LAYERS - 1) * F + f)[:, None] * N + n[None, :], z, mask=inside)
    else:
        a = sine(freq * z)
        t = tl.load(FEATURES + n * E, mask=ok, other=0.0)
        for first in range(0, R, ROWS):
            c = first + tl.arange(0, ROWS)
            last = tl.load(LAST + c[:, None] * F + f[None, :], mask=(c < R)[:, None] & (f < F)[None, :], other=0.0)
            window = tl.exp(t[None, :] * tl.load(DECAY + c, mask=c < R, other=0.0)[:, None]) + shift
            at = c.to(tl.int64)[:, None] * N + n[None, :]
            tl.store(OUT + at, product(last, a) * window, mask=(c < R)[:, None] & ok[None, :])


@triton.jit
def last_input(FEATURES, DH, D, LAST, DECAY, shift, N, R, stride, E: tl.constexpr, F: tl.constexpr, FP: tl.constexpr,
               LAGS: tl.constexpr, ROWS: tl.constexpr):
    """D [F, N] <- the gradient at what the last layer reads, from DH [R, N], whose rows are `stride` apart.
    Grid (N / LAGS,)."""
    n = tl.program_id(0) * LAGS + tl.arange(0, LAGS)
    f = tl.arange(0, FP)
    ok = n < N
    t = tl.load(FEATURES + n * E, mask=ok, other=0.0)
    d = tl.zeros([FP, LAGS], tl.float32)
    for first in range(0, R, ROWS):
        c = first + tl.arange(0, ROWS)
        last = tl.load(LAST + c[:, None] * F + f[None, :], mask=(c < R)[:, None] & (f < F)[None, :], other=0.0)
        d += product(tl.trans(last), windowed(DH, DECAY, t, c, n, ok, R, stride, shift))
    tl.store(D + f[:, None] * N + n[None, :], d, mask=(f < F)[:, None] & ok[None, :])


@triton.jit
def last_weight(FEATURES, DH, TAPE, DLAST, DECAY, FREQ, shift, N, R, stride, E: tl.constexpr, F: tl.constexpr,
                FP: tl.constexpr, LAGS: tl.constexpr, ROWS: tl.constexpr):
    """DLAST [programs, R, F] <- the last weight's gradient over the program's lags; TAPE [F, N] of the layer before.
    Grid (programs, R / ROWS)."""
    f = tl.arange(0, FP)
    freq = column(FREQ, f, F)
    c = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, FP], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(N, LAGS), tl.num_programs(0)):
        n = block * LAGS + tl.arange(0, LAGS)
        ok = n < N
        t = tl.load(FEATURES + n * E, mask=ok, other=0.0)
        z = tl.load(TAPE + f[:, None] * N + n[None, :], mask=(f < F)[:, None] & ok[None, :], other=0.0)
        total += product(windowed(DH, DECAY, t, c, n, ok, R, stride, shift), tl.trans(sine(freq * z)))
    at = tl.program_id(0).to(tl.int64) * R + c
    tl.store(DLAST + at[:, None] * F + f[None, :], total, mask=(c < R)[:, None] & (f < F)[None, :])


@triton.jit
def layer_backward(READ, TAPE, D, DW, DB, DFREQ, W, FREQ, N, FIRST: tl.constexpr, E: tl.constexpr, F: tl.constexpr,
                   FP: tl.constexpr, IP: tl.constexpr, LAGS: tl.constexpr):
    """A layer z = W a + b, sin(freq z): D [F, N], the gradient at its result, <- that at a. TAPE [F, N] is z. READ is
    the layer before's z [F, N], for FIRST the features [N, E] = a, which have no gradient. DW [programs, F, F or E], DB
    and DFREQ [programs, F]: gradients over the program's lags. Grid (programs,)."""
    f, i = tl.arange(0, FP), tl.arange(0, IP)
    freq = column(FREQ, f, F)
    dweight = tl.zeros([FP, IP], tl.float32)
    dbias = tl.zeros([FP], tl.float32)
    dfreq = tl.zeros([FP], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(N, LAGS), tl.num_programs(0)):
        n = block * LAGS + tl.arange(0, LAGS)
        at = f[:, None] * N + n[None, :]
        inside = (f < F)[:, None] & (n < N)[None, :]
        z = tl.load(TAPE + at, mask=inside, other=0.0)
        d = tl.load(D + at, mask=inside, other=0.0) * cosine(freq * z)
        dfreq += tl.sum(d * z, 1)
        d *= freq
        dbias += tl.sum(d, 1)
        if FIRST:
            a = tl.load(READ + n[:, None] * E + i[None, :], mask=(n < N)[:, None] & (i < E)[None, :], other=0.0)
            dweight += product(d, a)
        else:
            a = sine(freq * tl.load(READ + at, mask=inside, other=0.0))
            dweight += product(d, tl.trans(a))
            d = product(tl.trans(square(W, f, F)), d)
            tl.debug_barrier()  # every gradient of the block was read before the first takes its place
            tl.store(D + at, d, mask=inside)
    width: tl.constexpr = E if FIRST else F
    p = tl.program_id(0)
    tl.store(DW + (p * F + f)[:, None] * width + i[None, :], dweight, mask=(f < F)[:, None] & (i < width)[None, :])
    tl.store(DB + p * F + f, dbias, mask=f < F)
    tl.store(DFREQ + p * F + f, dfreq, mask=f < F)


@torch.library.custom_op("hyena::filter", mutates_args=())
def forward(features: Tensor, weights: list[Tensor], freq: Tensor, last: Tensor, decay: Tensor,
            shift: float) -> Tensor:
    """features [n, E]; weight, bias, weight, bias, ... of the trunk; freq [F], last [R, F], decay [R], all float32 ->
    [R, n]."""
    h = torch.empty(len(last), len(features), dtype=torch.float32, device=features.device)
    trunk = _Trunk(weights, freq)
    if h.numel():
        with torch.cuda.device_of(h):
            trunk.run(features, h, last.contiguous(), decay.contiguous(), shift, taped=False)
    return h


@torch.library.custom_op("hyena::filter_backward", mutates_args=())
def backward(features: Tensor, dh: Tensor, weights: list[Tensor], freq: Tensor, last: Tensor, decay: Tensor,
             shift: float) -> list[Tensor]:
    """Gradients at freq, last and the trunk's weights, from dh [R, n] at `forward`'s result."""
    trunk, dh, last, decay = _Trunk(weights, freq), dh.contiguous(), last.contiguous(), decay.contiguous()
    totals: list[Tensor] = []
    for start in range(0, len(features), CHUNK):
        part = slice(start, start + CHUNK)
        with torch.cuda.device_of(dh):
            found = trunk.backward(features[part], dh[:, part], last, decay, shift)
        totals = found if start == 0 else [total.add_(one) for total, one in zip(totals, found, strict=True)]
    return totals or [torch.zeros_like(t) for t in (freq, last, *weights)]


def _lags(width: int) -> int:
    """Of a program's tile."""
    return 32 if width > 64 else 64


def _cost(features: Tensor, weights: list[Tensor], rows: int, *, backward: bool) -> Cost:
    """Of one chunk after the other."""
    lags, emb = features.shape
    width, layers = len(weights[0]), len(weights) // 2
    trunk = width * emb + (layers - 1) * width * width
    if not backward:
        return Cost(4 * lags * (emb + rows), 2 * lags * (trunk + rows * width), 3)
    tape = emb + layers * width
    last = rows + triton.cdiv(rows, ROWS) * (width + 1) + rows + 1 + width
    each = 2 * layers * width + 2 * (layers - 1) * width + emb
    chunks, programs = triton.cdiv(lags, CHUNK), min(PROGRAMS, triton.cdiv(min(lags, CHUNK), _lags(width)))
    sums = chunks * programs * (rows * width + trunk + 2 * layers * width)
    return Cost(4 * (lags * (tape + last + each) + sums), 2 * lags * (3 * trunk - width * emb + 2 * rows * width),
                2 + chunks * (4 + 4 * layers))


forward.register_fake(lambda features, _weights, _freq, last, *_: last.new_empty(len(last), len(features)))
backward.register_fake(lambda _features, _dh, weights, freq, last, *_: [*map(torch.empty_like, (freq, last, *weights))])
declare_cost("hyena::filter", lambda features, weights, _freq, last, *_: _cost(features, weights, len(last),
                                                                               backward=False))
declare_cost("hyena::filter_backward", lambda features, dh, weights, *_: _cost(features, weights, len(dh),
                                                                               backward=True))


class _Trunk:
    """What the kernels of a filter have in common."""

    def __init__(self, weights: list[Tensor], freq: Tensor) -> None:
        self.first, self.freq, self.layers = weights[0].contiguous(), freq.contiguous(), len(weights) // 2
        width, self.features = self.first.shape
        self.inner = torch.stack(weights[2::2]) if self.layers > 1 else self.first
        self.bias = torch.stack(weights[1::2])
        padded = triton.next_power_of_2(max(16, width))
        self.sizes = {"E": self.features, "F": width, "FP": padded}
        self.lags = {"LAGS": _lags(width)}
        self.options = {"num_warps": 8 if padded > 64 else 4, "num_stages": 1}

    def run(self, features: Tensor, out: Tensor, last: Tensor, decay: Tensor, shift: float, *, taped: bool) -> None:
        count = len(features)
        filter_forward[(triton.cdiv(count, self.lags["LAGS"]),)](
            features, out, self.first, self.inner, self.bias, self.freq, last, decay, shift, count, len(last),
            TAPED=taped, LAYERS=self.layers, ROWS=ROWS, **self.sizes, **self.lags, **self.options)

    def backward(self, features: Tensor, dh: Tensor, last: Tensor, decay: Tensor, shift: float) -> list[Tensor]:
        """Of a chunk."""
        count, rows, width = len(features), len(last), self.sizes["F"]
        blocks = triton.cdiv(count, self.lags["LAGS"])
        programs = min(PROGRAMS, blocks)

        def new(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.float32, device=dh.device)

        common = self.sizes | self.lags | self.options
        tape, d, dlast = new(self.layers, width, count), new(width, count), new(programs, rows, width)
        self.run(features, tape, last, decay, shift, taped=True)
        last_weight[(programs, triton.cdiv(rows, ROWS))](features, dh, tape[-1], dlast, decay, self.freq, shift, count,
                                                         rows, dh.stride(0), ROWS=ROWS, **common)
        last_input[(blocks,)](features, dh, d, last, decay, shift, count, rows, dh.stride(0), ROWS=ROWS, **common)
        dtrunk: list[Tensor] = []
        dfreq: Tensor | None = None
        for k in reversed(range(self.layers)):
            inputs = width if k else self.features
            dweight, dbias, part = new(programs, width, inputs), new(programs, width), new(programs, width)
            layer_backward[(programs,)](
                tape[k - 1] if k else features, tape[k], d, dweight, dbias, part, self.inner[max(k - 1, 0)], self.freq,
                count, FIRST=k == 0, IP=triton.next_power_of_2(max(16, inputs)), **common)
            dtrunk = [dweight.sum(0), dbias.sum(0), *dtrunk]
            dfreq = part.sum(0) if dfreq is None else dfreq.add_(part.sum(0))
        assert dfreq is not None
        return [dfreq, dlast.sum(0), *dtrunk]
