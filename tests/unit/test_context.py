"""The convolutions over context ranks: what a rank does on the way."""

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
    monkeypatch.setattr(context, "Exchange", _NoExchange)
    asked: list[tuple[int, int]] = []

    def filters(_lags: list[slice], part: slice | None = None) -> torch.Tensor:
        assert part is not None
        asked.append((part.start, part.stop))
        return torch.empty(2, part.stop - part.start, 4 * 8, device=META)

    inputs, bias = torch.empty(2, batch, channels, 8, device=META), torch.empty(2, channels, device=META)
    for rank in range(4):
        with CallCounter(META) as counter:
            y = context.all_to_all_convs(inputs, filters, bias, Axis(None, rank, 4), groups)
        assert y.shape == (batch, channels, 8)
        assert counter.waits == {}
    covered = {channel for start, stop in asked for channel in range(start, stop)}
    assert covered == set(range(channels))
    with CallCounter(META) as counter:  # the control
        torch.arange(4).to(META)
    assert counter.waits
