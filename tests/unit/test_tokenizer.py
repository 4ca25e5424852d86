import numpy as np
import pytest
import torch

from hyena_dist.data import tokenizer


def test_ids_are_the_published_ones():
    assert tokenizer.encode("ACGTN").tolist() == [7, 8, 9, 10, 11]
    published = ["[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", "A", "C", "G", "T", "N"]
    assert list(tokenizer.TOKENS) == published
    assert tokenizer.PAD == 4
    assert tokenizer.UNK == 6


def test_case_folds_and_other_codes_are_unknown():
    assert tokenizer.encode(b"acgtn").tolist() == tokenizer.encode("ACGTN").tolist()
    assert set(tokenizer.encode("URYSWKMBDHVuryswkmbdhv.-*\u0394").tolist()) == {tokenizer.UNK}


def test_decode_reads_what_encode_wrote():
    assert tokenizer.decode(tokenizer.encode("GATTACAN")) == "GATTACAN"
    assert tokenizer.decode(torch.tensor([4, 7, 6])) == "[PAD]A[UNK]"


def test_complement_undoes_itself_and_keeps_all_but_bases():
    ids = np.arange(12, dtype=np.uint8)
    assert np.array_equal(tokenizer.COMPLEMENT[tokenizer.COMPLEMENT[ids]], ids)
    assert tokenizer.decode(tokenizer.COMPLEMENT[tokenizer.encode("ACGTN")]) == "TGCAN"
    assert np.array_equal(tokenizer.COMPLEMENT[ids[:7]], ids[:7])


def test_split_window_shifts_by_one_and_scores_bases_only():
    ids = torch.tensor([[7, 8, 11, 9, 6, 10, 4, 4]], dtype=torch.uint8)
    inputs, targets = tokenizer.split_window(ids)
    assert inputs.tolist() == [[7, 8, 11, 9, 6, 10, 4]]
    assert targets.tolist() == [[8, -100, 9, -100, 10, -100, -100]]
    assert inputs.dtype == targets.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_of_every_byte_only_four_are_targets(dtype):
    """Also of those below A, whose difference from it is no byte."""
    ids = torch.arange(256, dtype=torch.uint8).to(dtype).repeat(2, 1)
    before = ids.clone()
    inputs, targets = tokenizer.split_window(ids)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs, before[:, :-1].long())
    assert torch.equal(ids, before), "what was given stays as it was"
    told = {token: target for token, target in enumerate(targets[0].tolist(), 1) if target != tokenizer.IGNORE}
    assert told == {7: 7, 8: 8, 9: 9, 10: 10}
