"""The page of docs/results on GUE: what is run for it, and what it says of results."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from launchers.gue import main


def spread(mean: float | None) -> dict[str, Any]:
    return {"mean": mean, "deviation": 0.01, "lowest": mean, "highest": mean, "seeds": 3}


def result(out: Path, way: str, task: str, mcc: float, collapsed: list[int], **beside: float) -> None:
    path = out / way / task / "run" / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"metrics": {"mcc": spread(mcc)}, "collapsed_seeds": collapsed,
                                "baselines": {name: {"mcc": spread(value)} for name, value in beside.items()}}))


def arguments(tmp_path: Path, *more: str) -> list[str]:
    return ["--genomes", "human=chr2.fa.gz", "yeast=r64.fa.gz", "--gue", "GUE", "--out", f"{tmp_path}/out", "--docs",
            f"{tmp_path}/docs", *more]


def test_the_page_says_where_the_model_is_better(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(tmp_path, "--page")) == 2
    assert "has no results of a task: run it first" in capsys.readouterr().err
    out = tmp_path / "out"
    result(out, "all", "mouse/0", 0.5, [], scratch=0.3, kmers=0.4, cnn=0.35)
    result(out, "all", "mouse/2", 0.6, [1], scratch=0.5, kmers=0.7, cnn=0.55)
    result(out, "lora", "mouse/0", 0.45, [])
    result(out, "bases", "mouse/0", 0.25, [])
    for model, seconds in (("pretrained", 1800.0), ("pretrained-bases", 660.0)):
        (out / model).mkdir()
        (out / model / "summary.json").write_text(json.dumps({"seconds": seconds}))
    assert main(arguments(tmp_path, "--page")) == 0
    text = (tmp_path / "docs/gue.md").read_text("utf-8")
    assert "were pretrained for 30 minutes and 11 minutes, on 2 processes, on human, yeast," in text
    assert ("| mouse/0 | **0.500 ± 0.010** | 0.450 ± 0.010 | 0.250 ± 0.010 | 0.300 ± 0.010 | 0.400 ± 0.010 "
            "| 0.350 ± 0.010 |") in text
    assert "| mouse/2 | 0.600 ± 0.010 (1 collapsed) |  |  | 0.500 ± 0.010 | **0.700 ± 0.010** | 0.550 ± 0.010 |" in text
    assert "- Fine-tuned beside k-mers: better on 1 of 2 tasks, +0.000 on average." in text
    assert "- Fine-tuned beside from nothing: better on 2 of 2 tasks, +0.150 on average." in text
    rows = list(csv.DictReader((tmp_path / "docs/gue.csv").open(encoding="utf-8")))
    assert [(row["task"], row["model"], row["mean"]) for row in rows if row["model"] == "kmers"] == [
        ("mouse/0", "kmers", "0.4"), ("mouse/2", "kmers", "0.7")]
    assert (tmp_path / "docs/gue.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(tmp_path, "--dry-run", "--tasks", "mouse/2", "optim.lr=0.002")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [words.split()[1] for words in lines if "torchrun" not in words] == [
        "shards/build.py", *["launchers/suite.py"] * 4]
    assert all("--most 2000 --tasks mouse/2" in line and line.endswith("optim.lr=0.001 optim.lr=0.002")
               for line in lines[3:])
    (tmp_path / "out" / "shards").mkdir(parents=True)
    assert main(arguments(tmp_path, "--dry-run")) == 0
    assert "shards/build.py" not in capsys.readouterr().out, "shards that are there are not built again"
    with pytest.raises(SystemExit, match="2"):
        main(arguments(tmp_path, "--steps", "1"))
