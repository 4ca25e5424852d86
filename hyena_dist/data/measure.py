"""What one contig holds, counted. These are functions of the contig alone, so that other processes can do them."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from hyena_dist.data.contigs import IUPAC
from hyena_dist.data.sketch import look
from hyena_dist.data.splits import SPLITS, Stretch

_BASES = b"ACGTacgt"
_CODES = bytes(sorted(set(IUPAC) - set(b"ACGTN")))
_COMPLEMENT = bytes.maketrans(b"ACGTRYKMBDHV", b"TGCAYRMKVHDB")
_CHUNK = 1 << 22
_GAP = np.frombuffer(b"N", dtype=np.uint8)


class Tally(NamedTuple):
    """Bases of a stretch, or of many."""

    bases: int = 0
    strong: int = 0
    """G and C."""
    unknown: int = 0
    """N."""
    lower: int = 0
    """In lower case: soft-masked."""
    scored: int = 0
    """A, C, G or T, with a base before it in its stretch."""
    codes: tuple[int, ...] = (0,) * len(_CODES)
    """Other codes, in the order of `CODES`."""

    def __add__(self, other: "Tally") -> "Tally":  # type: ignore[override]
        return Tally(self.bases + other.bases, self.strong + other.strong, self.unknown + other.unknown,
                     self.lower + other.lower, self.scored + other.scored,
                     tuple(a + b for a, b in zip(self.codes, other.codes, strict=True)))


CODES = _CODES.decode()


class Piece(NamedTuple):
    """A contig to be measured."""

    bases: np.ndarray
    """As shards hold it, ASCII codes, uint8."""
    stretches: Sequence[Stretch]
    first: int
    """Its place in the concatenation of all contigs."""


class ContigMeasure(NamedTuple):
    """What was found in a contig."""

    tallies: dict[str, Tally]
    """Of each split, and under "" of what is in none."""
    strands: tuple[bytes, bytes]
    """Digests of the sequence without its case, and of its reverse complement."""

    @property
    def whole(self) -> Tally:
        """Of all of the contig."""
        return sum(self.tallies.values(), Tally())


class Measure(NamedTuple):
    """What was found in some contigs."""

    contigs: list[ContigMeasure]
    train_words: np.ndarray
    held_words: np.ndarray
    windows: np.ndarray
    places: np.ndarray
    """As `copies.Samples` takes them."""


def tally(bases: np.ndarray) -> Tally:
    """Of a stretch of ASCII bases."""
    strong = unknown = scored = 0
    codes = [0] * len(_CODES)
    for start in range(0, bases.size, _CHUNK):
        chunk = bases[start : start + _CHUNK].tobytes()
        strong += len(chunk) - len(chunk.translate(None, b"GCgc"))
        rest = chunk.translate(None, _BASES)
        scored += len(chunk) - len(rest)
        others = rest.translate(None, b"Nn").upper()
        unknown += len(rest) - len(others)
        if others:
            codes = [count + others.count(code) for count, code in zip(codes, _CODES, strict=True)]
    scored -= bases.size > 0 and int(bases[0]) in _BASES
    return Tally(bases.size, strong, unknown, int(np.count_nonzero(bases & 0x20)), scored, tuple(codes))


def strands(bases: np.ndarray) -> tuple[bytes, bytes]:
    """Digests of a sequence without its case, and of its reverse complement."""
    forward, reverse = hashlib.sha256(), hashlib.sha256()
    for start in range(0, bases.size, _CHUNK):
        forward.update(bases[start : start + _CHUNK].tobytes().upper())
        reverse.update(bases[::-1][start : start + _CHUNK].tobytes().upper().translate(_COMPLEMENT))
    return forward.digest(), reverse.digest()


def _parts(piece: Piece) -> Iterator[Stretch]:
    """All of a contig: its stretches, and under "" what lies between them."""
    end = 0
    for stretch in piece.stretches:
        if stretch.start > end:
            yield Stretch(end, stretch.start, "")
        yield stretch
        end = stretch.end
    if end < piece.bases.size:
        yield Stretch(end, piece.bases.size, "")


def measure(pieces: Sequence[Piece]) -> Measure:
    """What some contigs hold."""
    contigs = []
    samples: dict[str, tuple[list[np.ndarray], list[int]]] = {split: ([], []) for split in SPLITS}
    for piece in pieces:
        tallies: dict[str, Tally] = {}
        for part in _parts(piece):
            bases = piece.bases[part.start : part.end]
            tallies[part.split] = tallies.get(part.split, Tally()) + tally(bases)
            if part.split:
                samples[part.split][0].extend((bases, _GAP))
                samples[part.split][1].append(piece.first + part.start)
        contigs.append(ContigMeasure(tallies, strands(piece.bases)))
    words: dict[bool, list[np.ndarray]] = {False: [np.zeros(0, np.uint64)], True: [np.zeros(0, np.uint64)]}
    windows, places = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for number, (parts, firsts) in enumerate(samples.values()):
        if not parts:
            continue
        found = look(np.concatenate(parts) if len(parts) > 2 else parts[0])
        starts = np.cumsum([0, *(part.size + 1 for part in parts[:-2:2])])
        row = np.searchsorted(starts, found.places, side="right") - 1
        words[number > 0].append(found.words)
        windows.append(found.windows)
        places.append((found.places - starts[row] + np.array(firsts)[row]) * 4 + number)
    return Measure(contigs, *map(np.concatenate, (words[False], words[True], windows, places)))
