"""What stands beside a fine-tuning, and what takes no step: the CNN, the same model from nothing, and the probe on
cached features, over data, context and tensor ranks, once each, and again after a stop."""

import io
import json
import logging
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from hyena_dist.config.errors import UserError
from hyena_dist.config.schema import Config
from hyena_dist.data.tokenizer import NUCLEOTIDES, PAD
from hyena_dist.model.cnn import ConvolutionalModel
from hyena_dist.model.model import HyenaModel, build_model
from hyena_dist.model.pooled import PooledModel
from hyena_dist.parallel.groups import Groups, init_groups
from hyena_dist.tasks import features as module
from hyena_dist.tasks.comparison import in_words, markdown, on_screen, summary
from hyena_dist.tasks.features import digest_of, distinct
from hyena_dist.tasks.probe import choose
from hyena_dist.train.convolutional import Convolutional
from hyena_dist.train.finetuning import Finetuning
from hyena_dist.train.metrics import read_rows
from hyena_dist.train.predictions import METRICS
from hyena_dist.train.session import open_trainer
from tests.compare import rel
from tests.dist.harness import run_distributed
from tests.dist.test_finetuning import STEPS, config_of, labelled_of, run, table

ALL = "kmers,cnn,scratch"
PROBE: dict[str, Any] = {"from_": "somewhere", "trained": "probe"}


def pretrained(directory: Path) -> HyenaModel:
    config = config_of(directory, "pretrained", 1)
    return build_model(replace(config, train=replace(config.train, seed=9)), Groups.single())


def _counted(config: Config, weights: Any) -> dict[str, int]:
    """How many runs of the trainer are opened, and files of features computed."""
    seen = {"trainers": 0, "files": 0}
    compute = module._compute

    def opened(*args: Any, **keys: Any) -> Any:
        seen["trainers"] += 1
        return open_trainer(*args, **keys)

    def computed(*args: Any, **keys: Any) -> Any:
        seen["files"] += 1
        return compute(*args, **keys)

    with (patch("hyena_dist.tasks.finetune.open_trainer", opened), patch.object(module, "_compute", computed),
          patch.object(module, "PIECE", 40)):
        assert run(config, weights=weights) is None
    return seen


def _stopped_at_7(self: Convolutional) -> Any:
    if self._taken + 1 == 7:
        os.kill(os.getpid(), signal.SIGTERM)
    return Finetuning.next_step(self)


def _two_ranks(directory: Path) -> dict[str, Any]:
    weights, found = dict(pretrained(directory).named_parameters()), {}
    for engine, context in ((3, 1), ("fsdp", 2)):
        config = config_of(directory, f"beside-{engine}", engine, context=context, from_="somewhere", baselines=ALL)
        found[f"first {engine}"] = _counted(config, weights)
        found[f"again {engine}"] = _counted(config, weights)
        dist.barrier()
        if dist.get_rank() == 0:
            (directory / f"beside-{engine}/seed-0/cnn/result.json").unlink()
        dist.barrier()
        found[f"without the CNN {engine}"] = _counted(config, weights)
    with patch.object(Convolutional, "next_step", _stopped_at_7):
        assert run(config_of(directory, "cut", 1, baselines="cnn")) is not None
    found["cut"] = (directory / "cut/seed-0/result.json").exists(), (directory / "cut/result.json").exists()
    assert run(config_of(directory, "cut", 1, baselines="cnn")) is None
    assert run(config_of(directory, "whole", 1, baselines="cnn")) is None
    for name, context, tensor in (("data", 1, 1), ("context", 2, 1), ("tensor", 1, 2)):
        config = config_of(directory, f"probe-{name}", 1, context=context, tensor=tensor, seeds=2, **PROBE)
        found[name] = _counted(config, weights)
    return found


