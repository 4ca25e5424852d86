"""Parts of the model in one's own module: values from the start, inputs and labels that are refused."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hyena_dist.config.schema import Config
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.model import layers
from hyena_dist.model.attention import AttentionMixer
from hyena_dist.model.block import Block, mixer_spec
from hyena_dist.model.config import HyenaConfig, hyena_config
from hyena_dist.model.layers import MLP, Embedding
from hyena_dist.model.loss import token_loss
from hyena_dist.model.mixer import HyenaMixer
from hyena_dist.model.model import HyenaModel, build_model
from hyena_dist.parallel.groups import Axis, Groups
from tests.compare import rel

SECTION = ModelSection(num_layers=2, hidden_size=16, filter_order=8, max_seq_len=32, layer_pattern="HA",
                       num_attention_heads=2)


def config() -> HyenaConfig:
    return hyena_config(SECTION)


PARTS = {
    "layers.0.mixer.": lambda seed: HyenaMixer(config(), 1, seed=seed),
    "layers.1.mixer.": lambda seed: AttentionMixer(config(), 2, seed=seed),
    "layers.1.mlp.": lambda seed: MLP(config(), layer_number=2, seed=seed),
    "layers.0.": lambda seed: Block(config(), mixer_spec("H"), 1, seed=seed),
    "embedding.": lambda seed: Embedding(config(), seed=seed),
    "": lambda seed: HyenaModel(config(), seed=seed),
}


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is not initialised is not zero by chance."""
    empty = torch.empty

    def nan(*size: Any, **options: Any) -> torch.Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", nan)


@pytest.mark.parametrize("prefix", PARTS)
@pytest.mark.usefixtures("poisoned")
def test_a_part_alone_has_the_values_of_the_whole_model(prefix: str) -> None:
    whole = dict(HyenaModel(config(), seed=3).named_parameters())
    part = dict(PARTS[prefix](3).named_parameters())
    assert part
    assert all(torch.equal(parameter, whole[prefix + name]) for name, parameter in part.items())
    other = dict(PARTS[prefix](4).named_parameters())
    assert any(not torch.equal(parameter, other[name]) for name, parameter in part.items()), "control: another seed"


@pytest.mark.usefixtures("poisoned")
def test_without_a_seed_the_values_are_left_to_the_model_around() -> None:
    """The control of the test above: the memory is not initialised by anything else."""
    assert any(parameter.isnan().any() for parameter in HyenaMixer(config(), 1, seed=None).parameters())
    model = build_model(Config(model=SECTION), Groups.single())
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_without_memory_there_are_no_values() -> None:
    with torch.device("meta"):
        assert HyenaModel(config()).final_norm.weight.is_meta


@pytest.mark.parametrize("mixer", [HyenaMixer(config(), 1), AttentionMixer(config(), 2)])
def test_the_shape_of_a_mixer_s_input(mixer: nn.Module) -> None:
    assert mixer(torch.randn(32, 2, 16))[0].shape == (32, 2, 16)
    for shape, message in (((33, 2, 16), r"takes \[L, B, D\] = \[tokens, batch, 16\], got \[33, 2, 16\], which is 33 "
                                         r"tokens: max_seq_len is 32; transpose an input of \[B, L, D\]"),
                           ((32, 2, 8), r"got \[32, 2, 8\]: transpose it"),
                           ((2, 16, 32), r"got \[2, 16, 32\]: transpose it"),
                           ((32, 16), r"got \[32, 16\]: transpose it")):
        with pytest.raises(ValueError, match=message):
            mixer(torch.randn(shape))


@pytest.mark.parametrize("mixer", [HyenaMixer(config(), 1), AttentionMixer(config(), 2)])
def test_a_mixer_s_input_without_tokens_or_of_whole_numbers(mixer: nn.Module) -> None:
    for shape in ((0, 2, 16), (3, 0, 16), (0, 0, 16)):
        with pytest.raises(ValueError, match=rf"got {re.escape(str(list(shape)))}, which has no token: leave out"):
            mixer(torch.randn(shape))
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=rf"got \[3, 2, 16\] of {str(dtype)[6:]}: convert it to a floating-point"):
            mixer(torch.ones(3, 2, 16, dtype=dtype))
    assert mixer(torch.ones(1, 1, 16))[0].shape == (1, 1, 16), "control"


