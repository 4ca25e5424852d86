"""Fine-tuning through the trainer as it is: it learns, is stopped and goes on bit for bit, is the same over context
ranks, and judges the weights of the best validation."""

import io
import json
import logging
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hyena_dist.checkpoint.directory import Checkpoint, find_best
from hyena_dist.checkpoint.reader import TensorReader
from hyena_dist.cli.finetune import main as finetune_command
from hyena_dist.cli.predict import main as predict
from hyena_dist.config.errors import UserError
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.finetune import FinetuneSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.optim import OptimSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.convert.start import read_start, without_other_head
from hyena_dist.data.asked import read_asked
from hyena_dist.data.labelled import Labelled, read_labelled
from hyena_dist.data.tokenizer import NUCLEOTIDES
from hyena_dist.model.model import build_model
from hyena_dist.parallel.groups import Groups, init_groups
from hyena_dist.tasks.finetune import finetune
from hyena_dist.tasks.predict.answers import Request
from hyena_dist.tasks.predict.answers import predict as ask
from hyena_dist.tasks.predict.finished import read_finished
from hyena_dist.train.finetuning import Finetuning
from hyena_dist.train.metrics import Row, read_rows
from tests.checkpoints import latest
from tests.dist.harness import run_distributed
from tests.dist.toy import engine_section

STEPS, STOP = 12, 7


def table(directory: Path) -> Path:
    """Sequences of many lengths; the class is which of G and A is frequent."""
    rng, lines = np.random.default_rng(0), ["sequence,label"]
    for number in range(96):
        odds = (0.2, 0.1, 0.1, 0.6) if number % 2 else (0.6, 0.1, 0.1, 0.2)
        bases = "".join(rng.choice(list("ACTG"), rng.integers(20, 60), p=odds))
        lines.append(f"{bases},{('at', 'gc')[number % 2]}")
    for name, part in (("train", slice(1, 65)), ("dev", slice(65, 81)), ("test", slice(81, 97))):
        directory.mkdir(exist_ok=True)
        (directory / f"{name}.csv").write_text("\n".join([lines[0], *lines[part]]) + "\n", encoding="utf-8")
    return directory


def config_of(directory: Path, name: str, engine: int | str, *, context: int = 1, tensor: int = 1,
              baselines: str = "kmers", **tune: Any) -> Config:
    return Config(
        model=ModelSection(num_layers=1, hidden_size=16, max_seq_len=64, filter_order=8, embed_dropout=0.1),
        data=DataSection(shards="none", seq_len=64),
        train=TrainSection(run_dir=str(directory / name), steps=STEPS, micro_batch_size=4, global_batch_size=8,
                           eval_every=4, save_every=0),
        optim=OptimSection(lr=2e-2, warmup_steps=1, eps=1e-4), parallel=ParallelSection(context=context, tensor=tensor),
        engine=engine_section(engine), finetune=FinetuneSection(
            table=str(directory / "table"), rc="average", baselines=baselines, **tune))


def labelled_of(config: Config, seed: int = 0) -> Labelled:
    return read_labelled(config.finetune, seed=seed, most=64)


def run(config: Config, stop_at: int = 0, groups: Groups | None = None, weights: Any = None) -> str | None:
    steps = Finetuning.next_step

    def next_step(self: Finetuning) -> Any:
        if self._taken + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return steps(self)

    Finetuning.next_step = next_step  # type: ignore[method-assign]
    try:
        groups = groups or init_groups(tensor=config.parallel.tensor, context=config.parallel.context)
        return finetune(config, groups, torch.device("cpu"), read=lambda seed: labelled_of(config, seed),
                        weights=weights)
    finally:
        Finetuning.next_step = steps  # type: ignore[method-assign]


def refused(config: Config, weights: Any = None) -> str:
    with pytest.raises(UserError) as caught:
        run(config, weights=weights)
    return str(caught.value)


