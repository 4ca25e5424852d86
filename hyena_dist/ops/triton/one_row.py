"""One long convolution of a group of channels, of rows of at most 8,192 tokens, by `small`'s kernels."""

import math

import torch
from torch import Tensor

from hyena_dist.ops.costs import Cost
from hyena_dist.ops.triton import small
from hyena_dist.ops.triton.given import Given, new, strides
from hyena_dist.ops.triton.plans import SmallPlan
from hyena_dist.ops.triton.tables import left_table, right_table, twiddles

PROGRAMS = 1024
"""Programs of a launch, if there are as many rows: a few for each that a large GPU holds at once. A function of the
shape alone, because the order of sums follows from it."""


class OneRow:
    """`groups.Convolution` of a plan of one kernel for each direction."""

    def __init__(self, given: Given, plan: SmallPlan) -> None:
        self.given, self.plan = given, plan
        self.precise = given.p.dtype == torch.float32
        self.dtype = torch.float32 if self.precise else torch.float16
        self.filter_kernel = {**plan.shape, "PREC": "split" if self.precise else "half",
                              "ROOM": 64.0 if self.precise else 8.0}
        self.kernel = self.filter_kernel | given.constants()
        self.scale = math.sqrt(plan.n1) / plan.n2
        self.grid = given.here, min(given.rows.count, max(1, PROGRAMS // given.here))

    def cost(self, out: Tensor, backward: bool) -> Cost:
        given, plan, s, splits = self.given, self.plan, self.dtype.itemsize, self.grid[1]
        filters = given.here * plan.m * plan.n2
        flops = (4 * plan.m + 8 * plan.n2) * (3 if self.precise else 1)
        u, gate, written = given.moved(out, backward)
        h = 4 * given.here * given.rows.size
        moved = u + gate + written + h + (2 + 2 * splits) * s * filters
        rows = filters * given.rows.count
        if not backward:
            return Cost(moved, flops * (2 * rows + filters), 2)
        return Cost(moved + h + (16 + 2 * s) * splits * filters, flops * (4 * rows + 2 * filters), 3)

    def forward(self, h: Tensor, direct: Tensor, y: Tensor) -> None:
        small.forward[self.grid](*self.given.arguments(), y, *strides(y), *self._spectrum(h), direct, *self.tables(),
                                 self.given.rows.count, 0, **self.kernel, **self.plan.forward)

    def backward(self, dy: Tensor, h: Tensor, direct: Tensor, dq: Tensor, dx: Tensor, dh: Tensor) -> Tensor:
        plan, (here, splits) = self.plan, self.grid
        place = new(dy, splits, here, 2, plan.m, plan.n2, dtype=self.dtype)
        dspectrum, sums = new(dy, splits, here, 2, plan.m, plan.n2), new(dy, splits, here, 1)
        small.backward[self.grid](
            *self.given.arguments(), dy, *strides(dy), dq, *dq.stride()[:3], dx, place, dspectrum, sums,
            *self._spectrum(h), direct, *self.tables(), self.given.rows.count, 0, **self.kernel, **plan.backward)
        small.filter_gradient[(here,)](dspectrum, dh, *self.tables(), self.given.rows.size, dh.stride(0), splits,
                                       self.scale, **self.filter_kernel, **plan.filters)
        return sums

    def _spectrum(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The filters' spectra [c, 2, m, n2] and their scales [c]."""
        plan, here = self.plan, self.given.here
        spectrum, scales = new(h, here, 2, plan.m, plan.n2, dtype=self.dtype), new(h, here)
        small.spectrum[(here,)](h, spectrum, scales, *self.tables(), self.given.rows.size, h.stride(0), self.scale,
                                **self.filter_kernel, **plan.filters)
        return spectrum, scales

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        n1, m, n2, device = self.plan.n1, self.plan.m, self.plan.n2, self.given.p.device
        return (left_table(n1, m, True, self.precise, device), right_table(n2, self.precise, device),
                twiddles(n1, n2, m, True, self.precise, device))
