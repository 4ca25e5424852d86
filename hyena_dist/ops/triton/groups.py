"""Bounds the workspace: the channels go through the kernels in groups, one after the other."""

from collections.abc import Iterator


def channel_groups(channels: int, elements_per_channel: int, limit: int) -> Iterator[slice]:
    """Cut range(channels) into slices of at most `limit` elements, at least one channel each, and all about as
    large."""
    groups = min(channels, -(-channels * elements_per_channel // limit))
    for i in range(groups):
        yield slice(channels * i // groups, channels * (i + 1) // groups)