def _asked_again(directory: Path, weights: dict[str, torch.Tensor]) -> dict[str, str]:
    """What is said of a finished run that is asked for with other settings, by what has changed."""
    config = config_of(directory, "frozen", 1, from_="somewhere", trained="head")
    train, tune = config.train, config.finetune
    other = {**weights, "final_norm.bias": weights["final_norm.bias"] + 1}
    found = {"weights": refused(config, other), "nothing": refused(replace(config, finetune=replace(
        tune, from_=None, trained="all")))}
    for name, changed in (
            ("lr", replace(config, optim=replace(config.optim, lr=1e-3))),
            ("model", replace(config, model=replace(config.model, num_layers=2))),
            ("decay", replace(config, finetune=replace(tune, lr_decay=0.5))),
            ("steps", replace(config, train=replace(train, steps=STEPS + 1))),
            ("batch", replace(config, train=replace(train, global_batch_size=16))),
            ("several seeds", replace(config, finetune=replace(tune, seeds=2), train=replace(train, steps=STEPS + 1)))):
        found[name] = refused(changed, weights)
    (directory / "frozen/seed-0/made_of.json").unlink()  # as a version that wrote none has left it
    found["before records"] = refused(replace(config, optim=replace(config.optim, lr=1e-3)), weights)
    moved = replace(config, finetune=replace(tune, from_="elsewhere"))
    found["before records, elsewhere"] = refused(moved, weights)
    assert run(config, weights=weights) is None
    assert run(moved, weights=weights) is None, "now it is known what they were, wherever they lie"
    found["completed"] = refused(config, other)
    return found


def _two_ranks(directory: Path) -> dict[str, Any]:
    found = {}
    for engine in (2, "fsdp"):
        with patch("hyena_dist.tasks.finetune.find_best", _best_of_the_first):
            assert run(config_of(directory, f"whole-{engine}", engine)) is None
        assert run(config_of(directory, f"cut-{engine}", engine), STOP) is not None
        found[f"stopped {engine}"] = (directory / f"cut-{engine}" / "result.json").exists()
        found[f"unfinished {engine}"] = refused(config_of(directory, f"cut-{engine}", engine, lr_decay=0.5))
        assert run(config_of(directory, f"cut-{engine}", engine)) is None
    for pooling in ("max", "last"):
        assert run(config_of(directory, f"context-{pooling}", 1, context=2, pooling=pooling)) is None
    _ask(directory)
    found["other weights"] = _other_weights(directory)
    return found


def _best_of_the_first(checkpoints: Path) -> Checkpoint | None:
    """The others do not see it yet."""
    return find_best(checkpoints) if dist.get_rank() == 0 else None


def _other_weights(directory: Path) -> str:
    """What the command says where the run that it starts from has saved between the readings of two ranks."""
    section = config_of(directory, "none", 1).model
    read = section, {"weight": torch.full((2,), float(dist.get_rank()))}, Path(f"run/step-{dist.get_rank()}")
    with (patch("hyena_dist.convert.start.read_start", lambda source: read), redirect_stderr(io.StringIO()) as said,
          patch.dict(os.environ, MASTER_ADDR="they.have.met", MASTER_PORT="1")):
        assert finetune_command(["--config", "finetune/gue", "finetune.from=run", f"finetune.table={directory}/table",
                                 f"train.run_dir={directory}/none", "finetune.epochs=30"]) == 2
    return said.getvalue()


def _ask(directory: Path) -> None:
    """What two ranks say of the test split, each of its own sequences, and both of each."""
    runs, table = read_finished(directory / "whole-2", None), directory / "table/test.csv"
    asked = read_asked(table, runs[0].config.finetune, NUCLEOTIDES, most=runs[0].most)
    for name, context in (("shared", 1), ("split", 2)):
        request = Request(runs, asked, table, directory / f"{name}.tsv")
        with patch("hyena_dist.tasks.predict.answers.CHUNK_SEQUENCES", 4):
            ask(request, init_groups(context=context), torch.device("cpu"))


