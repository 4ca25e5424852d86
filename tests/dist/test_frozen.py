"""Frozen weights under DeepSpeed at stages 0 to 3 and FSDP2, against one plain process with the same weights frozen:
what is trained, what stays bit for bit, and what a checkpoint holds."""

import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import get_total_norm

from hyena_dist.checkpoint.format import load_checkpoint, load_model_weights, save_checkpoint
from hyena_dist.checkpoint.reader import CheckpointError, TensorReader
from hyena_dist.engine.deepspeed import prepare_deepspeed
from hyena_dist.engine.fsdp import FsdpEngine, apply_fsdp2
from hyena_dist.engine.protocol import Engine
from hyena_dist.parallel.groups import Groups
from tests.compare import rel
from tests.dist.harness import run_distributed
from tests.dist.toy import TABLE, Record, Toy, data_groups, make_engine, state_of, train, train_plain

ENGINES: tuple[tuple[int | str, str], ...] = (
    (0, "none"), (1, "none"), (2, "none"), (3, "none"), ("fsdp", "none"),
    (2, "optimizer"), (3, "parameters"), ("fsdp", "parameters"))
STEPS = (0, 1, 2)
GATHERED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""Of itself DeepSpeed keeps weights as small as these whole, at stage 3 too."""
FROZEN = {
    "all but the head": ("gates.weight", "gates.bias", "filter", "scale"),
    "a weight in front": ("gates.weight",),
    "a weight behind": ("out.weight",),
    "all but one number": ("gates.weight", "gates.bias", "filter", "out.weight", "out.bias"),
}
PROBE = FROZEN["all but the head"]
CASES = [(stage, offload, what) for stage, offload in ENGINES for what in FROZEN
         if offload == "none" or what == "all but the head"]
# Rounding of float32 sums in another order. One weight that is thawed moves the losses by more than 1e-2.
TOLERANCE = 1e-5


def _of_checkpoints(directory: str, groups: Groups) -> dict[str, Any]:
    """A step in each of five engines; then the last checkpoint where all is trained, and one of all where it is not."""
    found: dict[str, Any] = {"chain": []}
    for step, stage in enumerate((3, "fsdp", 0, 2, 1)):
        engine = make_engine(stage, groups, seed=step, frozen=PROBE)
        if step:
            load_checkpoint(Path(directory, f"step-{step:08d}"), engine, TABLE, groups)
        found["chain"] += train(engine, groups, [step])
        save_checkpoint(Path(directory, f"step-{step + 1:08d}"), engine, TABLE, groups, {})
    found["chain state"] = state_of(engine)
    probed = Path(directory, "step-00000005")
    for stage in (0, 2, 3, "fsdp"):
        engine = make_engine(stage, groups, seed=9)
        before = state_of(engine)
        with pytest.raises(CheckpointError) as refused:
            load_checkpoint(probed, engine, TABLE, groups)
        unchanged = all(torch.equal(torch.as_tensor(value), torch.as_tensor(before[key]))
                        for key, value in state_of(engine).items())
        found[f"refused {stage}"] = str(refused.value), unchanged
        load_checkpoint(probed, engine, TABLE, groups, new_optimizer=True)
        found[f"anew {stage}"] = state_of(engine), train(engine, groups, STEPS), state_of(engine)
        whole = Path(directory, f"whole-{stage}", "step-00000008")
        save_checkpoint(whole, engine, TABLE, groups, {})
        frozen = make_engine(stage, groups, seed=9, frozen=PROBE)
        said = _Said()
        logging.getLogger("hyena_dist.checkpoint.format").addHandler(said)
        load_checkpoint(whole, frozen, TABLE, groups)
        logging.getLogger("hyena_dist.checkpoint.format").removeHandler(said)
        found[f"passed over {stage}"] = said.lines, state_of(frozen)
    return found


class _Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logging.getLogger("hyena_dist.checkpoint.format").setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _refusals(groups: Groups) -> None:
    for stage in (0, 1, 3, "fsdp"):
        for frozen, name, words in ((PROBE, "filter", "trainable"), ((), "filter", "frozen")):
            engine = make_engine(stage, groups, frozen=frozen)
            module = engine.module if stage == "fsdp" else engine.module.module
            loss = engine.module(torch.ones(2, 3)).sum()
            module.get_parameter(name).requires_grad_(words == "trainable")
            with pytest.raises(ValueError, match=f"parameter {name} was made {words} after the engine was built"):
                engine.backward(loss)
    apart = Toy(frozen=["out.bias"] if groups.world.rank else ["scale"])
    for build in (lambda: prepare_deepspeed(apart, {}, groups, optimizer=torch.optim.AdamW(apart.parameters())),
                  lambda: FsdpEngine(apply_fsdp2(apart, groups), torch.optim.AdamW(apart.parameters()), groups)):
        with pytest.raises(ValueError, match="parameter out.bias is frozen on one of the ranks 0 and 1 and trainable"):
            build()
    nothing = Toy(frozen=TABLE)
    optimizer = torch.optim.AdamW(nothing.parameters())
    with pytest.raises(ValueError, match="the model has no trainable parameter"):
        prepare_deepspeed(nothing, {}, groups, optimizer=optimizer)
    sharded = apply_fsdp2(nothing, groups)
    with pytest.raises(ValueError, match="the model has no trainable parameter"):
        FsdpEngine(sharded, torch.optim.AdamW(sharded.parameters()), groups)


def _own_optimizer(stage: int | str, groups: Groups) -> dict[str, Any]:
    """An optimizer that has the frozen weights too, alone in a group, with a gradient and moments of before."""
    model = Toy()
    if stage == "fsdp":
        apply_fsdp2(model, groups)
    gates, others = ([weight for name, weight in model.named_parameters() if name.startswith("gates") == of_gates]
                     for of_gates in (True, False))
    optimizer = torch.optim.AdamW([{"params": gates}, {"params": others}], weight_decay=0.5)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    model.gates.requires_grad_(False)
    for weight in others:
        weight.grad = None
    engine: Engine
    if stage == "fsdp":
        engine = FsdpEngine(model, optimizer, groups)
    else:
        config = {"train_batch_size": 2 * groups.data.size, "train_micro_batch_size_per_gpu": 2,
                  "zero_optimization": {"stage": stage}}
        engine = prepare_deepspeed(model, config, groups, optimizer=optimizer)
    before = state_of(engine)
    engine.backward(engine.module(torch.ones(2, 3)).sum())
    norm = engine.step(0.1).grad_norm
    return {"before": before, "after": state_of(engine), "norm": float(norm)}


def _on_each_rank(directory: str) -> dict[str, Any]:
    groups = data_groups()
    found: dict[str, Any] = {}
    for stage, offload, what in CASES:
        engine = make_engine(stage, groups, frozen=FROZEN[what], offload=offload,
                             deepspeed=GATHERED if stage == 3 else {})
        assert engine.frozen == frozenset(FROZEN[what])
        found[f"{what} {stage} {offload}"] = train(engine, groups, STEPS), state_of(engine)
    for stage, offload in ENGINES:
        engine = make_engine(stage, groups, frozen=PROBE, offload=offload, precision="fp16")
        scaled = train(engine, groups, STEPS[:1])
        before = state_of(engine)
        bad = train(engine, groups, [7], poison=math.inf)
        assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(before[key]))
                   for key, value in state_of(engine).items()), "a skipped step changes nothing"
        found[f"scaled {stage} {offload}"] = scaled[0], bad[0]
    for stage, _ in ENGINES[:5]:
        found[f"own optimizer {stage}"] = _own_optimizer(stage, groups)
    found |= _of_checkpoints(directory, groups)
    _refusals(groups)
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("frozen")


@pytest.fixture(scope="module")
def ranks(directory: Path) -> list[dict[str, Any]]:
    return run_distributed(_on_each_rank, 2, str(directory))


def _error(records: list[Record], state: dict[str, Any], expected: list[Record],
           weights: dict[str, torch.Tensor]) -> float:
    assert all(record.applied for record in records)
    return max(rel([getattr(record, key) for record in records], [getattr(record, key) for record in expected])
               for key in ("loss", "grad_norm")) + max(rel(state[f"{name}/weight"], weight)
                                                       for name, weight in weights.items())


@pytest.mark.parametrize(("stage", "offload", "what"), CASES)
def test_what_is_trained_equals_one_process(ranks: list[dict[str, Any]], stage: int | str, offload: str,
                                            what: str) -> None:
    frozen = FROZEN[what]
    want, thawed = train_plain(STEPS, frozen=frozen), train_plain(STEPS, frozen=frozen[1:])
    for rank in ranks:
        records, state = rank[f"{what} {stage} {offload}"]
        error, control = _error(records, state, *want), _error(records, state, *thawed)
        print(f"{what} frozen: off by {error:.1e}, tolerance {TOLERANCE}; with {frozen[0]} thawed by {control:.1e}")
        assert error < TOLERANCE
        assert control > 1e-2, "control: a weight that is thawed is seen"
        for name, initial in Toy().named_parameters():
            kept = {f"{name}/{field}" in state for field in ("exp_avg", "exp_avg_sq")}
            assert kept == {name not in frozen}, "moments of what is trained, and of no other"
            assert torch.equal(state[f"{name}/weight"], initial) == (name in frozen), "bit for bit, or moved"


@pytest.mark.parametrize(("stage", "offload"), ENGINES)
def test_the_loss_scale_is_out_of_the_norm(ranks: list[dict[str, Any]], stage: int | str, offload: str) -> None:
    want, _ = train_plain(STEPS[:1], frozen=PROBE)
    for rank in ranks:
        good, bad = rank[f"scaled {stage} {offload}"]
        assert good.grad_norm == pytest.approx(want[0].grad_norm, rel=TOLERANCE)
        assert (bad.applied, bad.overflow) == (False, True)


@pytest.mark.parametrize("stage", [stage for stage, _ in ENGINES[:5]])
def test_an_optimizer_of_all_weights_spares_the_frozen_ones(ranks: list[dict[str, Any]], stage: int | str) -> None:
    for rank in ranks:
        before, after = (rank[f"own optimizer {stage}"][when] for when in ("before", "after"))
        for name in TABLE:
            frozen = name.startswith("gates")
            assert torch.equal(after[f"{name}/weight"], before[f"{name}/weight"]) == frozen
            assert (f"{name}/exp_avg" in after) != frozen
        model = Toy()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(before[f"{name}/weight"])
        model(torch.ones(2, 3)).sum().backward()
        norms = [float(get_total_norm([parameter.grad for name, parameter in model.named_parameters()
                                       if parameter.grad is not None and (of_gates or not name.startswith("gates"))]))
                 for of_gates in (False, True)]
        assert rank[f"own optimizer {stage}"]["norm"] == pytest.approx(norms[0], rel=TOLERANCE)
        assert norms[1] > 1.01 * norms[0], "control: gradients of before would be seen"


def test_a_run_goes_from_engine_to_engine(ranks: list[dict[str, Any]], directory: Path) -> None:
    want = train_plain(range(5), frozen=PROBE)
    for rank in ranks:
        state = rank["chain state"]
        assert _error(rank["chain"], state, *want) < TOLERANCE
        assert state["steps"] == 5
        assert all(torch.equal(state[f"{name}/weight"], initial) for name, initial in Toy().named_parameters()
                   if name in PROBE)
    model = Toy(seed=9)
    load_model_weights(directory / "step-00000005", model, TABLE)
    assert all(torch.equal(state[f"{name}/weight"], parameter) for name, parameter in model.named_parameters())
    keys = TensorReader(directory / "step-00000005").shapes.keys()
    assert {key for key in keys if key.startswith("optim/")} == {
        f"optim/{moment}/out.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in ("weight", "bias")}


@pytest.mark.parametrize("stage", [0, 2, 3, "fsdp"])
def test_weights_that_were_frozen_are_trained_only_with_a_new_optimizer(ranks: list[dict[str, Any]],
                                                                        stage: int | str) -> None:
    for rank in ranks:
        message, unchanged = rank[f"refused {stage}"]
        assert re.search(r"step-00000005 has no moments of 4 weights .* \(filter, gates.bias, gates.weight, \.\.\.\): "
                         "freeze them again, or start Adam anew", message)
        assert "\n" not in message
        assert unchanged
        start, records, end = rank[f"anew {stage}"]
        assert start["steps"] == 0
        assert not any(start[f"{name}/{moment}"].any() for name in TABLE for moment in ("exp_avg", "exp_avg_sq"))
        model = Toy()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(rank["chain state"][f"{name}/weight"])
        assert _error(records, end, *train_plain(STEPS, model=model)) < TOLERANCE


@pytest.mark.parametrize("stage", [0, 2, 3, "fsdp"])
def test_moments_of_what_is_frozen_now_are_passed_over(ranks: list[dict[str, Any]], stage: int | str) -> None:
    for index, rank in enumerate(ranks):
        lines, state = rank[f"passed over {stage}"]
        assert len(lines) == (index == 0), "once, on the first rank"
        assert not lines or "holds moments of 4 weights that are frozen here, filter one of them" in lines[0]
        whole = rank[f"anew {stage}"][2]
        assert state.keys() == {key for key in whole if key.endswith("/weight") or key.split("/")[0] not in PROBE}
        assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(whole[key])) for key, value in state.items())
