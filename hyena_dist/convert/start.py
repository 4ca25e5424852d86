"""Weights to fine-tune from: of a pretrained model in any format, or of a run that was fine-tuned before."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hyena_dist.checkpoint.directory import choose_checkpoint, open_checkpoint
from hyena_dist.checkpoint.files import MARKER
from hyena_dist.checkpoint.metadata import FINETUNING
from hyena_dist.config.errors import one_line
from hyena_dist.config.plain import read_object
from hyena_dist.config.sections.finetune import PLACES, FinetuneSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.convert.directory import read_model
from hyena_dist.convert.finetuned import read_finetuned
from hyena_dist.convert.section import checked_section

HEAD = "answers."
"""What the names of the weights of a fine-tuned head begin with here: a backbone may have a head of its own."""

logger = logging.getLogger(__name__)


def read_start(source: str | Path) -> tuple[ModelSection, dict[str, Tensor], Path]:
    """The model in a directory: its section, its weights by name, of a fine-tuned one its head's too, and where it was.
    Of a fine-tuned run that is the best checkpoint, by which it is judged, with adapters merged into the weights.

    Raises:
        UserError: as of `read_model`.
    """
    source, checkpoint = Path(source), None
    if (source / "config.yaml").is_file():
        checkpoint = choose_checkpoint(source, "latest")
        if checkpoint.objective == FINETUNING:
            checkpoint = choose_checkpoint(source, "best")
    elif (source / MARKER).is_file():
        checkpoint = open_checkpoint(source)
    if checkpoint is None or checkpoint.objective != FINETUNING:
        section, model, path = read_model(source)
        return section, {name: parameter.detach() for name, parameter in model.named_parameters()}, path
    section = checked_section({key.removeprefix("model."): value for key, value in
                               checkpoint.metadata.get("identity", {}).items() if key.startswith("model.")})
    model, head = read_finetuned(checkpoint, section)
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return section, found | {HEAD + name: weight for name, weight in head.items()}, checkpoint.path


def without_other_head(weights: Mapping[str, Tensor], checkpoint: Path, tune: FinetuneSection,
                       classes: Sequence[str]) -> dict[str, Tensor]:
    """The weights, without a head whose answers mean something else than those that are asked for now. What becomes of
    a head is said.

    Args:
        weights: as `read_start` gives them.
        checkpoint: where they were.
        tune: what is asked for now.
        classes: of the answers, in their order.
    """
    backbone = {name: weight for name, weight in weights.items() if not name.startswith(HEAD)}
    if len(backbone) == len(weights):
        return backbone
    if tune.by_tokens or tune.trained == "probe":
        why = ["there is no head to learn now"]
    else:
        learnt = _head_of(checkpoint)
        asked: dict[str, Any] = {f"finetune.{key}": getattr(tune, key) for key in _meaning(tune)}
        if classes:
            asked["the classes"] = list(classes)
        why = [f"{key} of it: {learnt.get(key, 'not known')}, now: {value}" for key, value in asked.items()
               if learnt.get(key) != value]
    if why:
        logger.warning("%s: its head is left out (%s)", checkpoint, one_line("; ".join(why)))
        return backbone
    logger.info("%s: its head is taken too, for every seed: task and classes are the same", checkpoint)
    return dict(weights)


def _meaning(tune: FinetuneSection) -> tuple[str, ...]:
    """The keys that say what the numbers of a head mean."""
    if tune.task not in PLACES:
        return "task", "pooling"
    return ("task",) if tune.task == "per_base" else ("task", "bin_size", "loss")


def _head_of(checkpoint: Path) -> dict[str, Any]:
    """What is known of a fine-tuned head: its keys are in its checkpoint, its classes in the result of its run."""
    then = open_checkpoint(checkpoint).metadata.get("identity", {})
    plain = {f"finetune.{key}": value for key, value in vars(FinetuneSection()).items()}
    known = {key: then.get(key, value) for key, value in plain.items()}
    try:
        known["the classes"] = read_object(checkpoint.parent.parent / "result.json")["classes"]
    except (OSError, ValueError, KeyError):  # a run that has not ended, or a checkpoint alone
        logger.info("%s: there is no result beside it that names its classes", checkpoint)
    return known
