"""The page of docs/results on the needle: what is run for it, and what it says of answers."""

import json
from pathlib import Path

import pytest

from benchmarks.needle import STAGES
from hyena_dist.config.load import load_config
from hyena_dist.config.presets import find
from hyena_dist.tasks.needle_size import NeedleSize
from launchers.long_context import main


def answers(path: Path, right: dict[int, int], count: int) -> None:
    """Of each slice so many sequences, of which the first are answered right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"slice-{part}-at-{2048 * part + number}\t1\t{int(number < right[part])}" for part in right
             for number in range(count)]
    path.write_text("\n".join(["name\tlabel\tpredicted", *lines]) + "\n")


def test_the_page_says_how_many_were_right_of_each_slice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, docs = tmp_path / "out", tmp_path / "docs"
    arguments = ["--out", str(out), "--docs", str(docs), "--page"]
    assert main(arguments) == 2
    assert "8k-one/seed-0/predictions.tsv: is not there: run it first" in capsys.readouterr().err
    answers(out / "8k-one/seed-0/predictions.tsv", {0: 19, 1: 20, 2: 18}, 20)
    answers(out / "cut.tsv", {0: 9, 1: 10, 2: 12}, 20)
    for stage in STAGES:
        (out / stage.name / "seed-0").mkdir(parents=True, exist_ok=True)
        (out / stage.name / "seed-0/summary.json").write_text(json.dumps({"seconds": 90.0}))
    assert main(arguments) == 0
    text = (docs / "needle.md").read_text("utf-8")
    assert "| rank 0 | 19 of 20, 95.0% | 45.0% |" in text
    assert "| rank 2 | 18 of 20, 90.0% | 60.0% |" in text
    assert "| all | 57 of 60 | 51.7% |" in text
    assert "together 9 minutes" in text
    assert (docs / "needle.png").read_bytes().startswith(b"\x89PNG")


def test_every_stage_is_one_that_its_commands_accept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--dry-run"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    tables = [line[line.index("needle") + 2 :] for line in lines if "needle" in line]
    numbers = [dict(zip(words[::2], map(int, words[1::2]), strict=True)) for words in tables]
    for number in numbers:
        NeedleSize(**{name.removeprefix("--"): value for name, value in number.items()
                      if name not in ("--train", "--valid", "--test")})
    assert [number["--length"] for number in numbers] == [256, 1024, 2048, 4096, 8192, 8192]
    assert numbers[-1]["--test"] == 3000
    assert "--copies" not in numbers[-1]
    runs = [line for line in lines if "launchers/finetune.py" in line]
    for run in runs:
        load_config(find("finetune/needle"), [word for word in run if "=" in word and not word.startswith("--")])
    sources = [word.removeprefix("finetune.from=") for run in runs for word in run if word.startswith("finetune.from=")]
    assert sources == [str(tmp_path / stage.name / "seed-0") for stage in STAGES[:-1]], "each goes on from the last"
