"""The model in somebody else's loop on two ranks: dropout without a key, steps after each micro-batch, empty batches,
weights that are made after they were sharded, copies."""

import copy
import math
import pickle
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch

from hyena_dist.config.schema import Config
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.engine.deepspeed import prepare_deepspeed
from hyena_dist.engine.fsdp import FsdpEngine, apply_fsdp2
from hyena_dist.engine.protocol import Engine
from hyena_dist.model import layers
from hyena_dist.model.loss import token_loss
from hyena_dist.model.model import HyenaModel, build_model
from hyena_dist.parallel.collectives import all_gather
from hyena_dist.parallel.groups import Groups, init_groups
from hyena_dist.parallel.tokens import slice_tokens
from tests.compare import rel
from tests.dist.harness import run_distributed

WINDOWS = torch.randint(7, 11, (4, 41), generator=torch.Generator().manual_seed(0))
ENGINES = (0, 1, 2, 3, "fsdp")
TOLERANCE = 2e-5
LAYOUTS = {"tensor": ParallelSection(tensor=2), "sequence": ParallelSection(tensor=2, sequence=True),
           "context": ParallelSection(context=2)}


def build(groups: Groups, parallel: ParallelSection | None = None, dropout: float = 0.0) -> HyenaModel:
    section = ModelSection(num_layers=2, hidden_size=16, max_seq_len=40, filter_order=8, embed_dropout=dropout,
                           resid_dropout=dropout, tie_embeddings=False)
    return build_model(Config(model=section, parallel=parallel or ParallelSection()), groups)


def engine_of(name: int | str, groups: Groups, accumulate: int) -> Engine:
    model = build(groups)
    if name == "fsdp":
        apply_fsdp2(model, groups)
        return FsdpEngine(model, torch.optim.AdamW(model.parameters()), groups, accumulation_steps=accumulate)
    ds_config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": accumulate,
                 "zero_optimization": {"stage": name}}
    return prepare_deepspeed(model, ds_config, groups, optimizer=torch.optim.AdamW(model.parameters()))


def _dropout(layout: str, *, share: bool = True) -> float:
    """Error of the logits of a split model in training, against one rank with the first rank's generator."""
    parallel = LAYOUTS[layout]
    groups = init_groups(tensor=parallel.tensor, context=parallel.context)
    torch.manual_seed(0)
    expected = build(Groups.single(), dropout=0.2)(WINDOWS[:, :-1])
    torch.manual_seed(groups.world.rank)
    model = build(groups, parallel, dropout=0.2)
    ids = slice_tokens(WINDOWS[:, :-1], groups.context, multiple=model.token_multiple, fill=4)
    with nullcontext() if share else mock.patch.object(layers.dist, "broadcast"):
        logits = model(ids)
    for axis, dim in ((groups.tensor, 2), (groups.context, 1)):
        logits = all_gather(logits.detach(), axis, dim) if axis.size > 1 else logits
    return rel(logits, expected)


def _empty_split(layout: str) -> dict[str, Any]:
    """What an empty batch gives where the sequence or the vocabulary is split: the loss, its count, and whether every
    gradient is there and 0."""
    parallel = LAYOUTS[layout]
    groups = init_groups(tensor=parallel.tensor, context=parallel.context)
    model = build(groups, parallel, dropout=0.2)
    ids = slice_tokens(WINDOWS[:0, :-1], groups.context, multiple=model.token_multiple, fill=4)
    logits = model(ids)
    total, count = token_loss(logits, ids, groups.tensor)
    total.backward()
    zero = all(weight.grad is not None and not weight.grad.any() for weight in model.parameters())
    return {"shape": tuple(logits.shape), "loss": float(total.detach()), "count": int(count), "zero": zero}


def _copies() -> dict[str, Any]:
    split = build(init_groups(tensor=2), LAYOUTS["tensor"]).eval()
    again = copy.deepcopy(split)
    found: dict[str, Any] = {"same": torch.equal(again(WINDOWS[:, :-1]), split(WINDOWS[:, :-1]))}
    try:
        pickle.dumps(split)
    except TypeError as error:
        found["refused"] = str(error)
    whole = build(init_groups()).eval()  # with groups of one rank
    found["pickled"] = torch.equal(pickle.loads(pickle.dumps(whole))(WINDOWS[:, :-1]), whole(WINDOWS[:, :-1]))
    return found


