"""Checkpoints that forget the topology: any engine, stage and number of ranks reads what another wrote.

A checkpoint is a directory `step-00000100/`: torch's distributed checkpoint files, `metadata.json`, and `COMPLETE`,
written last, which lists the files and their sizes. Keys are `<kind>/<parameter>` or, for a fused weight,
`<kind>/<parameter>/<part>`; every tensor has its global shape, in float32, and is written by one rank. It is written
aside and renamed, so a directory of the final name is whole or was damaged later.
"""

import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from hyena_dist.engine.protocol import FIELDS, Engine, Placed, Table
from hyena_dist.parallel.groups import Axis, Groups
from hyena_dist.train.agree import agree, broadcast
from hyena_dist.train.checkpoint_reader import CheckpointError, TensorReader

__all__ = ["CheckpointError", "find_latest", "load_checkpoint", "load_model_weights", "merge_parts", "prune",
           "read_metadata", "save_checkpoint", "split_parts", "step_directory"]

FORMAT = 1
_KINDS = dict(zip(FIELDS, ("model", "optim/exp_avg", "optim/exp_avg_sq"), strict=True))
_MARKER = "COMPLETE"
_METADATA = "metadata.json"
_NAME = re.compile(r"step-(\d{8,})")

logger = logging.getLogger(__name__)


