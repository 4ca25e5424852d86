"""DeepSpeed at stages 0 to 3 and FSDP2 against one plain process: gradient norm, clipped update, accumulation, loss
scale, offloading, bad gradients."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from benchmarks.memory import peak_tensor_bytes
from hyena_dist.config.sections.optim import OptimSection
from hyena_dist.engine.deepspeed import prepare_deepspeed
from hyena_dist.engine.fsdp import FsdpEngine, apply_fsdp2
from hyena_dist.engine.loss_scale import LossScaler
from hyena_dist.engine.protocol import FIELDS, Engine
from hyena_dist.model.placement import Placement
from hyena_dist.parallel.groups import Groups
from tests.compare import rel
from tests.dist.harness import run_distributed
from tests.dist.toy import Record, Toy, data_groups, make_engine, state_of, train, train_plain

ENGINES = (0, 1, 2, 3, "fsdp")
OFFLOADS = ((1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters"), ("fsdp", "parameters"))
STEPS = (0, 1, 2)
NO_CLIP = OptimSection(lr=1e-2, weight_decay=0.1, eps=1e-4, grad_clip=0.0)
# Rounding of float32 sums in another order. The bugs are larger: a forgotten factor halves the norm (0.5), a decayed
# filter moves its weights by lr * decay = 1e-3 of their size per step, one missing micro-batch moves the norm by 0.1.
TOLERANCE = 1e-5
LARGE_BUCKET = 1_000_000


class _SumOverTensorRanks(torch.autograd.Function):
    """Row-parallel output: all-reduce forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return grad


class _Split(nn.Module):
    """Column linear, row linear, replicated bias; on one rank of two half of it."""

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        up, down = torch.randn(6, 3), torch.randn(1, 6)
        self.up = nn.Parameter(up.chunk(ranks, dim=0)[rank].clone())
        self.down = nn.Parameter(down.chunk(ranks, dim=1)[rank].clone())
        self.bias = nn.Parameter(torch.randn(1))
        self.ranks = ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(torch.tanh(F.linear(x, self.up)), self.down)
        return (_SumOverTensorRanks.apply(y) if self.ranks > 1 else y) + self.bias


SPLIT_TABLE = {"up": Placement(tp_dim=0), "down": Placement(tp_dim=1), "bias": Placement()}


def _split_norm(stage: int | str, groups: Groups, table: dict[str, Placement]) -> float:
    model = _Split(groups.tensor.rank, groups.tensor.size)
    engine: Engine
    if stage == "fsdp":
        apply_fsdp2(model, groups)
        engine = FsdpEngine(model, torch.optim.AdamW(model.parameters()), groups, table)
    else:
        config = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}}
        engine = prepare_deepspeed(model, config, groups, table, optimizer=torch.optim.AdamW(model.parameters()))
    engine.backward(engine.module(torch.linspace(-1, 1, 12).view(4, 3)).square().sum())
    return float(engine.step(1e-3).grad_norm)


def _check_refusals(groups: Groups, tensor: Groups) -> None:
    model = _Split(tensor.tensor.rank, tensor.tensor.size)
    with pytest.raises(ValueError, match="the placement table of the model is needed"):
        prepare_deepspeed(model, {}, tensor)
    with pytest.raises(ValueError, match="must be torch's Adam or AdamW, .* got SGD"):
        prepare_deepspeed(Toy(), {}, groups, optimizer=torch.optim.SGD(Toy().parameters()))
    with pytest.raises(ValueError, match="pass an optimizer"):
        prepare_deepspeed(Toy(), {}, groups)
    early = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="the placement table of the model is needed"):
        FsdpEngine(model, early, tensor)
    with pytest.raises(ValueError, match=r"parameter filter is not sharded: call apply_fsdp2\(\)"):
        FsdpEngine(Toy(), early, groups)
    with pytest.raises(ValueError, match=r"optimizer does not have parameter filter: make it after"):
        FsdpEngine(apply_fsdp2(Toy(), groups), early, groups)


