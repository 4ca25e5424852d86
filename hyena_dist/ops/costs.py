"""What a custom operator moves and computes, as it declares itself.

A count of a step sees the signature of a call, and of torch's own operators it knows what happens behind it. A kernel
of ours may read an input twice, or write an intermediate that nobody is given: it says so where it is registered.
"""

from collections.abc import Callable
from dataclasses import dataclass

_declared: dict[str, Callable[..., "Cost"]] = {}


@dataclass(frozen=True)
class Cost:
    """Of one call or of many."""

    bytes: float = 0.0
    """Read and written: intermediates and what is read again included."""
    flops: float = 0.0
    """Of products and transforms, as `scaling.flops` counts."""
    launches: int = 0
    """Kernels that are started."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops, self.launches + other.launches)


def declare_cost(operator: str, cost: Callable[..., Cost]) -> None:
    """Declare the cost of a custom operator, "namespace::name": a function of its arguments, which may be on meta."""
    assert operator not in _declared, f"{operator} has declared its cost"
    _declared[operator] = cost


def declared_cost(operator: str) -> Callable[..., Cost] | None:
    """What an operator has declared."""
    return _declared.get(operator)