@contextmanager
def _logged() -> Iterator[io.StringIO]:
    """What the log says meanwhile."""
    root, handler = logging.getLogger(), logging.StreamHandler(io.StringIO())
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield handler.stream
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def _one_rank(directory: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    init_groups()
    run(config_of(directory, "alone-max", 1, pooling="max"))
    with _logged() as said:
        run(config_of(directory, "alone-last", 1, pooling="last", baselines="kmers,cnn"))
    found["said"] = said.getvalue()
    config = config_of(directory, "frozen", 1, from_="somewhere", trained="head")
    pretrained = build_model(replace(config, train=replace(config.train, seed=9)), Groups.single())
    weights = {name: weight.detach() for name, weight in pretrained.named_parameters()}
    run(config, weights=weights)
    found |= _asked_again(directory, weights)
    patient = config_of(directory, "patient", 1, seeds=2)
    run(replace(patient, train=replace(patient.train, patience=1, eval_every=1, steps=50)))
    other = table(directory / "other")
    (other / "train.csv").write_text((other / "train.csv").read_text("utf-8").replace("GG", "GA", 1), encoding="utf-8")
    changed = config_of(directory, "cut-2", 2)
    (directory / "cut-2" / "seed-0" / "result.json").unlink()
    changed = replace(changed, finetune=replace(changed.finetune, table=str(other)))
    found["table"] = refused(changed)
    (directory / "cut-2" / "seed-0" / "made_of.json").unlink()
    found["changed"] = refused(changed)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, str]]:
    directory = tmp_path_factory.mktemp("finetuning")
    table(directory / "table")
    two = run_distributed(_two_ranks, 2, directory)[0]
    return directory, two, run_distributed(_one_rank, 1, directory)[0]


def rows(path: Path) -> list[Row]:
    return read_rows(path / "seed-0" / "metrics.jsonl")


def tensors(path: Path) -> dict[str, torch.Tensor]:
    reader = TensorReader(latest(path / "seed-0" / "checkpoints"))
    return reader.read(reader.shapes)


