"""report.png: what is drawn of short, long, resumed and strange runs, asked of the figure itself."""

import json
import logging
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from hyena_dist.train.ending import report_of
from hyena_dist.train.history import HISTORY, note_start
from hyena_dist.train.metrics import METRICS
from hyena_dist.train.report import EASIER, EVALUATION, running_median, write_report
from hyena_dist.train.row_file import content_of


def line(step: int, perplexity: float, split: str = "train", **more: Any) -> str:
    row = {"step": step, "split": split, "loss": math.log(perplexity), "perplexity": perplexity, "tokens": 8192 * step,
           "scored": 8000, "seq_len": 1024, "lr": 1e-3, "grad_norm": 2.0, "tokens_per_second": 9e3, "epoch": step / 300,
           "peak_memory_bytes": 2**30, "time": 1e9 + step, **more}
    if split == "val":
        row |= {"lr": None, "grad_norm": None, "tokens_per_second": None}
    return json.dumps(row)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, as matplotlib has them."""
    found: list[Figure] = []
    save = Figure.savefig

    def kept(figure: Figure, *args: Any, **kwargs: Any) -> None:
        found.append(figure)
        save(figure, *args, **{**kwargs, "dpi": 20})  # of which nothing is looked at: small ones are fast

    monkeypatch.setattr(Figure, "savefig", kept)
    return found


def draw(run_dir: Path, figures: list[Figure], *lines: str) -> Figure:
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    path = write_report(run_dir)
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")
    return figures[-1]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


@pytest.mark.parametrize(("steps", "label"), [(1, "training"), (19, "training"), (20, "training (median of 3 steps)"),
                                              (480, "training (median of 31 steps)")])
def test_a_median_is_as_short_as_the_run(tmp_path: Path, figures: list[Figure], steps: int, label: str) -> None:
    figure = draw(tmp_path, figures, *(line(step, 4.5 - step / 480) for step in range(1, steps + 1)))
    assert legend(figure) == [label]


def test_a_median_is_none_of_the_jumps_and_follows_a_steep_start() -> None:
    slope = [float(-step) for step in range(480)]
    assert running_median(slope)[:-15] == slope[:-15]
    assert running_median([1.0, 9.0, 2.0]) == [1.0, 9.0, 2.0], "too short for one"
    for jump in (1, 10, 39):
        assert running_median([1.0 if step != jump else 9.0 for step in range(40)]) == [1.0] * 40


def test_every_metric_has_a_panel_and_so_has_one_that_nobody_declared(tmp_path: Path, figures: list[Figure]) -> None:
    of_several = [metric.name for metric in METRICS if metric.name.startswith(("source_", "species_", "case_"))]
    extras = {"mfu": 0.4, "bandwidth": 0.3, "steady_tokens_per_second": 8e3, "of_a_newer_version": 3,
              **{f"{name}/{of}": 1.5 for name in of_several for of in ("human", "worm")}}
    figure = draw(tmp_path, figures, *(line(step, 4.0, **extras) for step in range(1, 5)), line(4, 3.9, "val"))
    drawn = {axes.get_title() for axes in figure.axes[1:]}
    wanted = {metric.label for metric in METRICS
              if metric.name not in ("loss", "perplexity", "scored") and not metric.beside}
    assert drawn == wanted | {"bases scored", "of a newer version", "time since the first row [s]"}
    [speed] = [axes for axes in figure.axes if axes.get_title().startswith("tokens/s")]
    assert [text.get_text() for text in speed.get_legend().get_texts()] == ["steady"]
    assert figure.axes[0].get_title() == f"{tmp_path.name}: 4 steps, 32,768 tokens, 0.01 epochs, 3 s"


@pytest.mark.parametrize(("scored", "label"), [(32, "sequences scored"), (32_000, "sequences scored [thousands]")])
def test_a_fine_tuning_says_which_line_is_which_and_what_is_counted(tmp_path: Path, figures: list[Figure], scored: int,
                                                                    label: str) -> None:
    rows = [line(step, 1.9, scored=scored) for step in range(1, 5)] + [line(4, 1.8, "val", scored=scored)]
    of_labels = [json.dumps({name: value for name, value in json.loads(row).items() if name != "perplexity"})
                 for row in rows]
    (tmp_path / "metrics.jsonl").write_text("\n".join(of_labels))
    write_report(tmp_path, "sequences")
    assert legend(figures[-1]) == ["training", f"validation (last {math.log(1.8):.4f})"]
    [counted] = [axes for axes in figures[-1].axes if "scored" in axes.get_title()]
    assert counted.get_title() == label
    assert counted.lines[0].get_ydata()[0] == 32


def test_validation_below_training_is_explained_where_it_is_seen(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [line(step, 3.8 if step < 40 else 3.0) for step in range(1, 41)]  # the last step alone says nothing
    for perplexity, explained in ((3.7, True), (3.9, False)):
        figure = draw(tmp_path, figures, *rows, line(40, perplexity, "val"))
        texts = [text.get_text() for text in figure.texts] + [figure.get_supxlabel()]
        assert (EASIER in texts) == explained
    falling = [line(step, 4 + 9 / step) for step in range(1, 21)]
    figure = draw(tmp_path, figures, *falling, line(20, 4.6, "val"))
    assert figure.get_supxlabel() != EASIER, "it lies above the end of a training that was higher before"


def test_floors_are_drawn_where_they_are_known(tmp_path: Path, figures: list[Figure],
                                               caplog: pytest.LogCaptureFixture) -> None:
    rows = [line(step, 4.0 - step / 100) for step in range(1, 41)]
    floors = [3.9, 3.8, 3.7, 3.801]  # of short training data the last is none of the best
    content = {"split": "val", "markov": floors}
    (tmp_path / EVALUATION).write_text(json.dumps(content))
    axes = draw(tmp_path, figures, *rows).axes[0]
    levels = {line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":"}
    assert levels == set(floors)
    assert "order 2: 3.7000" in [text.get_text() for text in axes.texts]
    curves_end = max(axes.transData.transform(line.get_xydata())[:, 0].max() for line in axes.lines)
    places = [text.get_window_extent() for text in axes.texts]
    assert all(one.y1 < other.y0 or other.y1 < one.y0 for one, other in combinations(places, 2)), "none on another"
    for place in places:
        assert curves_end < place.x0 < place.x1 < axes.get_window_extent().x1, "beside all curves, and in the chart"
    for other in (json.dumps({**content, "split": "test"}), "{", "[]", '{"markov": 3, "split": "val"}'):
        (tmp_path / EVALUATION).write_text(other)
        axes = draw(tmp_path, figures, *rows).axes[0]
        assert not [line for line in axes.lines if line.get_linestyle() == ":"]
    with caplog.at_level(logging.WARNING):
        draw(tmp_path, figures, *rows)
    assert "evaluate the run again" in caplog.text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rows", [
    [line(1, 3.0).replace("3.0", "null", 1)], [line(1, 1e300), line(2, 1e300, "val")], [line(1, 3.0, "val")],
    [line(1, 9.0, time=None), line(2, 1e6, time=None)], [line(1, 3.0, grad_norm=0.0, lr=0.0, tokens_per_second=1e-9)],
    [line(0, 4.0)], [line(1, 3.0), line(2, 3.0, tokens=10**15)], [line(1, 3.0).replace("2.0", "NaN")]],
    ids=["beyond floats", "huge", "validation alone", "no times", "zeros", "no tokens", "many tokens", "NaN"])
def test_rows_of_any_size_are_drawn(tmp_path: Path, figures: list[Figure], rows: list[str]) -> None:
    draw(tmp_path, figures, *rows)


def test_a_run_whose_report_cannot_be_written_has_not_failed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").write_text(line(1, 4.0) + "\n")
    assert report_of(tmp_path, "bases") == tmp_path / "report.png"
    assert caplog.text == ""
    (tmp_path / "report.png").unlink()
    (tmp_path / "report.png").mkdir()
    assert report_of(tmp_path, "bases") is None
    assert "report.png: could not be written (Is a directory): change train.run_dir; the run is whole" in caplog.text
    with pytest.raises(OSError, match=r"report.png: could not be written"):
        write_report(tmp_path)


def test_a_history_that_cannot_be_read_is_a_line_with_its_remedy(tmp_path: Path) -> None:
    note_start(tmp_path, None, "auto")
    assert len((tmp_path / HISTORY).read_bytes().splitlines()) == 1
    (tmp_path / HISTORY).unlink()
    (tmp_path / HISTORY).mkdir()
    with pytest.raises(OSError, match=rf"{HISTORY}: cannot be read .* a directory.: make it a readable file, move it"):
        content_of(tmp_path / HISTORY)
