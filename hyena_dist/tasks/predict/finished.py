"""A fine-tuning that has ended, as it answers: the weights that were judged, and all that decides what they say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from hyena_dist.checkpoint.directory import Checkpoint, is_sound, read_metadata
from hyena_dist.checkpoint.files import MARKER
from hyena_dist.checkpoint.format import load_model_weights, weight_shapes
from hyena_dist.config.errors import ConfigError, one_line
from hyena_dist.config.identity import differences, identity
from hyena_dist.config.load import read_config
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.finetune import PLACES
from hyena_dist.data.labelled import Labelled, read_labelled
from hyena_dist.data.places import Places
from hyena_dist.data.scale import Scale
from hyena_dist.data.tables import Example
from hyena_dist.data.tokenizer import tokenizer_of
from hyena_dist.parallel.groups import Axis, Groups
from hyena_dist.tasks.made_of import RESULT, read_found
from hyena_dist.train.finetuning import Finetuning
from hyena_dist.train.prompting import Prompting

SPLIT = "test"
"""New sequences stand in the place of the test split: what is drawn for a sequence is drawn as it was there."""


@dataclass(frozen=True)
class Finished:
    """One seed of a fine-tuning that has ended."""

    path: Path
    config: Config
    checkpoint: Checkpoint
    """Whose weights were judged."""
    classes: list[str]
    """In the order of the answers. Empty: those are numbers."""
    sequences: str
    """Digest of the labelled sequences that it learnt."""

    @property
    def task(self) -> str:
        """As `finetune.task`."""
        return self.config.finetune.task

    @property
    def most(self) -> int:
        """Bases that the model takes."""
        return tokenizer_of(self.config.model).bases(self.config.model.max_seq_len)

    @property
    def asked_of(self) -> tuple[Any, ...]:
        """What must be the same of models whose answers are averaged."""
        section = self.config.finetune
        return self.classes, self.most, section.task, section.longer, section.bin_size, section.bins_cut

    def digest(self) -> str:
        """sha256 of the checkpoint's list of its files, which has the digest of each."""
        return sha256((self.checkpoint.path / MARKER).read_bytes()).hexdigest()


def read_finished(source: Path, seed: int | None) -> list[Finished]:
    """The seeds of a finished fine-tuning.

    Args:
        source: train.run_dir of a fine-tuning, or the directory of one of its seeds.
        seed: the one that is wanted; None: all.

    Raises:
        UserError: there is no such run or seed, it has not ended, or it keeps no model.
    """
    directories = _seeds(source, seed)
    found = [_one(directory) for directory in directories]
    for other in found[1:]:
        if other.asked_of != found[0].asked_of:
            raise ConfigError(f"{other.path}: its answers are of another kind than those of {found[0].path}: pick one "
                              "with --seed")
    return found


def _seeds(source: Path, seed: int | None) -> list[Path]:
    """The directories of the wanted seeds."""
    if not source.is_dir():
        raise ConfigError(f"--from {source}: there is no such directory: give the train.run_dir of a fine-tuning")
    if seed is not None and (source / f"seed-{seed}").is_dir():
        return [source / f"seed-{seed}"]  # which may have ended before the others
    result = _result(source)
    if "seeds" not in result:
        if seed not in (None, result.get("seed")):
            raise ConfigError(f"--seed {seed}: {source} is of seed {result.get('seed')}: give the run above it, or "
                              "leave --seed out")
        return [source]
    seeds = [of_seed["seed"] for of_seed in result["seeds"]]
    if seed is not None:
        raise ConfigError(f"--seed {seed}: {source} has no such seed: use one of {', '.join(map(str, seeds))}")
    return [source / f"seed-{number}" for number in seeds]


def _result(directory: Path) -> dict[str, Any]:
    """What a fine-tuning wrote at its end.

    Raises:
        ConfigError: it has not ended, there was none, or the file is damaged.
    """
    path = directory / RESULT
    if not path.exists():
        if _has_begun(directory):
            raise ConfigError(f"{directory}: this fine-tuning has not ended, there is no {RESULT}: give its command "
                              "again, which goes on where it was, or pick a finished seed with --seed")
        raise ConfigError(f"{directory}: is no fine-tuning, there is no {RESULT}: give the train.run_dir of one")
    found = read_found(path)
    if not ("seeds" in found or {"seed", "classes", "checkpoint", "sequences"} <= found.keys()):
        raise ConfigError(f"{path}: is no result of a fine-tuning: give the train.run_dir of one")
    return found


