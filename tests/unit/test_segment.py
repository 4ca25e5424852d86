import numpy as np
import pytest

from hyena_dist.data import segment
from hyena_dist.data.errors import DataError
from tests.genomes import sequence


def as_bases(text: bytes) -> np.ndarray:
    return np.frombuffer(text, dtype=np.uint8)


@pytest.mark.parametrize("bases", [1, 2, 3, 4, 5, 63, 64, 65, 1000, 20011])
def test_bytes_in_are_bytes_out(bases):
    for seed in range(5):
        text = sequence(np.random.default_rng(seed), bases)
        assert segment.decode(segment.encode(as_bases(text))).tobytes() == text


@pytest.mark.parametrize("text", [b"N" * 9, b"n" * 9, b"acgt", b"NnNnRr", b"NRNRNR", b"aAaAaA", b"Acgtn", b"ACGTu",
                                  b"URYSWKMBDHVNACGTuryswkmbdhvnacgt"])
def test_edges(text):
    assert segment.decode(segment.encode(as_bases(text))).tobytes() == text


def test_two_bits_per_base_and_little_more():
    rng = np.random.default_rng(0)
    bases = rng.choice(as_bases(b"ACGT"), 1 << 18)
    starts = np.sort(rng.choice(bases.size, bases.size // 500, replace=False))  # as dense as soft-masking of mammals
    for start in starts:
        bases[start : start + 250] |= 0x20
    assert len(segment.encode(bases)) <= 0.26 * bases.size


@pytest.mark.parametrize("damage", [lambda d: b"", lambda d: b"XXXX" + d[4:], lambda d: d[:200],
                                    lambda d: d[:-40] + bytes(40)])
def test_damage_is_refused(damage):
    data = segment.encode(as_bases(sequence(np.random.default_rng(0), 3000)))
    with pytest.raises(DataError):
        segment.decode(damage(data))
