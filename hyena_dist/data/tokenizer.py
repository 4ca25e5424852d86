"""Bases to token ids and back; what of a window is scored. `tokenizer_of` gives the tokenizer of a model.

The ids of single bases are the published ones: [CLS] 0, [SEP] 1, [BOS] 2, [MASK] 3, [PAD] 4, [RESERVED] 5, [UNK] 6,
A 7, C 8, G 9, T 10, N 11. Lower case reads as upper case; every other byte, so also the IUPAC codes of more than one
base and U, reads as [UNK]. Only A, C, G and T are ever scored.

The special ids of k-mers are the same seven, and a k-mer of A, C, G and T is 7 plus its number in base 4, with A 0,
C 1, G 2, T 3 and its first base as the leading digit: of 2-mers AA 7, AC 8, CA 11, TT 22. A k-mer that holds any other
letter, N too, is [UNK].
"""

from dataclasses import dataclass

import numpy as np
import torch

from hyena_dist.config.sections.model import ModelSection

TOKENS = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", "A", "C", "G", "T", "N")
PAD, UNK, A, C, G, T, N = 4, 6, 7, 8, 9, 10, 11
SOFT = 32
"""Added to the id of a base that is soft-masked (lower case), where readers are asked to tell."""
IGNORE = -100
"""Target of a position that is not scored, as in torch's cross entropy."""


def _ids_of_bytes() -> np.ndarray:
    table = np.full(256, UNK, dtype=np.uint8)
    for base, token in zip("ACGTN", (A, C, G, T, N), strict=True):
        table[ord(base)] = table[ord(base.lower())] = token
    return table


def _complement() -> np.ndarray:
    table = np.arange(len(TOKENS), dtype=np.uint8)
    table[[A, C, G, T]] = [T, G, C, A]
    return table


BYTE_TO_ID = _ids_of_bytes()
"""[256] uint8: token id of an ASCII base."""
COMPLEMENT = _complement()
"""[12] uint8: token id of the complementary base; every other token is its own complement."""


def encode(sequence: str | bytes) -> np.ndarray:
    """Ids (uint8) of the single bases of a sequence; no special tokens are added."""
    data = sequence.encode("latin-1", "replace") if isinstance(sequence, str) else sequence
    return BYTE_TO_ID[np.frombuffer(data, dtype=np.uint8)]


def decode(ids: np.ndarray | torch.Tensor) -> str:
    """The sequence of these ids of single bases; a special token is written by its name, as in "[PAD]"."""
    return "".join(TOKENS[i] for i in ids.tolist())


