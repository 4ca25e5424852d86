"""Both directions of the operator of any order, group of channels by group, which bounds the workspace; a group's long
convolutions one after the other, and of each the rows of one size after those of another."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from hyena_dist.ops.costs import Cost
from hyena_dist.ops.triton import short
from hyena_dist.ops.triton.fft import ByCufft, points
from hyena_dist.ops.triton.given import Given, Rows, new
from hyena_dist.ops.triton.long_row import KnownSpectrum, LongRow, Spectrum
from hyena_dist.ops.triton.one_row import OneRow
from hyena_dist.ops.triton.plans import GROUP_ELEMENTS, LargePlan, SmallPlan

Plan = SmallPlan | LargePlan | None
"""Of rows of one size; None: by cuFFT."""

CUFFT_ELEMENTS = 4
"""A point of cuFFT's spectra, of which four live at once, counts as so many elements of a group."""


class Convolution(Protocol):
    """One long convolution of a `Given`: y = gate (h (*) u + bias u)."""

    def cost(self, out: Tensor, backward: bool) -> Cost:
        """Of a direction, as `ops.costs` counts, with results of the dtype of `out`; what a program reads again, and
        tables, are in a cache."""

    def forward(self, h: Tensor, direct: Tensor, y: Tensor) -> None:
        """Filters [c, at least as many lags as a row has tokens], bias [C] of all channels; writes y [B, c, L]."""

    def backward(self, dy: Tensor, h: Tensor, direct: Tensor, dq: Tensor, dx: Tensor, dh: Tensor) -> Tensor:
        """From the gradient dy [B, c, L] at y, whose place y takes: writes the gradients at the gate and at u's factors
        to their blocks of dq [B, blocks, c, L], or that at u to dx [B, c, L], which has the strides of the given x, and
        that at the filters to dh [c, as many lags]; returns summands [*, c, *] of that at the bias."""


def convolution(given: Given, plan: Plan) -> Convolution:
    """The one of a plan."""
    if plan is None:
        return ByCufft(given)
    return OneRow(given, plan) if isinstance(plan, SmallPlan) else LongRow(given, plan)


