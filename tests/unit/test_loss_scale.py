"""The loss scale of fp16: halved at once, doubled late, never past its limits, and a state of plain numbers."""

import itertools
import json

from hyena_dist.engine.loss_scale import HIGHEST, LossScaler


def test_halves_at_once_and_doubles_after_good_steps() -> None:
    scaler = LossScaler(growth_interval=3)
    assert scaler.scale == 2.0**16
    assert [scaler.update(finite=finite) for finite in (True, True, False, True, True)] == [False, False, True, False,
                                                                                              False]
    assert scaler.scale == 2.0**15, "a bad step starts the count afresh"
    scaler.update(finite=True)
    assert scaler.scale == 2.0**16


def test_stays_within_its_limits() -> None:
    lowest = LossScaler(scale=2.0)
    assert lowest.update(finite=False)
    assert not lowest.update(finite=False), "at the lowest scale it is no overflow that a lower one would cure"
    assert lowest.scale == 1.0
    highest = LossScaler(scale=HIGHEST, growth_interval=1)
    highest.update(finite=True)
    assert highest.scale == HIGHEST


def test_a_resumed_scale_moves_on_as_if_it_had_not_stopped() -> None:
    finite = [True] * 5 + [False] + [True] * 7
    whole, stopped, resumed = (LossScaler(growth_interval=4) for _ in range(3))
    scales = [(whole.update(finite=value), whole.scale) for value in finite]
    found = [(stopped.update(finite=value), stopped.scale) for value in finite[:7]]
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    found += [(resumed.update(finite=value), resumed.scale) for value in finite[7:]]
    assert found == scales
    moves = [scale for scale, _ in itertools.groupby(scale for _, scale in scales)]
    assert moves == [2.0**16, 2.0**17, 2.0**16, 2.0**17]
