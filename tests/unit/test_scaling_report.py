"""The report of a sweep: which rows count, what is computed of them, and that it is said where nothing can be."""

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyena_dist.cli.scaling import main as scaling_command
from hyena_dist.cli.sweep import main as sweep_command
from hyena_dist.config.errors import ConfigError
from hyena_dist.tasks.scaling import pictures
from hyena_dist.tasks.scaling.analysis import analyse
from hyena_dist.tasks.scaling.fit import Law
from hyena_dist.tasks.scaling.optimum import Cost, fit_cost, parabolas
from hyena_dist.tasks.scaling.points import ANCHORS, choose, groups_by_flops, read_points
from hyena_dist.tasks.scaling.report import report, write_report
from hyena_dist.tasks.scaling.shapes import depth_map
from hyena_dist.tasks.sweep.expand import expand
from hyena_dist.tasks.sweep.file import read_sweep
from hyena_dist.tasks.sweep.point import costs
from hyena_dist.tasks.sweep.state import new_state

ROOT = Path(__file__).parents[2]


def row(number: int, **given: Any) -> dict[str, Any]:
    """A finished point of a sweep of small models."""
    return {"id": f"p{number:02d}", "status": "finished", "error": None, "seed": 0, "set": {"model.hidden_size": 64},
            "run_dir": f"runs/s/p{number:02d}", "params": 50000, "params_non_embedding": 40000, "flops": 1e13,
            "tokens": 3000000, "unique_tokens": 6e6, "epochs": 0.5, "seconds": 60.0, "mfu": 0.3, "loss": 1.3,
            "perplexity": 3.7, "val": {}, "metric": None, "steps": 100, "seq_len": 1024, "hidden_size": 64,
            "num_layers": 2, "lr": 1e-3, "forked_from": None, **given}


def sweep(lengths: tuple[int, ...] = (1024,), sizes: int = 6) -> list[dict[str, Any]]:
    """Runs whose loss and operations are known functions of weights, tokens and length, to 0.1 %."""
    rng, rows = np.random.default_rng(0), []
    for budget in np.geomspace(1e12, 1e15, 5):
        best = (budget / 50) ** 0.5 / 12
        for size in best * np.geomspace(1 / 4, 4, sizes):
            for length in lengths:
                tokens = budget / (40 * size**0.8 * (length / 1024) ** 0.1)
                loss = (1.2 + 3 * size**-0.4 + 40 * tokens**-0.45 + 2 * length**-0.6) * (
                    1 + 1e-3 * rng.standard_normal())
                rows.append(row(len(rows), params=size, tokens=tokens, flops=budget, budget=budget, loss=loss,
                                seq_len=length, num_layers=2 + len(rows) % 2, unique_tokens=10 * tokens, epochs=0.1,
                                metric={"name": "AUROC", "value": 2 - loss}))
    return rows


def test_rows_are_left_out_by_rules_and_each_is_named_with_its_reason() -> None:
    rows = [row(0), row(1, loss=1.31), row(2, status="failed", error="out of\nmemory", loss=None),
            row(3, status="diverged", loss=None), row(4, status="running"), row(5, loss=None), row(6, loss=math.nan),
            row(7, steps=5, loss=1.32), row(8), row(9, params=0), row(10, status="planned"),
            row(11, steps=None, loss=1.4)]
    points, left = choose(rows, min_steps=10)
    assert [point.id for point in points] == ["p00", "p01"]
    assert {item.id: item.reason for item in left} == {
        "p02": "failed: out of memory", "p03": "diverged, not finished", "p04": "running, not finished",
        "p05": "no final validation loss", "p06": "its final validation loss is nan",
        "p07": "5 steps, fewer than 10",
        "p08": "the same run as p00: size, tokens, operations, seed and loss are equal",
        "p09": "its number of weights is 0", "p10": "planned, not finished",
        "p11": "no number of steps, and fewer than --min-steps are left out"}
    assert "p11" in [point.id for point in choose(rows)[0]], "nobody has asked for its steps"
    assert [point.id for point in choose([row(0), row(1, loss=99.0)])[0]] == ["p00", "p01"], "none for its loss"
    with pytest.raises(ConfigError, match="no run is left to report on"):
        analyse([row(0, status="failed")])