def _stepped(name: int | str, groups: Groups, *, after_each: bool) -> dict[str, Any]:
    """Two steps of two micro-batches, with `step()` after each, or after the last; weights, and what the steps said."""
    engine, said = engine_of(name, groups, accumulate=2), []
    for _ in range(2):
        for window in WINDOWS[groups.data.rank :: 2].split(1):
            total, _ = token_loss(engine.module(window[:, :-1]), window[:, 1:])
            engine.backward(total * groups.data_context.size / WINDOWS[:, 1:].numel())
            if after_each:
                said.append(engine.step(lr=1e-2))
        if not after_each:
            said.append(engine.step(lr=1e-2))
    mistakes = []
    for wrong in (lambda: engine.step(lr=1e-2), lambda: [engine.backward(engine.module(WINDOWS[:1, :-1]).sum())
                                                         for _ in range(3)]):
        try:
            wrong()
        except RuntimeError as error:
            mistakes.append(str(error))
    weights = {key: engine.export_parameter(key)["weight"].clone() for key in engine.parameter_shapes}
    return {"weights": weights, "pending": [result.pending for result in said], "mistakes": mistakes,
            "norms": [float(result.grad_norm) for result in said], "applied": [result.applied for result in said]}


def _empty(name: int | str, groups: Groups) -> float:
    """Error of the gradient norm where the second rank has no window, against one process with the first rank's."""
    engine = engine_of(name, groups, accumulate=1)
    mine = WINDOWS[:2] if groups.data.rank == 0 else WINDOWS[:0]
    total, _ = token_loss(engine.module(mine[:, :-1]), mine[:, 1:])
    engine.backward(total * 2 / 80)
    norm = engine.step(lr=1e-2).grad_norm
    reference = build(Groups.single())
    total, count = token_loss(reference(WINDOWS[:2, :-1]), WINDOWS[:2, 1:])
    (total / count).backward()
    return rel(norm, torch.stack([weight.grad.norm() for weight in reference.parameters()]).norm())


def _made_later(groups: Groups) -> dict[str, float]:
    """Weights that are sharded on the meta device and filled afterwards, against those that are made at once."""
    with torch.device("meta"):
        model = build(groups)
    apply_fsdp2(model, groups)
    model.to_empty(device="cpu")
    model.reset_parameters()
    at_once = dict(build(Groups.single()).named_parameters())
    return {name: float(not torch.equal(weight.full_tensor(), at_once[name]))
            for name, weight in model.named_parameters()}


def _on_each_rank() -> dict[str, Any]:
    found: dict[str, Any] = {f"dropout {layout}": _dropout(layout) for layout in LAYOUTS}
    found |= {f"empty {layout}": _empty_split(layout) for layout in LAYOUTS}
    found["control"] = _dropout("tensor", share=False)
    found["copies"] = _copies()
    groups = init_groups()
    found["made later"] = _made_later(groups)
    for name in ENGINES:
        found[f"each {name}"] = _stepped(name, groups, after_each=True)
        found[f"last {name}"] = _stepped(name, groups, after_each=False)
        found[f"empty {name}"] = _empty(name, groups)
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_distributed(_on_each_rank, 2, timeout=400)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_without_a_key_is_the_same_on_every_rank_of_a_sequence(found: list[dict[str, Any]],
                                                                       layout: str) -> None:
    for rank in found:
        assert rank[f"dropout {layout}"] < TOLERANCE
    assert max(rank["control"] for rank in found) > 1e-2, "control: each rank its own masks"


def test_copies_and_pickles(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["copies"]["same"]
        assert rank["copies"]["pickled"]
        assert "split over 2 ranks cannot be pickled: save the module's state_dict()" in rank["copies"]["refused"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_after_each_micro_batch(found: list[dict[str, Any]], engine: int | str) -> None:
    for rank in found:
        each, last = rank[f"each {engine}"], rank[f"last {engine}"]
        assert each["pending"] == [True, False, True, False]
        assert last["pending"] == [False, False]
        assert each["applied"] == [False, True, False, True]
        assert each["norms"][1::2] == last["norms"]
        assert all(math.isnan(norm) for norm in each["norms"][::2])
        assert all(torch.equal(each["weights"][name], weight) for name, weight in last["weights"].items())
        assert "step() without a backward()" in each["mistakes"][0]
        assert "call step() first" in each["mistakes"][1]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_without_a_window(found: list[dict[str, Any]], engine: int | str) -> None:
    assert max(rank[f"empty {engine}"] for rank in found) < TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_batch_of_a_split_model(found: list[dict[str, Any]], layout: str) -> None:
    shape = (0, 20, 16) if layout == "context" else (0, 40, 8)
    for rank in found:
        assert rank[f"empty {layout}"] == {"shape": shape, "loss": 0.0, "count": 0, "zero": True}


def test_weights_that_are_made_after_they_were_sharded(found: list[dict[str, Any]]) -> None:
    assert not any(error for rank in found for error in rank["made later"].values())
