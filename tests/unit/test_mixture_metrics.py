"""What a run on a mixture says: loss by source and species, shares, epochs, unique bases, loss mass, repeats."""

import json
import math
import re
from collections import Counter
from contextlib import closing
from dataclasses import replace

import pytest
import torch

from hyena_dist.config.errors import UserError
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.data.build import build
from hyena_dist.data.contigs import Source
from hyena_dist.data.pool import open_pools
from hyena_dist.data.splits import FractionSplits
from hyena_dist.data.stream import ValidationBatches
from hyena_dist.model.evaluate import evaluate_split
from hyena_dist.parallel.groups import Groups
from hyena_dist.train.curriculum import Curriculum
from hyena_dist.train.metrics import Metrics, Row, extra_names, read_rows
from hyena_dist.train.pretraining import Pretraining, repeats
from hyena_dist.train.report import write_report
from tests.genomes import genome, write_fasta

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Two shard sets, the first of two species."""
    found = tmp_path_factory.mktemp("sets")
    fasta = [write_fasta(found / f"{name}.fa", genome(number, *lengths)) for number, (name, lengths) in
             enumerate({"man": (3000, 900), "mouse": (2000,), "worm": (5000, 70)}.items())]
    build([Source(fasta[0], "man"), Source(fasta[1], "mouse")], found / "mammals", FractionSplits(0.2))
    build([Source(fasta[2], "worm")], found / "worms", FractionSplits(0.2))
    return found


def config(directory, **changes):
    mixture = [{"name": "mammals", "shards": "mammals", "weight": 1}, {"name": "worms", "shards": "worms", "weight": 3}]
    data = DataSection(**{"shards": str(directory), "seq_len": 64, "seed": 1, "num_workers": 0, "mixture": mixture}
                       | changes)
    train = TrainSection(run_dir="r", steps=12, global_batch_size=8, micro_batch_size=2)
    return Config(data=data, train=train, model=ModelSection(num_layers=1, hidden_size=8, max_seq_len=64,
                                                             embed_dropout=0.0))


@pytest.fixture(scope="module")
def run(directory):
    """A run of six steps with a validation before and after them, and the bases that each step scored by source."""
    objective = Pretraining(config(directory), Groups.single(), CPU)
    before = objective.validate(objective.module, iter)
    scored = Counter()
    for _ in range(6):
        for batch in objective.next_step().batches:
            for number, row in zip(batch.windows.tolist(), batch.ids, strict=True):
                stream = objective.curriculum._stream_of(objective.curriculum.stages[0])
                scored[stream.order.place(number)[0]] += int(((row[1:] >= 7) & (row[1:] <= 10)).sum())
    return objective, before, objective.validate(objective.module, iter), scored


def alone(objective, batches):
    return evaluate_split(objective.module, batches, Groups.single(), CPU)


def test_perplexity_by_source_is_that_of_each_source_alone(run, directory):
    objective, _, after, _ = run
    found = {}
    for pool in open_pools(config(directory).data):
        found[pool.name] = alone(objective, ValidationBatches([pool], seq_len=64, batch_size=3))
        expected = math.exp(found[pool.name].loss)
        error = abs(after.extras[f"source_perplexity/{pool.name}"] / expected - 1)
        print(f"{pool.name}: {error:.1e}, tolerance 1e-6")
        assert error < 1e-6
    total = sum(part.loss * part.scored for part in found.values()) / sum(part.scored for part in found.values())
    assert after.scored == sum(part.scored for part in found.values())
    assert abs(after.loss / total - 1) < 1e-6
    assert len({round(value, 6) for name, value in after.extras.items() if "source_perp" in name}) == 2, "control"


def test_perplexity_by_species_also_of_a_single_shard_set(run, directory):
    objective, _, after, _ = run
    plain = Pretraining(config(directory, shards=str(directory / "mammals"), mixture=None), Groups.single(), CPU)
    scores = plain.validate(objective.module, iter)
    by_species = {name: value for name, value in scores.extras.items() if not name.startswith("case")}
    assert by_species.keys() == {"species_perplexity/man", "species_perplexity/mouse"}
    assert after.extras.keys() >= by_species.keys() | {"species_perplexity/worm"}
    for name, value in by_species.items():
        assert abs(after.extras[name] / value - 1) < 1e-6
    one = Pretraining(config(directory, shards=str(directory / "worms"), mixture=None), Groups.single(), CPU)
    found = one.validate(objective.module, iter).extras
    assert not [name for name in found if "species" in name], "of one species there is nothing to set apart"


def test_shares_epochs_and_mass_are_those_of_the_windows_that_came(run):
    objective, before, after, scored = run
    assert not [name for name in before.extras if "perplexity" not in name], "nothing was trained yet"
    assert after.extras["source_share/mammals"] == 0.25
    assert after.extras["source_share/worms"] == 0.75
    for number, pool in enumerate(objective.pools):
        assert math.isclose(after.extras[f"source_loss_mass/{pool.name}"], scored[number] / sum(scored.values()))
        epochs, unique = (after.extras[f"source_{kind}/{pool.name}"] for kind in ("epochs", "unique_bases"))
        assert 0 < epochs
        assert unique == pytest.approx(min(epochs, 1) * pool.train_bases)
    again = objective.validate(objective.module, iter)
    assert again.extras == after.extras, "nothing was scored since, and all before counts still"
    assert after.extras.keys() <= extra_names(objective.extras)


def _masses(objective):
    return {name: value for name, value in objective.validate(objective.module, iter).extras.items() if "mass" in name}


def test_loss_mass_goes_on_from_a_checkpoint(directory, caplog):
    """Exactly, also with soft-masked bases at a weight of their own, whose sums have roundings."""
    weighted = config(directory, lower_case_weight=0.1)
    whole, first, second, without = (Pretraining(weighted, Groups.single(), CPU) for _ in range(4))
    for _ in range(7):
        whole.next_step()
    for _ in range(3):
        first.next_step()
    saved = json.loads(json.dumps(first.state_dict()))
    assert saved == first.state_dict(), "asking changes nothing"
    second.load_state_dict(saved)
    assert _masses(second) == _masses(first)
    without.load_state_dict({key: value for key, value in saved.items() if key != "source_mass"})
    assert "source_loss_mass counts from this step on" in caplog.text
    for _ in range(4):
        second.next_step()
        without.next_step()
    assert _masses(second) == _masses(whole) != _masses(without)
    for wrong in ([[1, 2]], [[1, 2], [3]], [[1, 2], [3, -1]], [[1, 2], [3, True]], {}, [[1, 2], [3, 1.0]]):
        with pytest.raises(UserError, match=r"the saved source_mass is .* not two counts for each of the 2 sources"):
            second.load_state_dict({**saved, "source_mass": wrong})


def test_loss_mass_of_another_weight_is_not_gone_on_with(directory, caplog):
    """Soft-masked bases that were learnt from at one weight are not counted at another. The control: the same weight,
    and a checkpoint from before the weight was saved."""
    first, same, before, other, afresh = (
        Pretraining(config(directory, lower_case_weight=weight), Groups.single(), CPU)
        for weight in (0.1, 0.1, 0.1, 1.0, 1.0))
    for _ in range(3):
        first.next_step()
    saved = first.state_dict()
    same.load_state_dict(saved)
    before.load_state_dict({key: value for key, value in saved.items() if key != "lower_case_weight"})
    assert _masses(same) == _masses(before) == _masses(first)
    assert "lower_case_weight" not in caplog.text
    other.load_state_dict(saved)
    assert "data.lower_case_weight was 0.1 and is 1.0: source_loss_mass counts from this step on" in caplog.text
    afresh.skip(3)
    for _ in range(2):
        other.next_step()
        afresh.next_step()
    assert _masses(other) == _masses(afresh) != _masses(first)


def test_unique_bases_are_all_there_are_in_the_end(directory):
    with closing(Curriculum(open_pools(config(directory).data), config(directory))) as curriculum:
        uses = curriculum.source_uses(12)
        assert [use.share for use in uses] == [0.25, 0.75]
        late = replace(config(directory), train=replace(config(directory).train, steps=5000))
    with closing(Curriculum(open_pools(late.data), late)) as curriculum:
        uses = curriculum.source_uses(5000)
        assert [use.unique_bases for use in uses] == [pool.train_bases for pool in curriculum.pools]
        assert uses[1].epochs > 100
        lines = repeats(curriculum, 5000)
        assert len(lines) == 2
        assert re.match(r"data.mixture: source mammals will be seen \d+\.\d times by step 5000: past about 4", lines[0])
        assert repeats(curriculum, 12) == [], "control"


def _said(objective, steps, caplog):
    """The steps at which a training says that a source came often, with the lines."""
    caplog.clear()
    found = {}
    for _ in range(steps):
        objective.next_step()
        if lines := [line for line in caplog.messages if "4 times" in line]:
            (found[objective.curriculum.step],) = lines
        caplog.clear()
    return found


@pytest.mark.parametrize("stages", ["none", [{"seq_len": 32, "steps": 9}]])
def test_it_is_said_once_when_the_training_bases_came_four_times(directory, stages, caplog):
    """Of a single set too, whose end the banner and the dry run tell before."""
    plain = config(directory, shards=str(directory / "mammals"), mixture=None)
    plain = replace(plain, train=replace(plain.train, steps=60, seq_len_warmup=stages))
    objective = Pretraining(plain, Groups.single(), CPU)
    assert not [line for line in caplog.messages if "times" in line], "the banner says it"
    found = _said(objective, 60, caplog)
    (step, line), = found.items()
    assert line == (f"step {step}: data.shards: the training bases now came 4 times: past about 4 times the same bases "
                    "teach little more")
    assert objective.curriculum.epochs_after(step - 1) <= 4 < objective.curriculum.epochs_after(step)
    for taken, again in ((step - 1, True), (step, False)):  # a run that was stopped there, and goes on
        first, second = (Pretraining(plain, Groups.single(), CPU) for _ in range(2))
        for _ in range(taken):
            first.next_step()
        second.load_state_dict(first.state_dict())
        assert bool(_said(second, 5, caplog)) == again
    few = replace(plain, train=replace(plain.train, steps=step - 1))
    assert not _said(Pretraining(few, Groups.single(), CPU), step - 1, caplog), "control"
    (line,) = repeats(objective.curriculum, 60)
    assert re.match(r"data.shards: the training bases will be seen \d+\.\d times by step 60: past about 4", line)
    assert repeats(objective.curriculum, step - 1) == []


def test_of_a_mixture_each_source_is_named_at_its_step(directory, caplog):
    longer = config(directory)
    longer = replace(longer, train=replace(longer.train, steps=200))
    objective = Pretraining(longer, Groups.single(), CPU)
    found = _said(objective, 200, caplog)
    assert [line.split(" now came")[0] for line in found.values()] == [
        f"step {step}: data.mixture: source {name}" for step, name in zip(found, ("worms", "mammals"), strict=True)]
    for source, step in zip((1, 0), found, strict=True):
        before, after = (objective.curriculum.source_uses(each)[source].epochs for each in (step - 1, step))
        assert before <= 4 < after


def test_a_report_has_a_panel_of_each_kind(tmp_path, monkeypatch):
    """Twenty sources are twenty lines in a panel and not twenty panels."""
    from hyena_dist.train import report
    names = [f"source_share/s{number}" for number in range(20)]
    metrics = Metrics(tmp_path, last_step=0, total_steps=3, now=0.0, extras=names)
    for step in (1, 2):
        metrics.write(Row(step=step, split="val", loss=1.0, perplexity=2.7, tokens=step * 100, seq_len=64, lr=None,
                          grad_norm=None, tokens_per_second=None, peak_memory_bytes=1, time=float(step),
                          extras={name: 0.05 for name in names}))
    metrics.close()
    assert read_rows(tmp_path / "metrics.jsonl")[0].extras[names[3]] == 0.05
    drawn, draw = [], report._draw_panel

    def note(axes, name, *what):
        drawn.append(name)
        draw(axes, name, *what)

    monkeypatch.setattr(report, "_draw_panel", note)
    assert write_report(tmp_path) is not None
    assert drawn.count("source_share") == 1
    assert not [name for name in drawn if "/" in name]