def test_forks_belong_to_the_run_that_they_began_as() -> None:
    rows = [row(0), row(1, forked_from="p00", loss=1.29), row(2, forked_from="runs/s/p01", loss=1.28),
            row(3, loss=1.27), row(4, forked_from="p05", loss=1.2), row(5, forked_from="p04", loss=1.1)]
    families = [point.family for point in choose(rows)[0]]
    assert families[:4] == ["p00", "p00", "p00", "p03"]
    assert len(families) == 6, "a ring ends"


def test_a_csv_of_somebody_else_is_read(tmp_path: Path) -> None:
    file = tmp_path / "runs.csv"
    file.write_text("params_planned,tokens_planned,val,budget,step\n1e6,2e7,3.0,1e15,\n2e6,1e7,2.9,1e15,7\n", "utf-8")
    rows = read_points(file, {"loss": "val", "flops": "budget", "steps": "step"})
    assert [(r["id"], r["params"], r["loss"], r["flops"], r["steps"]) for r in rows] == [
        ("line 2", 1e6, 3.0, 1e15, None), ("line 3", 2e6, 2.9, 1e15, 7.0)]
    for text, columns, message in (
            ("params,tokens\n1,2\n", {}, "has no column for loss: it has params, tokens: say which it is with --col"),
            ("params,tokens,loss\n1,2,x\n", {}, "line 2: its loss, 'x', is no number"),
            ("params,tokens,loss,lr\n1,2,3,1e-61\n", {}, "line 2: its lr, 1e-61, is what no run has"),
            ("params,tokens,loss\n1,2,3\n1,2,-1e61\n", {}, "line 3: its loss, -1e61, is what no run has"),
            ("params,tokens,loss\n1,2\n", {}, "line 2: has another number of columns"),
            ("params,tokens,loss\n1,2,3\n", {"flops": "C"}, "has no column 'C'"),
            ("params,tokens,loss\n1,2,3\n", {"size": "params"}, "there is no size to read"),
            ("params,tokens,loss,loss\n1,2,3,4\n", {}, "has the column 'loss' twice"),
            ("\xff", {}, "has no column for params")):
        file.write_bytes(text.encode("utf-8"))
        with pytest.raises(ConfigError, match=message):
            read_points(file, columns)
    file.write_bytes(b"params\xff")
    with pytest.raises(ConfigError, match="is no CSV of UTF-8"):
        read_points(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_points(tmp_path / "none.csv")


def test_points_of_a_sweep_are_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no points/\*/point.json"):
        read_points(tmp_path)
    for number in range(2):
        (tmp_path / "points" / f"p{number:02d}").mkdir(parents=True)
        (tmp_path / "points" / f"p{number:02d}" / "point.json").write_text(json.dumps(row(number)), "utf-8")
    assert [r["id"] for r in read_points(tmp_path)] == ["p00", "p01"]
    (tmp_path / "points" / "p01" / "point.json").write_text("{", "utf-8")
    with pytest.raises(ConfigError, match=r"p01/point.json: is no state of a point .*: delete it, and the point goes"):
        read_points(tmp_path)


WRONG = [("steps", -1), ("steps", 0), ("steps", 1.5), ("steps", True), ("params", 10**400), ("params", -5),
         ("params", 10**5000), ("flops", 1e61), ("flops", 0), ("lr", 1e-61), ("lr", "1e-3"), ("tokens", None),
         ("set", "x"), ("status", "done"), ("status", ["finished"]), ("loss", "1.3"), ("loss", 1e300), ("loss", 1e-300),
         ("loss", None), ("metric", 0.9), ("metric", {"name": "AUROC", "value": "x"}), ("metric", {"value": 1}),
         ("epochs", -0.5), ("seconds", "60"), ("val", [1]), ("error", 7), ("seed", -1), ("budget", 0),
         ("forked_from", 3), ("fork_at", 0), ("unique_tokens", {}), ("mfu", -0.1), ("run_dir", 1), ("id", "p01")]


def test_a_point_that_none_can_be_is_refused_by_whoever_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The report reads points as `status` does: one line that names the file, the key and what to do."""
    config, file = tmp_path / "sweep.yaml", tmp_path / "points" / "p00" / "point.json"
    config.write_text(f"base: quickstart\nruns: {tmp_path}\n", "utf-8")
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(row(0)), "utf-8")
    commands = [["status", "--config", str(config)], ["report", "--config", str(config)]]
    assert [sweep_command(words) for words in commands] == [0, 0], "the control"
    assert scaling_command(["fit", str(tmp_path), "--out", str(tmp_path / "r")]) == 0
    sys.set_int_max_str_digits(0)
    try:
        texts = [(key, json.dumps({**row(0), key: value})) for key, value in WRONG]
    finally:
        sys.set_int_max_str_digits(4300)
    for key, text in texts:
        file.write_text(text, "utf-8")
        capsys.readouterr()
        codes = [sweep_command(words) for words in commands]
        codes.append(scaling_command(["fit", str(tmp_path), "--out", str(tmp_path / "r")]))
        said = capsys.readouterr().err.splitlines()
        assert (codes, len(said), len(set(said))) == ([2, 2, 2], 3, 1), (key, text[-80:], said)
        assert said[0].startswith(f"error: {file}: is "), said[0]
        assert said[0].endswith(": delete it, and the point goes on from the checkpoints of its run")
        assert len(said[0]) < len(str(file)) + 300


def test_operations_are_the_runs_own_and_not_six_times_weights_and_tokens() -> None:
    points, _ = choose(sweep(lengths=(1024, 4096)))
    cost = fit_cost(points)
    assert cost is not None
    assert (cost.factor * (1 / 4) ** 0.1, cost.power, cost.of_length) == pytest.approx((40, 0.8, 0.1))
    assert cost.length == 4096
    assert cost.worst < 1e-9
    assert cost.per_token(np.array([1e4]), 1024)[0] == pytest.approx(40 * 1e4**0.8)
    assert fit_cost(choose([row(i, flops=None, loss=1 + i / 10) for i in range(5)])[0]) is None


def test_the_best_size_is_the_lowest_of_the_law_along_its_budget() -> None:
    found = analyse(sweep(), resamples=100, budgets=[1e14, 1e17])
    assert found.main is not None
    assert found.allocation is not None
    law: Law = found.main.law
    cost: Cost = found.allocation.cost
    for best in found.allocation.rows:
        sizes = best.size * np.geomspace(0.5, 2, 2001)
        losses = law(np.column_stack([sizes, best.flops / cost.per_token(sizes)]))
        assert sizes[losses.argmin()] == pytest.approx(best.size, rel=1e-3)
        assert losses.min() == pytest.approx(best.loss)
        assert best.size_interval.low < best.size < best.size_interval.high
        assert best.tokens * cost.per_token(np.array([best.size]))[0] == pytest.approx(best.flops)
    low, high = found.allocation.rows
    assert math.log10(high.size / low.size) / 3 == pytest.approx(found.allocation.size_power, rel=1e-6)
    assert math.log10(high.tokens / low.tokens) / 3 == pytest.approx(found.allocation.tokens_power, rel=1e-6)
    assert any("100 times" in warning and "extrapolation" in warning for warning in found.warnings)


def test_a_parabola_without_a_lowest_point_among_its_sizes_is_not_bracketed() -> None:
    rows = [r for r in sweep() if r["params"] < 0.8 * (r["budget"] / 50) ** 0.5 / 12]
    rows += [row(90 + i, params=s, tokens=1e5, flops=9e15, budget=9e15, loss=1.5 + (i + 1) ** 2 / 10) for i, s in
             enumerate((1e6, 2e6, 4e6, 9e6))]
    curves = parabolas(choose(rows)[0])
    assert curves[-1].size is None
    found = analyse(rows, resamples=5)
    assert any("not bracketed at 9e+15" in warning and "add smaller sizes" in warning for warning in found.warnings)
    whole = parabolas(choose(sweep())[0])
    assert sum(curve.size is not None for curve in whole) >= 3, "the control"
    assert len(groups_by_flops(choose([row(i, budget=None, flops=1e13 * 1.1**i, loss=1 + i / 9) for i in range(9)])[0])
               ) == 1, "without planned budgets, operations without a gap are one"


def test_epochs_are_told_apart_and_warned_of() -> None:
    rows = sweep()
    for r in rows[::6]:
        r["epochs"], r["loss"] = 6.0, r["loss"] * 1.1
    found = analyse(rows, resamples=5)
    assert [fitted.name for fitted in found.fits] == ["runs of at most one epoch", "all runs"]
    assert found.fits[0].law.runs == 25
    text = " ".join(found.warnings)
    assert "5 runs read their data more than 4 times" in text
    assert "fitted apart" in text
    assert not any("epoch" in w or "read their data" in w for w in analyse(sweep(), resamples=20).warnings)


def test_runs_are_told_apart_only_where_either_part_varies_as_all_do(tmp_path: Path) -> None:
    """What repeats its data has the most tokens: the rest have one number of tokens, and no law in them."""
    rows = [row(10 * i + j, params=10000 * 2**i, tokens=1000000 * 2**j, epochs=0.4 * 2**j, flops=1e12 * 2.0**(i + j),
                loss=1.2 + 3 * (1e4 * 2**i)**-0.3 + 20 * (1e6 * 2**j)**-0.4) for i in range(6) for j in (1, 2, 3)]
    found = analyse(rows, resamples=5)
    assert [fitted.name for fitted in found.fits] == ["all runs"]
    assert found.fits[0].law.axes == ("N", "D")
    assert any("too few of either to fit them apart" in warning for warning in found.warnings)
    report([{**r, "tokens": 2000000} for r in rows[::3]], tmp_path)  # weights alone vary: a profile of one exponent
    assert (tmp_path / "profile.png").exists()
    assert "L = E + A N^-a`" in (tmp_path / "report.md").read_text("utf-8")


def test_seeds_are_a_mean_and_no_more_tries() -> None:
    rows = [row(i, loss=loss, seed=i % 2, set={"data.seq_len": length, "train.seed": i % 2}, seq_len=length,
                num_layers=depth) for i, (length, depth, loss) in enumerate(
                    [(256, 1, 1.30), (256, 1, 1.36), (1024, 1, 1.31), (256, 2, 1.32), (1024, 2, 1.29)])]
    depths, lengths, losses = depth_map(choose(rows)[0])
    assert (depths, lengths) == ([1, 2], [256, 1024])
    assert losses.tolist() == [[pytest.approx(1.33), 1.31], [1.32, 1.29]]


def test_a_report_is_written_with_every_picture_and_full_precision(tmp_path: Path) -> None:
    rows = [*sweep(lengths=(256, 1024, 4096), sizes=4), row(99, status="failed", error="killed", loss=None)]
    found, files = report(rows, tmp_path / "out", budgets=[1e15, 1e18])
    assert {file.name for file in files} == {"report.md", "points.csv", "laws.csv", "loss.png", "optimum.png",
                                             "isoflops.png", "profile.png", "residuals.png", "depth.png", "metric.png"}
    assert all(file.stat().st_size > 0 for file in files)
    text = (tmp_path / "out" / "report.md").read_text("utf-8")
    for said in ("# out", "60 finished runs, and 1 left out", "| p99 | failed: killed |", "exponent of length",
                 "## Length at fixed compute", "## Depth and length", "## AUROC beside the loss", "1,000 times"):
        assert said in text or said == "1,000 times" and "1e+03 times" in text, said
    assert all(f"({file.name})" in text for file in files if file.suffix == ".png")
    with (tmp_path / "out" / "laws.csv").open(encoding="utf-8") as file:
        numbers = {line["number"]: line for line in csv.DictReader(file)}
    assert found.main is not None
    assert float(numbers["exponent of N"]["least squares"]) == found.main.law.exponents[0]
    with (tmp_path / "out" / "points.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert (len(lines), lines[-1]["left out"]) == (61, "failed: killed")
    assert abs(float(lines[0]["residual"])) < 0.01


def test_few_runs_get_a_report_that_says_what_they_do_not_say(tmp_path: Path) -> None:
    report(sweep(sizes=3)[:14], tmp_path)
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "**not identified**: 14 independent runs, and at least 25 are needed" in text
    assert "profile.png" in text
    assert (tmp_path / "profile.png").exists()
    report([row(0), row(1, loss=1.2)], tmp_path)
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "There is no law: all runs: neither weights nor tokens nor length has three values" in text
    assert not (tmp_path / "profile.png").exists(), "a picture of other runs does not stay"


@pytest.mark.parametrize("tokens", [1, 2], ids=["one token count", "several"])
def test_a_colour_bar_is_of_several_values_and_a_title_of_a_law_that_is_drawn(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    from matplotlib.figure import Figure
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    monkeypatch.setattr(pictures, "write_whole", lambda path, write: write(path))
    rows = [row(i, params=10**5 * 2**i, tokens=12_288 * 2**(i % tokens), loss=1.2 + 0.3 / 2**(0.3 * i))
            for i in range(6)]
    pictures.draw_loss(analyse(rows, resamples=5), tmp_path / "loss.png")
    panels = [axes for axes in drawn[0].axes if axes.get_title(loc="left")]
    bars = [axes.get_ylabel() for axes in drawn[0].axes if axes not in panels]
    texts = [text.get_text() for axes in panels for text in axes.texts]
    assert ("training tokens D" in bars) == (tokens > 1)
    assert ("training tokens D: 12,288 in every run" in texts) == (tokens == 1)
    title = drawn[0].get_suptitle()
    assert ("law" in title) == any(axes.lines for axes in panels)


def test_without_matplotlib_there_is_a_report_without_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                               caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _, files = report(sweep(), tmp_path)
    assert [file.name for file in files] == ["report.md", "points.csv", "laws.csv"]
    assert "pip install 'hyena-dist[plots]'" in caplog.text
    assert ".png" not in (tmp_path / "report.md").read_text("utf-8")


def test_published_optima_are_read() -> None:
    from hyena_dist.tasks.scaling import budgets
    optima = budgets.evo_optima()
    assert list(optima) == ["Transformer++", "Hyena", "StripedHyena"]
    flops, sizes = optima["Hyena"]["params"]
    assert (len(flops), sizes[0]) == (4, pytest.approx(67.65e6, rel=1e-3))
    assert len(budgets.chinchilla_optima()["params"][0]) == 9
    assert set(budgets.PUBLISHED) == set(optima)
    assert (ANCHORS / "README.md").exists()
    assert pictures.LABELS["N"] == "weights N"


def test_the_points_of_the_sweep_command_are_what_is_read(tmp_path: Path) -> None:
    """Its own states, of a run that is finished and of one that has only been planned."""
    sweeps = ROOT / "configs" / "studies" / "learning-rate.yaml"
    points = expand(read_sweep(sweeps))
    assert len(points) == 18
    assert [point.problem for point in points] == [None] * 18
    for number, point in enumerate(points):
        state = new_state(point, costs(point.config, ranks=1))
        if number:
            state |= {"status": "finished", "loss": 1.3 + number / 100, "seconds": 1.0}
        (tmp_path / "points" / point.id).mkdir(parents=True)
        (tmp_path / "points" / point.id / "point.json").write_text(json.dumps(state), "utf-8")
    files = write_report(tmp_path, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "17 finished runs, and 1 left out by rule. The lowest validation loss is 1.3100" in text
    assert f"| {points[0].id} | planned, not finished |" in text
    assert "(hidden_size=32, lr=0.001)" in text, "and not what was set for all alike"
    assert "3 combinations of size, tokens and length were trained at several learning rates" in text
    assert tmp_path / "report" / "report.md" in files
