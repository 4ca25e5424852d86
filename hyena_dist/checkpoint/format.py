"""Checkpoints that forget the topology: any engine, stage and number of ranks reads what another wrote.

A checkpoint is a directory `step-00000100/`: torch's distributed checkpoint files, `metadata.json`, and `COMPLETE`,
written last, which lists the files with their sizes and digests. Keys are `<kind>/<parameter>` or, for a fused weight,
`<kind>/<parameter>/<part>`; every tensor has its global shape, in float32, and is written by one rank. A weight that
was frozen is there without moments. A checkpoint is written aside and renamed, so a directory of the final name is
whole or was damaged later.
"""

import json
import logging
import secrets
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from hyena_dist.checkpoint.directory import Checkpoint, open_checkpoint
from hyena_dist.checkpoint.files import MARKER, digests, entry
from hyena_dist.checkpoint.metadata import METADATA, seal
from hyena_dist.checkpoint.reader import INDEX, CheckpointError, TensorReader
from hyena_dist.config.errors import one_line, write_remedy
from hyena_dist.config.whole import sync_directory
from hyena_dist.engine.protocol import FIELDS, MOMENTS, Engine, Placed, Table
from hyena_dist.parallel.groups import Axis, Groups
from hyena_dist.runtime.agree import agree, broadcast
from hyena_dist.runtime.files import write_durably

logger = logging.getLogger(__name__)

T = TypeVar("T")

_KINDS = dict(zip(FIELDS, ("model", "optim/exp_avg", "optim/exp_avg_sq"), strict=True))


class Exporter(Protocol):
    """What a save asks of an engine."""

    @property
    def parameter_shapes(self) -> Mapping[str, torch.Size]:
        """As `Engine.parameter_shapes`."""

    def export_parameter(self, name: str) -> Mapping[str, torch.Tensor]:
        """As `Engine.export_parameter`; collective."""

    @property
    def optimizer_step_count(self) -> int:
        """As `Engine.optimizer_step_count`."""


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint's content in host memory: copies, which later steps of the engine do not change."""

    tensors: dict[str, torch.Tensor]
    """Those that this rank writes."""
    metadata: str


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


def save_checkpoint(path: str | Path, engine: Exporter, table: Table, groups: Groups,
                    metadata: Mapping[str, Any]) -> None:
    """Write a checkpoint; collective. `metadata` is anything JSON holds: step, data state, the model's identity.

    Raises:
        ValueError: a field of the metadata that would not be read back (`metadata`).
        OSError: on every rank, when a rank could not write. Nothing is left of it, and older checkpoints are as before.
    """
    write_snapshot(path, take_snapshot(engine, table, groups, metadata), groups)


def take_snapshot(engine: Exporter, table: Table, groups: Groups, metadata: Mapping[str, Any]) -> Snapshot:
    """Copy what `save_checkpoint` writes into host memory; collective. Each rank holds about 1/world of it."""
    text = seal({**metadata, "optimizer_step_count": engine.optimizer_step_count})
    return Snapshot(_owned_tensors(engine, table, groups), text)


def write_snapshot(path: str | Path, snapshot: Snapshot, groups: Groups) -> None:
    """Make a checkpoint of a snapshot; collective over `groups.world`, the only group of `groups` that is used.

    Raises:
        OSError: as `save_checkpoint`.
    """
    path = Path(path)
    aside = path.with_name(f"{path.name}.tmp-{broadcast(secrets.token_hex(4), groups)}")
    first = groups.world.rank == 0
    try:
        _together(lambda: aside.mkdir(parents=True) if first else None, groups, path)
        _together(lambda: _write_tensors(aside, snapshot.tensors, groups), groups, path)
        sealed = _together(lambda: _digests(aside, groups.world.rank), groups, path)
        every = [sealed] * groups.world.size
        if groups.world.size > 1:
            dist.all_gather_object(every, sealed, group=groups.world.group)
        _together(lambda: _finish(aside, path, snapshot.metadata, every) if first else None, groups, path)
    except BaseException as error:
        if first:
            shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError) and groups.world.size > 1:  # it is raised on every rank, or on none
            dist.barrier(group=groups.world.group)
        raise


