"""The raw `engine.deepspeed` section: the table of keys is DeepSpeed's own, and what is no key of it is refused."""

from collections.abc import Iterator
from typing import Any, Union, get_args, get_origin

import pytest

from hyena_dist.config.errors import ConfigError
from hyena_dist.engine.deepspeed_config import check_raw_section
from hyena_dist.engine.deepspeed_keys import ALLOWED_KEYS, REFUSED_KEYS

KNOWN = {*ALLOWED_KEYS, *REFUSED_KEYS}


@pytest.mark.parametrize(("raw", "message"), [
    ({"comm_loger": {"enabled": True}}, r"comm_loger is not a key of DeepSpeed: did you mean comms_logger\?"),
    ({"zero_optimisation": {"reduce_bucket_size": 5}}, r"did you mean zero_optimization\?"),
    ({"Fp16": {"enabled": True}}, r"did you mean fp16\? It does not pass through either: set train.precision"),
    ({"zero_optimization": {"reduce_bucket": 1}}, r"did you mean zero_optimization.reduce_bucket_size\?"),
    ({"zero_optimization": {"Reduce_Bucket_Size": 1}}, r"did you mean zero_optimization.reduce_bucket_size\?"),
    ({"reduce_bucket_size": 1}, r"did you mean zero_optimization.reduce_bucket_size\?"),
    ({"zero_optimization": {1: 2}}, r"zero_optimization.1 is not a key"),
    ({None: 2}, r"None is not a key"),
    ({"zero_optimization.reduce_bucket_size": 5}, r"is not a key of DeepSpeed: sections are mappings"),
    ({"unheard_of": 1}, r"unheard_of is not a key of DeepSpeed: leave it out"),
    ({"steps_per_print": "abc"}, r"steps_per_print must be a whole number of at least 1, got 'abc'"),
    ({"steps_per_print": 0}, r"at least 1, got 0"),
    ({"steps_per_print": True}, r"at least 1, got True"),
    *(({"communication_data_type": word}, rf"must be fp32, for fp16 and bf16 would round the gradients, got '{word}'")
      for word in ("fp16", "bf16", "fp17")),
    ({"communication_data_type": 16}, r"must be fp32"),
    *(({"gradient_predivide_factor": factor}, r"gradient_predivide_factor does not pass .* float32, which needs none")
      for factor in (2, 1e50, 10**400, float("nan"))),
    *(({"zero_optimization": {key: True}}, rf"{key} does not pass .* change the weights that are gathered or the grad")
      for key in ("zero_quantized_weights", "zero_quantized_gradients")),
    ({"zero_optimization": {"reduce_bucket_size": "auto"}}, r"at least 1, got 'auto'"),
    ({"zero_optimization": {"reduce_bucket_size": float("inf")}}, r"at least 1, got inf"),
    ({"zero_optimization": {"reduce_bucket_size": 5.5}}, r"at least 1, got 5.5"),
    ({"zero_optimization": {"overlap_comm": None}}, r"overlap_comm must be true or false, got None"),
    ({"zero_optimization": {"overlap_comm": "on"}}, r"overlap_comm must be true or false, got 'on'"),
    ({"zero_optimization": {"prefetch_bucket_size": 1}}, r"prefetch_bucket_size does not pass .*: write stage3_prefet"),
    ({"comms_logger": True}, r"comms_logger must be a mapping of keys, got True"),
    ({"comms_logger": {"prof_ops": "all_reduce"}}, r"prof_ops must be a list of names"),
    ({"timers": {"throughput": False}}, r"timers.throughput must be a mapping of keys"),
    ({"wandb": {"enabled": True}}, r"wandb does not pass through to DeepSpeed: .*train.run_dir"),
    ({"flops_profiler": {"output_file": "/etc/passwd"}}, r"output_file does not pass .* overwrite that file"),
    ({"aio": {"block_size": 1}}, r"aio does not pass"),
    ({"checkpoint": {"use_node_local_storage": True}}, r"checkpoint does not pass .* set train.save_every"),
])
def test_what_may_not_be_set_is_one_line_that_names_it(raw: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_raw_section(raw)
    assert str(caught.value).startswith("engine.deepspeed.")
    assert "\n" not in str(caught.value)


def test_every_wrong_key_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"comm_loger .*; .*fp16 .*; .*steps_per_print "):
        check_raw_section({"comm_loger": {}, "fp16": {}, "steps_per_print": "1"})


def test_what_tunes_and_reports_passes() -> None:
    check_raw_section({"steps_per_print": 10, "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]},
                       "zero_optimization": {"reduce_bucket_size": 5e8, "stage3_max_live_parameters": 1_000_000_000},
                       "flops_profiler": {"enabled": True, "module_depth": -1}, "communication_data_type": "fp32",
                       "timers": {"throughput": {"enabled": True}}})


def _fields(model: Any) -> Iterator[tuple[str, set[Any]]]:
    """Every name of every field of a configuration model, with its types."""
    for name, field in model.model_fields.items():
        types = set(get_args(field.annotation)) if get_origin(field.annotation) is Union else {field.annotation}
        for spelling in filter(None, (name, field.alias)):
            yield spelling, types - {type(None)}


def test_the_table_has_the_keys_of_deepspeeds_models_with_their_types() -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    for section, model in (("zero_optimization", DeepSpeedZeroConfig), ("comms_logger", CommsLoggerConfig),
                           ("timers.throughput", DeepSpeedThroughputTimerConfig)):
        theirs = dict(_fields(model))
        ours = {key.removeprefix(f"{section}.") for key in KNOWN if key.startswith(f"{section}.")}
        removed = {key for key in ours if "removed" in REFUSED_KEYS.get(f"{section}.{key}", "")}
        assert theirs.keys() == ours - removed | theirs.keys() & removed
        for key, types in theirs.items():
            kind = ALLOWED_KEYS.get(f"{section}.{key}")
            if kind is not None:
                example = next(value for value, of_type in ((True, bool), (7, int), (["all_reduce"], list))
                               if of_type in types)
                assert kind.fits(example), f"{section}.{key}: {types}"
                assert [kind.fits(value) for value in (True, 7, ["all_reduce"])].count(True) == 1


def test_the_table_has_every_key_that_deepspeed_looks_for() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    asked: set[str] = set()

    class Keys(set):
        def __contains__(self, key: object) -> bool:
            asked.add(str(key))
            return super().__contains__(key)

    class Recorder(dict):
        """A configuration that remembers what it was asked for, in the ways in which DeepSpeed asks."""

        def __contains__(self, key: object) -> bool:
            asked.add(str(key))
            return super().__contains__(key)

        def get(self, key: str, default: Any = None) -> Any:
            asked.add(key)
            return super().get(key, default)

        def keys(self) -> Any:
            return Keys(super().keys())

    DeepSpeedConfig(Recorder(train_micro_batch_size_per_gpu=1))
    assert {"wandb", "zero_optimization", "steps_per_print", "compile", "fp16"} < asked  # the control
    assert asked - {key.partition(".")[0] for key in KNOWN} == set()