def _one_rank(directory: Path) -> dict[str, Any]:
    init_groups()
    weights, config = dict(pretrained(directory).named_parameters()), config_of(directory, "probe-alone", 1, **PROBE)
    found = {"alone": _counted(config, weights)}
    (directory / "probe-alone/seed-0/result.json").unlink()
    paths = sorted((directory / "probe-alone/features").glob("*/*.npy"))
    paths[0].write_bytes(paths[0].read_bytes()[:200])
    found["damaged"] = _counted(config, weights)
    other = {**weights, "final_norm.bias": weights["final_norm.bias"] + 1}
    (directory / "probe-alone/seed-0/result.json").unlink()
    found["other weights"] = _counted(config, other)
    with pytest.raises(UserError) as caught:
        run(replace(config, finetune=replace(config.finetune, trained="head")), weights=weights)
    found["said"] = str(caught.value)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("beside")
    table(directory / "table")
    two = run_distributed(_two_ranks, 2, directory, timeout=600)
    assert two[0] == two[1]
    return directory, {**two[0], **run_distributed(_one_rank, 1, directory)[0]}


def result(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", [3, "fsdp"])
def test_all_stand_beside_and_are_computed_once(runs: Any, engine: int | str) -> None:
    directory, found = runs[0] / f"beside-{engine}", runs[1]
    assert found[f"first {engine}"]["trainers"] == 3
    assert found[f"again {engine}"]["trainers"] == 0
    assert found[f"without the CNN {engine}"]["trainers"] == 1
    whole = result(directory / "result.json")
    assert list(whole["baselines"]) == ["kmers", "cnn", "scratch"]
    for name in ("cnn", "scratch"):
        assert whole["baselines"][name]["mcc"]["mean"] is not None
        one = result(directory / "seed-0" / name / "result.json")
        assert (one["steps"], one["from"], one["trained"]) == (STEPS, None, "all")
    losses = [[row.loss for row in read_rows(directory / "seed-0" / name / "metrics.jsonl")]
              for name in ("", "scratch", "cnn")]
    assert losses[0] != losses[1] != losses[2], "the control: they are runs of different models"
    lines = (directory / "result.md").read_text("utf-8").splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:6]] == [
        "somewhere, trained: all", "k-mer regression", "CNN, from nothing", "this model, from nothing"]


@pytest.mark.slow
def test_the_cnn_is_the_same_over_context_ranks(runs: Any) -> None:
    one, other = ([row.loss for row in read_rows(runs[0] / f"beside-{engine}/seed-0/cnn/metrics.jsonl")]
                  for engine in (3, "fsdp"))
    assert other == pytest.approx(one, rel=1e-4)
    assert one[-1] != pytest.approx(one[0], rel=1e-2), "the control"


