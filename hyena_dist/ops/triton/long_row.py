"""One long convolution of a group of channels, of rows of more than 8,192 tokens, by the kernels of `columns` and
`rows`."""

import torch
from torch import Tensor

from hyena_dist.ops.costs import Cost
from hyena_dist.ops.triton import columns, rows
from hyena_dist.ops.triton.given import Given, new, strides
from hyena_dist.ops.triton.plans import LargePlan
from hyena_dist.ops.triton.tables import left_table, right_table, twiddles

PROGRAMS = 2048
"""Programs over which the batch's rows of a filter's row are spread; above it each goes through several of them."""

Spectrum = tuple[Tensor, Tensor]
"""Of c filters, [c, 2, n1, n2], and the scales of its rows [c, n1]."""


class LongRow:
    """`groups.Convolution` of a plan of three kernels."""

    def __init__(self, given: Given, plan: LargePlan) -> None:
        self.given, self.plan = given, plan
        self.precise = given.p.dtype == torch.float32
        self.dtype = torch.float32 if self.precise else torch.float16
        self.prec = "split" if self.precise else "half"
        room = 64.0 if self.precise else 8.0 if plan.n2 <= 8192 else 4.0
        self.row_kernel = {**plan.row_shape, "PREC": self.prec, "ROOM": room}
        self.column_kernel = {**plan.column_shape, **given.constants(), "PREC": self.prec}
        self.scale = (plan.n1 * plan.r1) ** 1.5 / (plan.n1 * plan.n2)
        self.splits = min(given.rows.count, max(1, PROGRAMS // (plan.n1 * given.here)))

    def cost(self, out: Tensor, backward: bool) -> Cost:
        given, plan, s = self.given, self.plan, self.dtype.itemsize
        filters = given.here * plan.n1 * plan.n2
        points, h = filters * given.rows.count, 4 * given.here * given.rows.size
        flops = (4 * plan.m + 8 * (plan.r1 + plan.r2)) * (3 if self.precise else 1)
        u, gate, written = given.moved(out, backward)
        if not backward:
            return Cost(2 * u + gate + written + 8 * s * points + (6 + 2 * self.splits) * s * filters + h,
                        flops * (2 * points + filters), 5)
        several = given.rows.count > 1
        read = 2 * u + 2 * gate + out.itemsize * given.here * given.rows.tokens
        return Cost(read + written + 16 * s * points + (12 * s + 16 * several) * filters + 2 * h,
                    flops * (4 * points + 2 * filters), 7 + several)

    def forward(self, h: Tensor, direct: Tensor, y: Tensor) -> None:
        plan, given = self.plan, self.given
        spectrum = self.spectrum(h)
        a, column_scales = self._columns(given.ungated())
        row_scales = new(y, given.rows.count, given.here, plan.n1)
        rows.forward[(plan.n1, given.here, self.splits)](
            a, column_scales, row_scales, *spectrum, *self._row_tables(), given.rows.count, plan.n1, 0, BC=plan.tile,
            **self.row_kernel, **plan.rows)
        columns.leave[self._column_grid(plan.leave["BC"], given)](
            *given.arguments(), a, row_scales, y, *strides(y), direct, *self._column_tables(), plan.n1,
            **self.column_kernel, **plan.leave)

    def backward(self, dy: Tensor, h: Tensor, direct: Tensor, dq: Tensor, dx: Tensor, dh: Tensor) -> Tensor:
        plan, given = self.plan, self.given
        count, here = given.rows.count, given.here
        spectrum = self.spectrum(h)
        (a, a_columns), (g, g_columns) = self._columns(given.ungated()), self._columns(given.gradient(dy))
        a_rows, g_rows = (new(dy, count, here, plan.n1) for _ in range(2))
        gradient, scales = new(dy, here, 2, plan.n1, plan.n2, dtype=self.dtype), new(dy, here, plan.n1)
        alone = count == 1
        dspectrum = scales if alone else new(dy, here, 2, plan.n1, plan.n2)
        rows.backward[(plan.n1, here)](
            a, g, a_columns, g_columns, a_rows, g_rows, gradient, scales, dspectrum, *spectrum, *self._row_tables(),
            count, plan.n1, 0, ALONE=alone, BC=plan.tile, **self.row_kernel, **plan.rows_backward)
        if not alone:
            rows.inverse_of_filters[(plan.n1, here)](dspectrum, gradient, scales, *self._row_tables(), plan.n1,
                                                     **self.row_kernel, **plan.filter_rows)
        del spectrum, dspectrum
        columns.leave_filters[self._column_grid(plan.tile, given)[:2]](
            gradient, scales, dh, *self._column_tables(), given.rows.size, dh.stride(0), plan.n1, self.scale,
            **plan.column_shape, BC=plan.tile, PREC=self.prec, **plan.filters)
        del gradient, scales
        grid = self._column_grid(plan.leave_backward["BC"], given)
        sums = new(dy, count, here, grid[0])
        columns.leave_backward[grid](
            *given.arguments(), a, g, a_rows, g_rows, dy, *strides(dy), dq, *dq.stride()[:3], dx, sums, direct,
            *self._column_tables(), plan.n1, **self.column_kernel, **plan.leave_backward)
        return sums

    def spectrum(self, h: Tensor) -> Spectrum:
        """Of filters [c, lags]."""
        plan, here = self.plan, self.given.here
        found = new(h, here, 2, plan.n1, plan.n2, dtype=self.dtype), new(h, here, plan.n1)
        self.write_spectrum(h, found)
        return found

    def write_spectrum(self, h: Tensor, found: Spectrum) -> None:
        """The same to given places."""
        plan, here = self.plan, self.given.here
        a, column_scales = self._columns(self.given.filters(h))
        rows.spectrum[(plan.n1, here)](a, column_scales, *found, *self._row_tables(), plan.n1, self.scale,
                                       BC=plan.tile, **self.row_kernel, **plan.filter_rows)

    def _columns(self, given: Given) -> tuple[Tensor, Tensor]:
        """Transforms of the columns of what is given [rows, c, 2, n1, n2], and the scales of their tiles."""
        plan, count = self.plan, given.rows.count
        a = new(given.p, count, given.here, 2, plan.n1, plan.n2, dtype=self.dtype)
        scales = new(given.p, count, given.here, plan.n2 // plan.tile)
        columns.columns[self._column_grid(plan.tile, given)](
            *given.arguments(), a, scales, *self._column_tables(), plan.n1, BC=plan.tile,
            **self.column_kernel | given.constants(), **plan.columns)
        return a, scales

    def _column_grid(self, tile: int, given: Given) -> tuple[int, int, int]:
        plan = self.plan
        return plan.n2 // tile * (plan.m // plan.mb), given.here, given.rows.count

    def tables(self) -> tuple[Tensor, ...]:
        return *self._column_tables(), *self._row_tables()

    def _column_tables(self) -> tuple[Tensor, Tensor]:
        plan, precise, device = self.plan, self.precise, self.given.p.device
        return (left_table(plan.n1, plan.m, True, precise, device),
                twiddles(plan.n1, plan.n2, plan.m, True, precise, device))

    def _row_tables(self) -> tuple[Tensor, Tensor, Tensor]:
        r1, r2, precise, device = self.plan.r1, self.plan.r2, self.precise, self.given.p.device
        return (left_table(r1, r1, False, precise, device), right_table(r2, precise, device),
                twiddles(r1, r2, r1, False, precise, device))


class KnownSpectrum(LongRow):
    """The same of filters whose spectrum is at hand; the filters themselves are not read."""

    def __init__(self, given: Given, plan: LargePlan, known: Spectrum) -> None:
        super().__init__(given, plan)
        self._known = known

    def spectrum(self, _h: Tensor) -> Spectrum:
        return self._known

    def cost(self, out: Tensor, backward: bool) -> Cost:
        given, plan = self.given, self.plan
        filters, whole = given.here * plan.n1 * plan.n2, super().cost(out, backward)
        flops = (4 * plan.m + 8 * (plan.r1 + plan.r2)) * (3 if self.precise else 1)
        return Cost(whole.bytes - 6 * self.dtype.itemsize * filters - 4 * given.here * given.rows.size,
                    whole.flops - flops * filters, whole.launches - 2)
