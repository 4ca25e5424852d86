"""K-mers as tokens: ids by hand, windows in every frame, what is scored, and perplexity per base."""

import math
from collections import Counter
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyena_dist.config.identity import differences
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.data.errors import DataError
from hyena_dist.data.pool import Pool
from hyena_dist.data.rows import Part
from hyena_dist.data.splits import FractionSplits
from hyena_dist.data.stream import Batch, TrainStream, ValidationBatches
from hyena_dist.data.tokenizer import COMPLEMENT, IGNORE, NUCLEOTIDES, PAD, UNK, A, Tokenizer, encode, tokenizer_of
from hyena_dist.model.evaluate import evaluate_split
from hyena_dist.parallel.groups import Groups
from hyena_dist.tasks.held_out import HeldOut
from hyena_dist.tasks.markov import fit, score
from tests.genomes import genome, shards

CONTIGS = genome(5, 4000, 1, 3, 8, 65, 130, 2500)
L = 16
KINDS = [Tokenizer(3), Tokenizer(3, overlap=True), Tokenizer(6), Tokenizer(6, overlap=True)]
NAMES = ["3", "3o", "6", "6o"]
kinds = pytest.mark.parametrize("tokenizer", KINDS, ids=NAMES)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return shards(tmp_path_factory.mktemp("kmers"), CONTIGS, FractionSplits(0.2))


def by_hand(bases: bytes, tokenizer: Tokenizer) -> list[int]:
    """Ids, a k-mer at a time."""
    words = [bases[i : i + tokenizer.k].decode().upper()
             for i in range(0, len(bases) - tokenizer.k + 1, tokenizer.stride)]
    return [7 + int(word.translate(str.maketrans("ACGT", "0123")), 4) if set(word) <= set("ACGT") else UNK
            for word in words]


def reverse_complement(bases: bytes) -> bytes:
    return bases[::-1].translate(bytes.maketrans(b"ACGTacgt", b"TGCAtgca"))


def scored_by_hand(ids: list[int], tokenizer: Tokenizer) -> list[bool]:
    return [now >= 7 and (before >= 7 or not tokenizer.overlap) for before, now in zip(ids, ids[1:], strict=False)]


def test_ids_by_hand():
    assert Tokenizer(2).encode("AAACCATT").tolist() == [7, 8, 11, 22]
    assert Tokenizer(2, overlap=True).encode("AACA").tolist() == [7, 8, 11]
    assert Tokenizer(3).encode("ttTNACgcaAC").tolist() == [70, UNK, 43]  # the rest, AC, is no token
    assert Tokenizer(8).encode("T" * 8).tolist() == [7 + 4**8 - 1]
    assert Tokenizer(6).encode("ACGTA").size == 0
    assert set(Tokenizer(2).encode("ARYASCAUA.").tolist()) == {UNK}
    assert Tokenizer(1).encode("ACGTN").tolist() == [7, 8, 9, 10, 11]
    assert Tokenizer(1).encode("ACGTN").dtype == np.uint8


@settings(max_examples=100, deadline=None)
@given(st.text("ACGTNacgtRn", max_size=60), st.integers(1, 8), st.booleans())
def test_bases_come_back_from_their_ids(sequence, k, overlap):
    tokenizer = Tokenizer(k, overlap and k > 1)
    ids = tokenizer.encode(sequence)
    assert ids.size == tokenizer.tokens(len(sequence))
    covered = tokenizer.bases(ids.size)
    assert len(sequence) - tokenizer.stride < covered <= len(sequence) or len(sequence) < k
    if k == 1:
        assert tokenizer.decode(ids).replace("[UNK]", "R") == sequence.upper()
        return
    assert ids.tolist() == by_hand(sequence.encode(), tokenizer)
    told = [False] * covered
    for number, word in enumerate(ids.tolist()):
        if word >= A:
            told[number * tokenizer.stride : number * tokenizer.stride + k] = [True] * k
    assert tokenizer.decode(ids) == "".join(
        base if known else "N" for base, known in zip(sequence.upper(), told, strict=False))
    assert tokenizer.decode(torch.from_numpy(ids)) == tokenizer.decode(ids)