def load_checkpoint(source: str | Path | Checkpoint, engine: Engine, table: Table, groups: Groups, *,
                    new_optimizer: bool = False) -> dict[str, Any]:
    """Set an engine's weights, moments and step count from a checkpoint, and return its metadata; collective.

    Moments of weights that are frozen in this engine are passed over, which is logged.

    Args:
        source: a checkpoint, or the path of one. Where that is damaged, the sound one before it is taken, with a
            warning (`open_checkpoint`).
        new_optimizer: take the weights alone; every moment and the step count start at 0. So training goes on with
            weights that were frozen when the checkpoint was written. All moments start together because Adam has one
            step count: at a count above 0 it does not correct moments of 0, and with betas 0.9 and 0.999 would move
            such weights up to 6 times too far for some hundred steps.

    Raises:
        CheckpointError: on every rank. No sound checkpoint, one of another model, or one without the moments of a
            weight that is trained here: the engine is as before. Or a tensor cannot be read: the parameters before it
            are set, and the engine is of no use.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, groups)
    shapes = {name: _part_shapes(shape, table[name], groups.tensor.size)
              for name, shape in engine.parameter_shapes.items()}
    without = frozenset(shapes) if new_optimizer else engine.frozen
    reader = agree(partial(_open, checkpoint.path, shapes, without), groups)
    if groups.world.rank == 0 and not new_optimizer and (unused := _with_moments(reader, shapes) & without):
        logger.info("%s holds moments of %d weights that are frozen here, %s one of them: they are passed over",
                    checkpoint.path, len(unused), min(unused))
    for name, parts in shapes.items():
        # The import is collective: no rank may be left alone in it by one that could not read.
        state = agree(partial(_read_state, reader, name, parts, table[name], groups.tensor, name not in without),
                      groups)
        if new_optimizer and name not in engine.frozen:
            state |= {field: torch.zeros_like(state["weight"]) for field in MOMENTS}
        engine.import_parameter(name, state)
    engine.optimizer_step_count = 0 if new_optimizer else checkpoint.metadata["optimizer_step_count"]
    return checkpoint.metadata


def _open(path: Path, shapes: Mapping[str, Mapping[str, torch.Size]], without: frozenset[str]) -> TensorReader:
    """A reader of a checkpoint of these parameters, which must hold the moments of all but those `without`.

    Raises:
        CheckpointError: it is of another model, or has no moments of a weight that is trained.
    """
    reader = TensorReader(path)
    saved = _with_moments(reader, shapes)
    known = {f"model/{name}{suffix}" for name, parts in shapes.items() for suffix in parts} <= reader.shapes.keys()
    if known and (lacking := shapes.keys() - saved - without):
        names = ", ".join(sorted(lacking)[:3]) + (", ..." if len(lacking) > 3 else "")
        raise CheckpointError(f"{path} has no moments of {len(lacking)} weights that were frozen when it was written "
                              f"and are trained here ({names}): freeze them again, or start Adam anew from its "
                              "weights, by train.resume=weights:PATH in a new train.run_dir or, in a program, by "
                              "load_checkpoint(new_optimizer=True)")
    reader.check({f"{kind}/{name}{suffix}": shape for name, parts in shapes.items() for suffix, shape in parts.items()
                  for field, kind in _KINDS.items() if field == "weight" or name in saved or name not in without},
                 ignore=())
    return reader


def _with_moments(reader: TensorReader, shapes: Mapping[str, Mapping[str, torch.Size]]) -> set[str]:
    """The parameters of which the checkpoint holds a moment."""
    return {name for name, parts in shapes.items() for suffix in parts for field in MOMENTS
            if f"{_KINDS[field]}/{name}{suffix}" in reader.shapes}


def _read_state(reader: TensorReader, name: str, parts: Mapping[str, torch.Size], placement: Placed,
                tensor: Axis, moments: bool) -> dict[str, torch.Tensor]:
    """This tensor rank's part of a parameter, and of its moments if they are asked for."""
    state = {}
    for field in FIELDS if moments else ("weight",):
        kind = _KINDS[field]
        blocks = reader.read({f"{kind}/{name}{suffix}": shape for suffix, shape in parts.items()})
        state[field] = merge_parts({suffix: _local(blocks[f"{kind}/{name}{suffix}"], placement, tensor)
                                    for suffix in parts}, placement)
    return state


