"""Every kind of answer in float64 over tensor, sequence and context ranks, without an engine: the loss of a step and
every gradient are those of one rank."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hyena_dist.config.schema import Config
from hyena_dist.data.labelled import read_labelled
from hyena_dist.model.placement import tensor_share
from hyena_dist.parallel.groups import Groups, init_groups
from hyena_dist.train.finetuning import Finetuning
from hyena_dist.train.prompting import Prompting
from tests.compare import rel
from tests.dist.every_head import SECTIONS, config, pretrained, tables
from tests.dist.harness import run_distributed

EXACT, SEEN = 1e-12, 1e-3


def objective(config: Config, groups: Groups) -> Finetuning:
    """In float64, with a head and adapters that are not near 0, as then every other gradient would be."""
    labelled = read_labelled(config.finetune, seed=0, most=config.model.max_seq_len)
    kind = Prompting if config.finetune.by_tokens else Finetuning
    task = kind(config, groups, torch.device("cpu"), labelled=labelled, weights=pretrained(config))
    task.module.double()
    with torch.no_grad():
        for name, weight in task.module.named_parameters():
            if name.startswith("head."):
                weight.mul_(20)
            elif name.endswith(".lora.b"):
                entry = task.table[name]
                shape = [size * (groups.tensor.size if dim == entry.tp_dim else 1)
                         for dim, size in enumerate(weight.shape)]
                drawn = torch.randn(shape, generator=torch.Generator().manual_seed(len(name)), dtype=weight.dtype)
                weight.copy_(tensor_share(drawn, entry, groups.tensor.rank, groups.tensor.size))
    return task


def learnt(task: Finetuning, groups: Groups) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The loss of a step of two batches summed over the context ranks, its gradients, and this rank's part of them."""
    parts = [task.loss(task.module, batch, 0) for batch in task.next_step().batches]
    loss = torch.stack(parts).sum()
    loss.backward()
    own = {name: torch.zeros_like(weight) if weight.grad is None else weight.grad
           for name, weight in task.module.named_parameters() if weight.requires_grad}
    found = {"loss": loss.detach(), **own}
    if groups.context.size > 1:
        found = {name: value.clone() for name, value in found.items()}
        for value in found.values():
            dist.all_reduce(value, group=groups.context.group)
    return found.pop("loss"), found, own


def _ranks(directory: Path, sequence: bool) -> dict[str, tuple[float, dict[str, float], float]]:
    """By kind, how far off the loss and each gradient are, and, for the control, the gradients of this rank alone."""
    groups, found = init_groups(tensor=2, context=2), {}
    for kind in SECTIONS:
        task = objective(config(directory, "unused", kind, tensor=2, context=2, sequence=sequence), groups)
        loss, gradients, own = learnt(task, groups)
        alone = objective(config(directory, "unused", kind), Groups.single())
        expected, whole, _ = learnt(alone, Groups.single())
        assert gradients.keys() == whole.keys()
        shares = {name: tensor_share(value, task.table[name], groups.tensor.rank, 2) for name, value in whole.items()
                  if value.abs().max() > 0}
        found[kind] = (rel(loss, expected), {name: rel(gradients[name], share) for name, share in shares.items()},
                       max(rel(own[name], share) for name, share in shares.items()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("sequence", [False, True])
def test_losses_and_gradients_of_every_kind_are_those_of_one_rank(tmp_path: Path, sequence: bool) -> None:
    tables(tmp_path, SECTIONS)
    ranks = run_distributed(_ranks, 4, tmp_path, sequence)
    for kind in SECTIONS:
        losses, gradients, alone = zip(*(found[kind] for found in ranks), strict=True)
        assert max(losses) < EXACT, kind
        assert max(alone) > SEEN, f"{kind}, the control: gradients of one context rank alone are seen"
        error, name = max((value, name) for of_rank in gradients for name, value in of_rank.items())
        print(f"{kind}: {len(gradients[0])} gradients, at most {error:.1e} off, in {name}; tolerance {EXACT}")
        assert len(gradients[0]) >= {"prompt": 1, "head": 2, "lora": 10}.get(kind, 18)
        assert error < EXACT, (kind, name)
