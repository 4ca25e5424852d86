"""Windows of the shards as batches of token ids, for training and for validation.

Training batches follow `WindowOrder`. Window number g of a stage goes to data rank g mod dp_size, so a position in the
order is one integer for all ranks, and a resume at another number of ranks, workers or micro-batches goes on with
exactly the windows that come next. In a mixture the source of a window follows from its number alone
(`data/mixture.py`), so all of this is true of several shard sets as of one. No buffer is shuffled and nothing is drawn
while reading: worker processes may read ahead, but what comes, and when, never depends on them.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from hyena_dist.data.errors import DataError
from hyena_dist.data.manifest import Interval, Manifest
from hyena_dist.data.mixture import Change, MixtureOrder
from hyena_dist.data.order import WindowOrder, mix
from hyena_dist.data.packing import packed_by_kind
from hyena_dist.data.pool import Pool, identity_of
from hyena_dist.data.rows import Part, content, read_pieces
from hyena_dist.data.tokenizer import IGNORE, NUCLEOTIDES, PAD, Tokenizer
from hyena_dist.data.trainable import training_intervals
from hyena_dist.data.workers import read_ahead

STATE_VERSION = 2
"""Of the order of windows: 1 gave neighbouring streams neighbouring blocks."""
_EPOCH_SHIFT = 40
"""Windows are numbered epoch * 2 ** 40 + index."""
_MOST_EPOCHS = 1 << (63 - _EPOCH_SHIFT)
"""Whose numbers are int64."""


class Batch(NamedTuple):
    """Windows of one micro-batch, or a context rank's part of them, in the host's memory."""

    ids: torch.Tensor
    """[B, l + 1], uint8 or of k-mers int32, padded with [PAD] on the right; `tokenizer.split_window` makes inputs and
    targets of them."""
    windows: torch.Tensor
    """int64 [B], a number of each window that is its own within the stage."""
    scored: float
    """How many bases the scored targets tell, `tokenizer.stride` each; where soft-masked ones have a weight, the sum of
    the weights."""
    soft: torch.Tensor | None = None
    """bool [B, l], which targets are soft-masked; None: nobody asked."""
    tokenizer: Tokenizer = NUCLEOTIDES
    segments: Sequence[Sequence[int]] | None = None
    """Of packed windows: the offsets of the pieces of each row, over all context ranks (`ops.segments`)."""
    across: torch.Tensor | None = None
    """bool [B, l], of packed windows: which targets are of another piece than their input, and not scored."""

    def scored_by_row(self) -> torch.Tensor:
        """int64 [B, 2], how many bases the scored targets of each window tell, those that are soft-masked apart:
        second, where somebody asked for them."""
        scored = torch.from_numpy(self.tokenizer.scored(self.ids.numpy()))
        if self.across is not None:
            scored &= ~self.across
        masked = torch.zeros_like(scored) if self.soft is None else scored & self.soft
        return self.tokenizer.stride * torch.stack([(scored & ~masked).sum(-1), masked.sum(-1)], -1)

    def soft_on(self, device: torch.device) -> torch.Tensor | None:
        """`soft` on a device; the host does not wait for the copy."""
        return None if self.soft is None else _sent(self.soft, device)

    def to(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """input_ids [B, l], targets [B, l] and windows [B] on a device, int64; the host does not wait for the copy."""
        inputs, targets = self.tokenizer.split_window(_sent(self.ids, device))
        if self.across is not None:
            targets.masked_fill_(_sent(self.across, device), IGNORE)
        return inputs, targets, _sent(self.windows, device)


def _sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


@dataclass(frozen=True)
class StreamState:
    """The next window to train on; the same on every rank."""

    stage: int = 0
    epoch: int = 0
    index: int = 0


def _batch(tokenizer: Tokenizer, ids: np.ndarray, numbers: np.ndarray, scored: float, soft: np.ndarray | None,
           segments: list[tuple[int, ...]] | None, beyond: np.ndarray | None) -> Batch:
    return Batch(torch.from_numpy(ids), torch.from_numpy(numbers), scored,
                 None if soft is None else torch.from_numpy(soft), tokenizer, segments,
                 None if beyond is None else torch.from_numpy(beyond))


class _Windows:
    """The windows of an order, read a micro-batch at a time by their numbers.

    Args:
        places: of every interval of the order, the shards that it is in and its first base there.
    """

    def __init__(self, places: list[tuple[Manifest, int]], order: WindowOrder | MixtureOrder, rc_augment: bool,
                 part: Part, lower_case_weight: float, tokenizer: Tokenizer, *, pack: bool):
        self.places, self.order, self.rc_augment, self.part = places, order, rc_augment, part
        self.lower_case_weight, self.tokenizer, self.pack = lower_case_weight, tokenizer, pack

    def read(self, numbers: list[int]) -> tuple[Any, ...]:
        """The content of a batch, as arrays."""
        ids = np.full((len(numbers), self.part.tokens + 1), PAD, dtype=self.tokenizer.dtype)
        weighted, sizes = self.lower_case_weight != 1, []
        for row, number in zip(ids, numbers, strict=True):
            epoch = number >> _EPOCH_SHIFT
            pieces = self.order.pieces(epoch, number - (epoch << _EPOCH_SHIFT))
            places = [(*self.places[piece.interval], piece.start, piece.end) for piece in pieces]
            sizes.append(read_pieces(self.tokenizer, row, self.part, places, soft=weighted,
                                     reverse=self.rc_augment and pieces[0].reverse))
        return content(self.tokenizer, ids, numbers, sizes, self.part, soft=weighted, weight=self.lower_case_weight,
                       pack=self.pack)


class _RankNumbers:
    """The numbers of the windows of one rank, a micro-batch at a time, without end."""

    def __init__(self, order: WindowOrder | MixtureOrder, start: StreamState, micro_batch_size: int, dp_rank: int,
                 dp_size: int):
        self.order, self.start = order, start
        self.micro_batch_size, self.dp_rank, self.dp_size = micro_batch_size, dp_rank, dp_size

    def __iter__(self) -> Iterator[list[int]]:
        epoch, index = self.order.advance(self.start.epoch, self.start.index, self.dp_rank)
        while True:
            numbers = []
            for _ in range(self.micro_batch_size):
                numbers.append((epoch << _EPOCH_SHIFT) + index)
                index += self.dp_size
                if index >= self.order.epoch_size(epoch):
                    epoch, index = self.order.advance(epoch, index, 0)
            yield numbers


class TrainStream:
    """The training windows of one or several pools at one sequence length, without end.

    Args:
        pools: a manifest, for all of its training bases; or the sources of a mixture.
        seq_len: L; windows have L + 1 tokens.
        seed: draws the order.
        rc_augment: show each window, with probability 1/2, as its reverse complement.
        stage: number of the length warm-up's stage; each stage has its own order.
        weights: of several pools, from which window on.
        lower_case_weight: how much a soft-masked base counts in the loss; batches say which are where it is not 1.
        tokenizer: makes tokens of the bases.
        pack: stretches that do not fill a window share one (`data.packing`), with those of the same pool.

    Raises:
        DataError: a pool has no training base to score.
    """

    def __init__(self, pools: Manifest | Sequence[Pool], *, seq_len: int, seed: int, rc_augment: bool = False,
                 stage: int = 0, weights: Sequence[Change] = (), lower_case_weight: float = 1.0,
                 tokenizer: Tokenizer = NUCLEOTIDES, pack: bool = False):
        self.pools = [Pool(pools)] if isinstance(pools, Manifest) else list(pools)
        self.seq_len, self.seed, self.rc_augment, self.stage = seq_len, seed, rc_augment, stage
        self.weights = list(weights)
        self.lower_case_weight, self.tokenizer, self.pack = lower_case_weight, tokenizer, pack
        of_pools = [training_intervals(pool, lower_case_weight, tokenizer) for pool in self.pools]
        self.intervals = [interval for intervals in of_pools for interval in intervals]
        self._places = [(pool.manifest, interval.first_base)
                        for pool, intervals in zip(self.pools, of_pools, strict=True) for interval in intervals]
        self.orders = [WindowOrder([interval.bases for interval in intervals], seq_len, seed=_seed_of(seed, number),
                                   stage=stage, tokenizer=tokenizer, pack=pack)
                       for number, intervals in enumerate(of_pools)]
        self.order: WindowOrder | MixtureOrder = (self.orders[0] if len(self.orders) == 1 else
                                                  MixtureOrder(self.orders, self.weights))

    def start(self) -> StreamState:
        """The state before the first window of this stage."""
        return StreamState(stage=self.stage)

    def advance(self, state: StreamState, windows: int) -> StreamState:
        """The state this many windows on."""
        return StreamState(state.stage, *self.order.advance(state.epoch, state.index, windows))

    def epochs(self, windows: int) -> list[float]:
        """How often the first windows have gone through each pool."""
        own = self.order.epochs(windows)
        return own if isinstance(own, list) else [own]

    def counts(self, windows: int) -> list[int]:
        """How many of the first windows are of each pool."""
        return self.order.counts(windows) if isinstance(self.order, MixtureOrder) else [windows]

    def sources_of(self, windows: Sequence[int]) -> list[int]:
        """Which pool each window is of, by the numbers that batches give them."""
        if not isinstance(self.order, MixtureOrder):
            return [0] * len(windows)
        return [self.order.place(number)[0] for number in windows]

    def _facts(self) -> dict[str, Any]:
        """What a state depends on."""
        facts = {"version": STATE_VERSION, "manifest": identity_of(self.pools), "seed": self.seed,
                 "seq_len": self.seq_len, "rc_augment": self.rc_augment, "pack": self.pack}
        if len(self.pools) > 1:
            facts["weights"] = [[change.window, *change.weights] for change in self.weights]
        if self.tokenizer != NUCLEOTIDES:
            facts["kmer"] = [self.tokenizer.k, self.tokenizer.overlap]
        return facts

    def state_dict(self, state: StreamState) -> dict[str, Any]:
        """A state for a checkpoint, with the facts that it depends on."""
        return {**asdict(state), **self._facts()}

    def load_state_dict(self, saved: dict[str, Any]) -> StreamState:
        """The saved state.

        Raises:
            DataError: it was saved by a stream of other data, seed, length or stage, or is no place in it.
        """
        if saved.get("version") != STATE_VERSION:
            raise DataError(f"cannot resume the data stream: the saved order of windows has version "
                            f"{saved.get('version')!r}, this code's has {STATE_VERSION}; resume with the code that "
                            "saved it, or take its weights alone: train.resume=weights:PATH in a new train.run_dir")
        saved = {"pack": False} | saved  # states from before the key
        for key, own in {**self._facts(), "stage": self.stage}.items():
            if saved.get(key) != own:
                raise DataError(f"cannot resume the data stream: the saved {key} is {saved.get(key)!r}, this run's is "
                                 f"{own!r}; resume with the same shards and data settings, or start afresh")
        epoch, index = saved.get("epoch"), saved.get("index")
        if not (type(epoch) is type(index) is int and 0 <= epoch < _MOST_EPOCHS
                and 0 <= index < self.order.epoch_size(epoch)):
            raise DataError(f"cannot resume the data stream: its saved place, epoch {epoch!r:.40} and index "
                            f"{index!r:.40}, is none of this order; start afresh")
        return StreamState(self.stage, epoch, index)

    def batches(self, start: StreamState, *, micro_batch_size: int, global_batch_size: int, dp_rank: int = 0,
                dp_size: int = 1, num_workers: int = 0, part: Part | None = None) -> Generator[Batch]:
        """Micro-batches of one data rank from `start` on, without end; closing it ends its worker processes.

        Every global_batch_size / (micro_batch_size * dp_size) of them are the rank's part of one optimizer step;
        `start` must be the state after a whole number of steps, by `advance(state, global_batch_size)`.

        Args:
            num_workers: processes that read ahead; 0 reads when asked. The batches are the same.
            part: of every window; None: all of it.
        """
        if global_batch_size % (micro_batch_size * dp_size):
            raise DataError(f"train.global_batch_size ({global_batch_size}) must be a multiple of "
                             f"train.micro_batch_size * data-parallel size ({micro_batch_size} * {dp_size})")
        if start.stage != self.stage:
            raise DataError(f"the state is of stage {start.stage}, this stream of stage {self.stage}")
        windows = _Windows(self._places, self.order, self.rc_augment, part or Part(0, self.seq_len),
                           self.lower_case_weight, self.tokenizer, pack=self.pack)
        numbers = _RankNumbers(self.order, start, micro_batch_size, dp_rank, dp_size)
        return _batches(windows, numbers, num_workers)


def _seed_of(seed: int, number: int) -> int:
    """The seed of a pool's order: pools of the same lengths, as two haplotypes are, come in different orders."""
    return seed if number == 0 else int(mix(seed, number)[0] >> np.uint64(1))


