"""A second objective, of the tests alone, through the trainer as it is: windows are told apart by a head on a frozen
backbone. It trains, validates, is stopped and goes on at every engine, and the trainer knows nothing of labels."""

import json
import logging
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hyena_dist.checkpoint.reader import TensorReader
from hyena_dist.cli.convert import main as convert
from hyena_dist.cli.evaluate import main as evaluate
from hyena_dist.config.errors import UserError
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.optim import OptimSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.model.model import HyenaModel, build_model
from hyena_dist.model.placement import Placement
from hyena_dist.parallel.groups import Groups, init_groups
from hyena_dist.train.metrics import Row, read_rows
from hyena_dist.train.objective import Scores, Step, Watched
from hyena_dist.train.optimizer import parameter_groups
from hyena_dist.train.schedules import learning_rate
from hyena_dist.train.session import open_trainer
from tests.checkpoints import latest
from tests.compare import rel
from tests.dist.harness import run_distributed
from tests.dist.toy import engine_section, state_of

ENGINES: tuple[int | str, ...] = (0, 1, 2, 3, "fsdp")
STEPS, EMPTY, STOP = 10, 4, 6
"""No window of step EMPTY has a label; a run that is to be stopped hears of it while it takes step STOP."""
LENGTH, BATCH, MICRO, HELD_OUT = 48, 8, 2, 16
WEIGHTS = torch.tensor([1.0, 2.0, 0.5])
"""Of the classes in the loss."""
LOST = 6 * BATCH, 7 * BATCH
"""Windows of step 7."""
NOTHING = "none of its windows has a label"
LOSS = 1e-5
"""What another number of ranks, which add in another order, may move a loss by."""


@dataclass(frozen=True)
class Labelled:
    """Windows with their classes; -1: not known."""

    ids: Tensor
    labels: Tensor

    @property
    def scored(self) -> float:
        return float(WEIGHTS[self.labels[self.labels >= 0]].sum())


