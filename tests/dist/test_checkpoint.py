"""Checkpoints across stages and numbers of ranks; damaged, foreign and malicious ones; a disk that fills up."""

import errno
import importlib
import io
import logging
import os
import pickle
import resource
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from hyena_dist.checkpoint.directory import (
    find_latest,
    open_checkpoint,
    prune,
    read_metadata,
    step_directory,
)
from hyena_dist.checkpoint.format import (
    load_checkpoint,
    load_model_weights,
    merge_parts,
    save_checkpoint,
    split_parts,
)
from hyena_dist.checkpoint.reader import CheckpointError, DamagedError
from hyena_dist.model.placement import Placement
from hyena_dist.parallel.groups import Axis, Groups
from tests.checkpoints import edit_metadata, latest, put_in
from tests.dist.harness import run_distributed
from tests.dist.toy import TABLE, Toy, data_groups, make_engine, state_of, train

STAGES = (0, 1, 2, 3)
BEFORE, AFTER = (0, 1), (2, 3, 4)
# Relative; another number of ranks sums in another order. Moments that start anew move the next losses by 1e-2.
TOLERANCE = 1e-6


class DictEngine:
    """An engine without sharding: what the checkpoint sees is a dictionary."""

    def __init__(self, state: Mapping[str, Mapping[str, torch.Tensor]], steps: int = 0) -> None:
        self.state = {name: dict(fields) for name, fields in state.items()}
        self.accumulation_steps = 1
        self.optimizer_step_count = steps
        self.module = nn.Identity()
        self.frozen: frozenset[str] = frozenset()

    @classmethod
    def random(cls, shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> "DictEngine":
        torch.manual_seed(seed)
        return cls({name: {field: torch.randn(shape) for field in ("weight", "exp_avg", "exp_avg_sq")}
                    for name, shape in shapes.items()}, steps=7)

    @property
    def parameter_shapes(self) -> dict[str, torch.Size]:
        return {name: fields["weight"].shape for name, fields in self.state.items()}

    def export_parameter(self, name: str) -> dict[str, torch.Tensor]:
        return self.state[name]

    def import_parameter(self, name: str, state: Mapping[str, torch.Tensor]) -> None:
        self.state[name] = {field: tensor.clone() for field, tensor in state.items()}

    def backward(self, loss: torch.Tensor) -> None: ...

    def step(self, lr: float) -> Any: ...


def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key] for key in a)


def _save_and_continue(directory: str) -> dict[str, Any]:
    """Save at every stage, train on, and do it again from the checkpoint on an engine with other weights."""
    groups = data_groups()
    found: dict[str, Any] = {}
    for stage in STAGES:
        engine = make_engine(stage, groups)
        train(engine, groups, BEFORE)
        path = step_directory(f"{directory}/stage{stage}", len(BEFORE))
        save_checkpoint(path, engine, TABLE, groups, {"step": len(BEFORE)})
        found[f"through {stage}"] = (train(engine, groups, AFTER), state_of(engine))
        resumed = make_engine(stage, groups, seed=stage + 1)
        load_checkpoint(path, resumed, TABLE, groups)
        found[f"resumed {stage}"] = (train(resumed, groups, AFTER), state_of(resumed))
    if groups.world.size == 2:
        found["tensor"] = _tensor_ranks(directory, groups)
        found["full disk"] = _full_disk(directory, groups)
    return found


def _load_all(directory: str) -> dict[str, Any]:
    """Continue from every stage's checkpoint at every stage."""
    groups = data_groups()
    found: dict[str, Any] = {}
    for saved in STAGES:
        for stage in STAGES:
            engine = make_engine(stage, groups, seed=9)
            found_latest = find_latest(f"{directory}/stage{saved}", groups)
            assert found_latest is not None
            load_checkpoint(found_latest, engine, TABLE, groups)
            state = state_of(engine)
            found[f"{saved} to {stage}"] = (train(engine, groups, AFTER), state)
    return found


