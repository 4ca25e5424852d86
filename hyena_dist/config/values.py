"""YAML as a person reads it: the text of a file or of a command line's value, turned into plain values.

YAML 1.1, which most readers follow, makes numbers of `010` (8), `1_000`, `1:30` (90) and switches of `on` and `no`. A
key of type string keeps its text here; everywhere else what can be read in two ways is refused.
"""

import keyword
import re
import types
from dataclasses import is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from hyena_dist.config.errors import ConfigError

_DEPTH = 20
"""Of mappings and lists inside each other; no configuration needs more than a few."""
_DIGITS = 18
"""Of a whole number; all of that many fit in 64 bits."""
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
        ConfigError: a duplicate key, an anchor, a tag, an interpolation, a value of another type, or a scalar that can
            be read in two ways; names the key or the line.
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
        if hint is not str and text in _NULL - {"", "~"}:
            return None
        if text in _NULL - {"", "~"}:
            raise ConfigError(f"{key} must be a string, got {text}: write it in quotes where it is one")
        return plain_string(text, key)
    node = _composed(text)
    if node is None or (isinstance(node, yaml.ScalarNode) and node.value == "" and node.style is None):
        raise ConfigError(f"{key} has no value: write null where none is meant")
    return _value(node, hint, key)


def hint_of(hint: Any, path: list[str]) -> Any:
    """The type of a key that lies inside a dataclass; Any: nothing is known of it."""
    for name in map(field_of, path):
        hint = get_type_hints(hint).get(name, Any) if is_dataclass(hint) else Any
    return hint


def field_of(key: str) -> str:
    """The name of the dataclass field that holds a key: Python has no field called `from`, so it is `from_`."""
    return f"{key}_" if keyword.iskeyword(key) else key


def plain_string(text: str, key: str) -> str:
    """The text itself.

    Raises:
        ConfigError: it holds an interpolation, with which OmegaConf would show what is in this process, or is its
            word for a missing value; or it cannot be written in UTF-8, as a path of other bytes.
    """
    if text == "???":  # what OmegaConf takes for no value, and passes over
        raise ConfigError(f"{key} has no value: write one instead of ???")
    if "${" in text:
        raise ConfigError(f"{key}: {text!r}: ${{...}} is not replaced in a configuration: write the value itself, or "
                          "$NAME in a path")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ConfigError(f"{key}: {text!a} is not text of UTF-8: write another name")
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
    wanted = _plain_type(hint)
    if isinstance(node, yaml.MappingNode):
        if not (wanted is Any or is_dataclass(wanted) or get_origin(wanted) is dict):
            raise ConfigError(f"{key}: write {_what(wanted)}, got keys and values")
        found: dict[Any, Any] = {}
        for name_node, value_node in node.value:
            name = name_node.value
            inner = f"{key}.{name}" if key else str(name)
            if not isinstance(name, str) or name in _NULL | {"<<"}:
                raise ConfigError(f"{inner}: line {name_node.start_mark.line + 1}: a key must be a word")
            plain_string(name, f"line {name_node.start_mark.line + 1}: the key")
            held = field_of(name) if is_dataclass(wanted) else name
            if held in found:
                raise ConfigError(f"{inner}: duplicate key in line {name_node.start_mark.line + 1}")
            found[held] = _value(value_node, hint_of(hint, [name]), inner)
        return found
    if isinstance(node, yaml.SequenceNode):
        of_list = get_args(wanted) if get_origin(wanted) is tuple else [Any] * len(node.value)
        if not (wanted is Any or get_origin(wanted) is tuple) or len(of_list) != len(node.value):
            raise ConfigError(f"{key or 'the file'}: write {_what(wanted)}, got a list of {len(node.value)}")
        return [_value(item, element, f"{key}[{index}]")
                for index, (item, element) in enumerate(zip(node.value, of_list, strict=True))]
    return _scalar(node.value, hint, key, plain=node.style is None)


def _scalar(text: str, hint: Any, key: str, *, plain: bool) -> Any:
    wanted = _plain_type(hint)
    if wanted is str:
        if plain and text in _NULL:
            if hint is not str:  # a word, or null
                return None
            raise ConfigError(f"{key} has no value: write '' for an empty string, or quotes around a word ({text!r})")
        return plain_string(text, key)
    if plain and text in _NULL:
        if wanted is hint and wanted is not Any and key:
            raise ConfigError(f"{key} has no value: write {_what(wanted)}, or leave the key out")
        return None
    if wanted is bool or (wanted is Any and plain and text in _SWITCHES):
        if text not in _SWITCHES:
            raise ConfigError(f"{key}: write true or false, got {text!r}")
        return _SWITCHES[text]
    if plain and text.lower() in _OTHER_SWITCHES:
        raise ConfigError(f"{key}: {text!r} can be read as a switch or a word: write true or false, or quotes around "
                          "a word")
    if _AMBIGUOUS.fullmatch(text.strip()) and (plain or wanted in (int, float)):
        raise ConfigError(f"{key}: {text!r} can be read as different numbers: write it in plain decimal digits, or in "
                          "quotes where no number is meant")
    if wanted in (int, float) or (wanted is Any and plain and _NUMBER.fullmatch(text)):
        return _number(text, wanted, key)
    if wanted is not Any:
        raise ConfigError(f"{key or 'the file'}: write {_what(wanted)}, got {text!r}")
    return plain_string(text, key)


def _number(text: str, wanted: Any, key: str) -> int | float:
    whole = _WHOLE.fullmatch(text)
    if not (whole if wanted is int else _NUMBER.fullmatch(text)):
        raise ConfigError(f"{key}: write {_what(wanted)}, got {text!r}")
    if wanted is float or not whole:
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if len(text.lstrip("+-")) > _DIGITS:
        raise ConfigError(f"{key}: {text[:_DIGITS]}... is too large: write a number of at most {_DIGITS} digits")
    return int(text)


def _what(wanted: Any) -> str:
    """What to write for a value of a type."""
    if get_origin(wanted) is tuple:
        return f"a list like [{', '.join('0.9' for _ in get_args(wanted))}]"
    return {str: "a word", bool: "true or false", int: "a whole number", float: "a number"}.get(
        wanted, "keys and values, each key with its value behind a colon")


def _plain_type(hint: Any) -> Any:
    """`int | None` is int."""
    if get_origin(hint) in (Union, types.UnionType):
        [hint] = [choice for choice in get_args(hint) if choice is not type(None)]
    return hint
