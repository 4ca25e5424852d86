"""The one measure by which tests compare two results."""

import torch


def rel(a, b) -> float:
    """max|a - b| / max|b|, in float64; infinite where a has NaN."""
    a, b = (torch.as_tensor(t).detach().double() for t in (a, b))
    assert a.shape == b.shape, (a.shape, b.shape)
    error = (a - b).abs().max() / b.abs().max()
    return float("inf") if error.isnan() else float(error)
