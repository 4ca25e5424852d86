"""Points of a sweep compared on the same held-out bases: what tables say, and that commands of the pages are right."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from benchmarks.studies import ALL, BLOCK, Scores, difference, tables
from hyena_dist.cli import evaluate, finetune, plan, scaling, score, sweep
from hyena_dist.config.errors import ConfigError
from hyena_dist.tasks.sweep.file import read_sweep
from launchers import bench, studies

ROOT = Path(__file__).parents[2]


def scores(name: str, nats: np.ndarray) -> Scores:
    """Of one group, each window of 100 bases.

    Args:
        nats: [seeds, windows], per base.
    """
    return Scores(name, {ALL: np.stack([100 * nats, np.full_like(nats, 100)], axis=1)})


def test_models_are_compared_on_the_same_windows():
    hard = np.random.default_rng(1).normal(1.3, 0.2, (1, 40 * BLOCK))
    base, other = scores("base", hard), scores("other", hard + 0.01)
    found = difference(other, base, ALL)
    assert base.perplexity(ALL) == pytest.approx(np.exp(hard.mean()))
    assert [found.percent, found.low, found.high] == pytest.approx([100 * np.expm1(0.01)] * 3), \
        "windows that are hard for both are no uncertainty of the difference"
    shuffled = scores("other", np.random.default_rng(2).permuted(hard + 0.01, axis=1))
    found = difference(shuffled, base, ALL)
    assert found.low < -1 < found.percent < 2 < found.high, "the control: other windows are hard for this one"
    assert found.percent == pytest.approx(100 * np.expm1(0.01))


def test_neighbouring_windows_are_drawn_together():
    """Twice as far from sure where the windows of a block are one."""
    single = np.random.default_rng(3).normal(0, 0.1, (1, 100 * BLOCK))
    alike = np.repeat(single[:, ::BLOCK], BLOCK, axis=1)
    width = {}
    for name, nats in (("single", single), ("alike", alike)):
        found = difference(scores(name, 1.3 + nats), scores("base", np.full_like(nats, 1.3)), ALL)
        width[name] = found.high - found.low
    assert width["alike"] / width["single"] == pytest.approx(BLOCK**0.5, rel=0.25)


def test_a_table_has_the_mean_and_the_spread_of_the_seeds():
    base = scores("base", np.array([[1.2] * BLOCK, [1.3] * BLOCK]))
    text = tables([base, scores("other", np.full((2, BLOCK), 1.25))], base)
    assert f"| all | {100 * BLOCK} | {np.exp(1.25):.3f} | {np.exp(1.25):.3f} |" in text
    assert "| all | +0.00 (+0.00 to +0.00) |" in text
    apart = 100 * (np.exp(1.3) - np.exp(1.2)) / (np.exp(1.3) + np.exp(1.2)) * 2
    assert f"at most {apart:.2f} % apart" in text
    assert "Seeds: base 2, other 2." in text


def test_windows_that_differ_are_refused():
    for windows in (16, 9):
        with pytest.raises(ConfigError, match="have other windows"):
            difference(scores("a", np.ones((1, 8))), scores("b", np.ones((1, windows))), ALL)


def test_longer_windows_of_the_same_bases_are_compared_block_by_block():
    hard = np.random.default_rng(4).normal(1.3, 0.2, 10 * BLOCK)
    long = Scores("long", {ALL: np.stack([400 * hard, np.full_like(hard, 400)])[None]})
    short = scores("short", np.repeat(hard, 4)[None] + 0.01)
    for found, sign in ((difference(short, long, ALL), 1), (difference(long, short, ALL), -1)):
        assert [found.percent, found.low, found.high] == pytest.approx([100 * np.expm1(sign * 0.01)] * 3)


def test_a_sweep_without_a_finished_point_is_named(tmp_path, shards, capsys):
    config = tmp_path / "sweep.yaml"
    config.write_text(f"base: quickstart\nruns: {tmp_path}/runs\nset: {{data.shards: {shards}}}\n")
    call = [str(config), "--shards", str(shards), "--out", str(tmp_path / "found")]
    assert studies.main(call) == 2
    assert f"error: {config}: no point is finished" in capsys.readouterr().err
    assert studies.main([*call, "--names", "a", "b"]) == 2
    assert "--names has 2" in capsys.readouterr().err


def test_the_pages_show_commands_that_are_right():
    """Every sweep has a page, and its commands name files that are there and options that are known."""
    parsers = {name: module.parse_args for name, module in (
        ("studies", studies), ("sweep", sweep), ("evaluate", evaluate), ("scaling", scaling), ("plan", plan),
        ("score", score), ("bench", bench), ("finetune", finetune))}
    seen = set()
    for page in (ROOT / "docs/studies").glob("*.md"):
        text = page.read_text("utf-8").replace("\\\n", " ")
        for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
            assert (page.parent / picture).is_file(), picture
        for name, rest in re.findall(r"^ +python launchers/(\w+)\.py (.*)$", text, re.MULTILINE):
            args = parsers[name](shlex.split(rest))
            seen |= {Path(args.config).stem} if getattr(args, "config", None) else set()
            if name == "studies":
                assert args.names is None or len(args.names) >= 2
                read_sweep(ROOT / args.config)
    assert seen >= {"species", "regions", "soft-masking", "kmers", "learning-rate", "depth-width-length", *(
        f"{name}{size}" for name in ("depth-length", "hyena-transformer", "length-warm-up") for size in ("", "-large"))}
