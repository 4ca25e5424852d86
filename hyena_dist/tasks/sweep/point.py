"""A point of a sweep: one configuration, who it is, and what it costs. All of it is known before the point runs."""

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from hyena_dist.config.checks import cooldown_steps
from hyena_dist.config.digests import json_sha256
from hyena_dist.config.identity import identity
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.warmup import stages, tokens_after
from hyena_dist.costs.engines import parameters
from hyena_dist.costs.flops import training_flops
from hyena_dist.data.errors import DataError
from hyena_dist.data.pool import Pool, identity_of, open_pools

POINTS = "points"
"""Directory of the points in that of the sweep."""
RUN = "run"
"""Run directory in that of a point."""
LETTERS = 12
"""Of a digest, enough to tell points apart and to type."""

NOT_LEARNT = frozenset({
    # Where and how it is computed, when it is saved and looked at. The final validation is always measured.
    "data.num_workers", "ops.backend", "train.micro_batch_size", "train.activation_checkpointing",
    "train.activation_offload", "train.eval_every", "train.save_every", "train.keep_last", "train.keep_every",
    "train.profile_steps", "train.wandb", *(f"parallel.{key}" for key in (
        "tensor", "context", "sequence", "context_method", "overlap_groups")),
    *(f"engine.{key}" for key in ("name", "zero_stage", "offload", "deepspeed")),
    # What train.seq_len_warmup says already, once its stages are written out.
    "train.seq_len_warmup_steps"})
"""Keys of a configuration that two runs may have differently and still be one point."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a point takes, exactly, by its configuration and its shards."""

    params: int
    """All weights."""
    params_non_embedding: int
    """Those outside embedding and head."""
    flops: float
    """Training FLOPs of the whole run, of the model alone: nothing that is recomputed."""
    tokens: int
    """Training tokens, padding included."""
    unique_tokens: float | None
    """Different training bases that the run sees; null: the shards are not on this machine."""
    epochs: float | None
    """How often it sees them; null as above."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of a sweep."""

    id: str
    config: Config
    """train.run_dir is the point's own."""
    set: dict[str, Any] = field(default_factory=dict)
    """The keys that are not the base's, with their values."""
    budget: float | None = None
    """The training FLOPs that train.steps was solved for."""
    problem: str | None = None
    """Why it cannot run."""
    forked_from: str | None = None
    """The id, or else the run directory, of the run that it is a branch of."""
    fork_at: int | None = None
    """The step of that run at which it begins."""

    @property
    def directory(self) -> Path:
        """Where the point lies."""
        return Path(self.config.train.run_dir).parent


def located(point: Point, runs: Path) -> Point:
    """The point in the directory of a sweep."""
    train = replace(point.config.train, run_dir=str(runs / POINTS / point.id / RUN))
    return replace(point, config=replace(point.config, train=train))


def learnt(config: Config, *, data: str) -> dict[str, Any]:
    """All that decides what a run learns and how it is scored, plain JSON. Ways to write the same thing are one, and
    keys at their defaults are left out: one that a later version adds makes no other points of those that are finished.

    Args:
        data: says what the shards hold.
    """
    model, own, default = config.model, identity(config), identity(Config())
    warm_up = own["train.seq_len_warmup"]
    kept = {key: value for key, value in own.items() if key not in NOT_LEARNT and value != default[key]
            and (warm_up or key != "train.seq_len_warmup_batch")}
    kept |= {
        "data": data, "model.layer_pattern": model.layer_kinds, "model.ffn_hidden_size": model.inner_size,
        "model.filter_seq_len": model.filter_seq_len or model.max_seq_len,
        "data.val_seq_len": config.data.val_seq_len or config.data.seq_len}
    if config.optim.schedule == "wsd":
        kept |= {"optim.cooldown": cooldown_steps(config.optim, config.train.steps),
                 "optim.min_lr": config.optim.min_lr or 0.0}
    elif config.optim.schedule == "cosine" and config.optim.min_lr is None:
        kept["optim.min_lr"] = 0.1 * config.optim.lr
    return json.loads(json.dumps(kept))


def point_id(config: Config) -> str:
    """Digest of what is learnt, apart from where and how it runs: the shards count by their content. Where they are not
    on this machine they count by their paths, so the id is another one there."""
    try:
        data = identity_of(_pools(config))
    except (DataError, OSError):
        data = json.dumps([config.data.shards, config.data.mixture])
    return json_sha256(learnt(config, data=data))[:LETTERS]


def shards_problem(config: Config) -> str | None:
    """Why the shards of a configuration cannot be read here."""
    try:
        _pools(config)
    except (DataError, OSError) as error:
        return str(error)
    return None


def run_flops(config: Config, *, steps: int | None = None, ranks: int = 1) -> float:
    """Training FLOPs of the first `steps` optimizer steps (None: all), over all ranks: every micro-batch's own, since
    it makes the filters anew."""
    steps = config.train.steps if steps is None else steps
    total = 0.0
    for stage in stages(config, data_ranks=_data_ranks(config, ranks)):
        micro_batches = max(min(steps, stage.stop_step) - stage.first_step, 0) * stage.global_batch_size \
            // stage.micro_batch_size
        total += micro_batches * training_flops(config.model, stage.seq_len, stage.micro_batch_size)
    return total


def steps_for(config: Config, budget: float, *, ranks: int = 1) -> int:
    """The number of optimizer steps whose training FLOPs are the nearest to a budget; 0 where the stages before
    data.seq_len take all of it."""
    last = stages(config, data_ranks=_data_ranks(config, ranks))[-1]
    before = run_flops(config, steps=last.first_step, ranks=ranks)
    of_step = last.global_batch_size // last.micro_batch_size * training_flops(
        config.model, last.seq_len, last.micro_batch_size)
    steps = round((budget - before) / of_step)
    return last.first_step + steps if steps > 0 else 0


def costs(config: Config, *, ranks: int = 1) -> Costs:
    """What a run of the configuration takes."""
    model, steps = config.model, config.train.steps
    params = parameters(model)
    tables = (1 if model.tie_embeddings else 2) * model.padded_vocab_size * model.hidden_size
    unique, epochs = _uses(config, steps, _data_ranks(config, ranks))
    return Costs(params=params, params_non_embedding=params - tables, flops=run_flops(config, ranks=ranks),
                 tokens=tokens_after(stages(config, data_ranks=_data_ranks(config, ranks)), steps),
                 unique_tokens=unique, epochs=epochs)


def _uses(config: Config, steps: int, data_ranks: int) -> tuple[float | None, float | None]:
    """Different bases that a run sees, and how often; None where there are no shards."""
    from hyena_dist.train.curriculum import Curriculum
    try:
        with closing(Curriculum(_pools(config), config, dp_size=data_ranks)) as curriculum:
            unique = sum(use.unique_bases for use in curriculum.source_uses(steps))
            return round(unique), curriculum.epochs_after(steps)
    except (DataError, OSError):
        return None, None


def _data_ranks(config: Config, ranks: int) -> int:
    return max(1, ranks // (config.parallel.tensor * config.parallel.context))


def _pools(config: Config) -> Sequence[Pool]:
    data = config.data
    return _opened(json.dumps([data.shards, data.mixture, data.mixture_temperature]))


@cache
def _opened(data: str) -> Sequence[Pool]:
    """The sources of shards, mixture and temperature; points share them."""
    shards, mixture, temperature = json.loads(data)
    return open_pools(DataSection(shards=shards, mixture=mixture, mixture_temperature=temperature))
