"""Reads a run's configuration: defaults < YAML file < command-line overrides, strictly typed."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from hyena_dist.config.errors import ConfigError, one_line, read_remedy
from hyena_dist.config.kinds import START_BYTES, UTF8_MARK, kind_of_text, not_as_it_is
from hyena_dist.config.plain import open_regular
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.train import WEIGHTS
from hyena_dist.config.values import field_of, hint_of, parse_argument, parse_yaml, plain_string

_VARIABLE = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*)")


def load_config(path: str | Path, overrides: Sequence[str] = (), *, env: Mapping[str, str] = os.environ,
                base: Mapping[str, Any] | None = None) -> Config:
    """Read `path`, apply `section.key=value` overrides, and return the frozen, typed configuration, with `~` and $NAME
    expanded in its paths. For the configuration of the user's own run; `read_config` is for files of others.

    Args:
        base: values in place of the defaults, by section: those that a command has no use for, and others need.

    Raises:
        ConfigError: unreadable file, malformed YAML, unknown key, wrong type, value out of range, missing required key,
            a value that can be read in two ways, a path with a variable that is not set.
    """
    config = read_config(path, overrides, base)
    train, data, tune = config.train, config.data, config.finetune
    resume = train.resume
    if train.origin is not None:
        resume = WEIGHTS * train.weights_only + _expanded("train.resume", train.origin, env)
    tuning: dict[str, Any] = {field: _expanded(f"finetune.{field.rstrip('_')}", value, env)
                              for field in ("from_", "table", "valid", "test", "genome", "homology")
                              if (value := getattr(tune, field))}
    try:
        return replace(config, data=replace(data, shards=_expanded("data.shards", data.shards, env),
                                            cache=data.cache and _expanded("data.cache", data.cache, env),
                                            mixture=_expanded_mixture(data.mixture, env)),
                       train=replace(train, run_dir=_expanded("train.run_dir", train.run_dir, env), resume=resume),
                       finetune=replace(tune, **tuning))
    except ConfigError:
        raise
    except ValueError as error:  # what a variable holds is no path
        raise ConfigError(f"{error}: correct the environment variable in it, or write the path itself") from error


def read_config(path: str | Path, overrides: Sequence[str] = (), base: Mapping[str, Any] | None = None) -> Config:
    """As `load_config`, but every value as it stands in the file: nothing of this process gets into it.

    Raises:
        ConfigError: as `load_config`.
    """
    source, content = str(path), _read(path)
    try:
        file = parse_yaml(content.decode("utf-8"), Config)
        merged = OmegaConf.merge(OmegaConf.structured(Config), base or {}, {} if file is None else file)
        for override in overrides:
            source = f"argument {override!r}"
            merged = OmegaConf.merge(merged, _argument(override))
        source = str(path)
        config = OmegaConf.to_object(merged)
    except (YAMLError, UnicodeDecodeError) as error:
        what = "YAML file" if source == str(path) else "value of YAML: write it in quotes"
        raise ConfigError(f"{source}: not a valid {what}: {one_line(error)}") from error
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        why = _explain(error)
        if source == str(path) and overrides:
            source = _to_blame(path, overrides, why, base)
        raise ConfigError(f"{source}: {why}") from error
    assert isinstance(config, Config)
    return config


def _read(path: str | Path) -> bytes:
    """Raises ConfigError: the file cannot be read, or is of a known kind that is no text of UTF-8."""
    try:
        with open_regular(path) as stream:
            content = stream.read()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror or error}: "
                          f"{read_remedy(error, 'give the path of a YAML file or the name of a preset')}") from error
    if kind := kind_of_text(content[:START_BYTES].removeprefix(UTF8_MARK)):
        raise ConfigError(not_as_it_is(kind, path, "converted.yaml"))
    return content


def _to_blame(path: str | Path, overrides: Sequence[str], why: str, base: Mapping[str, Any] | None) -> str:
    """Where a value comes from that only the whole configuration refuses: the file, if it is refused so by itself; else
    the arguments whose keys the message names, or all of them."""
    try:
        read_config(path, base=base)
    except ConfigError as error:
        if str(error) == f"{path}: {why}":
            return str(path)
    named = [override for override in overrides
             if re.search(rf"(?<![\w.]){re.escape(override.partition('=')[0])}(?![\w])", why)]
    given = [repr(override) for override in named or overrides]
    return f"argument{'s' if len(given) > 1 else ''} {', '.join(given)}"


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal Config."""
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    return re.sub(r"^(  \w+)_:", r"\1:", text, flags=re.MULTILINE)  # a field such as `from_` is the key `from`


def _argument(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or override.startswith("-") or not all(parts):
        raise ConfigError("it is not of the form section.key=value")
    plain_string(key, "its key")
    value = parse_argument(key, text, hint_of(Config, parts))
    for part in reversed(parts):
        value = {field_of(part): value}
    return value


def _expanded_mixture(mixture: list[dict[str, Any]] | None, env: Mapping[str, str]) -> list[dict[str, Any]] | None:
    """The sources of a mixture with their paths expanded."""
    if mixture is None:
        return None
    return [{key: _expanded(f"data.mixture[{index}].{key}", value, env)
             if key in ("shards", "regions") and value is not None else value for key, value in entry.items()}
            for index, entry in enumerate(mixture)]


def _expanded(key: str, path: str, env: Mapping[str, str]) -> str:
    """A path with a leading `~`, and every $NAME, replaced."""
    missing = [name for name in _VARIABLE.findall(path) if not env.get(name)]
    if missing:
        raise ConfigError(f"{key}={path}: the environment variable {missing[0]} is not set: set it, or write the path "
                          "itself")
    found = os.path.expanduser(_VARIABLE.sub(lambda match: env[match[1]], path))
    if found.startswith("~"):
        raise ConfigError(f"{key}={path}: there is no such home directory: write the path itself")
    if _VARIABLE.search(found):  # config.yaml would be read as another path
        raise ConfigError(f"{key}={path}: becomes {found!r}, and a $NAME in a variable is not replaced: write the path "
                          "itself")
    return plain_string(found, f"{key}={path}")


def _explain(error: Exception) -> str:
    """OmegaConf's message without its trailing block, with the full key in front of it."""
    key = getattr(error, "full_key", None)
    if isinstance(error, MissingMandatoryValue):
        return f"{key} has no value, and there is no default for it: set it there, or as an argument {key}=..."
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    remedy = "; see hyena_dist/config/sections for the keys and their types" if key else ""
    return f"{key}: {first}{remedy}" if key and key not in first else first + remedy
