"""Pretraining, the first objective: predict the next base of every window of the shards."""

import logging
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hyena_dist.checkpoint.metadata import PRETRAINING
from hyena_dist.config.schema import Config
from hyena_dist.config.warmup import tokens_after
from hyena_dist.costs.utilisation import Utilisation
from hyena_dist.data.pool import identity_of, open_pools
from hyena_dist.data.stream import Batch, Part, ValidationBatches
from hyena_dist.engine.protocol import Table
from hyena_dist.model.context import log_context_method
from hyena_dist.model.evaluate import evaluate_split
from hyena_dist.model.loss import perplexity, token_loss
from hyena_dist.model.model import build_model
from hyena_dist.ops.dropout import DropoutKey
from hyena_dist.parallel.groups import Groups
from hyena_dist.parallel.tokens import part_of_window
from hyena_dist.runtime.agree import agree
from hyena_dist.runtime.startup import check_same_data
from hyena_dist.train.curriculum import Curriculum
from hyena_dist.train.objective import Scores, Step, Watched

logger = logging.getLogger(__name__)

CASES = ("upper", "lower")
MANY_EPOCHS = 4
"""After about so many the same text teaches a language model little more (Muennighoff et al. 2023)."""


class Pretraining:
    """The objective of a run of `launchers/pretrain.py`. Collective.

    Args:
        config: already checked (`config.checks`).
        device: of this rank.

    Raises:
        UserError: the shards cannot be read or do not fit the configuration; the same on every rank.
    """

    name = PRETRAINING
    extras: Collection[str] = ()
    no_batch = ("a reader process stands still, or the file system of data.shards does not answer: look at both, and "
                "resume with the same command; DEEPSPEED_TIMEOUT sets how many minutes ranks wait")
    nothing_to_train = "its windows have no base to score (A, C, G, T)"

    def __init__(self, config: Config, groups: Groups, device: torch.device) -> None:
        self._config, self._groups, self._device = config, groups, device
        self.nothing_to_validate = f"{config.data.shards} has no validation bases, or the model gives no number"
        self.pools = agree(lambda: open_pools(config.data, copy=True), groups)
        check_same_data(identity_of(self.pools), groups.world)
        model = build_model(config, groups)
        self._token_multiple = model.token_multiple
        self.curriculum = agree(lambda: Curriculum(self.pools, config, dp_rank=groups.data.rank,
                                                   dp_size=groups.data.size, part_of=self._part), groups)
        self._seq_len = config.data.val_seq_len or config.data.seq_len
        self.validation = ValidationBatches(
            self.pools, seq_len=self._seq_len, batch_size=config.train.micro_batch_size, dp_rank=groups.data.rank,
            dp_size=groups.data.size, tokens=config.data.val_tokens, part=self._part(self._seq_len))
        self._mass = [0.0] * len(self.pools)
        """Of each source, what this rank's steps have scored since the last validation."""
        self.extras = self._names()
        self._warn_of_repeats()
        self.module: nn.Module = model.to(device)
        self.table: Table = model.placement()
        log_context_method(config, groups)

    def utilisation(self) -> Utilisation:
        return Utilisation.of_device(self._config, self._groups.world.size, self._device)

    def next_step(self) -> Step[Batch]:
        stage, batches = self.curriculum.take()
        if len(self.pools) > 1:
            for batch in batches:
                sources = self.curriculum.sources_of(stage, batch.windows.tolist())
                rows = batch.scored_by_row(self._config.data.lower_case_weight)
                for source, scored in zip(sources, rows, strict=True):
                    self._mass[source] += scored
        return Step(batches, stage=stage.index, seq_len=stage.seq_len, micro_batch_size=stage.micro_batch_size,
                    tokens=stage.tokens_per_step, new_shape=self.curriculum.stage is not stage)

    def loss(self, module: nn.Module, batch: Batch, step: int) -> Tensor:
        input_ids, targets, windows = batch.to(self._device)
        soft = batch.soft_on(self._device)
        weights = None if soft is None else torch.where(soft, self._config.data.lower_case_weight, 1.0)
        loss, _ = token_loss(module(input_ids, DropoutKey(self._config.train.seed, step, windows)), targets,
                             self._groups.tensor, weights=weights)
        return loss

    def validate(self, module: nn.Module, watched: Watched[Batch]) -> Scores | None:
        classes = self.validation.classes
        found = evaluate_split(module, watched(self.validation), self._groups, self._device,
                               class_of=self.validation.class_of, classes=max(1, len(classes)))
        if found is None:
            return None
        extras = {**perplexities("source", [source for source, _ in classes], found.parts),
                  **perplexities("species", [species for _, species in classes], found.parts)}
        if all(scored for _, scored in found.cases):
            extras |= perplexities("case", CASES, found.cases)
        if len(self.pools) > 1:
            extras |= self._uses()
        return Scores(found.loss, found.scored, self._seq_len, extras)

    def _uses(self) -> dict[str, float]:
        """What the run has seen of each source so far; nothing before its first step. Collective."""
        found: dict[str, float] = {}
        if self.curriculum.step:
            for use in self.curriculum.source_uses(self.curriculum.step):
                found |= {f"source_share/{use.name}": use.share, f"source_epochs/{use.name}": use.epochs,
                          f"source_unique_bases/{use.name}": use.unique_bases}
        mass = torch.tensor(self._mass, dtype=torch.float64, device=self._device)
        if self._groups.data_context.size > 1:
            dist.all_reduce(mass, group=self._groups.data_context.group)
        shares = (mass / mass.sum()).tolist()
        self._mass = [0.0] * len(self.pools)
        return found | {f"source_loss_mass/{pool.name}": share for pool, share in zip(self.pools, shares, strict=True)
                        if math.isfinite(share)}

    def _names(self) -> Collection[str]:
        """The metrics that a validation may find."""
        of_source = ("source_perplexity", "source_share", "source_epochs", "source_unique_bases", "source_loss_mass")
        return [*(f"case_perplexity/{case}" for case in CASES),
                *(f"{kind}/{pool.name}" for kind in of_source for pool in self.pools if pool.name),
                *(f"species_perplexity/{species}" for _, species in self.validation.classes)]

    def _warn_of_repeats(self) -> None:
        for line in repeats(self.curriculum, self._config.train.steps):
            logger.warning("%s", line)

    def tokens(self, step: int) -> int:
        return tokens_after(self.curriculum.stages, step)

    def epochs(self, step: int) -> float:
        return self.curriculum.epochs_after(step)

    def skip(self, steps: int) -> None:
        self.curriculum.skip(steps=steps)

    @property
    def skipped(self) -> int:
        return self.curriculum.passed

    def state_dict(self) -> dict[str, Any]:
        return self.curriculum.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.curriculum.load_state_dict(saved)

    def close(self) -> None:
        self.curriculum.close()

    def _part(self, seq_len: int) -> Part:
        """What this context rank reads of windows of a length."""
        return Part(*part_of_window(seq_len, self._groups.context, multiple=self._token_multiple))


def perplexities(kind: str, names: Sequence[str], parts: Sequence[tuple[float, int]]) -> dict[str, float]:
    """The perplexity of each name as a metric, where there are several.

    Args:
        names: of each class of windows; a name may come several times.
        parts: loss and number of the scored bases of each class.
    """
    sums: dict[str, tuple[float, int]] = {}
    for name, (loss, scored) in zip(names, parts, strict=False):
        if scored:
            total, count = sums.get(name, (0.0, 0))
            sums[name] = total + loss * scored, count + scored
    if len(set(names)) < 2:
        return {}
    return {f"{kind}_perplexity/{name}": perplexity(total / count) for name, (total, count) in sums.items()}


def repeats(curriculum: Curriculum, steps: int) -> list[str]:
    """A line for each source of a mixture that a run of so many steps goes through often."""
    if len(curriculum.pools) < 2:
        return []
    return [f"data.mixture: source {use.name} will be seen {use.epochs:.1f} times by step {steps}: past about "
            f"{MANY_EPOCHS} times the same bases teach little more; lower its weight, or give it more bases"
            for use in curriculum.source_uses(steps) if use.epochs > MANY_EPOCHS]
