"""YAML as a person reads it: the text of a file or of a command line's value, turned into plain values.

YAML 1.1, which most readers follow, makes numbers of `010` (8), `1_000`, `1:30` (90) and switches of `on` and `no`. A
key of type string keeps its text here; everywhere else what can be read in two ways is refused.
"""

import re
import types
from dataclasses import is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from hyena_dist.config.errors import ConfigError

_DEPTH = 20
"""Of mappings and lists inside each other; no configuration needs more than a few."""
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_SWITCHES = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_OTHER_SWITCHES = frozenset({"on", "off", "yes", "no"})
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_AMBIGUOUS = re.compile(r"[-+]?(0[0-9_]+|0[xXoObB][0-9a-fA-F_]+|[0-9][0-9_]*_[0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9_]+)?"
                        r"|[0-9][0-9_.]*(:[0-9_.]+)+)")
"""A leading zero (octal to some), other bases, underscores, base 60."""


def parse_yaml(text: str, hint: Any) -> Any:
    """A YAML document as mappings, lists and scalars, read by the types of a dataclass.

    Args:
        hint: the type of the document, a dataclass for instance; Any: nothing is known of it.

    Raises:
        ConfigError: a duplicate key, an anchor, a tag, an interpolation, or a scalar that can be read in two ways;
            names the key or the line.
        yaml.YAMLError: no YAML, or more than one document.
    """
    node = _composed(text)
    return None if node is None else _value(node, hint, "")


def parse_argument(key: str, text: str, hint: Any) -> Any:
    """The value of a command line's `key=text`: a string where a string is wanted, else YAML.

    Raises:
        ConfigError, yaml.YAMLError: as `parse_yaml`; also a text that is only a comment, or empty.
    """
    if _plain_type(hint) is str and not text.startswith(("'", '"')):
        if text in _NULL - {"", "~"}:
            raise ConfigError(f"{key} must be a string, got {text}: write it in quotes where it is one")
        return plain_string(text, key)
    node = _composed(text)
    if node is None or (isinstance(node, yaml.ScalarNode) and node.value == "" and node.style is None):
        raise ConfigError(f"{key} has no value: write null where none is meant")
    return _value(node, hint, key)


def hint_of(hint: Any, path: list[str]) -> Any:
    """The type of a key that lies inside a dataclass; Any: nothing is known of it."""
    for name in path:
        hint = get_type_hints(hint).get(name, Any) if is_dataclass(hint) else Any
    return hint


def plain_string(text: str, key: str) -> str:
    """The text itself.

    Raises:
        ConfigError: it holds an interpolation, with which OmegaConf would show what is in this process, or is its
            word for a missing value.
    """
    if text == "???":  # what OmegaConf takes for no value, and passes over
        raise ConfigError(f"{key} has no value: write one instead of ???")
    if "${" in text:
        raise ConfigError(f"{key}: {text!r}: ${{...}} is not replaced in a configuration: write the value itself, or "
                          "$NAME in a path")
    return text


def _composed(text: str) -> yaml.Node | None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        # An alias can stand for a whole file, again and again; a tag for any type.
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise ConfigError(f"line {event.start_mark.line + 1}: anchors, aliases and tags are not read: write the "
                              "value itself")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEPTH:
            raise ConfigError(f"line {event.start_mark.line + 1}: more than {_DEPTH} mappings inside each other")
    return yaml.compose(text, Loader=yaml.SafeLoader)


def _value(node: yaml.Node, hint: Any, key: str) -> Any:
    if isinstance(node, yaml.MappingNode):
        found: dict[Any, Any] = {}
        for name_node, value_node in node.value:
            name = _value(name_node, str, key)
            inner = f"{key}.{name}" if key else str(name)
            if not isinstance(name, str) or name == "<<":
                raise ConfigError(f"{inner}: line {name_node.start_mark.line + 1}: a key must be a word")
            if name in found:
                raise ConfigError(f"{inner}: duplicate key in line {name_node.start_mark.line + 1}")
            found[name] = _value(value_node, hint_of(hint, [name]), inner)
        return found
    if isinstance(node, yaml.SequenceNode):
        element = get_args(hint)[0] if get_origin(hint) in (tuple, list) else Any
        return [_value(item, element, f"{key}[{index}]") for index, item in enumerate(node.value)]
    return _scalar(node.value, hint, key, plain=node.style is None)


def _scalar(text: str, hint: Any, key: str, *, plain: bool) -> Any:
    wanted = _plain_type(hint)
    if wanted is str:
        if plain and text in _NULL - {"~"}:
            raise ConfigError(f"{key} has no value: write '' for an empty string, or quotes around a word")
        return plain_string(text, key)
    if plain and text in _NULL:
        return None
    if text in _SWITCHES and (plain or wanted is bool):
        return _SWITCHES[text]
    if wanted is bool:
        raise ConfigError(f"{key}: write true or false, got {text!r}")
    if plain and text.lower() in _OTHER_SWITCHES:
        raise ConfigError(f"{key}: {text!r} can be read as a switch or a word: write true or false, or quotes around "
                          "a word")
    if _AMBIGUOUS.fullmatch(text.strip()) and (plain or wanted in (int, float)):
        raise ConfigError(f"{key}: {text!r} can be read as different numbers: write it in plain decimal digits, or in "
                          "quotes where no number is meant")
    if plain and _WHOLE.fullmatch(text):
        return int(text)
    if plain and _NUMBER.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return plain_string(text, key)


def _plain_type(hint: Any) -> Any:
    """`int | None` is int."""
    if get_origin(hint) in (Union, types.UnionType):
        [hint] = [choice for choice in get_args(hint) if choice is not type(None)]
    return hint
