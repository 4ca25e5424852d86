"""The Hyena operator before and after its long convolutions, where these cross context ranks (see `ops.hyena`):

    split_projection    p -> x0's block, the others, and the last tokens, for the rank on the right
    gated_inputs        short convolution of x1 | ... | v, and u = x_{N-1} * v
    gated_output        short convolution of x0, its product with the last convolution, and the operator's last product

Legend: l tokens of a slice, B batch, D channels of the residual stream, C of them on a tensor rank, K taps, N order.
A halo is the K - 1 tokens on the left of the slice.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hyena_dist.ops.chunking import chunks, in_blocks
from hyena_dist.ops.linear import (
    linear_from_channels,
    linear_from_channels_input_gradient,
    linear_from_channels_weight_gradients,
    linear_reference,
)
from hyena_dist.ops.precision import compute_dtype, product_dtype, without_autocast
from hyena_dist.ops.short_conv import ShortConvTape, short_conv_reference


def split_projection(p: Tensor, channels: int, reach: int) -> tuple[Tensor, Tensor, Tensor]:
    """p [B, (N + 1) C, l] -> [B, C, l], [B, N C, l], and a copy of the last `reach` tokens, [B, (N + 1) C, reach]."""
    return _Split.apply(p, channels, reach)


def gated_inputs(p: Tensor, halo: Tensor, weight: Tensor, bias: Tensor, channels: int) -> Tensor:
    """What the long convolutions read: [N - 1, B, C, l], first u = x_{N-1} * v, then the gates between two
    convolutions in the order of their use, x_{N-2}, ..., x_1.

    p [B, N C, l], halo [B, N C, K - 1], weight [N C, K], bias [N C]; `channels` is C. Saves p and halo.
    """
    return _GatedInputs.apply(p, halo, weight, bias, channels)


def gated_inputs_reference(p: Tensor, halo: Tensor, weight: Tensor, bias: Tensor, channels: int) -> Tensor:
    """The same function through autograd."""
    *gates, v = short_conv_reference(p, weight, bias, halo).split(channels, dim=1)
    return torch.stack([gates.pop() * v, *gates[::-1]])


def gated_output(p: Tensor, halo: Tensor, conv: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor,
                 out_bias: Tensor | None) -> Tensor:
    """out_weight (x0 * conv) + out_bias: [l, B, D].

    p, conv [B, C, l], halo [B, C, K - 1], weight [C, K], bias [C]. Saves p, halo and conv.
    """
    return _GatedOutput.apply(p, halo, conv, weight, bias, out_weight, out_bias, product_dtype(conv))


def gated_output_reference(p: Tensor, halo: Tensor, conv: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor,
                           out_bias: Tensor | None) -> Tensor:
    """The same function through autograd."""
    y = short_conv_reference(p, weight, bias, halo) * conv
    return linear_reference(y.permute(2, 0, 1), out_weight, out_bias)


class _Split(torch.autograd.Function):
    """One gradient of the size of p, where autograd's own views would make one each."""

    @staticmethod
    def forward(_ctx, p: Tensor, channels: int, reach: int) -> tuple[Tensor, Tensor, Tensor]:
        return p[:, :channels], p[:, channels:], p[..., p.shape[2] - reach :].clone()

    @staticmethod
    @once_differentiable
    def backward(_ctx, first: Tensor, rest: Tensor, tail: Tensor) -> tuple[Tensor | None, ...]:
        dp = torch.cat([first, rest], dim=1)
        dp[..., dp.shape[2] - tail.shape[2] :] += tail
        return dp, None, None


class _GatedInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p: Tensor, halo: Tensor, weight: Tensor, bias: Tensor, channels: int) -> Tensor:
        ctx.save_for_backward(p, halo, weight, bias)
        ctx.channels = channels
        batch, blocks, length = len(p), p.shape[1] // channels, p.shape[2]
        dtype = compute_dtype(p, weight)
        short = ShortConvTape(weight, bias, dtype)
        packed = torch.empty(blocks - 1, batch, channels, length, dtype=p.dtype, device=p.device)
        with without_autocast(p):
            for part in chunks(channels, batch * length, p.device):
                *gates, v = (short.forward(p[:, rows].to(dtype), rows, halo[:, rows].to(dtype))
                             for rows in in_blocks(part, blocks, channels))
                packed[0, :, part] = gates.pop().mul_(v)
                for place, gate in enumerate(reversed(gates), start=1):
                    packed[place, :, part] = gate
        return packed

    @staticmethod
    @once_differentiable
    def backward(ctx, dpacked: Tensor) -> tuple[Tensor | None, ...]:
        p, halo, weight, bias = ctx.saved_tensors
        channels, blocks = ctx.channels, p.shape[1] // ctx.channels
        dtype = compute_dtype(p, weight)
        short = ShortConvTape(weight, bias, dtype)
        dp, dhalo = torch.empty(p.shape, dtype=p.dtype, device=p.device), torch.empty_like(halo)
        with without_autocast(p):
            for part in chunks(channels, len(p) * p.shape[2], p.device):
                parts = in_blocks(part, blocks, channels)
                inputs = [(p[:, rows].to(dtype), halo[:, rows].to(dtype)) for rows in parts]
                du, *inner = (d[:, part].to(dtype) for d in dpacked)
                gate, v = (short.forward(x, rows, left)
                           for (x, left), rows in zip(inputs[-2:], parts[-2:], strict=True))
                grads = [*inner[::-1], v.mul_(du), gate.mul_(du)]
                for (x, left), rows, grad in zip(inputs, parts, grads, strict=True):
                    dhalo[:, rows] = short.backward(grad, x, rows, dp[:, rows], left)
        return dp, dhalo, short.dweight, short.dbias, None


class _GatedOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p: Tensor, halo: Tensor, conv: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor,
                out_bias: Tensor | None, product: torch.dtype) -> Tensor:
        ctx.save_for_backward(p, halo, conv, weight, bias, out_weight, out_bias)
        ctx.product, dtype = product, compute_dtype(p, weight)
        short = ShortConvTape(weight, bias, dtype)
        y = torch.empty(conv.shape, dtype=product, device=p.device)
        with without_autocast(p):
            for part in chunks(p.shape[1], len(p) * p.shape[2], p.device):
                gate = short.forward(p[:, part].to(dtype), part, halo[:, part].to(dtype))
                y[:, part] = gate.mul_(conv[:, part])
            return linear_from_channels(y, out_weight, out_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        p, halo, conv, weight, bias, out_weight, out_bias = ctx.saved_tensors
        dtype = compute_dtype(p, weight)
        short = ShortConvTape(weight, bias, dtype)
        dp, dhalo = torch.empty(p.shape, dtype=p.dtype, device=p.device), torch.empty_like(halo)
        dconv = torch.empty(conv.shape, dtype=conv.dtype, device=p.device)
        with without_autocast(p):
            dproduct = dout.to(ctx.product)
            dy = linear_from_channels_input_gradient(dproduct, out_weight)  # y takes its place, chunk by chunk
            for part in chunks(p.shape[1], len(p) * p.shape[2], p.device):
                x, left, grad = p[:, part].to(dtype), halo[:, part].to(dtype), dy[:, part].to(dtype)
                gate = short.forward(x, part, left)
                dconv[:, part] = gate * grad
                dhalo[:, part] = short.backward(grad * conv[:, part], x, part, dp[:, part], left)
                dy[:, part] = gate.mul_(conv[:, part])
            last = linear_from_channels_weight_gradients(dproduct, dy, out_weight, out_bias)
        return dp, dhalo, dconv, short.dweight, short.dbias, *last, None
