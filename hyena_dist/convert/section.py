"""The `model` section of a stranger's file."""

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hyena_dist.config.errors import UserError
from hyena_dist.config.schema import ModelSection
from hyena_dist.config.values import hint_of, plain_string


class ConversionError(UserError):
    """A file or directory that is not a HyenaDNA model, or a model that a format cannot hold; names the remedy."""


def checked_section(values: Mapping[str, Any]) -> ModelSection:
    """The section of these keys, strictly typed.

    Raises:
        UserError: an unknown key, a value of another type or out of range, an interpolation.
    """
    for key, value in values.items():
        wanted = "a word" if hint_of(ModelSection, [key]) is str else "a number"
        if isinstance(value, str) and wanted == "a word":
            plain_string(value, key)
        elif isinstance(value, bool) or not isinstance(value, int | float | None):  # OmegaConf takes True and '1' for 1
            raise ConversionError(f"not the configuration of a HyenaDNA model: {key} is {value!r:.40}, not {wanted}")
    try:
        section = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelSection), dict(values)))
    except (OmegaConfBaseException, ValueError, TypeError, OverflowError) as error:
        raise ConversionError(f"not the configuration of a HyenaDNA model: {str(error).splitlines()[0]}") from error
    assert isinstance(section, ModelSection)
    return section
