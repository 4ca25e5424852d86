import itertools
import multiprocessing
import os
import pickle
import re
import struct

import numpy as np
import pytest
import torch

from hyena_dist.data import order as order_module
from hyena_dist.data.errors import DataError
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.order import WindowOrder, shuffled
from hyena_dist.data.rows import Part
from hyena_dist.data.splits import ContigSplits, FractionSplits
from hyena_dist.data.stream import StreamState, TrainStream, ValidationBatches
from hyena_dist.data.tokenizer import COMPLEMENT, PAD, decode, encode, split_window
from tests.genomes import genome, shards

CONTIGS = genome(5, 9000, 1, 40, 65, 64, 2, 6000)
L = 64


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return shards(tmp_path_factory.mktemp("stream"), CONTIGS, FractionSplits(0.1))


def stream(manifest, **changes):
    return TrainStream(manifest, **{"seq_len": L, "seed": 7, **changes})


def rows_of(batches, count):
    """The first windows of some batches: (number, ids)."""
    rows = (row for ids, numbers, *_ in batches for row in zip(numbers.tolist(), map(tuple, ids.tolist()), strict=True))
    return list(itertools.islice(rows, count))


def expected_row(s, epoch, index):
    """A window, from the FASTA text."""
    window = s.order.window(epoch, index)
    interval = s.intervals[window.interval]
    ids = encode(CONTIGS[interval.contig][interval.start + window.start : interval.start + window.end])
    if s.rc_augment and window.reverse:
        ids = COMPLEMENT[ids[::-1]]
    return (*ids.tolist(), *[PAD] * (L + 1 - ids.size))


@pytest.mark.parametrize("rc_augment", [False, True])
def test_every_window_is_a_slice_of_the_fasta(manifest, rc_augment):
    s = stream(manifest, rc_augment=rc_augment)
    count = s.order.epoch_size(0) + s.order.epoch_size(1)
    rows = rows_of(s.batches(s.start(), micro_batch_size=8, global_batch_size=8), count)
    places = [(e, i) for e in (0, 1) for i in range(s.order.epoch_size(e))]
    assert rows == [((e << 40) + i, expected_row(s, e, i)) for e, i in places]
    assert any(s.order.window(*place).reverse for place in places)
    assert any(PAD in ids for _, ids in rows)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_shows_every_base_once_as_target(manifest, epoch):
    s = stream(manifest)
    seen = {}
    for index in range(s.order.epoch_size(epoch)):
        window = s.order.window(epoch, index)
        assert 2 <= window.end - window.start <= L + 1
        for base in range(window.start + 1, window.end):
            seen[window.interval, base] = seen.get((window.interval, base), 0) + 1
    assert seen == {(i, base): 1 for i, interval in enumerate(s.intervals) for base in range(1, interval.bases)}


def test_epochs_stages_and_seeds_differ(manifest):
    def first(s, epoch):
        return [s.order.window(epoch, i) for i in range(100)]

    s = stream(manifest)
    orders = [first(s, 0), first(s, 1), first(stream(manifest, stage=1), 0), first(stream(manifest, seed=8), 0)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    assert first(stream(manifest), 0) == orders[0]


@pytest.mark.parametrize("size", [1, 2, 3, 64, 1000, 4097])
def test_shuffled_is_a_permutation_that_depends_on_the_key(size):
    def permutation(key):
        sizes, keys = np.array([size]), np.array([key], dtype=np.uint64)
        return shuffled(np.arange(size), sizes, keys, np.zeros(size, dtype=int)).tolist()

    assert sorted(permutation(1)) == list(range(size))
    if size >= 64:
        assert permutation(1) != permutation(2)
        assert abs(np.corrcoef(permutation(1), np.arange(size))[0, 1]) < 0.3


def test_order_is_pinned():
    """Resuming an old run needs the very same order; change this only together with STATE_VERSION."""
    order = WindowOrder([1000, 5000, 3], 16, seed=3, stage=1)
    assert order.epoch_size(2) == 378
    assert [tuple(order.window(2, i)) for i in (0, 1, 2, 300)] == [
        (0, 75, 92, True), (1, 2068, 2085, True), (1, 580, 597, True), (1, 292, 309, True)]


def places_of_an_epoch(windows, epoch=0):
    """Where along a genome of one contig each window of an epoch lies, counted in windows."""
    order = WindowOrder([windows * 16 + 1], 16, seed=0, stage=0)
    size = order.epoch_size(epoch)
    starts = [order.window(epoch, i).start for i in range(size)]
    return [sorted(starts).index(start) for start in starts]


@pytest.mark.parametrize("windows", [5, 63, 64, 100, 64 * 30, 64 * 30 + 17])
def test_every_window_of_a_tiling_comes_once(windows):
    places = places_of_an_epoch(windows)
    assert sorted(places) == list(range(len(places)))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16, 32, 64])
