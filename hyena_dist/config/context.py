"""How a convolution crosses context ranks, as far as it follows from sizes."""


def exchanged_rows(*, channels: int, batch: int, groups: int) -> int:
    """The rows of an overlap group that an all-to-all deals out to the context ranks: a row is a channel of one window.

    Args:
        channels: of a tensor rank.
        batch: windows of a micro-batch.
        groups: parallel.overlap_groups.
    """
    return channels // groups * batch


def deals_out(rows: int, ranks: int) -> bool:
    """Whether each of the context ranks gets as many rows as the others, without which there is no all-to-all."""
    return rows % ranks == 0


def choose_method(method: str, *, rows: int, ranks: int) -> str:
    """Resolve parallel.context_method=auto: all_to_all where it can deal out its rows, else distributed_fft, which
    sends several times the bytes and has no such limit."""
    if method != "auto":
        return method
    return "all_to_all" if deals_out(rows, ranks) else "distributed_fft"