def _own_section(groups: Groups) -> float:
    """In someone's own loop DeepSpeed makes the optimizer from its own section."""
    config = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2},
              "optimizer": {"type": "AdamW", "params": {"lr": 0.5, "torch_adam": True}}}
    engine = prepare_deepspeed(Toy(), config, groups)
    before = engine.export_parameter("out.bias")["weight"].clone()
    engine.backward(engine.module(torch.ones(2, 3)).sum())
    engine.step()
    return float((engine.export_parameter("out.bias")["weight"] - before).abs())


def _accumulating(stage: int | str, groups: Groups, offload: str = "none") -> tuple[list[Record], dict[str, Any]]:
    """Steps 0, 1, 2 in 1, 2 and 4 micro-batches, as a warm-up of the sequence length would."""
    engine = make_engine(stage, groups, micro_batch=4, offload=offload)
    assert engine.accumulation_steps == 1
    records = []
    for step in STEPS:
        engine.accumulation_steps = 2**step
        records += train(engine, groups, [step])
    return records, state_of(engine)


def _scaling(stage: int | str, groups: Groups) -> dict[str, Any]:
    """Steps with the loss scale of fp16: good ones, an inf, a nan, good ones."""
    engine = make_engine(stage, groups, precision="fp16")
    scaler = engine.loss_scaler
    assert isinstance(scaler, LossScaler)
    good = train(engine, groups, STEPS[:1])
    before = state_of(engine)
    bad, scales = [], [scaler.scale]
    for poison in (math.inf, math.nan):
        bad += train(engine, groups, [7], poison=poison)
        scales.append(scaler.scale)
    unchanged = all(torch.equal(torch.as_tensor(value), torch.as_tensor(before[key]))
                    for key, value in state_of(engine).items())
    good += train(engine, groups, STEPS[1:])
    scaler.load_state_dict({"scale": 1.0, "good_steps": 0})
    lowest = train(engine, groups, [7], poison=math.inf)
    return {"good": good, "bad": bad, "scales": scales, "unchanged": unchanged, "state": state_of(engine),
            "lowest": lowest[0]}


@torch.no_grad()
def _imported_after_an_evaluation(stage: int | str, groups: Groups) -> tuple[bool, bool]:
    """Whether an evaluation sees the weights that were set since the one before; and, the control, other weights."""
    engine = make_engine(stage, groups)
    x = torch.linspace(-1, 1, 6).view(2, 3)
    other = Toy(seed=1)
    before = engine.module(x).clone()
    for name, parameter in other.named_parameters():
        engine.import_parameter(name, dict.fromkeys(FIELDS, parameter.detach()))
    return torch.allclose(engine.module(x), other(x), atol=1e-6), torch.allclose(before, other(x), atol=1e-6)


def _peak(stage: int, groups: Groups, buckets: dict[str, int] | None = None) -> int:
    """Bytes of tensors, of an engine and its first step."""
    with peak_tensor_bytes() as peak:
        train(make_engine(stage, groups, deepspeed={"zero_optimization": buckets} if buckets else None), groups, [0])
    return peak.bytes


