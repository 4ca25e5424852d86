"""The operator of up to 8,192 tokens by `small`'s kernels."""

import math

import torch
from torch import Tensor

from hyena_dist.ops.costs import Cost
from hyena_dist.ops.triton import small
from hyena_dist.ops.triton.groups import SHORT_BYTES, SHORT_LAUNCHES, ByGroups
from hyena_dist.ops.triton.plans import GROUP_ELEMENTS, SmallPlan
from hyena_dist.ops.triton.tables import left_table, right_table, twiddles

PROGRAMS = 1024
"""Programs of a launch, if there are as many rows: a few for each that a large GPU holds at once. A function of the
shape alone, because the order of sums follows from it."""


class OneRow(ByGroups):
    """Both directions of one p [B, 3, C, L]."""

    def __init__(self, p: Tensor, weight: Tensor, bias: Tensor, plan: SmallPlan) -> None:
        super().__init__(p, weight, bias, plan.m * plan.n2, GROUP_ELEMENTS)
        self.plan = plan
        self.precise = p.dtype == torch.float32
        self.dtype = torch.float32 if self.precise else torch.float16
        self.filter_kernel = {**plan.shape, "PREC": "split" if self.precise else "half",
                              "ROOM": 64.0 if self.precise else 8.0}
        self.kernel = self.filter_kernel | {"K": self.kernel_size}
        self.scale = math.sqrt(plan.n1) / plan.n2

    def cost(self, backward: bool) -> Cost:
        a, elements, points, filters = self.sizes
        s, splits = self.dtype.itemsize, self._grid(next(self._groups()))[1]
        flops = (4 * self.plan.m + 8 * self.plan.n2) * (3 if self.precise else 1)
        spectra = 4 * self.channels * self.length + (2 + 2 * splits) * s * filters
        if not backward:
            return Cost(4 * a * elements + spectra, flops * (2 * points + filters), 2 * self.groups)
        gradients = 4 * self.channels * self.length + (16 + 2 * s) * splits * filters
        return Cost((8 + SHORT_BYTES) * a * elements + spectra + gradients, flops * (4 * points + 2 * filters),
                    (3 + SHORT_LAUNCHES) * self.groups + 2)

    def _forward(self, part: slice, h: Tensor, direct: Tensor, y: Tensor) -> None:
        small.forward[self._grid(part)](
            self.p, y, self.weight, self.bias, *self._spectrum(h, part), direct, *self.tables(), self.length,
            self.batch, self.channels, part.start, 0, **self.kernel, **self.plan.forward)

    def _backward(self, part: slice, dy: Tensor, h: Tensor, direct: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
        plan, (here, splits) = self.plan, self._grid(part)
        place = self.new(splits, here, 2, plan.m, plan.n2, dtype=self.dtype)
        dspectrum = self.new(splits, here, 2, plan.m, plan.n2)
        sums = self.new(splits, here, 1)
        dq = self.new(self.batch, 3, here, self.length, dtype=self.p.dtype)
        small.backward[(here, splits)](
            self.p, dy, dq, place, dspectrum, sums, self.weight, self.bias, *self._spectrum(h, part), direct,
            *self.tables(), self.length, self.batch, self.channels, part.start, 0, **self.kernel, **plan.backward)
        small.filter_gradient[(here,)](dspectrum, dh, *self.tables(), self.length, part.start, splits, self.scale,
                                       **self.filter_kernel, **plan.filters)
        return dq, sums

    def _spectrum(self, h: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """The filters' spectra [c, 2, m, n2] and their scales [c]."""
        plan, here = self.plan, part.stop - part.start
        spectrum, scales = self.new(here, 2, plan.m, plan.n2, dtype=self.dtype), self.new(here)
        small.spectrum[(here,)](h, spectrum, scales, *self.tables(), self.length, part.start, self.scale,
                                **self.filter_kernel, **plan.filters)
        return spectrum, scales

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        n1, m, n2, device = self.plan.n1, self.plan.m, self.plan.n2, self.p.device
        return (left_table(n1, m, True, self.precise, device), right_table(n2, self.precise, device),
                twiddles(n1, n2, m, True, self.precise, device))

    def _grid(self, part: slice) -> tuple[int, int]:
        here = part.stop - part.start
        return here, min(self.batch, max(1, PROGRAMS // here))