def test_the_cnn_learns_a_motif() -> None:
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(7, 11, (1600, 100), generator=generator), torch.arange(1600) % 2
    for row in range(1, 1600, 2):
        place = int(torch.randint(0, 92, (1,), generator=generator))
        ids[row, place : place + 8] = torch.tensor([7, 8, 9, 10, 10, 9, 8, 7])
    model = ConvolutionalModel(vocabulary=12, padding=PAD, length=100, outputs=2, seed=0)
    optimizer, lengths = torch.optim.Adam(model.parameters(), lr=2e-3), torch.full((64,), 100)
    for step in range(160):
        rows = slice(step % 20 * 64, step % 20 * 64 + 64)
        torch.nn.functional.cross_entropy(model(ids[rows], lengths), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        right = (model(ids[1280:], lengths).argmax(1) == labels[1280:]).double().mean()
    assert right > 0.8, "of sequences that it has not seen"


@pytest.mark.slow
def test_a_comparison_that_was_stopped_goes_on(runs: Any) -> None:
    assert runs[1]["cut"] == (True, False), "the model was done, and the comparison was not"
    whole, cut = (result(runs[0] / name / "result.json")["baselines"] for name in ("whole", "cut"))
    assert whole == cut
    assert len((runs[0] / "cut/seed-0/cnn/history.jsonl").read_text("utf-8").splitlines()) == 2


@pytest.mark.slow
def test_a_probe_is_the_same_over_all_ranks(runs: Any) -> None:
    directory, found = runs
    assert all(found[name] == {"trainers": 0, "files": 3} for name in ("data", "context", "tensor", "alone")), \
        "two seeds read the same files"
    one = result(directory / "probe-alone/seed-0/result.json")
    assert one["scores"]["test"]["mcc"] is not None
    for name in ("data", "context", "tensor"):
        other = result(directory / f"probe-{name}/seed-0/result.json")
        mine, others = (np.concatenate([np.load(path) for path in sorted(
            (directory / f"probe-{run}/features").glob("*/*.npy"))[:3]]) for run in ("data", name))
        assert rel(torch.from_numpy(others), torch.from_numpy(mine)) < 2e-5
        assert other["probe"]["probe"] in ("logistic", "ridge", "forest")
        assert len(other["probe"]["tried"]) == 9


@pytest.mark.slow
def test_features_are_of_the_pretrained_model(runs: Any) -> None:
    directory = runs[0]
    config = config_of(directory, "probe-data", 1, **PROBE)
    labelled = labelled_of(config)
    examples = distinct(labelled)
    sequences = [example.bases for example in examples]
    model = pretrained(directory)
    place = directory / "probe-data/features" / digest_of(config, dict(model.named_parameters()), examples, both=True)
    found = np.concatenate([np.load(path) for path in sorted(place.iterdir())])
    pooled = PooledModel(model, outputs=2, pooling="mean", seed=0).eval()
    for number in (0, 50, 95):
        ids = torch.from_numpy(NUCLEOTIDES.encode(sequences[number]).astype(np.int64))[None]
        with torch.no_grad():
            alone = pooled.pooled(ids, torch.tensor([ids.shape[1]]))[0]
        assert rel(torch.from_numpy(found[number, 0]), alone) < 2e-6
        assert rel(torch.from_numpy(found[number, 1]), alone) > 1e-3, "the control: the other strand is another one"


@pytest.mark.slow
def test_what_is_damaged_or_of_other_weights_is_computed_again(runs: Any) -> None:
    found = runs[1]
    assert found["damaged"]["files"] == 1
    assert found["other weights"]["files"] == 3
    assert 'finetune.trained was "probe" and is now "head"' in found["said"]


def _labelled(directory: Path, task: str, labels: list[str]) -> Any:
    rng = np.random.default_rng(0)
    lines = ["sequence,label"] + [f"{''.join(rng.choice(list('ACGT'), 12))},{label}" for label in labels]
    (directory / "t.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = config_of(directory, "x", 1, task=task)
    return labelled_of(replace(config, finetune=replace(config.finetune, table=str(directory / "t.csv"),
                                                        valid_fraction=0.25)))


@pytest.mark.parametrize(("task", "labels"), [
    ("classification", ["a", "b"]), ("classification", ["a", "b", "c"]), ("multilabel", ["a", "b", "a;b", "-"]),
    ("regression", ["0.5", "1", "-2"])])
def test_probes_of_every_task_learn_what_is_in_the_features(tmp_path: Path, task: str, labels: list[str],
                                                            caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    labelled = _labelled(tmp_path, task, labels * 40)
    rng = np.random.default_rng(1)
    for told in (True, False):
        of_split = {}
        for name in labelled.splits:
            targets = labelled.targets(name).astype(float)
            targets = targets.reshape(len(targets), -1)
            if task == "classification":
                targets = np.eye(len(labels))[targets[:, 0].astype(int)]
            noise = rng.normal(0, 0.2, (len(targets), 2, targets.shape[1] + 2))
            noise[..., : targets.shape[1]] += told * targets[:, None]
            of_split[name] = noise
        answers, chosen = choose(labelled, of_split, average=True, seed=0)
        value = chosen[chosen["chosen_by"]]
        assert value > 0.8 if told else value < 0.75, "without what tells the label there is nothing to learn"
        assert answers["valid"].shape == (len(labelled.splits["valid"]), labelled.outputs)
        assert value == max(one[chosen["chosen_by"]] for one in chosen["tried"])
    line = re.compile(r"probe: (forest|(logistic|ridge), strength (0.01|0.1|1|10)): \w+ (-?\d\.\d{4}|none) on valid")
    assert all(line.fullmatch(record.getMessage()) for record in caplog.records)
    assert len(caplog.records) == 2 * len(chosen["tried"])


def test_features_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    """The control is the test before this one, whose features are numbers."""
    labelled = _labelled(tmp_path, "classification", ["a", "b"] * 20)
    of_split = {name: np.ones((len(labelled.targets(name)), 1, 3)) for name in labelled.splits}
    for bad in (np.nan, np.inf):
        of_split["valid"][-1, 0, 1] = bad
        with pytest.raises(UserError, match="of valid are no numbers .* give another checkpoint"):
            choose(labelled, of_split, average=True, seed=0)


def test_the_cnn_reads_a_row_by_itself_and_has_the_published_size() -> None:
    model = ConvolutionalModel(vocabulary=12, padding=PAD, length=251, outputs=1, seed=0)
    weights = {name: weight.numel() for name, weight in model.named_parameters()}
    # 251 bases give 24 positions: (((251 - 7) // 2 - 7) // 2 - 7) // 2 = 25
    assert weights["first.weight"] == 4 * 25 * 512
    assert weights["convolutions.0.weight"] == 100 * 16 * 8
    ids = torch.randint(7, 11, (3, 251), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = model(ids, torch.full((3,), 251))
        assert torch.allclose(model(ids[1:2], torch.tensor([251])), together[1:2], atol=1e-6)
        assert rel(model(ids.flip(1), torch.full((3,), 251)), together) > 1e-3, "the control"
    long = ConvolutionalModel(vocabulary=12, padding=PAD, length=5000, outputs=3, seed=0)
    assert long.first.weight.shape == (512, 4 * 64)
    assert long(torch.full((1, 5000), 7), torch.tensor([5000])).shape == (1, 3)


def test_a_table_of_several_seeds() -> None:
    scores = {"accuracy": 0.5, "mcc": None, "sequences": 9, "collapsed": True}
    one = {"task": "classification", "classes": ["a", "b"], "from": None, "trained": "all", "pooling": "mean",
           "rc": "none", "judged_on": "test", "notes": ["odd | letters"], "seed": 0, "scores": {"test": scores},
           "baselines": {"kmers": {"scores": {"test": {"accuracy": 0.75, "mcc": 0.25}}}}}
    two = {**one, "seed": 1, "scores": {"test": {**scores, "accuracy": 0.7}}}
    lines = markdown(summary([one, two])).splitlines()
    assert lines[0] == "| on test | accuracy | mcc |"
    assert lines[2] == "| from nothing, trained: all | 0.6000 ± 0.1414 | none |"
    assert lines[3] == "| k-mer regression | 0.7500 ± 0.0000 | 0.2500 ± 0.0000 |"
    assert "- seeds 0, 1 collapsed: the model says the same of everything" in lines
    assert "- odd | letters" in lines


def _screen(whole: dict[str, Any]) -> list[str]:
    console = Console(width=80, file=io.StringIO())
    console.print(on_screen(whole))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("task", METRICS)
def test_a_result_of_any_task_fits_on_the_screen(task: str) -> None:
    scores = {**dict.fromkeys(METRICS[task], -0.049774), "sequences": 9, "collapsed": False}
    one = {"task": task, "classes": ["a", "b"], "from": "runs/" + 60 * "a", "trained": "all", "pooling": "mean",
           "rc": "none", "judged_on": "test", "notes": [], "seed": 0, "scores": {"test": scores},
           "baselines": {name: {"scores": {"test": scores}} for name in ("kmers", "cnn", "scratch")}}
    two = {**one, "seed": 1, "scores": {"test": {name: 0.5 for name in scores} | {"collapsed": False}}}
    alone, several = summary([one]), summary([one, two])
    for whole, own, others in ((alone, "-0.050", "-0.050"), (several, "0.225 ± 0.389", "-0.050 ± 0.000")):
        head, line, *rows = _screen(whole)
        assert [cell.strip() for cell in head.split("┃")] == ["on test", "this run", "kmers", "cnn", "scratch"]
        assert set(line) == set("━╇")
        assert len(rows) == len(METRICS[task]), "no row is folded"
        for row in rows:
            assert [cell.strip() for cell in row.split("│")[1:]] == [own, others, others, others]
    assert in_words(alone)[0] == (f"test {METRICS[task][0]}: -0.0498; beside it kmers -0.0498, cnn -0.0498, scratch "
                                  "-0.0498")
    assert ": 0.2251, from -0.0498 to 0.5000 over 2 seeds; beside it " in in_words(several)[0]
    assert "1 seed." in markdown(alone).splitlines()
