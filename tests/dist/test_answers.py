"""Answers for bases, bins and pairs of bins over tensor, sequence and context ranks: the answers and every gradient are
those of one rank, also of bins that lie across the ranks' borders, and padding is never seen."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hyena_dist.config.schema import Config
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.data.tokenizer import PAD
from hyena_dist.model.binned import BinMeans, BinnedModel
from hyena_dist.model.model import HyenaModel, build_model
from hyena_dist.model.pairs import PairModel, pairs_of
from hyena_dist.model.placement import tensor_share
from hyena_dist.parallel.groups import Groups, init_groups
from hyena_dist.parallel.tokens import slice_tokens
from tests.compare import rel
from tests.dist.harness import run_distributed

TOKENS, ROWS = 64, 3
EXACT, SEEN = 1e-12, 1e-3
SECTION = ModelSection(num_layers=2, hidden_size=16, max_seq_len=TOKENS, filter_order=8, embed_dropout=0.0)

HEADS: dict[str, Callable[[HyenaModel], BinMeans]] = {
    "bases": lambda backbone: BinnedModel(backbone, outputs=3, bin_size=1, seed=1),
    "bins of 8": lambda backbone: BinnedModel(backbone, outputs=3, bin_size=8, seed=1),
    "bins of 7, across borders": lambda backbone: BinnedModel(backbone, outputs=3, bin_size=7, seed=1),
    "bins of 48, longer than a slice": lambda backbone: BinnedModel(backbone, outputs=3, bin_size=48, seed=1),
    "pairs of 7": lambda backbone: PairModel(backbone, bin_size=7, diagonals=1, seed=1),
    "pairs of 8": lambda backbone: PairModel(backbone, bin_size=8, diagonals=2, seed=1),
}
CROSSING, PAIRS = "bins of 7, across borders", "pairs of 7"


def ids() -> Tensor:
    return torch.randint(7, 11, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))


def headed(groups: Groups, kind: str, *, sequence: bool = False) -> BinMeans:
    config = Config(model=SECTION, parallel=ParallelSection(tensor=groups.tensor.size, context=groups.context.size,
                                                            sequence=sequence))
    model = HEADS[kind](build_model(config, groups)).double()
    with torch.no_grad():
        for weight in model.head.parameters():
            weight.mul_(20)  # the first values are small, and so would every other gradient be
    return model


def answered(model: BinMeans, groups: Groups, *, whole: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """The answers of all ranks in their places, and every gradient summed over the context ranks.

    Args:
        whole: of bins under sequence parallelism, add the tensor ranks' answers too.
    """
    part = slice_tokens(ids(), groups.context, multiple=model.backbone.token_multiple, fill=PAD)
    answers = model(part, torch.full((ROWS,), TOKENS))
    count = model.bins(part.shape[1])
    if isinstance(model, PairModel):
        places = pairs_of(count, model.diagonals, groups.context)
        found = answers.new_zeros(ROWS, count, count)
    else:
        places = (torch.tensor([*model.own_bins(part.shape[1] // model.sequence.size)], dtype=torch.int64),)
        found = answers.new_zeros(ROWS, count, answers.shape[-1])
    found[(slice(None), *places)] = answers.detach()
    wanted = torch.randn(found.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (answers - wanted[(slice(None), *places)]).square().sum().backward()
    axes = [groups.context] + [model.sequence] * (whole and not isinstance(model, PairModel))
    for axis in axes:
        if axis.size > 1:
            dist.all_reduce(found, group=axis.group)
    gradients = {}
    for name, weight in model.named_parameters():
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        if groups.context.size > 1:
            dist.all_reduce(gradient, group=groups.context.group)
        gradients[name] = gradient
    return found, gradients


def differences(groups: Groups, kind: str, sequence: bool) -> tuple[float, dict[str, float]]:
    model = headed(groups, kind, sequence=sequence)
    answers, gradients = answered(model, groups)
    expected, whole = answered(headed(Groups.single(), kind), Groups.single())
    table = model.placement()
    return rel(answers, expected), {
        name: rel(gradient, tensor_share(whole[name], table[name], groups.tensor.rank, groups.tensor.size))
        for name, gradient in gradients.items() if whole[name].abs().max() > 0}


def _ranks(tensor: int, context: int, sequence: bool, kinds: list[str]) -> dict[str, Any]:
    groups = init_groups(tensor=tensor, context=context)
    found: dict[str, Any] = {kind: differences(groups, kind, sequence) for kind in kinds}
    for kind, broken in ((CROSSING, "sum_for_owners"), (PAIRS, "sum_for_all")):
        with patch.object(BinMeans, broken, lambda _, part: part):
            found[f"{kind}, {broken} broken"] = differences(groups, kind, sequence)
    with patch("hyena_dist.model.binned.whole", lambda weight, _: weight) if sequence else nullcontext():
        found["weights"] = differences(groups, "bases", sequence)
    return found


def check(ranks: list[dict[str, Any]], kinds: list[str], *, sequence: bool) -> None:
    for found in ranks:
        for kind in kinds:
            answers, gradients = found[kind]
            assert answers < EXACT, kind
            assert len(gradients) > 20
            assert max(gradients.values()) < EXACT, (kind, max(gradients, key=gradients.__getitem__))
        for kind, broken in ((CROSSING, "sum_for_owners"), (PAIRS, "sum_for_all")):
            assert found[f"{kind}, {broken} broken"][0] > SEEN, "the control: bins of one rank's tokens are seen"
        lost = max(found["weights"][1].values()) > SEEN
        assert lost == sequence, "the control: the gradient of a head's weight of one tensor rank's bases is seen"


def test_bins_across_borders_are_those_of_one_rank() -> None:
    kinds = [CROSSING, PAIRS]
    check(run_distributed(partial(_ranks, 1, 2, False, kinds), 2), kinds, sequence=False)


@pytest.mark.slow
@pytest.mark.parametrize("sequence", [False, True])
def test_answers_and_gradients_over_tensor_and_context_ranks_are_those_of_one_rank(sequence: bool) -> None:
    kinds = [*HEADS]
    check(run_distributed(partial(_ranks, 2, 2, sequence, kinds), 4), kinds, sequence=sequence)


@pytest.mark.parametrize("kind", [CROSSING, "bases", PAIRS])
def test_what_stands_behind_a_sequence_is_not_seen(kind: str) -> None:
    model, length = headed(Groups.single(), kind).eval(), 42
    with torch.no_grad():
        alone = model(ids()[:, :length], torch.full((ROWS,), length))
        padded = model(ids(), torch.full((ROWS,), length))
    if isinstance(model, PairModel):
        wide, narrow = (torch.stack(pairs_of(tokens // 7, 1, Groups.single().context)) for tokens in (TOKENS, length))
        padded = padded[:, (wide[1] < length // 7).nonzero()[:, 0]]
        assert padded.shape[1] == narrow.shape[1]
    else:
        padded = padded[:, : alone.shape[1]]
    assert rel(padded, alone) < 1e-11
    with torch.no_grad():
        changed = ids().clone()
        changed[:, length - 1] = 7 + (changed[:, length - 1] - 6) % 4
        seen = model(changed[:, :length], torch.full((ROWS,), length))
    assert rel(seen, alone) > SEEN, "the control: the last base counts"


def test_a_bin_is_the_mean_of_its_bases_answers() -> None:
    bases, bins = (headed(Groups.single(), kind).eval() for kind in ("bases", "bins of 8"))
    lengths = torch.full((ROWS,), TOKENS)
    with torch.no_grad():
        assert rel(bins(ids(), lengths), bases(ids(), lengths).unflatten(1, (8, 8)).mean(2)) < EXACT


def test_which_of_two_bins_comes_first_does_not_matter() -> None:
    model = headed(Groups.single(), "pairs of 8").eval()
    assert isinstance(model, PairModel)
    answers = model(ids(), torch.full((ROWS,), TOKENS))
    assert answers.shape == (ROWS, 21)
    with patch("hyena_dist.model.pairs.pairs_of", lambda *args: pairs_of(*args)[::-1]), \
            patch("torch.log1p", lambda x: torch.log(1 + x.abs())):
        assert rel(model(ids(), torch.full((ROWS,), TOKENS)), answers) < EXACT
