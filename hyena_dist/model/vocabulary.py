"""Token ids that are none: an error where that costs nothing to find out."""

from torch import Tensor


def outside_vocabulary(ids: Tensor, size: int) -> Tensor:
    """Which ids are not in 0 to size - 1: bool of their shape."""
    return ids != ids.clamp(0, size - 1)


def refuse_outside(what: str, ids: Tensor, size: int, *, only: Tensor | None = None) -> None:
    """Refuse ids outside a vocabulary of this size on a CPU, of all or of those where `only` is true. On a device the
    answer would take a synchronisation in every step: there the caller lets its result become NaN, which a run takes
    for what it is, a step that is not finite.

    Raises:
        ValueError: naming the first such id and its place.
    """
    if ids.device.type != "cpu":
        return
    outside = outside_vocabulary(ids, size) if only is None else outside_vocabulary(ids, size) & only
    if outside.any():
        place = tuple(outside.nonzero()[0].tolist())
        raise ValueError(f"{what}{list(place)} is {ids[place].item()}, which is outside the vocabulary of 0 to "
                         f"{size - 1}")