def windows(first: int, count: int) -> Labelled:
    """By number: a window's class is how much of it is G or C."""
    ids, labels = [], []
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(number)
        label = int(torch.randint(3, (), generator=generator))
        gc = torch.rand(LENGTH, generator=generator) < (0.1, 0.5, 0.9)[label]
        strand = torch.randint(2, (LENGTH,), generator=generator)
        ids.append(torch.where(gc, 8 + strand, 7 + 3 * strand))  # C, G or A, T
        labels.append(-1 if number // BATCH == EMPTY - 1 or number % 5 == 1 else label)
    return Labelled(torch.stack(ids), torch.tensor(labels))


class Classifier(nn.Module):
    """[B, L] -> [B, 3]: a linear head on the mean of a backbone's hidden states."""

    def __init__(self, backbone: HyenaModel) -> None:
        super().__init__()
        self.backbone = backbone
        self.classes = nn.Linear(backbone.config.hidden_size, 3)
        nn.init.zeros_(self.classes.weight)
        nn.init.zeros_(self.classes.bias)

    def forward(self, ids: Tensor) -> Tensor:
        return self.classes(self.backbone.hidden_states(ids).float().mean(0))


class Classification:
    """The objective. Its place is the number of windows that it has taken, and of the steps that it passed over."""

    name = "classification"
    has_perplexity = False
    scored_name = "windows"
    extras = ("accuracy",)
    no_batch = "they are made here, and need no file"
    nothing_to_train = NOTHING
    nothing_to_validate = "no held-out window has a label"

    def __init__(self, config: Config, groups: Groups, device: torch.device) -> None:
        self._groups, self._device = groups, device
        backbone = build_model(config, groups).requires_grad_(False)
        self.module: nn.Module = Classifier(backbone).to(device)
        self.table = {**{f"backbone.{name}": entry for name, entry in backbone.placement().items()},
                      "classes.weight": Placement(), "classes.bias": Placement(weight_decay=False)}
        self._taken = self.skipped = 0

    def utilisation(self) -> None:
        """There is no formula."""

    def next_step(self) -> Step[Labelled]:
        first = self._taken + self.skipped * BATCH + self._groups.data.rank * (BATCH // self._groups.data.size)
        self._taken += BATCH
        return Step([windows(first + i, MICRO) for i in range(0, BATCH // self._groups.data.size, MICRO)],
                    stage=0, seq_len=LENGTH, micro_batch_size=MICRO, tokens=BATCH * LENGTH)

    def loss(self, module: nn.Module, batch: Labelled, _step: int) -> Tensor:
        return cross_entropy(module(batch.ids.to(self._device)), batch.labels.to(self._device),
                             WEIGHTS.to(self._device), ignore_index=-1, reduction="sum")

    def validate(self, module: nn.Module, watched: Watched[Labelled]) -> Scores | None:
        share = HELD_OUT // self._groups.data.size
        first = 10_000 + self._groups.data.rank * share
        found = torch.zeros(4, dtype=torch.float64, device=self._device)
        module.eval()
        with torch.no_grad():
            for batch in watched([windows(first + i, MICRO) for i in range(0, share, MICRO)]):
                logits = module(batch.ids.to(self._device)).cpu()
                known = batch.labels >= 0
                loss = cross_entropy(logits, batch.labels, WEIGHTS, ignore_index=-1, reduction="sum")
                right = (logits.argmax(-1) == batch.labels)[known].sum()
                found += torch.tensor([loss, batch.scored, right, known.sum()])
        if self._groups.data.size > 1:
            dist.all_reduce(found, group=self._groups.data.group)
        loss, scored, right, known = found.tolist()
        return Scores(loss / scored, scored, LENGTH, {"accuracy": right / known})

    def tokens(self, step: int) -> int:
        return step * BATCH * LENGTH

    def epochs(self, _step: int) -> float:
        return 0.0

    def skip(self, steps: int) -> None:
        self.skipped += steps

    def state_dict(self) -> dict[str, Any]:
        return {"windows": self._taken, "skipped": self.skipped, "step": "a word that pretraining uses otherwise"}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._taken, self.skipped = saved["windows"], saved["skipped"]

    def close(self) -> None:
        """Nothing reads ahead."""


class Another(Classification):
    name = "regression"


class Thawed(Classification):
    """Trains the last norm of the backbone, too."""

    def __init__(self, config: Config, groups: Groups, device: torch.device) -> None:
        super().__init__(config, groups, device)
        self.module.get_submodule("backbone.final_norm").requires_grad_(True)


class Undeclared(Classification):
    extras = ()


class Lost(Classification):
    """The loss of the windows LOST is not finite."""

    def loss(self, module: nn.Module, batch: Labelled, step: int) -> Tensor:
        lost = any(torch.equal(batch.ids, windows(first, MICRO).ids) for first in range(*LOST, MICRO))
        return super().loss(module, batch, step) * (float("nan") if lost else 1.0)


def config_of(run_dir: Path, engine: int | str) -> Config:
    return Config(
        model=ModelSection(num_layers=2, hidden_size=16, max_seq_len=64, filter_order=8, embed_dropout=0.0),
        data=DataSection(shards="none, for its windows are made as they are needed"),
        train=TrainSection(run_dir=str(run_dir), steps=STEPS, micro_batch_size=MICRO, global_batch_size=BATCH,
                           eval_every=5, save_every=0),
        optim=OptimSection(lr=0.3, warmup_steps=1, eps=1e-4), engine=engine_section(engine))


def _run(config: Config, stop_at: int = 0, make: Callable[..., Classification] = Classification) -> dict[str, Any]:
    """What a run says and leaves; with the state around the step that has nothing to score."""
    said: list[str] = []
    states: dict[int, dict[str, Any]] = {}
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]

    class Watched(make):  # type: ignore[misc, valid-type]
        def next_step(self) -> Step[Labelled]:
            step = trainer.status.step
            if step in (EMPTY - 1, EMPTY):
                states[step] = state_of(trainer.engine)
            if step + 1 == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().next_step()

    logging.getLogger("hyena_dist.train").addHandler(handler)
    try:
        with open_trainer(config, init_groups(), torch.device("cpu"), objective=Watched) as trainer:
            before = state_of(trainer.engine)
            reason = trainer.fit()
            return {"reason": reason, "step": trainer.status.step, "said": said, "states": states, "before": before,
                    "after": state_of(trainer.engine), "frozen": trainer.engine.frozen}
    finally:
        logging.getLogger("hyena_dist.train").removeHandler(handler)


def _two_ranks(directory: Path) -> dict[str, Any]:
    found = {f"whole {engine}": _run(config_of(directory / f"whole-{engine}", engine)) for engine in ENGINES}
    lost = config_of(directory / "lost", 2)
    found["lost"] = _run(replace(lost, train=replace(lost.train, on_nonfinite="rollback", save_every=5)), make=Lost)
    return found | {f"cut {engine}": _run(config_of(directory / f"cut-{engine}", engine), STOP) for engine in ENGINES}


def _refused(config: Config, make: Callable[..., Classification], kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught, open_trainer(config, init_groups(), torch.device("cpu"),
                                                     objective=make) as trainer:
        trainer.fit()
    return str(caught.value)


def _one_rank(directory: Path) -> dict[str, Any]:
    refused = directory / "refused"
    shutil.copytree(directory / "cut-3", refused)
    found: dict[str, Any] = {make.__name__: _refused(config_of(refused, 1), make, UserError)
                             for make in (Another, Thawed)}
    found["Undeclared"] = _refused(config_of(directory / "undeclared", 1), Undeclared, AssertionError)
    start = latest(directory / "cut-3" / "checkpoints")
    weights = config_of(directory / "weights", 1)
    found["from weights"] = _run(replace(weights, train=replace(weights.train, resume=f"weights:{start}", steps=2)),
                                 make=Thawed)
    # Each where another engine was stopped.
    return found | {engine: _run(config_of(directory / f"cut-{engine}", other))
                    for engine, other in zip(ENGINES, [*ENGINES[2:], *ENGINES[:2]], strict=True)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], dict[Any, Any]]:
    directory = tmp_path_factory.mktemp("objective")
    ranks = run_distributed(_two_ranks, 2, directory)
    return directory, ranks, run_distributed(_one_rank, 1, directory)[0]


def _rows(run_dir: Path, split: str) -> dict[int, Row]:
    return {row.step: row for row in read_rows(run_dir / "metrics.jsonl") if row.split == split}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_head_learns_on_a_frozen_backbone(runs: Any, engine: int | str) -> None:
    directory, ranks, _ = runs
    for rank in ranks:
        run = rank[f"whole {engine}"]
        assert run["frozen"] == {key.removesuffix("/weight") for key in run["before"] if key.startswith("backbone")}
        for key, value in run["before"].items():
            if key.startswith("backbone."):
                assert key.endswith("/weight"), "no moments"
                assert torch.equal(value, run["after"][key]), "bit for bit"
        assert not torch.equal(run["before"]["classes.weight/weight"], run["after"]["classes.weight/weight"])
    train, val = (_rows(directory / f"whole-{engine}", split) for split in ("train", "val"))
    print(f"{engine}: loss {train[1].loss:.3f} to {train[STEPS].loss:.3f}, accuracy {val[STEPS].extras['accuracy']}")
    assert train[STEPS].loss < 0.7 * train[1].loss
    assert list(val) == [5, STEPS]
    assert val[STEPS].extras["accuracy"] > 0.7
    assert val[STEPS].scored == sum(windows(10_000 + i, 1).scored for i in range(HELD_OUT))
    assert {train[step].scored for step in train} == {windows((step - 1) * BATCH, BATCH).scored for step in train}
    assert all(row.extras.keys() <= {"steady_tokens_per_second"} for row in train.values()), "no formula, no share"


def _plain_losses(divisor: Callable[[Labelled], float]) -> dict[int, float]:
    """Of one process with torch only; the sum of a step is divided by what `divisor` says of its windows."""
    config = config_of(Path("unused"), 0)
    task = Classification(config, Groups.single(), torch.device("cpu"))
    optim, model = config.optim, task.module
    optimizer = torch.optim.AdamW(parameter_groups(model.named_parameters(), task.table, optim.weight_decay),
                                  betas=optim.betas, eps=optim.eps)
    losses = {}
    for step in range(STEPS):
        batch = windows(step * BATCH, BATCH)
        if batch.scored:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, optim=optim, steps=STEPS)
            loss = task.loss(model, batch, step) / divisor(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            losses[step + 1] = float(loss.detach())
    return losses


def test_every_engine_has_the_losses_of_one_plain_process(runs: Any) -> None:
    directory, _, _ = runs
    expected = _plain_losses(lambda batch: batch.scored)
    other = _plain_losses(lambda batch: float((batch.labels >= 0).sum()))
    for engine in ENGINES:
        found = {step: row.loss for step, row in _rows(directory / f"whole-{engine}", "train").items()}
        assert found.keys() == expected.keys()
        worst = max(abs(found[step] - expected[step]) for step in expected)
        control = max(abs(found[step] - other[step]) for step in expected)
        print(f"{engine}: {worst:.1e}, tolerance {LOSS}; divided by counts in place of weights {control:.1e}")
        assert worst < LOSS < 100 * LOSS < control


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_of_which_nothing_is_scored_changes_nothing(runs: Any, engine: int | str) -> None:
    directory, ranks, _ = runs
    for rank in ranks:
        run = rank[f"whole {engine}"]
        before, after = run["states"][EMPTY - 1], run["states"][EMPTY]
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before if key != "steps")
        assert before["steps"] == after["steps"] == EMPTY - 1
        assert [line for line in run["said"] if NOTHING in line] == [f"step {EMPTY}: {NOTHING}: nothing was changed"]
    assert list(_rows(directory / f"whole-{engine}", "train")) == [s for s in range(1, STEPS + 1) if s != EMPTY]


@pytest.mark.parametrize("engine", ENGINES)
def test_stopped_it_goes_on_at_another_engine_and_number_of_ranks(runs: Any, engine: int | str) -> None:
    directory, ranks, resumed = runs
    assert [rank[f"cut {engine}"]["reason"] for rank in ranks] == ["SIGTERM"] * 2
    assert STOP <= ranks[0][f"cut {engine}"]["step"] < STEPS
    assert resumed[engine]["reason"] is None
    for split in ("train", "val"):
        whole, cut = (_rows(directory / f"{kind}-{engine}", split) for kind in ("whole", "cut"))
        assert whole.keys() == cut.keys()
        worst = max(abs(whole[step].loss - cut[step].loss) for step in whole)
        print(f"{engine}, {split}: losses differ by {worst:.1e}, tolerance {LOSS}")
        assert worst < LOSS
        assert [row.extras.get("accuracy") for row in whole.values()] == [
            row.extras.get("accuracy") for row in cut.values()]
    whole, cut = ranks[0][f"whole {engine}"]["after"], resumed[engine]["after"]
    assert whole.keys() == cut.keys()
    assert whole["steps"] == cut["steps"] == STEPS - 1
    for key in whole.keys() - {"steps"}:
        frozen = key.startswith("backbone.")
        assert torch.equal(whole[key], cut[key]) if frozen else rel(cut[key], whole[key]) < 100 * LOSS, key
    moved = rel(ranks[0][f"cut {engine}"]["after"]["classes.weight/weight"], whole["classes.weight/weight"])
    assert moved > 1000 * LOSS, "the control: the last steps are not nothing"


def test_its_checkpoints_say_what_was_learnt_and_what_was_frozen(runs: Any) -> None:
    directory, ranks, _ = runs
    for engine in ENGINES:
        path = latest(directory / f"whole-{engine}" / "checkpoints")
        metadata = json.loads((path / "metadata.json").read_text("utf-8"))
        assert metadata["objective"] == "classification"
        assert metadata["frozen"] == sorted(ranks[0][f"whole {engine}"]["frozen"])
        assert metadata["data"]["windows"] == STEPS * BATCH
        moments = {key for key in TensorReader(path).shapes if key.startswith("optim/")}
        assert moments == {f"optim/{moment}/classes.{name}" for moment in ("exp_avg", "exp_avg_sq")
                           for name in ("weight", "bias")}


def test_another_objective_or_frozen_set_is_one_line(runs: Any) -> None:
    directory, _, found = runs
    assert "a run whose objective was 'classification', and that of this one is 'regression': " in found["Another"]
    assert found["Another"].endswith(_remedy(found["Another"], "resume it with the program that saved it", directory))
    start = "cannot be resumed with other frozen weights: backbone.final_norm.bias was frozen and is trained now, and 1"
    assert start in found["Thawed"]
    assert found["Thawed"].endswith(_remedy(found["Thawed"], "freeze the same ones", directory))
    assert "\n" not in found["Another"] + found["Thawed"]
    assert found["from weights"]["step"] == 2, "as the remedy says"
    assert found["from weights"]["frozen"] < found[0]["frozen"]


def test_lost_windows_are_passed_over_and_stay_so(runs: Any) -> None:
    directory, _, _ = runs
    rows = _rows(directory / "lost", "train")
    assert list(rows) == [step for step in range(1, STEPS + 1) if step != EMPTY]
    taken = [*range(5), *range(7, STEPS + 2)]  # back from step 7 to the checkpoint of step 5, and on behind the lost
    assert [row.scored for row in rows.values()] == [
        scored for step in taken if (scored := windows(step * BATCH, BATCH).scored)]
    metadata = json.loads((latest(directory / "lost" / "checkpoints") / "metadata.json").read_text("utf-8"))
    assert (metadata["data"]["skipped"], metadata["data"]["windows"]) == (2, STEPS * BATCH)


def test_commands_of_pretraining_say_that_this_is_something_else(runs: Any, tmp_path: Path,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    run = runs[0] / "whole-0"
    assert evaluate([str(run)]) == 2
    assert capsys.readouterr().err == (
        f"error: {run}/checkpoints/step-{STEPS:08d} is of a run whose objective was 'classification', and what is "
        "scored here is the next base: let the program that trained it score it\n")
    assert convert([str(run), str(tmp_path / "converted")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "model/embedding.word_embeddings.weight is missing" in said
    assert not (tmp_path / "converted").exists()


def _remedy(text: str, first: str, directory: Path) -> str:
    path = text.split()[0]
    assert path.startswith(str(directory / "refused" / "checkpoints"))
    return f"{first}, or take the weights alone with train.resume=weights:{path} in another train.run_dir"


def test_a_metric_that_is_not_declared_is_seen_before_the_first_step(runs: Any) -> None:
    directory, _, found = runs
    assert "accuracy" in found["Undeclared"]
    assert not read_rows(directory / "undeclared" / "metrics.jsonl")
