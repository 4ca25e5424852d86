"""Mixtures: which source a window is of, and that a run cut anywhere goes on as if nothing had happened."""

import itertools
import json
import logging
import re
import shlex
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hyena_dist.cli.build import main as build
from hyena_dist.cli.pretrain import main
from hyena_dist.config.errors import ConfigError
from hyena_dist.config.identity import differences, identity
from hyena_dist.config.load import dump_config, load_config
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.config.warmup import stage_at
from hyena_dist.data.errors import DataError
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.mixture import SHARES, Change, MixtureOrder
from hyena_dist.data.mixture import shares as parts_of
from hyena_dist.data.order import WindowOrder
from hyena_dist.data.pool import Pool, first_weights, open_pools
from hyena_dist.data.splits import FractionSplits
from hyena_dist.data.stream import TrainStream, ValidationBatches
from hyena_dist.data.tokenizer import COMPLEMENT, PAD
from hyena_dist.tasks import evaluate as evaluation
from hyena_dist.train.banner import banner
from hyena_dist.train.curriculum import Curriculum
from tests.genomes import genome, shards

ROOT = Path(__file__).parents[2]


def orders(*lengths):
    return [WindowOrder(length, 16, seed=number, stage=0) for number, length in enumerate(lengths)]


def order(changes, count):
    return MixtureOrder(orders(*[[1000, 50, 3]] * count), [Change(*change) for change in changes])


def dealt(changes, windows):
    """The source of each window, dealt one by one by the largest deficit."""
    deficits, found = np.zeros(len(changes[0][1]), dtype=np.int64), []
    own = dict(changes)
    for window in range(windows):
        if window in own:
            parts = np.array(parts_of(own[window]))
            deficits[parts == 0] = 0
        deficits += parts
        source = int(np.where(parts > 0, deficits, -(10**12)).argmax())
        deficits[source] -= SHARES
        found.append(source)
    return found


