"""Soft-masked bases count in the loss as much as data.lower_case_weight says, and validation tells them apart."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.data.errors import DataError
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.rows import Part
from hyena_dist.data.splits import FractionSplits
from hyena_dist.data.stream import TrainStream, ValidationBatches
from hyena_dist.data.tokenizer import IGNORE, encode, split_window
from hyena_dist.model.loss import token_loss
from hyena_dist.parallel.groups import Groups
from hyena_dist.train.pretraining import Pretraining
from tests.compare import rel
from tests.genomes import genome, shards
from tests.unit.test_segment_format import FORMAT_1

CONTIGS = genome(3, 5000, 40_000, 3)
L = 64
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return shards(tmp_path_factory.mktemp("weights"), CONTIGS, FractionSplits(0.1), segment_bases=20_000,
                  shard_bases=50_000)


def weighted(manifest, **changes):
    return TrainStream(manifest, **{"seq_len": L, "seed": 7, "lower_case_weight": 0.1, **changes})


def batches_of(stream, count, **changes):
    return list(itertools.islice(stream.batches(stream.start(), **{"micro_batch_size": 8, "global_batch_size": 8,
                                                                   **changes}), count))


def text_of(manifest):
    """The bases of each contig, with their case, by the reader of whole samples."""
    found = {contig.name: np.full(contig.bases, ord("?"), dtype=np.uint8) for contig in manifest.contigs}
    for number, sample in enumerate(manifest.index.samples):
        bases = manifest.read_sample(number)
        for row in manifest.segments[sample.first : sample.last]:
            found[manifest.contigs[row.contig].name][row.start : row.end] = bases[row.place :][: row.end - row.start]
    return found


@pytest.mark.parametrize("form", ["of today", "1"])
@pytest.mark.parametrize("seq_len", [L, 30_000])
@pytest.mark.parametrize("rc_augment", [False, True])
def test_soft_marks_the_lower_case_of_the_text(manifest, form, seq_len, rc_augment):
    """On both strands, over the borders of blocks and segments, in both formats; the ids are those without it."""
    opened = manifest if form == "of today" else Manifest.load(FORMAT_1)
    assert form != "1" or opened.index.version == 1
    text, stream = text_of(opened), weighted(opened, seq_len=seq_len, rc_augment=rc_augment)
    plain = TrainStream(opened, seq_len=seq_len, seed=7, rc_augment=rc_augment)
    marked = 0
    for batch, other in zip(batches_of(stream, 12), batches_of(plain, 12), strict=True):
        assert torch.equal(batch.ids, other.ids)
        assert torch.equal(batch.windows, other.windows)
        assert other.soft is None
        for number, soft in zip(batch.windows.tolist(), batch.soft.numpy(), strict=True):
            window = stream.order.window(number >> 40, number % 2**40)
            interval = stream.intervals[window.interval]
            lower = text[interval.contig][interval.start + window.start : interval.start + window.end] >= ord("a")
            lower = lower[::-1] if rc_augment and window.reverse else lower
            assert soft[: lower.size - 1].tolist() == lower[1:].tolist()
            assert not soft[lower.size - 1 :].any(), "padding"
            marked += int(soft.sum())
        targets = split_window(batch.ids)[1] != IGNORE
        assert batch.scored == pytest.approx(float((targets & ~batch.soft).sum() + 0.1 * (targets & batch.soft).sum()))
        upper, masked = batch.scored_by_row().sum(0).tolist()
        assert upper + 0.1 * masked == pytest.approx(batch.scored)
        assert other.scored == int(targets.sum())
    assert marked > 100


def test_parts_workers_and_validation_mark_the_same_bases(manifest):
    stream = weighted(manifest, rc_augment=True)
    whole = batches_of(stream, 10)
    for batch, ahead in zip(whole, batches_of(stream, 10, num_workers=2), strict=True):
        assert torch.equal(batch.soft, ahead.soft)
        assert batch.scored == ahead.scored
    for first in (0, 32):
        for batch, part in zip(whole, batches_of(stream, 10, part=Part(first, 32)), strict=True):
            assert torch.equal(batch.soft[:, first : first + 32], part.soft)
    halves = [sum(batch.scored for batch in batches_of(stream, 10, part=Part(first, 32))) for first in (0, 32)]
    assert sum(halves) == pytest.approx(sum(batch.scored for batch in whole))
    held_out = "".join(text[1:] for text in (CONTIGS[i.contig][i.start : i.end].decode()
                                             for i in manifest.intervals("val")))
    val = list(ValidationBatches(manifest, seq_len=L, batch_size=4))
    scored = [(split_window(batch.ids)[1] != IGNORE, batch.soft) for batch in val]
    assert sum(int((ok & soft).sum()) for ok, soft in scored) == sum(held_out.count(base) for base in "acgt")
    assert sum(batch.scored for batch in val) == sum(held_out.count(base) for base in "acgtACGT")


def plain_loop(logits, targets, weights):
    """The same, one target after the other."""
    total, count = torch.zeros((), dtype=logits.dtype), 0.0
    for row, goal, weight in zip(logits.flatten(0, 1), targets.flatten().tolist(), weights.flatten().tolist(),
                                 strict=True):
        if goal != IGNORE and weight:
            total = total - weight * (row[goal] - torch.logsumexp(row, 0))
            count += weight
    return total, count


@pytest.mark.parametrize("weight", [0.0, 0.1, 2.5])
def test_weights_in_the_loss_equal_a_plain_loop(weight):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 40, 16, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.randint(0, 12, (3, 40), generator=generator)
    targets[torch.rand(3, 40, generator=generator) < 0.2] = IGNORE
    weights = 1 + (weight - 1) * (torch.rand(3, 40, generator=generator) < 0.5).double()
    expected, count = plain_loop(logits, targets, weights)
    [gradient] = torch.autograd.grad(expected, logits)
    total, scored = token_loss(logits, targets, weights=weights)
    [found] = torch.autograd.grad(total, logits)
    errors = [rel(total.detach(), expected.detach()), abs(scored.item() / count - 1), rel(found, gradient)]
    bare = rel(token_loss(logits.detach(), targets)[0], expected.detach())
    print(f"weight {weight}: {errors}, tolerance 1e-12 beside the {bare:.1e} of no weights")
    assert max(errors) < 1e-12
    assert bare > 1e-2


def test_weights_of_1_change_no_bit():
    logits = torch.randn(4, 100, 16).requires_grad_()
    targets = torch.randint(0, 12, (4, 100))
    total, count = token_loss(logits, targets)
    weighted_total, weighted_count = token_loss(logits, targets, weights=torch.ones(4, 100))
    assert torch.equal(total, weighted_total)
    assert count == weighted_count
    assert torch.equal(*(torch.autograd.grad(loss, logits)[0] for loss in (total, weighted_total)))


def test_an_impossible_base_without_weight_is_not_seen():
    logits = torch.zeros(1, 2, 16)
    logits[0, 0, 7] = -torch.inf
    targets = torch.tensor([[7, 8]])
    assert token_loss(logits, targets, weights=torch.tensor([[0.0, 1.0]]))[0].isfinite()
    assert token_loss(logits, targets, weights=torch.tensor([[0.1, 1.0]]))[0] == torch.inf, "control"


def config(manifest, **changes):
    return Config(data=DataSection(shards=str(manifest.directory), seq_len=L, num_workers=0, **changes),
                  train=TrainSection(run_dir="r", steps=12, global_batch_size=8, micro_batch_size=2),
                  model=ModelSection(num_layers=1, hidden_size=8, max_seq_len=L, embed_dropout=0.0, resid_dropout=0.0))


@pytest.mark.parametrize("weight", [1.0, 0.1, 0.0])
def test_a_step_is_the_weighted_mean_over_all_its_micro_batches(manifest, weight):
    objective = Pretraining(config(manifest, lower_case_weight=weight), Groups.single(), CPU)
    step = objective.next_step()
    with torch.no_grad():
        mean = sum(float(objective.loss(objective.module, batch, 0)) for batch in step.batches) / step.scored
        total = count = 0.0
        for batch in batches_of(weighted(manifest, seed=0), 4, micro_batch_size=2):
            inputs, targets, windows = batch.to(CPU)
            own = torch.where(batch.soft, weight, 1.0)
            part, scored = plain_loop(objective.module(inputs), targets, own)
            total, count = total + float(part), count + scored
    print(f"weight {weight}: {abs(mean * count / total - 1):.1e}, tolerance 1e-5")
    assert math.isclose(step.scored, count, rel_tol=1e-6)
    assert math.isclose(mean, total / count, rel_tol=1e-5)
    assert all((batch.soft is None) == (weight == 1) for batch in step.batches)


def test_validation_tells_upper_from_lower_case(manifest):
    objective = Pretraining(config(manifest, lower_case_weight=0.1), Groups.single(), CPU)
    scores = objective.validate(objective.module, iter)
    sums = {"upper": [0.0, 0.0], "lower": [0.0, 0.0]}
    with torch.no_grad():
        for batch in ValidationBatches(manifest, seq_len=L, batch_size=2):
            inputs, targets, _ = batch.to(CPU)
            logits = objective.module(inputs)
            for case, chosen in (("upper", ~batch.soft), ("lower", batch.soft)):
                part, count = token_loss(logits, targets.masked_fill(~chosen, IGNORE))
                sums[case][0] += float(part)
                sums[case][1] += float(count)
    for case, (total, count) in sums.items():
        assert scores.extras[f"case_perplexity/{case}"] == pytest.approx(math.exp(total / count), rel=1e-6)
    assert scores.loss == pytest.approx((sums["upper"][0] + sums["lower"][0]) / (sums["upper"][1] + sums["lower"][1]))
    assert scores.scored == sums["upper"][1] + sums["lower"][1], "validation counts all bases alike"


def test_what_is_all_soft_masked_needs_a_weight(tmp_path):
    lower = shards(tmp_path, {"chr1": b"acgt" * 500 + b"N" * 100})
    full = batches_of(weighted(lower, lower_case_weight=1.0), 1)[0]
    with pytest.raises(DataError, match="all that are known are soft-masked, and data.lower_case_weight is 0; give"):
        weighted(lower, lower_case_weight=0.0)
    assert batches_of(weighted(lower, lower_case_weight=0.5), 1)[0].scored == 0.5 * full.scored > 0
    assert full.soft is None


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_a_weight_is_not_negative(manifest, weight):
    with pytest.raises(ValueError, match="data.lower_case_weight must be 0 or greater and finite"):
        replace(config(manifest).data, lower_case_weight=weight)


def test_ids_of_the_text_are_those_of_before(manifest):
    """Nothing is marked where nobody asked."""
    assert np.array_equal(manifest.read("chr2", 0, 40_000), encode(CONTIGS["chr2"]))
