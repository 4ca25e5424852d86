"""Packing short contigs, and the ends of long ones, into windows: every base is still a target once, no target lies
across a border, and the order stays a pure function of seed, stage and epoch."""

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from hyena_dist.cli.pretrain import main
from hyena_dist.config.errors import ConfigError
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.data.build import build
from hyena_dist.data.contigs import Source
from hyena_dist.data.errors import DataError
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.mixture import Change
from hyena_dist.data.order import WindowOrder
from hyena_dist.data.packing import across, best_fit, edges
from hyena_dist.data.pool import Pool
from hyena_dist.data.rows import Part
from hyena_dist.data.splits import FractionSplits, Splits
from hyena_dist.data.stream import TrainStream, ValidationBatches
from hyena_dist.data.tokenizer import COMPLEMENT, IGNORE, PAD, A, T, Tokenizer, encode
from hyena_dist.model.kinds import check
from hyena_dist.model.kinds.attention import AttentionKind
from tests.genomes import genome, shards, write_fasta

ROOT = Path(__file__).parents[2]
L = 64
CONTIGS = genome(5, 3000, 1, 2, 40, 65, 64, 66, *[10 + 3 * n for n in range(40)])


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    return shards(tmp_path_factory.mktemp("packing"), CONTIGS, FractionSplits(0.2))


def stream(manifest, **changes) -> TrainStream:
    return TrainStream(manifest, **{"seq_len": L, "seed": 7, "pack": True, **changes})


def epoch_batches(s: TrainStream, count: int, **options):
    batches = s.batches(s.start(), **{"micro_batch_size": 1, "global_batch_size": 4, **options})
    return list(itertools.islice(batches, count))


@pytest.mark.parametrize("capacity", [5, 65, 1000])
def test_no_window_is_too_full_and_no_two_are_half_empty(capacity):
    sizes = np.random.default_rng(0).integers(2, capacity, 500).tolist()
    chosen = best_fit(sizes, capacity)
    filled = np.bincount(chosen, weights=sizes)
    assert filled.max() <= capacity
    assert np.count_nonzero(filled <= capacity / 2) <= 1
    assert sorted(set(chosen)) == list(range(len(filled)))
    print(f"{sum(sizes) / capacity / len(filled):.1%} of {len(filled)} windows of {capacity} are filled")


@pytest.mark.parametrize("rc_augment", [False, True])
def test_pieces_stand_in_a_window_as_in_the_fasta(manifest, rc_augment):
    s = stream(manifest, rc_augment=rc_augment)
    count = s.order.epoch_size(0) + s.order.epoch_size(1)
    shared = 0
    for batch in epoch_batches(s, count):
        number = int(batch.windows)
        pieces = s.order.pieces(number >> 40, number & (1 << 40) - 1)
        expected = []
        for piece in pieces:
            interval = s.intervals[piece.interval]
            ids = encode(CONTIGS[interval.contig][interval.start + piece.start : interval.start + piece.end])
            expected += (COMPLEMENT[ids[::-1]] if rc_augment and piece.reverse else ids).tolist()
        assert batch.ids[0].tolist() == expected + [PAD] * (L + 1 - len(expected))
        assert batch.segments == [edges([piece.end - piece.start for piece in pieces], L)]
        shared += len(pieces) > 1
    assert shared > 10


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_base_is_a_target_once_an_epoch(manifest, epoch):
    s = stream(manifest)
    start = s.advance(s.start(), sum(s.order.epoch_size(e) for e in range(epoch)))
    seen, scored = {}, 0
    for index in range(s.order.epoch_size(epoch)):
        for piece in s.order.pieces(epoch, index):
            for base in range(piece.start + 1, piece.end):
                seen[piece.interval, base] = seen.get((piece.interval, base), 0) + 1
    assert seen == {(i, base): 1 for i, interval in enumerate(s.intervals) for base in range(1, interval.bases)}
    batches = s.batches(start, micro_batch_size=1, global_batch_size=1)
    for batch in itertools.islice(batches, s.order.epoch_size(epoch)):
        targets = batch.to(torch.device("cpu"))[1]
        assert batch.scored == int((targets != IGNORE).sum()) == int(batch.scored_by_row().sum())
        scored += batch.scored
    texts = (CONTIGS[i.contig][i.start + 1 : i.end] for i in s.intervals)
    assert scored == sum(int(((ids >= A) & (ids <= T)).sum()) for ids in map(encode, texts))


@pytest.mark.parametrize("tokenizer", [Tokenizer(3), Tokenizer(3, overlap=True)])
def test_kmers_are_packed_by_their_tokens(manifest, tokenizer):
    """As many are scored as without packing, where a k-mer that overlaps the one before it needs that too."""
    found = {}
    for pack in (False, True):
        s = stream(manifest, tokenizer=tokenizer, pack=pack)
        batches = epoch_batches(s, s.order.epoch_size(0))
        for batch in batches:
            targets = batch.to(torch.device("cpu"))[1]
            assert batch.scored == tokenizer.stride * int((targets != IGNORE).sum()) == int(batch.scored_by_row().sum())
        held_out = ValidationBatches(manifest, seq_len=L, batch_size=2, pack=pack, tokenizer=tokenizer)
        found[pack] = sum(batch.scored for batch in batches), sum(batch.scored for batch in held_out)
        found["windows", pack] = len(batches)
    assert found[False] == found[True]
    assert found["windows", True] < found["windows", False]


