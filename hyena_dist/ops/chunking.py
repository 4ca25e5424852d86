"""Bounds the workspace of an operator, which works through its rows, channels or tokens in chunks of a fixed number of
elements."""

from collections.abc import Iterator

import torch

CHUNK_ELEMENTS = 2**17
"""Elements of a chunk's largest real tensor, for each thread of a CPU. A chunk's few temporaries stay in the cache, and
their memory is used again: fresh pages cost a CPU more than the arithmetic on them."""

LEAST_SEQUENCES = 8
"""Sequences of a chunk that is transformed, while they are not more than this many times CHUNK_ELEMENTS: a plan is made
for every call, and the threads of a CPU share the sequences."""

LEAST_TOKENS = 512
"""Tokens of a chunk that is the side of a matrix product, which is slower with fewer, and with an odd number."""

FORK_FACTOR = 2
"""How many times larger each thread's part of a chunk is where a CPU has several: every call starts and joins them."""

GPU_FACTOR = 256
"""How many times larger a chunk is elsewhere: a GPU has no cache to stay in, needs the work, and calls cost it more."""

GPU_TOKEN_FACTOR = 512
"""The same of a chunk of tokens that is the side of a matrix product: its temporaries are fewer and in half precision
half as large."""

MOST_PRODUCT_CHUNKS = 5
"""Into so many chunks a GPU cuts the tokens for matrix products at the most: each chunk is a dozen launches, and the
temporaries of a fifth of the tokens are little beside what all of them have."""


def chunks(size: int, elements_per_item: int, device: torch.device) -> Iterator[slice]:
    """Cut range(size) into slices of about CHUNK_ELEMENTS elements, at least one item each."""
    yield from _slices(size, max(1, chunk_elements(device) // max(1, elements_per_item)))


def channel_chunks(channels: int, batch: int, length: int, device: torch.device) -> Iterator[slice]:
    """Cut range(channels) of [batch, channels, length] into slices for transforms."""
    yield from _slices(channels, max(1, transform_elements(length, device) // (batch * length)))


def token_chunks(tokens: int, width: int, device: torch.device) -> Iterator[slice]:
    """Cut range(tokens), of tokens `width` elements wide, into slices for matrix products."""
    least = width * LEAST_TOKENS
    yield from _slices(tokens, LEAST_TOKENS * max(1, product_elements(device, tokens * width, least) // least))


def row_chunks(rows: int, length: int, elements_per_token: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Cut [rows, length] into pieces of whole rows, or of one row's tokens where a row is too long."""
    row = max(1, length * elements_per_token)
    for part in _slices(rows, max(1, product_elements(device, rows * row) // row)):
        count = part.stop - part.start
        for tokens in token_chunks(length, count * elements_per_token, device):
            yield part, tokens


def chunk_elements(device: torch.device) -> int:
    """Elements of a chunk's largest real tensor on a device."""
    forks = FORK_FACTOR if device.type == "cpu" and torch.get_num_threads() > 1 else 1
    return forks * _parallel_elements(device)


def product_elements(device: torch.device, elements: int, multiple: int = 1) -> int:
    """The same of one that is the side of a matrix product, of so many elements in all, which are cut at multiples."""
    if device.type == "cpu":
        return chunk_elements(device)
    return max(CHUNK_ELEMENTS * GPU_TOKEN_FACTOR, -(-elements // (MOST_PRODUCT_CHUNKS * multiple)) * multiple)


def transform_elements(length: int, device: torch.device) -> int:
    """The same of one that is transformed: no larger for a fork, because transforms need the cache more."""
    return max(_parallel_elements(device), LEAST_SEQUENCES * min(length, CHUNK_ELEMENTS))


def _parallel_elements(device: torch.device) -> int:
    return CHUNK_ELEMENTS * (torch.get_num_threads() if device.type == "cpu" else GPU_FACTOR)


def _slices(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
