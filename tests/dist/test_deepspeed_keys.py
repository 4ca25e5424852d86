"""Whatever passes through the raw `engine.deepspeed` section leaves a training step as it is."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from hyena_dist.config.errors import ConfigError
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.engine import EngineSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.engine import deepspeed, deepspeed_config
from hyena_dist.engine.deepspeed import prepare_deepspeed
from hyena_dist.engine.deepspeed_keys import ALLOWED_KEYS
from hyena_dist.parallel.groups import Groups
from hyena_dist.train.build_engine import build_engine
from tests.compare import rel
from tests.dist.harness import run_distributed
from tests.dist.toy import GLOBAL_BATCH, MICRO_BATCH, OPTIM, TABLE, Toy, data_groups, state_of, train

STEPS = (0, 1)
# Rounding of float32 sums in another order; a gradient that is reduced wrongly moves weights by far more, and one that
# travels in bf16 (the control) by 1e-3.
TOLERANCE = 1e-5
VALUES: tuple[Any, ...] = (True, False, 1000, "fp32", "error", ["all_reduce"])
CONTROLS: dict[str, dict[str, Any]] = {
    "communication_data_type=bf16": {"communication_data_type": "bf16"},
    "gradient_predivide_factor=2": {"gradient_predivide_factor": 2.0, "zero_optimization": {"reduce_scatter": False}},
}
"""Which do not pass, and are let through here: the second at stage 3 on two ranks."""


def _nested(key: str, value: Any) -> dict[str, Any]:
    *sections, name = key.split(".")
    raw: dict[str, Any] = {name: value}
    for section in reversed(sections):
        raw = {section: raw}
    return raw


def cases(keys: list[str]) -> dict[str, dict[str, Any]]:
    found = {f"{key}={value}": _nested(key, value) for key in keys for value in VALUES if ALLOWED_KEYS[key].fits(value)}
    return found | CONTROLS


def _trained(raw: dict[str, Any], stage: int, groups: Groups) -> dict[str, Any]:
    config = Config(train=TrainSection(run_dir="unused", micro_batch_size=MICRO_BATCH, global_batch_size=GLOBAL_BATCH),
                    optim=OPTIM, engine=EngineSection(zero_stage=stage, deepspeed=raw))
    engine = build_engine(config, Toy(), TABLE, groups)
    records = train(engine, groups, STEPS)
    state = state_of(engine)
    for name in engine.parameter_shapes:  # as a resume does
        engine.import_parameter(name, engine.export_parameter(name))
    return {"records": [dataclasses.astuple(record) for record in records], "state": state,
            "same": all(bool((state_of(engine)[key] == value).all()) for key, value in state.items() if key != "steps")}


@contextmanager
def _let_through() -> Iterator[None]:
    """Without the refusals of a raw section, and of a configuration that lowers the weights or their gradients."""
    with (mock.patch.object(deepspeed_config, "_problems"), mock.patch.object(deepspeed, "refuse_lower_precision")):
        yield


def _on_each_rank(keys: list[str]) -> dict[tuple[str, int], Any]:
    groups, found = data_groups(), {}
    defaults = DeepSpeedZeroConfig().model_dump()
    for stage in (0, 1, 2, 3):
        plain = _trained({}, stage, groups)
        for name, raw in cases(keys).items():
            of_zero = {key.removeprefix("stage3_"): value for key, value in raw.get("zero_optimization", {}).items()}
            if of_zero and (stage == 0 or all(defaults[key] == value for key, value in of_zero.items())):
                continue  # as without it
            if not of_zero and stage in (1, 3) and name not in CONTROLS:
                continue  # these know nothing of stages but whether there are any
            try:
                with nullcontext() if name not in CONTROLS else _let_through():
                    other = _trained(raw, stage, groups)
            except ConfigError as error:  # DeepSpeed's own refusal at this stage
                found[name, stage] = str(error)
                continue
            worst = max(rel(other["state"][key], value) for key, value in plain["state"].items() if key != "steps")
            # Loss and norm too: where gradients are clipped, the weights do not show their scale.
            numbers = [torch.tensor(run["records"], dtype=torch.float64)[:, :2] for run in (other, plain)]
            worst = max(worst, rel(*numbers))
            found[name, stage] = worst if other["same"] else "an import changed the state"
            print(f"{name} at stage {stage}: {found[name, stage]}", flush=True)
    return found


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("keys", [
    ["zero_optimization.reduce_bucket_size", "zero_optimization.overlap_comm"],
    pytest.param(sorted(ALLOWED_KEYS), marks=pytest.mark.slow)], ids=["few", "all"])
def test_no_key_that_passes_changes_what_is_trained(keys: list[str]) -> None:
    found, _ = run_distributed(_on_each_rank, 2, keys, timeout=1500.0)
    print(f"tolerance {TOLERANCE}")
    for (name, stage), worst in found.items():
        if isinstance(worst, str):  # two switches together, as scaling before and reducing by scattering
            assert "DeepSpeed refuses its configuration: " in worst, (name, stage, worst)
        elif name not in CONTROLS:
            assert worst < TOLERANCE, (name, stage)
    for control in CONTROLS:
        assert max(worst for (name, _), worst in found.items() if name == control) > 10 * TOLERANCE, control
    assert sum(isinstance(worst, str) for worst in found.values()) <= len(found) // 4


REFUSALS: dict[str, dict[str, Any]] = {
    "reduce_bucket of DeepSpeedZeroConfig": {"zero_optimization": {"reduce_bucket": 1}},
    "Invalid communication_data_type": {"communication_data_type": "fp17"},
    "Sparse compression": {"sparse_gradients": True},
    "has to be greater than 0": {"train_batch_size": 3},
    "stage of DeepSpeedZeroConfig": {"zero_optimization": {"stage": 9}},
}
"""DeepSpeed's own words, from each of its ways of refusing, and what brings them."""


def _refused() -> dict[str, str]:
    groups, found = data_groups(), {}
    batch = {"train_batch_size": GLOBAL_BATCH, "train_micro_batch_size_per_gpu": GLOBAL_BATCH}
    for words, config in REFUSALS.items():
        model = Toy()
        try:
            prepare_deepspeed(model, batch | config, groups, optimizer=torch.optim.AdamW(model.parameters()))
            found[words] = "accepted"
        except ConfigError as error:
            found[words] = str(error)
    return found


def test_deepspeeds_own_refusals_are_one_line() -> None:
    [found] = run_distributed(_refused, 1)
    for words, said in found.items():
        print(said)
        assert said.startswith("engine.deepspeed: ")
        assert words in said
        assert "\n" not in said
