"""The length warm-up: its keys, its stages, and what a stage must fit."""

from dataclasses import replace

import pytest

from hyena_dist.config.checks import accumulation_steps
from hyena_dist.config.errors import ConfigError
from hyena_dist.config.identity import differences, identity
from hyena_dist.config.load import dump_config, load_config
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.config.warmup import Stage, stage_at, stages, tokens_after
from hyena_dist.model.kinds import check

MINIMAL = "data: {shards: s}\ntrain: {run_dir: r}\n"
TWO = [{"seq_len": 64, "steps": 100}, {"seq_len": 256, "tokens": 100_000}]


def config(warmup="none", *, seq_len=1024, world=None, **train):
    values = {"global_batch_size": 8, "micro_batch_size": 2, "steps": 1000, "seq_len_warmup": warmup} | train
    return Config(model=ModelSection(max_seq_len=seq_len), data=DataSection(shards="s", seq_len=seq_len),
                  train=TrainSection(run_dir="r", **values), parallel=ParallelSection(**(world or {})))


def test_without_a_warm_up_there_is_one_stage():
    assert stages(config(), data_ranks=4) == (Stage(0, 0, 1000, 1024, 2, 8),)


@pytest.mark.parametrize(("batch", "ranks", "expected"), [
    # 100_000 tokens are 48.8 steps of 8 windows of 256, and 12.2 of 32.
    ("sequences", 1, [(0, 100, 64, 8, 8), (100, 149, 256, 8, 8), (149, 1000, 1024, 2, 8)]),
    ("sequences", 4, [(0, 100, 64, 2, 8), (100, 149, 256, 2, 8), (149, 1000, 1024, 2, 8)]),
    ("tokens", 1, [(0, 100, 64, 32, 128), (100, 113, 256, 8, 32), (113, 1000, 1024, 2, 8)]),
    ("tokens", 4, [(0, 100, 64, 32, 128), (100, 113, 256, 8, 32), (113, 1000, 1024, 2, 8)]),
])
def test_stages_by_hand(batch, ranks, expected):
    found = stages(config(TWO, seq_len_warmup_batch=batch), data_ranks=ranks)
    assert [(s.first_step, s.stop_step, s.seq_len, s.micro_batch_size, s.global_batch_size) for s in found] == expected
    assert [stage.index for stage in found] == [0, 1, 2]
    if batch == "tokens":
        assert {stage.tokens_per_step for stage in found} == {8 * 1024}


def test_a_micro_batch_of_its_own():
    entries = [{"seq_len": 64, "steps": 1, "micro_batch_size": 4}]
    assert stages(config(entries), data_ranks=1)[0].micro_batch_size == 4


@pytest.mark.parametrize(("seq_len", "lengths"), [
    (64, [64]), (65, [64, 65]), (128, [64, 128]), (129, [64, 128, 129]), (1000, [64, 128, 256, 512, 1000]),
    (1_000_000, [*(64 * 2**n for n in range(14)), 1_000_000]),
])
def test_double_stays_below_the_target(seq_len, lengths):
    found = stages(config("double", seq_len=seq_len, seq_len_warmup_steps=10), data_ranks=1)
    assert [stage.seq_len for stage in found] == lengths
    assert [stage.first_step for stage in found] == [10 * n for n in range(len(lengths))]


@pytest.mark.parametrize("seq_len", [1024, 1000, 160_000])
@pytest.mark.parametrize("batch", ["sequences", "tokens"])
def test_a_stage_fits_wherever_the_target_fits(seq_len, batch):
    """Its batch is cut by data ranks and micro-batch, and a micro-batch has no more tokens than the target's."""
    run = config("double", seq_len=seq_len, seq_len_warmup_steps=10, global_batch_size=48, seq_len_warmup_batch=batch)
    for ranks in (1, 2, 3, 4, 6, 8, 12, 24):
        check(run, world_size=ranks)
        for stage in stages(run, data_ranks=ranks):
            accumulation_steps(global_batch_size=stage.global_batch_size, micro_batch_size=stage.micro_batch_size,
                               data_ranks=ranks)
            assert stage.micro_batch_size * stage.seq_len <= 2 * seq_len
            assert stage.tokens_per_step > (24 * seq_len if batch == "tokens" else 0)
            assert stage.tokens_per_step <= 48 * seq_len


def test_steps_have_their_stage_and_tokens():
    found = stages(config(TWO), data_ranks=1)
    assert [stage_at(found, step).index for step in (0, 99, 100, 148, 149, 999, 1000)] == [0, 0, 1, 1, 2, 2, 2]
    assert [tokens_after(found, step) for step in (0, 1, 100, 101, 149, 151)] == [
        0, 512, 51_200, 51_200 + 2048, 51_200 + 49 * 2048, 51_200 + 49 * 2048 + 2 * 8192]


