import pytest

pytest.importorskip("pyfaidx", reason="needs the extra 'dev'")

from benchmarks import loader


def test_both_loaders_read_the_same_tokens_and_ours_is_faster():
    rows = loader.run(seq_lens=(1024, 1 << 16), rounds=1, tokens=1 << 18, random_bases=300_000)
    assert [row.seq_len for row in rows] == [1024, 1 << 16]
    for row in rows:
        assert row.ratio > 1
        assert row.bytes_per_base <= 0.27
