"""Heads: a head of another task, of the tests alone, is an entry that is given to the model, whose table of weights and
initial values it is in; files of language models refuse it."""

import copy
from pathlib import Path

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from hyena_dist.config.errors import UserError
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.convert import to_published, write_model
from hyena_dist.model.config import HyenaConfig
from hyena_dist.model.heads import HeadKind
from hyena_dist.model.model import HyenaModel, build_model
from hyena_dist.model.placement import ZERO, Normal, Placement
from hyena_dist.ops.norm import NormWeights, layer_norm
from hyena_dist.parallel.groups import Groups
from hyena_dist.train.optimizer import parameter_groups

SECTION = ModelSection(num_layers=2, hidden_size=16, max_seq_len=32, filter_order=8, embed_dropout=0.0)
CLASSES = 3


class Classes(nn.Module):
    """[L, B, D] -> [B, 3], of the mean over all tokens."""

    def __init__(self, config: HyenaConfig, _pg_collection: ProcessGroupCollection | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(CLASSES, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(CLASSES))

    def forward(self, x: Tensor, norm: NormWeights, _embedding: Tensor) -> Tensor:
        return nn.functional.linear(layer_norm(x, norm).mean(0), self.weight, self.bias)


HEAD = HeadKind(Classes, {"weight": Placement(initial=Normal(0.5)),
                          "bias": Placement(weight_decay=False, initial=ZERO)})


def model(head: HeadKind | None = HEAD) -> HyenaModel:
    return build_model(Config(model=SECTION), Groups.single(), head=head)


def windows(rows: int = 6) -> Tensor:
    return torch.randint(7, 11, (rows, 32), generator=torch.Generator().manual_seed(0))


def test_it_is_in_the_model_s_table_with_its_initial_values() -> None:
    found, plain = model(), model(None)
    table = found.placement()
    assert table.keys() == {name for name, _ in found.named_parameters()}
    assert table.keys() - plain.placement().keys() == {"head.weight", "head.bias"}
    assert not table["head.bias"].weight_decay
    assert 0.3 < found.head.weight.std() < 0.7
    assert torch.equal(found.head.bias, torch.zeros(CLASSES))
    backbone = dict(found.named_parameters())
    assert all(torch.equal(backbone[name], weight) for name, weight in plain.named_parameters())
    again = copy.deepcopy(found)
    with torch.no_grad():
        again.head.weight.zero_()
    again.reset_parameters()
    assert torch.equal(again.head.weight, found.head.weight)
    with pytest.raises(ValueError, match="parameter head.weight must match one entry"):
        model(HeadKind(Classes))


def test_it_trains() -> None:
    """Alone, because then the loss is convex, and each small step lowers it; the backbone has its gradients too."""
    found, labels = model(), torch.arange(6) % CLASSES
    own = [(name, weight) for name, weight in found.named_parameters() if name.startswith("head.")]
    optimizer = torch.optim.SGD(parameter_groups(own, found.placement(), 0.1), lr=0.1)
    losses = []
    for _ in range(5):
        output = found(windows())
        assert output.shape == (6, CLASSES)
        loss = nn.functional.cross_entropy(output, labels)
        losses.append(loss.item())
        loss.backward()
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in found.parameters())
        optimizer.step()
        found.zero_grad()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert found(windows(6)[:0]).shape == (0, CLASSES)


def test_it_sees_what_the_final_norm_gives() -> None:
    found = model().eval()
    hidden = found.hidden_states(windows()).mean(0)
    assert torch.allclose(found(windows()), hidden @ found.head.weight.T + found.head.bias, atol=1e-5)


def test_files_of_language_models_refuse_it(tmp_path: Path) -> None:
    for layout in ("safetensors", "published", "huggingface", "checkpoint"):
        with pytest.raises(UserError, match="^the model's head is of another task, and these files hold language"):
            write_model(tmp_path / layout, layout, SECTION, model())
        assert not (tmp_path / layout).exists()
    with pytest.raises(UserError, match="head is of another task"):
        to_published(model())
    write_model(tmp_path / "control", "safetensors", SECTION, model(None))