def step_directory(checkpoints_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of a step belongs."""
    return Path(checkpoints_dir, f"step-{step:08d}")


def split_parts(tensor: torch.Tensor, placement: Placed) -> dict[str, torch.Tensor]:
    """The blocks of a weight by key suffix: `/<part>` for each block of a fused one, else "" for the whole.

    On a tensor rank every block is that rank's share of it, so blocks are gathered after the split.
    """
    if not placement.parts:
        return {"": tensor}
    blocks = tensor.chunk(len(placement.parts), dim=0)
    return {f"/{part}": block for part, block in zip(placement.parts, blocks, strict=True)}


def merge_parts(parts: Mapping[str, torch.Tensor], placement: Placed) -> torch.Tensor:
    """The inverse of `split_parts`."""
    return torch.cat([parts[f"/{part}"] for part in placement.parts]) if placement.parts else parts[""]


def save_checkpoint(path: str | Path, engine: Engine, table: Table, groups: Groups,
                    metadata: Mapping[str, Any]) -> None:
    """Write a checkpoint; collective. `metadata` is anything JSON holds: step, data state, the model's identity.

    Raises:
        OSError: on every rank, when a rank could not write. Nothing is left of it, and older checkpoints are as before.
    """
    path = Path(path)
    text = json.dumps({**metadata, "format": FORMAT, "optimizer_step_count": engine.optimizer_step_count}, indent=1)
    tensors = _owned_tensors(engine, table, groups)
    aside = path.with_name(f"{path.name}.tmp-{broadcast(secrets.token_hex(4), groups)}")
    first = groups.world.rank == 0
    try:
        _together(lambda: aside.mkdir(parents=True) if first else None, groups, path)
        _together(lambda: _write_tensors(aside, tensors, groups), groups, path)
        _together(lambda: _finish(aside, path, text) if first else None, groups, path)
    except BaseException as error:
        if first:
            shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError) and groups.world.size > 1:  # it is raised on every rank, or on none
            dist.barrier(group=groups.world.group)
        raise


def load_checkpoint(path: str | Path, engine: Engine, table: Table, groups: Groups, *,
                    model: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Set an engine's weights, moments and step count from a checkpoint, and return its metadata; collective.

    Args:
        model: the identity that metadata["model"] must have; None: any whose weights fit.

    Raises:
        CheckpointError: not a whole checkpoint, or one of another model; the engine is then as before.
    """
    metadata = read_metadata(path, model=model)
    reader = TensorReader(path)
    shapes = {name: _part_shapes(shape, table[name], groups.tensor.size)
              for name, shape in engine.parameter_shapes.items()}
    reader.check({f"{kind}/{name}{suffix}": shape for name, parts in shapes.items() for suffix, shape in parts.items()
                  for kind in _KINDS.values()}, ignore=())
    for name, parts in shapes.items():
        state = {}
        for field, kind in _KINDS.items():
            blocks = reader.read({f"{kind}/{name}{suffix}": shape for suffix, shape in parts.items()})
            local = {suffix: _local(blocks[f"{kind}/{name}{suffix}"], table[name], groups.tensor) for suffix in parts}
            state[field] = merge_parts(local, table[name])
        engine.import_parameter(name, state)
    engine.optimizer_step_count = metadata["optimizer_step_count"]
    return metadata


@torch.no_grad()
def load_model_weights(path: str | Path, model: nn.Module, table: Table, *,
                       identity: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Set the weights of a whole model in one process, without engine or process group; return the metadata.

    Raises:
        CheckpointError: not a whole checkpoint, or one of another model.
    """
    metadata = read_metadata(path, model=identity)
    reader = TensorReader(path)
    parameters = dict(model.named_parameters())
    shapes = {name: {f"model/{name}{suffix}": shape
                     for suffix, shape in _part_shapes(parameter.shape, table[name], 1).items()}
              for name, parameter in parameters.items()}
    reader.check({key: shape for parts in shapes.values() for key, shape in parts.items()}, ignore=("optim/",))
    for name, parameter in parameters.items():
        blocks = reader.read(shapes[name])
        parameter.copy_(merge_parts({key.removeprefix(f"model/{name}"): value for key, value in blocks.items()},
                                    table[name]))
    return metadata


def read_metadata(path: str | Path, *, model: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What was saved beside the tensors.

    Raises:
        CheckpointError: not a whole checkpoint, or metadata["model"] is not `model`.
    """
    path = Path(path)
    reason = _damage(path)
    if reason:
        raise CheckpointError(f"{path}: {reason}: choose another checkpoint")
    try:
        metadata = json.loads((path / _METADATA).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / _METADATA}: cannot be read ({error}): choose another checkpoint") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: its format is {metadata.get('format')!r}, this version reads {FORMAT}: "
                              f"use the version of hyena_dist that wrote it")
    if model is not None:
        _check_identity(path, metadata.get("model") or {}, json.loads(json.dumps(model)))
    return metadata


def find_latest(checkpoints_dir: str | Path) -> Path | None:
    """The newest whole checkpoint; damaged ones are passed over with a warning."""
    for path in _newest_first(checkpoints_dir):
        reason = _damage(path)
        if not reason:
            return path
        logger.warning("%s is passed over: %s", path, reason)
    return None


def prune(checkpoints_dir: str | Path, *, keep: int = 2, protect: Collection[str | Path] = ()) -> None:
    """Delete all but the newest `keep` whole checkpoints and those in `protect`, and what killed runs left aside.

    For one rank, while none saves.
    """
    whole = [path for path in _newest_first(checkpoints_dir) if not _damage(path)]
    kept = {Path(path).name for path in (*whole[:keep], *protect)}
    for path in [*whole, *Path(checkpoints_dir).glob("step-*.tmp-*")]:
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _newest_first(checkpoints_dir: str | Path) -> list[Path]:
    found = [(int(match[1]), path) for path in Path(checkpoints_dir).glob("step-*")
             if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _damage(path: Path) -> str | None:
    """Why a directory is no whole checkpoint; None if it is one."""
    try:
        sizes = json.loads((path / _MARKER).read_text())
    except FileNotFoundError:
        return f"it has no {_MARKER} marker, so its writing was cut short" if path.is_dir() else "no such checkpoint"
    except (OSError, ValueError) as error:
        return f"its {_MARKER} marker cannot be read ({error})"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            return f"its file {name} is missing or has another size than when it was written"
    return None


def _check_identity(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differing = [f"{key} is {saved.get(key)!r} there and {wanted.get(key)!r} here"
                 for key in sorted({*saved, *wanted}) if saved.get(key) != wanted.get(key)]
    if differing:
        raise CheckpointError(f"{path} is of another model: {'; '.join(differing)}: set these keys as saved, or choose "
                              f"another checkpoint")


def _part_shapes(local: torch.Size, placement: Placed, tensor_ranks: int) -> dict[str, torch.Size]:
    """The global shape of each block of a weight of which this tensor rank has `local`."""
    parts = split_parts(torch.empty(local, device="meta"), placement)
    shapes = {}
    for suffix, part in parts.items():
        shape = list(part.shape)
        if placement.tp_dim is not None:
            shape[placement.tp_dim] *= tensor_ranks
        shapes[suffix] = torch.Size(shape)
    return shapes


def _owned_tensors(engine: Engine, table: Table, groups: Groups) -> dict[str, torch.Tensor]:
    """The tensors that this rank writes: key i belongs to rank i % world. Each is gathered on all ranks on its way."""
    owned: dict[str, torch.Tensor] = {}
    for index, (key, tensor) in enumerate(_global_tensors(engine, table, groups.tensor)):
        if index % groups.world.size == groups.world.rank:
            owned[key] = tensor.to("cpu", torch.float32, copy=True).contiguous()
    return owned


def _global_tensors(engine: Engine, table: Table, tensor: Axis) -> Iterator[tuple[str, torch.Tensor]]:
    for name in engine.parameter_shapes:
        state = engine.export_parameter(name)
        for field, kind in _KINDS.items():
            for suffix, part in split_parts(state[field], table[name]).items():
                yield f"{kind}/{name}{suffix}", _gathered(part, table[name], tensor)


def _gathered(part: torch.Tensor, placement: Placed, tensor: Axis) -> torch.Tensor:
    """[local part] on each tensor rank -> [global part] on all of them."""
    if placement.tp_dim is None or tensor.size == 1:
        return part
    shares = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(tensor.size)]
    dist.all_gather(shares, part.contiguous(), group=tensor.group)
    return torch.cat(shares, dim=placement.tp_dim)


def _local(part: torch.Tensor, placement: Placed, tensor: Axis) -> torch.Tensor:
    """This tensor rank's share of a global part."""
    return part if placement.tp_dim is None else part.chunk(tensor.size, dim=placement.tp_dim)[tensor.rank]


class _Writer(dcp.FileSystemWriter):
    """Says what the disk said: torch's archive writer covers a failed write with an error of its own."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from error


def _write_tensors(aside: Path, tensors: dict[str, torch.Tensor], groups: Groups) -> None:
    writer = _Writer(str(aside), sync_files=True)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=groups.world.group, no_dist=groups.world.group is None)
    except CheckpointException as error:  # no Exception, but a BaseException
        # Every rank gets the same failures; the first one's cause is what the user can act on.
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        raise OSError(f"rank {rank}: {cause}") from error


def _finish(aside: Path, path: Path, metadata: str) -> None:
    """Make the directory whole, durable and visible, in this order."""
    _write_durably(aside / _METADATA, metadata)
    sizes = {file.name: file.stat().st_size for file in sorted(aside.iterdir())}
    _write_durably(aside / _MARKER, json.dumps(sizes, indent=1))
    _sync_directory(aside)
    replaced = aside.with_name(f"{aside.name}-old")
    if path.exists():
        path.rename(replaced)
    aside.rename(path)
    _sync_directory(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _together(action: Callable[[], None], groups: Groups, path: Path) -> None:
    """Run an action on this rank; if it failed on any, raise the same OSError on all of them."""
    def attempt() -> None:
        try:
            action()
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError too
            reason = " ".join(str(error).split()) or type(error).__name__
            raise OSError(f"{path}: the checkpoint could not be written ({reason}): make room there or change "
                          "train.run_dir") from error

    agree(attempt, groups)
