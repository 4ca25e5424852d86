"""The first and the last thing that a run says."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hyena_dist.config.load import load_config
from hyena_dist.config.schema import Config
from hyena_dist.costs.memory import run_memory
from hyena_dist.model.model import build_model
from hyena_dist.parallel.groups import Groups
from hyena_dist.train.banner import banner, last_line
from hyena_dist.train.wording import amount, binary, counted, duration

ROOT = Path(__file__).parents[2]
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def config_of(run_dir: Path, *overrides: str, shards: Path | str = "nowhere") -> Config:
    return load_config(ROOT / "configs" / "quickstart.yaml",
                       [f"train.run_dir={run_dir}", f"data.shards={shards}", *overrides])


def lines_of(config: Config, ranks: int = 1) -> dict[str, str]:
    found = (re.fullmatch(r"(\S+) +(.*)", line) for line in banner(config, {**ALONE, "WORLD_SIZE": str(ranks)}))
    return {match[1]: match[2] for match in found if match}


def test_it_says_what_will_run(shards: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", "train.steps=100", shards=shards)
    said = lines_of(config)
    assert said["run"] == f"{tmp_path / 'run'}, a fresh start"
    model = build_model(config, Groups.single())
    assert said["model"].startswith(f"{sum(weight.numel() for weight in model.parameters()):,} parameters, 2 layers")
    assert said["step"] == "8 windows of 1,024 = 8,192 tokens, 4 windows at a time on each data rank, 2 times"
    assert re.fullmatch(r"100 steps = 819 thousand tokens, 0\.\d+ epochs of \d+ thousand training bases",
                        said["length"])
    often = lines_of(config_of(tmp_path / "run", "train.steps=100000", shards=shards))["length"]
    assert re.search(r" epochs of .* training bases: past about 4 times the same bases teach little more$", often)
    assert said["device"].startswith("CPU, ")
    assert said["ranks"] == "1, deepspeed ZeRO 1, fp32"
    assert said["memory"].startswith("about "), said["memory"]
    assert not (tmp_path / "run").exists(), "nothing is made yet"


def test_ranks_and_stages_and_shards_that_are_not_there_yet(tmp_path: Path) -> None:
    config = config_of(tmp_path, "parallel.tensor=2", "parallel.context=2", "train.precision=bf16", "engine.name=fsdp",
                       "train.seq_len_warmup=[{seq_len: 64, steps: 10}, {seq_len: 256, tokens: 20480}]")
    said = lines_of(config, ranks=8)
    assert said["ranks"] == "8 = 2 data x 2 tensor x 2 context, fsdp, bf16"
    assert said["length"] == ("480 steps = 3.79 million tokens, the first 20 steps at 64 256; nowhere cannot be read "
                              "yet")
    whole, shared = (run_memory(config_of(tmp_path, f"parallel.context={ranks}"), device="cuda", world_size=ranks)
                     for ranks in (1, 2))
    assert 0.45 * whole.saved < shared.saved < 0.55 * whole.saved


@pytest.mark.parametrize(("resume", "saved", "said"), [
    ("auto", [], "a fresh start"), ("none", [], "a fresh start"), ("/old/step-00000007", [], "a branch of "
                                                                   "/old/step-00000007"),
    ("weights:/old", [], "a fresh start with the weights of /old"),
    ("auto", [5, 40], "which goes on from step 40 of 480"), ("/old", [5], "which goes on from step 5 of 480"),
    ("none", [5], "a fresh start")])
def test_how_it_starts(tmp_path: Path, resume: str, saved: list[int], said: str) -> None:
    for step in saved:
        checkpoint = tmp_path / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "COMPLETE").touch()
    for unfinished in ("step-00000050", "step-00000060.tmp-1", "step-x"):
        (tmp_path / "checkpoints" / unfinished).mkdir(parents=True)
    assert lines_of(config_of(tmp_path, f"train.resume={resume}"))["run"] == f"{tmp_path}, {said}"


def test_it_comes_before_the_imports_that_take_seconds() -> None:
    """What is fast is for `launchers/bench.py start` to measure; what is not imported can be told exactly."""
    code = ("import sys, hyena_dist.train.banner\n"
            "print([name for name in ('deepspeed', 'megatron', 'webdataset', 'tensorboard', 'matplotlib') "
            "if name in sys.modules], 'torch' in sys.modules)")
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[] True"


def test_the_last_line_says_where_everything_is() -> None:
    said = last_line(Path("runs/a"), steps=480, seconds=232.4, rate=17000.4, final=3.52104, best=3.5,
                     report=Path("runs/a/report.png"))
    assert said == ("done: 480 steps in 3 min 52 s at 17,000 tokens/s, validation perplexity 3.5210, the best 3.5000; "
                    "in runs/a: report.png, metrics.jsonl, tensorboard/, summary.json, checkpoints/")
    bare = last_line(Path("a"), steps=1, seconds=7, rate=None, final=math.nan, best=math.inf, report=None)
    assert bare == "done: 1 steps in 7 s; in a: metrics.jsonl, tensorboard/, summary.json, checkpoints/"


def test_numbers_as_people_read_them() -> None:
    assert [duration(s) for s in (0.4, 59.6, 3600, 7500, 100_000)] == ["0 s", "1 min", "1 h", "2 h 5 min", "1 d 3 h"]
    assert [amount(n) for n in (7, 8192, 99_999, 163_840, 3.93e6, 3.1e9, 2e12)] == [
        "7", "8,192", "99,999", "164 thousand", "3.93 million", "3.1 billion", "2 trillion"]
    assert binary(300_000) == "293 KiB"
    assert [counted(number, "layer") for number in (0, 1, 2, 1234)] == ["0 layers", "1 layer", "2 layers",
                                                                        "1,234 layers"]
    assert [binary(size) for size in (2**20, 2**29, 2**30, 80 * 2**30)] == ["1 MiB", "512 MiB", "1.0 GiB", "80.0 GiB"]


def test_the_quickstart_keeps_an_earlier_run_and_shards_that_are_there(tmp_path: Path) -> None:
    """What make would run, with the commands that take long answered by the shell alone."""
    def quickstart() -> str:
        environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        made = subprocess.run(["make", "-s", "-o", "setup", f"BIN={tmp_path / 'bin'}", f"RUN={tmp_path / 'run'}",
                               f"SHARDS={tmp_path / 'shards'}", "CURDIR=", "quickstart"], cwd=ROOT, text=True,
                              env=environment, capture_output=True, check=True)
        return made.stdout

    (tmp_path / "bin").mkdir()
    for name in ("python", "deepspeed"):
        command = tmp_path / "bin" / name
        command.write_text(f'#!/bin/sh\necho "{name} $*"\n')
        command.chmod(0o755)
    first = quickstart()
    assert "python shards/build.py" in first
    assert "is kept" not in first
    (tmp_path / "shards").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    second = quickstart()
    assert f"{tmp_path / 'run'} is kept, and goes on from its newest checkpoint" in second
    assert "python shards/build.py" not in second
    assert "python shards/verify.py" in second
    assert "deepspeed" in second
    assert (tmp_path / "run" / "mine").exists()
