"""A suite as a person runs it: child runs fill a table beside published numbers, and what is killed goes on."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hyena_dist.cli.suite import main
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.convert import write_model
from hyena_dist.model.model import build_model
from hyena_dist.parallel.groups import Groups

TINY = ["finetune.epochs=1", "finetune.seeds=2", "train.micro_batch_size=8", "train.global_batch_size=8",
        "optim.lr=0.02", "model.embed_dropout=0"]


def gue(directory: Path, *tasks: str) -> Path:
    """Sequences whose class is whether they are rich in G and C."""
    rng = np.random.default_rng(0)
    for task in tasks:
        (directory / task).mkdir(parents=True)
        for name, count in (("train", 24), ("dev", 8), ("test", 8)):
            odds = ((.1, .4, .4, .1), (.4, .1, .1, .4))
            rows = [f"{''.join(rng.choice(list('ACGT'), 40, p=odds[n % 2]))},{n % 2}" for n in range(count)]
            (directory / task / f"{name}.csv").write_text("\n".join(["sequence,label", *rows]) + "\n", encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    section = ModelSection(num_layers=1, hidden_size=16, max_seq_len=64, filter_order=8)
    write_model(path, "safetensors", section, build_model(Config(model=section), Groups.single()))
    return path


def command(data: Path, model: Path, out: Path, *more: str) -> list[str]:
    return ["gue-dnabert2", "--data", str(data), "--from", str(model), "--out", str(out), "--most", "20", *more, *TINY]


def test_a_suite_fills_its_table_once(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = gue(tmp_path / "GUE", "mouse/0"), tmp_path / "out"
    broken = tmp_path / "GUE" / "mouse" / "2"
    broken.mkdir()
    for name in ("train", "dev", "test"):
        (broken / f"{name}.csv").write_text("sequence,label\nAC-T,1\n", encoding="utf-8")
    assert main([*command(data, model, out), "--dry-run"]) == 2
    said = capsys.readouterr()
    assert "mouse/0: 24 train, 8 valid, 8 test; at most 40 bases; labels 0, 1; mcc; 1 settings, 0 of them" in said.out
    assert "mouse/2: error: " in said.err
    assert "missing: the files of EMP/H3, " in said.out
    assert not out.exists(), "a dry run writes nothing"

    assert main(command(data, model, out)) == 2, "for the task whose files are broken"
    page = (out / "table.md").read_text("utf-8")
    assert "`--most=20`" in page
    assert "mouse/0: 20 of 24 training sequences were drawn at random" in page
    assert len((out / "mouse/0/table/train.csv").read_text("utf-8").splitlines()) == 21
    assert "Protocol **gue-dnabert2**" in page
    assert "**Changed by the command, so not this protocol:** `finetune.epochs=1`" in page
    assert "mouse/2: refused: " in page
    assert "tf/4: missing: " in page
    rows = {row["task"]: row for row in csv.DictReader((out / "table.csv").open(encoding="utf-8"))}
    result = json.loads((out / "mouse/0/run/result.json").read_text("utf-8"))
    assert float(rows["mouse/0"]["mean"]) == result["metrics"]["mcc"]["mean"]
    assert float(rows["mouse/0"]["kmers"]) == result["baselines"]["kmers"]["mcc"]["mean"]
    assert (rows["mouse/0"]["state"], rows["mouse/0"]["seeds"]) == ("done", "2")
    assert float(rows["mouse/0"]["published: DNABERT-2 (117M)"]) == 0.5676
    assert rows["mouse/1"]["state"] == "missing"
    assert (out / "table.png").read_bytes().startswith(b"\x89PNG")

    before = (out / "mouse/0/run/log.txt").read_bytes()
    os.utime(data / "mouse/0/test.csv", (0, 0))  # a copy has other times
    assert main(command(data, model, out, "--tasks", "mouse/0")) == 0
    assert (out / "mouse/0/run/log.txt").read_bytes() == before, "what is finished is not run again"
    capsys.readouterr()
    assert main([*command(data, model, out, "--tasks", "mouse/0"), "optim.weight_decay=0"]) == 2
    assert "has results of changes" in capsys.readouterr().err
    (data / "mouse/0/test.csv").write_text("sequence,label\nACGT,1\nCCCC,0\n", encoding="utf-8")
    assert main(command(data, model, out, "--tasks", "mouse/0")) == 2
    assert "was made of other files than those of mouse/0" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_suite_that_was_killed_goes_on(tmp_path: Path, model: Path, number: signal.Signals) -> None:
    data, out = gue(tmp_path / "GUE", "mouse/0", "mouse/2"), tmp_path / "out"
    words = [sys.executable, "launchers/suite.py", *command(data, model, out, "--tasks", "mouse/0", "mouse/2")]
    started = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": "."})
    begun = out / "mouse/2/run/seed-0/metrics.jsonl"
    while not begun.exists():
        assert started.poll() is None
        time.sleep(0.05)
    started.send_signal(number)
    assert started.wait(60) == (85 if number == signal.SIGTERM else -number)
    first = (out / "mouse/0/run/result.json").stat().st_mtime_ns
    assert not (out / "mouse/2/run/result.json").exists(), "the control: it was not finished"
    assert subprocess.run(words, env={**os.environ, "PYTHONPATH": "."}, check=False).returncode == 0
    assert (out / "mouse/0/run/result.json").stat().st_mtime_ns == first
    rows = {row["task"]: row["state"] for row in csv.DictReader((out / "table.csv").open(encoding="utf-8"))}
    assert rows == {"mouse/0": "done", "mouse/2": "done"}
