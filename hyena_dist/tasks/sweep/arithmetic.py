"""Numbers that follow from other numbers: `0.1 * train.steps` as a person writes it in a sweep, never as code."""

import ast
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

from hyena_dist.config.errors import ConfigError, one_line

Value = int | float
Lookup = Callable[[str], Value]

_MOST_POWER = 64
"""Beyond it a power of two small numbers takes longer to write down than a run."""
_MOST_LETTERS = 300


def _power(base: Value, exponent: Value) -> Value:
    if abs(exponent) > _MOST_POWER or abs(base) > 2**53:
        raise ValueError(f"a power has a base of at most 2**53 and an exponent of at most {_MOST_POWER}")
    value = base**exponent
    if isinstance(value, complex):
        raise ValueError("the root of a negative number is no number here")
    return value


_TWO: dict[type[ast.operator], Callable[[Value, Value], Value]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: _power}
_ONE: dict[type[ast.unaryop], Callable[[Value], Value]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS: dict[str, Callable[..., Value]] = {
    "min": min, "max": max, "round": round, "floor": math.floor, "ceil": math.ceil, "sqrt": math.sqrt, "log": math.log,
    "log2": math.log2}


def evaluate(text: str, lookup: Lookup) -> Value:
    """The value of an expression of numbers, keys like train.steps, + - * / // % **, parentheses and a few functions.

    Args:
        lookup: the value of a key.

    Raises:
        ConfigError: it holds something else, or has no finite value.
    """
    try:
        value = _value(_parsed(text), lookup)
        finite = math.isfinite(value)
    except ConfigError:
        raise
    except (ArithmeticError, ValueError, TypeError) as error:
        raise ConfigError(f"{text!r} has no value: {one_line(error)}") from error
    if not finite:
        raise ConfigError(f"{text!r} has no finite value")
    return value


def keys_in(text: str) -> list[str]:
    """The keys that an expression reads.

    Raises:
        ConfigError: it is no expression of the kind that `evaluate` reads.
    """
    return list(dict.fromkeys(_keys(_parsed(text))))


def _parsed(text: str) -> ast.expr:
    if len(text) > _MOST_LETTERS:
        raise ConfigError(f"{text[:40]!r}... is longer than {_MOST_LETTERS} letters: write a shorter expression")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{text!r} is no expression: write numbers and keys, as in 0.1 * train.steps") from error


def _key(node: ast.expr) -> str | None:
    """`section.key`, if that is what a node is."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    return None


def _keys(node: ast.expr) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute):
            yield _key(inner) or ast.unparse(inner)


def _value(node: ast.expr, lookup: Lookup) -> Value:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    if key := _key(node):
        return lookup(key)
    if isinstance(node, ast.BinOp) and type(node.op) in _TWO:
        return _TWO[type(node.op)](_value(node.left, lookup), _value(node.right, lookup))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _ONE:
        return _ONE[type(node.op)](_value(node.operand, lookup))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and node.args \
            and not node.keywords and not any(isinstance(argument, ast.Starred) for argument in node.args):
        arguments: list[Any] = [_value(argument, lookup) for argument in node.args]
        return _FUNCTIONS[node.func.id](*arguments)
    raise ConfigError(f"{ast.unparse(node)!r} cannot be computed: use numbers, keys like train.steps, + - * / // % **, "
                      f"and {', '.join(_FUNCTIONS)}")
