"""Models in directories: what is there is recognised, what is written is whole or not there."""

import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from hyena_dist.checkpoint.directory import Checkpoint, choose_checkpoint, open_checkpoint, step_of
from hyena_dist.checkpoint.files import MARKER
from hyena_dist.checkpoint.format import check_model_weights, load_model_weights, save_checkpoint, weight_shapes
from hyena_dist.checkpoint.metadata import FINETUNING, METADATA
from hyena_dist.config.errors import write_remedy
from hyena_dist.config.formats import FORMATS
from hyena_dist.config.sections.model import BEFORE_THE_KEY, ModelSection
from hyena_dist.config.versions import own_version
from hyena_dist.config.whole import new_directory
from hyena_dist.convert.card import CARD, model_card
from hyena_dist.convert.files import CONFIG, PUBLISHED_WEIGHTS, WEIGHTS, read_config, read_weights, weight_files
from hyena_dist.convert.finetuned import read_backbone
from hyena_dist.convert.huggingface import HUGGINGFACE_KEYS, code_files, from_huggingface, to_huggingface
from hyena_dist.convert.published import (
    PUBLISHED_KEYS,
    from_published,
    model_section,
    to_published,
)
from hyena_dist.convert.section import ConversionError, checked_section
from hyena_dist.convert.tokenizer import tokenizer_files
from hyena_dist.convert.weights import check_finite, in_float32, refuse_head, refuse_kinds, unwrapped, without_memory
from hyena_dist.model.config import hyena_config
from hyena_dist.model.model import HyenaModel
from hyena_dist.parallel.groups import Groups

_OF_CHECKPOINTS = (MARKER, METADATA, "step-*", "checkpoints")
"""Names by which a directory without any config is taken for a checkpoint, for the checkpoints of a run, or for a
run."""

logger = logging.getLogger(__name__)


def read_model(source: str | Path, checkpoint: str | None = None) -> tuple[ModelSection, HyenaModel, Path]:
    """The model in a directory, in eval mode, on the CPU, in float32, and where it was found: a run's checkpoint, or
    the one that stands in for a damaged one (`open_checkpoint`), or `source`.

    Args:
        source: a run, a checkpoint, or a directory in one of the other FORMATS; which, is seen from its files. Or a
            file of weights with its config.json beside it.
        checkpoint: of a run: latest (None is the same) or best.

    Raises:
        UserError: nothing of these, damaged, or a model that cannot be held exactly.
    """
    source = Path(source)
    if (source / "config.yaml").is_file():
        return _read_checkpoint(choose_checkpoint(source, checkpoint or "latest"))
    if checkpoint is not None:
        raise ConversionError(f"{source} is no run directory, so there is no {checkpoint} checkpoint to choose")
    if not source.exists():
        raise ConversionError(f"{source}: no such file or directory")
    path = (source if source.is_dir() else source.parent) / CONFIG
    if not path.is_file():
        files = [source] if not source.is_dir() else weight_files(source)
        if not files:
            if not any(next(source.glob(name), None) for name in _OF_CHECKPOINTS) and step_of(source) is None:
                raise ConversionError(f"{source}: holds no run, no checkpoint, and no weights with their {CONFIG}: "
                                      "give a directory of one of these")
            return _read_checkpoint(open_checkpoint(source))
        raise ConversionError(f"{files[0]}: without a {CONFIG} beside it nothing says of which model: put it there, "
                              'the published one, Hugging Face\'s, or {"model": {...}} with keys of the model section')
    config = read_config(path)
    with _naming(source):
        if "layer" in config:
            return *_from_published(config, read_weights(source), PUBLISHED_KEYS), source
        if config.get("model_type") == "hyenadna":
            published, weights = from_huggingface(config, read_weights(source))
            return *_from_published(published, weights, HUGGINGFACE_KEYS), source
        if isinstance(config.get("model"), dict):
            return *_from_own(_own_section(path, config["model"]), read_weights(source)), source
    raise ConversionError(f"{path} is neither of a published HyenaDNA model (key layer), nor Hugging Face's "
                          "(model_type hyenadna), nor written by hyena_dist (key model)")


@contextmanager
def _naming(source: Path) -> Iterator[None]:
    """A context whose errors say which directory or file they are of."""
    try:
        yield
    except ConversionError as error:
        if str(source) in str(error):
            raise
        raise ConversionError(f"{source}: {error}") from error


def write_model(dest: str | Path, format: str, section: ModelSection, model: HyenaModel, *,
                source: str = "") -> list[str]:
    """Write a model into a new directory, and return the names of its files.

    Args:
        format: one of `config.formats.FORMATS`.
        source: where the model came from; a checkpoint's metadata keeps it, and the model card says what it tells.

    Raises:
        ConversionError: `dest` exists or cannot be written, or the format has no such model; nothing is written.
    """
    dest = Path(dest)
    refuse_head(model)
    if dest.exists():
        raise ConversionError(f"{dest} exists: choose another destination")
    try:
        _WRITERS[format](dest, section, model, source)
    except OSError as error:
        raise ConversionError(f"{dest}: could not be written ({error}): "
                              f"{write_remedy(error, 'choose another destination')}") from error
    return sorted(path.name for path in dest.iterdir())


def resized(section: ModelSection, model: HyenaModel) -> HyenaModel:
    """The same weights in the model of another section, of another context for one; in eval mode."""
    other = HyenaModel(hyena_config(section, params_dtype=next(model.parameters()).dtype))
    other.load_state_dict(model.state_dict())
    return other.eval()


