"""Reads a run's configuration: defaults < YAML file < command-line overrides, strictly typed."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from hyena_dist.config.errors import ConfigError
from hyena_dist.config.plain import open_regular, refuse_interpolation
from hyena_dist.config.schema import Config


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path`, apply `section.key=value` overrides, and return the frozen, typed configuration.

    Raises:
        ConfigError: unreadable file, malformed YAML, unknown key, wrong type, value out of range, missing required key.
    """
    try:
        file = OmegaConf.load(Path(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror or error}") from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a valid YAML file: {_one_line(error)}") from error
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise ConfigError(f"argument {override!r} is not of the form section.key=value")
    schema = OmegaConf.structured(Config)
    source = str(path)
    try:
        merged = OmegaConf.merge(schema, file)
        for override in overrides:
            source = f"argument {override!r}"
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
        source = str(path)
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError, TypeError, YAMLError) as error:
        raise ConfigError(f"{source}: {_explain(error)}") from error
    assert isinstance(config, Config)
    return config


def load_saved_config(path: str | Path) -> Config:
    """The configuration that `dump_config` has written, read as plain data: somebody else may have written it.

    Raises:
        ConfigError: as `load_config`, or an interpolation.
    """
    try:
        with open_regular(path) as file:
            text = file.read().decode()
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror or error}") from error
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a valid YAML file: {_one_line(error)}") from error
    refuse_interpolation(content, str(path))
    return load_config(path)


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal Config."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _explain(error: Exception) -> str:
    """OmegaConf's message without its trailing block, with the full key in front of it."""
    key = getattr(error, "full_key", None)
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    remedy = "; see hyena_dist/config/schema.py for the keys and their types" if key else ""
    return f"{key}: {first}{remedy}" if key and key not in first else first + remedy