SPLIT_TABLE = {"fused": Placement(tp_dim=0, parts=("x0", "x1", "v")), "row": Placement(tp_dim=1), "bias": Placement()}
SPLIT_SHAPES = {"fused": (12, 3), "row": (2, 4), "bias": (3,)}


def _tensor_ranks(directory: str, groups: Groups) -> bool:
    """One process's weights, split over two tensor ranks by a load, saved by these and loaded whole again."""
    world, alone = groups.world, groups.tensor
    split = Groups(tensor=world, context=alone, data=alone, data_context=alone, world=world)
    whole = DictEngine.random(SPLIT_SHAPES)
    save_checkpoint(f"{directory}/tensor1", whole, SPLIT_TABLE, groups, {})
    halves = DictEngine.random({"fused": (6, 3), "row": (2, 2), "bias": (3,)}, seed=1)
    load_checkpoint(f"{directory}/tensor1", halves, SPLIT_TABLE, split)
    weight = whole.state["fused"]["weight"]
    rows = torch.cat([weight[start:start + 2] for start in (2 * world.rank, 4 + 2 * world.rank, 8 + 2 * world.rank)])
    assert torch.equal(halves.state["fused"]["weight"], rows), "each part is split on its own"
    save_checkpoint(f"{directory}/tensor2", halves, SPLIT_TABLE, split, {})
    again = DictEngine.random(SPLIT_SHAPES, seed=2)
    load_checkpoint(f"{directory}/tensor2", again, SPLIT_TABLE, groups)
    return all(same(again.state[name], whole.state[name]) for name in SPLIT_SHAPES)


