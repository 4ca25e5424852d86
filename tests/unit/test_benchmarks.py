"""The comparisons: one timing loop, errors before times, wrong values refused, and a command that says so."""

import json
import time

import numpy as np
import pytest
import torch

from benchmarks import cp, generation, lengths, loader, operators, recompute, step, subjects
from benchmarks.compare import BASELINE, OURS, VALUE, Case, Measured, Row, WrongValues, compare, differences, growth
from benchmarks.models import Size
from benchmarks.timing import interleaved, ratio, timed
from hyena_dist.costs import utilisation
from hyena_dist.costs.flops import parts, training_bytes, training_flops
from hyena_dist.ops import libraries
from hyena_dist.ops.online_conv import OnlineConvolution
from launchers import bench
from launchers.bench import main

CPU = torch.device("cpu")
TINY = ["--lengths", "64", "128", "--width", "8", "--rounds", "1", "--threads", "1", "--device", "cpu"]


def test_sides_take_turns_on_the_same_fresh_inputs():
    seen = []
    sides = {name: (lambda given, name=name: seen.append((name, given))) for name in "abc"}
    times = interleaved(sides, lambda turn: 10 * turn, rounds=3, device=CPU)
    assert seen == [(name, 10 * turn) for turn, order in enumerate(("abc", "bca", "cab", "abc")) for name in order]
    assert {name: (len(found.wall), len(found.cpu)) for name, found in times.items()} == dict.fromkeys("abc", (3, 3))


def test_the_clock_and_the_work_are_told_apart():
    wall, cpu = timed(lambda: time.sleep(0.05), CPU)
    assert wall >= 0.05 > cpu
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == 3.0, "turn by turn: not the ratio of the medians, which is 4"


def test_growth_is_over_that_of_log_length():
    rows = [Row(length, 1, OURS, ns_per_token=ns) for length, ns in ((2**10, 5.0), (2**15, 6.0), (2**20, 10.0))]
    rows += [Row(2**20, 1, BASELINE, ns_per_token=9.0), Row(2**10, 1, BASELINE, note="skipped")]
    assert growth(rows, OURS) == pytest.approx(1.0)
    assert growth(rows, BASELINE) is None


def numbers(error: float):
    return lambda _: lambda: {VALUE: torch.tensor([1.0, error]), "gradient": torch.tensor([2.0])}


def case(**errors: float) -> Case:
    exact = numbers(0.0)
    return Case(8, 1, lambda turn: turn, {name: Measured(numbers(error), exact, 1e-5, 1.0)
                                          for name, error in errors.items()})


def run(found: Case) -> list[Row]:
    return compare(found, rounds=1, device=CPU, copy_bytes_per_second=1e9)


def test_wrong_values_have_no_time():
    (ours, plain) = run(case(ours=1e-6, plain=2e-6))
    assert (ours.value_error, ours.gradient_error) == (pytest.approx(1e-6), 0.0)
    assert plain.value_error == pytest.approx(2e-6)
    assert len(run(case(ours=1e-3, plain=9e-4))) == 2, "both sides round as much: the length is to blame"
    for wrong in ({"ours": 2e-5, "plain": 1e-6}, {"ours": 1e-6, "plain": 2e-5}, {"ours": float("nan"), "plain": 1.0},
                  {"ours": 2e-5}):
        with pytest.raises(WrongValues, match="at length 8: value is wrong by"):
            run(case(**wrong))


def test_what_is_missing_is_wrong():
    exact = {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)}
    assert differences({"a": torch.ones(2), "b": torch.ones(3)}, exact) == {"a": 0, "b": float("inf"),
                                                                            "c": float("inf")}


def test_a_side_without_room_has_a_row_that_says_so():
    def too_large(_):
        raise torch.OutOfMemoryError

    found = case(ours=0.0, plain=0.0)
    found.sides["plain"] = Measured(too_large, found.sides["ours"].exact, 1e-5, 1.0)
    ours, plain = run(found)
    assert ours.seconds is not None
    assert (plain.side, plain.seconds, plain.note) == ("plain", None, "does not fit into the device's memory")