def test_a_model_says_its_tokenizer():
    assert tokenizer_of(ModelSection()) == NUCLEOTIDES
    assert tokenizer_of(ModelSection(kmer=6)) == Tokenizer(6)
    assert tokenizer_of(ModelSection(kmer=4, kmer_overlap=True)) == Tokenizer(4, overlap=True)
    sizes = [ModelSection(kmer=k).padded_vocab_size for k in (1, 2, 3, 6, 8)]
    assert sizes == [16, 24, 72, 4104, 65544]
    assert ModelSection(kmer=3, vocab_size=100).padded_vocab_size == 104
    for values, words in ((dict(kmer=9), "at most 8"), (dict(kmer=0), "model.kmer must be"),
                          (dict(kmer_overlap=True), "model.kmer is 1")):
        with pytest.raises(ValueError, match=words):
            ModelSection(**values)


@kinds
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_windows_are_those_of_the_bases_on_both_strands(manifest, tokenizer, weight):
    stream = TrainStream(manifest, seq_len=L, seed=3, rc_augment=True, tokenizer=tokenizer, lower_case_weight=weight)
    count = stream.order.epoch_size(0)
    seen, frames = Counter(), set()
    with closing(stream.batches(stream.start(), micro_batch_size=1, global_batch_size=1)) as batches:
        for index, batch in enumerate(islice(batches, count)):
            window = stream.order.window(0, index)
            interval = stream.intervals[window.interval]
            bases = CONTIGS[interval.contig][interval.start + window.start : interval.start + window.end]
            bases = bases[: tokenizer.bases(tokenizer.tokens(len(bases)))]
            bases = reverse_complement(bases) if window.reverse else bases
            ids = by_hand(bases, tokenizer)
            assert 2 <= len(ids) <= L + 1
            assert batch.ids.tolist() == [ids + [PAD] * (L + 1 - len(ids))]
            scored, ends = scored_by_hand(ids, tokenizer), range(tokenizer.k - 1, len(bases), tokenizer.stride)
            lower = [bases[end] >= ord("a") for end in ends][1:]
            weights = [weight if low else 1.0 for low, counts in zip(lower, scored, strict=True) if counts]
            assert batch.scored == pytest.approx(tokenizer.stride * sum(weights), rel=1e-12)
            upper, masked = batch.scored_by_row()[0].tolist()
            assert upper + weight * masked == pytest.approx(batch.scored, rel=1e-12)
            inputs, targets, _ = batch.to(torch.device("cpu"))
            assert inputs.tolist() == batch.ids[:, :-1].tolist()
            wanted = [i if counts else IGNORE for i, counts in zip(ids[1:], scored, strict=True)]
            assert targets[0, : len(wanted)].tolist() == wanted
            assert (targets[0, len(wanted):] == IGNORE).all()
            if weight != 1:
                assert batch.soft[0, : len(lower)].tolist() == lower
            frames.add((window.interval, window.start % tokenizer.stride))
            starts = range(window.start + tokenizer.stride, window.end - tokenizer.k + 1, tokenizer.stride)
            seen.update((window.interval, start) for start in starts)
    # In its frame every token of an interval but the first is a target exactly once.
    wanted = Counter()
    assert len(frames) == len({interval for interval, _ in frames}), "an interval is read in one frame an epoch"
    for number, frame in frames:
        bases = stream.intervals[number].bases
        wanted.update((number, start) for start in range(frame + tokenizer.stride, bases - tokenizer.k + 1,
                                                         tokenizer.stride))
    assert seen == wanted
    assert {number for number, _ in frames} == {i for i, interval in enumerate(stream.intervals)
                                                if interval.bases >= tokenizer.bases(2)}


def test_epochs_show_every_frame(manifest):
    stream = TrainStream(manifest, seq_len=L, seed=3, tokenizer=Tokenizer(6))
    longest = max(range(len(stream.intervals)), key=lambda number: stream.intervals[number].bases)
    windows = [stream.order.window(epoch, index) for epoch in range(40)
               for index in range(stream.order.epoch_size(epoch))]
    assert {window.start % 6 for window in windows if window.interval == longest} == set(range(6))
    rests = set()
    for number, interval in enumerate(stream.intervals):
        if 12 <= interval.bases <= Tokenizer(6).bases(L + 1):  # of one window: its rest may stand before and behind it
            rest = interval.bases % 6
            rests.add(rest)
            assert {window.start for window in windows if window.interval == number} == set(range(rest + 1))
    assert len(rests) > 1


