"""A third kind of mixer, of the tests alone, beside the two of the package: over tensor and context ranks a model with
all three equals that of one rank, and so does what training steps make of it."""

from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from hyena_dist.config.mixers import MIXERS
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.model.placement import tensor_share
from hyena_dist.parallel.groups import Axis, Groups, init_groups
from tests import mean
from tests.compare import rel
from tests.dist.harness import run_distributed
from tests.dist.test_engine_model import TOLERANCE as TRAINED
from tests.dist.test_engine_model import groups_of, make, run_config, train
from tests.dist.test_parallel import TOLERANCE, Case, compare

CASES = [Case(2, 2, 1, pattern="HXA"), Case(2, 2, 1, pattern="HXA", sequence=True, recompute="full"),
         Case(2, 2, 1, pattern="X", precision="fp32")]


def _trained(groups: Groups) -> tuple[dict[str, list[float]], dict[str, torch.Tensor], Any]:
    """(Losses and gradient norms of steps with ZeRO 1, this tensor rank's weights after them, their placement)."""
    config = run_config(1, ParallelSection(tensor=groups.tensor.size, context=groups.context.size))
    config = replace(config, model=replace(config.model, num_layers=3, layer_pattern="HXA", num_attention_heads=4))
    model, engine = make(config, groups)
    records = train(model, engine, groups, (0, 1))
    numbers = {"loss": [record.loss for record in records], "grad_norm": [record.grad_norm for record in records]}
    weights = {name: engine.export_parameter(name)["weight"] for name in engine.parameter_shapes}
    return numbers, weights, model.placement()


def _on_ranks() -> dict[str, Any]:
    MIXERS["X"] = "tests.mean"
    groups = init_groups(tensor=2, context=2)
    found: dict[str, Any] = {str(case): compare(case, groups) for case in CASES}
    own = mean.MeanMixer._means

    def apart(self: mean.MeanMixer, value: torch.Tensor) -> torch.Tensor:
        with mock.patch.object(self, "context", Axis()):
            return own(self, value)

    with mock.patch.object(mean.MeanMixer, "_means", apart):
        found["control"] = compare(CASES[0], groups)["logits"]
    expected, whole, table = _trained(groups_of("alone"))
    numbers, weights, _ = _trained(groups)
    found["trained"] = {key: rel(torch.tensor(numbers[key]), torch.tensor(expected[key])) for key in expected}
    found["trained"] |= {name: rel(weight, tensor_share(whole[name], table[name], groups.tensor.rank, 2))
                         for name, weight in weights.items()}
    return found


def test_a_third_kind_equals_one_rank() -> None:
    by_rank = run_distributed(_on_ranks, 4)
    for case in CASES:
        worst, name = max((error, name) for found in by_rank for name, error in found[str(case)].items())
        print(f"{case}: worst {name} {worst:.1e}, tolerance {TOLERANCE[case.precision]}")
        assert worst < TOLERANCE[case.precision], (case, name)
    control = max(found["control"] for found in by_rank)
    print(f"control, means of each slice alone: logits by {control:.1e}")
    assert control > 100 * TOLERANCE["fp32"]
    worst, name = max((error, name) for found in by_rank for name, error in found["trained"].items())
    print(f"two steps of ZeRO 1: worst {name} {worst:.1e}, tolerance {TRAINED}")
    assert worst < TRAINED, name
    assert len(by_rank[0]["trained"]) > 30
