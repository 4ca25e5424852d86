"""A head with a weight of its own: its values and gradients, and that every table and formula knows it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.baseline import BaselineHyenaDNA
from hyena_dist.config.identity import differences
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.convert import to_published
from hyena_dist.costs.engines import parameters
from hyena_dist.costs.flops import training_flops
from hyena_dist.model.config import hyena_config
from hyena_dist.model.loss import token_loss
from hyena_dist.model.model import HyenaModel
from hyena_dist.train.optimizer import parameter_groups
from tests.compare import rel

SECTION = ModelSection(num_layers=2, hidden_size=16, max_seq_len=40, filter_order=8, embed_dropout=0.0)
IDS = torch.randint(7, 11, (3, 41), generator=torch.Generator().manual_seed(0))
TABLE, HEAD = "embedding.word_embeddings.weight", "head.weight"


def build(tied: bool, **settings: Any) -> HyenaModel:
    return HyenaModel(hyena_config(replace(SECTION, tie_embeddings=tied), params_dtype=torch.float64, **settings))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    total, count = token_loss(model(IDS[:, :-1]), IDS[:, 1:])
    (total / count).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_tied_head_is_an_untied_one_of_the_same_value(recompute: str) -> None:
    """Then the gradient of the tied weight is the sum of the two."""
    tied, untied = (build(kind, activation_checkpointing=recompute) for kind in (True, False))
    untied.load_state_dict(tied.state_dict() | {HEAD: tied.state_dict()[TABLE]})
    assert torch.equal(tied(IDS[:, :-1]), untied(IDS[:, :-1]))
    expected, found = gradients(tied), gradients(untied)
    assert found.keys() - expected.keys() == {HEAD}
    assert rel(found[TABLE] + found[HEAD], expected[TABLE]) < 1e-12
    for name in expected.keys() - {TABLE}:
        assert rel(found[name], expected[name]) < 1e-12, name
    assert rel(found[TABLE], expected[TABLE]) > 1e-2, "control: each is only a part"


def test_it_equals_a_plain_head() -> None:
    """Against plain torch, which shares nothing with ours: logits and every gradient, in float64."""
    model = build(tied=False)
    with torch.no_grad():
        model.head.weight.mul_(3)
    config, state = to_published(model)
    plain = BaselineHyenaDNA(config).double()
    plain.lm_head.weight = nn.Parameter(torch.empty_like(plain.lm_head.weight))
    plain.load_state_dict(state, strict=False)
    assert rel(model(IDS[:, :-1]), plain(IDS[:, :-1])) < 1e-12
    found, expected = gradients(model), gradients(plain)
    assert rel(found[HEAD], expected["lm_head.weight"]) < 1e-10
    assert rel(found[TABLE], expected["backbone.embeddings.word_embeddings.weight"]) < 1e-10
    plain.lm_head.weight = plain.backbone.embeddings.word_embeddings.weight
    assert rel(model(IDS[:, :-1]), plain(IDS[:, :-1])) > 0.1, "control: the head is not the table"


def test_tables_and_formulas_know_it() -> None:
    tied, untied = build(tied=True), build(tied=False)
    assert untied.placement()[HEAD] == untied.placement()[TABLE]
    assert untied.placement().keys() - tied.placement().keys() == {HEAD}
    decayed, _ = parameter_groups(untied.named_parameters(), untied.placement(), 0.1)
    assert any(parameter is untied.head.weight for parameter in decayed["params"])
    for model, section in ((tied, SECTION), (untied, replace(SECTION, tie_embeddings=False))):
        assert parameters(section) == sum(parameter.numel() for parameter in model.parameters())
    assert training_flops(SECTION, 40) == training_flops(replace(SECTION, tie_embeddings=False), 40)


def test_its_initial_values_are_those_of_an_embedding() -> None:
    wide = replace(SECTION, hidden_size=256, tie_embeddings=False)
    head, again, other = (HyenaModel(hyena_config(wide), seed=seed).head.weight for seed in (1, 1, 2))
    assert head.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(head, again)
    assert not torch.equal(head, other)
    model = HyenaModel(hyena_config(wide), seed=1)
    assert not torch.equal(model.head.weight, model.embedding.word_embeddings.weight)
    rest = HyenaModel(hyena_config(replace(wide, tie_embeddings=True)), seed=1).state_dict()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in rest.items())


def test_what_was_saved_before_the_key_is_tied() -> None:
    old = {"model.hidden_size": 16}
    assert differences(old, old | {"model.tie_embeddings": True}) == []
    assert differences(old, old | {"model.tie_embeddings": False}) == ["model.tie_embeddings: saved true, now false"]