def _full_disk(directory: str, groups: Groups) -> str:
    """Rank 1 cannot write more than some kB per file: a real failing write, on one rank only."""
    engine = DictEngine.random({f"w{i}": (100, 100) for i in range(4)})
    table = dict.fromkeys(engine.state, Placement())
    save_checkpoint(step_directory(f"{directory}/full", 1), engine, table, groups, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if groups.world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        save_checkpoint(step_directory(f"{directory}/full", 2), engine, table, groups, {})
    except OSError as error:
        assert [path.name for path in Path(directory, "full").iterdir()] == ["step-00000001"]
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "no error"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def at_two(directory: Path) -> list[dict[str, Any]]:
    return run_distributed(_save_and_continue, 2, str(directory))


@pytest.fixture(scope="module")
def at_one(at_two: list[dict[str, Any]], directory: Path) -> dict[str, Any]:  # noqa: ARG001
    return run_distributed(_load_all, 1, str(directory))[0]


@pytest.mark.parametrize("stage", STAGES)
def test_same_stage_and_ranks_continue_bit_for_bit(at_two: list[dict[str, Any]], stage: int) -> None:
    for rank in at_two:
        (records, state), (resumed, resumed_state) = rank[f"through {stage}"], rank[f"resumed {stage}"]
        assert resumed == records
        assert same(resumed_state, state)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("saved", STAGES)
def test_two_ranks_continue_on_one_at_any_stage(at_two: list[dict[str, Any]], at_one: dict[str, Any], saved: int,
                                                stage: int) -> None:
    want, _ = at_two[0][f"through {saved}"]
    got, state = at_one[f"{saved} to {stage}"]
    difference = max(abs(a.loss - b.loss) / b.loss for a, b in zip(got, want, strict=True))
    print(f"stage {saved} at 2 ranks -> stage {stage} at 1: losses differ by {difference:.1e}, tolerance {TOLERANCE}")
    assert difference < TOLERANCE
    assert state["steps"] == len(BEFORE)
    assert all(state[f"{name}/exp_avg_sq"].any() for name in TABLE), "moments of every group are read"


def test_tensor_ranks_split_each_part(at_two: list[dict[str, Any]]) -> None:
    assert at_two[0]["tensor"]
    assert at_two[1]["tensor"]


def test_a_full_disk_fails_on_all_ranks_and_leaves_nothing(at_two: list[dict[str, Any]], directory: Path) -> None:
    messages = [rank["full disk"] for rank in at_two]
    print(messages[0])
    assert messages[0] == messages[1]
    assert "could not be written (rank 1: [Errno 27] File too large)" in messages[0]
    assert "\n" not in messages[0]
    assert [path.name for path in (directory / "full").iterdir()] == ["step-00000001"]
    assert latest(directory / "full") == step_directory(directory / "full", 1)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_toy(tmp_path)


def write_toy(tmp_path: Path) -> Path:
    """A whole checkpoint of Toy's shapes, written by one process."""
    engine = DictEngine.random({name: tuple(parameter.shape) for name, parameter in Toy().named_parameters()})
    path = step_directory(tmp_path, 5)
    save_checkpoint(path, engine, TABLE, Groups.single(), {"step": 5, "identity": {"seed": 1}})
    return path


def test_weights_load_into_a_bare_model(checkpoint: Path) -> None:
    model = Toy(seed=3)
    metadata = load_model_weights(checkpoint, model, TABLE)
    saved = DictEngine.random({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    assert all(torch.equal(parameter, saved.state[name]["weight"]) for name, parameter in model.named_parameters())
    assert metadata["step"] == 5
    assert read_metadata(checkpoint)["optimizer_step_count"] == 7


def test_split_and_merge_are_inverse() -> None:
    tensor, placement = torch.arange(12.0).view(6, 2), Placement(parts=("x0", "x1", "v"))
    parts = split_parts(tensor, placement)
    assert list(parts) == ["/x0", "/x1", "/v"]
    assert torch.equal(parts["/x1"], tensor[2:4])
    assert torch.equal(merge_parts(parts, placement), tensor)


def test_a_torn_checkpoint_is_passed_over(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    torn = step_directory(checkpoint.parent, 6)
    torn.mkdir()
    (torn / "metadata.json").write_text("{}")
    (checkpoint.parent / "step-00000007.tmp-abcd").mkdir()
    with caplog.at_level(logging.WARNING):
        assert latest(checkpoint.parent) == checkpoint
    assert "step-00000006" in caplog.text
    with pytest.raises(CheckpointError, match="step-00000006.*cut short.*choose another"):
        read_metadata(torn)
    with pytest.raises(CheckpointError, match="step-00000099: it is not there"):
        read_metadata(checkpoint.parent / "step-00000099")
    with pytest.raises(CheckpointError, match="step-00000099: no such checkpoint"):
        open_checkpoint(checkpoint.parent / "step-00000099")
    assert find_latest(checkpoint.parent / "nowhere") is None


def test_a_truncated_file_is_noticed(checkpoint: Path) -> None:
    os.truncate(checkpoint / "__0_0.distcp", 100)
    assert find_latest(checkpoint.parent) is None
    with pytest.raises(CheckpointError, match=r"__0_0.distcp is missing or has another size"):
        load_model_weights(checkpoint, Toy(), TABLE)


def test_damaged_tensors_are_refused(checkpoint: Path) -> None:
    file = checkpoint / "__0_0.distcp"
    file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(DamagedError, match=r"__0_0.distcp is not what was written \(sha256\): choose another"):
        load_model_weights(checkpoint, Toy(), TABLE)
    put_in(checkpoint, "__0_0.distcp", file.read_bytes())
    with pytest.raises(DamagedError, match=r"tensors cannot be read \(.*\): choose another checkpoint$"):
        load_model_weights(checkpoint, Toy(), TABLE)


def test_a_refusal_does_not_quote_advice_to_trust_the_file(checkpoint: Path) -> None:
    """A file of the right form with something else than a tensor in it, of which torch says how to run it."""
    file = io.BytesIO()
    torch.save(_Malicious(checkpoint.parent / "owned"), file)
    index = pickle.loads((checkpoint / ".metadata").read_bytes())
    for key, info in index.storage_data.items():
        index.storage_data[key] = replace(info, offset=0, length=len(file.getvalue()))
    put_in(checkpoint, ".metadata", pickle.dumps(index))
    put_in(checkpoint, "__0_0.distcp", file.getvalue())
    with pytest.raises(CheckpointError) as refused:
        load_model_weights(checkpoint, Toy(), TABLE)
    print(refused.value)
    assert "weights_only" in str(refused.value.__cause__), "control: torch's own text has it"
    assert "cannot be read (Weights only load failed): choose another checkpoint" in str(refused.value)


def test_metadata_that_a_resume_cannot_go_on_from(checkpoint: Path) -> None:
    lacks = r"step-00000005: its metadata.json lacks data, val_loss, .*: choose another"
    with pytest.raises(CheckpointError, match=lacks):
        open_checkpoint(checkpoint).check_resumable()
    edit_metadata(checkpoint, **dict.fromkeys(("val_loss", "best_val_loss", "loss_scale")), seconds=1.0,
                  data={"step": 5})
    with pytest.raises(CheckpointError, match=r"lacks data.passed, data.stage, data.epoch, data.index, so no run can"):
        open_checkpoint(checkpoint).check_resumable()
    edit_metadata(checkpoint, data=None)
    assert open_checkpoint(checkpoint).has_no_run
    with pytest.raises(CheckpointError, match=r"weights alone, .*: start one from them with train.resume=weights:PATH"):
        open_checkpoint(checkpoint).check_resumable()
    edit_metadata(checkpoint, data={"step": 5, "passed": 0, "stage": 0, "epoch": 0, "index": 40})
    opened = open_checkpoint(checkpoint)
    opened.check_resumable()
    assert not opened.has_no_run
    assert opened.metadata["step"] == 5
    assert "sha256" not in opened.metadata


def test_another_model_is_refused(checkpoint: Path) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in Toy().named_parameters()}
    for changed, message in (({"out.bias": (2,)}, r"model/out.bias has shape \(1,\) there and \(2,\) here"),
                             ({"new": (2,)}, r"model/new is missing \(3 such keys\)")):
        engine = DictEngine.random({**shapes, **changed}, seed=4)
        before = {name: dict(fields) for name, fields in engine.state.items()}
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(checkpoint, engine, {**TABLE, "new": Placement()}, Groups.single())
        assert all(same(engine.state[name], before[name]) for name in before)
    del shapes["filter"]
    with pytest.raises(CheckpointError, match=r"filter is extra"):
        load_checkpoint(checkpoint, DictEngine.random(shapes), TABLE, Groups.single())


class _Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_malicious_pickle_is_refused_and_not_run(checkpoint: Path, name: str) -> None:
    target = checkpoint.parent / "owned"
    put_in(checkpoint, name, pickle.dumps(_Malicious(target)) + bytes(10_000))  # long enough for its tensors
    with pytest.raises(CheckpointError, match=r"posix.mkdir|cannot be read"):
        load_model_weights(checkpoint, Toy(), TABLE)
    assert not target.exists()
    pickle.loads(pickle.dumps(_Malicious(target)))
    assert target.exists(), "control: the pickle does act when it is loaded"


def _changes(module: str, name: str, attribute: str) -> bytes:
    """Instructions of a pickle that set an attribute of a class or function to that object itself."""
    named = f"c{module}\n{name}\n".encode()
    key = b"\x8c" + bytes([len(attribute)]) + attribute.encode()
    return named + b"N}" + key + named + b"s\x86b0"


@pytest.mark.parametrize(("module", "name", "attribute"), [
    ("pathlib", "PosixPath", "with_name"), ("torch.serialization", "_get_layout", "__doc__"),
    ("torch.distributed.checkpoint.metadata", "Metadata", "planner_data"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING", "other"), ("torch", "Size", "other")])
def test_an_index_changes_nothing_of_the_process(checkpoint: Path, module: str, name: str, attribute: str) -> None:
    kind = getattr(importlib.import_module(module), name)
    before = vars(kind).get(attribute)
    content = (checkpoint / ".metadata").read_bytes()
    assert content[:1] == pickle.PROTO
    put_in(checkpoint, ".metadata", content[:2] + _changes(module, name, attribute) + content[2:])
    with pytest.raises(DamagedError, match=f"is refused.*it changes <.*{name}"):
        open_checkpoint(checkpoint)
    assert vars(kind).get(attribute) is before
    put_in(checkpoint, ".metadata", content)
    open_checkpoint(checkpoint)


def test_an_index_changes_no_member_of_an_enum(checkpoint: Path) -> None:
    """It is an object that the pickle has not made either, though no class."""
    content = (checkpoint / ".metadata").read_bytes()
    member = b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\nK\x00\x85R"
    put_in(checkpoint, ".metadata", content[:2] + member + b"}\x8c\x05otherK\x01sb0" + content[2:])
    with pytest.raises(DamagedError, match="it changes <_MEM_FORMAT_ENCODING"):
        open_checkpoint(checkpoint)
    assert not hasattr(_MEM_FORMAT_ENCODING(0), "other")
    pickle.loads(b"\x80\x04" + member + b"}\x8c\x05otherK\x01sb.")
    assert _MEM_FORMAT_ENCODING(0).__dict__.pop("other") == 1, "control: the pickle does act when it is loaded"


class _Attribute:
    """Pickles as the attribute of a class, as Python 3.11.2 does for the members of an enum."""

    def __init__(self, kind: type, name: str) -> None:
        self.kind, self.name = kind, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.kind, self.name)


def test_an_index_of_a_python_that_pickles_enums_by_getattr(checkpoint: Path) -> None:
    index = pickle.loads((checkpoint / ".metadata").read_bytes())
    index.planner_data = _Attribute(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")
    put_in(checkpoint, ".metadata", pickle.dumps(index))
    load_model_weights(checkpoint, Toy(), TABLE)
    index.planner_data = _Attribute(Metadata, "__init__")
    put_in(checkpoint, ".metadata", pickle.dumps(index))
    with pytest.raises(CheckpointError, match="something else than a memory format"):
        load_model_weights(checkpoint, Toy(), TABLE)


def test_an_index_that_points_outside_is_refused(checkpoint: Path) -> None:
    index = pickle.loads((checkpoint / ".metadata").read_bytes())
    for info in index.storage_data.values():
        info.relative_path = "../elsewhere"
    put_in(checkpoint, ".metadata", pickle.dumps(index))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        load_model_weights(checkpoint, Toy(), TABLE)


def test_a_failed_save_keeps_the_old_one(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = DictEngine.random({name: tuple(parameter.shape) for name, parameter in Toy().named_parameters()}, seed=8)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for step in (5, 6):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left on device.*make room"):
                save_checkpoint(step_directory(checkpoint.parent, step), engine, TABLE, Groups.single(), {"step": step})
        assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]
    assert read_metadata(checkpoint)["identity"] == {"seed": 1}
    save_checkpoint(checkpoint, engine, TABLE, Groups.single(), {"step": 5, "identity": {}})
    assert read_metadata(checkpoint)["identity"] == {}, "a whole save replaces what was there"
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    engine = DictEngine.random({"bias": (3,)})
    for step in range(1, 6):
        save_checkpoint(step_directory(tmp_path, step), engine, {"bias": Placement()}, Groups.single(), {})
    (tmp_path / "step-00000009.tmp-abcd").mkdir()
    step_directory(tmp_path, 9).mkdir()  # torn: it does not count as one of those kept
    prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005", "step-00000009"]


def test_an_axis_of_one_needs_no_group() -> None:
    assert Groups.single().tensor == Axis()
    assert not dist.is_initialized()
