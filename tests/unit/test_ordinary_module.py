"""In a loop of one's own the model is an ordinary module: dropout, copies, pickles, empty batches, initial values."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hyena_dist.config.sections.model import ModelSection
from hyena_dist.model.block import Block, mixer_spec
from hyena_dist.model.config import hyena_config
from hyena_dist.model.layers import MLP, Embedding
from hyena_dist.model.loss import token_loss
from hyena_dist.model.mixer import HyenaMixer
from hyena_dist.model.model import HyenaModel
from hyena_dist.ops.dropout import DropoutKey

IDS = torch.randint(7, 11, (3, 41), generator=torch.Generator().manual_seed(0))
KEY = DropoutKey(1, 2, torch.arange(3))


def build(*, recompute: str = "none", **changes: Any) -> HyenaModel:
    section = {"num_layers": 2, "hidden_size": 16, "max_seq_len": 40, "filter_order": 8, "embed_dropout": 0.2,
               "resid_dropout": 0.1, "layer_pattern": "HA", "num_attention_heads": 2, "tie_embeddings": False}
    return HyenaModel(hyena_config(ModelSection(**{**section, **changes}), activation_checkpointing=recompute))


def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS[:, :-1])


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    total, count = token_loss(logits(model), IDS[:, 1:])
    (total / count).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_dropout_without_a_key_is_drawn_from_torch_s_generator() -> None:
    model = build()
    torch.manual_seed(5)
    first, second = logits(model), logits(model)
    torch.manual_seed(5)
    assert torch.equal(logits(model), first)
    assert not torch.equal(first, second), "each pass draws"
    before = torch.get_rng_state()
    for quiet in (model.eval(), build(embed_dropout=0.0, resid_dropout=0.0)):
        assert torch.equal(logits(quiet), logits(quiet))
    model.train()(IDS[:, :-1], KEY)
    assert torch.equal(torch.get_rng_state(), before), "nothing is drawn where nothing is needed"


def test_rows_of_a_batch_are_dropped_apart_and_as_often_as_they_should() -> None:
    model = build(num_layers=1, layer_pattern="", resid_dropout=0.0, hidden_size=256, embed_dropout=0.25)
    seen: list[torch.Tensor] = []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.manual_seed(0)
    model(torch.full((2, 40), 7))
    dropped = seen[0] == 0
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert not torch.equal(dropped[:, 0], dropped[:, 1])


@pytest.mark.parametrize("recompute", ["block", "full"])
def test_recomputation_drops_the_same(recompute: str) -> None:
    plain, again = build(), build(recompute=recompute)
    torch.manual_seed(1)
    expected = gradients(plain)
    torch.manual_seed(1)
    found = gradients(again)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    again.zero_grad()
    assert not all(torch.equal(value, expected[name]) for name, value in gradients(again).items()), "control"


def test_a_block_alone_drops_in_training_only() -> None:
    config = build().config
    block, x = Block(config, mixer_spec("H"), 1), torch.randn(40, 3, 16)
    torch.manual_seed(2)
    first = block(x)
    torch.manual_seed(2)
    assert torch.equal(block(x), first)
    assert not torch.equal(block(x), first)
    quiet = block.eval()(x)
    assert torch.equal(quiet, block(x, KEY)), "in eval mode not with a key either"
    assert not torch.equal(quiet, first), "control"


def _saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), _saved],
                         ids=["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_a_model_of_its_own(copied: Callable[[nn.Module], nn.Module], used: bool) -> None:
    model = build().eval()
    if used:
        gradients(model)
    again = copied(model)
    assert torch.equal(logits(again), logits(model))
    assert gradients(again).keys() == gradients(model).keys()
    with torch.no_grad():
        again.head.weight.add_(1)
    assert not torch.equal(logits(again), logits(model)), "control: it shares no weight"
    model.load_state_dict(again.state_dict())
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind", [HyenaMixer, MLP, Embedding])
def test_so_is_one_of_a_part(kind: type[nn.Module]) -> None:
    part = HyenaMixer(build().config, 1) if kind is HyenaMixer else kind(build().config)
    for again in (copy.deepcopy(part), _saved(part)):
        assert all(torch.equal(value, part.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("tied", [False, True])
def test_an_empty_batch(tied: bool, recompute: str) -> None:
    model = build(tie_embeddings=tied, recompute=recompute)
    before = torch.get_rng_state()
    empty = model(IDS[:0, :-1])
    assert empty.shape == (0, 40, 16)
    assert model.hidden_states(IDS[:0, :-1]).shape == (40, 0, 16)
    total, count = token_loss(empty, IDS[:0, 1:])
    assert (total.item(), count.item()) == (0.0, 0)
    total.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    assert model.eval()(IDS[:0, :-1], KEY).shape == (0, 40, 16)
    with pytest.raises(ValueError, match=r"L at least 1, got int64 \[3, 0\]"):
        model(IDS[:, :0])
    with pytest.raises(ValueError, match="at most max_seq_len"):
        model(torch.zeros(0, 50, dtype=torch.int64))


def test_reset_parameters_gives_the_initial_values() -> None:
    model = HyenaModel(build().config, seed=3)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.reset_parameters()
    assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())
    with torch.device("meta"):
        empty = HyenaModel(build().config, seed=3)
    assert all(parameter.is_meta for parameter in empty.parameters())
    for module in empty.to_empty(device="cpu").modules():  # as FSDP's users write it
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(torch.equal(value, first[name]) for name, value in empty.state_dict().items())
