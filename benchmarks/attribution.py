"""Which part of the model a call belongs to: decided by the functions of the project on the Python stack, the innermost
that says it. A backward pass has its own functions on the stack, and under them those of the forward pass."""

import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import hyena_dist
from hyena_dist.costs.roofline import (
    ATTENTION,
    DROPOUT,
    EMBEDDING,
    ENGINE,
    FILTER,
    GATES,
    HEAD,
    LONG_CONV,
    LOSS,
    MLP,
    NORMS,
    OPTIMIZER,
    PROJECTIONS,
    SHORT_CONV,
)

ROOT = Path(hyena_dist.__file__).parent

OWNERS = {
    "ops/norm": NORMS, "ops/short_conv": SHORT_CONV, "ops/implicit_filter": FILTER, "ops/long_conv": LONG_CONV,
    "ops/hyena": GATES, "ops/chunked": GATES, "ops/across": GATES, "ops/folded": PROJECTIONS,
    "ops/mlp": MLP, "ops/dropout": DROPOUT,
    "ops/embedding": EMBEDDING, "model/attention": ATTENTION, "model/layers": EMBEDDING, "model/loss": LOSS,
    "model/mixer": FILTER, "model/context": LONG_CONV, "parallel/distributed_fft": LONG_CONV, "model/heads": HEAD,
    "model/block": PROJECTIONS, "train/optim": OPTIMIZER, "torch/optim": OPTIMIZER, "engine": ENGINE,
    "torch/nn/utils": ENGINE, "torch/distributed/fsdp": ENGINE,
}
"""By module or package of the project, and of torch where it works for us. Modules that are not here belong to whom
they were called by."""
SERVES = {"ops/linear": {"ops/mlp": MLP, "model/heads": HEAD}}
"""Modules that belong to their caller where it is one of these, else to the last: a product of the projections."""


_Name = str | None
_Stack = tuple[str, ...]


class Attribution:
    """Remembers the forward pass's stack of every node of the graph, for its backward pass."""

    def __init__(self) -> None:
        self._forward: dict[int, _Stack] = {}

    def part(self, func: Any, args: Any) -> str:
        """Of the call that is being dispatched."""
        stack, function = _stack()
        node = torch._C._current_autograd_node()
        if node is None:
            # The node that this call makes, or the function that it is called by, has the number before the next.
            self._forward.setdefault(torch.autograd._get_sequence_nr() - 1, function or stack)
        else:
            stack += self._forward.get(node._sequence_nr(), ())
        found = _decide(stack)
        # A fused function has both at hand: only transforms work on complex numbers.
        return LONG_CONV if found == GATES and _is_complex(func, args) else found


def _stack() -> tuple[_Stack, _Stack]:
    """The modules on the Python stack that are known by name, innermost first, and those of them that stand outside
    the forward pass of an autograd function, if there is one."""
    frame: FrameType | None = sys._getframe(3)
    names: list[str] = []
    outside = 0
    while frame is not None:
        code = frame.f_code
        name = _name(code)
        if name is not None:
            if not names or names[-1] != name:
                names.append(name)
            if code.co_name == "forward" and code.co_varnames[:1] in (("ctx",), ("_ctx",)):
                outside = len(names)
        frame = frame.f_back
    return tuple(names), tuple(names[outside:]) if outside else ()


_names: dict[CodeType, _Name] = {}


def _name(code: CodeType) -> _Name:
    if code not in _names:
        _names[code] = _module(code.co_filename)
    return _names[code]


def _module(filename: str) -> _Name:
    path = Path(filename)
    if path.is_relative_to(ROOT):
        name = str(path.relative_to(ROOT).with_suffix(""))
    else:
        parts = path.with_suffix("").parts
        name = "/".join(parts[len(parts) - parts[::-1].index("torch") - 1:]) if "torch" in parts else ""
    known = [key for key in (*OWNERS, *SERVES) if name == key or name.startswith(key + "/")]
    return known[0] if known else None


_decided: dict[_Stack, str] = {}


def _decide(stack: _Stack) -> str:
    if stack not in _decided:
        _decided[stack] = _first(stack)
    return _decided[stack]


def _first(stack: _Stack) -> str:
    for place, name in enumerate(stack):
        if name not in SERVES:
            return OWNERS[name]
        caller = next((other for other in stack[place + 1 :] if other != name), "")
        return SERVES[name].get(caller, PROJECTIONS)
    return ENGINE  # the arithmetic between the parts


def _is_complex(func: Any, args: Any) -> bool:
    return "fft" in func.name() or any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in tree_leaves(args))