class Operator:
    """Of one p [B, N + 1, C, L], with the short convolution's weight [(N + 1) C, K] and bias [(N + 1) C]; None: p has
    been through it.

    Args:
        rows: those of each size, with their plan; of all tokens.
        positions: int32 [B, L], of every token in its segment, where there are segments.
        spectra: those of the filters, [N - 1, C, 2, n1, n2] and [N - 1, C, n1], where they are at hand; of the filters
            that the methods take the shape alone is then of use.
    """

    def __init__(self, p: Tensor, weight: Tensor | None, bias: Tensor | None, rows: Sequence[tuple[Rows, Plan]],
                 positions: Tensor | None = None, spectra: Spectrum | None = None) -> None:
        self.p, self.rows, self.positions, self._spectra = p, rows, positions, spectra
        _, blocks, self.channels, _ = p.shape
        self.weight, self.bias = (t if t is None else t.unflatten(0, (blocks, -1)) for t in (weight, bias))
        self.orders = blocks - 2

    @classmethod
    def whole(cls, p: Tensor, weight: Tensor | None, bias: Tensor | None, plan: Plan,
              spectra: Spectrum | None = None) -> "Operator":
        """Of rows that are one sequence each."""
        return cls(p, weight, bias, [(Rows.whole(p), plan)], spectra=spectra)

    @classmethod
    def in_segments(cls, p: Tensor, weight: Tensor | None, bias: Tensor | None, places: Tensor, positions: Tensor,
                    sizes: list[int], plan_of: Callable[[int], Plan]) -> "Operator":
        """Of rows made of segments (`ops.segments.Segments.by_size`).

        Args:
            sizes: size, number and tokens of the segments of each size, one after the other.
            plan_of: of rows of a size.
        """
        return cls(p, weight, bias, rows_in_segments(places, sizes, plan_of), positions)

    def mix(self, h: Tensor, direct: Tensor) -> Tensor:
        """Filters [N - 1, C, lags] and their bias [N - 1, C] -> [B, C, L]."""
        y = new(self.p, len(self.p), *self.p.shape[2:], dtype=self.p.dtype)
        for part in channel_groups(self.channels, self.rows):
            self._inputs(part, h, direct, y[:, part])
        return y

    def mix_and_keep(self, h: Tensor, direct: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`mix`, and the filters' spectra, which `mix_backward` takes from then on; of rows of one size by three
        kernels."""
        (rows, plan), = self.rows
        assert isinstance(plan, LargePlan)
        shape = len(h), self.channels
        self._spectra = (new(self.p, *shape, 2, plan.n1, plan.n2, dtype=torch.float16), new(self.p, *shape, plan.n1))
        y = new(self.p, len(self.p), *self.p.shape[2:], dtype=self.p.dtype)
        for part in channel_groups(self.channels, self.rows):
            for o in range(self.orders):
                LongRow(self._given(o, part, None, rows), plan).write_spectrum(h[o, part], self._spectrum(o, part))
            self._inputs(part, h, direct, y[:, part])
        return y, *self._spectra

    def mix_backward(self, dy: Tensor, h: Tensor, direct: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients at the short convolution's weight and bias, which are empty where there is none, h and direct; that
        at p takes p's place, and mix's result takes dy's."""
        make = torch.empty_like if self._longest == h.shape[-1] and len(self.rows) == 1 else torch.zeros_like
        dh, ddirect = make(h, memory_format=torch.contiguous_format), torch.empty_like(direct)
        taps = 0 if self.weight is None else self.weight.shape[2]
        dshort = new(self.p, self.p.shape[1], self.channels, taps + 1)
        for part in channel_groups(self.channels, self.rows):
            inputs: list[Tensor | None] = self._inputs(part, h, direct, None)
            p = self.p[:, :, part]
            dq, gradient = new(p, *p.shape, dtype=p.dtype), dy[:, part]
            for o in reversed(range(self.orders)):
                x = inputs.pop()
                dx = gradient if x is None else torch.empty_like(x)
                ddirect[o, part] = self._step_backward(o, part, x, gradient, h, direct, dq, dx, dh)
                gradient = dx
            del inputs, gradient, x, dx
            if self.weight is None:
                p.copy_(dq)
            else:
                short.backward(dq, p, self.weight, part.start, self.positions, dshort[:, part])
            del dq
        if self.weight is None or self.bias is None:
            return new(h, 0), new(h, 0), dh, ddirect
        dweight, dbias = dshort.flatten(0, 1).split([taps, 1], dim=1)
        return dweight.to(self.weight.dtype).contiguous(), dbias[:, 0].to(self.bias.dtype).contiguous(), dh, ddirect

    def cost(self, backward: bool) -> Cost:
        """Of a direction."""
        total = Cost(0.0, 0.0, 2) if backward else Cost()
        for part in channel_groups(self.channels, self.rows):
            here = part.stop - part.start
            inner = self.p.new_empty((0,), dtype=torch.float32)
            for o in range(self.orders):
                x = None if o == 0 else new(self.p.to("meta"), len(self.p), here, self.p.shape[-1])
                last = o == self.orders - 1
                for rows, plan in self.rows:
                    step = self._convolution(o, part, x, rows, plan)
                    out = self.p if last else inner
                    if backward:
                        total += step.cost(out, True) + Cost(0.0, 0.0, 2 + (len(self.rows) > 1))
                    if not (backward and last):
                        total += step.cost(out, False)
            if backward:
                a = self.p.itemsize * len(self.p) * here * self.p.shape[-1]
                total += Cost((2.0 if self.weight is None else 3.0) * a * self.p.shape[1], 0.0, 3)
        return total

    def _inputs(self, part: slice, h: Tensor, direct: Tensor, y: Tensor | None) -> list[Tensor | None]:
        """The inputs of each convolution of a group, [B, c, L] float32; of the first it is a product, None. With y the
        last one's result is written there."""
        found: list[Tensor | None] = [None]
        for o in range(self.orders - (y is None)):
            x = found[-1]
            last = o == self.orders - 1
            out = y if last and y is not None else new(self.p, len(self.p), part.stop - part.start, self.p.shape[-1])
            for rows, plan in self.rows:
                self._convolution(o, part, x, rows, plan).forward(h[o, part], direct[o], out)
            found.append(out)
        return found

    def _step_backward(self, o: int, part: slice, x: Tensor | None, dy: Tensor, h: Tensor, direct: Tensor, dq: Tensor,
                       dx: Tensor, dh: Tensor) -> Tensor:
        """One convolution's; returns the gradient at its bias."""
        total = None
        for rows, plan in self.rows:
            step = self._convolution(o, part, x, rows, plan)
            one = len(self.rows) == 1
            found = dh[o, part] if one else torch.empty_like(dh[o, part])
            sums = step.backward(dy, h[o, part], direct[o], dq, dx, found).sum((0, 2), dtype=direct.dtype)
            if not one:
                dh[o, part, : rows.size] += found[:, : rows.size]
            total = sums if total is None else total.add_(sums)
        assert total is not None
        return total

    def _convolution(self, o: int, part: slice, x: Tensor | None, rows: Rows, plan: Plan) -> Convolution:
        given = self._given(o, part, x, rows)
        if self._spectra is None:
            return convolution(given, plan)
        assert isinstance(plan, LargePlan)
        return KnownSpectrum(given, plan, self._spectrum(o, part))

    def _spectrum(self, o: int, part: slice) -> Spectrum:
        assert self._spectra is not None
        spectra, scales = self._spectra
        return spectra[o, part], scales[o, part]

    def _given(self, o: int, part: slice, x: Tensor | None, rows: Rows) -> Given:
        gate = self.orders - 1 - o
        return Given(self.p[:, :, part], x, self.weight, self.bias, self.channels, part.start, gate, rows)

    @property
    def _longest(self) -> int:
        return max(rows.size for rows, _ in self.rows)


def rows_in_segments(places: Tensor, sizes: list[int], plan_of: Callable[[int], Plan]) -> list[tuple[Rows, Plan]]:
    """The segments of each size (`ops.segments.Segments.by_size`)."""
    counts = sizes[1::3]
    return [(Rows(count, size, tokens, part), plan_of(size)) for size, count, tokens, part in
            zip(sizes[::3], counts, sizes[2::3], places.split(counts), strict=True)]


def channel_groups(channels: int, rows: Sequence[tuple[Rows, Plan]]) -> list[slice]:
    """Slices of the channels, all about as large."""
    each = sum(some.count * elements(some.size, plan) for some, plan in rows)
    groups = min(-(-channels * each // GROUP_ELEMENTS), channels)
    return [slice(channels * i // groups, channels * (i + 1) // groups) for i in range(groups)]


def elements(size: int, plan: Plan) -> int:
    """Of a row of one channel, as GROUP_ELEMENTS counts."""
    if plan is None:
        return CUFFT_ELEMENTS * points(size)
    return (plan.m if isinstance(plan, SmallPlan) else plan.n1) * plan.n2