def _on_each_rank() -> dict[str, Any]:
    groups = data_groups()
    found: dict[str, Any] = {}
    for stage in ENGINES:
        engine = make_engine(stage, groups)
        found[f"initial {stage}"] = state_of(engine)
        found[f"records {stage}"] = train(engine, groups, STEPS)
        found[f"state {stage}"] = state_of(engine)

        engine = make_engine(stage, groups, optim=NO_CLIP)
        found[f"unclipped {stage}"] = (train(engine, groups, STEPS), state_of(engine))
        found[f"wrong factor {stage}"] = train(make_engine(stage, groups), groups, [0], factor=1.0)

        engine = make_engine(stage, groups)
        train(engine, groups, STEPS[:1])
        before = state_of(engine)
        poisoned = train(engine, groups, [7], poison=math.nan)
        after = state_of(engine)
        train(engine, groups, STEPS[1:])
        found[f"poison {stage}"] = (before, poisoned[0], after, state_of(engine))
        found[f"accumulating {stage}"] = _accumulating(stage, groups)
        found[f"scaling {stage}"] = _scaling(stage, groups)
        found[f"imported {stage}"] = _imported_after_an_evaluation(stage, groups)
    for stage, offload in OFFLOADS:
        found[f"offload {stage} {offload}"] = _accumulating(stage, groups, offload)

    world = groups.world
    alone = groups.tensor
    tensor = Groups(tensor=world, context=alone, data=alone, data_context=alone, world=world)
    whole = dict.fromkeys(SPLIT_TABLE, Placement())
    for stage in ENGINES:
        found[f"split {stage}"] = (_split_norm(stage, tensor, SPLIT_TABLE), _split_norm(stage, tensor, whole))
    for stage in (1, 2, 3):
        found[f"peak {stage}"] = _peak(stage, groups), _peak(stage, groups, {"reduce_bucket_size": LARGE_BUCKET})
    _check_refusals(groups, tensor)
    found["own section"] = _own_section(groups)
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_distributed(_on_each_rank, 2)


@pytest.mark.parametrize("stage", ENGINES)
def test_norms_and_clipped_updates_equal_one_process(ranks: list[dict[str, Any]], stage: int | str) -> None:
    records, weights = train_plain(STEPS)
    assert min(record.grad_norm for record in records) > 1.0, "clipping at 0.5 would not act"
    for rank in ranks:
        for got, want in zip(rank[f"records {stage}"], records, strict=True):
            assert got.applied
            assert got.grad_norm == pytest.approx(want.grad_norm, rel=TOLERANCE)
            assert got.loss == pytest.approx(want.loss, rel=TOLERANCE)
        state = rank[f"state {stage}"]
        errors = {name: rel(state[f"{name}/weight"], weight) for name, weight in weights.items()}
        print(f"stage {stage}: largest error of a weight {max(errors.values()):.1e}, tolerance {TOLERANCE}")
        assert max(errors.values()) < TOLERANCE, errors
        assert state["steps"] == len(STEPS)


@pytest.mark.parametrize("stage", ENGINES)
def test_without_clipping_the_norm_is_still_reported(ranks: list[dict[str, Any]], stage: int | str) -> None:
    want, weights = train_plain(STEPS, NO_CLIP)
    records, state = ranks[0][f"unclipped {stage}"]
    assert [r.grad_norm for r in records] == pytest.approx([r.grad_norm for r in want], rel=TOLERANCE)
    assert max(rel(state[f"{name}/weight"], weight) for name, weight in weights.items()) < TOLERANCE


@pytest.mark.parametrize("stage", ENGINES)
def test_control_a_wrong_loss_factor_is_seen(ranks: list[dict[str, Any]], stage: int | str) -> None:
    want, _ = train_plain([0])
    assert ranks[0][f"wrong factor {stage}"][0].grad_norm == pytest.approx(want[0].grad_norm / 2, rel=TOLERANCE)


@pytest.mark.parametrize("stage", ENGINES)
def test_state_can_be_read_before_the_first_step(ranks: list[dict[str, Any]], stage: int | str) -> None:
    initial = ranks[1][f"initial {stage}"]
    assert initial["steps"] == 0
    for name, parameter in Toy().named_parameters():
        assert torch.equal(initial[f"{name}/weight"], parameter.detach())
        assert not initial[f"{name}/exp_avg"].any()
        assert not initial[f"{name}/exp_avg_sq"].any()


@pytest.mark.parametrize("stage", ENGINES)
def test_a_non_finite_gradient_changes_nothing(ranks: list[dict[str, Any]], stage: int | str) -> None:
    _, weights = train_plain(STEPS)
    for rank in ranks:
        before, record, after, finally_ = rank[f"poison {stage}"]
        assert (record.applied, record.overflow) == (False, False)
        assert not torch.isfinite(torch.tensor(record.grad_norm))
        assert before.pop("steps") == after.pop("steps") == 1
        assert all(torch.equal(after[key], value) for key, value in before.items())
        # and the gradients of the skipped step are gone
        assert max(rel(finally_[f"{name}/weight"], weight) for name, weight in weights.items()) < TOLERANCE