def _has_begun(directory: Path) -> bool:
    """Whether a fine-tuning has begun there: a run of another kind has a configuration, too, but no table of labels."""
    config = directory / "config.yaml"
    return any(directory.glob("seed-*")) or (config.exists() and bool(read_config(config).finetune.table))


def _one(directory: Path) -> Finished:
    result = _result(directory)
    if result["checkpoint"] is None:
        raise ConfigError(f"{directory}: is of finetune.trained={result.get('trained')}, which keeps no model that "
                          "could answer: fine-tune with finetune.trained=head, lora or all")
    path = directory / "checkpoints" / result["checkpoint"]
    if not path.is_dir() or not is_sound(path):
        raise ConfigError(f"{path}: the weights that were judged are {'damaged' if path.is_dir() else 'not there'}: "
                          "bring them back, or fine-tune again in another train.run_dir")
    checkpoint = Checkpoint(path, read_metadata(path))
    if not any(key.startswith("model/backbone.") for key in weight_shapes(checkpoint)):
        raise ConfigError(f"{checkpoint.path}: there is no HyenaDNA model in it: give the run itself, not what stands "
                          "beside it")
    config = read_config(directory / "config.yaml")
    saved, now = checkpoint.metadata.get("identity", {}), identity(config)
    of_model = [{key: value for key, value in keys.items() if key.startswith(("model.", "finetune."))}
                for keys in (saved, now)]
    if changed := differences(*of_model):
        raise ConfigError(f"{checkpoint.path} was saved with another configuration than {directory / 'config.yaml'}: "
                          f"{'; '.join(changed)}: set these keys as saved")
    return Finished(directory, config, checkpoint, result["classes"], result["sequences"])


def labelled_as(run: Finished, asked: Sequence[Example]) -> Labelled:
    """New sequences, in the place of the test split, as those that a run has learnt would be given to its objective.
    The training sequences are read again only where answers depend on them.

    Raises:
        UserError: those are needed, and are not there any more.
    """
    section, data = run.config.finetune, run.checkpoint.metadata["data"]
    numbers = not run.classes
    scale: Scale | None = Scale(*data["scale"]) if data.get("scale") else None
    if section.shots or (numbers and scale is None):  # versions before the scale was saved
        learnt = _learnt(run)
        return replace(learnt, splits={"train": learnt.splits["train"], SPLIT: list(asked)}, scale=scale)
    places = None
    if run.task in PLACES:
        places = Places(section, classes=tuple(run.classes), tracks=len(scale[0]) if scale else 1)
    return Labelled({"train": [], SPLIT: list(asked)}, run.classes, run.task, places=places, scale=scale)


def _learnt(run: Finished) -> Labelled:
    """The labelled sequences of a run."""
    section = run.config.finetune
    why = (f"shows {section.shots} labelled examples of each class before a sequence (finetune.shots)" if section.shots
           else "is of a version that did not save the scale of its labels")
    try:
        found = read_labelled(section, seed=run.config.train.seed, most=run.most)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{run.path}: {why}, so its training sequences are needed: {one_line(error)}") from error
    if found.digest() != run.sequences:
        raise ConfigError(f"{run.path}: {why}, and finetune.table={section.table} does not hold the sequences any more "
                          "that it has learnt: bring them back")
    return found


def open_model(run: Finished, labelled: Labelled, groups: Groups, device: torch.device) -> Finetuning:
    """The objective of a run with the weights that were judged, on a device. Collective.

    Args:
        labelled: of `labelled_as`.
        groups: whose context ranks share each sequence. The batches of every data rank are its own.

    Raises:
        UserError: the weights are not those of this configuration.
    """
    config = run.config
    train = replace(config.train, activation_checkpointing="none", activation_offload=False)
    learns = Prompting if config.finetune.by_tokens else Finetuning
    task = learns(replace(config, train=train), replace(groups, data=Axis()), device, labelled=labelled, weights=None)
    load_model_weights(run.checkpoint, task.module, task.table)
    return task


def described(runs: Sequence[Finished]) -> Mapping[str, Any]:
    """What decides the answers of these models, for a header."""
    return {"runs": [str(run.path) for run in runs], "checkpoints": [run.checkpoint.path.name for run in runs],
            "checkpoints_sha256": [run.digest() for run in runs], "task": runs[0].task, "classes": runs[0].classes,
            "precision": runs[0].config.train.precision}
