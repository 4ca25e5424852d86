"""The convolutions over context ranks: what a rank does on the way."""

from collections.abc import Sequence

import pytest
import torch

from benchmarks.counting import CallCounter
from hyena_dist.model import context
from hyena_dist.parallel.groups import Axis

META = torch.device("meta")


class _NoExchange:
    """In place of the ranks: what comes has the shape of what goes."""

    def __init__(self, x: torch.Tensor, _axis: Axis) -> None:
        self._x = x

    def wait(self) -> torch.Tensor:
        return self._x


@pytest.mark.parametrize(("batch", "channels"), [(1, 8), (2, 8), (4, 6), (2, 4)])  # the last two may cut a batch
@pytest.mark.parametrize("groups", [1, 2])
def test_which_rows_a_rank_owns_is_not_asked_of_the_device(monkeypatch: pytest.MonkeyPatch, batch: int, channels: int,
                                                           groups: int) -> None:
    """Nor what its filters' channels are, which are asked for at once."""
    monkeypatch.setattr(context, "Exchange", _NoExchange)
    asked: list[list[slice]] = []

    def mixer_filter(_lags: list[slice], parts: Sequence[slice] | None = None) -> torch.Tensor:
        assert parts is not None
        asked.append(list(parts))
        return torch.empty(2, sum(part.stop - part.start for part in parts), 4 * 8, device=META)

    bias = torch.empty(2, channels, device=META)
    for rank in range(4):
        inputs = torch.empty(2, batch, channels, 8, device=META)
        with CallCounter(META) as counter:
            exchange = context.AllToAll(Axis(None, rank, 4), batch=batch, channels=channels, groups=groups)
            filters = exchange.filters(mixer_filter, 8)
            y, kept = exchange.convolve(inputs, filters, bias)
            gradients = exchange.convolve_backward(y, filters, bias, kept)
        assert len(asked) == rank + 1
        assert y.shape == (batch, channels, 8)
        assert [gradient.shape for gradient in gradients] == [inputs.shape, filters.shape, bias.shape]
        assert counter.waits == {}
    covered = {channel for parts in asked for part in parts for channel in range(part.start, part.stop)}
    assert covered == set(range(channels))
    with CallCounter(META) as counter:  # the control
        torch.arange(4).to(META)
    assert counter.waits
