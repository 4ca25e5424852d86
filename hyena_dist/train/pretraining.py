"""Pretraining, the first objective: predict the next base, or k-mer, of every window of the shards."""

import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hyena_dist.checkpoint.metadata import PRETRAINING
from hyena_dist.config.schema import Config
from hyena_dist.config.warmup import tokens_after
from hyena_dist.costs.utilisation import Utilisation
from hyena_dist.data.pool import identity_of, open_pools
from hyena_dist.data.rows import Part
from hyena_dist.data.stream import Batch, ValidationBatches
from hyena_dist.data.tokenizer import tokenizer_of
from hyena_dist.engine.protocol import Table
from hyena_dist.model.context import log_context_method
from hyena_dist.model.evaluate import CASES, Score, evaluate_split
from hyena_dist.model.loss import perplexity, token_loss
from hyena_dist.model.model import build_model
from hyena_dist.ops.dropout import DropoutKey
from hyena_dist.parallel.groups import Groups
from hyena_dist.parallel.tokens import part_of_window
from hyena_dist.runtime.agree import agree, agree_at_length
from hyena_dist.runtime.startup import check_same_data
from hyena_dist.train.curriculum import Curriculum
from hyena_dist.train.loss_mass import LossMass
from hyena_dist.train.objective import Scores, Step, Watched
from hyena_dist.train.wording import MANY_EPOCHS, TEACHES_LITTLE

logger = logging.getLogger(__name__)


