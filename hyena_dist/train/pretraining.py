"""Pretraining, the first objective: predict the next base of every window of the shards."""

import logging
from collections.abc import Collection
from typing import Any

import torch
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
from hyena_dist.model.loss import token_loss
from hyena_dist.model.model import build_model
from hyena_dist.ops.dropout import DropoutKey
from hyena_dist.parallel.groups import Groups
from hyena_dist.parallel.tokens import part_of_window
from hyena_dist.runtime.agree import agree
from hyena_dist.runtime.startup import check_same_data
from hyena_dist.train.curriculum import Curriculum
from hyena_dist.train.objective import Scores, Step, Watched

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
    extras: Collection[str] = ()
    no_batch = ("a reader process stands still, or the file system of data.shards does not answer: look at both, and "
                "resume with the same command; DEEPSPEED_TIMEOUT sets how many minutes ranks wait")
    nothing_to_train = "its windows have no base to score (A, C, G, T)"

    def __init__(self, config: Config, groups: Groups, device: torch.device) -> None:
        self._config, self._groups, self._device = config, groups, device
        self.nothing_to_validate = f"{config.data.shards} has no validation bases, or the model gives no number"
        self.pools = agree(lambda: open_pools(config.data), groups)
        check_same_data(identity_of(self.pools), groups.world)
        model = build_model(config, groups)
        self._token_multiple = model.token_multiple
        self.curriculum = agree(lambda: Curriculum(self.pools, config, dp_rank=groups.data.rank,
                                                   dp_size=groups.data.size, part_of=self._part), groups)
        self._seq_len = config.data.val_seq_len or config.data.seq_len
        self.validation = ValidationBatches(
            self.pools, seq_len=self._seq_len, batch_size=config.train.micro_batch_size, dp_rank=groups.data.rank,
            dp_size=groups.data.size, tokens=config.data.val_tokens, part=self._part(self._seq_len))
        self.module: nn.Module = model.to(device)
        self.table: Table = model.placement()
        log_context_method(config, groups)

    def utilisation(self) -> Utilisation:
        return Utilisation.of_device(self._config, self._groups.world.size, self._device)

    def next_step(self) -> Step[Batch]:
        stage, batches = self.curriculum.take()
        return Step(batches, stage=stage.index, seq_len=stage.seq_len, micro_batch_size=stage.micro_batch_size,
                    tokens=stage.tokens_per_step, new_shape=self.curriculum.stage is not stage)

    def loss(self, module: nn.Module, batch: Batch, step: int) -> Tensor:
        input_ids, targets, windows = batch.to(self._device)
        loss, _ = token_loss(module(input_ids, DropoutKey(self._config.train.seed, step, windows)), targets,
                             self._groups.tensor)
        return loss

    def validate(self, module: nn.Module, watched: Watched[Batch]) -> Scores | None:
        found = evaluate_split(module, watched(self.validation), self._groups, self._device)
        return None if found is None else Scores(found.loss, found.scored, self._seq_len)

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
