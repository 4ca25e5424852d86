"""Token ids that are none: an error where that costs nothing to find out."""

from torch import Tensor


def refuse_outside(what: str, ids: Tensor, outside: Tensor, size: int) -> None:
    """Refuse ids where `outside` is true, on a CPU. On a device the answer would take a synchronisation in every step:
    there the caller lets its result become NaN, which a run takes for what it is, a step that is not finite.

    Args:
        ids, outside: of one shape, [B, L].
        size: of the vocabulary, for the message.

    Raises:
        ValueError: naming the first such id and its place.
    """
    if ids.device.type == "cpu" and outside.any():
        place = tuple(outside.nonzero()[0].tolist())
        raise ValueError(f"{what}{list(place)} is {ids[place].item()}, which is outside the vocabulary of 0 to "
                         f"{size - 1}")
