"""The model over tensor, sequence, context and data ranks equals the model of one rank: logits, the gradient at the
embedding, and every weight's gradient. Every pair of the options' values occurs; each bug that it guards against is
shown."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hyena_dist.checkpoint.format import split_parts
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.model import context, layers, mixer
from hyena_dist.model.config import hyena_config
from hyena_dist.model.initial import initialize
from hyena_dist.model.loss import token_loss
from hyena_dist.model.model import HyenaModel
from hyena_dist.ops.dropout import DropoutKey
from hyena_dist.parallel.collectives import all_gather, all_reduce
from hyena_dist.parallel.groups import Axis, Groups, init_groups
from hyena_dist.parallel.tokens import slice_tokens
from tests.compare import rel
from tests.dist.harness import run_distributed

LENGTH = 59  # no number of context ranks divides it
CPU = torch.device("cpu")
BATCH = 2  # rows of a data rank
TOLERANCE = {"fp64": 1e-12, "fp32": 2e-5, "bf16": 6e-2}


@dataclass(frozen=True)
class Case:
    """One way to split the model."""

    tensor: int
    context: int
    data: int
    sequence: bool = False
    method: str = "all_to_all"
    overlap: int = 1
    order: int = 2
    recompute: str = "none"
    precision: str = "fp64"
    pattern: str = "H"
    tied: bool = True
    kmer: int = 1

    @property
    def ranks(self) -> int:
        return self.tensor * self.context * self.data

    @property
    def makes_sense(self) -> bool:
        return (self.tensor > 1 or not self.sequence) and (self.context > 1 or
                                                           (self.method, self.overlap) == ("all_to_all", 1))


OPTIONS: dict[str, tuple] = {"sequence": (False, True), "method": ("all_to_all", "distributed_fft"),
           "overlap": (1, 2), "order": (2, 3), "recompute": ("none", "selective", "block", "full"),
           "precision": ("fp64", "fp32", "bf16"), "pattern": ("H", "HA"), "tied": (True, False)}


def topologies(*sizes: int) -> list[tuple[int, int, int]]:
    return [(t, p, d) for t, p, d in itertools.product((1, 2, 4, 8), repeat=3) if t * p * d in sizes]


def every_case(*sizes: int) -> list[Case]:
    cases = (Case(*topology, *values) for topology in topologies(*sizes)
             for values in itertools.product(*OPTIONS.values()))
    return [case for case in cases if case.makes_sense]


def matrix(*sizes: int) -> list[Case]:
    """Every combination, but of overlap, layer pattern and head one is taken, in turn."""
    groups: dict[Case, list[Case]] = {}
    for case in every_case(*sizes):
        groups.setdefault(replace(case, overlap=1, pattern="H", tied=True), []).append(case)
    return [cases[number % len(cases)] for number, cases in enumerate(groups.values())]


def pairs(case: Case) -> set[tuple]:
    values = ((key, getattr(case, key)) for key in ("tensor", "context", "data", *OPTIONS))
    return set(itertools.combinations(values, 2))


def covering(cases: list[Case]) -> list[Case]:
    """A few of the cases, of few ranks, in which every pair of values of all the cases occurs, found greedily."""
    missing = set().union(*map(pairs, cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: (len(pairs(case) & missing), -case.ranks))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def build(case: Case, groups: Groups, parallel: ParallelSection | None) -> HyenaModel:
    section = ModelSection(num_layers=max(2, len(case.pattern)), hidden_size=32, max_seq_len=LENGTH,
                           filter_order=8, hyena_order=case.order, embed_dropout=0.2, resid_dropout=0.1,
                           num_attention_heads=8, layer_pattern=case.pattern, tie_embeddings=case.tied,
                           kmer=case.kmer)
    config = hyena_config(section, precision="bf16" if case.precision == "bf16" else "fp32",
                          activation_checkpointing=case.recompute, parallel=parallel,
                          params_dtype=torch.float64 if case.precision == "fp64" else torch.float32)
    model = HyenaModel(config, groups.collection())
    initialize(model, model.placement(), model.tensor, seed=5)
    with torch.no_grad():  # initial biases are 0: nothing would show that one is forgotten
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and not name.startswith("layers.0.mixer.conv"):
                parameter.add_(0.01)
    return model


def forward_backward(model: HyenaModel, groups: Groups, ids: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor,
                     count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Local (logits, gradient at the embedding's output)."""
    embedded: list[torch.Tensor] = []
    model.embedding.register_forward_hook(lambda _m, _i, out: (out.retain_grad(), embedded.append(out))[-1])
    logits = model(ids, DropoutKey(1, 2, rows))
    total, _ = token_loss(logits, targets, groups.tensor)
    (total / count).backward()
    return logits.detach(), embedded[0].grad


