"""A sweep's file becomes points: axes, budgets, derived values, seeds, branches; each known by what it learns."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from hyena_dist.cli.pretrain import main as pretrain
from hyena_dist.cli.sweep import main
from hyena_dist.config.errors import ConfigError
from hyena_dist.config.load import load_config
from hyena_dist.costs.flops import training_flops
from hyena_dist.tasks.sweep import point as point_module
from hyena_dist.tasks.sweep.arithmetic import evaluate
from hyena_dist.tasks.sweep.expand import expand, varied
from hyena_dist.tasks.sweep.file import read_sweep
from hyena_dist.tasks.sweep.point import Point, costs, learnt, point_id, run_flops, steps_for
from hyena_dist.tasks.sweep.runner import devices_of

ROOT = Path(__file__).parents[2]
SIZES = {"model.num_layers": 1, "model.hidden_size": 16, "model.filter_order": 8, "data.seq_len": 64,
         "train.micro_batch_size": 2, "train.global_batch_size": 4, "train.steps": 10,
         "optim.warmup_steps": 1}


def write(tmp_path: Path, **keys: Any) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"base": "quickstart", "runs": str(tmp_path / "runs"), **keys}))
    return path


@pytest.fixture
def points_of(tmp_path, shards):
    """The points of a sweep with these keys, over real shards."""
    def of(**keys: Any) -> list[Point]:
        settings = {**SIZES, "data.shards": str(shards), **keys.pop("set", {})}
        elsewhere = {*keys.get("axes", {}), *keys.get("derive", {}), *(["train.steps"] if "budgets" in keys else [])}
        for place in ("zip", "points"):
            inner = keys.get("axes", {}).get(place, [])
            for entry in [inner] if isinstance(inner, dict) else inner:
                elsewhere |= set(entry)
        settings = {key: value for key, value in settings.items() if key not in elsewhere}
        return expand(read_sweep(write(tmp_path, set=settings, **keys)))
    return of


def test_axes_are_crossed_and_a_zip_is_one_axis(points_of):
    points = points_of(axes={"model.num_layers": [1, 2], "zip": {"model.hidden_size": [8, 16, 32],
                                                                 "optim.lr": [4e-3, 2e-3, 1e-3]}}, seeds=[0, 1])
    found = [(point.config.model.num_layers, point.config.model.hidden_size, point.config.optim.lr,
              point.config.train.seed, point.config.data.seed) for point in points]
    assert found == [(layers, width, lr, seed, seed) for layers in (1, 2)
                     for width, lr in ((8, 4e-3), (16, 2e-3), (32, 1e-3)) for seed in (0, 1)]
    assert len({point.id for point in points}) == 12
    assert all(point.problem is None for point in points)
    assert varied([point.set for point in points]) == ["model.num_layers", "model.hidden_size", "train.seed"]


def test_explicit_points_and_values_of_any_kind(points_of, shards):
    mixture = [{"name": "worm", "weight": 1.0}]
    warmup = [{"seq_len": 16, "steps": 2}, {"seq_len": 32, "tokens": 500}]
    points = points_of(axes={"points": [{"model.layer_pattern": "A"}, {"data.mixture": mixture},
                                        {"train.seq_len_warmup": warmup}, {"data.lower_case_weight": 0.1},
                                        {"optim.betas": [0.8, 0.9]}, {"data.shards": str(shards)}]})
    assert [point.problem for point in points] == [None] * 6
    assert points[0].config.model.layer_pattern == "A"
    assert points[1].config.data.mixture == mixture
    assert points[2].config.train.seq_len_warmup == warmup
    assert points[4].config.optim.betas == (0.8, 0.9)
    assert len({point.id for point in points}) == 6


def test_budgets_are_solved_from_exact_flops(points_of):
    for point in points_of(axes={"model.hidden_size": [8, 24]}, budgets=[1e8, 3.3e8]):
        config = point.config
        of_step = 2 * training_flops(config.model, 64, 2)
        assert run_flops(config) == config.train.steps * of_step
        assert abs(run_flops(config) - point.budget) <= of_step / 2
        assert costs(config).tokens == config.train.steps * 4 * 64
        six_n_d = 6 * costs(config).params_non_embedding * costs(config).tokens
        assert abs(six_n_d / run_flops(config) - 1) > 0.05, "control: 6 N D is another number"


def test_the_stages_of_a_length_warm_up_count_in_budget_and_flops(points_of):
    [point] = points_of(set={"train.seq_len_warmup": [{"seq_len": 16, "steps": 3}]}, budgets=[2e8])
    config = point.config
    first = 3 * training_flops(config.model, 16, 4)  # the micro-batch is widened to all of the step
    assert run_flops(config, steps=3) == first
    assert run_flops(config) == first + (config.train.steps - 3) * 2 * training_flops(config.model, 64, 2)
    assert abs(run_flops(config) - 2e8) <= training_flops(config.model, 64, 2)
    assert steps_for(config, first) == 0, "nothing is left to data.seq_len"


def test_derived_values_follow_in_any_order_and_after_the_budget(points_of):
    [point] = points_of(axes={"data.seq_len": [128]}, budgets=[1e9], derive={
        "optim.min_lr": "optim.lr / 100", "optim.warmup_steps": "max(1, 0.1 * train.steps)",
        "optim.lr": "1e-3 * sqrt(64 / model.hidden_size)", "train.global_batch_size": "512 // data.seq_len",
        "model.max_seq_len": "data.seq_len", "train.micro_batch_size": "train.global_batch_size"})
    config = point.config
    assert config.train.global_batch_size == config.train.micro_batch_size == 4
    assert config.model.max_seq_len == 128
    assert config.optim.lr == pytest.approx(2e-3)
    assert config.optim.min_lr == pytest.approx(2e-5)
    assert config.optim.warmup_steps == round(0.1 * config.train.steps) > 1
    assert config.train.steps == steps_for(config, 1e9)


@pytest.mark.parametrize(("text", "value"), [
    ("1 + 2 * 3 ** 2", 19), ("-train.steps // 4", -3), ("max(2, min(train.steps, 5))", 5), ("round(7.6) % 5", 3),
    ("ceil(0.1) + floor(1.9)", 2), ("log2(8) - sqrt(4)", 1.0)])
def test_expressions(text, value):
    assert evaluate(text, lambda key: {"train.steps": 10,
         "optim.warmup_steps": 1}[key]) == value


@pytest.mark.parametrize("text", [
    "__import__('os').system('true')", "train.steps.__class__", "[1][0]", "(lambda: 1)()", "'a' * 9", "10 ** 10 ** 10",
    "9 ** 99999999", "1 / 0", "True", "max()", "max(*[1])", "open(1)", "train.steps if 1 else 2", "x", "1 +", "", "1j",
    "(-8) ** 0.5", "1e308 * 10", "min(1, key=2)", "1 << 99", "+" * 400 + "1"])
def test_what_is_no_arithmetic_is_refused_and_never_run(text):
    with pytest.raises(ConfigError) as refused:
        evaluate(text, lambda _: 3)
    assert "\n" not in str(refused.value)


def test_a_point_is_what_it_learns(points_of):
    base = points_of()[0].config
    same = [
        replace(base, train=replace(base.train, run_dir="elsewhere", micro_batch_size=4, save_every=3, keep_last=5,
                                    eval_every=1, activation_checkpointing="full")),
        replace(base, data=replace(base.data, num_workers=3, val_seq_len=64)),
        replace(base, engine=replace(base.engine, name="fsdp"), parallel=replace(base.parallel, context=2)),
        replace(base, model=replace(base.model, layer_pattern="H", ffn_hidden_size=64,
                                    filter_seq_len=base.model.max_seq_len)),
        replace(base, optim=replace(base.optim, min_lr=0.1 * base.optim.lr)),
    ]
    other = [
        replace(base, train=replace(base.train, seed=1)), replace(base, data=replace(base.data, seed=1)),
        replace(base, train=replace(base.train, steps=11)), replace(base, train=replace(base.train, precision="bf16")),
        replace(base, train=replace(base.train, global_batch_size=8)),
        replace(base, model=replace(base.model, layer_pattern="A")),
        replace(base, optim=replace(base.optim, lr=1e-4)), replace(base, data=replace(base.data, val_tokens=64)),
        replace(base, data=replace(base.data, lower_case_weight=0.5)),
    ]
    assert {point_id(config) for config in same} == {point_id(base)}
    assert len({point_id(config) for config in [base, *other]}) == 1 + len(other)


def test_a_key_that_a_later_version_adds_makes_no_other_points(points_of, monkeypatch):
    config = points_of()[0].config
    before = point_id(config)
    known = point_module.identity
    monkeypatch.setattr(point_module, "identity", lambda config: {**known(config), "model.newer": 3})
    assert point_id(config) == before
    monkeypatch.setattr(point_module, "identity", lambda config: {**known(config), "model.newer": config.data.seq_len})
    assert point_id(config) != before, "control: away from its default it counts"


def test_shards_count_by_their_content(points_of, shards, tmp_path):
    (tmp_path / "moved").symlink_to(shards)
    here = points_of()[0]
    assert points_of(set={"data.shards": str(tmp_path / "moved")})[0].id == here.id
    assert points_of(set={"data.shards": str(tmp_path / "none")})[0].id != here.id
    assert learnt(here.config, data="a") != learnt(here.config, data="b")


def test_what_axes_name_twice_is_one_point_and_more_axes_keep_the_old_ones(points_of):
    points = points_of(axes={"points": [{"model.layer_pattern": ""}, {"model.layer_pattern": "H"},
                                        {"train.save_every": 5}, {"data.num_workers": 0}]})
    assert len(points) == 1
    few = points_of(axes={"model.hidden_size": [8, 16]})
    more = points_of(axes={"model.hidden_size": [16, 8, 32]}, seeds=[0, 1])
    assert {point.id for point in few} < {point.id for point in more}


def test_forks_are_points_and_their_origins_keep_what_they_begin_with(points_of):
    wsd = {"optim.schedule": "wsd", "optim.cooldown": 2, "optim.warmup_steps": 1}
    parent, *forks = points_of(set=wsd, forks=[{"at": 4, "cooldown": 2}, {"at": "0.6 * train.steps", "cooldown": 3},
                                               {"at": 8, "cooldown": 2}, {"at": 9, "cooldown": 2}])
    assert (parent.config.train.keep_every, parent.config.train.save_every) == (2, 2)
    assert [fork.forked_from for fork in forks] == [parent.id] * 3, "from 8 on the run itself cools down in 2 steps"
    assert [fork.fork_at for fork in forks] == [4, 6, None]
    assert "step 9 is not between the end of the warm-up (1) and the last step at the full learning rate (8)" in \
        forks[2].problem
    for fork, steps in zip(forks, (6, 9), strict=False):
        origin = Path(parent.config.train.run_dir) / "checkpoints" / f"step-{fork.fork_at:08d}"
        assert fork.config.train.resume == str(origin)
        assert (fork.config.train.steps, fork.config.optim.schedule) == (steps, "wsd")
        straight = replace(fork.config, train=replace(fork.config.train, resume="auto"))
        assert fork.id == point_id(straight), "it is the run that cools down there from the start"
        found = costs(fork.config)
        assert (found.tokens, found.flops) == (steps * 256, costs(parent.config).flops / 10 * steps)
    [_, refused] = points_of(forks=[{"at": 4, "cooldown": 2}])
    assert "optim.schedule=cosine decays from its warm-up on" in refused.problem


REFUSED = {
    "unknown": ({"axis": {"a": [1]}}, "axis is not a key of a sweep: use base, runs, set, "),
    "no base": ({"base": ""}, "base must be a path, got ''"),
    "no such base": ({"base": "nothing"}, "base: nothing: there is no such file, and no preset of that name"),
    "not a key": ({"set": {"model.depth": 3}}, "set: model.depth is not a key of a configuration"),
    "no section": ({"axes": {"hidden_size": [8]}}, "hidden_size is not a key of a configuration: use model.hidd"),
    "own": ({"set": {"train.run_dir": "x"}}, "train.run_dir is not for a sweep to set: each point has a directory"),
    "empty axis": ({"axes": {"model.num_layers": []}}, "axes.model.num_layers must be a list of at least one value"),
    "no list": ({"axes": {"model.num_layers": 3}}, "axes.model.num_layers must be a list of at least one value, got 3"),
    "lengths": ({"axes": {"zip": {"model.num_layers": [1], "optim.lr": [1.0, 2.0]}}},
                "axes.zip: its lists must be of one length, got 1 of model.num_layers, 2 of optim.lr"),
    "twice": ({"set": {"optim.lr": 1.0}, "axes": {"optim.lr": [1.0]}}, "optim.lr is set twice, by set and by axes"),
    "seeds and axis": ({"seeds": [1], "axes": {"data.seed": [1]}}, "data.seed is set twice, by axes and by seeds"),
    "budget": ({"budgets": [-1.0]}, "budgets[0] must be a number of FLOPs greater than 0, got -1.0"),
    "budget and steps": ({"budgets": [1e9], "set": {"train.steps": 3}}, "train.steps is set twice"),
    "seed": ({"seeds": [1.5]}, "seeds[0] must be a whole number of 32 bits, got 1.5"),
    "circle": ({"derive": {"optim.lr": "optim.eps", "optim.eps": "optim.lr"}}, "follow from each other in a circle"),
    "code": ({"derive": {"optim.lr": "open('x')"}}, "derive.optim.lr: \"open('x')\" cannot be computed"),
    "derived from no key": ({"derive": {"optim.lr": "model.depth"}}, "model.depth is not a key of a configuration"),
    "derived word": ({"derive": {"data.shards": "1"}}, "derive.data.shards: only numbers can be derived"),
    "fork": ({"forks": [{"at": 3}]}, "forks[0] must be like {at: 400, cooldown: 100}"),
    "metric": ({"metric": {"name": "x", "command": "echo 1"}}, "metric.command must be a list of at least one value"),
    "ranks": ({"ranks": 2}, "ranks is 2 and launch does not say what starts them"),
    "invalid": ({"invalid": "ignore"}, "invalid must be refuse or skip, got 'ignore'"),
    "too many": ({"axes": {"optim.lr": [*range(1, 200)], "optim.eps": [*range(1, 200)]}}, "make 39,601 points"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_is_one_line(name, tmp_path, capsys):
    keys, message = REFUSED[name]
    assert main(["plan", "--config", str(write(tmp_path, **keys))]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith(f"error: {tmp_path / 'sweep.yaml'}: ")
    assert said.count("\n") == 1


def test_points_that_cannot_run_are_listed_and_refused_or_skipped(tmp_path, shards, capsys):
    keys = {"set": {**SIZES, "data.shards": str(shards)}}
    del keys["set"]["data.seq_len"], keys["set"]["train.steps"]
    keys |= {"axes": {"data.seq_len": [64, 4096], "optim.lr": [1e-3, -1.0]}, "budgets": [4e9, 1.0]}
    path = str(write(tmp_path, **keys))
    for command in (["plan"], ["run"]):
        assert main([*command, "--config", path]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 7
        assert sum("data.seq_len (4096) exceeds model.max_seq_len (1024)" in line for line in said) == 1
        assert sum("budget 1 is less than half a step" in line for line in said) == 2
        assert sum("optim.lr must be greater than 0" in line for line in said) == 4
        assert all(line.startswith(f"error: {path}: point ") for line in said)
    assert not (tmp_path / "runs").exists(), "nothing was written"
    path = str(write(tmp_path, **keys, invalid="skip"))
    assert main(["plan", "--config", path, "--slurm"]) == 0
    found = capsys.readouterr()
    assert "skipped: " in found.err
    assert "sbatch --array=0-0 launchers/slurm/sweep.sbatch --config" in found.out


def test_a_plan_has_a_line_for_each_point_and_a_column_for_each_axis(tmp_path, shards, capsys):
    elsewhere = ("data.seq_len", "model.filter_order")
    keys = {"set": {key: value for key, value in SIZES.items() if key not in elsewhere}}
    keys["set"] |= {"data.shards": str(shards), "optim.schedule": "wsd"}
    keys |= {"axes": {"data.seq_len": [64, 9999], "data.mixture": [None, [{"name": "[red]a"}]],
                      "zip": {"model.filter_order": [8, 16], "optim.lr": [1e-3, 2e-3]}},
             "forks": [{"at": 4, "cooldown": 2}]}
    assert main(["plan", "--config", str(write(tmp_path, **keys))]) == 2
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert " ".join(lines[0]).startswith("# point fork of mixture seq_len filter_order weights steps FLOPs tokens")
    rows = lines[2:-1]
    assert len(rows) == int(lines[-1][0]), "a line for each"
    whole = [line for line in rows if "cannot" not in line]
    assert [line[0] for line in whole[:2]] == ["0", "1"], "as run --index counts"
    assert [line[2:5] for line in whole[:2]] == [["null", "64", "8"], ["null", "64", "16"]]
    assert ['[{"name":', '"[red]a"}]', "9999", "16", "cannot", "run"] in [line[1:] for line in rows]
    assert [line[1] for line in rows[8:10]] == [line[1] for line in whole[:2]], "a fork names its origin"


SWEEPS = sorted([*ROOT.glob("configs/sweeps/*.yaml"), *ROOT.glob("configs/studies/*.yaml")])
LARGE = sorted((path for path in SWEEPS if path.stem.endswith("-large")),
               key=lambda path: path.stem != "hyena-transformer-large")  # first the one of few points


@pytest.mark.parametrize("path", [
    path if path.stem in ("tiny", "kmers", "depth-length") else pytest.param(path, marks=pytest.mark.slow)
    for path in SWEEPS], ids=lambda path: path.stem)
def test_every_sweep_that_comes_with_the_project_can_be_planned(monkeypatch, path):
    monkeypatch.chdir(ROOT)
    points = expand(read_sweep(path))
    assert {point.problem for point in points} == {None}
    for point in (points[0], points[-1]):  # as on a command line
        assert load_config(find_base(path), [f"{key}={json.dumps(value)}" for key, value in point.set.items()])


@pytest.mark.parametrize("path", [LARGE[0], *(pytest.param(path, marks=pytest.mark.slow) for path in LARGE[1:])],
                         ids=lambda path: path.stem)
def test_every_point_of_a_large_study_passes_a_dry_run_of_a_node(monkeypatch, tmp_path, capsys, path):
    """Eight H100, as the pages say; a far deeper model is the control."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "8")
    found = read_sweep(path)
    assert found.ranks == 8
    points = {json.dumps(point.set): point for point in expand(found)}.values()
    for point in points:
        call = ["--config", str(find_base(path)), *(f"{key}={json.dumps(value)}" for key, value in point.set.items()),
                "train.run_dir=run", "--dry-run", "--gpu"]
        assert pretrain([*call, "h100"]) == 0, capsys.readouterr().err
    assert pretrain([*call, "h100", "model.num_layers=2000"]) == 2


def find_base(path: Path) -> Path:
    from hyena_dist.config.presets import find
    return find(read_sweep(path).base)


def test_places_have_gpus_of_their_own():
    assert [devices_of(slot, 1, ["0", "1", "2"]) for slot in range(4)] == [["0"], ["1"], ["2"], ["0"]]
    assert [devices_of(slot, 2, ["4", "5", "6", "7"]) for slot in range(2)] == [["4", "5"], ["6", "7"]]
    assert devices_of(1, 4, ["0"]) == ["0"]
    assert devices_of(0, 1, []) == []
