"""Which window comes when: a pure function of (seed, stage, epoch, index) and the intervals, with nothing to store.

An epoch tiles every interval with windows of L + 1 bases at stride L, from a phase in [0, L) that is drawn anew for
each interval and epoch; the bases before the phase are a shorter window of their own. So every base but an interval's
first is a target exactly once per epoch. An interval of at most L + 1 bases is one window.

The same holds of k-mers that start every s bases: L + 1 of them are L s + k bases, windows stand at stride L s, and
the phase, in [0, L s), also draws in which of the s frames the interval is read in this epoch. Every k-mer of that
frame but the first is a target exactly once; fewer than s bases at each end belong to no k-mer of the frame. An
interval of one window is read in any frame in which it has as many k-mers as in the first.

The W windows of an epoch, counted along the genome, are cut into C = 64 blocks of equal size (to within one). Each
canonical stream shuffles one block, and window i of the epoch is number i // C of stream i mod C. Where the number of
data ranks divides C, a rank so reads C / ranks streams in an epoch, and no other part of the genome.

Where windows are packed, those of fewer than L + 1 bases share windows (`data.packing`). They are put together anew in
each epoch, in an order that is drawn for it; an epoch's windows are then counted with the full ones first.

Stream s reads block bit-reverse(s), so that neighbouring streams lie far apart: any 8 windows in a row come from 8
different eighths of the data. With neighbouring blocks a batch of few windows would be of one genome.

All draws are hashes (splitmix64) of integers and the shuffle is a Feistel network, so an order does not depend on the
version of any random generator, costs no memory, and starts anywhere at once.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np

from hyena_dist.data.packing import packed
from hyena_dist.data.tokenizer import NUCLEOTIDES, Tokenizer

CANONICAL_STREAMS = 64
_STREAM_BITS = CANONICAL_STREAMS.bit_length() - 1
_BLOCK = 4096
"""Windows whose places are computed together; more only cost memory, fewer cost time per window."""
_ROUNDS = 4
_PHASE, _REVERSE, _SHUFFLE, _PACK = range(4)
"""What a hash is for; keeps the draws apart."""


def mix(*words: int | np.ndarray) -> np.ndarray:
    """Hash integers and integer arrays, broadcast, to uint64."""
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        state = _mix_in(state, word)
    return state


def _mix_in(state: np.ndarray, word: int | np.ndarray) -> np.ndarray:
    """The hash of what `state` is the hash of, and one word more."""
    state = (state ^ np.asarray(word).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _feistel(values: np.ndarray, keys: np.ndarray, stream: np.ndarray, bits: int) -> np.ndarray:
    """A permutation of [0, 2 ** bits), one for each stream; elementwise."""
    low_bits = np.uint64(bits // 2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << np.uint64(bits - bits // 2)) - np.uint64(1)
    high, low = values >> low_bits, values & low_mask
    for turn in range(_ROUNDS):
        high ^= _mix_in(mix(keys, 2 * turn)[stream], low) & high_mask
        low ^= _mix_in(mix(keys, 2 * turn + 1)[stream], high) & low_mask
    return high << low_bits | low


def shuffled(positions: np.ndarray, sizes: np.ndarray, keys: np.ndarray, stream: np.ndarray) -> np.ndarray:
    """Where the permutation of [0, size) of a stream, chosen by its key, sends each position.

    Args:
        positions, stream: [n]; each position is one in this stream.
        sizes, keys: [streams].
    """
    bits = max(2, int(sizes.max()).bit_length())
    limits = sizes.astype(np.uint64)[stream]
    result = _feistel(positions.astype(np.uint64), keys, stream, bits)
    while (outside := np.flatnonzero(result >= limits)).size:
        result[outside] = _feistel(result[outside], keys, stream[outside], bits)
    return result.astype(np.int64)


def _bit_reversed() -> np.ndarray:
    """[C]: the block that each stream reads; its own inverse, so also the stream that reads each block."""
    return np.array([int(f"{stream:0{_STREAM_BITS}b}"[::-1], 2) for stream in range(CANONICAL_STREAMS)])


BLOCK_OF_STREAM = _bit_reversed()


class Window(NamedTuple):
    """Bases [start, end) of an interval, counted from the interval's start; at most those of L + 1 tokens. A packed
    window has several such pieces."""

    interval: int
    start: int
    end: int
    reverse: bool
    """Show the reverse complement."""


class _Tiling:
    """The windows of one epoch, counted along the genome."""

    def __init__(self, lengths: np.ndarray, seq_len: int, draw: np.ndarray, tokenizer: Tokenizer):
        stride = tokenizer.stride
        self.lengths, self.stride, self.step, self.width = lengths, stride, seq_len * stride, tokenizer.k
        after_first = np.maximum(lengths - tokenizer.k, 0)  # bases behind the first token
        frames = after_first % stride + 1  # of an interval of one window, those that do not cost it a token
        phases = np.where(after_first // stride > seq_len, np.uint64(self.step), frames.astype(np.uint64))
        self.phases = (draw % phases).astype(np.int64)
        self.has_head = (self.phases >= stride).astype(np.int64)
        targets = (after_first - self.phases) // stride
        counts = self.has_head + -(-targets // seq_len)
        self.first = np.concatenate(([0], np.cumsum(counts)))
        self.size = int(self.first[-1])

    def locate(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Interval, start and end of windows."""
        interval = np.searchsorted(self.first, windows, "right") - 1
        phase = self.phases[interval]
        start = phase + (windows - self.first[interval] - self.has_head[interval]) * self.step
        end = np.minimum(start + self.step + self.width, self.lengths[interval])
        return interval, np.maximum(start, phase % self.stride), end  # a head begins in the frame of the others

    def pieces(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pieces of windows, one after the other, for `locate`, and how many each window has."""
        return windows, np.ones_like(windows)


class Shared(NamedTuple):
    """What is packed of an epoch."""

    pieces: int
    """Those that are too short for a window."""
    windows: int
    """Which they share."""
    of_windows: int
    """All windows of the epoch."""


class _Packing:
    """The same of packed windows.

    Args:
        draw: of a number of pieces, a hash for each, by which they are ordered before they are packed.
    """

    def __init__(self, tiling: _Tiling, draw: Callable[[int], np.ndarray]) -> None:
        _, start, end = tiling.locate(np.arange(tiling.size))
        self.locate = tiling.locate
        tokens = (end - start - tiling.width) // tiling.stride + 1
        order = np.argsort(draw(tiling.size), kind="stable")
        self._members, self._first = packed(tokens, order, tiling.step // tiling.stride + 1)
        self.size = self._first.size - 1
        pieces = int(np.count_nonzero(tokens <= tiling.step // tiling.stride))
        self.shared = Shared(pieces, self.size - (tiling.size - pieces), self.size)

    def pieces(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        counts = self._first[windows + 1] - self._first[windows]
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self._members[np.repeat(self._first[windows], counts) + inside], counts


class WindowOrder:
    """The windows of intervals of these lengths in bases, for one seed, stage and sequence length in tokens.

    Args:
        pack: those of fewer than L + 1 tokens share windows.
    """

    def __init__(self, lengths: Sequence[int], seq_len: int, *, seed: int, stage: int,
                 tokenizer: Tokenizer = NUCLEOTIDES, pack: bool = False):
        self.lengths = np.array([max(length, 1) for length in lengths], dtype=np.int64)
        self.seq_len, self.seed, self.stage, self.tokenizer = seq_len, seed, stage, tokenizer
        self.pack = pack
        self._epoch_sizes: dict[int, int] = {}
        one_window = tokenizer.bases(seq_len + 2) - 1
        tokens = sum(tokenizer.tokens(length) for length in self.lengths.tolist()) if pack else 0
        self._one_size = bool((self.lengths <= one_window).all()) and (not pack or tokens <= seq_len + 1)
        """Whether all epochs are known to have as many windows, since every interval is one, or all share one. Then no
        epoch has to be packed to count its windows: a set of one short contig has as many epochs as windows."""
        self._reached = 0, 0
        """An epoch, and the windows of those before it."""
        self._tiling: tuple[int, _Tiling | _Packing] | None = None
        self._block: tuple[tuple[int, int], list[list[Window]]] | None = None

    def _tiling_of(self, epoch: int) -> _Tiling | _Packing:
        if self._tiling is None or self._tiling[0] != epoch:
            def draw(what: int, count: int) -> np.ndarray:
                return mix(what, self.seed, self.stage, epoch, np.arange(count))

            tiling = _Tiling(self.lengths, self.seq_len, draw(_PHASE, self.lengths.size), self.tokenizer)
            self._tiling = epoch, _Packing(tiling, partial(draw, _PACK)) if self.pack else tiling
        return self._tiling[1]

    def epoch_size(self, epoch: int) -> int:
        """Number of windows of an epoch."""
        if self._one_size:
            epoch = 0
        if epoch not in self._epoch_sizes:
            self._epoch_sizes[epoch] = self._tiling_of(epoch).size
        return self._epoch_sizes[epoch]

    def advance(self, epoch: int, index: int, windows: int) -> tuple[int, int]:
        """Epoch and index this many windows on."""
        index += windows
        if self._one_size:
            further, index = divmod(index, self.epoch_size(0))
            return epoch + further, index
        while index >= (size := self.epoch_size(epoch)):
            epoch, index = epoch + 1, index - size
        return epoch, index

    def locate(self, number: int) -> tuple[int, int]:
        """Epoch and index of a window that is counted from the first of epoch 0 on. Fast where the numbers grow."""
        epoch, first = self._reached if self._reached[1] <= number else (0, 0)
        epoch, index = self.advance(epoch, 0, number - first)
        self._reached = epoch, number - index
        return epoch, index

    def epochs(self, windows: int) -> float:
        """How many epochs the first windows are."""
        epoch, index = self.advance(0, 0, windows)
        return epoch + index / self.epoch_size(epoch)

    def window(self, epoch: int, index: int) -> Window:
        """Window `index` of an epoch; of a packed one the first piece."""
        return self.pieces(epoch, index)[0]

    def pieces(self, epoch: int, index: int) -> list[Window]:
        """The pieces of window `index` of an epoch, one after the other; only a packed one has several."""
        key = epoch, index // _BLOCK
        if self._block is None or self._block[0] != key:
            self._block = key, self._compute(epoch, key[1] * _BLOCK)
        return self._block[1][index % _BLOCK]

    def shared(self, epoch: int) -> Shared:
        """What of an epoch is packed; nothing, where windows are not."""
        tiling = self._tiling_of(epoch)
        return tiling.shared if isinstance(tiling, _Packing) else Shared(0, 0, tiling.size)

    def _compute(self, epoch: int, first: int) -> list[list[Window]]:
        tiling = self._tiling_of(epoch)
        indices = np.arange(first, min(first + _BLOCK, tiling.size))
        stream, position = indices % CANONICAL_STREAMS, indices // CANONICAL_STREAMS
        size, longer = divmod(tiling.size, CANONICAL_STREAMS)
        sizes = size + (np.arange(CANONICAL_STREAMS) < longer)  # of the streams: the first get the last, broken round
        block_ends = np.cumsum(sizes[BLOCK_OF_STREAM])
        first_windows = block_ends[BLOCK_OF_STREAM] - sizes
        keys = mix(_SHUFFLE, self.seed, self.stage, epoch, np.arange(CANONICAL_STREAMS))
        windows = first_windows[stream] + shuffled(position, sizes, keys, stream)
        reverse = mix(_REVERSE, self.seed, self.stage, epoch, indices) & np.uint64(1) == 1
        numbers, counts = tiling.pieces(windows)
        columns = (*tiling.locate(numbers), np.repeat(reverse, counts))
        pieces = map(Window, *(column.tolist() for column in columns))
        return [list(islice(pieces, count)) for count in counts.tolist()]