def split_window(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and next-base targets of windows of single bases: ids [B, L + 1] -> input_ids, targets, both int64 [B, L].

    Targets that are not A, C, G or T are IGNORE. Shift before slicing tokens over context ranks, not after.
    """
    targets = ids[:, 1:]
    unscored = targets.to(torch.uint8) - A > T - A  # of bytes less than A is large; one comparison of them is cheap
    return ids[:, :-1].long(), targets.to(torch.int64, copy=True).masked_fill_(unscored, IGNORE)


@dataclass(frozen=True)
class Tokenizer:
    """How bases become tokens: one by one, or as k-mers.

    Args:
        k: bases of a token.
        overlap: whether the next token starts at the next base, so that it shares all but one of its bases with the
            token before it; otherwise it starts behind that.
    """

    k: int = 1
    overlap: bool = False

    @property
    def stride(self) -> int:
        """Bases from the start of a token to the start of the next: how many bases a token tells that those before it
        have not told."""
        return 1 if self.overlap else self.k

    @property
    def dtype(self) -> type[np.integer]:
        """Of ids in the host's memory."""
        return np.uint8 if self.k == 1 else np.int32

    @property
    def soft(self) -> int:
        """What is added to the id of a token that is soft-masked, where readers are asked to tell: where its last base
        is of lower case."""
        return SOFT if self.k == 1 else 1 << 20

    def tokens(self, bases: int) -> int:
        """How many tokens so many bases are; a rest that is too short for one is left out."""
        return max((bases - self.k) // self.stride + 1, 0)

    def bases(self, tokens: int) -> int:
        """How many bases so many tokens span."""
        return (tokens - 1) * self.stride + self.k if tokens else 0

    def encode(self, sequence: str | bytes) -> np.ndarray:
        """Token ids [n] of a sequence, of the type `dtype`; no special tokens are added."""
        return self.of_bases(encode(sequence))

    def of_bases(self, bases: np.ndarray) -> np.ndarray:
        """Token ids [n] of single bases, uint8 [m]; of those that have SOFT added, with `soft` added."""
        if self.k == 1:
            return bases
        count = self.tokens(bases.size)
        number, known = np.zeros(count, dtype=np.int32), np.ones(count, dtype=bool)
        for place in range(self.k if count else 0):
            column = bases[place : place + (count - 1) * self.stride + 1 : self.stride]
            code = (column & np.uint8(SOFT - 1)) - np.uint8(A)  # of bytes: less than A is large
            number = number << 2 | code
            known &= code <= T - A
        ids = np.where(known, number + np.int32(A), np.int32(UNK))
        if count:
            ids |= np.where(column >= SOFT, np.int32(self.soft), np.int32(0))
        return ids

    def decode(self, ids: np.ndarray | torch.Tensor) -> str:
        """The sequence of these ids. Of single bases a special token is written by its name, as in "[PAD]"; of k-mers a
        base is N where no k-mer tells it."""
        if self.k == 1:
            return decode(ids)
        numbers = np.asarray(ids, dtype=np.int64) - A
        letters = np.full(self.bases(numbers.size), ord("N"), dtype=np.uint8)
        for place in range(self.k if numbers.size else 0):
            column = letters[place : place + (numbers.size - 1) * self.stride + 1 : self.stride]
            digits = numbers >> 2 * (self.k - 1 - place) & 3
            column[numbers >= 0] = np.frombuffer(b"ACGT", dtype=np.uint8)[digits[numbers >= 0]]
        return letters.tobytes().decode()

    def scored(self, ids: np.ndarray) -> np.ndarray:
        """Which targets of windows are scored: ids [B, L + 1], without `soft`, of the type `dtype` -> bool [B, L].

        Those of A, C, G and T alone. A k-mer that overlaps the one before it is scored where that is known too: else it
        would tell k bases and not one.
        """
        targets = ids[:, 1:]
        if self.k == 1:
            return targets - np.uint8(A) <= T - A  # of bytes: less than A is large
        return (targets >= A) & (ids[:, :-1] >= A) if self.overlap else targets >= A

    def strong(self, ids: np.ndarray) -> np.ndarray:
        """How many of the bases that the scored targets of windows tell are C or G: ids as of `scored` -> [B, L]."""
        numbers, found = ids[:, 1:].astype(np.int32) - A, np.zeros(ids[:, 1:].shape, dtype=np.int64)
        for place in range(self.stride):
            digit = numbers >> 2 * place & 3
            found += (digit == C - A) | (digit == G - A)
        return found * self.scored(ids)

    def split_window(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and next-token targets of windows: ids [B, L + 1] -> input_ids, targets, both int64 [B, L]. Targets
        that are not scored (`scored`) are IGNORE. Shift before slicing tokens over context ranks, not after."""
        if self.k == 1:
            return split_window(ids)
        inputs, targets = ids[:, :-1].long(), ids[:, 1:].long()
        unscored = (targets < A) | (inputs < A) if self.overlap else targets < A
        return inputs, targets.masked_fill(unscored, IGNORE)


NUCLEOTIDES = Tokenizer()
"""The published one: a token for each base."""


def tokenizer_of(model: ModelSection) -> Tokenizer:
    """The tokenizer of a model: everything that turns bases into its ids asks here."""
    return Tokenizer(model.kmer, model.kmer_overlap)
