"""Numbers as people read them."""

_UNITS = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand"))

MANY_EPOCHS = 4
"""After about so many the same text teaches a language model little more (Muennighoff et al. 2023)."""
TEACHES_LITTLE = f"past about {MANY_EPOCHS} times the same bases teach little more"


def duration(seconds: float) -> str:
    """`7 s`, `3 min 52 s`, `2 h 5 min`, `1 d 3 h`."""
    total = round(seconds)
    for size, unit, part, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if total >= size:
            rest = total % size // part
            return f"{total // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{total} s"


def scale_of(largest: float) -> tuple[float, str]:
    """The unit in which a number of this size is read, and its name; 1 and nothing below ten thousand."""
    if largest < 1e4:
        return 1.0, ""
    return next((unit, name) for unit, name in _UNITS if largest >= unit)


def amount(number: float) -> str:
    """`512`, `8,192`, `3.93 million`."""
    unit, name = scale_of(number)
    return f"{number / unit:.3g} {name}" if name and number >= 1e5 else f"{number:,.0f}"


def score(value: float) -> str:
    """A perplexity, to four decimals where there is room for them."""
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3g}"


def binary(size: float) -> str:
    """Bytes as KiB, from 1 MiB on as MiB, and from 1 GiB on as GiB."""
    if size < 2**20:
        return f"{size / 2**10:,.0f} KiB"
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def counted(number: int, noun: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