@pytest.mark.parametrize(("subject", "precision"), [("conv", "fp32"), ("conv", "bf16"), ("filter", "fp32"),
                                                    ("mixer", "fp32"), ("step", "fp32"), ("step", "bf16")])
def test_every_side_of_a_comparison_is_checked_in_float64(subject, precision):
    size = Size(48, 8, batch=2)
    rows = {row.side: row for row in run(subjects.CASES[subject](size, CPU, precision))}
    expected = {"conv": {OURS, BASELINE, *libraries.PACKAGES}, "step": {OURS, BASELINE, step.TRANSFORMER}}
    assert set(rows) == expected.get(subject, {OURS, BASELINE})
    for row in rows.values():
        if row.side in libraries.PACKAGES:
            assert (row.seconds, row.note) == (None, f"{row.side} is not installed")
            continue
        print(row.side, row.value_error, row.gradient_error)
        assert 0 < row.value_error < 1e-2
        assert 0 < row.gradient_error < 3e-2
        assert row.peak_tensor_bytes > 0
        assert row.ns_per_token == pytest.approx(1e9 * row.seconds / 96)
        assert row.copy_share == pytest.approx(row.formula_bytes / row.seconds / 1e9)


def test_the_bytes_of_the_convolution_are_those_of_the_formula():
    size = Size(48, 8, batch=2, layers=1)
    part = parts(size.section(), size.length, size.batch)["long_conv"]
    direct_terms = 3 * 4 * 8  # its weights, which the benchmark leaves out
    assert operators.conv(size, CPU, "fp32").sides[OURS].bytes == training_bytes(part, 4) - direct_terms


def test_recomputation_is_compared_by_the_values_of_the_schema():
    assert recompute.values()[0] == "none"
    assert "full" in recompute.values()
    rows = run(recompute.recompute(Size(256, 16, layers=4), CPU, "fp32"))
    assert [row.side for row in rows] == recompute.values()
    peaks = {row.side: row.peak_tensor_bytes for row in rows}
    assert peaks["full"] < 0.8 * peaks["none"], peaks


def test_a_transformer_that_takes_too_long_is_skipped_aloud(monkeypatch):
    monkeypatch.setitem(step.ATTENTION_FLOPS, "cpu", 1e3)
    found = step.step(Size(48, 8), CPU, "fp32")
    assert set(found.sides) == {OURS, BASELINE}
    assert "operations of attention would take too long here" in found.skipped[step.TRANSFORMER]


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    monkeypatch.setattr(utilisation, "COPY_BYTES", 2**20)