def test_a_rank_reads_its_own_canonical_streams_only(ranks):
    """A stream is a block of a 64th of the genome; ranks whose number divides 64 share no block."""
    places = places_of_an_epoch(64 * 30)
    blocks = [{place * 64 // len(places) for place in places[rank::ranks]} for rank in range(ranks)]
    assert [len(own) for own in blocks] == [64 // ranks] * ranks
    assert len(set.union(*blocks)) == 64


def test_eight_windows_in_a_row_come_from_eight_eighths():
    """Else a step of 8 windows is of one genome, the next of another. The control: neighbouring blocks would be."""
    assert order_module.BLOCK_OF_STREAM.tolist()[:8] == [0, 32, 16, 48, 8, 40, 24, 56]
    eighths = [place * 8 // (64 * 30) for place in places_of_an_epoch(64 * 30 - 1)]
    assert len(eighths) == 64 * 30
    assert all(len(set(eighths[i : i + 8])) == 8 for i in range(len(eighths) - 7))
    neighbours = [stream * 8 // 64 for stream in range(64)]
    assert len(set(neighbours[:8])) == 1


def test_a_state_of_the_order_before_is_refused(manifest):
    saved = {**stream(manifest).state_dict(StreamState(0, 1, 2)), "version": 1}
    with pytest.raises(DataError, match="order of windows has version 1, this code's has 2; .* or take its weights "
                       "alone: train.resume=weights:PATH in a new train.run_dir"):
        stream(manifest).load_state_dict(saved)


def one_rank(manifest, start, count, **changes):
    s = stream(manifest, rc_augment=True)
    return rows_of(s.batches(start, **{"micro_batch_size": 24, "global_batch_size": 24, **changes}), count)


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 8])
def test_any_number_of_ranks_sees_the_same_steps(manifest, dp_size):
    start, steps = StreamState(0, 1, 100), 12
    want = one_rank(manifest, start, steps * 24)
    got = [one_rank(manifest, start, steps * 24 // dp_size, micro_batch_size=1 if dp_size == 8 else 24 // dp_size,
                    dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    for step in range(steps):
        own = 24 // dp_size
        of_step = [row for rank in got for row in rank[step * own : (step + 1) * own]]
        assert sorted(of_step) == sorted(want[step * 24 : (step + 1) * 24])
    assert [row for turn in zip(*got, strict=True) for row in turn] == want


@pytest.mark.parametrize("num_workers", [1, 4])
def test_workers_change_nothing(manifest, num_workers):
    count = 400
    state = torch.random.get_rng_state()
    assert one_rank(manifest, StreamState(), count, num_workers=num_workers) == one_rank(manifest, StreamState(), count)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_resume_goes_on_as_if_nothing_had_happened(manifest):
    s = stream(manifest, rc_augment=True)
    epoch = s.order.epoch_size(0)
    whole = one_rank(manifest, s.start(), 24 * 30)
    assert epoch < 24 * 30
    for steps in (1, 7, epoch // 24, epoch // 24 + 1, 29):
        saved = s.state_dict(s.advance(s.start(), steps * 24))
        resumed = stream(manifest, rc_augment=True).load_state_dict(saved)
        assert one_rank(manifest, resumed, 24 * (30 - steps), micro_batch_size=4) == whole[24 * steps :]


def test_advance_counts_windows_over_epochs(manifest):
    s = stream(manifest)
    one_by_one = s.start()
    for _ in range(1000):
        one_by_one = s.advance(one_by_one, 1)
    assert s.advance(s.start(), 1000) == one_by_one
    assert one_by_one.epoch > 0


def test_a_state_of_other_data_or_settings_is_refused_naming_both(manifest, tmp_path):
    saved = stream(manifest).state_dict(StreamState(0, 1, 2))
    assert stream(manifest).load_state_dict(saved) == StreamState(0, 1, 2)
    other = shards(tmp_path, CONTIGS, FractionSplits(0.2))
    for changed, key in ((stream(other), "manifest"), (stream(manifest, seed=8), "seed"),
                         (stream(manifest, seq_len=32), "seq_len"), (stream(manifest, stage=1), "stage"),
                         (stream(manifest, rc_augment=True), "rc_augment")):
        with pytest.raises(ValueError, match=f"saved {key} is .*, this run's is "):
            changed.load_state_dict(saved)


def test_a_state_that_is_no_place_in_the_order_is_refused(manifest):
    """At the rate at which epochs are counted through, 10^30 windows would take for ever."""
    s = stream(manifest)
    size = s.order.epoch_size(1)
    saved = s.state_dict(StreamState(0, 1, size - 1))
    assert s.load_state_dict(saved) == StreamState(0, 1, size - 1), "control"
    for place in ({"index": 10**30}, {"index": size}, {"index": -1}, {"index": True}, {"index": None},
                  {"epoch": 10**30}, {"epoch": 2**23}, {"epoch": -1}, {"epoch": "1"}, {"epoch": 1.0}):
        with pytest.raises(DataError, match=r"its saved place, epoch .* and index .*, is none of this order"):
            s.load_state_dict(saved | place)
    del saved["index"]
    with pytest.raises(DataError, match="index None, is none of this order"):
        s.load_state_dict(saved)


def test_bad_batch_sizes_and_empty_splits_are_refused(manifest, tmp_path):
    with pytest.raises(ValueError, match="must be a multiple of"):
        stream(manifest).batches(StreamState(), micro_batch_size=2, global_batch_size=6, dp_size=2)
    with pytest.raises(ValueError, match="stage 1"):
        stream(manifest).batches(StreamState(stage=1), micro_batch_size=2, global_batch_size=2)
    with pytest.raises(ValueError, match="no training window"):
        stream(shards(tmp_path, {"a": b"ACGT"}, ContigSplits(["a"])))


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("seq_len", [16, 64, 5000])
def test_validation_scores_each_base_once_and_none_that_trains(manifest, seq_len, dp_size):
    ranks = [list(ValidationBatches(manifest, seq_len=seq_len, batch_size=4, dp_rank=rank, dp_size=dp_size))
             for rank in range(dp_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch.ids.shape == (4, seq_len + 1) for batches in ranks for batch in batches)
    rows = [batch for turn in zip(*ranks, strict=True) for batch in turn]
    ids = torch.cat([batch.ids for batch in rows])
    assert torch.cat([batch.windows for batch in rows]).tolist() == list(range(len(ids)))
    targets = split_window(ids)[1]
    got = "".join(decode(row[row >= 0]) for row in targets)
    held_out = [CONTIGS[i.contig][i.start : i.end].upper().decode() for i in manifest.intervals("val")]
    assert got == "".join(base for text in held_out for base in text[1:] if base in "ACGT")
    train = {(i.contig, base) for i in manifest.intervals("train") for base in range(i.start, i.end)}
    assert not train & {(i.contig, base) for i in manifest.intervals("val") for base in range(i.start, i.end)}


@pytest.mark.parametrize("ranks", [1, 3, 4])
@pytest.mark.parametrize("source", ["train", "train, reverse complements", "val"])
def test_parts_are_the_slices_of_whole_windows(manifest, ranks, source):
    """What each context rank reads: its tokens, the target after them, padding past the window, and its own count."""
    tokens = -(-L // ranks) + 1  # the last ranks have padding, of 4 ranks some have nothing else

    def batches(part):
        if source == "val":
            return list(ValidationBatches(manifest, seq_len=L, batch_size=3, part=part))
        s = stream(manifest, rc_augment=source != "train")
        return list(itertools.islice(s.batches(s.start(), micro_batch_size=8, global_batch_size=8, part=part), 60))

    whole = batches(None)
    padded = [torch.nn.functional.pad(batch.ids, (0, ranks * tokens - L), value=PAD) for batch in whole]
    counts = [0] * len(whole)
    for rank in range(ranks):
        for number, batch in enumerate(batches(Part(rank * tokens, tokens))):
            expected = padded[number][:, rank * tokens : (rank + 1) * tokens + 1]
            assert torch.equal(batch.ids, expected)
            assert torch.equal(batch.windows, whole[number].windows)
            assert batch.scored == int((split_window(expected)[1] >= 0).sum())
            counts[number] += batch.scored
    assert counts == [batch.scored for batch in whole]
    assert counts == [int((split_window(batch.ids)[1] >= 0).sum()) for batch in whole]


@pytest.mark.parametrize(("tokens", "windows"), [(1, 1), (64 * 5, 5), (64 * 6 - 1, 5), (10**9, None), (None, None)])
def test_a_cap_takes_whole_windows_spread_over_the_split_the_same_for_every_rank_and_batch(manifest, tokens, windows):
    def rows(batch_size, dp_size, tokens):
        ranks = [ValidationBatches(manifest, seq_len=64, batch_size=batch_size, dp_rank=rank, dp_size=dp_size,
                                   tokens=tokens) for rank in range(dp_size)]
        assert all(len(list(batches)) == len(batches) for batches in ranks)
        ids = torch.cat([batch.ids for turn in zip(*ranks, strict=True) for batch in turn])
        return [tuple(row) for row in ids.tolist() if any(token != PAD for token in row)]

    every, chosen = rows(1, 1, None), rows(1, 1, tokens)
    assert len(chosen) == (windows or len(every))
    assert all(rows(batch_size, dp_size, tokens) == chosen for batch_size, dp_size in ((4, 1), (1, 3), (3, 2)))
    places = [every.index(row) for row in chosen]
    gaps = [after - before for before, after in itertools.pairwise([*places, len(every)])]
    assert places[0] == 0
    assert max(gaps) - min(gaps) <= 1, "at even distances"


def test_a_manifest_may_be_pickled_after_use(manifest):
    manifest.read("chr1", 0, 100)
    assert np.array_equal(pickle.loads(pickle.dumps(manifest)).read("chr1", 0, 9000), encode(CONTIGS["chr1"]))


CHILDREN, READS = 8, 300


def wrong_in_forked_children(read):
    """Wrong answers of children that read at once; `read(i)` returns whether the bases were right."""
    pipes = []
    for child in range(CHILDREN):
        receiving, sending = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(sending, struct.pack("q", sum(not read(child * READS + i) for i in range(READS))))
            os._exit(0)
        os.close(sending)
        pipes.append((pid, receiving))
    wrong = 0
    for pid, receiving in pipes:
        wrong += struct.unpack("q", os.read(receiving, 8))[0]
        os.close(receiving)
        os.waitpid(pid, 0)
    return wrong


def test_forked_workers_cannot_corrupt_each_others_reads(manifest, tmp_path):
    """Shards opened before the fork are read right; the control shows that a file object opened before it is not.

    The children of the control meet between seek and read, where on a busy machine they meet now and then.
    """
    text = CONTIGS["chr1"]
    (tmp_path / "chr1").write_bytes(text)
    want = encode(text)
    starts = np.random.default_rng(0).integers(0, 8900, CHILDREN * READS).tolist()
    meeting = multiprocessing.get_context("fork").Barrier(CHILDREN, timeout=60)
    assert np.array_equal(manifest.read("chr1", 0, 9000), want)  # opens the shards here, before the fork

    def shared_offset(i):
        file.seek(starts[i])
        meeting.wait()
        right = file.read(100) == text[starts[i] : starts[i] + 100]
        meeting.wait()
        return right

    def ours(i):
        return np.array_equal(manifest.read("chr1", starts[i], starts[i] + 100), want[starts[i] : starts[i] + 100])

    with (tmp_path / "chr1").open("rb", buffering=0) as file:
        assert wrong_in_forked_children(shared_offset) > 0.5 * CHILDREN * READS
    assert wrong_in_forked_children(ours) == 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_shard_is_one_line_at_any_number_of_workers(tmp_path, num_workers):
    directory = shards(tmp_path, {"chr1": b"ACGT" * 500}).directory
    for shard in directory.glob("*.tar"):
        shard.write_bytes(shard.read_bytes().replace(b"\xe4" * 4, b"\xe4" * 3 + b"\xe5"))
    s = stream(Manifest.load(directory))
    with pytest.raises(DataError) as caught:
        next(s.batches(s.start(), micro_batch_size=2, global_batch_size=2, num_workers=num_workers))
    assert re.fullmatch(r".*shard-0000.\.tar: sample 0000000. \(from chr1:\d+ on\) is damaged: block 0 \(its bases "
                        r"1 to \d+\) does not match its checksum; run .*", str(caught.value))


def test_many_loader_workers_read_what_is_in_the_fasta(manifest):
    manifest.read("chr1", 0, 9000)
    s = stream(manifest, rc_augment=True)
    rows = rows_of(s.batches(s.start(), micro_batch_size=2, global_batch_size=2, num_workers=8), 600)
    assert rows == [(number, expected_row(s, number >> 40, number % 2**40)) for number, _ in rows]
