"""Both directions of the operator, group of channels by group: a group bounds the workspace."""

from collections.abc import Iterator

import torch
from torch import Tensor

from hyena_dist.ops.costs import Cost
from hyena_dist.ops.triton.short import backward as short_backward

SHORT_BYTES, SHORT_LAUNCHES = 9, 4
"""Of the short convolution's backward pass: for each byte of activations, and for each group with the bias' sums."""


class ByGroups:
    """Of one p [B, 3, C, L] with the short convolution's weight [3 C, K] and bias [3 C]; what a group does is a
    subclass' own."""

    def __init__(self, p: Tensor, weight: Tensor, bias: Tensor, points: int, group_elements: int) -> None:
        """`points`: those of a row of the group's largest tensor, with `group_elements` of them in a group."""
        self.p, self.weight, self.bias = p, weight, bias
        self.batch, _, self.channels, self.length = p.shape
        self.kernel_size = weight.shape[1]
        self._points, self._group_elements = points, group_elements

    def mix(self, h: Tensor, direct: Tensor) -> Tensor:
        """Filters [C, L] and their bias [C] -> [B, C, L]."""
        y = self.new(self.batch, self.channels, self.length, dtype=self.p.dtype)
        for part in self._groups():
            self._forward(part, h, direct, y)
        return y

    def mix_backward(self, dy: Tensor, h: Tensor, direct: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients at the short convolution's weight and bias, h and direct; that at p takes p's place, and mix's
        result takes dy's."""
        dh, ddirect = torch.empty_like(h), torch.empty_like(direct)
        dshort = self.new(3, self.channels, self.kernel_size + 1)
        for part in self._groups():
            dq, sums = self._backward(part, dy, h, direct, dh)
            torch.sum(sums, (0, 2), dtype=ddirect.dtype, out=ddirect[part])
            short_backward(dq, self.p, self.weight, part, dshort[:, part])
            del dq, sums
        dweight, dbias = dshort.flatten(0, 1).split([self.kernel_size, 1], dim=1)
        return dweight.to(self.weight.dtype).contiguous(), dbias[:, 0].to(self.bias.dtype).contiguous(), dh, ddirect

    def cost(self, backward: bool) -> Cost:
        """Of a direction, as `ops.costs` counts; what a program reads again, and tables, are in a cache."""
        raise NotImplementedError

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Bytes of an activation, elements of [B, C, L], and points of the rows and of the filters' rows."""
        rows = self.channels * self.batch
        return self.p.itemsize, rows * self.length, rows * self._points, self.channels * self._points

    @property
    def groups(self) -> int:
        return len(list(self._groups()))

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.p.device)

    def _groups(self) -> Iterator[slice]:
        """Slices of the channels, all about as large."""
        groups = -(-self.channels * self.batch * self._points // self._group_elements)
        groups = min(groups, self.channels)
        for i in range(groups):
            yield slice(self.channels * i // groups, self.channels * (i + 1) // groups)

    def _forward(self, part: slice, h: Tensor, direct: Tensor, y: Tensor) -> None:
        """Write y[:, part]."""
        raise NotImplementedError

    def _backward(self, part: slice, dy: Tensor, h: Tensor, direct: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
        """(the gradients at the short convolution's results [B, 3, c, L]; summands [*, c, *] of that at `direct`) of a
        group; dh[part] is written, and dy[:, part] becomes mix's result."""
        raise NotImplementedError
