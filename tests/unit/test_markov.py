from math import exp, log

import numpy as np
import pytest

from hyena_dist.data.pool import Pool
from hyena_dist.data.splits import BedSplits, ContigSplits, FractionSplits
from hyena_dist.data.stream import ValidationBatches
from hyena_dist.data.tokenizer import split_window
from hyena_dist.tasks import markov
from tests.genomes import genome, shards


def markov_perplexity(manifest, split="val", max_order=markov.MAX_ORDER):
    pools = [Pool(manifest)]
    return [exp(loss / bases) for loss, bases in
            markov.score(markov.fit(pools, max_order), pools, split).sum(2)]


def brute_force(train, held_out, max_order):
    """The definition, base by base, on upper-case strings."""

    def known_context(text, position, order):
        start = position
        while start > max(0, position - order) and text[start - 1] in "ACGT":
            start -= 1
        return text[start:position]

    counts = {}
    for text in train:
        for position, base in enumerate(text):
            for order in range(max_order + 1):
                context = known_context(text, position, order)
                if base in "ACGT" and len(context) == order:
                    counts[context + base] = counts.get(context + base, 0) + 1
    perplexities = []
    for order in range(max_order + 1):
        losses = []
        for text in held_out:
            for position in range(1, len(text)):
                if text[position] in "ACGT":
                    context = known_context(text, position, order)
                    row = {base: counts.get(context + base, 0) + 1 for base in "ACGT"}
                    losses.append(-log(row[text[position]] / sum(row.values())))
        perplexities.append(exp(sum(losses) / len(losses)))
    return perplexities, len(losses)


def test_by_hand(tmp_path):
    """Train on AAAC, score the last two of ACA: order 0 counts A 3, C 1; order 1 AA 2, AC 1."""
    manifest = shards(tmp_path, {"train": b"AAAC", "val": b"ACA"}, ContigSplits(["val"]))
    order_0 = -(log(2 / 8) + log(4 / 8)) / 2
    order_1 = -(log(2 / 7) + log(1 / 4)) / 2
    assert markov_perplexity(manifest, max_order=1) == pytest.approx([exp(order_0), exp(order_1)], rel=1e-12)


@pytest.mark.parametrize("chunk", [50, 1 << 22])
def test_equals_brute_force_and_scores_what_the_stream_scores(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(markov, "_CHUNK", chunk)
    contigs = genome(11, 3000, 1, 2, 900)
    manifest = shards(tmp_path, contigs, FractionSplits(0.3))
    texts = {split: [contigs[i.contig][i.start : i.end].upper().decode() for i in manifest.intervals(split)]
             for split in ("train", "val")}
    want, scored = brute_force(texts["train"], texts["val"], 4)
    assert markov_perplexity(manifest, max_order=4) == pytest.approx(want, rel=1e-12)
    batches = ValidationBatches(manifest, seq_len=64, batch_size=8)
    assert sum(int((split_window(batch.ids)[1] >= 0).sum()) for batch in batches) == scored


def test_learns_a_repeat_and_not_noise(tmp_path):
    noise = np.random.default_rng(0).choice(np.frombuffer(b"ACGT", dtype=np.uint8), 40000).tobytes()
    rows = ["repeat 0 9000 train", "repeat 9000 10000 val", "noise 0 39000 train", "noise 39000 40000 test"]
    (tmp_path / "a.bed").write_text("\n".join(rows))
    manifest = shards(tmp_path, {"repeat": b"ACGTTGCA" * 1250, "noise": noise}, BedSplits(tmp_path / "a.bed"))
    assert markov_perplexity(manifest)[6] < 1.05
    assert markov_perplexity(manifest, "test")[0] == pytest.approx(4, abs=0.05)
