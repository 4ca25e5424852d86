"""The operator of more than 8,192 tokens by the kernels of `columns` and `rows`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from hyena_dist.ops.triton import columns, rows
from hyena_dist.ops.triton.groups import channel_groups
from hyena_dist.ops.triton.plans import LargePlan
from hyena_dist.ops.triton.short import backward as short_backward
from hyena_dist.ops.triton.tables import left_table, right_table, twiddles

GROUP_ELEMENTS = 2**25
"""Elements of a group of channels. Each has 8 bytes of intermediate results in the backward pass (float32: 16), 6 (12)
of gradients at the short convolution's results, and for one batch row 20 of spectra."""

SPLITS_PROGRAMS = 2048
"""Programs over which the batch's rows of a filter's row are spread; above it each goes through several of them."""


class LongRow:
    """Both directions of one p [B, 3, C, L]."""

    def __init__(self, p: Tensor, weight: Tensor, bias: Tensor, plan: LargePlan) -> None:
        self.p, self.short = p, (weight, bias)
        self.batch, _, self.channels, self.length = p.shape
        self.precise = p.dtype == torch.float32
        self.plan = plan
        self.dtype = torch.float32 if self.precise else torch.float16
        self.prec = "split" if self.precise else "half"
        room = 64.0 if self.precise else 8.0 if plan.n2 <= 8192 else 4.0
        self.row_kernel = {**plan.row_shape, "PREC": self.prec, "ROOM": room}
        self.column_kernel = {**plan.column_shape, "K": weight.shape[1], "PREC": self.prec}
        self.scale = (plan.n1 * plan.r1) ** 1.5 / (plan.n1 * plan.n2)

    def mix(self, h: Tensor, direct: Tensor) -> Tensor:
        """Filters [C, L] and their bias [C] -> [B, C, L]."""
        p, plan = self.p, self.plan
        y = torch.empty(self.batch, self.channels, self.length, dtype=p.dtype, device=p.device)
        for part in self._groups():
            here = part.stop - part.start
            spectrum = self._spectrum(h, part)
            a, column_scales = self._columns("u", part)
            row_scales = self._new(self.batch, here, plan.n1)
            splits = min(self.batch, max(1, SPLITS_PROGRAMS // (plan.n1 * here)))
            rows.forward[(plan.n1, here, splits)](a, column_scales, row_scales, *spectrum,
                                                  *self._row_tables(), self.batch, plan.n1, 0, BC=plan.tile,
                                                  **self.row_kernel, **plan.rows)
            columns.leave[self._column_grid(part, plan.leave["BC"])](
                a, row_scales, p, y, *self.short, direct, *self._column_tables(), self.length,
                self.channels, part.start, plan.n1, **self.column_kernel, **plan.leave)
        return y

    def mix_backward(self, dy: Tensor, h: Tensor, direct: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients at the short convolution's weight and bias, h and direct; that at p takes p's place, and mix's
        result takes dy's."""
        p, (weight, bias) = self.p, self.short
        dweight = torch.empty(3, self.channels, weight.shape[1], dtype=weight.dtype, device=p.device)
        dbias = torch.empty(3, self.channels, dtype=bias.dtype, device=p.device)
        dh, ddirect = torch.empty_like(h), torch.empty_like(direct)
        for part in self._groups():
            dq, ddirect[part] = self._gradients(dy, h, direct, dh, part)
            dweight[:, part], dbias[:, part] = short_backward(dq, p, weight, part)
        return dweight.flatten(0, 1), dbias.flatten(), dh, ddirect

    def _gradients(self, dy: Tensor, h: Tensor, direct: Tensor, dh: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """Of a group of channels: dq [B, 3, c, L] and that of the bias [c]; dh is written, dy becomes mix's result."""
        p, plan, here = self.p, self.plan, part.stop - part.start
        spectrum = self._spectrum(h, part)
        (a, a_columns), (g, g_columns) = self._columns("u", part), self._columns("g", part, dy)
        a_rows, g_rows = (self._new(self.batch, here, plan.n1) for _ in range(2))
        place = self._new(here, 2, plan.n1, plan.n2, dtype=self.dtype)
        dspectrum = self._new(here, 2, plan.n1, plan.n2)
        rows.backward[(plan.n1, here)](a, g, a_columns, g_columns, a_rows, g_rows, place, dspectrum, *spectrum,
                                       *self._row_tables(), self.batch, plan.n1, 0, BC=plan.tile,
                                       **self.row_kernel, **plan.rows_backward)
        del place, spectrum
        grid = self._column_grid(part, plan.leave_backward["BC"])
        dq = self._new(self.batch, 3, here, self.length, dtype=p.dtype)
        sums = self._new(self.batch, here, grid[0])
        columns.leave_backward[grid](
            a, g, a_rows, g_rows, p, dy, dq, sums, *self.short, direct, *self._column_tables(), self.length,
            self.channels, part.start, plan.n1, **self.column_kernel, **plan.leave_backward)
        del a, g
        a, scales = self._new(here, 2, plan.n1, plan.n2, dtype=self.dtype), self._new(here, plan.n1)
        rows.inverse[(plan.n1, here)](dspectrum, a, scales, *self._row_tables(), plan.n1, **self.row_kernel,
                                      **plan.filter_rows)
        columns.leave_filters[self._column_grid(part, plan.tile)[:2]](
            a, scales, dh, *self._column_tables(), self.length, part.start, plan.n1, self.scale, **plan.column_shape,
            BC=plan.tile, PREC=self.prec, **plan.filters)
        return dq, sums.sum((0, 2))

    def _spectrum(self, h: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """The filters' spectra [c, 2, n1, n2] and the scales of their rows [c, n1]."""
        plan, here = self.plan, part.stop - part.start
        a, column_scales = self._columns("h", part, h)
        spectrum = self._new(here, 2, plan.n1, plan.n2, dtype=self.dtype)
        scales = self._new(here, plan.n1)
        rows.spectrum[(plan.n1, here)](a, column_scales, spectrum, scales, *self._row_tables(), plan.n1, self.scale,
                                       BC=plan.tile, **self.row_kernel, **plan.filter_rows)
        return spectrum, scales

    def _columns(self, what: str, part: slice, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Transforms of the columns [B, c, 2, n1, n2], of the filters [1, c, ...], and the scales of their tiles."""
        plan, here, batch = self.plan, part.stop - part.start, 1 if what == "h" else self.batch
        a = self._new(batch, here, 2, plan.n1, plan.n2, dtype=self.dtype)
        scales = self._new(batch, here, plan.n2 // plan.tile)
        x = self.p if x is None else x
        columns.columns[self._column_grid(part, plan.tile, batch)](
            x if what == "h" else self.p, x, a, scales, *self.short, *self._column_tables(),
            self.length, self.channels, part.start, plan.n1, WHAT=what, BC=plan.tile, **self.column_kernel,
            **plan.columns)
        return a, scales

    def _column_grid(self, part: slice, tile: int, batch: int | None = None) -> tuple[int, int, int]:
        plan = self.plan
        return plan.n2 // tile * (plan.m // plan.mb), part.stop - part.start, batch or self.batch

    def _column_tables(self) -> tuple[Tensor, Tensor]:
        plan, precise, device = self.plan, self.precise, self.p.device
        return (left_table(plan.n1, plan.m, True, precise, device),
                twiddles(plan.n1, plan.n2, plan.m, True, precise, device))

    def _row_tables(self) -> tuple[Tensor, Tensor, Tensor]:
        r1, r2, precise, device = self.plan.r1, self.plan.r2, self.precise, self.p.device
        return (left_table(r1, r1, False, precise, device), right_table(r2, precise, device),
                twiddles(r1, r2, r1, False, precise, device))

    def _groups(self) -> Iterator[slice]:
        return channel_groups(self.channels, self.batch * self.plan.n1 * self.plan.n2, GROUP_ELEMENTS)

    def _new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.p.device)
