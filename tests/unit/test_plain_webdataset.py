"""The shards in a loop of WebDataset alone."""

import json

import numpy as np
import pytest
import torch
import webdataset

from hyena_dist.data.errors import DataError
from hyena_dist.data.plain_webdataset import decode_segment, windows
from hyena_dist.data.splits import FractionSplits
from hyena_dist.data.tokenizer import encode, split_window
from tests.genomes import genome, shards

CONTIGS = genome(9, 5000, 1, 300, 2999, 12_000)


def urls(manifest):
    return [str(manifest.directory / shard.url) for shard in manifest.shards]


@pytest.mark.parametrize("seq_len", [1, 64, 699, 700, 1024, 20_000])
@pytest.mark.parametrize("split", ["train", "val"])
def test_windows_are_those_of_the_stretches(tmp_path, seq_len, split):
    """Across the borders of segments, samples and shards, but never across those of a split or contig."""
    manifest = shards(tmp_path, CONTIGS, FractionSplits(0.1))
    expected = [(row.contig, start, start + seq_len + 1) for row in manifest.intervals(split)
                for start in range(row.start, row.end - seq_len, seq_len)]
    dataset = webdataset.WebDataset(urls(manifest), shardshuffle=False).map(decode_segment).compose(
        windows(seq_len, split))
    found = list(dataset)
    assert [(window["contig"], window["start"], window["end"]) for window in found] == expected
    assert all(window["split"] == split and window["species"] == "genome" for window in found)
    for window in found:
        assert np.array_equal(window["ids"], encode(CONTIGS[window["contig"]][window["start"] : window["end"]]))


def test_a_loader_of_torch_with_workers_gives_inputs_and_targets(tmp_path):
    """As the documentation has it; two workers share the shards, and no window is lost or comes twice."""
    manifest = shards(tmp_path, CONTIGS)
    dataset = webdataset.WebDataset(urls(manifest), shardshuffle=False).map(decode_segment).compose(
        windows(128)).shuffle(100).to_tuple("ids", "contig", "start")
    seen = []
    for ids, contigs, starts in torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=2):
        inputs, targets = split_window(ids)
        assert inputs.shape == targets.shape == (len(contigs), 128)
        seen += zip(contigs, starts.tolist(), strict=True)
    assert len(seen) == len(set(seen)) > 100


def test_damaged_samples_are_refused(tmp_path):
    """The control: the sample as it is."""
    manifest = shards(tmp_path, CONTIGS)
    sample = next(iter(webdataset.WebDataset(urls(manifest), shardshuffle=False)))
    assert decode_segment(sample)[0]["contig"] == "chr1"
    seg = bytearray(sample["seg"])
    seg[len(seg) // 2] ^= 1
    for bad in ({"seg": bytes(seg)}, {"json": b"{}"}, {"json": b"[]"}, {"json": b"{"},
                {"json": json.dumps({"contig": ["a", "b"], "start": [1, 2, 3], "end": 4}).encode()}):
        with pytest.raises(DataError, match=r"shard-00000.tar: sample 00000000 is no sample of segments"):
            decode_segment({**sample, **bad})
    with pytest.raises(ValueError, match="seq_len must be at least 1"):
        windows(0)