@kinds
def test_any_layout_and_any_cut_gives_the_same_windows(manifest, tokenizer):
    stream = TrainStream(manifest, seq_len=L, seed=3, rc_augment=True, tokenizer=tokenizer)

    def rows(state, dp_size, workers, count):
        ranks = [stream.batches(state, micro_batch_size=2, global_batch_size=8, dp_rank=rank, dp_size=dp_size,
                                num_workers=workers) for rank in range(dp_size)]
        found = {}
        for batches in ranks:
            for batch in islice(batches, count // (2 * dp_size)):
                found |= dict(zip(batch.windows.tolist(), map(tuple, batch.ids.tolist()), strict=True))
            batches.close()
        return found

    whole = rows(stream.start(), 1, 0, 48)
    cut = stream.load_state_dict(stream.state_dict(stream.advance(stream.start(), 24)))
    assert rows(stream.start(), 2, 0, 24) | rows(cut, 4, 1, 24) == whole
    other = TrainStream(manifest, seq_len=L, seed=3, rc_augment=True)
    with pytest.raises(DataError, match="the saved "):
        TrainStream(manifest, seq_len=L, seed=3, rc_augment=True,
                    tokenizer=Tokenizer(tokenizer.k, not tokenizer.overlap)).load_state_dict(stream.state_dict(cut))
    assert "kmer" not in other.state_dict(other.start()), "what was saved before there were k-mers stays the same"


@kinds
def test_context_ranks_read_their_parts(manifest, tokenizer):
    def read(part):
        stream = TrainStream(manifest, seq_len=L, seed=3, rc_augment=True, tokenizer=tokenizer)
        batches = stream.batches(stream.start(), micro_batch_size=4, global_batch_size=4, part=part)
        train = list(islice(batches, 40))
        return train + list(ValidationBatches(manifest, seq_len=L, batch_size=3, part=part, tokenizer=tokenizer))

    for whole, first, second in zip(read(None), read(Part(0, 10)), read(Part(10, 10)), strict=True):
        assert torch.equal(first.ids, whole.ids[:, :11])
        assert torch.equal(second.ids[:, :7], whole.ids[:, 10:])
        assert (second.ids[:, 7:] == PAD).all()
        assert first.scored + second.scored == whole.scored


def uniform(ids: int) -> torch.nn.Module:
    """A model to which every token is as likely."""
    class Uniform(torch.nn.Module):
        def forward(self, input_ids):
            return torch.zeros(*input_ids.shape, ids, dtype=torch.float64)
    return Uniform()


def scored_bases_by_hand(manifest, tokenizer, split="val") -> dict[str, set[int]]:
    """The bases that the scored tokens tell and no token before them, by contig."""
    found = {}
    for interval in manifest.intervals(split):
        ids = by_hand(CONTIGS[interval.contig][interval.start : interval.end], tokenizer)
        for number, scored in enumerate(scored_by_hand(ids, tokenizer), start=1):
            end = interval.start + number * tokenizer.stride + tokenizer.k
            if scored:
                found.setdefault(interval.contig, set()).update(range(end - tokenizer.stride, end))
    return found


@kinds
def test_perplexity_is_per_base(manifest, tokenizer):
    batches = ValidationBatches(manifest, seq_len=L, batch_size=3, tokenizer=tokenizer)
    found = evaluate_split(uniform(4104), batches, Groups.single(), torch.device("cpu"))
    bases = sum(map(len, scored_bases_by_hand(manifest, tokenizer).values()))
    assert found.scored == bases == sum(batch.scored for batch in batches)
    assert found.loss == pytest.approx(math.log(4104) / tokenizer.stride, rel=1e-12)
    assert found.sums[1].sum() == bases


@kinds
def test_markov_chains_score_the_same_bases(manifest, tokenizer, monkeypatch):
    monkeypatch.setattr("hyena_dist.tasks.markov._CHUNK", 100)  # so that chunks have borders
    pools = [Pool(manifest)]
    tables, loss, count = fit(pools, 1), 0.0, 0
    for contig, places in scored_bases_by_hand(manifest, tokenizer).items():
        bases = CONTIGS[contig].upper()
        for place in places:
            word = bases[place - 1 : place + 1].translate(bytes.maketrans(b"ACGT", b"\0\1\2\3"))
            loss -= tables[1][4 * word[0] + word[1]] if word[0] < 4 else tables[0][word[1]]
            count += 1
    found = score(tables, pools, "val", tokenizer=tokenizer)[1, :, 0]
    assert found.tolist() == pytest.approx([loss, count], rel=1e-12)
    assert score(tables, pools, "val")[1, 1, 0] > count, "the control: single bases"


@kinds
@pytest.mark.parametrize("chunk", [100, 1 << 22])
def test_groups_hold_the_same_bases_for_the_model_and_the_chains(manifest, tokenizer, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr("hyena_dist.tasks.markov._CHUNK", chunk)
    (tmp_path / "classes.bed").write_text("".join(
        f"{contig}\t{start}\t{start + 37}\t{name}\n" for contig in ("chr1", "chr7") for start in range(11, 2400, 101)
        for name in (("exon", "repeat") if start % 2 else ("exon",))))
    pools = [Pool(manifest)]
    held_out = HeldOut(pools, split="val", seq_len=L, batch_size=3, regions=tmp_path / "classes.bed",
                       tokenizer=tokenizer)
    found = evaluate_split(uniform(4104), held_out.batches, Groups.single(), torch.device("cpu"),
                           class_of=held_out.class_of, classes=held_out.classes, kinds=held_out.kinds,
                           kinds_of=held_out.kinds_of)
    chains = score(fit(pools, 1), pools, "val", labels=held_out.kinds * held_out.classes, label=held_out.label,
                   tokenizer=tokenizer)
    assert chains[0, 1].tolist() == found.sums[1].flatten().tolist()
    assert (found.sums[1] > 0).sum() > 20
    assert found.scored == sum(map(len, scored_bases_by_hand(manifest, tokenizer).values()))
    control = score(fit(pools, 1), pools, "val", labels=held_out.kinds * held_out.classes, label=held_out.label)
    assert control[0, 1].tolist() != chains[0, 1].tolist()


@kinds
def test_the_share_of_g_and_c_is_that_of_the_bases_told(tokenizer):
    bases = b"GATTACACGGGCATNACGGGTTTAACCCGTAAGCAT"
    ids = tokenizer.encode(bases)
    ends = range(tokenizer.k + tokenizer.stride, len(bases) + 1, tokenizer.stride)
    wanted = [sum(base in b"GC" for base in bases[end - tokenizer.stride : end]) * counts
              for end, counts in zip(ends, scored_by_hand(ids.tolist(), tokenizer), strict=True)]
    assert tokenizer.strong(ids[None])[0].tolist() == wanted
    assert sum(wanted) > 4


def test_nothing_to_train_on_is_said(tmp_path):
    for name in ("gaps", "short"):
        (tmp_path / name).mkdir()
    gaps = shards(tmp_path / "gaps", {"a": b"ACGTN" * 100})
    TrainStream(gaps, seq_len=L, seed=0, tokenizer=Tokenizer(4))
    with pytest.raises(DataError, match="no 5 bases in a row are without N .* model.kmer to less than 5"):
        TrainStream(gaps, seq_len=L, seed=0, tokenizer=Tokenizer(5))
    short = shards(tmp_path / "short", {"a": b"ACGTACGTACG"})
    TrainStream(short, seq_len=L, seed=0, tokenizer=Tokenizer(6, overlap=True))
    with pytest.raises(DataError, match="at least 12 bases, two tokens of model.kmer=6"):
        TrainStream(short, seq_len=L, seed=0, tokenizer=Tokenizer(6))


def test_the_complement_of_a_kmer_is_that_of_its_bases():
    ids = COMPLEMENT[encode("AACGTN")[::-1]]
    assert Tokenizer(3).of_bases(ids).tolist() == [UNK, *by_hand(b"GTT", Tokenizer(3))]


def test_a_resume_may_not_change_the_tokens():
    old = {"model.hidden_size": 16}
    assert differences(old, old | {"model.kmer": 1, "model.kmer_overlap": False}) == []
    assert differences(old, old | {"model.kmer": 6}) == ["model.kmer: saved 1, now 6"]


def test_a_batch_of_single_bases_is_as_it_was():
    batch = Batch(torch.tensor([[7, 11, 8, 4]], dtype=torch.uint8), torch.tensor([0]), 1)
    assert batch.scored_by_row().tolist() == [[1, 0]]
    assert batch.to(torch.device("cpu"))[1].tolist() == [[IGNORE, 8, IGNORE]]