@torch.no_grad()
def load_model_weights(source: str | Path | Checkpoint, model: nn.Module, table: Table, *,
                       ignore: Collection[str] = ()) -> dict[str, Any]:
    """Set the weights of a whole model in one process, without engine or process group; return the metadata.

    Args:
        source: as of `load_checkpoint`.
        ignore: beginnings of the keys of other weights that the checkpoint may have.

    Raises:
        CheckpointError: no sound checkpoint, or one of another model.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    reader, shapes = _model_reader(checkpoint, model, table, ignore)
    for name, parameter in model.named_parameters():
        blocks = reader.read(shapes[name])
        parameter.copy_(merge_parts({key.removeprefix(f"model/{name}"): value for key, value in blocks.items()},
                                    table[name]))
    return checkpoint.metadata


def check_model_weights(checkpoint: Checkpoint, model: nn.Module, table: Table) -> None:
    """Compare the names and shapes of a whole model's weights, which need no memory, with those of a checkpoint.

    Raises:
        CheckpointError: it is of another model.
    """
    _model_reader(checkpoint, model, table)


def weight_shapes(checkpoint: Checkpoint) -> dict[str, torch.Size]:
    """Of the weights in a checkpoint, by key."""
    return {key: shape for key, shape in TensorReader(checkpoint.path).shapes.items() if key.startswith("model/")}


def _model_reader(checkpoint: Checkpoint, model: nn.Module, table: Table, ignore: Collection[str] = ()
                  ) -> tuple[TensorReader, dict[str, dict[str, torch.Size]]]:
    """A reader of a checkpoint of this model, and the shapes of each of its weights by key."""
    reader = TensorReader(checkpoint.path)
    shapes = {name: {f"model/{name}{suffix}": shape
                     for suffix, shape in _part_shapes(parameter.shape, table[name], 1).items()}
              for name, parameter in model.named_parameters()}
    reader.check({key: shape for parts in shapes.values() for key, shape in parts.items()}, ignore=("optim/", *ignore))
    return reader, shapes


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


def _owned_tensors(engine: Exporter, table: Table, groups: Groups) -> dict[str, torch.Tensor]:
    """The tensors that this rank writes: key i belongs to rank i % world. Each is gathered on all ranks on its way."""
    owned: dict[str, torch.Tensor] = {}
    for index, (key, tensor) in enumerate(_global_tensors(engine, table, groups.tensor)):
        if index % groups.world.size == groups.world.rank:
            owned[key] = tensor.to("cpu", torch.float32, copy=True).contiguous()
    return owned


def _global_tensors(engine: Exporter, table: Table, tensor: Axis) -> Iterator[tuple[str, torch.Tensor]]:
    for name in engine.parameter_shapes:
        state = engine.export_parameter(name)
        for field, value in state.items():
            for suffix, part in split_parts(value, table[name]).items():
                yield f"{_KINDS[field]}/{name}{suffix}", _gathered(part, table[name], tensor)


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
    # One rank without a group is no mistake; a filter of this block alone would be one of all threads too.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    writer = _Writer(str(aside), sync_files=True)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=groups.world.group, no_dist=groups.world.group is None)
    except CheckpointException as error:  # no Exception, but a BaseException
        # Every rank gets the same failures; the first one's cause is what the user can act on.
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        raise OSError(f"rank {rank}: {cause}") from error


def _digests(aside: Path, rank: int) -> dict[str, str]:
    """Of the files that this rank has written; the index is the first rank's."""
    return digests(aside, [file.name for file in aside.glob(f"__{rank}_*")] + [INDEX] * (rank == 0))


def _finish(aside: Path, path: Path, metadata: str, sha256: Iterable[Mapping[str, str]]) -> None:
    """Make the directory whole, durable and visible, in this order."""
    write_durably(aside / METADATA, metadata)
    listed = {name: entry(aside / name, digest) for of_rank in sha256 for name, digest in sorted(of_rank.items())}
    if unlisted := {file.name for file in aside.iterdir()} - listed.keys() - {METADATA}:
        raise RuntimeError(f"{min(unlisted)} was written by no rank")
    write_durably(aside / MARKER, json.dumps(listed, indent=1))
    sync_directory(aside)
    replaced = aside.with_name(f"{aside.name}-old")
    if path.exists():
        path.rename(replaced)
    aside.rename(path)
    sync_directory(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _together(action: Callable[[], T], groups: Groups, path: Path) -> T:
    """Run an action on this rank; if it failed on any, raise the same OSError on all of them."""
    def attempt() -> T:
        try:
            return action()
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError too
            raise OSError(f"{path}: the checkpoint could not be written ({one_line(error)}): "
                          f"{write_remedy(error, 'change train.run_dir')}") from error

    return agree(attempt, groups)