@pytest.mark.parametrize("ids", [
    torch.full((5,), 7), torch.tensor(7), torch.full((2, 0), 7), torch.full((0, 0), 7), torch.full((2, 3, 4), 7),
    torch.full((2, 5), 7.0), torch.full((2, 5), True)])
def test_what_a_model_takes_for_token_ids(ids: torch.Tensor) -> None:
    model = HyenaModel(config()).eval()
    kind = str(ids.dtype).removeprefix("torch.")
    for call in (model, model.hidden_states):
        with pytest.raises(ValueError, match=rf"token ids of \[B, L\].*got {kind} {re.escape(str(list(ids.shape)))}"):
            call(ids)
    good = torch.full((2, 5), 7)
    assert torch.equal(model(good.int()), model(good)), "control"


@pytest.mark.parametrize("build", [lambda n: HyenaMixer(config(), n), lambda n: AttentionMixer(config(), n),
                                   lambda n: HyenaMixer(config(), n, seed=None),
                                   lambda n: MLP(config(), layer_number=n),
                                   lambda n: Block(config(), mixer_spec("H"), n)])
def test_layers_are_counted_from_one(build: Callable[[Any], nn.Module]) -> None:
    for number in (0, -1, 1.0, "1"):
        with pytest.raises(ValueError, match=f"layer_number must be a whole number from 1 on, got {number!r}"):
            build(number)
    build(99)


# Labels


def test_a_token_that_is_impossible_costs_nothing_where_it_is_not_scored() -> None:
    """0 times infinity is NaN: what is not scored must not be multiplied away."""
    logits = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[..., :7] = -torch.inf
    targets = torch.full((2, 5), 9)
    targets[0, 1] = targets[1, 4] = -100
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, count = token_loss(ours, targets)
    expected = F.cross_entropy(theirs.flatten(0, 1), targets.flatten(), reduction="sum")
    loss.backward()
    expected.backward()
    assert count == 8
    assert loss.isfinite()
    assert rel(loss, expected) < 1e-12
    assert rel(ours.grad, theirs.grad) < 1e-12
    assert not ours.grad[0, 1].any()
    targets[0, 1] = 3
    assert token_loss(logits, targets)[0] == torch.inf, "control: where it is scored"


@pytest.mark.parametrize("label", [-1, -99, 16, 99, 2**40])
def test_a_label_outside_the_vocabulary_is_an_error(label: int) -> None:
    logits, targets = torch.randn(2, 5, 16), torch.full((2, 5), 7)
    targets[1, 3] = label
    with pytest.raises(ValueError, match=rf"targets\[1, 3\] is {label}, which is outside the vocabulary of 0 to 15"):
        token_loss(logits, targets)
    targets[1, 3] = -100
    assert token_loss(logits, targets)[1] == 9, "control: the index that is not scored"
    targets[1, 3] = 15
    assert token_loss(logits, targets)[1] == 10
    assert token_loss(logits, torch.full((2, 5), label), ignore_index=label)[1] == 0


@pytest.mark.parametrize("targets", [torch.full((2, 4), 7), torch.full((2, 1), 7), torch.full((2, 5), 7.0),
                                     torch.full((2, 5), 7, dtype=torch.int32), torch.full((5,), 7)])
def test_targets_of_another_shape_or_type(targets: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"targets must be int64 of shape \[2, 5\], one for each of the logits"):
        token_loss(torch.randn(2, 5, 16), targets)


@pytest.mark.parametrize("token", [-1, 16, 99])
def test_a_token_outside_the_vocabulary_is_an_error(monkeypatch: pytest.MonkeyPatch, token: int) -> None:
    ids = torch.full((2, 5), 7)
    ids[1, 3] = token
    with pytest.raises(ValueError, match=rf"input_ids\[1, 3\] is {token}, which is outside the vocabulary of 0 to 15"):
        HyenaModel(config()).eval()(ids)
    embedding = Embedding(config())
    embedding.axis = Axis(None, 0, 2)  # half of the rows, as on the first of two tensor ranks
    embedding.word_embeddings.weight = nn.Parameter(embedding.word_embeddings.weight[:8].detach())
    monkeypatch.setattr(layers, "refuse_outside", lambda *_: None)
    monkeypatch.setattr(layers, "leave_tensor_region", lambda x, *_: x)
    rows = embedding(ids)
    assert rows[3, 1].isnan().all(), "over several ranks no rank would find it, and the row would be 0"
    assert rows.isnan().any(-1).sum() == 1
