"""Bounds the workspace of an operator, which works through its channels in chunks of a fixed number of elements."""

from collections.abc import Iterator

CHUNK_ELEMENTS = 2**20
"""Elements of a chunk's largest real tensor. Small enough that a chunk's few temporaries stay near the cache, large
enough that an FFT call has rows for all threads; 2**18 to 2**20 measured alike, smaller chunks slower."""


def chunks(size: int, elements_per_item: int) -> Iterator[slice]:
    """Cut range(size) into slices of about CHUNK_ELEMENTS elements, at least one item each."""
    step = max(1, CHUNK_ELEMENTS // max(1, elements_per_item))
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
