"""A trained run on held-out bases, beside Markov chains fitted on the same training bases."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from hyena_dist.checkpoint.directory import choose_checkpoint
from hyena_dist.checkpoint.format import load_model_weights
from hyena_dist.checkpoint.metadata import PRETRAINING
from hyena_dist.config.errors import ConfigError, is_out_of_memory
from hyena_dist.config.identity import differences, identity
from hyena_dist.config.load import read_config
from hyena_dist.config.schema import Config
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.stream import ValidationBatches
from hyena_dist.model.evaluate import evaluate_split
from hyena_dist.model.loss import perplexity
from hyena_dist.model.model import HyenaModel, build_model
from hyena_dist.parallel.groups import Groups
from hyena_dist.tasks.markov import markov_perplexity

ROWS_PER_BATCH_TOKENS = 2**15
"""Tokens of a forward pass: enough to fill two cores, little enough for any machine."""


@dataclass(frozen=True)
class Evaluation:
    """Perplexities on one split of one shard set, over exactly the same scored bases."""

    checkpoint: Path
    split: str
    model: float
    markov: list[float]
    """By order, 0 upwards."""


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


def model_perplexity(model: HyenaModel, manifest: Manifest, *, split: str, seq_len: int) -> float:
    """Perplexity over every scored base of a split, tiled with windows of `seq_len`, on the model's device.

    Raises:
        ConfigError: the split has no bases.
    """
    device = next(model.parameters()).device
    batches = ValidationBatches(manifest, split=split, seq_len=seq_len,
                                batch_size=max(1, ROWS_PER_BATCH_TOKENS // seq_len))
    found = evaluate_split(model, batches, Groups.single(), device)
    if found is None:
        raise ConfigError(f"{manifest.directory} has no bases of split {split} to score: build the shards with some")
    return perplexity(found.loss)


def evaluate(run_dir: str | Path, *, checkpoint: str = "latest", shards: str | None = None,
             split: str = "val") -> Evaluation:
    """Score a checkpoint of a run, as `load_run` takes it, on a split of the run's own shards, or of others; on a GPU
    if there is one.

    Raises:
        UserError: no such run or checkpoint, unreadable shards, an empty split, windows too long for the GPU.
    """
    config, model, path = load_run(run_dir, checkpoint)
    if shards is None and config.data.mixture is not None:
        raise ConfigError(f"{run_dir}: it was trained on a mixture, data.mixture: say which shards to score with "
                          f"--shards DIR")
    if shards is None and not Path(config.data.shards).is_dir():
        raise ConfigError(f"{run_dir}: its data.shards={config.data.shards} is no directory here"
                          + ("" if Path(config.data.shards).is_absolute() else ", where relative paths count from")
                          + ": say where they are with --shards DIR")
    manifest = Manifest.load(shards or config.data.shards)
    seq_len = config.data.val_seq_len or config.data.seq_len
    try:
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        found = model_perplexity(model, manifest, split=split, seq_len=seq_len)
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"windows of data.val_seq_len={seq_len} do not fit into the GPU's free memory: free some, or "
                          "evaluate on the CPU with CUDA_VISIBLE_DEVICES= before the command") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(f"windows of data.val_seq_len={seq_len} do not fit into this machine's free memory: free "
                          "some, or evaluate on a larger one") from error
    return Evaluation(path, split, found, markov_perplexity(manifest, split))
