"""A trained run on held-out bases, beside Markov chains fitted on the same training bases."""

import json
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from hyena_dist.checkpoint.directory import choose_checkpoint
from hyena_dist.checkpoint.format import load_model_weights
from hyena_dist.checkpoint.metadata import PRETRAINING
from hyena_dist.config.errors import ConfigError, is_out_of_memory
from hyena_dist.config.identity import differences, identity
from hyena_dist.config.load import read_config
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.data.index import FILE_NAME
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.pool import Pool, open_pools
from hyena_dist.data.tokenizer import tokenizer_of
from hyena_dist.model.evaluate import SplitLoss, evaluate_split
from hyena_dist.model.loss import perplexity
from hyena_dist.model.model import HyenaModel, build_model
from hyena_dist.parallel.groups import Groups
from hyena_dist.tasks.held_out import HeldOut, in_order
from hyena_dist.tasks.markov import fit, score

ROWS_PER_BATCH_TOKENS = 2**15
"""Most tokens of a forward pass: enough to fill two cores, little enough for any machine."""
LOGITS_PER_BATCH = 2**25
"""Most logits of a forward pass of several windows; the loss holds three float32 numbers for each. A token of 8-mers
has 65,544 of them."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Group:
    """Some of the scored bases."""

    bases: int
    model: float
    """Perplexity per base."""
    markov: list[float]
    """The same of each chain, by order, 0 upwards."""


@dataclass(frozen=True)
class Evaluation:
    """Perplexities per base on one split, over exactly the same scored bases."""

    checkpoint: Path
    split: str
    shards: list[str]
    """Whose split it is: of each source, where a mixture is scored."""
    seq_len: int
    """Windows have at most so many tokens."""
    bases: int
    """Scored ones."""
    model: float
    markov: list[float]
    """By order, 0 upwards."""
    markov_of: list[str]
    """On whose training bases the chains were fitted."""
    groups: dict[str, dict[str, Group]]
    """By what bases are told apart, then by group: of source, species, G and C, case and, where a BED was given,
    region. A base in several regions counts in each, one in two sources is scored in both."""


def load_run(run_dir: str | Path, checkpoint: str = "latest") -> tuple[Config, HyenaModel, Path]:
    """The configuration of a run and its model with the weights of a checkpoint, in eval mode.

    Args:
        checkpoint: `latest`, the newest sound one; `best`, of the lowest validation loss; or a checkpoint's path.

    Raises:
        UserError: not a run directory, no such checkpoint, or one of another model, of the same shapes, too, or of a
            run that learnt something else than the next base.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir} is not a run directory: it has no config.yaml")
    config = read_config(run_dir / "config.yaml")
    chosen = choose_checkpoint(run_dir, checkpoint)
    if chosen.objective != PRETRAINING:
        raise ConfigError(f"{chosen.path} is of a run whose objective was {chosen.objective!r}, and what is scored "
                          "here is the next base: let the program that trained it score it")
    model_keys = [{key: value for key, value in keys.items() if key.startswith("model.")}
                  for keys in (chosen.metadata.get("identity", {}), json.loads(json.dumps(identity(config))))]
    if changed := differences(*model_keys):
        raise ConfigError(f"{chosen.path} is of another model than {run_dir / 'config.yaml'}: {'; '.join(changed)}: "
                          "set these keys as saved")
    model = build_model(config, Groups.single())
    load_model_weights(chosen, model, model.placement())
    return config, model.eval(), chosen.path


