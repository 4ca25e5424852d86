"""Losses, gradient norms and digests of the final state of 12 small trainings, to compare one tree with another.

    python -m tests.record --out FILE                  record this tree
    python -m tests.record --compare BEFORE AFTER      two records of one machine: equal bit for bit, digests included

Those in float32 and bf16 go through the trainer, from shards to the metrics and the checkpoint. Those in float64 run
a loop of their own, because a run's metrics are float32. All read the shard set of `tests/golden/before`, written by
the tree of which `tests/golden/before.json` is the record. That tree also wrote the checkpoint beside it, of
`RESUMED` after step 10.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.tensor import DTensor

from hyena_dist.config.schema import (
    Config,
    DataSection,
    EngineSection,
    ModelSection,
    OptimSection,
    ParallelSection,
    TrainSection,
)
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.stream import TrainStream, ValidationBatches
from hyena_dist.data.tokenizer import IGNORE, PAD, split_window
from hyena_dist.engine.fsdp import apply_fsdp2
from hyena_dist.model.config import hyena_config
from hyena_dist.model.loss import token_loss
from hyena_dist.model.model import HyenaModel
from hyena_dist.ops.dropout import DropoutKey
from hyena_dist.parallel.collectives import all_reduce
from hyena_dist.parallel.groups import Groups, init_groups
from hyena_dist.parallel.tokens import slice_tokens
from hyena_dist.train.session import open_trainer
from tests.dist.harness import run_distributed

GOLDEN = Path(__file__).parent / "golden"
BEFORE = GOLDEN / "before"
STEPS, SAVED = 20, 10
"""Steps of a training, and the step after which it saves a checkpoint."""
LENGTH = 250  # no number of context ranks divides it


@dataclass(frozen=True)
class Case:
    """One training, on `ranks` ranks. `engine` is a ZeRO stage, fsdp, or, in float64 only, torch: no engine at all."""

    engine: int | str
    ranks: int = 2
    precision: str = "fp32"
    recompute: str = "none"
    parallel: ParallelSection = field(default_factory=ParallelSection)
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    def config(self, run_dir: str, resume: str = "auto") -> Config:
        fsdp = self.engine in ("fsdp", "torch")
        return Config(
            model=ModelSection(**{"num_layers": 2, "hidden_size": 16, "max_seq_len": LENGTH, "filter_order": 8,
                                  "embed_dropout": 0.0, "num_attention_heads": 2, **self.model}),
            data=DataSection(**{"shards": str(BEFORE / "shards"), "seq_len": LENGTH, "num_workers": 0, **self.data}),
            train=TrainSection(run_dir=run_dir, steps=STEPS, micro_batch_size=1, global_batch_size=4, save_every=SAVED,
                               eval_every=0, activation_checkpointing=self.recompute, resume=resume,
                               precision="fp32" if self.precision == "fp64" else self.precision),
            # Adam's g / (|g| + eps) amplifies the rounding of small gradients, a large eps does not.
            optim=OptimSection(lr=5e-3, warmup_steps=5, eps=1e-2, grad_clip=0.5),
            parallel=self.parallel,
            engine=EngineSection(name="fsdp") if fsdp else EngineSection(zero_stage=int(self.engine)))


TENSOR, SEQUENCE = ParallelSection(tensor=2), ParallelSection(tensor=2, sequence=True)
ALL_TO_ALL = ParallelSection(context=2, context_method="all_to_all")
DISTRIBUTED_FFT = ParallelSection(context=2, context_method="distributed_fft")
CASES = {
    "fp64 one rank": Case("torch", 1, "fp64", model={"hyena_order": 3, "embed_dropout": 0.1, "resid_dropout": 0.1}),
    "fp64 tensor": Case("fsdp", precision="fp64", recompute="full", parallel=TENSOR, model={"embed_dropout": 0.1}),
    "fp64 sequence, attention": Case("fsdp", precision="fp64", parallel=SEQUENCE,
                                     model={"layer_pattern": "HA", "resid_dropout": 0.1}),
    "fp64 all to all": Case("fsdp", precision="fp64", recompute="selective",
                            parallel=replace(ALL_TO_ALL, overlap_groups=2), model={"hyena_order": 3}),
    "fp64 distributed transform": Case("fsdp", precision="fp64", recompute="block", parallel=DISTRIBUTED_FFT),
    "zero 0, one rank": Case(0, 1, data={"rc_augment": True, "num_workers": 1}),
    "zero 1, data": Case(1, recompute="full", model={"embed_dropout": 0.1, "layer_pattern": "HA"}),
    "zero 2, sequence": Case(2, recompute="selective", parallel=SEQUENCE),
    "zero 3, all to all": Case(3, recompute="full", parallel=ALL_TO_ALL),
    "zero 3, bf16": Case(3, precision="bf16", model={"resid_dropout": 0.1}),
    "fsdp, distributed transform": Case("fsdp", parallel=DISTRIBUTED_FFT, model={"hyena_order": 3}),
    "fsdp, bf16, tensor": Case("fsdp", precision="bf16", recompute="selective", parallel=TENSOR),
}
RESUMED = "zero 1, data"
TOLERANCE = {"fp64": 1e-12, "fp32": 1e-6, "bf16": 3e-3}
"""Largest relative difference of losses and gradient norms from a record of another machine or order of operations.
Accumulating the micro-batches in another order moves them by 2e-7 in float32, and by 8e-4 in bf16."""


def record(cases: dict[str, Case], *, keep: Path | None = None,
           resume: Path | None = None) -> dict[str, dict[str, Any]]:
    """Train every case. {name: {"loss": [...], "grad_norm": [...], "digest": sha256}}, the lists by step.

    Args:
        keep: an existing directory for the run directories, one of each case's name.
        resume: a checkpoint to go on from.
    """
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for ranks in sorted({case.ranks for case in cases.values()}):
            chosen = {name: case for name, case in cases.items() if case.ranks == ranks}
            found |= run_distributed(_train_all, ranks, chosen, str(keep or scratch), str(resume or "auto"),
                                     timeout=1500)[0]
    return {name: found[name] for name in cases}


def _train_all(cases: dict[str, Case], directory: str, resume: str) -> dict[str, dict[str, Any]]:
    return {name: _train_exactly(case) if case.precision == "fp64" else _train(case, Path(directory, name), resume)
            for name, case in cases.items()}


def _train(case: Case, run_dir: Path, resume: str) -> dict[str, Any]:
    """A run, as it stands in its metrics and its last checkpoint."""
    config = case.config(str(run_dir), resume)
    groups = init_groups(tensor=config.parallel.tensor, context=config.parallel.context)
    with open_trainer(config, groups, torch.device("cpu")) as trainer:
        trainer.fit()
    rows = read_train_rows(run_dir)
    found = {key: [row[key] for row in rows] for key in ("loss", "grad_norm")}
    if groups.world.rank == 0:
        found["digest"] = digest_checkpoint(run_dir / "checkpoints" / f"step-{STEPS:08d}")
    return found


def read_train_rows(run_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("split") == "train"]


def digest_checkpoint(checkpoint: Path) -> str:
    """Of every weight and both of its moments, read by torch alone."""
    with tempfile.TemporaryDirectory() as scratch:
        dcp_to_torch_save(checkpoint, Path(scratch, "state.pt"))
        state = torch.load(Path(scratch, "state.pt"), weights_only=True)
    return digest((key, value) for key, value in _flat(state) if isinstance(value, Tensor))


def _flat(state: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in sorted(state.items()):
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def _train_exactly(case: Case) -> dict[str, Any]:
    """A loop in float64, with FSDP2 or with torch alone. Its digest is of the final weights of all tensor ranks."""
    config = case.config("unused")
    groups = init_groups(tensor=config.parallel.tensor, context=config.parallel.context)
    model = HyenaModel(hyena_config(config.model, activation_checkpointing=case.recompute, parallel=config.parallel,
                                    params_dtype=torch.float64), groups.collection(), seed=0)
    if case.engine == "fsdp":
        apply_fsdp2(model, groups)
    optim, train = config.optim, config.train
    optimizer = torch.optim.AdamW(model.parameters(), lr=optim.lr, eps=optim.eps, weight_decay=optim.weight_decay)
    stream = TrainStream(Manifest.load(config.data.shards), seq_len=LENGTH, seed=0)
    accumulated = train.global_batch_size // groups.data.size
    batches = stream.batches(stream.start(), micro_batch_size=1, global_batch_size=train.global_batch_size,
                             dp_rank=groups.data.rank, dp_size=groups.data.size)
    found: dict[str, Any] = {"loss": [], "grad_norm": []}
    for step in range(STEPS):
        micro_batches = []
        for batch in (next(batches) for _ in range(accumulated)):
            ids, targets = (slice_tokens(part, groups.context, multiple=model.token_multiple, fill=fill)
                            for part, fill in zip(split_window(batch.ids), (PAD, IGNORE), strict=True))
            micro_batches.append((ids, targets, DropoutKey(0, step, batch.windows)))
        count = _sum(sum((targets != IGNORE).sum() for _, targets, _ in micro_batches), groups)
        total = torch.zeros((), dtype=torch.float64)
        for ids, targets, key in micro_batches:
            loss, _ = token_loss(model(ids, key), targets, groups.tensor)
            (loss * groups.data_context.size / count).backward()
            total += loss.detach()
        found["loss"].append(float(_sum(total, groups) / count))
        found["grad_norm"].append(norm := _norm(model, groups))
        for parameter in model.parameters():
            parameter.grad.mul_(min(1.0, optim.grad_clip / norm))
        optimizer.step()
        optimizer.zero_grad()
    own = digest((name, _whole(weight.detach())) for name, weight in sorted(model.named_parameters()))
    parts = [own] * groups.tensor.size
    if groups.tensor.size > 1:
        torch.distributed.all_gather_object(parts, own, group=groups.tensor.group)
    return found | {"digest": hashlib.sha256("".join(parts).encode()).hexdigest()}


def _sum(tensor: Tensor, groups: Groups) -> Tensor:
    return all_reduce(tensor, groups.data_context) if groups.data_context.size > 1 else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _norm(model: HyenaModel, groups: Groups) -> float:
    """Of all gradients, in float64, which that of the engines is not."""
    split, shared = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    table = model.placement()
    for name, parameter in model.named_parameters():
        squares = split if table[name].tp_dim is not None else shared
        squares += _whole(parameter.grad).square().sum()
    if groups.tensor.size > 1:
        split = all_reduce(split, groups.tensor)
    return float((split + shared).sqrt())


def digest_windows() -> dict[str, str]:
    """Of token ids and numbers of the first training windows, and of all that validate."""
    manifest = Manifest.load(BEFORE / "shards")
    stream = TrainStream(manifest, seq_len=LENGTH, seed=0)
    batches = {"train": islice(stream.batches(stream.start(), micro_batch_size=1, global_batch_size=1), 300),
               "val": ValidationBatches(manifest, seq_len=LENGTH, batch_size=1)}
    return {split: digest(("", part) for batch in chosen for part in (batch.ids, batch.windows))
            for split, chosen in batches.items()}


def difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Largest relative difference of a loss or a gradient norm; of a resumed training, after the step that it resumes.
    """
    pairs = [pair for key in ("loss", "grad_norm")
             for pair in zip(found[key], expected[key][-len(found[key]):], strict=True)]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def compare(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Print where two records of one machine differ; how many cases do, and one more if the windows do."""
    others = before["windows"] != after["windows"]
    print(f"windows: {'DIFFER' if others else 'equal'}")
    before, after = before["cases"], after["cases"]
    if before.keys() != after.keys():
        raise SystemExit(f"the records have other cases: {sorted(before.keys() ^ after.keys())}")
    differ = [name for name in before if before[name] != after[name]]
    for name in before:
        moved = difference(after[name], before[name])
        print(f"{name}: {f'DIFFERS, losses and norms by {moved:.1e}' if name in differ else 'equal bit for bit'}")
    return len(differ) + others


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, metavar="FILE", help="write a record of every case")
    action.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"), help="two records")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="with --out: keep the run directories here")
    args = parser.parse_args()
    if args.compare:
        return int(compare(*(json.loads(path.read_text()) for path in args.compare)) > 0)
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
    found = {"windows": digest_windows(), "cases": record(CASES, keep=args.keep)}
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
