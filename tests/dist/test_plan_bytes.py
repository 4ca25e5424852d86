"""The bytes of a plan against real steps: what a rank sends to the last byte, what it holds within a tenth."""

from dataclasses import replace
from typing import Any

import pytest

from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.engine import EngineSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.costs.memory import run_memory
from hyena_dist.costs.traffic import step_traffic
from hyena_dist.parallel.groups import init_groups
from tests.dist.harness import run_distributed
from tests.dist.steps import Measured, measure

TOLERANCE = 0.1
ENGINES = {"fsdp": EngineSection(name="fsdp"),
           **{f"zero{stage}": EngineSection(zero_stage=stage) for stage in range(4)}}
RANKS = 4


def case(engine: str = "zero1", *, tensor: int = 1, context: int = 1, data: int = 1, micro: int = 1, times: int = 1,
         recompute: str = "none", precision: str = "fp32", method: str = "auto", sequence: bool = False,
         overlap: int = 1, length: int = 256, **model: Any) -> Config:
    """A run of two layers of 32 channels on tensor x context x data ranks."""
    section = ModelSection(**{"num_layers": 2, "hidden_size": 32, "max_seq_len": length, "num_attention_heads": 4,
                              "embed_dropout": 0.0, **model})
    return Config(model=section, data=DataSection(shards="unused", seq_len=length),
                  train=TrainSection(run_dir="unused", micro_batch_size=micro, global_batch_size=micro * times * data,
                                     precision=precision, activation_checkpointing=recompute),
                  parallel=ParallelSection(tensor=tensor, context=context, sequence=sequence, context_method=method,
                                           overlap_groups=overlap), engine=ENGINES[engine])


SENDS = [
    case("zero0", tensor=2, context=2), case("zero1", tensor=2, context=2, sequence=True, recompute="block"),
    case("zero2", tensor=2, data=2, times=2, precision="bf16", recompute="full"),
    case("zero3", context=2, data=2, method="distributed_fft", recompute="selective", times=2),
    case("fsdp", context=4, precision="bf16", recompute="full", hyena_order=3, times=2),
    case("fsdp", tensor=2, data=2, sequence=True, precision="bf16", hidden_size=36, times=2),
    case("zero3", data=4, times=2, hidden_size=192, length=16), case("zero1", data=4, hidden_size=33, num_layers=3),
    case("zero2", context=4, micro=2, overlap=2), case("zero1", tensor=4, layer_pattern="HA", precision="bf16"),
    case("zero1", context=2, data=2, layer_pattern="AH", recompute="full", length=250),
    case("zero3", tensor=2, context=2, sequence=True, method="distributed_fft", precision="bf16", recompute="block",
         embed_dropout=0.1, resid_dropout=0.1),
    case("zero0", data=2, context=2, times=2, tie_embeddings=False, short_conv_kernel=5, filter_num_inner_mlps=1),
    case("fsdp", tensor=2, context=2, layer_pattern="HA", recompute="full", sequence=True),
]


SENDS_FAST = [SENDS[number] for number in (0, 2, 3, 5, 10)]


def _sends(cases: list[Config]) -> list[Measured]:
    made = {sizes: init_groups(tensor=sizes[0], context=sizes[1]) for sizes in
            dict.fromkeys((config.parallel.tensor, config.parallel.context) for config in cases)}
    return [measure(config, made[config.parallel.tensor, config.parallel.context]) for config in cases]


def check_sent(cases: list[Config]) -> None:
    """Of every rank of every case, by axis and kind of collective; engines' own included."""
    for rank, found in enumerate(run_distributed(_sends, RANKS, cases)):
        for config, measured in zip(cases, found, strict=True):
            expected = step_traffic(config, RANKS, context_rank=measured.context_rank)
            assert measured.sent == expected, (rank, config.parallel, config.engine.name, config.engine.zero_stage)
            deeper = replace(config, model=replace(config.model, num_layers=config.model.num_layers + 1))
            assert step_traffic(deeper, RANKS, context_rank=measured.context_rank) != expected, "the control"


