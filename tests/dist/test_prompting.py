"""Soft prompts and labels as tokens: over tensor and context ranks all is that of one rank, nothing else is changed,
and what is shown before a sequence is what the task says."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hyena_dist.checkpoint.format import split_parts
from hyena_dist.config.errors import UserError
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.data.tables import reverse_complement
from hyena_dist.data.tokenizer import NUCLEOTIDES, PAD, TOKENS
from hyena_dist.model.label_tokens import LabelTokenModel
from hyena_dist.model.model import HyenaModel, build_model
from hyena_dist.model.placement import tensor_share
from hyena_dist.model.prompt import add_prompt
from hyena_dist.parallel.groups import Groups, init_groups
from hyena_dist.parallel.tokens import slice_tokens
from hyena_dist.train.answers import Drawn
from hyena_dist.train.prompting import SEP, Prompting, check_prompting, class_tokens, row_tokens
from tests.compare import rel
from tests.dist.harness import run_distributed
from tests.dist.test_finetuning import config_of, labelled_of, rows, run, table, tensors

EXACT, SEEN = 1e-12, 1e-3
PROMPT, LENGTHS = 40, (61, 45, 64, 41)
"""On two context ranks the prompt reaches into the second slice."""
SECTION = ModelSection(num_layers=2, hidden_size=16, max_seq_len=64, filter_order=8, embed_dropout=0.0)


def sequences() -> Tensor:
    ids = torch.randint(7, 11, (len(LENGTHS), 64), generator=torch.Generator().manual_seed(0))
    return ids.masked_fill(torch.arange(64) >= torch.tensor(LENGTHS)[:, None], PAD)


def answering(groups: Groups, *, sequence: bool = False, tied: bool = True, prompt: bool = True) -> LabelTokenModel:
    config = Config(model=replace(SECTION, tie_embeddings=tied), parallel=ParallelSection(
        tensor=groups.tensor.size, context=groups.context.size, sequence=sequence))
    backbone = build_model(config, groups)
    if prompt:
        add_prompt(backbone, PROMPT, seed=1)
    return LabelTokenModel(backbone, (7, 9, 11)).double()


def answered(model: LabelTokenModel, groups: Groups) -> tuple[Tensor, dict[str, Tensor]]:
    """The answers, and every gradient summed over the context ranks."""
    ids = slice_tokens(sequences(), groups.context, multiple=model.token_multiple, fill=PAD)
    answers = model(ids, torch.tensor(LENGTHS))
    (torch.nn.functional.cross_entropy(answers, torch.arange(4) % 3, reduction="sum") / groups.context.size).backward()
    gradients = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            gradients[name] = torch.zeros_like(weight) if weight.grad is None else weight.grad
            if groups.context.size > 1:
                dist.all_reduce(gradients[name], group=groups.context.group)
    return answers.detach(), gradients


@contextmanager
def broken() -> Iterator[None]:
    """Every rank takes the first vectors."""
    def forward(self: Any, x: Tensor) -> Tensor:
        here = self.vectors[: len(x)]
        return torch.cat([here[:, None].expand(-1, x.shape[1], -1).to(x.dtype), x[len(here):]])

    with patch("hyena_dist.model.prompt.Prompt.forward", forward):
        yield


def _ranks(tensor: int, context: int, kinds: list[tuple[bool, bool, bool]]) -> list[Any]:
    groups, found = init_groups(tensor=tensor, context=context), []
    for sequence, tied, prompt in kinds:
        for fault in (False, True)[: 1 + (prompt and context > 1)]:
            model = answering(groups, sequence=sequence, tied=tied, prompt=prompt)
            with broken() if fault else nullcontext():
                answers, gradients = answered(model, groups)
            whole_answers, whole = answered(answering(Groups.single(), tied=tied, prompt=prompt), Groups.single())
            entries = model.placement()
            found.append((fault, prompt, rel(answers, whole_answers), {
                name: rel(gradient, tensor_share(whole[name], entries[name], groups.tensor.rank, tensor))
                for name, gradient in gradients.items() if whole[name].abs().max() > 0}))
    return found


def _check(tensor: int, context: int, kinds: list[tuple[bool, bool, bool]]) -> None:
    for of_rank in run_distributed(partial(_ranks, tensor, context, kinds), tensor * context):
        for fault, prompt, answers, gradients in of_rank:
            if fault:
                assert answers > SEEN, "the control: vectors of another place are seen"
                continue
            assert answers < EXACT
            assert len(gradients) == 1 if prompt else len(gradients) > 20
            assert max(gradients.values()) < EXACT, max(gradients, key=gradients.__getitem__)


def test_prompts_over_context_ranks_are_those_of_one() -> None:
    _check(1, 2, [(False, True, True)])


@pytest.mark.slow
def test_prompts_and_label_tokens_over_tensor_and_context_ranks_are_those_of_one() -> None:
    _check(2, 2, [(sequence, tied, prompt) for sequence in (False, True) for tied in (False, True)
                  for prompt in (False, True)])


def test_answers_are_the_logits_of_the_language_model() -> None:
    for tied in (False, True):
        model = answering(Groups.single(), tied=tied, prompt=False).eval()
        with torch.no_grad():
            logits = model.backbone(sequences())
            answers = model(sequences(), torch.tensor(LENGTHS))
        wanted = torch.stack([logits[row, length - 1, [7, 9, 11]] for row, length in enumerate(LENGTHS)])
        assert rel(answers, wanted) < EXACT
        assert rel(answers, wanted.flip(1)) > SEEN, "the control"


def pretrained(directory: Path) -> HyenaModel:
    return build_model(replace(few(directory, "x", 1), train=replace(few(directory, "x", 1).train, seed=9)),
                       Groups.single())


def few(directory: Path, name: str, engine: int | str, *, context: int = 1, tensor: int = 1, **tune: Any) -> Config:
    config = config_of(directory, name, engine, context=context, tensor=tensor, from_="somewhere", **tune)
    return replace(config, model=replace(config.model, max_seq_len=512), data=replace(config.data, seq_len=512))


def _runs(directory: Path) -> None:
    weights = dict(pretrained(directory).named_parameters())
    prompt: dict[str, Any] = {"trained": "prompt", "prompt_tokens": 70, "shots": 1}
    for engine in (3, "fsdp"):
        assert run(few(directory, f"whole-{engine}", engine, **prompt), weights=weights) is None
        assert run(few(directory, f"cut-{engine}", engine, **prompt), stop_at=7, weights=weights) is not None
        assert run(few(directory, f"cut-{engine}", engine, **prompt), weights=weights) is None
    assert run(few(directory, "context", 1, context=2, **prompt), weights=weights) is None
    assert run(few(directory, "tuned", 1, shots=2), weights=weights) is None


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("prompting")
    table(directory / "table")
    run_distributed(_runs, 2, directory)
    return directory


@pytest.mark.parametrize("engine", [3, "fsdp"])
def test_nothing_but_the_prompt_is_changed_and_a_stop_changes_nothing(runs: Path, engine: int | str) -> None:
    whole, cut = (tensors(runs / f"{name}-{engine}") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    model = pretrained(runs)
    before = {f"model/backbone.{name}{suffix}": part for name, weight in model.named_parameters()
              for suffix, part in split_parts(weight.detach(), model.placement()[name]).items()}
    for key, weight in before.items():
        assert whole[key].numpy().tobytes() == weight.numpy().tobytes(), key
    assert {key for key in whole if key.startswith("model/")} - before.keys() == {
        "model/backbone.embedding.prompt.vectors"}
    drawn = build_model(few(runs, "x", 1), Groups.single())
    add_prompt(drawn, 70, seed=0)
    assert drawn.embedding.prompt is not None
    first = drawn.embedding.prompt.vectors.detach()
    assert rel(whole["model/backbone.embedding.prompt.vectors"], first) > SEEN, "the control: the prompt is learnt"


def test_context_ranks_and_engines_learn_alike(runs: Path) -> None:
    one, *others = ([row.loss for row in rows(runs / name)] for name in ("whole-3", "whole-fsdp", "context"))
    for other in others:
        assert other[:6] == pytest.approx(one[:6], rel=2e-5)


def prompting(directory: Path, rc: str = "average", **tune: Any) -> Prompting:
    config = few(directory, "x", 1, **tune)
    config = replace(config, finetune=replace(config.finetune, rc=rc))
    return Prompting(config, Groups.single(), torch.device("cpu"), labelled=labelled_of(config),
                     weights=dict(pretrained(directory).named_parameters()))


def test_what_is_shown_before_a_sequence(runs: Path) -> None:
    task, labelled = prompting(runs, shots=2), labelled_of(few(runs, "x", 1))
    train = {tuple(NUCLEOTIDES.encode(example.bases).tolist()): example.label for example in labelled.splits["train"]}
    seen = []
    for drawn in (Drawn(3, False, 0), Drawn(3, False, 1), Drawn(4, False, 0)):
        tokens = task._tokens("train", drawn).tolist()
        assert tokens == task._tokens("train", drawn).tolist(), "the same each time"
        assert tokens[-1] == SEP
        ends = [place for place, token in enumerate(tokens) if token == SEP]
        *pieces, own = [tuple(tokens[start:end]) for start, end in
                        zip([0, *(end + 1 for end in ends)], ends, strict=False)]
        shown, labels = pieces[::2], pieces[1::2]
        assert [train[one] for one in shown] == [{7: "at", 11: "gc"}[token] for token, in labels]
        assert sorted(token for token, in labels) == [7, 7, 11, 11]
        assert train[own] == labelled.splits["train"][drawn.number].label
        assert own not in shown
        seen.append(shown)
    assert seen[0] != seen[1] != seen[2], "others in another epoch and before another sequence"
    assert len(task._tokens("train", Drawn(3, False, 0))) <= row_tokens(few(runs, "x", 1, shots=2).finetune, labelled)
    prompt = prompting(runs, trained="prompt", prompt_tokens=5)._tokens("test", Drawn(0, True)).tolist()
    other = NUCLEOTIDES.encode(labelled.splits["test"][0].bases.translate(bytes.maketrans(b"ACGT", b"TGCA"))[::-1])
    assert prompt == [PAD] * 5 + other.tolist() + [SEP]


def test_a_sequence_is_not_shown_as_its_other_strand(tmp_path: Path) -> None:
    bases = ["".join(row) for row in np.random.default_rng(0).choice(list("ACGT"), (8, 12))]
    lines = [f"{text},{label}" for n, one in enumerate(bases) for label in ("at", "gc")[n % 2 :][:1]
             for text in (one, reverse_complement(one.encode()).decode())]
    (tmp_path / "table").mkdir()
    for name in ("train", "dev"):
        (tmp_path / f"table/{name}.csv").write_text("\n".join(["sequence,label", *lines]) + "\n", encoding="utf-8")

    def shown(task: Prompting) -> bool:
        """Whether any sequence is shown its other strand."""
        train = task._labelled.splits["train"]
        return any(train[number].bases == reverse_complement(train[asked].bases) for asked in range(len(train))
                   for epoch in range(4) for number, _ in task._shots("train", Drawn(asked, False, epoch)))

    assert not shown(prompting(tmp_path, shots=4))
    assert shown(prompting(tmp_path, "none", shots=4)), "the control: where one strand is read, the other is no copy"


def test_class_tokens() -> None:
    names = [[TOKENS[token] for token in class_tokens(count)] for count in range(2, 11)]
    assert names[:2] == [["A", "N"], ["A", "G", "N"]]
    assert names[-1] == ["A", "C", "G", "T", "N", "[CLS]", "[BOS]", "[MASK]", "[RESERVED]", "[UNK]"]
    assert [len(set(one)) for one in names] == list(range(2, 11))


@pytest.mark.parametrize(("change", "said"), [
    ({"shots": 32}, "training has 32 of"), ({"shots": 8}, "make rows of up to"),
    ({"trained": "prompt", "prompt_tokens": 500}, "a prompt of 500 vectors")])
def test_what_does_not_fit_is_refused(runs: Path, change: dict[str, Any], said: str) -> None:
    config = few(runs, "x", 1, **change)
    with pytest.raises(UserError, match=said):
        check_prompting(config, labelled_of(config))


@pytest.mark.parametrize(("change", "said"), [
    ({"trained": "prompt", "task": "regression"}, "write a class as a token"),
    ({"trained": "head", "shots": 1}, "gives answers without a head"),
    ({"trained": "prompt", "prompt_tokens": 0}, "prompt_tokens must be greater than 0")])
def test_what_makes_no_sense_is_refused(runs: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        few(runs, "x", 1, **change)
