"""Learning rates across widths: a rule is found where there is one, and a coordinate check sees what grows."""

from pathlib import Path

import numpy as np
import pytest

from hyena_dist.cli.scaling import main
from hyena_dist.config.errors import ConfigError
from hyena_dist.tasks.scaling.learning_rate import describe, learning_rate_rule
from hyena_dist.tasks.scaling.points import ANCHORS, Point
from hyena_dist.tasks.scaling.widths import RULES, check_widths


def runs(power: float, *, noise: float = 3e-4, seed: int = 0, widths: tuple[int, ...] = (32, 64, 128),
         best: float = 4e-3) -> list[Point]:
    """Five rates a width, whose best is best (width / 64)^-power."""
    rng = np.random.default_rng(seed)
    return [Point(id=f"{width}-{rate:.4f}", params=width**2, tokens=1e6, hidden_size=width, lr=rate,
                  loss=1.3 + 0.01 * np.log(rate / best * (width / 64) ** power) ** 2 + noise * rng.standard_normal())
            for width in widths for rate in np.geomspace(1e-3, 1.6e-2, 5)]


def test_the_rule_of_made_up_runs_is_found_with_an_interval_that_holds_it() -> None:
    exact = learning_rate_rule(runs(0.6, noise=0.0))
    assert exact.power == pytest.approx(0.6, abs=1e-6)
    assert exact.rate * (64 / exact.reference) ** -exact.power == pytest.approx(4e-3, rel=1e-6)
    held = {0.6: 0, 0.0: 0}
    for power in held:
        for seed in range(60):
            rule = learning_rate_rule(runs(power, seed=seed))
            held[power] += rule.interval.low <= power <= rule.interval.high
    print(f"held of 60: {held}")
    assert all(count >= 52 for count in held.values())
    assert learning_rate_rule(runs(0.0)).stays
    assert not learning_rate_rule(runs(0.6)).stays
    assert "The best rate moves with the width." in describe(learning_rate_rule(runs(0.6)))


def test_a_lowest_point_outside_the_rates_is_no_finding() -> None:
    rule = learning_rate_rule(runs(0.0, best=5e-2, noise=0.0))
    assert "3 are needed" in rule.interval.reason
    assert all("at an end of the rates tried" in curve.interval.reason for curve in rule.curves)
    assert "There is no rule" in describe(rule)
    two = learning_rate_rule(runs(0.6, widths=(32, 64)))
    assert "2 widths have their lowest point among the rates tried, and 3 are needed" in two.interval.reason
    with pytest.raises(ConfigError, match="no width has 4 learning rates: a rule needs an axis of the sweep over"):
        learning_rate_rule(runs(0.6)[:3])


def test_far_rates_are_not_fitted() -> None:
    """A rate that diverged moves no parabola, because it is far from the best; the control does."""
    points = runs(0.0, noise=0.0)
    far = [Point(id=f"far {width}", params=1, tokens=1, hidden_size=width, lr=0.1, loss=9.0) for width in (32, 64, 128)]
    assert learning_rate_rule([*points, *far]).curves[0].lowest == pytest.approx(4e-3)
    near = [Point(id="near", params=1, tokens=1, hidden_size=32, lr=1.2e-2, loss=9.0)]
    assert learning_rate_rule([*points, *near]).curves[0].lowest != pytest.approx(4e-3, rel=0.1)


def test_a_coordinate_check_sees_what_grows_with_the_width(shards: Path, tmp_path: Path,
                                                           capsys: pytest.CaptureFixture) -> None:
    """As published, what a mixer adds grows with the width from the first step on; by the maximal update it does not.
    Both are the same model at the smallest width."""
    published, derived = (check_widths(shards, rule, [16, 64, 256], steps=2, layers=1, seq_len=32, batch=2)
                          for rule in RULES)
    mixer = published.places.index("mixer 1")
    slopes = [check.slopes(check.before)[mixer] for check in (published, derived)]
    print(f"mixer before training: width^{slopes[0]:.2f} as published, width^{slopes[1]:.2f} derived")
    assert slopes[0] > 0.6
    assert abs(slopes[1]) < 0.3
    assert published.after[0].tolist() == pytest.approx(derived.after[0].tolist())
    assert published.after[2].tolist() != pytest.approx(derived.after[2].tolist())
    assert (published.changes > 0).all()

    assert main(["widths", "--shards", str(shards), "--widths", "8", "16", "--steps", "1", "--out",
                 str(tmp_path / "w")]) == 0
    assert "| published | logits |" in (tmp_path / "w" / "widths.md").read_text("utf-8")
    assert (tmp_path / "w" / "widths.png").stat().st_size > 0
    assert main(["widths", "--shards", str(shards), "--widths", "8", "--out", str(tmp_path)]) == 2
    assert "give at least two different ones" in capsys.readouterr().err


def test_the_command_fits_csvs_and_says_mistakes_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = str(ANCHORS / "chinchilla_isoflops.csv")
    assert main(["fit", source, "--column", "flops=budget", "--out", str(tmp_path / "r"), "--budget", "1e23"]) == 0
    said = capsys.readouterr().out
    assert "exponent of N 0.3885 (0." in said
    assert "warning: 1 of the budgets asked about are more than 10 times" in said
    assert (tmp_path / "r" / "report.md").exists()

    rates = tmp_path / "rates.csv"
    rates.write_text("params,tokens,loss,hidden_size,lr\n" + "".join(
        f"{p.params},{p.tokens},{p.loss},{p.hidden_size},{p.lr}\n" for p in runs(0.6)), "utf-8")
    assert main(["rates", str(rates), "--out", str(tmp_path / "l")]) == 0
    assert "lr* = " in (tmp_path / "l" / "rates.md").read_text("utf-8")
    assert (tmp_path / "l" / "rates.png").stat().st_size > 0
    capsys.readouterr()
    for arguments, message in ((["fit", source, "--floor", "9"], "a floor of 9 is not below the lowest loss"),
                               (["fit", source, "--floor", "-1"], "a floor of -1: the loss is above 0"),
                               (["fit", source, "--budget", "0"], "a budget of 0 operations"),
                               (["fit", source, "--column", "loss"], "is not of the form NAME=COLUMN"),
                               (["fit", source, "--min-steps", "-4"], "--min-steps -4: runs have no fewer than 0 st"),
                               (["rates", source, "--min-steps", "-4"], "--min-steps -4: runs have no fewer than 0"),
                               (["rates", source], "no width has 4 learning rates"),
                               (["fit", str(tmp_path / "none")], "cannot be read")):
        assert main([*arguments, "--out", str(tmp_path / "x")]) == 2, arguments
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1, error