def _batches(windows: _Windows, numbers: _RankNumbers, num_workers: int) -> Generator[Batch]:
    with ExitStack() as stack:
        if num_workers:
            arrays: Iterable[Any] = stack.enter_context(closing(read_ahead(windows.read, numbers, num_workers)))
        else:
            arrays = map(windows.read, numbers)
        for arrays_of_one in arrays:
            yield _batch(windows.tokenizer, *arrays_of_one)


class ValidationBatches:
    """The windows of a split, tiled with a stride of L = seq_len tokens from each interval's start, as batches of one
    data rank. Of several pools one after the other: what is in two of them is scored for each.

    Each A, C, G and T is scored exactly once, but an interval's first base, which has nothing before it; of k-mers all
    that `Tokenizer.scored` scores, in the frame that begins with the interval. All ranks get the same number of batches
    of the same shape; rows past the end are [PAD] and score nothing.

    Args:
        pools: a manifest, for all of its bases, or several sources.
        tokens: at most so many, in whole windows but at least one, at even distances over the split: the same windows
            whatever the number of ranks and the size of a batch; None: all of them. Several pools have equal parts of
            them.
        part: what this rank reads of every window; None: all of it.
        tokenizer: makes tokens of the bases.
        pack: stretches that do not fill a window share one (`data.packing`), with those of the same pool and species.
    """

    def __init__(self, pools: Manifest | Sequence[Pool], *, split: str = "val", seq_len: int, batch_size: int,
                 dp_rank: int = 0, dp_size: int = 1, tokens: int | None = None, part: Part | None = None,
                 tokenizer: Tokenizer = NUCLEOTIDES, pack: bool = False):
        self._batch_size, self._dp_rank, self.tokenizer, self._pack = batch_size, dp_rank, tokenizer, pack
        self._stride, self._part = batch_size * dp_size, part or Part(0, seq_len)
        pools = [Pool(pools)] if isinstance(pools, Manifest) else pools
        most = None if tokens is None else max(1, tokens // len(pools) // seq_len)
        self.windows = [(pool, window) for pool in pools for window in
                        _windows(pool, split, seq_len, most, tokenizer, pack=pack)]
        """Pool and pieces of each window: of an interval, from one base of it to another."""
        kinds = [(pool.name, pool.species_of(tiles[0][0].contig)) for pool, tiles in self.windows]
        self.classes = list(dict.fromkeys(kinds))
        """Source and species of each class of windows."""
        place = {kind: number for number, kind in enumerate(self.classes)}
        self.class_of = [place[kind] for kind in kinds]
        """The class of each window, by its number."""

    def __len__(self) -> int:
        return -(-len(self.windows) // self._stride)

    def __iter__(self) -> Iterator[Batch]:
        return (self.batch(number) for number in range(len(self)))

    def batch(self, number: int) -> Batch:
        """A batch by its number, which is less than `len`."""
        first = self._stride * number + self._batch_size * self._dp_rank
        numbers = range(first, first + self._batch_size)
        ids = np.full((self._batch_size, self._part.tokens + 1), PAD, dtype=self.tokenizer.dtype)
        sizes: list[list[int]] = [[] for _ in numbers]
        for row, (pool, pieces) in enumerate(self.windows[numbers.start : numbers.stop]):
            places = ((pool.manifest, interval.first_base, start, end) for interval, start, end in pieces)
            sizes[row] = read_pieces(self.tokenizer, ids[row], self._part, places, reverse=False, soft=True)
        arrays = content(self.tokenizer, ids, numbers, sizes, self._part, soft=True, weight=1.0, pack=self._pack)
        return _batch(self.tokenizer, *arrays)


def _windows(pool: Pool, split: str, seq_len: int, most: int | None, tokenizer: Tokenizer, *,
             pack: bool) -> list[list[tuple[Interval, int, int]]]:
    """Of each window of a split its pieces, of an interval from a base of it to another; at most so many windows, at
    even distances."""
    whole, step = tokenizer.bases(seq_len + 1), seq_len * tokenizer.stride
    tiles = [(interval, first * step, min(first * step + whole, interval.bases)) for interval in pool.intervals(split)
             for first in range(-(-(tokenizer.tokens(interval.bases) - 1) // seq_len))]
    windows = [[number] for number in range(len(tiles))]
    if pack:
        windows = packed_by_kind([tokenizer.tokens(end - start) for _, start, end in tiles],
                                 [pool.species_of(interval.contig) for interval, *_ in tiles], seq_len + 1)
    count = len(windows) if most is None else min(len(windows), most)
    return [[tiles[tile] for tile in windows[number * len(windows) // count]] for number in range(count)]
