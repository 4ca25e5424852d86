"""What goes into DeepSpeed's configuration, what a raw section may not say, and which engines there are not."""

import subprocess
import sys
from typing import Any

import pytest

from hyena_dist.config.errors import ConfigError
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.engine import EngineSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.engine.deepspeed_config import (
    check_raw_section,
    deepspeed_config,
    refuse_lower_precision,
    with_buckets,
)
from hyena_dist.engine.deepspeed_keys import REFUSED_KEYS
from hyena_dist.model.kinds import check
from hyena_dist.parallel.groups import Axis, Groups

GROUPS = Groups(tensor=Axis(size=2), context=Axis(size=3), data=Axis(size=4), data_context=Axis(size=12),
                world=Axis(size=24))


def config(engine: EngineSection) -> dict:
    return deepspeed_config(engine, GROUPS, micro_batch_size=2, global_batch_size=16, grad_clip=1.0)


def test_batches_count_context_ranks_as_deepspeed_does() -> None:
    built = config(EngineSection(zero_stage=3))
    assert built["gradient_accumulation_steps"] == 2
    assert built["train_batch_size"] == 2 * 2 * 12
    assert built["gradient_clipping"] == 1.0
    assert built["zero_optimization"] == {"stage": 3, "memory_efficient_linear": False}
    assert not {"bf16", "fp16", "torch_autocast", "scheduler", "optimizer"} & built.keys()


def test_the_raw_section_is_merged_key_by_key() -> None:
    raw = {"zero_optimization": {"reduce_bucket_size": 5}, "comms_logger": {"enabled": True},
           "timers": {"throughput": {"enabled": True}}}
    built = config(EngineSection(zero_stage=2, deepspeed=raw))
    assert built["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 5}
    assert built["comms_logger"] == {"enabled": True}
    assert built["timers"] == {"throughput": {"enabled": True}}
    built["zero_optimization"]["reduce_bucket_size"] = 6
    assert raw["zero_optimization"] == {"reduce_bucket_size": 5}, "nothing mutates the configuration"


def test_buckets_are_no_larger_than_the_model_nor_than_deepspeeds_own() -> None:
    for elements, bucket, prefetch in ((1001, 1024, 1024), (10**7, 10**7 + 384, 10**7 + 384),
                                       (10**10, 5 * 10**8, 5 * 10**7)):
        zero = with_buckets(config(EngineSection(zero_stage=3)), elements)["zero_optimization"]
        assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (bucket, bucket)
        assert zero["stage3_prefetch_bucket_size"] == prefetch
    own = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 7}}
    assert with_buckets(own, 1000)["zero_optimization"]["reduce_bucket_size"] == 7
    assert own == {"zero_optimization": {"stage": 1, "reduce_bucket_size": 7}}
    assert with_buckets({"train_batch_size": 4}, 1000) == {"train_batch_size": 4}
    other_name = {"zero_optimization": {"stage": 3, "prefetch_bucket_size": 7}}
    assert "stage3_prefetch_bucket_size" not in with_buckets(other_name, 1000)["zero_optimization"]


def test_offloading_moves_what_it_says_and_lets_any_adam_step() -> None:
    host = {"device": "cpu", "pin_memory": True}
    assert config(EngineSection(zero_stage=1, offload="optimizer"))["zero_optimization"] == {
        "stage": 1, "offload_optimizer": host}
    built = config(EngineSection(zero_stage=3, offload="parameters"))
    assert built["zero_optimization"] == {"stage": 3, "memory_efficient_linear": False, "offload_optimizer": host,
                                          "offload_param": host}
    assert built["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize(("engine", "message"), [
    (EngineSection(zero_stage=0, offload="optimizer"), r"offload=optimizer: .* set engine.zero_stage to 1, 2 or 3"),
    (EngineSection(zero_stage=2, offload="parameters"), r"offload=parameters: .* set engine.zero_stage=3, or"),
    (EngineSection(name="fsdp", offload="optimizer"), r"offload=optimizer: FSDP .* set parameters or none"),
    (EngineSection(name="fsdp", deepspeed={"comms_logger": {"enabled": True}}), r"engine.deepspeed .* leave it out"),
])
def test_impossible_engines_are_refused_with_the_remedy(engine: EngineSection, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check(Config(engine=engine), world_size=1)
    assert ";" not in str(caught.value), "one rule each"


@pytest.mark.parametrize("engine", [
    EngineSection(name="fsdp"), EngineSection(name="fsdp", offload="parameters"),
    *(EngineSection(zero_stage=stage, offload="optimizer") for stage in (1, 2, 3)),
    EngineSection(zero_stage=3, offload="parameters"),
])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_other_engine_is_allowed(engine: EngineSection, precision: str) -> None:
    check(Config(engine=engine, train=TrainSection(run_dir="r", precision=precision)), world_size=1)


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_keys_that_do_not_pass_are_refused_by_name_with_the_remedy(key: str) -> None:
    section, _, inner = key.partition(".")
    with pytest.raises(ValueError, match=f"engine.deepspeed.{key} does not pass") as error:
        config(EngineSection(deepspeed={section: {inner: 1} if inner else 1}))
    assert REFUSED_KEYS[key] in str(error.value)


def test_every_owned_key_is_named_and_a_section_must_be_one() -> None:
    with pytest.raises(ValueError, match=r"fp16 .*: set train.precision; engine.deepspeed.zero_optimization.stage "):
        check_raw_section({"fp16": {"enabled": False}, "zero_optimization": {"stage": 3}})
    with pytest.raises(ValueError, match="zero_optimization must be a mapping"):
        check_raw_section({"zero_optimization": True})


def test_checking_imports_no_framework() -> None:
    code = ("import sys, hyena_dist.engine.deepspeed_config;"
            "print(*{'torch', 'deepspeed', 'megatron'} & sys.modules.keys())")
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert found == []


@pytest.mark.parametrize(("key", "ds_config"), [
    ("bf16", {"bf16": {"enabled": True}}), ("fp16", {"fp16": {"enabled": True, "loss_scale": 0}}),
    ("bfloat16", {"bfloat16": {"enabled": True}}), ("amp", {"amp": {"enabled": True, "opt_level": "O1"}}),
    ("torch_autocast", {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}), ("bf16", {"bf16": True}),
    ("communication_data_type", {"communication_data_type": "bf16"}),
    ("data_types.grad_accum_dtype", {"data_types": {"grad_accum_dtype": "bf16"}}),
    ("zero_optimization.zero_quantized_weights", {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}),
])
def test_what_would_lower_the_weights_is_refused_in_a_loop_of_one_s_own(key: str, ds_config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"^ds_config: {key} is set: .* the implicit filter needs float32: leave it"):
        refuse_lower_precision(ds_config)


def test_what_lowers_nothing_is_not() -> None:
    refuse_lower_precision({"bf16": {"enabled": False}, "fp16": {}, "torch_autocast": {"dtype": "bfloat16"},
                            "communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"},
                            "zero_optimization": {"stage": 3, "zero_quantized_weights": False}})