def rows_per_batch(model: ModelSection, seq_len: int) -> int:
    """How many windows of so many tokens are scored together, at least one."""
    tokens = min(ROWS_PER_BATCH_TOKENS, LOGITS_PER_BATCH // model.padded_vocab_size)
    return max(1, tokens // seq_len)


def evaluate(run_dir: str | Path, *, checkpoint: str = "latest", shards: str | None = None,
             split: str = "val", regions: str | Path | None = None) -> Evaluation:
    """Score a checkpoint of a run, as `load_run` takes it, on a split of the run's own shards, or of others; on a GPU
    if there is one. Windows are those of the run's validation, but all that there are.

    The Markov chains are fitted on the run's own training bases; where those are not on this machine, on those of the
    shards that are scored.

    Args:
        shards: other shards than the run's own; or, of a run of a mixture, the directory where its sets lie now.
        regions: a BED whose fourth column is a class of bases, to be told apart.

    Raises:
        UserError: no such run or checkpoint, unreadable shards or regions, an empty split, windows too long for the
            GPU.
    """
    config, model, path = load_run(run_dir, checkpoint)
    seq_len, tokenizer = config.data.val_seq_len or config.data.seq_len, tokenizer_of(config.model)
    pools = _pools(Path(run_dir), config, shards)
    trained = open_pools(config.data) if shards is not None and _is_here(config.data) else pools
    held_out = HeldOut(pools, split=split, seq_len=seq_len, batch_size=rows_per_batch(config.model, seq_len),
                       regions=None if regions is None else Path(regions), tokenizer=tokenizer)
    found = _score(model, held_out, seq_len)
    if found is None:
        raise ConfigError(f"{' and '.join(pool.where for pool in pools)}: split {split} has no base to score (A, C, G, "
                          "T): build the shards with some")
    if math.isnan(found.loss):
        raise ConfigError(f"{path}: its predictions are no numbers (NaN): give another checkpoint")
    for name in held_out.regions_without(found):
        logger.warning("--regions: no scored base of split %s is of class %s", split, name)
    chains = score(fit(trained), pools, split, labels=held_out.kinds * held_out.classes, label=held_out.label,
                   tokenizer=tokenizer)
    return Evaluation(path, split, [str(pool.manifest.directory) for pool in pools], seq_len, found.scored,
                      perplexity(found.loss), [perplexity(loss / bases) for loss, bases in chains.sum(2)],
                      [str(pool.manifest.directory) for pool in trained], _groups(held_out, found, chains))


def _is_here(data: DataSection) -> bool:
    """Whether the run's own shards are on this machine, and the BED files of its mixture."""
    sources = data.sources()
    directories = [Path(data.shards) / (source.shards or "") for source in sources] or [Path(data.shards)]
    return all(path.is_dir() for path in directories) and all(
        Path(source.regions).is_file() for source in sources if source.regions is not None)


def _pools(run_dir: Path, config: Config, shards: str | None) -> list[Pool]:
    """What is scored."""
    data = config.data
    if shards is not None and (data.mixture is None or (Path(shards) / FILE_NAME).exists()):
        return [Pool(Manifest.load(shards))]
    if shards is not None:
        data = replace(data, shards=shards)
        if not _is_here(data):
            raise ConfigError(f"--shards {shards}: is no shard directory, nor one in which all shard sets of the run's "
                              "mixture lie, with its BED files where they were: give one of these")
    elif data.mixture is None and not _is_here(data):
        raise ConfigError(f"{run_dir}: its data.shards={data.shards} is no directory here"
                          + ("" if Path(data.shards).is_absolute() else ", where relative paths count from")
                          + ": say where they are with --shards DIR")
    elif not _is_here(data):
        raise ConfigError(f"{run_dir}: it was trained on a mixture, and not all of its shard sets and BED files "
                          f"are here (data.shards={data.shards}): say with --shards DIR where the sets lie, or what "
                          "else to score")
    return open_pools(data)


def _score(model: HyenaModel, held_out: HeldOut, seq_len: int) -> SplitLoss | None:
    try:
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        return evaluate_split(model, held_out.batches, Groups.single(), next(model.parameters()).device,
                              class_of=held_out.class_of, classes=held_out.classes, kinds=held_out.kinds,
                              kinds_of=held_out.kinds_of)
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"windows of data.val_seq_len={seq_len} do not fit into the GPU's free memory: free some, or "
                          "evaluate on the CPU with CUDA_VISIBLE_DEVICES= before the command") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(f"windows of data.val_seq_len={seq_len} do not fit into this machine's free memory: free "
                          "some, or evaluate on a larger one") from error


def _groups(held_out: HeldOut, found: SplitLoss, chains: np.ndarray) -> dict[str, dict[str, Group]]:
    """The model's perplexities and those of the chains, group by group.

    Args:
        chains: [orders, 2, kinds * classes], by `markov.score`.
    """
    of_orders = [SplitLoss(0.0, 0, sums.reshape(found.sums.shape)) for sums in chains]
    groups: dict[str, dict[str, Group]] = {}
    for names_of, by in ((held_out.of_classes, SplitLoss.by_class), (held_out.of_kinds, SplitLoss.by_kind)):
        for what, names in names_of.items():
            own, *others = (by(sums, names) for sums in (found, *of_orders))
            groups[what] = {name: Group(own[name].scored, perplexity(own[name].loss),
                                        [perplexity(other[name].loss) for other in others])
                            for name in sorted(own, key=in_order)}
    return {what: by_name for what, by_name in groups.items() if by_name}
