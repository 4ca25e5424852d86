"""The published parameter groups: every trainable parameter in exactly one, filters without decay."""

import pytest
import torch
from torch import nn

from hyena_dist.config.sections.optim import OptimSection
from hyena_dist.model.placement import Placement
from hyena_dist.train.optimizer import build_optimizer, parameter_groups


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.filter = nn.Parameter(torch.ones(4))


TABLE = {"linear.weight": Placement(), "linear.bias": Placement(), "filter": Placement(weight_decay=False)}


def test_each_parameter_is_in_one_group() -> None:
    model = Model()
    decay, no_decay = parameter_groups(model.named_parameters(), TABLE, 0.1)
    assert decay["params"] == [model.linear.weight, model.linear.bias]
    assert no_decay["params"] == [model.filter]
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = Model()
    model.filter.requires_grad_(False)
    groups = parameter_groups(model.named_parameters(), TABLE, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1]
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups([("filter", model.filter)], TABLE, 0.1)


def test_a_parameter_outside_the_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="extra is not in the placement table"):
        parameter_groups([("extra", nn.Parameter(torch.ones(1)))], TABLE, 0.1)


def test_only_the_filter_escapes_decay() -> None:
    model = Model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, TABLE, OptimSection(lr=0.5, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(model.filter, before["filter"])
    torch.testing.assert_close(model.linear.weight.detach(), before["linear.weight"] * (1 - 0.5 * 0.1))
    assert optimizer.defaults["betas"] == (0.8, 0.95)
    assert optimizer.defaults["eps"] == 1e-6
