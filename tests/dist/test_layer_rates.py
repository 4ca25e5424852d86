"""Layer-wise learning rates: under every engine, over data and tensor ranks, each weight moves by its own rate."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hyena_dist.checkpoint.format import load_checkpoint, save_checkpoint, split_parts, take_snapshot
from hyena_dist.model.depth import scaled_by_depth
from hyena_dist.model.loss import token_loss
from hyena_dist.model.placement import Placement
from hyena_dist.ops.dropout import DropoutKey
from hyena_dist.parallel.groups import Axis, Groups
from hyena_dist.train.build_engine import build_engine
from hyena_dist.train.optimizer import parameter_groups
from tests.compare import rel
from tests.dist.harness import run_distributed
from tests.dist.test_engine_model import (
    OPTIM,
    STEPS,
    TOLERANCE,
    TOPOLOGIES,
    WINDOWS,
    build_model,
    difference,
    groups_of,
    run_config,
    train,
    windows_of,
)
from tests.dist.toy import Record, learning_rate_of

DECAY = 0.5
CASES = [(0, "data"), (1, "tensor"), (2, "data"), (3, "data"), ("fsdp", "data"), ("fsdp", "tensor")]


def rate_of(name: str) -> float:
    """What the learning rate of a weight of a model of two layers is of the run's, written down once more."""
    for start, depth in (("layers.1.", 1), ("layers.0.", 2), ("embedding.", 3)):
        if name.startswith(start):
            return DECAY**depth
    return 1.0


def train_plain(decay: bool = True) -> tuple[list[Record], dict[str, torch.Tensor], dict[str, Placement]]:
    """One process and torch alone, each weight in a group of its own."""
    model = build_model(run_config(0, TOPOLOGIES["alone"]), Groups.single())
    table, names, groups = model.placement(), [], []
    for name, weight in model.named_parameters():
        names.append(name)
        groups.append({"params": [weight], "weight_decay": OPTIM.weight_decay if table[name].weight_decay else 0.0})
    optimizer, records = torch.optim.AdamW(groups, betas=OPTIM.betas, eps=OPTIM.eps), []
    for step in STEPS:
        for name, group in zip(names, optimizer.param_groups, strict=True):
            group["lr"] = learning_rate_of(step) * (rate_of(name) if decay else 1.0)
        window = windows_of(step)
        total, count = token_loss(model(window[:, :-1], DropoutKey(0, step, torch.arange(WINDOWS))), window[:, 1:])
        (total / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        records.append(Record(float(total.detach() / count), float(norm)))
    return records, {name: weight.detach() for name, weight in model.named_parameters()}, table


def _on_each_rank(directory: str) -> dict[object, object]:
    found: dict[object, object] = {}
    for engine_name, topology in CASES:
        groups = groups_of(topology)
        config = run_config(engine_name, TOPOLOGIES[topology])
        model = build_model(config, groups)
        table = scaled_by_depth(model.placement(), 2, DECAY)
        engine = build_engine(config, model, table, groups)
        records = train(model, engine, groups, STEPS[:1])
        path = Path(directory, f"{engine_name}-{topology}")
        save_checkpoint(path / "step-00000001", engine, table, groups, {})
        model = build_model(config, groups)
        engine = build_engine(config, model, table, groups)
        load_checkpoint(path / "step-00000001", engine, table, groups)
        records += train(model, engine, groups, STEPS[1:])
        snapshot = take_snapshot(engine, table, replace(groups, world=Axis()), {})
        found[engine_name, topology] = records, snapshot.tensors
    return found


def test_each_weight_moves_by_its_rate_also_after_a_resume(tmp_path: Path) -> None:
    records, weights, table = train_plain()
    even = train_plain(decay=False)
    assert difference(even[0], records) > 100 * TOLERANCE, "the control: rates are seen"
    ranks = run_distributed(_on_each_rank, 2, str(tmp_path))
    for case in CASES:
        for rank in ranks:
            found, saved = rank[case]
            assert difference(found, records) < TOLERANCE, case
            for name, weight in weights.items():
                for suffix, part in split_parts(weight, table[name]).items():
                    assert rel(saved[f"model/{name}{suffix}"], part) < 10 * TOLERANCE, (case, name)
        for name, weight in weights.items():
            if name.startswith("layers.0.mixer.in_proj.weight"):
                assert rel(weight, even[1][name]) > 1e-3, "the control"


def test_groups_are_exact() -> None:
    model = build_model(run_config(0, TOPOLOGIES["alone"]), Groups.single())
    table = scaled_by_depth(model.placement(), 2, DECAY)
    groups = parameter_groups(model.named_parameters(), table, 0.1)
    names = {id(weight): name for name, weight in model.named_parameters()}
    seen = [names[id(weight)] for group in groups for weight in group["params"]]
    assert sorted(seen) == sorted(names.values())
    for group in groups:
        for weight in group["params"]:
            name = names[id(weight)]
            assert group.get("lr_scale", 1.0) == rate_of(name)
            assert group["weight_decay"] == (0.1 if table[name].weight_decay else 0.0)
    assert len(groups) == 6  # head and final norm; two layers, each with a filter without decay; the embedding
    plain = parameter_groups(model.named_parameters(), scaled_by_depth(model.placement(), 2, 1.0), 0.1)
    assert [set(group) for group in plain] == [{"params", "weight_decay"}] * 2


@pytest.mark.parametrize(("name", "depth"), [
    ("head.weight", 0), ("backbone.final_norm.bias", 0), ("backbone.layers.3.mlp.fc1.weight", 1),
    ("backbone.layers.0.mixer.in_proj.lora.a", 4), ("backbone.embedding.word_embeddings.weight", 5),
    ("layers.2.mixer.filter.freq", 2), ("backbone.embedding.prompt.vectors", 0)])
def test_depths(name: str, depth: int) -> None:
    assert scaled_by_depth({name: Placement()}, 4, 0.5)[name].lr_scale == 0.5**depth
