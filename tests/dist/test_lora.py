"""Low-rank adapters: training begins at the pretrained model, changes adapters and head alone under every engine, and
is the same over tensor and context ranks; merged into the weights they are the same function."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from hyena_dist.checkpoint.directory import choose_checkpoint
from hyena_dist.checkpoint.format import load_model_weights, split_parts
from hyena_dist.config.errors import UserError
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.convert.directory import read_model, write_model
from hyena_dist.convert.start import read_start
from hyena_dist.model.lora import add_adapters, merge_adapters
from hyena_dist.model.model import HyenaModel, build_model
from hyena_dist.model.placement import tensor_share
from hyena_dist.model.pooled import PooledModel
from hyena_dist.parallel.groups import Groups, init_groups
from tests.compare import rel
from tests.dist.harness import run_distributed
from tests.dist.test_finetuning import config_of, rows, run, table, tensors
from tests.dist.test_pooled import EXACT, LENGTHS, SECTION, SEEN, answered, pooled, sequences

ATTENTION = replace(SECTION, layer_pattern="HA", num_attention_heads=4)
LORA: dict[str, Any] = {"from_": "somewhere", "trained": "lora", "lora_rank": 2}
BROKEN = "the whole factors' gradients are not summed over the tensor ranks"


def adapted(groups: Groups, section: ModelSection, *, sequence: bool = False) -> PooledModel:
    """In float64, with factors B that are not 0."""
    with patch("tests.dist.test_pooled.SECTION", section):
        model = pooled(groups, "mean", sequence=sequence)
    add_adapters(model.backbone, rank=2, alpha=4, targets=(), seed=3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(".lora.b"):
                entry = model.placement()[name]
                shape = [size * (groups.tensor.size if dim == entry.tp_dim else 1)
                         for dim, size in enumerate(weight.shape)]
                drawn = torch.randn(shape, generator=torch.Generator().manual_seed(len(name)), dtype=weight.dtype)
                weight.copy_(tensor_share(drawn, entry, groups.tensor.rank, groups.tensor.size))
    return model.double()


@contextmanager
def broken() -> Iterator[None]:
    with patch("hyena_dist.model.lora.whole", lambda weight, _: weight):
        yield


def _ranks(tensor: int, context: int, kinds: list[tuple[ModelSection, bool]]) -> list[Any]:
    groups, found = init_groups(tensor=tensor, context=context), []
    for section, sequence in kinds:
        for fault in (False, True):
            model = adapted(groups, section, sequence=sequence)
            with broken() if fault else nullcontext():
                answers, gradients = answered(model, groups)
            whole = adapted(Groups.single(), section)
            whole_answers, whole_gradients = answered(whole, Groups.single())
            entries = model.placement()
            found.append((fault, rel(answers, whole_answers), {
                name: rel(gradients[name], tensor_share(gradient, entries[name], groups.tensor.rank, tensor))
                for name, gradient in whole_gradients.items() if ".lora." in name or name.startswith("head.")}))
    return found


def _check(tensor: int, context: int, kinds: list[tuple[ModelSection, bool]]) -> None:
    for of_rank in run_distributed(partial(_ranks, tensor, context, kinds), tensor * context):
        assert len(of_rank) == 2 * len(kinds)
        for fault, answers, gradients in of_rank:
            assert answers < EXACT
            assert len(gradients) == 2 * 4 * 2 + 2
            if fault:
                assert max(gradients.values()) > SEEN, "the control: " + BROKEN
            else:
                assert max(gradients.values()) < EXACT, max(gradients, key=gradients.__getitem__)


def test_gradients_over_tensor_ranks_are_those_of_one() -> None:
    _check(2, 1, [(SECTION, True)])


@pytest.mark.slow
def test_gradients_over_tensor_and_context_ranks_are_those_of_one() -> None:
    _check(2, 2, [(section, sequence) for section in (SECTION, ATTENTION) for sequence in (False, True)])


def test_training_begins_at_the_pretrained_model() -> None:
    model = pooled(Groups.single(), "mean").eval()
    lengths = torch.tensor(LENGTHS)
    with torch.no_grad():
        before = model(sequences(), lengths)
        add_adapters(model.backbone.double(), rank=2, alpha=4, targets=(), seed=3)
        assert torch.equal(model.double()(sequences(), lengths), before)
        assert rel(adapted(Groups.single(), SECTION).eval()(sequences(), lengths), before) > SEEN, "the control"


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("section", [SECTION, ATTENTION])
def test_merged_adapters_are_the_same_function(section: ModelSection, dtype: torch.dtype, most: float) -> None:
    model = adapted(Groups.single(), section).to(dtype).eval()
    lengths = torch.tensor(LENGTHS)
    with torch.no_grad():
        unmerged = model(sequences(), lengths)
        merge_adapters(model.backbone)
        assert rel(model(sequences(), lengths), unmerged) < most
        dropped = adapted(Groups.single(), section).to(dtype).eval()
        for product in dropped.modules():
            if getattr(product, "lora", None) is not None:
                product.lora = None
        assert rel(dropped(sequences(), lengths), unmerged) > SEEN, "the control: adapters that are left out are seen"
    assert not any(".lora." in name for name, _ in model.named_parameters())
    assert model.placement().keys() == {name for name, _ in model.named_parameters()}


def test_targets() -> None:
    def names(section: ModelSection, *targets: str) -> set[str]:
        with patch("tests.dist.test_pooled.SECTION", section):
            model = pooled(Groups.single(), "mean")
        add_adapters(model.backbone, rank=2, alpha=4, targets=targets, seed=3)
        found = {name for name, weight in model.backbone.named_parameters() if weight.requires_grad}
        assert all(name.endswith((".lora.a", ".lora.b")) for name in found)
        return {name.split(".")[-3] for name in found}

    assert names(SECTION) == {"in_proj", "out_proj", "fc1", "fc2"}
    assert names(ATTENTION) == {"in_proj", "qkv_proj", "out_proj", "fc1", "fc2"}
    assert names(SECTION, "in_proj", "fc2") == {"in_proj", "fc2"}
    with pytest.raises(UserError, match="no layer of this model has a product 'qkv_proj': there are fc1, fc2, in_proj"):
        names(SECTION, "qkv_proj")
    with pytest.raises(UserError, match="lora_rank=17 is more than layers.0.mixer.in_proj has, 16 of its 48 x 16"):
        add_adapters(pooled(Groups.single(), "mean").backbone, rank=17, alpha=4, targets=(), seed=3)


def pretrained(directory: Path) -> HyenaModel:
    config = config_of(directory, "pretrained", 1)
    return build_model(replace(config, train=replace(config.train, seed=9)), Groups.single())


def _engines(directory: Path) -> None:
    weights = dict(pretrained(directory).named_parameters())
    for engine in (3, "fsdp"):
        assert run(config_of(directory, f"whole-{engine}", engine, **LORA), weights=weights) is None
        assert run(config_of(directory, f"cut-{engine}", engine, **LORA), stop_at=7, weights=weights) is not None
        assert run(config_of(directory, f"cut-{engine}", engine, **LORA), weights=weights) is None
    assert run(config_of(directory, "tensor", 1, tensor=2, **LORA), weights=weights) is None


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lora")
    table(directory / "table")
    run_distributed(_engines, 2, directory)
    return directory


@pytest.mark.parametrize("name", ["whole-3", "whole-fsdp", "tensor"])
def test_nothing_but_adapters_and_head_is_changed(runs: Path, name: str) -> None:
    model, saved = pretrained(runs), tensors(runs / name)
    before = {f"model/backbone.{name}{suffix}": part for name, weight in model.named_parameters()
              for suffix, part in split_parts(weight.detach(), model.placement()[name]).items()}
    assert len(before) > 20
    for key, weight in before.items():
        assert saved[key].numpy().tobytes() == weight.numpy().tobytes(), key
    learnt = {key for key in saved if key.startswith("model/")} - before.keys()
    assert all(".lora." in key or key.startswith("model/head.") for key in learnt)
    assert all(saved[key].abs().max() > 0 for key in learnt if ".lora.b" in key), "the control: adapters are learnt"
    moments = {key.split("/", 2)[2] for key in saved if key.startswith("optim/")}
    assert moments == {key.removeprefix("model/") for key in learnt}


@pytest.mark.parametrize("engine", [3, "fsdp"])
def test_a_run_that_was_stopped_is_bit_for_bit_the_whole_one(runs: Path, engine: int | str) -> None:
    whole, cut = (tensors(runs / f"{name}-{engine}") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert len((runs / f"cut-{engine}/seed-0/history.jsonl").read_text("utf-8").splitlines()) == 2


def test_engines_and_tensor_ranks_learn_alike(runs: Path) -> None:
    one, *others = ([row.loss for row in rows(runs / name)] for name in ("whole-3", "whole-fsdp", "tensor"))
    assert one[-1] < one[0], "the control: it learns"
    for other in others:  # Adam magnifies the rounding of small gradients, step by step
        assert other[:6] == pytest.approx(one[:6], rel=2e-5)
        assert other == pytest.approx(one, rel=1e-3)


def test_a_run_is_read_with_its_adapters_merged(runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = choose_checkpoint(runs / "whole-3" / "seed-0", "latest")
    tuned = PooledModel(pretrained(runs), outputs=2, pooling="mean", seed=0)
    before = copy.deepcopy(tuned.backbone)
    add_adapters(tuned.backbone, rank=2, alpha=16, targets=(), seed=3)
    load_model_weights(checkpoint, tuned, tuned.placement())
    section, merged, _ = read_model(runs / "whole-3" / "seed-0")
    assert "head.bias, head.weight is of its task, and is left out" in caplog.text
    write_model(tmp_path / "exported", "huggingface", section, merged)
    _, again, _ = read_model(tmp_path / "exported")
    _, start, _ = read_start(runs / "whole-3" / "seed-0")
    of_head = start.keys() - {name for name, _ in merged.named_parameters()}
    assert of_head == {"answers.head.weight", "answers.head.bias"}
    ids = sequences()
    with torch.no_grad():
        wanted, found, exported, without = (model.eval().hidden_states(ids) for model in (
            tuned.backbone, merged, again, before))
    assert rel(found, wanted) < 1e-6
    assert rel(exported, wanted) < 1e-6
    assert rel(without, wanted) > SEEN, "the control: adapters that are left out are seen"


def test_a_run_that_has_no_backbone_is_refused(runs: Path) -> None:
    checkpoint = choose_checkpoint(runs / "whole-3" / "seed-0", "latest")
    with (patch("hyena_dist.convert.finetuned.weight_shapes", lambda _: {"model/head.bias": torch.Size([2])}),
          pytest.raises(UserError, match="there is no HyenaDNA model in it")):
        read_model(checkpoint.path)