@pytest.mark.parametrize("engine", [2, "fsdp"])
def test_a_run_that_was_stopped_is_bit_for_bit_the_whole_one(runs: Any, engine: int | str) -> None:
    directory, two, _ = runs
    assert not two[f"stopped {engine}"], "the control: it had no result when it was stopped"
    assert len((directory / f"cut-{engine}/seed-0/history.jsonl").read_text("utf-8").splitlines()) == 2
    whole, cut = (tensors(directory / f"{name}-{engine}") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    one, other = ((directory / f"{name}-{engine}/result.json").read_text("utf-8") for name in ("whole", "cut"))
    assert one == other


def assert_it_says_what_it_was_judged_by(run_dir: Path, table: Path, directory: Path) -> None:
    """That `predict` gives the numbers of predictions.tsv for the sequences of a table without an own column of names.
    Those are in that file: name, label, answer, numbers."""
    out = directory / "answers.tsv"
    assert predict(["--from", str(run_dir), "--sequences", str(table), "--out", str(out)]) == 0
    rows = [line for line in out.read_text("utf-8").splitlines() if not line.startswith("##")]
    judged = (run_dir / "seed-0/predictions.tsv").read_text("utf-8").splitlines()
    assert len(rows) == len(table.read_text("utf-8").splitlines())
    assert rows[1:] == judged[1:]


@pytest.mark.parametrize("engine", [2, "fsdp"])
def test_of_its_own_test_split_one_process_says_what_two_ranks_were_judged_by(runs: Any, engine: int | str,
                                                                             tmp_path: Path) -> None:
    directory = runs[0]
    assert_it_says_what_it_was_judged_by(directory / f"whole-{engine}", directory / "table/test.csv", tmp_path)


def test_ranks_that_share_sequences_or_each_one_say_the_same(runs: Any) -> None:
    directory = runs[0]
    lines = (directory / "whole-2/seed-0/predictions.tsv").read_text("utf-8").splitlines()[1:]
    judged = [[*line.split("\t")[:3], *map(float, line.split("\t")[3:])] for line in lines]
    for name in ("shared", "split"):
        rows = [line.split("\t") for line in (directory / f"{name}.tsv").read_text("utf-8").splitlines()
                if not line.startswith("##")][1:]
        assert [row[:3] for row in rows] == [row[:3] for row in judged]
        found = [[float(value) for value in row[3:]] for row in rows]
        assert found == [pytest.approx(row[3:], rel=0 if name == "shared" else 1e-5) for row in judged]


def test_context_ranks_change_nothing(runs: Any) -> None:
    directory = runs[0]
    for pooling in ("max", "last"):
        alone, split = (rows(directory / f"{name}-{pooling}") for name in ("alone", "context"))
        assert [row.loss for row in split] == pytest.approx([row.loss for row in alone], rel=1e-5)
        assert [row.scored for row in split] == [row.scored for row in alone]
    assert [row.loss for row in rows(directory / "alone-max")] != pytest.approx(
        [row.loss for row in rows(directory / "alone-last")], rel=1e-3), "the control"


def test_the_log_says_of_what_the_steps_are(runs: Any) -> None:
    said = runs[2]["said"]
    heads = [line for line in said.splitlines() if line.startswith(("seed 0: ", "judging ", "going on from "))]
    assert heads[0] == "seed 0: fine-tuning"
    assert re.fullmatch(r"judging the best weights, those of step (4|8|12), on valid and test", heads[1])
    assert heads[2:4] == ["seed 0: now beside it: k-mer regression", "seed 0: now beside it: CNN, from nothing"]
    assert heads[4].startswith("judging the best weights, those of step ")
    assert len(heads) == 5


def test_it_learns_and_says_so_beside_k_mers(runs: Any) -> None:
    directory = runs[0]
    result = json.loads((directory / "whole-2" / "result.json").read_text("utf-8"))
    assert (result["classes"], result["judged_on"], result["collapsed_seeds"]) == (["at", "gc"], "test", [])
    assert result["metrics"]["mcc"]["mean"] > 0.8
    assert result["baselines"]["kmers"]["mcc"]["mean"] > 0.8
    lines = (directory / "whole-2/seed-0/predictions.tsv").read_text("utf-8").splitlines()
    assert len(lines) == 17
    right = sum(line.split("\t")[1] == line.split("\t")[2] for line in lines[1:])
    assert right / 16 == result["metrics"]["accuracy"]["mean"]


def test_ranks_that_have_read_other_weights_are_refused(runs: Any) -> None:
    said = runs[1]["other weights"].splitlines()[-1]
    assert said.startswith("error: the ranks differ: finetune.from (weights and their sha256) is step-0 ")
    assert " on rank 0 (host " in said
    assert ", step-1 " in said
    assert not (runs[0] / "none").exists()


def test_a_frozen_backbone_stays_that_of_the_weights(runs: Any) -> None:
    directory = runs[0]
    config = config_of(directory, "frozen", 1, from_="somewhere", trained="head")
    pretrained = build_model(replace(config, train=replace(config.train, seed=9)), Groups.single())
    saved = tensors(directory / "frozen")
    weight = dict(pretrained.named_parameters())["embedding.word_embeddings.weight"]
    assert torch.equal(saved["model/backbone.embedding.word_embeddings.weight"], weight)
    fresh = build_model(config, Groups.single())
    assert not torch.equal(fresh.embedding.word_embeddings.weight, weight), "the control"


def test_patience_ends_a_run_and_the_best_weights_are_judged(runs: Any) -> None:
    directory = runs[0]
    result = json.loads((directory / "patient" / "result.json").read_text("utf-8"))
    assert [seed["seed"] for seed in result["seeds"]] == [0, 1]
    assert result["metrics"]["mcc"]["seeds"] == 2
    for seed in result["seeds"]:
        validated = [row for row in read_rows(directory / f"patient/seed-{seed['seed']}/metrics.jsonl")
                     if row.split == "val"]
        best = min(validated, key=lambda row: row.loss)
        assert seed["checkpoint"] == f"step-{best.step:08d}"
        assert validated[-1].step == seed["steps"] == best.step + 1 < 50


def test_other_sequences_are_not_gone_on_with(runs: Any) -> None:
    assert "does not hold the sequences, labels and splits that the run has learnt so far" in runs[2]["changed"]


@pytest.mark.parametrize(("what", "said"), [
    ("weights", "finetune.from was somewhere with content "), ("nothing", "and is now null; "),
    ("lr", "optim.lr was 0.02 and is now 0.001: "), ("model", "model.num_layers was 1 and is now 2: "),
    ("decay", "finetune.lr_decay was 1.0 and is now 0.5: "),
    ("steps", "train.steps (which finetune.epochs sets) was 12 and is now 13: "),
    ("batch", "train.global_batch_size was 8 and is now 16: "), ("several seeds", "was 12 and is now 13: "),
    ("before records", "optim.lr was 0.02 and is now 0.001: "),
    ("before records, elsewhere", "finetune.from was somewhere and is now elsewhere with content "),
    ("completed", "finetune.from was elsewhere with content "), ("table", "finetune.table was "),
])
def test_what_was_found_of_something_else_is_not_handed_back(runs: Any, what: str, said: str) -> None:
    """The control: asked for as it was made, it is handed back, which `_asked_again` sees."""
    assert said in runs[2][what]
    assert "set them as they were, choose another train.run_dir, or remove it" in runs[2][what]
    assert "\n" not in runs[2][what]


def test_an_unfinished_run_goes_on_only_as_it_was(runs: Any) -> None:
    """The control: as it was, it goes on bit for bit."""
    for engine in (2, "fsdp"):
        assert "finetune.lr_decay was 1.0 and is now 0.5" in runs[1][f"unfinished {engine}"]


@pytest.mark.parametrize(("tune", "classes", "said"), [
    ({}, ["at", "gc"], ""), ({}, ["gc", "at"], "the classes of it: ['at', 'gc'], now: ['gc', 'at']"),
    ({"pooling": "mean"}, ["at", "gc"], "finetune.pooling of it: max, now: mean"),
    ({"task": "multilabel"}, ["at", "gc"], "finetune.task of it: classification, now: multilabel"),
    ({"task": "binned"}, [], "finetune.task of it: classification, now: binned"),
    ({"shots": 1}, ["at", "gc"], "there is no head to learn now"),
])
def test_a_head_is_taken_over_only_for_the_same_answers(runs: Any, caplog: pytest.LogCaptureFixture, tune: Any,
                                                        classes: list[str], said: str) -> None:
    _, weights, checkpoint = read_start(runs[0] / "alone-max/seed-0")
    caplog.clear()
    kept = without_other_head(weights, checkpoint, FinetuneSection(**{"pooling": "max", **tune}), classes)
    config = config_of(runs[0], "again", 1, pooling="max")
    model = Finetuning(config, Groups.single(), torch.device("cpu"), labelled=labelled_of(config), weights=kept).module
    assert torch.equal(model.head.weight, weights["answers.head.weight"]) == (not said), "the control takes it"
    assert said in caplog.text
    assert torch.equal(model.backbone.final_norm.bias, weights["final_norm.bias"])


def test_of_no_sequences_there_are_no_batches(tmp_path: Path) -> None:
    table(tmp_path / "table")
    config = config_of(tmp_path, "run", 1)
    task = Finetuning(config, Groups.single(), torch.device("cpu"), labelled=labelled_of(config), weights=None)
    counts = [len(list(task.batches("test", [False], some))) for some in (range(3, 3), range(3, 9), None)]
    assert counts == [0, 2, 4]


def test_classes_that_are_not_known_are_others(runs: Any, tmp_path: Path) -> None:
    """A checkpoint alone does not say in which order its classes were."""
    _, weights, checkpoint = read_start(runs[0] / "alone-max/seed-0")
    alone = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, alone)
    kept = without_other_head(weights, alone, FinetuneSection(pooling="max"), ["at", "gc"])
    assert "answers.head.weight" in weights.keys() - kept.keys()
