"""metadata.json of a checkpoint: its fields and their types, in one place, and the digest by which it knows itself.

The digest stands in the file, not in the marker beside it, so that a value can be amended by one rename.
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hyena_dist.config.digests import json_sha256
from hyena_dist.config.plain import read_object
from hyena_dist.engine.loss_scale import HIGHEST, LOWEST

FORMAT = 1
PRETRAINING = "pretraining"
"""The objective of a checkpoint that names none, as those of before there were others."""
FINETUNING = "finetuning"
"""The objective of labelled sequences."""
METADATA = "metadata.json"
RESUMED = ("step", "identity", "data", "val_loss", "best_val_loss", "loss_scale", "seconds")
"""What a resume takes from the metadata."""
PLACE = ("step", "passed", "stage", "epoch", "index")
"""What pretraining takes from the place in the data, where there is one."""
_MOST_PASSED = 1000
"""Windows' steps that a run may have passed over for each that it took: a hundred times what its rollbacks allow, and
few enough to count through."""
_DIGEST = "sha256"


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # isfinite fails on a long whole number


def _is_loss_scale(value: Any) -> bool:
    return (isinstance(value, dict) and value.keys() == {"scale", "good_steps"} and _is_count(value["good_steps"])
            and _is_number(value["scale"]) and LOWEST <= value["scale"] <= HIGHEST)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


_COUNT = ("a whole number from 0 on, of 63 bits", _is_count)
_OBJECT = ("an object", lambda value: isinstance(value, dict))
_TEXT = ("a text", lambda value: isinstance(value, str))
_NUMBER = ("a finite number", _is_number)
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "optimizer_step_count": _COUNT, "step": _COUNT, "identity": _OBJECT, "config": _TEXT, "data": _OBJECT,
    "val_loss": _NUMBER, "best_val_loss": _NUMBER, "version": _TEXT, "source": _TEXT,
    "seconds": ("a number of seconds", lambda value: _is_number(value) and value >= 0),
    "objective": _TEXT, "frozen": ("a list of names", _is_names),
    "loss_scale": (f"a scale from {LOWEST:g} to {HIGHEST:g} with its good_steps", _is_loss_scale),
}
_MAY_BE_NULL = frozenset({"config", "data", "val_loss", "best_val_loss", "loss_scale"})


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Check the fields that are there; others are free.

    Raises:
        ValueError: a field of another type or range, or two that contradict each other.
    """
    if not _is_count(metadata.get("optimizer_step_count")):
        raise ValueError(f"its {METADATA} has no optimizer_step_count that is {_COUNT[0]}")
    for key, (kind, fits) in _FIELDS.items():
        value = metadata.get(key)
        if key in metadata and not (value is None and key in _MAY_BE_NULL) and not fits(value):
            raise ValueError(f"its {METADATA} has {value!r:.40} for {key}, which is not {kind}")
    step, steps = metadata.get("step"), metadata.get("identity", {}).get("train.steps")
    if step is not None and _is_count(steps) and step > steps:
        raise ValueError(f"its {METADATA} has step {step} of a run of {steps} steps")
    data = metadata.get("data") or {}
    if metadata.get("objective", PRETRAINING) != PRETRAINING:
        return  # what its data says, the objective alone knows
    for key in PLACE:
        if key in data and not _is_count(data[key]):
            raise ValueError(f"its {METADATA} has {data[key]!r:.40} for data.{key}, which is not {_COUNT[0]}")
    if data.get("passed", 0) > _MOST_PASSED * (data.get("step", 0) + _MOST_PASSED):
        raise ValueError(f"its {METADATA} has data.passed {data['passed']} after {data.get('step', 0)} steps")
    if step is not None and data.get("step", step) != step:
        raise ValueError(f"its {METADATA} has step {step}, and data of step {data['step']!r:.40}")


def seal(metadata: Mapping[str, Any]) -> str:
    """The text of metadata.json.

    Raises:
        ValueError: a field that would not be read back, or something that JSON does not have.
    """
    content = json.loads(json.dumps({**metadata, "format": FORMAT}, allow_nan=False))
    content.pop(_DIGEST, None)
    check_metadata(content)
    return json.dumps({_DIGEST: json_sha256(content), **content}, indent=1)


def read_sealed(directory: Path, *, sealed: bool) -> dict[str, Any]:
    """The metadata of a checkpoint, without its digest.

    Args:
        sealed: whether it must have a digest, as all have whose other files have one.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not what was written, or a field of it cannot be. Those of another format are not checked.
    """
    metadata = read_object(directory / METADATA)
    digest = metadata.pop(_DIGEST, None)
    if sealed and digest != json_sha256(metadata):
        raise ValueError(f"its {METADATA} is not what was written (sha256)")
    if metadata.get("format") == FORMAT:
        check_metadata(metadata)
    return metadata