def compare(case: Case, groups: Groups, *, local_mean: bool = False,
            device: torch.device = CPU) -> dict[str, float]:
    """Largest error of this rank by quantity, against one rank in the same precision (bf16: against float32)."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(7, 7 + 4**case.kmer, (BATCH * case.data, LENGTH + 1), generator=generator)
    targets = ids[:, 1:].masked_fill(torch.rand(BATCH * case.data, LENGTH, generator=generator) < 0.3, -100)
    ids, targets, rows = ids.to(device), targets.to(device), torch.arange(BATCH * case.data, device=device)
    mine = slice(groups.data.rank * BATCH, (groups.data.rank + 1) * BATCH)
    one = Groups.single()
    reference = build(Case(1, 1, 1, order=case.order, pattern=case.pattern, tied=case.tied, kmer=case.kmer,
                           precision="fp32" if case.precision == "bf16" else case.precision), one, None).to(device)
    count = int((targets != -100).sum())
    exact_logits, exact_dx = forward_backward(reference, one, ids[:, :-1], targets, rows, count)

    parallel = ParallelSection(tensor=case.tensor, context=case.context, sequence=case.sequence,
                               context_method=case.method, overlap_groups=case.overlap)
    model = build(case, groups, parallel).to(device)
    axis, multiple = groups.context, model.token_multiple
    local_ids = slice_tokens(ids[mine, :-1], axis, multiple=multiple, fill=4)
    local_targets = slice_tokens(targets[mine], axis, multiple=multiple, fill=-100)
    if local_mean:
        count = int((local_targets != -100).sum()) * groups.data_context.size
    logits, dx = forward_backward(model, groups, local_ids, local_targets, rows[mine], count)

    whole_logits = crop(whole_tokens(logits, 1, groups.context), 1)
    errors = {"logits": rel(whole_logits, vocabulary_share(exact_logits[mine], groups))}
    if case.sequence:
        dx = all_gather(dx, groups.tensor, 0)
    errors["input gradient"] = rel(crop(whole_tokens(dx, 0, groups.context), 0), exact_dx[:, mine])
    table = model.placement()
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        grad = all_reduce(parameter.grad, groups.data_context) if groups.data_context.size > 1 else parameter.grad
        parts = split_parts(grad, table[name])
        if table[name].tp_dim is not None and groups.tensor.size > 1:
            parts = {key: all_gather(part, groups.tensor, table[name].tp_dim) for key, part in parts.items()}
        errors[name] = rel(torch.cat(list(parts.values())), expected.grad)
    return errors


def whole_tokens(x: torch.Tensor, dim: int, axis: Any) -> torch.Tensor:
    return all_gather(x, axis, dim) if axis.size > 1 else x


def crop(x: torch.Tensor, dim: int) -> torch.Tensor:
    return x.narrow(dim, 0, LENGTH)


def vocabulary_share(logits: torch.Tensor, groups: Groups) -> torch.Tensor:
    return logits.chunk(groups.tensor.size, dim=-1)[groups.tensor.rank]


def _run_cases(cases: list[Case]) -> list[dict[str, float]]:
    made: dict[tuple[int, int], Groups] = {}
    results = []
    for case in cases:
        shape = (case.tensor, case.context)
        made[shape] = made.get(shape) or init_groups(tensor=case.tensor, context=case.context)
        results.append(compare(case, made[shape]))
    return results


def check_cases(cases: list[Case], timeout: float) -> None:
    for ranks in sorted({case.ranks for case in cases}):
        group = [case for case in cases if case.ranks == ranks]
        by_rank = run_distributed(_run_cases, ranks, group, timeout=timeout)
        for case, *errors in zip(group, *by_rank, strict=True):
            worst, name = max((error, name) for found in errors for name, error in found.items())
            print(f"{case}: worst {name} {worst:.1e}, tolerance {TOLERANCE[case.precision]}")
            assert worst < TOLERANCE[case.precision], (case, name)


@pytest.mark.parametrize("worlds", [(2, 4), pytest.param((2, 4, 8), marks=pytest.mark.slow)], ids=("four", "eight"))
def test_every_pair_of_options_equals_one_rank(worlds):
    check_cases(covering(every_case(*worlds)), timeout=300)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_combination_equals_one_rank():
    check_cases(matrix(1, 2, 4, 8), timeout=3600)


def test_the_covering_set_covers():
    cases = every_case(2, 4, 8)
    chosen = covering(cases)
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, cases))
    assert len(chosen) < 40


def _impossible_tokens() -> dict[str, bool | float]:
    """Logits of -inf on all of the first rank's vocabulary and some of the second's, against torch's cross-entropy."""
    axis = init_groups(tensor=2).tensor
    logits = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[..., :9] = -math.inf
    targets = torch.tensor([[9, -100, 10, 15, -100], [12, 13, -100, 9, 11]])
    whole = logits.clone().requires_grad_()
    F.cross_entropy(whole.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    part = logits.chunk(2, dim=-1)[axis.rank].clone().requires_grad_()
    total, _ = token_loss(part, targets, axis)
    total.backward()
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    weighted = _weighted(logits, targets, axis)
    logits[0, 1], logits[1, 2] = -math.inf, -math.inf  # nothing is possible there, and nothing is asked
    bare, _ = token_loss(logits.chunk(2, dim=-1)[axis.rank], targets, axis)
    targets[0, 1] = 3
    scored, _ = token_loss(logits.chunk(2, dim=-1)[axis.rank], targets, axis)
    return {"loss": rel(total, expected), "bare": rel(bare, expected), "finite": bool(part.grad.isfinite().all()),
            "gradient": (part.grad - whole.grad.chunk(2, dim=-1)[axis.rank]).abs().max().item(),
            "control": bool(scored.isfinite()), "weighted": weighted}


def _weighted(logits: Tensor, targets: Tensor, axis: Axis) -> float:
    """How far loss, count and gradient with weights are from those of one rank."""
    weights = torch.tensor([[0.5, 2.0, 0.0, 1.0, 0.25], [3.0, 0.125, 1.0, 0.0, 1.0]], dtype=torch.float64)
    whole, part = (values.clone().requires_grad_() for values in (logits, logits.chunk(2, dim=-1)[axis.rank]))
    losses = F.cross_entropy(whole.flatten(0, 1), targets.flatten(), reduction="none")
    expected = (losses * weights.flatten()).sum()
    total, count = token_loss(part, targets, axis, weights=weights)
    expected.backward()
    total.backward()
    return max(rel(total, expected), abs(float(count) - float(weights[targets != -100].sum())),
               (part.grad - whole.grad.chunk(2, dim=-1)[axis.rank]).abs().max().item())


def test_impossible_tokens_of_a_split_vocabulary():
    for found in run_distributed(_impossible_tokens, 2):
        assert max(found["loss"], found["bare"], found["gradient"], found["weighted"]) < 1e-12, found
        assert found["finite"]
        assert not found["control"], "where it is scored"


CONTROLS = {
    "no halo": (Case(1, 2, 1), "layers.0.mixer.short_conv.weight"),
    "another rank's rows of the filter": (Case(1, 2, 1), "logits"),
    "no sum of the trunk over tensor ranks": (Case(2, 1, 1), "layers.0.mixer.filter.trunk_weight_1"),
    "no sum of the norms over tensor ranks": (Case(2, 1, 1, sequence=True), "final_norm.weight"),
    "local mean": (Case(1, 1, 2), "layers.0.mlp.fc1.weight"),
}


@contextmanager
def bug(name: str) -> Iterator[None]:
    """The package with one mistake in it."""
    own = context._owned_rows
    patches = {
        "no halo": (context, "shift_right", lambda x, _axis: torch.zeros_like(x)),
        "another rank's rows of the filter": (context, "_owned_rows", lambda rows, axis: own(
            rows, type(axis)(axis.group, (axis.rank + 1) % axis.size, axis.size))),
        "no sum of the trunk over tensor ranks": (mixer, "copy_to", lambda x, _axis: x),
        "no sum of the norms over tensor ranks": (layers, "whole", lambda weight, _axis: weight),
    }
    if name not in patches:
        yield
        return
    module, attribute, replacement = patches[name]
    with mock.patch.object(module, attribute, replacement):
        yield


def _run_controls() -> dict[str, dict[str, float]]:
    found = {}
    for name, (case, _) in CONTROLS.items():
        groups = init_groups(tensor=case.tensor, context=case.context)
        with bug(name):
            found[name] = compare(case, groups, local_mean=name == "local mean")
        dist.barrier()
    return found


def test_controls_every_bug_is_seen():
    by_rank = run_distributed(_run_controls, 2)
    for name, (case, quantity) in CONTROLS.items():
        size = max(found[name][quantity] for found in by_rank)
        print(f"{name}: moves {quantity} by {size:.1e}, tolerance {TOLERANCE['fp64']} in float64, "
              f"{TOLERANCE['fp32']} in float32")
        assert size > 100 * TOLERANCE["fp32"], case
