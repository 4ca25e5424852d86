"""Twenty steps of the quickstart by engine and precision, side by side through pretrain.py; a crossing of engines."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.task import Task, read_lines

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "shards" / "sample"
TINY = ("model.hidden_size=16", "model.num_layers=1", "data.seq_len=64", "data.val_seq_len=1024",
        "train.micro_batch_size=2", "train.global_batch_size=4")
WHOLE = "zero1"
"""The run with which the others are compared, and whose checkpoint crosses."""
RUNS: dict[str, tuple[str, ...]] = {
    WHOLE: (),
    "fsdp": ("engine.name=fsdp",),
    "zero3": ("engine.zero_stage=3",),
    "fp32": ("engine.zero_stage=2", "train.precision=fp32"),
    "fp16": ("engine.zero_stage=0", "train.precision=fp16"),
    "offload": ("engine.zero_stage=2", "engine.offload=optimizer", "train.activation_offload=true"),
    "recompute": ("engine.name=fsdp", "engine.offload=parameters", "train.activation_checkpointing=full",
                  "data.num_workers=2"),
    "attention": ("model.layer_pattern=HA", "model.num_attention_heads=2", "train.profile_steps=3"),
}
TOLERANCE = 2e-3
"""Of a loss near 2: what bf16 and the order of sums move it by in 20 steps is a quarter of this."""
OTHER_MODEL = {"attention"}
COMMON = ("train.precision=bf16", "optim.warmup_steps=5")
STEPS = ("train.steps=20", "train.eval_every=10", "train.save_every=10")


@dataclass(frozen=True)
class Run:
    """A training run of this part, as its directory tells."""

    name: str
    directory: Path
    status: int
    train: list[dict[str, Any]] = field(default_factory=list)
    val: list[dict[str, Any]] = field(default_factory=list)


def run(task: Task) -> None:
    shards = build_shards(task)
    chosen = {name: RUNS[name] for name in ((WHOLE, "fsdp") if task.tiny else RUNS)}
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        futures: dict[str, Future[Run]] = {
            name: pool.submit(pretrain, task, name, shards, [*STEPS, *keys]) for name, keys in chosen.items()}
        whole = futures[WHOLE].result()
        for name, keys in ((f"{WHOLE}-again", ()), (f"{WHOLE}-to-fsdp", RUNS["fsdp"])):
            cut = whole.directory / "checkpoints" / "step-00000010"
            if cut.is_dir():
                copy = task.work / name / "checkpoints" / cut.name
                shutil.copytree(cut, copy)
                futures[name] = pool.submit(pretrain, task, name, shards, [*STEPS, *keys])
        for future in as_completed(futures.values()):
            done = future.result()
            report(task, done, None if done.name in OTHER_MODEL else whole)
    profile = task.work / "attention" / "profile" / "rank-0.txt"
    if "attention" in chosen and not profile.is_file():
        task.note("attention: no profile was written", ok=False)


def build_shards(task: Task) -> Path:
    """Two small genomes.

    Raises:
        RuntimeError: they were not built.
    """
    out = task.work / "shards"
    genomes = (SAMPLE / "worm.fa.gz", SAMPLE / "phix174.fa.gz")
    status = task.command([sys.executable, ROOT / "shards" / "build.py", *genomes, "--val-fraction", "0.01",
                           "--out", out], task.work / "shards.log")
    if status:
        raise RuntimeError(f"shards/build.py ended with status {status}: see shards.log")
    return out


def pretrain(task: Task, name: str, shards: Path, keys: Sequence[str],
             ranks: Sequence[Mapping[str, str]] = ({},)) -> Run:
    """Train in `work/name` on as many ranks as there are environments, until the deadline."""
    directory = task.work / name
    directory.mkdir(exist_ok=True)
    if task.left() <= 0:
        return Run(name, directory, 124)
    command = [sys.executable, str(ROOT / "launchers" / "pretrain.py"), "--config",
               str(ROOT / "configs" / "quickstart.yaml"), f"data.shards={shards}", f"train.run_dir={directory}",
               *COMMON, *(TINY if task.tiny else ()), *keys]
    launched = {} if len(ranks) == 1 else {"WORLD_SIZE": str(len(ranks)), "MASTER_ADDR": "127.0.0.1",
                                           "MASTER_PORT": str(_free_port())}
    processes = []
    for rank, environment in enumerate(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if launched else {}
        with (directory / f"output-{rank}.log").open("wb") as log:
            processes.append(subprocess.Popen(command, env=os.environ | launched | place | dict(environment),
                                              stdout=log, stderr=subprocess.STDOUT))
    status = 0
    for process in processes:
        try:
            status = process.wait(max(0.0, task.left())) or status
        except subprocess.TimeoutExpired:
            process.kill()
            status = 124
    rows = read_lines(directory / "metrics.jsonl")
    return Run(name, directory, status, [row for row in rows if row["split"] == "train"],
               [row for row in rows if row["split"] == "val"])


def report(task: Task, done: Run, other: Run | None) -> None:
    """Note how a run went, and how far its losses are from another's at the same steps."""
    if not done.train:
        task.note(f"{done.name}: status {done.status}, no step; {_last_words(done)}", ok=False)
        return
    first, last = done.train[0], done.train[-1]
    rate = sorted(row["tokens_per_second"] for row in done.train)[len(done.train) // 2]
    line = (f"{done.name}: {len(done.train)} steps, loss {first['loss']:.4f} to {last['loss']:.4f}, norm "
            f"{last['grad_norm']:.4f}, {rate:,.0f} tokens/s, peak {last['peak_memory_bytes'] / 2**30:.2f} GiB")
    difference = None
    if other is not None and other is not done:
        losses = {row["step"]: row["loss"] for row in other.train}
        both = [abs(row["loss"] - losses[row["step"]]) for row in done.train if row["step"] in losses]
        difference = max(both, default=float("inf"))
        line += f"; losses differ from {other.name}'s by {difference:.1e}"
    ok = done.status == 0 and bool(done.val) and (difference is None or difference < TOLERANCE)
    if done.status:
        line = f"status {done.status}{' (out of time)' * (done.status == 124)}; {line}; {_last_words(done)}"
    task.note(line, ok=ok, run=done.name, status=done.status, rows=done.train, difference=difference)


def _last_words(done: Run) -> str:
    said = [line for log in sorted(done.directory.glob("output-*.log"))
            for line in log.read_text(errors="replace", encoding="utf-8").splitlines() if line.strip()]
    wrong = [line for line in said if "rror" in line]
    return (wrong or said or ["it said nothing"])[-1][:160]


def _free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
