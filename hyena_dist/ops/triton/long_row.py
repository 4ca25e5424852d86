"""The operator of more than 8,192 tokens by the kernels of `columns` and `rows`."""

import torch
from torch import Tensor

from hyena_dist.ops.costs import Cost
from hyena_dist.ops.triton import columns, rows
from hyena_dist.ops.triton.groups import SHORT_BYTES, SHORT_LAUNCHES, ByGroups
from hyena_dist.ops.triton.plans import GROUP_ELEMENTS, LargePlan
from hyena_dist.ops.triton.tables import left_table, right_table, twiddles

PROGRAMS = 2048
"""Programs over which the batch's rows of a filter's row are spread; above it each goes through several of them."""


class LongRow(ByGroups):
    """Both directions of one p [B, 3, C, L]."""

    def __init__(self, p: Tensor, weight: Tensor, bias: Tensor, plan: LargePlan) -> None:
        super().__init__(p, weight, bias, plan.n1 * plan.n2, GROUP_ELEMENTS)
        self.plan = plan
        self.precise = p.dtype == torch.float32
        self.dtype = torch.float32 if self.precise else torch.float16
        self.prec = "split" if self.precise else "half"
        room = 64.0 if self.precise else 8.0 if plan.n2 <= 8192 else 4.0
        self.row_kernel = {**plan.row_shape, "PREC": self.prec, "ROOM": room}
        self.column_kernel = {**plan.column_shape, "K": self.kernel_size, "PREC": self.prec}
        self.scale = (plan.n1 * plan.r1) ** 1.5 / (plan.n1 * plan.n2)

    def cost(self, backward: bool) -> Cost:
        a, elements, points, filters = self.sizes
        plan, s, h = self.plan, self.dtype.itemsize, 4 * self.channels * self.length
        flops = (4 * plan.m + 8 * (plan.r1 + plan.r2)) * (3 if self.precise else 1)
        if not backward:
            spectra = (6 + 2 * self._splits(next(self._groups()))) * s * filters
            return Cost(6 * a * elements + 8 * s * points + spectra + h, flops * (2 * points + filters),
                        5 * self.groups)
        several = self.batch > 1
        spectra = (12 * s + 16 * several) * filters
        return Cost((12 + SHORT_BYTES) * a * elements + 16 * s * points + spectra + 2 * h,
                    flops * (4 * points + 2 * filters), (7 + several + SHORT_LAUNCHES) * self.groups + 2)

    def _forward(self, part: slice, h: Tensor, direct: Tensor, y: Tensor) -> None:
        plan, here = self.plan, part.stop - part.start
        spectrum = self._spectrum(h, part)
        a, column_scales = self._columns("u", part)
        row_scales = self.new(self.batch, here, plan.n1)
        rows.forward[(plan.n1, here, self._splits(part))](
            a, column_scales, row_scales, *spectrum, *self._row_tables(), self.batch, plan.n1, 0, BC=plan.tile,
            **self.row_kernel, **plan.rows)
        columns.leave[self._column_grid(part, plan.leave["BC"])](
            a, row_scales, self.p, y, self.weight, self.bias, direct, *self._column_tables(), self.length,
            self.channels, part.start, plan.n1, **self.column_kernel, **plan.leave)

    def _backward(self, part: slice, dy: Tensor, h: Tensor, direct: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
        plan, here = self.plan, part.stop - part.start
        spectrum = self._spectrum(h, part)
        (a, a_columns), (g, g_columns) = self._columns("u", part), self._columns("g", part, dy)
        a_rows, g_rows = (self.new(self.batch, here, plan.n1) for _ in range(2))
        gradient, scales = self.new(here, 2, plan.n1, plan.n2, dtype=self.dtype), self.new(here, plan.n1)
        alone = self.batch == 1
        dspectrum = scales if alone else self.new(here, 2, plan.n1, plan.n2)
        rows.backward[(plan.n1, here)](
            a, g, a_columns, g_columns, a_rows, g_rows, gradient, scales, dspectrum, *spectrum, *self._row_tables(),
            self.batch, plan.n1, 0, ALONE=alone, BC=plan.tile, **self.row_kernel, **plan.rows_backward)
        if not alone:
            rows.inverse_of_filters[(plan.n1, here)](dspectrum, gradient, scales, *self._row_tables(), plan.n1,
                                                     **self.row_kernel, **plan.filter_rows)
        del spectrum, dspectrum
        columns.leave_filters[self._column_grid(part, plan.tile)[:2]](
            gradient, scales, dh, *self._column_tables(), self.length, part.start, plan.n1, self.scale,
            **plan.column_shape, BC=plan.tile, PREC=self.prec, **plan.filters)
        del gradient, scales
        grid = self._column_grid(part, plan.leave_backward["BC"])
        dq = self.new(self.batch, 3, here, self.length, dtype=self.p.dtype)
        sums = self.new(self.batch, here, grid[0])
        columns.leave_backward[grid](
            a, g, a_rows, g_rows, self.p, dy, dq, sums, self.weight, self.bias, direct, *self._column_tables(),
            self.length, self.channels, part.start, plan.n1, **self.column_kernel, **plan.leave_backward)
        return dq, sums

    def _spectrum(self, h: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """The filters' spectra [c, 2, n1, n2] and the scales of their rows [c, n1]."""
        plan, here = self.plan, part.stop - part.start
        a, column_scales = self._columns("h", part, h)
        spectrum = self.new(here, 2, plan.n1, plan.n2, dtype=self.dtype)
        scales = self.new(here, plan.n1)
        rows.spectrum[(plan.n1, here)](a, column_scales, spectrum, scales, *self._row_tables(), plan.n1, self.scale,
                                       BC=plan.tile, **self.row_kernel, **plan.filter_rows)
        return spectrum, scales

    def _columns(self, what: str, part: slice, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Transforms of the columns [B, c, 2, n1, n2], of the filters [1, c, ...], and the scales of their tiles."""
        plan, here, batch = self.plan, part.stop - part.start, 1 if what == "h" else self.batch
        a = self.new(batch, here, 2, plan.n1, plan.n2, dtype=self.dtype)
        scales = self.new(batch, here, plan.n2 // plan.tile)
        x = self.p if x is None else x
        columns.columns[self._column_grid(part, plan.tile, batch)](
            x if what == "h" else self.p, x, a, scales, self.weight, self.bias, *self._column_tables(),
            self.length, self.channels, part.start, plan.n1, WHAT=what, BC=plan.tile, **self.column_kernel,
            **plan.columns)
        return a, scales

    def _splits(self, part: slice) -> int:
        return min(self.batch, max(1, PROGRAMS // (self.plan.n1 * (part.stop - part.start))))

    def _column_grid(self, part: slice, tile: int, batch: int | None = None) -> tuple[int, int, int]:
        plan = self.plan
        return plan.n2 // tile * (plan.m // plan.mb), part.stop - part.start, batch or self.batch

    def tables(self) -> tuple[Tensor, ...]:
        return *self._column_tables(), *self._row_tables()

    def _column_tables(self) -> tuple[Tensor, Tensor]:
        plan, precise, device = self.plan, self.precise, self.p.device
        return (left_table(plan.n1, plan.m, True, precise, device),
                twiddles(plan.n1, plan.n2, plan.m, True, precise, device))

    def _row_tables(self) -> tuple[Tensor, Tensor, Tensor]:
        r1, r2, precise, device = self.plan.r1, self.plan.r2, self.precise, self.p.device
        return (left_table(r1, r1, False, precise, device), right_table(r2, precise, device),
                twiddles(r1, r2, r1, False, precise, device))
