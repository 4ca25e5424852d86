"""Weights to fine-tune from: of a pretrained model in any format, or of a run that was fine-tuned before."""

from pathlib import Path

from torch import Tensor

from hyena_dist.checkpoint.directory import choose_checkpoint, open_checkpoint
from hyena_dist.checkpoint.files import MARKER
from hyena_dist.checkpoint.metadata import FINETUNING
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.convert.directory import read_model
from hyena_dist.convert.finetuned import read_finetuned
from hyena_dist.convert.section import checked_section

HEAD = "answers."
"""What the names of the weights of a fine-tuned head begin with here: a backbone may have a head of its own."""


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
