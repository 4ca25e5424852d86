"""The convolutions over context ranks: what a rank does on the way."""

import itertools
from collections.abc import Sequence

import pytest
import torch

from benchmarks.counting import CallCounter
from hyena_dist.config.context import choose_method, deals_out, exchanged_rows
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.model import context
from hyena_dist.model.config import hyena_config
from hyena_dist.model.mixer import HyenaMixer
from hyena_dist.ops import implicit_filter
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
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_which_rows_a_rank_owns_is_not_asked_of_the_device(monkeypatch: pytest.MonkeyPatch, batch: int, channels: int,
                                                           groups: int, backend: str) -> None:
    """Nor what its filters' channels are, which are asked for at once. Of order 3, by torch and by kernels."""
    if backend == "triton":
        pytest.importorskip("triton", reason="needs the extra `kernels`")
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
            exchange = context.AllToAll(Axis(None, rank, 4), batch=batch, channels=channels, groups=groups,
                                        backend=backend)
            filters = exchange.filters(mixer_filter, 8)
            y, kept = exchange.convolve(inputs, filters, bias)
            gradients = exchange.convolve_backward(y, filters, bias, kept)
        assert len(asked) == rank + 1
        assert y.shape == (batch, channels, 8)
        assert [gradient.shape for gradient in gradients] == [inputs.shape, filters.shape, bias.shape]
        assert counter.waits == {}
        by_kernels = {name for _, name in counter.operators if name.startswith("hyena.convolve")}
        assert by_kernels == ({"hyena.convolve.default", "hyena.convolve_backward.default"} if backend == "triton"
                              else set())
    covered = {channel for parts in asked for part in parts for channel in range(part.start, part.stop)}
    assert covered == set(range(channels))
    with CallCounter(META) as counter:  # the control
        torch.arange(4).to(META)
    assert counter.waits


def test_the_rule_of_rows_is_the_exchange_s_own() -> None:
    """What a configuration may deal out is what the exchange deals out: every channel of every window, once."""
    taken = []
    for channels, batch, groups, ranks in itertools.product((6, 8), (1, 2, 3), (1, 2), (2, 3, 4)):
        exchanges = [context.AllToAll(Axis(None, rank, ranks), batch=batch, channels=channels, groups=groups)
                     for rank in range(ranks)]
        dealt = sum(rows.rows.stop - rows.rows.start for exchange in exchanges for group in exchange._rows
                    for rows in group)
        rows = exchanged_rows(channels=channels, batch=batch, groups=groups)
        taken.append(choose_method("auto", rows=rows, ranks=ranks))
        assert deals_out(rows, ranks) == (dealt == channels * batch) == (taken[-1] == "all_to_all")
    assert set(taken) == {"all_to_all", "distributed_fft"}


@pytest.mark.parametrize("groups", [1, 4])
def test_the_trunk_is_computed_once_in_each_pass(monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    """Whatever the number of overlap groups is. The control: a call of the filter for each group is counted."""
    config = hyena_config(ModelSection(num_layers=1, hidden_size=16, max_seq_len=64, filter_order=8),
                          parallel=ParallelSection(context=4, context_method="all_to_all", overlap_groups=groups))
    mixer = HyenaMixer(config, 1)
    mixer.axis = Axis(None, 1, 4)
    monkeypatch.setattr(context, "Exchange", _NoExchange)
    for shift in ("shift_left", "shift_right"):
        monkeypatch.setattr(context, shift, lambda x, _axis: torch.zeros_like(x))
    computed = []
    forward = implicit_filter._Trunk.forward
    monkeypatch.setattr(implicit_filter._Trunk, "forward",
                        lambda trunk, features: computed.append(len(features)) or forward(trunk, features))
    y, _ = mixer(torch.randn(16, 1, 16))
    assert computed == [64]
    y.sum().backward()
    assert computed == [64, 64]
    for part in context.AllToAll(mixer.axis, batch=1, channels=16, groups=groups).channels:
        mixer.filter([slice(0, 64)], [part])
    assert computed == [64] * (2 + groups)


def test_tokens_in_order_are_one_after_the_other():
    """Kernels read them so; of slices of one token flattening alone makes a view that is not."""
    for tokens in (1, 3):
        rows = torch.arange(4 * 2 * 2 * tokens).view(4, 2, 2, tokens)
        found = context._tokens_in_order(rows)
        assert found.is_contiguous()
        assert torch.equal(found[1, 0], rows[:, 1, 0].flatten())