def _read_checkpoint(checkpoint: Checkpoint) -> tuple[ModelSection, HyenaModel, Path]:
    identity = checkpoint.metadata.get("identity", {})
    keys = [f"model.{key.name}" for key in fields(ModelSection) if key.name not in BEFORE_THE_KEY]
    if missing := [key for key in keys if key not in identity]:
        raise ConversionError(f"{checkpoint.path}: its metadata.json lacks {', '.join(missing)} in identity, and a "
                              "default need not be what these weights were trained with: convert it with the version "
                              "of hyena_dist that wrote it")
    section = checked_section({key.removeprefix("model."): value for key, value in identity.items()
                               if key.startswith("model.")})
    if checkpoint.objective == FINETUNING:
        return section, read_backbone(checkpoint, section), checkpoint.path
    model = without_memory(section, weight_shapes(checkpoint), torch.float32)
    check_model_weights(checkpoint, model, model.placement())
    load_model_weights(checkpoint, model.to_empty(device="cpu"), model.placement())
    check_finite({name: parameter.detach() for name, parameter in model.named_parameters()})
    return section, model.eval(), checkpoint.path


def _from_published(config: Mapping[str, Any], state_dict: dict[str, Tensor],
                    names: Mapping[str, str]) -> tuple[ModelSection, HyenaModel]:
    section, model = model_section(config, names), from_published(config, in_float32(unwrapped(state_dict)), names)
    return replace(section, tie_embeddings=model.config.tie_embeddings), model


def _own_section(path: Path, values: Mapping[str, Any]) -> ModelSection:
    """The section of our own config.json, which somebody may have written by hand: what it leaves out is told."""
    section = checked_section(values)
    keys = [key.name for key in fields(ModelSection) if key.name not in BEFORE_THE_KEY]
    if missing := [f"{key}={getattr(section, key)}" for key in keys if key not in values]:
        logger.warning("%s: says nothing of some keys of the model, for which defaults are taken: %s", path,
                       ", ".join(missing))
    return section


def _from_own(section: ModelSection, weights: dict[str, Tensor]) -> tuple[ModelSection, HyenaModel]:
    weights = in_float32(unwrapped(weights))
    model = without_memory(section, {name: weight.shape for name, weight in weights.items()}, torch.float32)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name in sorted(shapes.keys() | weights.keys()):
        wanted, found = shapes.get(name), weights[name].shape if name in weights else None
        if wanted != found:
            raise ConversionError(f"{name} has shape {_shape(found)} in the weights and {_shape(wanted)} in {CONFIG}: "
                                  "use the one that belongs to them")
    check_finite(weights)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return section, model.eval()


def _shape(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(list(shape))


def _write_own(dest: Path, section: ModelSection, model: HyenaModel, source: str) -> None:
    weights = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    _write(dest, {"format": "hyena_dist", "version": own_version(), "model": asdict(section)},
           {WEIGHTS: _safetensors(weights), CARD: model_card("safetensors", section, model, source).encode()})


def _write_published(dest: Path, section: ModelSection, model: HyenaModel, source: str) -> None:
    config, state_dict = to_published(model)
    if not section.tie_embeddings:
        logger.warning("the head is not tied, and the published training code ties it: there lm_head.weight would take "
                       "the embedding's place; convert.py and the published inference code do not mix them")
    file = io.BytesIO()
    torch.save({"state_dict": {f"model.{key}": value for key, value in state_dict.items()}}, file)
    _write(dest, config | {"vocab_size": section.vocab_size},
           {PUBLISHED_WEIGHTS: file.getvalue(), CARD: model_card("published", section, model, source).encode()})


def _write_huggingface(dest: Path, section: ModelSection, model: HyenaModel, source: str) -> None:
    refuse_kinds(model, "huggingface")
    config, state_dict = to_huggingface(*to_published(model))
    _write(dest, config | {"vocab_size": section.vocab_size},
           {WEIGHTS: _safetensors(state_dict), **tokenizer_files(section.max_seq_len),
            **code_files(section.padded_vocab_size),
            CARD: model_card("huggingface", section, model, source).encode()})


def _write(dest: Path, config: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    with new_directory(dest) as aside:
        (aside / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        for name, content in files.items():
            (aside / name).write_bytes(content)


def _safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    return save(dict(tensors), metadata={"format": "pt"})  # transformers insists on this entry


class _Untrained:
    """A model as a save sees an engine that has taken no step."""

    optimizer_step_count = 0

    def __init__(self, model: HyenaModel) -> None:
        self._weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    @property
    def parameter_shapes(self) -> dict[str, torch.Size]:
        return {name: weight.shape for name, weight in self._weights.items()}

    def export_parameter(self, name: str) -> dict[str, Tensor]:
        weight = self._weights[name]
        return {"weight": weight, "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}


def _write_checkpoint(dest: Path, section: ModelSection, model: HyenaModel, source: str) -> None:
    metadata = {"step": 0, "identity": {f"model.{key}": value for key, value in asdict(section).items()},
                "config": None, "data": None, "val_loss": None, "best_val_loss": None, "loss_scale": None,
                "seconds": 0.0, "version": own_version(), "source": source}
    if step_of(dest) not in (None, 0):
        raise ConversionError(f"{dest} is a name of the checkpoint of step {step_of(dest)}, and one to start from is "
                              "of step 0: choose another name")
    save_checkpoint(dest, _Untrained(model), model.placement(), Groups.single(), metadata)


_WRITERS: dict[str, Callable[[Path, ModelSection, HyenaModel, str], None]] = dict(zip(
    FORMATS, (_write_own, _write_published, _write_huggingface, _write_checkpoint), strict=True))
