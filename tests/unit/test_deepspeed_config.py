"""What goes into DeepSpeed's configuration, and what a raw section may not say."""

import subprocess
import sys

import pytest

from hyena_dist.config.schema import EngineSection
from hyena_dist.engine.deepspeed_config import OWNED_KEYS, check_raw_section, deepspeed_config
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


@pytest.mark.parametrize("key", OWNED_KEYS)
def test_owned_keys_are_refused_by_name_with_the_remedy(key: str) -> None:
    section, _, inner = key.partition(".")
    with pytest.raises(ValueError, match=f"engine.deepspeed.{key}: ") as error:
        config(EngineSection(deepspeed={section: {inner: 1} if inner else 1}))
    assert OWNED_KEYS[key] in str(error.value)


def test_every_owned_key_is_named_and_a_section_must_be_one() -> None:
    with pytest.raises(ValueError, match=r"fp16: set train.precision; engine.deepspeed.zero_optimization.stage: "):
        check_raw_section({"fp16": {"enabled": False}, "zero_optimization": {"stage": 3}})
    with pytest.raises(ValueError, match="zero_optimization must be a mapping"):
        check_raw_section({"zero_optimization": True})


def test_checking_imports_no_framework() -> None:
    code = ("import sys, hyena_dist.engine.deepspeed_config;"
            "sys.exit(' '.join({'torch', 'deepspeed', 'megatron'} & sys.modules.keys()) or 0)")
    subprocess.run([sys.executable, "-c", code], check=True)
