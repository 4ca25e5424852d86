"""The `model` section of a stranger's file."""

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hyena_dist.config.errors import UserError
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.values import hint_of, plain_string


class ConversionError(UserError):
    """A file or directory that is not a HyenaDNA model, or a model that a format cannot hold; names the remedy."""


def refuse_missing(keys: Iterable[str]) -> None:
    """Raises ConversionError: naming these keys, if there are any."""
    if missing := list(keys):
        raise ConversionError(f"not the config.json of a HyenaDNA model: it lacks {', '.join(missing)}")


def checked_section(values: Mapping[str, Any], names: Mapping[str, str] = MappingProxyType({})) -> ModelSection:
    """The section of these keys, strictly typed.

    Args:
        names: what the file calls the keys, where it has other names.

    Raises:
        UserError: an unknown key, a value of another type or out of range, an interpolation.
    """
    for key, value in values.items():
        name = names.get(key, key)
        # OmegaConf takes True and '1' for 1, so that kinds are compared here.
        hint = hint_of(ModelSection, [key])
        if hint is str and isinstance(value, str):
            plain_string(value, name)
        elif not (isinstance(value, bool) if hint is bool else _is_number(value)):
            wanted = "a word" if hint is str else "true or false" if hint is bool else "a number"
            raise ConversionError(f"not the configuration of a HyenaDNA model: {name} is {value!r:.40}, not {wanted}")
    try:
        section = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelSection), dict(values)))
    except (OmegaConfBaseException, ValueError, TypeError, OverflowError) as error:
        key = getattr(error, "full_key", None) or ""
        reason = re.sub(r"model\.(\w+)", lambda match: names.get(match[1], match[0]), str(error).splitlines()[0])
        raise ConversionError("not the configuration of a HyenaDNA model: "
                              f"{names.get(key, key)}{key and ': '}{reason}") from error
    assert isinstance(section, ModelSection)
    return section


def _is_number(value: Any) -> bool:
    """Also null, which the section may take for one."""
    return isinstance(value, int | float | None) and not isinstance(value, bool)
