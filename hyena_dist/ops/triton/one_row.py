"""The operator of up to 8,192 tokens by `small`'s kernels."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hyena_dist.ops.triton import small
from hyena_dist.ops.triton.groups import channel_groups
from hyena_dist.ops.triton.plans import SmallPlan
from hyena_dist.ops.triton.short import backward as short_backward
from hyena_dist.ops.triton.tables import left_table, right_table, twiddles

GROUP_ELEMENTS = 2**26
"""Elements of a group of channels: the gradients at the short convolution's results are 3 times as many."""

PROGRAMS = 1024
"""Programs of a launch, if there are as many rows: a few for each that a large GPU holds at once. A function of the
shape alone, because the order of sums follows from it."""


class OneRow:
    """Both directions of one p [B, 3, C, L]."""

    def __init__(self, p: Tensor, weight: Tensor, bias: Tensor, plan: SmallPlan) -> None:
        self.p, self.short = p, (weight, bias)
        self.batch, _, self.channels, self.length = p.shape
        self.plan = plan
        self.precise = p.dtype == torch.float32
        self.filter_kernel = {**self.plan.shape, "PREC": "split" if self.precise else "half",
                              "ROOM": 64.0 if self.precise else 8.0}
        self.kernel = self.filter_kernel | {"K": weight.shape[1]}
        self.scale = math.sqrt(self.plan.n1) / self.plan.n2

    def mix(self, h: Tensor, direct: Tensor) -> Tensor:
        """Filters [C, L] and their bias [C] -> [B, C, L]."""
        p = self.p
        y = torch.empty(self.batch, self.channels, self.length, dtype=p.dtype, device=p.device)
        for part in self._groups():
            small.forward[self._grid(part)](
                p, y, *self.short, *self._spectrum(h, part), direct, *self._tables(), self.length,
                self.batch, self.channels, part.start, 0, **self.kernel, **self.plan.forward)
        return y

    def mix_backward(self, dy: Tensor, h: Tensor, direct: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients at the short convolution's weight and bias, h and direct; that at p takes p's place, and mix's
        result takes dy's."""
        p, (weight, bias), plan = self.p, self.short, self.plan
        dweight = torch.empty(3, self.channels, weight.shape[1], dtype=weight.dtype, device=p.device)
        dbias = torch.empty(3, self.channels, dtype=bias.dtype, device=p.device)
        dh, ddirect = torch.empty_like(h), torch.empty_like(direct)
        for part in self._groups():
            here, splits = grid = self._grid(part)
            planes = splits, here, 2, plan.m, plan.n2
            place = torch.empty(*planes, dtype=torch.float32 if self.precise else torch.float16, device=p.device)
            dspectrum = torch.empty(*planes, dtype=torch.float32, device=p.device)
            sums = torch.empty(splits, here, dtype=torch.float32, device=p.device)
            dq = torch.empty(self.batch, 3, here, self.length, dtype=p.dtype, device=p.device)
            small.backward[grid](
                p, dy, dq, place, dspectrum, sums, weight, bias, *self._spectrum(h, part), direct,
                *self._tables(), self.length, self.batch, self.channels, part.start, 0, **self.kernel,
                **plan.backward)
            small.filter_gradient[(here,)](dspectrum, dh, *self._tables(), self.length, part.start, splits,
                                           self.scale, **self.filter_kernel, **plan.filters)
            ddirect[part] = sums.sum(0)
            dweight[:, part], dbias[:, part] = short_backward(dq, p, weight, part)
        return dweight.flatten(0, 1), dbias.flatten(), dh, ddirect

    def _spectrum(self, h: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """The filters' spectra [c, 2, m, n2] and their scales [c]."""
        plan, device, here = self.plan, h.device, part.stop - part.start
        spectrum = torch.empty(here, 2, plan.m, plan.n2, dtype=torch.float32 if self.precise else torch.float16,
                               device=device)
        scales = torch.empty(here, dtype=torch.float32, device=device)
        small.spectrum[(here,)](h, spectrum, scales, *self._tables(), self.length, part.start, self.scale,
                                **self.filter_kernel, **plan.filters)
        return spectrum, scales

    def _tables(self) -> tuple[Tensor, Tensor, Tensor]:
        n1, m, n2, device = self.plan.n1, self.plan.m, self.plan.n2, self.p.device
        return (left_table(n1, m, True, self.precise, device), right_table(n2, self.precise, device),
                twiddles(n1, n2, m, True, self.precise, device))

    def _groups(self) -> Iterator[slice]:
        return channel_groups(self.channels, self.batch * self.plan.m * self.plan.n2, GROUP_ELEMENTS)

    def _grid(self, part: slice) -> tuple[int, int]:
        here = part.stop - part.start
        return here, min(self.batch, max(1, PROGRAMS // here))