@pytest.mark.parametrize("subject", ["filter", "step"])
def test_the_command_writes_numbers_and_a_picture(subject, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the extra 'plots'")
    assert main([subject, *TINY, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "time per token grows" in said
    (path,) = tmp_path.glob(f"{subject}-*.json")
    result = json.loads(path.read_text())
    assert {row["length"] for row in result["rows"]} == {64, 128}
    assert {OURS, BASELINE} <= set(result["growth"])
    assert result["copy_bytes_per_second"] > 1e8
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert ("attention takes more operations" in said) == (subject == "step")
    assert path.with_name(f"{path.stem}-cost.png").exists() == (subject == "step")


def test_the_cost_of_a_length_is_found_from_runs_that_follow_it():
    """Times made of known curves, and exact operations as the sweeps count them."""
    curves = {OURS: lambda length: 3000 + 500 * np.log2(length), "transformer": lambda length: 4000 + 2.0 * length}
    rows = [{"side": side, "length": length, "batch": 4, "seconds": 9.0, "cpu_seconds": 4e-9 * length * cost(length)}
            for side, cost in curves.items() for length in (256, 1024, 4096)]
    found = lengths.summary(rows, Size(256, 32, 4, 2))
    assert [(round(curve["constant"]), round(curve["slope"], 3)) for curve in found["curves"]] == [
        (3000, 500), (4000, 2)]
    assert found["attention is slower"] == (1024, 4096), "8,000 ns at 1,024 tokens, and 12,192 at 4,096"
    assert found["times the time, extrapolated"] == pytest.approx((4000 + 2**21) / 13000)
    equal = found["crossing of operations"]
    ratio = [training_flops(Size(n, 32, 1, 2).section("A"), n) / training_flops(Size(n, 32, 1, 2).section(), n)
             for n in (equal - 1, equal)]
    assert ratio[0] <= 1 < ratio[1]
    assert "EXTRAPOLATED: 256 times the longest" in "\n".join(lengths.said(found))
    assert lengths.summary(rows[:4], Size(256, 32, 4, 2)) is None, "attention was measured at one length only"
    assert lengths.slower_from({OURS: {64: 1.0, 128: 1.0}, "transformer": {64: 2.0, 128: 3.0}}) == (None, 64)
    assert lengths.slower_from({OURS: {64: 9.0, 128: 9.0}, "transformer": {64: 2.0, 128: 3.0}}) == (128, None)


def test_notes_say_at_which_lengths():
    rows = [{"side": OURS, "length": 64, "note": ""}, *({"side": "other", "length": length, "note": "not installed"}
                                                        for length in (64, 1024))]
    assert subjects.notes(rows) == ["other: not installed (at 64, 1,024)"]


def test_a_dry_run_measures_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(subjects, "compare", None)
    args = ["memory", "--lengths", "8192", "--tokens", "8192", "--width", "8", "--layers", "1", "--device", "cpu"]
    assert main([*args, "--dry-run", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "8,192" in said
    assert "float64 check, MiB" in said.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_the_command_refuses_wrong_values_and_wrong_options(monkeypatch, capsys):
    monkeypatch.setattr(operators, "causal_conv", lambda u, h, bias, gate: gate * (u * bias[:, None] + 0 * h))
    assert main(["conv", *TINY]) == 1
    said = capsys.readouterr()
    assert "nothing is reported, the values are wrong: ours at length 64: value is wrong" in said.err
    assert said.out == ""
    for argv, problem in ((["step", "--width", "7"], "--width 7 is odd"), (["conv", "--lengths", "1"], "at least 2"),
                          (["cp", "--ranks", "3"], "3 ranks need a --length"), (["loader", "--width", "7"], "--width")):
        with pytest.raises(SystemExit) as error:
            main(argv)
        assert error.value.code == 2
        assert problem in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "on_gpu"), [
    (["loader"], False), (["cp", "--ranks", "1", "2", "--length", "16", "--width", "2"], False),
    (["cp", "--ranks", "1", "--length", "16", "--width", "2"], True)])
def test_a_result_names_the_device_that_did_the_work(monkeypatch, arguments, on_gpu):
    """On a machine with one GPU: the loader needs none, and two ranks of cp have no GPU each."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(cp, "run", lambda *_, **__: [cp.Row("1x1 at 1", 1, "one rank", 0, 0, 0, 0.0, 0.0)])
    monkeypatch.setattr(loader, "run", lambda **_: [cp.Row("1x1 at 1", 1, "one rank", 0, 0, 0, 0.0, 0.0)])
    found = bench.SUBJECTS[arguments[0]].measure(bench.parse_args(arguments))
    assert (found["machine"]["device"] == "a GPU") is on_gpu


def test_generation_is_measured_on_both_sides(tmp_path, monkeypatch, capsys):
    arguments = ["generate", "--lengths", "20", "40", "--width", "8", "--layers", "1", "--rounds", "1",
                 "--threads", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert main(arguments) == 0
    (written,) = tmp_path.glob("generate-*.json")
    assert written.with_suffix(".png").stat().st_size > 10_000
    rows = json.loads(written.read_text())["rows"]
    assert [(row["side"], row["length"]) for row in rows] == [(side, length) for length in (20, 40)
                                                              for side in (generation.MEMORY, generation.FORWARD)]
    for memory, forward in zip(rows[::2], rows[1::2], strict=True):
        assert memory["ratio"] == memory["cpu_ratio"] == 1
        assert forward["ratio"] == pytest.approx(forward["ms_per_base"] / memory["ms_per_base"])
    monkeypatch.setattr(OnlineConvolution, "advance", lambda self: setattr(self, "_token", self._token + 1))
    assert main(arguments) == 1, "control: sums that are left out"
    assert "predictions with and without a memory differ" in capsys.readouterr().err