def test_packing_needs_fewer_windows_and_differs_by_epoch_stage_and_seed(manifest):
    def first(s, epoch):
        return [s.order.pieces(epoch, i) for i in range(s.order.epoch_size(epoch))]

    s = stream(manifest)
    plain = stream(manifest, pack=False)
    print(f"{plain.order.epoch_size(0)} windows without packing, {s.order.epoch_size(0)} with it")
    assert s.order.epoch_size(0) < 0.8 * plain.order.epoch_size(0)
    shared, full = s.order.shared(0), plain.order.epoch_size(0) - s.order.shared(0).pieces
    assert shared.windows + full == shared.of_windows
    assert (shared.of_windows, plain.order.shared(0)) == (s.order.epoch_size(0), (0, 0, plain.order.epoch_size(0)))
    orders = [first(s, 0), first(s, 1), first(stream(manifest, stage=1), 0), first(stream(manifest, seed=8), 0)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    assert first(stream(manifest), 0) == orders[0]
    assert {tuple(sorted(w)) for w in orders[0]} != {tuple(sorted(w)) for w in orders[1]}, "other partners"


def test_ranks_parts_and_workers_see_the_same_windows(manifest):
    """At any number of data ranks, context ranks and reader processes, and from the middle of an epoch on."""
    s = stream(manifest, rc_augment=True, lower_case_weight=0.5)
    whole = epoch_batches(s, 200)
    for dp_size, first in ((2, 0), (4, 36)):
        for rank in range(dp_size):
            batches = s.batches(s.advance(s.start(), first), micro_batch_size=1, global_batch_size=4, dp_rank=rank,
                                dp_size=dp_size, num_workers=dp_size // 2)
            for step, batch in enumerate(itertools.islice(batches, 20)):
                same(batch, whole[first + step * dp_size + rank])
            batches.close()
    tokens = 68 // 2  # a window is padded to 68 tokens over two context ranks
    parts = [epoch_batches(s, 200, part=Part(rank * tokens, tokens, 68)) for rank in range(2)]
    cpu = torch.device("cpu")
    for batch, *halves in zip(whole, *parts, strict=True):
        for which, expected in enumerate(batch.to(cpu)[:2]):
            assert torch.equal(torch.cat([half.to(cpu)[which] for half in halves], dim=1)[:, :L], expected)
        assert sum(half.scored for half in halves) == batch.scored
        assert halves[0].segments == halves[1].segments
        assert halves[0].segments[0][-1] == 68


def same(a, b) -> None:
    assert torch.equal(a.ids, b.ids)
    assert torch.equal(a.windows, b.windows)
    assert torch.equal(a.across, b.across)
    assert (a.scored, a.segments) == (b.scored, b.segments)


def test_a_state_goes_on_in_the_middle_of_an_epoch(manifest):
    s, draw = stream(manifest), random.Random(0)
    whole = epoch_batches(s, 150)
    for place in draw.sample(range(140), 10):
        other = stream(manifest)
        state = other.load_state_dict(s.state_dict(s.advance(s.start(), place)))
        for batch, expected in zip(itertools.islice(other.batches(state, micro_batch_size=1, global_batch_size=1), 5),
                                   whole[place:], strict=False):
            same(batch, expected)
    with pytest.raises(DataError, match="the saved pack is True, this run's is False"):
        stream(manifest, pack=False).load_state_dict(s.state_dict(s.start()))
    old = {key: value for key, value in stream(manifest, pack=False).state_dict(s.start()).items() if key != "pack"}
    assert stream(manifest, pack=False).load_state_dict(old) == s.start(), "a state from before there was packing"
    with pytest.raises(DataError, match="the saved pack is False, this run's is True"):
        stream(manifest).load_state_dict(old)


@pytest.mark.parametrize("tokenizer", [Tokenizer(), Tokenizer(3), Tokenizer(3, overlap=True)])
def test_what_fits_into_one_window_is_far_on_at_once(tokenizer, monkeypatch):
    """Each window is an epoch then: millions of them, packed one by one, would take many minutes at every start. The
    control: a token more, and the windows of each epoch have to be counted."""
    lengths = [1, 2, 3, 20, tokenizer.bases(20)]
    tokens = sum(tokenizer.tokens(length) for length in lengths)
    order, more = (WindowOrder(lengths, size, seed=0, stage=0, tokenizer=tokenizer, pack=True)
                   for size in (tokens - 1, tokens - 2))
    assert [order._tiling_of(epoch).size for epoch in range(50)] == [1] * 50
    assert len(order.pieces(7, 0)) == sum(tokenizer.tokens(length) > 1 for length in lengths)
    packings = []
    own = WindowOrder._tiling_of
    monkeypatch.setattr(WindowOrder, "_tiling_of", lambda order, epoch: packings.append(epoch) or own(order, epoch))
    assert order.advance(3, 0, 10**9) == (3 + 10**9, 0)
    assert len(packings) <= 1
    more.advance(0, 0, 20)
    assert len(packings) > 5


def test_a_source_of_a_mixture_is_packed_by_itself(manifest, tmp_path):
    other = shards(tmp_path, genome(9, *[20 + n for n in range(30)]))
    s = TrainStream([Pool(manifest, name="a"), Pool(other, name="b")], seq_len=L, seed=7, pack=True,
                    weights=[Change(0, (0.5, 0.5))])
    alone = [WindowOrder([i.bases for i in s.intervals if (i in other.intervals("train")) == (pool is other)], L,
                         seed=seed, stage=0, pack=True) for pool, seed in ((manifest, 7),)]
    boundary = len(manifest.intervals("train"))
    number = 0
    for index in range(100):
        pieces = s.order.pieces(0, index)
        source, _ = s.order.place(index)
        assert {piece.interval >= boundary for piece in pieces} == {source == 1}
        if source == 0:
            assert pieces == alone[0].pieces(*alone[0].locate(number))
            number += 1
    assert number == 50


def test_a_validation_scores_each_base_once(manifest):
    """Its packed windows have the targets of the padded ones, and never two classes."""
    found = {}
    for pack in (False, True):
        batches = list(ValidationBatches(manifest, seq_len=L, batch_size=3, pack=pack))
        targets = torch.cat([batch.to(torch.device("cpu"))[1].flatten() for batch in batches])
        found[pack] = sorted(targets[targets != IGNORE].tolist())
        assert sum(batch.scored for batch in batches) == len(found[pack])
    assert found[False] == found[True]
    some = ValidationBatches(manifest, seq_len=L, batch_size=3, pack=True, tokens=5 * L)
    assert len(some) == 2
    assert len(ValidationBatches(manifest, seq_len=L, batch_size=1, pack=True)) < len(
        ValidationBatches(manifest, seq_len=L, batch_size=1))


def test_windows_of_one_species_alone(tmp_path):
    sources = [Source(write_fasta(tmp_path / f"{name}.fa", genome(seed, *[15] * 9)), name)
               for seed, name in enumerate(("mouse", "human"))]
    manifest = build(sources, tmp_path / "shards", Splits())
    batches = ValidationBatches(manifest, split="train", seq_len=L, batch_size=1, pack=True)
    assert batches.classes == [("", "mouse"), ("", "human")]
    assert batches.class_of == [0, 0, 0, 1, 1, 1]


def test_what_lies_across_a_border():
    assert edges([], 8) == (0, 8)
    assert edges([3, 4], 8) == (0, 3, 7, 8)
    assert edges([3, 6], 8) == (0, 3, 8), "the last base is only a target"
    assert across([(0, 3, 7, 8), (0, 8)], 0, 8).tolist() == [[False, False, True, False, False, False, True, False],
                                                             [False] * 8]
    assert across([(0, 3, 5, 8)], 4, 4).tolist() == [[True, False, False, False]]


def test_the_dry_run_says_what_shares_windows_and_what_should(manifest, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def said(*overrides: str) -> str:
        quickstart = ["--config", str(ROOT / "configs/quickstart.yaml"), f"data.shards={manifest.directory}"]
        assert main([*quickstart, f"data.seq_len={L}", *overrides, "--dry-run"]) == 0
        return capsys.readouterr().err

    shared = WindowOrder([i.bases for i in manifest.intervals("train")], L, seed=0, stage=0, pack=True).shared(0)
    assert (f"note: data.pack: {shared.pieces} contigs and ends of contigs are too short for a window of 64 and share "
            f"{shared.windows} of the {shared.of_windows} windows of an epoch") in said("data.pack=true")
    plain = said("data.seq_len=512")
    assert "hold a contig of at most half of data.seq_len (512) and padding: let contigs share windows" in plain
    assert "data.pack" not in said("data.seq_len=16")
    assert "every window is padded" not in said("data.seq_len=1000", "data.pack=true", "data.val_seq_len=64")


def test_the_program_of_the_page(capsys):
    program = (ROOT / "docs/short-contigs.md").read_text("utf-8").split("```python\n")[1].split("```")[0]
    exec(compile(program, "docs/short-contigs.md", "exec"), {})
    assert float(capsys.readouterr().out.split()[0]) < 1e-5


def test_a_kind_of_mixer_that_does_not_know_segments_is_refused(monkeypatch):
    config = Config(data=DataSection(shards="s", pack=True), model=ModelSection(layer_pattern="HA"),
                    train=TrainSection(run_dir="r"))
    check(config, world_size=1)  # the control
    monkeypatch.setattr(AttentionKind, "knows_segments", False)
    with pytest.raises(ConfigError, match=r"data.pack: .* layers \(A of model.layer_pattern\) do not keep the contigs"):
        check(config, world_size=1)