class Pretraining:
    """The objective of a run of `launchers/pretrain.py`. Collective.

    Args:
        config: already checked (`config.checks`).
        device: of this rank.

    Raises:
        UserError: the shards cannot be read or do not fit the configuration; the same on every rank.
    """

    name = PRETRAINING
    has_perplexity = True
    scored_name = "bases"
    extras: Collection[str] = ()
    no_batch = ("a reader process stands still, or the file system of data.shards does not answer: look at both, and "
                "resume with the same command; DEEPSPEED_TIMEOUT sets how many minutes ranks wait")
    nothing_to_train = "its windows have no base to score (A, C, G, T)"

    def __init__(self, config: Config, groups: Groups, device: torch.device) -> None:
        self._config, self._groups, self._device = config, groups, device
        self.nothing_to_validate = f"{config.data.shards} has no validation bases, or the model gives no number"
        # Nodes that have no copy in data.cache yet make one first, which takes each as long as it takes.
        opened = agree_at_length if config.data.cache else agree
        self.pools = opened(lambda: open_pools(config.data, copy=True), groups)
        check_same_data(identity_of(self.pools), groups.world)
        model = build_model(config, groups)
        self._token_multiple = model.token_multiple
        self.curriculum = agree(lambda: Curriculum(self.pools, config, dp_rank=groups.data.rank,
                                                   dp_size=groups.data.size, part_of=self._part), groups)
        self._seq_len = config.data.val_seq_len or config.data.seq_len
        self.validation = ValidationBatches(
            self.pools, seq_len=self._seq_len, batch_size=config.train.micro_batch_size, dp_rank=groups.data.rank,
            dp_size=groups.data.size, tokens=config.data.val_tokens, part=self._part(self._seq_len),
            tokenizer=tokenizer_of(config.model), pack=config.data.pack)
        self._mass = LossMass([pool.name for pool in self.pools], config.data.lower_case_weight, groups, device)
        self.extras = self._names()
        self._repeated: dict[int, list[str]] = {}
        """What is to be said at a step."""
        self._look_for_repeats()
        self.module: nn.Module = model.to(device)
        self.table: Table = model.placement()
        log_context_method(config, groups)
        for line in self.curriculum.packed():
            logger.info("%s", line)

    def utilisation(self) -> Utilisation:
        return Utilisation.of_device(self._config, self._groups.world.size, self._device)

    def next_step(self) -> Step[Batch]:
        stage, batches = self.curriculum.take()
        for line in self._repeated.pop(self.curriculum.step, ()):
            logger.warning("%s", line)
        if len(self.pools) > 1:
            for batch in batches:
                self._mass.add(self.curriculum.sources_of(stage, batch.windows.tolist()), batch)
        return Step(batches, stage=stage.index, seq_len=stage.seq_len, micro_batch_size=stage.micro_batch_size,
                    tokens=stage.tokens_per_step, new_shape=self.curriculum.stage is not stage)

    def loss(self, module: nn.Module, batch: Batch, step: int) -> Tensor:
        input_ids, targets, windows = batch.to(self._device)
        soft = batch.soft_on(self._device)
        weights = None if soft is None else torch.where(soft, self._config.data.lower_case_weight, 1.0)
        loss, _ = token_loss(module(input_ids, DropoutKey(self._config.train.seed, step, windows), batch.segments),
                             targets, self._groups.tensor, weights=weights)
        return loss

    def validate(self, module: nn.Module, watched: Watched[Batch]) -> Scores | None:
        classes = self.validation.classes
        found = evaluate_split(module, watched(self.validation), self._groups, self._device,
                               class_of=self.validation.class_of, classes=max(1, len(classes)))
        if found is None:
            return None
        extras = {**perplexities("source", found.by_class([(source,) for source, _ in classes])),
                  **perplexities("species", found.by_class([(species,) for _, species in classes])),
                  **perplexities("case", found.by_kind(CASES))}
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
        return found | {f"source_loss_mass/{name}": share for name, share in self._mass.shares().items()}

    def _names(self) -> Collection[str]:
        """The metrics that a validation may find."""
        of_source = ("source_perplexity", "source_share", "source_epochs", "source_unique_bases", "source_loss_mass")
        return [*(f"case_perplexity/{case}" for case, in CASES),
                *(f"{kind}/{pool.name}" for kind in of_source for pool in self.pools if pool.name),
                *(f"species_perplexity/{species}" for _, species in self.validation.classes)]

    def _look_for_repeats(self) -> None:
        """Find the steps at which a source will have been seen many times. Of a mixture it is said at once, too; of a
        single set the banner says it."""
        steps = self._config.train.steps
        for source, pool in enumerate(self.pools):
            if (step := self.curriculum.step_past(source, MANY_EPOCHS, steps)) is not None:
                self._repeated.setdefault(step, []).append(
                    f"step {step}: {_source_in_words(pool.name)} now came {MANY_EPOCHS} times: {TEACHES_LITTLE}")
        if len(self.pools) > 1:
            for line in repeats(self.curriculum, steps):
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
        weight = self._config.data.lower_case_weight
        mass = {"source_mass": self._mass.state_dict(), "lower_case_weight": weight} if len(self.pools) > 1 else {}
        return {**self.curriculum.state_dict(), **mass}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.curriculum.load_state_dict(saved)
        if len(self.pools) > 1:
            own = self._config.data.lower_case_weight
            self._mass.load_state_dict(saved.get("source_mass"), saved.get("lower_case_weight", own))

    def close(self) -> None:
        self.curriculum.close()

    def _part(self, seq_len: int) -> Part:
        """What this context rank reads of windows of a length."""
        return Part(*part_of_window(seq_len, self._groups.context, multiple=self._token_multiple))


def perplexities(kind: str, scores: Mapping[str, Score]) -> dict[str, float]:
    """The perplexity of each group as a metric, where there are several."""
    return {f"{kind}_perplexity/{name}": perplexity(score.loss) for name, score in scores.items()
            if len(scores) > 1}


def repeats(curriculum: Curriculum, steps: int) -> list[str]:
    """A line for each source that a run of so many steps goes through often."""
    return [f"{_source_in_words(use.name)} will be seen {use.epochs:.1f} times by step {steps}: {TEACHES_LITTLE}; "
            + ("lower its weight, or give it more bases" if use.name else "train for fewer steps, or on more bases")
            for use in curriculum.source_uses(steps) if use.epochs > MANY_EPOCHS]


def _source_in_words(name: str) -> str:
    return f"data.mixture: source {name}" if name else "data.shards: the training bases"