@pytest.mark.parametrize("stage", ENGINES)
def test_imported_weights_are_used_at_once(ranks: list[dict[str, Any]], stage: int | str) -> None:
    assert [rank[f"imported {stage}"] for rank in ranks] == [(True, False)] * 2


def _check(records: list[Record], state: dict[str, Any], what: str) -> None:
    """Records and weights are those of one plain process."""
    want, weights = train_plain(STEPS)
    errors = {name: rel(state[f"{name}/weight"], weight) for name, weight in weights.items()}
    errors["norm"] = rel([record.grad_norm for record in records], [record.grad_norm for record in want])
    errors["loss"] = rel([record.loss for record in records], [record.loss for record in want])
    worst = max(errors, key=errors.__getitem__)
    print(f"{what}: worst {worst} {errors[worst]:.1e}, tolerance {TOLERANCE}")
    assert errors[worst] < TOLERANCE, errors
    assert state["steps"] == len(STEPS)


@pytest.mark.parametrize("stage", ENGINES)
def test_accumulation_may_change_between_steps(ranks: list[dict[str, Any]], stage: int | str) -> None:
    for rank in ranks:
        _check(*rank[f"accumulating {stage}"], f"{stage}, 1, 2, 4 micro-batches")


@pytest.mark.parametrize(("stage", "offload"), OFFLOADS)
def test_offloading_changes_nothing(ranks: list[dict[str, Any]], stage: int | str, offload: str) -> None:
    for rank in ranks:
        _check(*rank[f"offload {stage} {offload}"], f"{stage} with {offload} on the host")


@pytest.mark.parametrize("stage", ENGINES)
def test_the_loss_scale_moves_and_is_seen_nowhere_else(ranks: list[dict[str, Any]], stage: int | str) -> None:
    for rank in ranks:
        found = rank[f"scaling {stage}"]
        _check(found["good"], found["state"], f"{stage} with a loss scale of {found['scales'][0]:.0f}")
        assert found["scales"] == [2.0**16, 2.0**15, 2.0**14]
        assert found["unchanged"]
        for record in found["bad"]:
            assert not math.isfinite(record.grad_norm)
            assert (record.applied, record.overflow) == (False, True)
        assert all(record.applied and not record.overflow for record in found["good"])
        assert (found["lowest"].applied, found["lowest"].overflow) == (False, False), "no lower scale may help"


@pytest.mark.parametrize("stage", ENGINES)
def test_norm_over_tensor_ranks_comes_from_the_table(ranks: list[dict[str, Any]], stage: int | str) -> None:
    model = _Split(0, 1)
    model(torch.linspace(-1, 1, 12).view(4, 3)).square().sum().backward()
    want = float(nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()]))
    for rank in ranks:
        norm, untabled = rank[f"split {stage}"]
        assert norm == pytest.approx(want, rel=TOLERANCE)
        assert untabled != pytest.approx(want, rel=1e-2), "control: split weights counted on one rank only"


def test_an_optimizer_from_deepspeeds_own_section_keeps_its_learning_rate(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["own section"] == pytest.approx(0.5, rel=0.05), "Adam's first step is lr, but for weight decay"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_buckets_take_no_more_than_a_small_model(ranks: list[dict[str, Any]], stage: int) -> None:
    """Of their own size they would take 2 GB."""
    for rank in ranks:
        peak, large = rank[f"peak {stage}"]
        assert peak < 100_000
        assert large >= 4 * LARGE_BUCKET, "the control: a bucket is seen"


def test_no_process_group_is_a_clear_error() -> None:
    with pytest.raises(RuntimeError, match=r"call hyena_dist.runtime.launch.init_distributed\(\)"):
        prepare_deepspeed(Toy(), {}, Groups.single())
    with pytest.raises(RuntimeError, match=r"call hyena_dist.runtime.launch.init_distributed\(\)"):
        apply_fsdp2(Toy(), Groups.single())
