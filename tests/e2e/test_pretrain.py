"""The commands as people run them: real launchers, real processes, a killed run, mistakes."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hyena_dist.train.metrics import read_rows

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
SMALL = ["model.hidden_size=16", "model.max_seq_len=256", "data.seq_len=256", "train.micro_batch_size=2",
         "train.global_batch_size=4", "optim.warmup_steps=2"]


def command(launcher: str, shards: Path, run_dir: Path, *overrides: str, ranks: int = 2) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = {
        "deepspeed": [f"{BIN}/deepspeed", "--num_gpus", str(ranks), "--master_port", str(port)],
        "torchrun": [f"{BIN}/torchrun", "--nproc-per-node", str(ranks), "--master-port", str(port)],
        "python": [sys.executable],
    }[launcher]
    return [*start, "launchers/pretrain.py", "--config", "configs/quickstart.yaml", f"data.shards={shards}",
            f"train.run_dir={run_dir}", *SMALL, *overrides]


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT | environment, capture_output=True, text=True,
                          timeout=300, check=False)


def losses(run_dir: Path) -> dict[int, float]:
    return {row.step: row.loss for row in read_rows(run_dir / "metrics.jsonl") if row.split == "train"}


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the run ended early: {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    result = run(command("deepspeed", shards, run_dir, "train.steps=40", "train.eval_every=20", "train.save_every=10"))
    assert result.returncode == 0, result.stderr
    return run_dir


def test_a_run_leaves_what_it_should(whole):
    assert {path.name for path in whole.iterdir()} == {"config.yaml", "history.jsonl", "metrics.jsonl", "tensorboard",
                                                       "checkpoints", "last_checkpoint", "summary.json", "report.png",
                                                       "logs"}
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step-00000030", "step-00000040"]
    rows = read_rows(whole / "metrics.jsonl")
    assert [row.step for row in rows if row.split == "train"] == list(range(1, 41))
    assert [row.step for row in rows if row.split == "val"] == [20, 40]
    assert rows[-1].tokens == 40 * 4 * 256
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["best_val_perplexity"] <= summary["final_val_perplexity"] < rows[0].perplexity
    assert (whole / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_killed_and_resumed_is_bit_equal(whole, shards, tmp_path):
    """kill -9 of every process somewhere after step 20, then the same command again."""
    arguments = command("deepspeed", shards, tmp_path / "cut", "train.steps=40", "train.eval_every=20",
                        "train.save_every=10")
    process = subprocess.Popen(arguments, cwd=ROOT, env=ENVIRONMENT, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(losses(tmp_path / "cut")) > 22, process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "cut" / "summary.json").exists()
    result = run(arguments)
    assert result.returncode == 0, result.stderr
    assert "resumed" in result.stderr
    assert losses(tmp_path / "cut") == losses(whole)


@pytest.mark.slow
def test_torchrun_and_python_run_the_same_file(whole, shards, tmp_path):
    for launcher in ("torchrun", "python"):
        result = run(command(launcher, shards, tmp_path / launcher, "train.steps=40", "train.eval_every=0",
                             "train.save_every=0"))
        assert result.returncode == 0, result.stderr
        lines = [line[9:] for line in result.stderr.splitlines()]  # without the time
        banner = [line.split()[0] for line in lines[:8]]
        assert banner == ["hyena_dist", "run", "device", "ranks", "model", "step", "length", "memory"], result.stderr
        assert lines[-1].startswith("done: 40 steps in "), result.stderr
        assert lines[-1].endswith(f"in {tmp_path / launcher}: report.png, metrics.jsonl, tensorboard/, summary.json, "
                                  "checkpoints/")
    assert losses(tmp_path / "torchrun") == losses(whole)
    alone = losses(tmp_path / "python")
    assert max(abs(alone[step] - loss) for step, loss in losses(whole).items()) < 1e-4


@pytest.mark.slow
def test_tensor_and_context_ranks_train_the_same_model(whole, shards, tmp_path):
    """Four ranks that split channels and tokens."""
    four = ["parallel.tensor=2", "parallel.context=2", "parallel.sequence=true"]
    common = ["train.steps=40", "train.eval_every=20", "train.save_every=20"]
    result = run(command("deepspeed", shards, tmp_path / "four", *common, *four, ranks=4))
    assert result.returncode == 0, result.stderr
    assert "parallel.context_method=auto: all_to_all" in result.stderr
    expected = losses(whole)
    assert max(abs(loss - expected[step]) for step, loss in losses(tmp_path / "four").items()) < 1e-4


def test_evaluate_prints_the_table(whole):
    result = run([sys.executable, "launchers/evaluate.py", str(whole)])
    assert result.returncode == 0, result.stderr
    summary = json.loads((whole / "summary.json").read_text())
    assert f"{summary['final_val_perplexity']:.4f}" in result.stdout
    assert all(f"Markov chain, order {order}" in result.stdout for order in range(7))


@pytest.mark.slow
def test_a_nan_stops_the_run_and_names_the_last_good_checkpoint(shards, tmp_path):
    result = run(command("python", shards, tmp_path, "train.steps=40", "train.save_every=1", "optim.lr=1e18",
                         "optim.warmup_steps=4", "optim.grad_clip=0"))
    assert result.returncode == 1
    error = result.stderr.splitlines()[-1]
    found = re.match(r"error: step (\d+): loss \S+, gradient norm (nan|inf): .*; last good checkpoint: (\S+)\. ", error)
    assert found, error
    saved = list((tmp_path / "checkpoints").iterdir())
    assert Path(found[3]) == max(saved)
    assert max(saved).name == f"step-{int(found[1]) - 1:08d}"
    assert (max(saved) / "COMPLETE").exists()


@pytest.mark.parametrize(("overrides", "message"), [
    (["model.hiden_size=16"], "model.hiden_size"),
    (["train.steps=many"], "train.steps"),
    (["data.seq_len=512"], r"data.seq_len (512) exceeds model.max_seq_len (256)"),
    (["train.global_batch_size=5"], "train.global_batch_size (5) is not a multiple"),
    (["data.shards=/nonexistent"], "/nonexistent"),
    pytest.param(["train.resume=/nonexistent"], "/nonexistent", marks=pytest.mark.slow),
    (["engine.deepspeed.fp16.enabled=true"], "engine.deepspeed.fp16"),
    (["parallel.tensor=2"], "needs as many ranks, there are 1"),
    (["optim.lr=nan"], "optim.lr: write a number, got 'nan'"),
    (["model.vocab_size=8"], "model.vocab_size must be at least 12"),
    ([f"train.seed={2**62}"], "train.seed"),
    pytest.param(["train.run_dir=README.md"], "train.run_dir=README.md: no such directory can be made (File exists)",
                 marks=pytest.mark.slow),
    (["engine.deepspeed.zero_optimization.reduce_bucket=1"], "did you mean zero_optimization.reduce_bucket_size?"),
])
def test_a_mistake_is_one_line_and_status_2(shards, tmp_path, overrides, message):
    result = run(command("python", shards, tmp_path / "run", *overrides))
    # What a run says of itself, line by line with the time, is none.
    errors = [line for line in result.stderr.splitlines() if line and not re.match(r"\d\d:\d\d:\d\d ", line)]
    assert result.returncode == 2, result.stderr
    assert len(errors) == 1, result.stderr
    assert errors[0].startswith("error: ")
    assert message in errors[0]
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(("override", "message"), [
    ("model.hidden_size=32", "model.hidden_size: saved 16, now 32"),
    pytest.param("data.rc_augment=true", "data.rc_augment: saved false, now true", marks=pytest.mark.slow),
    pytest.param("train.resume=none", "holds a run already", marks=pytest.mark.slow)])
def test_a_resume_refuses_another_run(whole, shards, override, message):
    result = run(command("python", shards, whole, "train.steps=40", override))
    assert result.returncode == 2, result.stderr
    assert message in result.stderr


@pytest.mark.slow
def test_started_again_a_finished_run_stays_as_it_is(whole, shards, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    result = run(command("python", shards, tmp_path / "run", "train.steps=40"))
    assert result.returncode == 0, result.stderr
    before, after = (json.loads((path / "summary.json").read_text()) for path in (whole, tmp_path / "run"))
    assert after["final_val_perplexity"] == before["final_val_perplexity"]
    assert after["best_val_perplexity"] == before["best_val_perplexity"]
    assert after["seconds"] == pytest.approx(before["seconds"], abs=2)
    assert read_rows(tmp_path / "run" / "metrics.jsonl") == read_rows(whole / "metrics.jsonl")


@pytest.mark.slow
def test_a_resume_from_before_the_newest_checkpoint_needs_another_run_directory(whole, shards, tmp_path):
    old = whole / "checkpoints" / "step-00000030"
    result = run(command("python", shards, whole, "train.steps=40", f"train.resume={old}"))
    assert result.returncode == 2, result.stderr
    assert f"train.resume={old} is older than" in result.stderr
    result = run(command("python", shards, tmp_path / "other", "train.steps=40", f"train.resume={old}"))
    assert result.returncode == 0, result.stderr
    again = losses(tmp_path / "other")
    assert list(again) == list(range(31, 41))
    assert max(abs(loss - losses(whole)[step]) for step, loss in again.items()) < 1e-4


@pytest.mark.parametrize(("arguments", "message"), [
    (["launchers/evaluate.py", "/nonexistent"], "/nonexistent is not a run directory"),
    pytest.param(["launchers/evaluate.py", "{whole}", "--shards", "/nonexistent"],
                 "/nonexistent/shards.json: cannot be read", marks=pytest.mark.slow),
    pytest.param(["launchers/evaluate.py", "{whole}", "--split", "test"], "no bases of split test",
                 marks=pytest.mark.slow),
    (["launchers/evaluate.py", "{whole}", "--must-beat-order", "7"], "--must-beat-order: invalid choice: 7"),
    (["launchers/bench.py", "step", "--rounds", "0"], "--rounds: '0' is not a whole number of at least 1"),
    (["launchers/bench.py", "step", "--threads", "-1"], "--threads: "),
    (["launchers/bench.py", "loader", "--out", "README.md"], "--out README.md: cannot be made"),
])
def test_mistakes_of_the_other_commands_have_status_2(whole, arguments, message):
    result = run([sys.executable, *(argument.replace("{whole}", str(whole)) for argument in arguments)])
    assert result.returncode == 2, result.stderr
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_dry_run_prints_the_configuration_and_trains_nothing(shards, tmp_path):
    result = run([*command("python", shards, tmp_path / "run"), "--dry-run"])
    assert result.returncode == 0, result.stderr
    assert "hidden_size: 16" in result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["launchers/pretrain.py", "launchers/evaluate.py", "launchers/bench.py",
                                    "launchers/convert.py", "shards/build.py", "shards/verify.py"])
def test_help_shows_an_example(script):
    result = run([sys.executable, script, "--help"])
    assert result.returncode == 0
    assert "example" in result.stdout.lower()


@pytest.mark.skipif(torch.cuda.is_available(), reason="about the message without CUDA")
@pytest.mark.parametrize("kilobytes", [pytest.param("2", marks=pytest.mark.slow), "8"])
def test_a_full_disk_is_one_line_and_leaves_nothing_that_looks_whole(shards, tmp_path, kilobytes):
    """A file size limit stands for a full disk: met by the metrics or TensorBoard, or by a checkpoint."""
    arguments = command("python", shards, tmp_path / "run", "train.steps=40", "train.save_every=10")
    limited = ["bash", "-c", 'ulimit -f "$0"; exec "$@"', kilobytes, *arguments]
    result = run(limited)
    assert result.returncode == 1, result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "could not be written" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
