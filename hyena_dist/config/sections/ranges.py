"""What a single value of a section may be. Each function raises a ValueError that names section, key and value."""

import math

MOST = 2**53
"""No whole number is greater: those up to it are exact in every format that a run writes."""


def positive(section: str, **values: float) -> None:
    """Refuse values of a section that are not greater than 0 and finite."""
    for key, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{section}.{key} must be greater than 0 and finite, got {value}")
        _not_beyond(section, key, value)


def not_negative(section: str, **values: float) -> None:
    """Refuse values of a section that are less than 0 or not finite."""
    for key, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{section}.{key} must be 0 or greater and finite, got {value}")
        _not_beyond(section, key, value)


def _not_beyond(section: str, key: str, value: float) -> None:
    if isinstance(value, int) and value > MOST:
        raise ValueError(f"{section}.{key} must be at most 2**53, got {value}")


def seed_in_range(section: str, value: int) -> None:
    """Refuse a seed that is not a 32-bit whole number."""
    if not 0 <= value < 2**32:
        raise ValueError(f"{section}.seed must be at least 0 and less than 2**32, got {value}")


def probability(section: str, **values: float) -> None:
    """Refuse values of a section outside [0, 1)."""
    for key, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{section}.{key} must be at least 0 and less than 1, got {value}")


def path(section: str, **values: str) -> None:
    """Refuse paths that are empty or that no file system takes."""
    for key, value in values.items():
        if not value.strip() or "\0" in value:
            raise ValueError(f"{section}.{key} must be a path, got {value!r}")


def one_of(section: str, key: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{section}.{key} must be one of {', '.join(choices)}, got {value!r}")