SCHEDULES = {
    "two": [(0, (3.0, 1.0))],
    "a rare one": [(0, (0.9997, 0.0003))],
    "changes": [(0, (1.0, 1.0, 0.0)), (7, (0.1, 0.2, 0.7)), (1000, (1.0, 0.0, 0.0)), (1001, (0.0, 2.0, 1.0)),
                (20_000, (0.35, 0.24, 0.41))],
    "twenty": [(0, tuple(float(i) for i in range(1, 21))), (16_384, tuple(1 / i for i in range(1, 21)))],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_source_of_a_window_is_the_one_with_the_largest_deficit(name):
    """Places and counts, asked for in any order, are those of a deal from the first window on."""
    changes, windows = SCHEDULES[name], 40_000
    expected = dealt(changes, windows)
    count = len(changes[0][1])
    before = np.zeros((windows + 1, count), dtype=np.int64)
    before[1:] = np.cumsum(np.eye(count, dtype=np.int64)[expected], axis=0)
    mixture = order(changes, count)
    for window in np.random.default_rng(0).permutation(windows)[:5000].tolist():
        assert mixture.place(window) == (expected[window], before[window, expected[window]])
        assert mixture.counts(window) == before[window].tolist()
    for first, _ in changes:
        assert mixture.counts(first) == before[first].tolist()


def test_a_place_far_on_is_known_at_once():
    """Ten million windows on, and more; by the shares, which are exact at every multiple of SHARES."""
    mixture = order([(0, (0.5, 0.3, 0.2)), (1000, (1.0, 1.0, 1.0))], 3)
    for windows in (10**7, 10**11):
        assert sum(mixture.counts(windows)) == windows
        assert all(abs(count - windows / 3) < 1 + windows / SHARES + 1000 for count in mixture.counts(windows))
    source, number = mixture.place(10**11)
    assert mixture.counts(10**11)[source] == number
    assert mixture.counts(10**11 + 1)[source] == number + 1


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_the_weights_to_one_part(seed):
    rng = np.random.default_rng(seed)
    weights = (rng.random(rng.integers(1, 60)) ** 8 * (rng.random() < 0.5 or 1e9)).tolist()
    weights[0] += 1e-12
    weights += [0.0] * (seed % 3)
    parts = parts_of(weights)
    assert sum(parts) == SHARES
    assert all((part > 0) == (weight > 0) for part, weight in zip(parts, weights, strict=True))
    lifted = sum(weight < sum(weights) / SHARES for weight in weights)
    assert all(abs(part - weight * SHARES / sum(weights)) <= 1 + lifted for part, weight in
               zip(parts, weights, strict=True))


def test_many_short_stretches_are_as_exact_as_a_long_one():
    """A change at every step of 8 windows; a deal that forgot its deficits would never come to a source of 1/100."""
    weights = tuple([0.99 / 9] * 9 + [0.01])
    changes = [(8 * step, tuple(weight * (1 + step % 2) for weight in weights)) for step in range(500)]
    counts = order(changes, 10).counts(4000)
    assert all(abs(count - 4000 * weight) < 2 for count, weight in zip(counts, weights, strict=True))
    forgetful = [order([(0, weights)], 10).counts(8)[9] for _ in range(500)]
    assert sum(forgetful) == 0, "control"


def test_the_windows_of_a_source_are_those_of_its_own_order():
    """Epoch after epoch; its intervals are numbered behind those of the sources before."""
    own = orders([1000], [40, 30], [300])
    mixture = MixtureOrder(own, [Change(0, (1.0, 2.0, 4.0))])
    seen = {0: [], 1: [], 2: []}
    for number in range(2000):
        window = mixture.window(0, number)
        source = 0 if window.interval == 0 else 1 if window.interval < 3 else 2
        seen[source].append(tuple(window))
    for source, (alone, first) in enumerate(zip(orders([1000], [40, 30], [300]), (0, 1, 3), strict=True)):
        epoch, index, expected = 0, 0, []
        for _ in seen[source]:
            window = alone.window(epoch, index)
            expected.append((first + window.interval, *window[1:]))
            epoch, index = alone.advance(epoch, index, 1)
        assert seen[source] == expected
        assert epoch > 0
    assert [len(rows) for rows in seen.values()] == mixture.counts(2000)


@pytest.mark.parametrize("lengths", [[5], [17, 3, 9], [1000, 5], [64, 64, 64]])
def test_locate_counts_through_the_epochs(lengths):
    [own] = orders(lengths)
    places = []
    place = 0, 0
    for _ in range(700):
        places.append(place)
        place = own.advance(*place, 1)
    for number in [*range(700), *np.random.default_rng(1).permutation(700).tolist()]:
        assert own.locate(number) == places[number]
    assert [own.epoch_size(epoch) for epoch in range(places[-1][0])] == [
        len(list(group)) for _, group in itertools.groupby(places, key=lambda place: place[0])][:-1]


LAST = 24
"""Steps of a run: 5 of 8 windows of 64 bases, 4 of 8 of 100, and the rest of 256."""


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    """Two genomes, and the regions of a BED in the first as a third source."""
    directory = tmp_path_factory.mktemp("mixture")
    for number, name in enumerate(("one", "two")):
        (directory / name).mkdir()
        shards(directory / name, genome(number, 9000, 40, 6000), FractionSplits(0.1))
    (directory / "regions.bed").write_text("chr1\t100\t900\tpromoter\nchr3\t0\t300\nchr3\t250\t1000\nchr9\t1\t2\n")
    return directory


def data(directory, **changes):
    mixture = [{"name": "one", "shards": "one/shards", "weight": 2}, {"name": "two", "shards": "two/shards",
               "weight": 0.5}, {"name": "part", "shards": "one/shards", "weight": 1,
                                "regions": str(directory / "regions.bed")}]
    schedule = [{"step": 3, "weights": {"one": 1, "two": 1, "part": 0}},
                {"step": 11, "weights": {"one": 0, "two": 0.3, "part": 0.7}}]
    values = {"shards": str(directory), "seq_len": 256, "rc_augment": True, "num_workers": 0, "seed": 3,
              "mixture": mixture, "mixture_schedule": schedule} | changes
    return DataSection(**values)


def config(directory, num_workers=0, micro=1, **changes):
    train = TrainSection(run_dir="r", steps=LAST, global_batch_size=8, micro_batch_size=micro,
                         seq_len_warmup=[{"seq_len": 64, "steps": 5}, {"seq_len": 100, "steps": 4}])
    return Config(data=data(directory, num_workers=num_workers, **changes), train=train)


def take(opened, run_config, steps, ranks=1, saved=None):
    """The windows of each step over all ranks, by their number; and the state after them."""
    rows = [{} for _ in range(steps)]
    for rank in range(ranks):
        with closing(Curriculum(opened, run_config, dp_rank=rank, dp_size=ranks)) as curriculum:
            if saved is not None:
                curriculum.load_state_dict(json.loads(json.dumps(saved)))
            for step in rows:
                for batch in curriculum.take()[1]:
                    step |= {number: row.tobytes() for number, row in
                             zip(batch.windows.tolist(), batch.ids.numpy(), strict=True)}
    return rows, curriculum.state_dict()


@pytest.fixture(scope="module")
def whole(pools):
    opened = open_pools(data(pools))
    return take(opened, config(pools), LAST)


def test_the_sources_of_a_run_are_read(pools, whole):
    """Every window is of the source that its number says, also where the weights change within a stage."""
    opened = open_pools(data(pools))
    curriculum = Curriculum(opened, config(pools))
    assert [pool.name for pool in opened] == ["one", "two", "part"]
    assert opened[0].manifest is opened[2].manifest, "a shard set is opened once"
    assert opened[2].intervals("train") == [
        (interval.contig, max(start, interval.start), min(end, interval.end),
         interval.first_base + max(start, interval.start) - interval.start)
        for interval in opened[0].intervals("train")
        for contig, start, end in (("chr1", 100, 900), ("chr3", 0, 1000))
        if contig == interval.contig and max(start, interval.start) < min(end, interval.end)]
    steps, _ = whole
    shown = [Counter() for _ in steps]
    for step, rows in enumerate(steps):
        stage = stage_at(curriculum.stages, step)
        stream = curriculum._stream_of(stage)
        for number, row in rows.items():
            source, _ = stream.order.place(number)
            window = stream.order.window(0, number)
            interval = stream.intervals[window.interval]
            ids = opened[source].manifest.read(interval.contig, interval.start + window.start,
                                               interval.start + window.end)
            expected = np.full(stage.seq_len + 1, PAD, dtype=np.uint8)
            expected[: ids.size] = COMPLEMENT[ids[::-1]] if window.reverse else ids
            assert row == expected.tobytes()
            shown[step][source] += 1
    counts = [sum((shown[step] for step in range(*span)), Counter()) for span in ((0, 3), (3, 11), (11, LAST))]
    assert {source for source in counts[0]} == {0, 1, 2}
    assert counts[1].keys() == {0, 1}
    assert counts[2].keys() == {1, 2}
    assert abs(counts[2][2] - 0.7 * 8 * (LAST - 11)) < 1


@pytest.mark.parametrize("runs", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_runs_cut_and_resumed_anywhere_are_the_whole(pools, whole, runs):
    """Cut at two random steps, each part with other ranks, micro-batches and readers; the states are those of JSON."""
    rng = np.random.default_rng(15)
    opened = open_pools(data(pools))
    for case in range(runs):
        cuts = sorted(rng.integers(0, LAST + 1, 2).tolist())
        found, saved = [], None
        for first, last in itertools.pairwise([0, *cuts, LAST]):
            ranks, micro = int(rng.choice([1, 2, 4, 8])), 1
            if ranks < 8:
                micro = int(rng.choice([1, 2]))
            workers = int(rng.integers(1, 3)) if case % 10 == 0 else 0
            rows, saved = take(opened, config(pools, workers, micro), last - first, ranks, saved)
            found += rows
        assert (found, saved) == whole, f"case {case}, cut at {cuts}"


@pytest.mark.parametrize("runs", [5, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kmer", [1, 3])
def test_packed_runs_cut_and_resumed_anywhere_are_the_whole(pools, kmer, runs):
    """The same of packed windows, and of those of k-mers: mixture, schedule and length warm-up are as above."""
    def own(micro: int = 1) -> Config:
        plain = config(pools, 0, micro)
        return replace(plain, data=replace(plain.data, pack=True), model=replace(plain.model, kmer=kmer))

    opened = open_pools(own().data)
    expected = take(opened, own(), LAST)
    rng = np.random.default_rng(kmer)
    for _ in range(runs):
        cuts = sorted(rng.integers(0, LAST + 1, 2).tolist())
        found, saved = [], None
        for first, last in itertools.pairwise([0, *cuts, LAST]):
            ranks, micro = int(rng.choice([1, 2, 4])), int(rng.choice([1, 2]))
            rows, saved = take(opened, own(micro), last - first, ranks, saved)
            found += rows
        assert (found, saved) == expected, f"cut at {cuts}"


def test_control_a_resume_one_step_off_is_seen(pools, whole):
    opened = open_pools(data(pools))
    _, saved = take(opened, config(pools), 12)
    resumed, _ = take(opened, config(pools), 1, saved=saved)
    with closing(Curriculum(opened, config(pools))) as curriculum:
        curriculum.load_state_dict(saved)
        curriculum.skip(steps=1)
        _, [*batches] = curriculum.take()
    assert resumed[0] == whole[0][12]
    assert {number for batch in batches for number in batch.windows.tolist()} == whole[0][13].keys()


@pytest.mark.parametrize(("change", "key"), [
    ({"mixture_schedule": None}, "weights"),
    ({"mixture": [{"name": "one", "shards": "one/shards", "weight": 2}]}, "manifest"),
    ({"seed": 4}, "seed"),
])
def test_a_state_of_another_mixture_is_refused(pools, change, key):
    opened = open_pools(data(pools))
    _, saved = take(opened, config(pools), 2)
    other = data(pools, **({"mixture_schedule": None} | change))
    with pytest.raises(DataError, match=f"the saved {key} is .*, this run's is"):
        Curriculum(open_pools(other), replace(config(pools), data=other)).load_state_dict(saved)


def test_other_regions_are_another_mixture(pools, tmp_path):
    opened = open_pools(data(pools))
    _, saved = take(opened, config(pools), 2)
    own = data(pools)
    (tmp_path / "other.bed").write_text("chr1\t100\t901\n")
    changed = [*own.mixture[:2], own.mixture[2] | {"regions": str(tmp_path / "other.bed")}]
    other = replace(config(pools), data=replace(own, mixture=changed))
    with pytest.raises(DataError, match="the saved manifest is"):
        Curriculum(open_pools(other.data), other).load_state_dict(saved)
    copy = tmp_path / "copy.bed"
    copy.write_text((pools / "regions.bed").read_text())
    moved = replace(config(pools), data=replace(own, mixture=[*own.mixture[:2], own.mixture[2] | {
        "regions": str(copy)}]))
    assert differences(identity(config(pools)), identity(moved)) == []
    Curriculum(open_pools(moved.data), moved).load_state_dict(saved)


def test_a_mixture_of_one_is_the_plain_set(pools):
    """Windows, their numbers and the saved state."""
    plain = config(pools, shards=str(pools / "one" / "shards"), mixture=None, mixture_schedule=None)
    one = config(pools, mixture=[{"name": "one", "shards": "one/shards", "weight": 1}], mixture_schedule=None)
    assert take(open_pools(plain.data), plain, 12) == take(open_pools(one.data), one, 12)
    pool = Pool(Manifest.load(pools / "one" / "shards"))
    order_of_one = MixtureOrder([WindowOrder([i.bases for i in pool.intervals("train")], 64, seed=3, stage=0)],
                                [Change(0, (1.0,))])
    stream = TrainStream(pool.manifest, seq_len=64, seed=3)
    for number in range(1000):
        assert order_of_one.window(0, number) == stream.order.window(*stream.order.advance(0, 0, number))


def test_pools_of_one_genome_twice_come_in_different_orders(pools):
    """As two haplotypes do, whose windows must not come side by side."""
    pool = open_pools(data(pools))[0]
    stream = TrainStream([pool, pool], seq_len=64, seed=3, weights=[Change(0, (1.0, 1.0))])
    count = len(pool.intervals("train"))
    pairs = [(stream.order.window(0, n), stream.order.window(0, n + 1)) for n in range(0, 200, 2)]
    assert all(first.interval < count <= second.interval for first, second in pairs)
    same = sum(first[1:3] == second[1:3] and first.interval + count == second.interval for first, second in pairs)
    assert same < 10


def test_temperature_weighs_by_size(pools):
    mixture = [{key: value for key, value in source.items() if key != "weight"} for source in data(pools).mixture]
    for temperature, expected in ((0, [1, 1, 1]), (0.5, None), (1, None)):
        section = data(pools, mixture=mixture, mixture_temperature=float(temperature), mixture_schedule=None)
        opened = open_pools(section)
        sizes = [sum(i.bases for i in pool.intervals("train")) for pool in opened]
        assert first_weights(section, opened) == (expected or [size**temperature for size in sizes])


def test_a_bed_that_does_not_fit_is_said(pools, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        open_pools(data(pools))
    assert re.search(r"source part: .*regions.bed: of 4 rows 0 were cut .* and 1 left out", caplog.text)
    own = data(pools)
    for text, message in (("1\t1\t2\n", "has no base of .*: give a BED of this assembly, with its names"),
                          ("chr1\tx\t2\n", "line 1: start 'x'"),
                          ("chr2\t0\t1\n", "source part: .* inside the regions of .* has no training window")):
        (tmp_path / "b.bed").write_text(text)
        changed = replace(own, mixture=[*own.mixture[:2], own.mixture[2] | {"regions": str(tmp_path / "b.bed")}])
        with pytest.raises(DataError, match=message):
            Curriculum(open_pools(changed), replace(config(pools), data=changed))


MINIMAL = "data: {shards: s}\ntrain: {run_dir: r}"
TWO = "data.mixture=[{name: a, shards: a, weight: 1}, {name: b, shards: b, weight: 2}]"


@pytest.mark.parametrize(("overrides", "message"), [
    (["data.mixture=one"], "data.mixture must be a list of 1 to 1,000 sources"),
    (["data.mixture=[]"], "data.mixture must be a list"),
    (["data.mixture=[a]"], r"data.mixture\[0\] must be a source like"),
    (["data.mixture=[{name: a, wieght: 1}]"], r"data.mixture\[0\].wieght is not a key of it: use name, shards"),
    (["data.mixture=[{weight: 1}]"], r"data.mixture\[0\].name must be a word .* got None"),
    (["data.mixture=[{name: 1, weight: 1}]"], r"data.mixture\[0\].name must be .* got 1: write it in quotes"),
    (["data.mixture=[{name: a/b, weight: 1}]"], r"data.mixture\[0\].name must be a word"),
    (["data.mixture=[{name: a}]"], r"data.mixture\[0\].weight is missing: give it, or data.mixture_temperature"),
    (["data.mixture=[{name: a, weight: 1}]", "data.mixture_temperature=0.5"], "both say what its share is"),
    (["data.mixture=[{name: a, weight: 0}]"], "the weights of data.mixture are all 0"),
    (["data.mixture=[{name: a, weight: -1}]"], r"data.mixture\[0\].weight must be a number from 0"),
    (["data.mixture=[{name: a, weight: .inf}]"], r"data.mixture\[0\].weight must be a number from 0"),
    (["data.mixture=[{name: a, weight: .nan}]"], r"data.mixture\[0\].weight must be a number from 0"),
    (["data.mixture=[{name: a, weight: true}]"], r"data.mixture\[0\].weight must be a number from 0"),
    (["data.mixture=[{name: a, weight: 1, shards: 3}]"], r"data.mixture\[0\].shards must be a path, got 3"),
    (["data.mixture=[{name: a, weight: 1, regions: ''}]"], r"data.mixture\[0\].regions must be a path, got ''"),
    (["data.mixture=[{name: a, weight: 1}, {name: a, weight: 1}]"], r"\[1\].name: a is the name of an earlier source"),
    (["data.mixture_temperature=0.5"], "data.mixture_temperature is of a mixture, and data.mixture is null"),
    (["data.mixture_schedule=[]"], "data.mixture_schedule is of a mixture, and data.mixture is null"),
    (["data.mixture=[{name: a}]", "data.mixture_temperature=-1"], "data.mixture_temperature must be 0 or greater"),
    (["data.mixture=[{name: a}]", "data.mixture_temperature=50"], "mixture_temperature must be at most 10, got 50"),
    ([TWO, "data.mixture_schedule=5"], "data.mixture_schedule must be a list of changes"),
    ([TWO, "data.mixture_schedule=[5]"], r"data.mixture_schedule\[0\] must be a change like"),
    ([TWO, "data.mixture_schedule=[{step: 0, weights: {a: 1, b: 1}}]"], r"\[0\].step must be a whole number greater"),
    ([TWO, "data.mixture_schedule=[{step: 5, weights: {a: 1}}]"], r"\[0\].weights has no b: give the weight of every"),
    ([TWO, "data.mixture_schedule=[{step: 5, weights: {a: 1, c: 1}}]"], r"weights.c: data.mixture has no such source"),
    ([TWO, "data.mixture_schedule=[{step: 5, weights: {a: 0, b: 0}}]"], r"\[0\].weights are all 0"),
    ([TWO, "data.mixture_schedule=[{step: 5, weights: [1, 1]}]"], r"\[0\].weights must be a weight for every source"),
    ([TWO, "data.mixture_schedule=[{step: 5, weights: {a: 1, b: 1}}, {step: 5, weights: {a: 1, b: 1}}]"],
     r"data.mixture_schedule\[1\].step \(5\) is not after the 5 of the change before"),
])
def test_what_is_no_mixture_is_refused_by_key(tmp_path, overrides, message):
    (tmp_path / "c.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "c.yaml", overrides)


def test_a_mixture_is_read_written_and_its_paths_expanded(tmp_path):
    (tmp_path / "c.yaml").write_text(MINIMAL)
    run = load_config(tmp_path / "c.yaml", [
        "data.mixture=[{name: a, shards: $SETS/a, weight: 1}, {name: b, regions: ~/b.bed, weight: 0.5}]",
        "data.mixture_schedule=[{step: 5, weights: {a: 1, b: 0}}]"], env={"SETS": "/sets"})
    assert run.data.mixture[0]["shards"] == "/sets/a"
    assert not run.data.mixture[1]["regions"].startswith("~")
    assert run.data.changes()[0].weights == {"a": 1, "b": 0}
    (tmp_path / "again.yaml").write_text(dump_config(run))
    assert load_config(tmp_path / "again.yaml") == run
    with pytest.raises(ConfigError, match=r"data.mixture\[0\].shards=\$SETS/a: the environment variable SETS is not"):
        load_config(tmp_path / "c.yaml", ["data.mixture=[{name: a, shards: $SETS/a, weight: 1}]"], env={})


def test_the_banner_and_the_evaluation_know_of_a_mixture(pools, monkeypatch):
    run = config(pools)
    lines = banner(run, {"WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    assert any(line.startswith("length") and line.endswith(" of a mixture: one, two, part") for line in lines)
    monkeypatch.setattr(evaluation, "load_run", lambda *_: (run, None, None))
    monkeypatch.chdir("/")
    run = replace(run, data=replace(run.data, shards="nowhere"))
    with pytest.raises(ConfigError, match="runs/x: it was trained on a mixture, .*: say with --shards DIR where"):
        evaluation.evaluate("runs/x")


def test_validation_scores_every_source_and_a_cap_is_shared(pools):
    opened = open_pools(data(pools))
    alone = [list(ValidationBatches([pool], seq_len=64, batch_size=1)) for pool in opened]
    together = list(ValidationBatches(opened, seq_len=64, batch_size=1))
    assert [batch.ids.tolist() for batches in alone for batch in batches] == [batch.ids.tolist() for batch in together]
    assert all(alone)
    capped = list(ValidationBatches(opened, seq_len=64, batch_size=1, tokens=64 * 6))
    assert [batch.ids.tolist() for batch in capped] == [
        batch.ids.tolist() for pool in opened for batch in
        ValidationBatches([pool], seq_len=64, batch_size=1, tokens=64 * 2)]
    assert len(list(ValidationBatches(opened, seq_len=64, batch_size=1, tokens=1))) == 3


def test_a_dry_run_looks_at_every_source(pools, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def dry(*overrides):
        status = main(["--config", str(ROOT / "configs/quickstart.yaml"), f"data.shards={pools}", "data.seq_len=64",
                       "data.mixture_schedule=null", *overrides, "--dry-run"])
        return status, capsys.readouterr().err

    good = "{name: one, shards: one/shards, weight: 1}"
    part = f"{{name: part, shards: two/shards, regions: {pools / 'regions.bed'}, weight: 1}}"
    status, said = dry(f"data.mixture=[{good}, {part}]",
                       "data.mixture_schedule=[{step: 99999, weights: {one: 1, part: 0}}]")
    assert status == 0
    assert "data.mixture_schedule[0].step (99999) is never reached, train.steps is" in said
    assert "not on this machine: build" not in said
    status, said = dry(f"data.mixture=[{good}, {{name: two, shards: three, weight: 1}}]")
    assert status == 0
    assert f"data.mixture[1].shards={pools / 'three'} is not on this machine: build it" in said
    status, said = dry(f"data.mixture=[{good}, {{name: two, shards: one/shards, regions: no.bed, weight: 1}}]")
    assert status == 0
    assert "data.mixture[1].regions=no.bed is not on this machine: copy it there" in said
    (tmp_path / "wrong.bed").write_text("chrX\t0\t5\n")
    status, said = dry(f"data.mixture=[{good}, {{name: two, shards: one/shards, regions: wrong.bed, weight: 1}}]")
    assert status == 2
    assert "source two: wrong.bed has no base of" in said


def test_the_documented_mixture_runs(tmp_path, monkeypatch, capsys):
    """Its commands, its files and its configuration, as far as no training is needed."""
    text = (ROOT / "docs/mixtures.md").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/sample").symlink_to(ROOT / "shards/sample")
    commands = re.findall(r"^    python shards/build.py (.*)$", text, re.MULTILINE)
    assert [build(shlex.split(command)) for command in commands] == [0, 0]
    (tmp_path / "mix.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    (tmp_path / "genes.bed").write_text(re.search(r"```\n(human.*?)```", text, re.DOTALL)[1])
    assert main(["--config", "mix.yaml", "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert not [line for line in said.splitlines() if line.startswith("warning: ") and "GPU" not in line
                and "not validated" not in line]
    run = load_config("mix.yaml")
    with closing(Curriculum(open_pools(run.data), run)) as curriculum:
        stream = curriculum._stream_of(curriculum.stages[0])
    assert stream.counts(1600) == [800, 400, 400], "a half, a quarter and a quarter"
    assert np.diff([stream.counts(1600), stream.counts(3200)], axis=0).tolist() == [[400, 400, 800]]