@pytest.mark.parametrize(("value", "message"), [
    ("half", "train.seq_len_warmup must be none, double or a list"),
    ("[]", "train.seq_len_warmup must be none"),
    ("{seq_len: 64}", r"train.seq_len_warmup must be none"),
    ("[64]", r"train.seq_len_warmup\[0\] must be a stage"),
    ("[{seq_len: 64, steps: 1}, {seq_len: 64, setps: 1}]", r"train.seq_len_warmup\[1\].setps is not a key"),
    ("[{seq_len: 64, steps: 1.5}]", r"train.seq_len_warmup\[0\].steps must be a whole number .* got 1.5"),
    ("[{seq_len: '64', steps: 1}]", r"train.seq_len_warmup\[0\].seq_len must be a whole number"),
    ("[{seq_len: 64, steps: true}]", r"train.seq_len_warmup\[0\].steps must be a whole number"),
    ("[{seq_len: 0, steps: 1}]", r"train.seq_len_warmup\[0\].seq_len must be .* greater than 0"),
    ("[{steps: 1}]", r"train.seq_len_warmup\[0\].seq_len is missing"),
    ("[{seq_len: 64}]", r"train.seq_len_warmup\[0\] must have either steps or tokens"),
    ("[{seq_len: 64, steps: 1, tokens: 1}]", r"train.seq_len_warmup\[0\] must have either"),
    ("double", "train.seq_len_warmup_steps is the steps of each stage"),
])
def test_malformed_stages_are_refused_by_key(tmp_path, value, message):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL.replace("r}", f"r, seq_len_warmup: {value}}}"))
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("overrides", [
    ["train.seq_len_warmup=[{seq_len: 64, steps: 100}, {seq_len: 256, tokens: 100000, micro_batch_size: 4}]"],
    ["train.seq_len_warmup=double", "train.seq_len_warmup_steps=7", "train.seq_len_warmup_batch=tokens"],
])
def test_what_is_dumped_reads_back_equal(tmp_path, overrides):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    run = load_config(path, overrides)
    path.write_text(dump_config(run))
    assert load_config(path) == run
    assert len(stages(run, data_ranks=1)) > 1


@pytest.mark.parametrize(("run", "world_size", "message"), [
    (config([{"seq_len": 2048, "steps": 1}]), 1, r"warmup\[0\]: seq_len \(2048\) exceeds data.seq_len \(1024\)"),
    (config([TWO[1], TWO[0]]), 1, r"warmup\[1\]: seq_len \(64\) is less than the 256 of the stage before"),
    (config(TWO, steps=149), 1, r"take 149 steps .* train.steps \(149\) .* train.steps to more than 149"),
    (config("double", seq_len_warmup_steps=250), 1, "take 1000 steps"),
    (config([{**TWO[0], "micro_batch_size": 3}]), 2, r"warmup\[0\]: micro_batch_size \(3\) .* 4 windows .*: use 2"),
    (config([{**TWO[0], "micro_batch_size": 9}]), 1, "does not divide the 8 windows .* use 8"),
    (config([{"seq_len": 3, "steps": 1}], world={"context": 2}), 2, r"warmup\[0\]: seq_len \(3\) is too short .* 4"),
    (config("double", seq_len_warmup_steps=1, world={"context": 64}), 64,
     r"train.seq_len_warmup=double, stage 0: seq_len \(64\) is too short .* use 128"),
    (config([{**TWO[0], "micro_batch_size": 1}], global_batch_size=6, micro_batch_size=3,
            world={"context": 3, "context_method": "all_to_all"}), 3,
     r"channels x train.seq_len_warmup\[0\]: micro_batch_size .* \(128\) is not a multiple of parallel.context \(3\)"),
])
def test_stages_fit_the_run(run, world_size, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check(run, world_size=world_size)
    assert str(caught.value).count(";") == 0, "one violation, said once"


def test_only_the_micro_batch_of_a_stage_is_free():
    def changed(**changes):
        return identity(config([{**TWO[0], **changes}, TWO[1]]))

    saved = identity(config(TWO))
    assert differences(saved, changed(micro_batch_size=4)) == []
    assert differences(saved, changed(tokens=None)) == []
    assert len(differences(saved, changed(seq_len=128))) == len(differences(saved, changed(steps=101))) == 1
    assert len(differences(saved, identity(config()))) == 1
    assert differences(saved, identity(config(TWO, seq_len_warmup_batch="tokens"))) == [
        'train.seq_len_warmup_batch: saved "sequences", now "tokens"']


def test_any_precision_resumes_any():
    base = config()
    assert differences(identity(base), identity(replace(base, train=replace(base.train, precision="bf16")))) == []
