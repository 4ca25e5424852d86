"""Bases to the published token ids and back; what of a window is scored.

[CLS] 0, [SEP] 1, [BOS] 2, [MASK] 3, [PAD] 4, [RESERVED] 5, [UNK] 6, A 7, C 8, G 9, T 10, N 11. Lower case reads as
upper case; every other byte, so also the IUPAC codes of more than one base and U, reads as [UNK]. Only A, C, G and T
are ever scored.
"""

import numpy as np
import torch

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
    """Token ids (uint8) of a sequence, one per base; no special tokens are added."""
    data = sequence.encode("latin-1", "replace") if isinstance(sequence, str) else sequence
    return BYTE_TO_ID[np.frombuffer(data, dtype=np.uint8)]


def decode(ids: np.ndarray | torch.Tensor) -> str:
    """The sequence of these ids; a special token is written by its name, as in "[PAD]"."""
    return "".join(TOKENS[i] for i in ids.tolist())


def split_window(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and next-base targets of windows: ids [B, L + 1] -> input_ids, targets, both int64 [B, L].

    Targets that are not A, C, G or T are IGNORE. Shift before slicing tokens over context ranks, not after.
    """
    targets = ids[:, 1:]
    unscored = targets.to(torch.uint8) - A > T - A  # of bytes less than A is large; one comparison of them is cheap
    return ids[:, :-1].long(), targets.to(torch.int64, copy=True).masked_fill_(unscored, IGNORE)