def test_bytes_sent_are_those_of_the_formula() -> None:
    check_sent(SENDS_FAST)


@pytest.mark.slow
def test_bytes_sent_in_other_layouts_are_those_of_the_formula() -> None:
    check_sent([config for config in SENDS if config not in SENDS_FAST])


HOLDS = [
    case("zero1", length=4096), case("zero2", length=4096, precision="bf16", recompute="selective"),
    case("zero0", length=4096, recompute="block", layer_pattern="HA"),
    case("fsdp", length=4096, recompute="full", precision="bf16"), case("zero3", length=64, hidden_size=128),
    case("fsdp", tensor=2, length=4096, sequence=True), case("zero1", data=2, length=64, hidden_size=128),
    case("zero2", length=64, hidden_size=128, times=2), case("zero3", data=2, length=64, hidden_size=192),
    case("fsdp", data=2, length=64, hidden_size=192, num_layers=6),
    case("zero1", tensor=2, length=4096, precision="bf16"),
    case("zero2", context=2, length=4096, recompute="selective", precision="bf16"),
    case("zero1", context=2, length=4096), case("zero3", context=2, length=4096, method="distributed_fft"),
    case("zero1", tensor=2, context=2, length=8192, sequence=True, precision="bf16"),
    case("zero0", tensor=2, context=2, length=8192, micro=2, recompute="full"),
    case("zero1", context=4, length=8192, recompute="selective"),
    case("zero2", tensor=4, length=8192, recompute="full"),
    case("fsdp", context=4, length=8192, precision="bf16"),
    case("zero2", tensor=2, data=2, length=8192, precision="bf16", recompute="block"),
]
ACCUMULATE = HOLDS[7:8]
FEW = HOLDS[:1] + HOLDS[9:10]


def ranks_of(config: Config) -> int:
    """Of a case whose windows are all taken at once, or in two micro-batches by a single data rank."""
    train, parallel = config.train, config.parallel
    windows = train.global_batch_size // train.micro_batch_size
    return parallel.tensor * parallel.context * (1 if config in ACCUMULATE else windows)


def _holds(cases: list[Config]) -> list[int]:
    """The least of three: a thread of gloo now and then lets go of what it has sent a moment later than usual."""
    made = [(config, init_groups(tensor=config.parallel.tensor, context=config.parallel.context)) for config in cases]
    return [min(measure(config, groups).peak for _ in range(3)) for config, groups in made]


def check_peaks(cases: list[Config]) -> None:
    for ranks in sorted({ranks_of(config) for config in cases}):
        chosen = [config for config in cases if ranks_of(config) == ranks]
        by_rank = run_distributed(_holds, ranks, chosen)
        for number, config in enumerate(chosen):
            found = max(peaks[number] for peaks in by_rank)
            formula = run_memory(config, world_size=ranks, device="cpu")
            engine, train, parallel = config.engine, config.train, config.parallel
            print(f"{ranks} ranks, {parallel.tensor} x {parallel.context}, {engine.name} {engine.zero_stage}, "
                  f"{train.precision}, {train.activation_checkpointing}: {found / 1e6:.2f} MB, "
                  f"{formula.total / found:.3f} of it by the formula, at the {formula.moment}")
            assert formula.total == pytest.approx(found, rel=TOLERANCE)


def test_a_rank_holds_the_bytes_of_the_formula() -> None:
    check_peaks(FEW)
    less = run_memory(replace(FEW[0], train=replace(FEW[0].train, activation_checkpointing="full")), world_size=1,
                      device="cpu")
    assert less.total < (1 - 2 * TOLERANCE) * run_memory(FEW[0], world_size=1, device="cpu").total, "the control"


@pytest.mark.slow
def test_ranks_of_twenty_runs_hold_the_bytes_of_the_formula() -> None:
    assert len(HOLDS) == 20
    check_peaks(HOLDS)
