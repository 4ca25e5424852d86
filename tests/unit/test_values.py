"""A configuration says what a person reads in it: strings keep their text, what can be read twice is refused."""

import pytest
import yaml

from hyena_dist.config.errors import ConfigError, UserError
from hyena_dist.config.load import dump_config, load_config, read_config
from hyena_dist.convert.section import checked_section

MINIMAL = "data: {shards: s}\ntrain: {run_dir: r}\n"
WORDS = ["010", "20261126_1", "1_000", "1:30", "on", "no", "true", "1e5", "0x1f", "2026-11-26", "3.10", "nan", ".5",
         "a b", "runs/é", "=", "y", "-1", "+1"]


def load(tmp_path, text=MINIMAL, *overrides, read=load_config):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return read(path, overrides)


@pytest.mark.parametrize("word", WORDS)
def test_a_string_keeps_its_text(tmp_path, word):
    """YAML 1.1 makes 8, 202611261, 1000, 90 and True of the first."""
    by_argument = load(tmp_path, MINIMAL, f"train.run_dir={word}", f"data.shards='{word}'")
    assert by_argument.train.run_dir == by_argument.data.shards == word
    by_file = load(tmp_path, f"data: {{shards: '{word}'}}\ntrain:\n  run_dir: {word}\n")
    assert by_file == by_argument
    assert load(tmp_path, dump_config(by_file), read=read_config) == by_file
    assert yaml.safe_load(dump_config(by_file))["train"]["run_dir"] == word  # as the batch script reads it


@pytest.mark.parametrize("word", ["#7", "a #b", "a: b", "[a]", "{a}", "*a", "&a", "!a", "a\tb"])
def test_on_the_command_line_a_string_is_no_yaml(tmp_path, word):
    config = load(tmp_path, MINIMAL, f"train.run_dir={word}")
    assert config.train.run_dir == word
    assert load(tmp_path, dump_config(config), read=read_config) == config


@pytest.mark.parametrize(("override", "message"), [
    ("train.steps=010", "train.steps: '010' can be read as different numbers"),
    ("train.steps=08", "can be read as different"),
    ("train.steps='010'", "can be read as different"),
    ("train.steps=1_000", "can be read as different"),
    ("train.steps='1_000'", "can be read as different"),
    ("train.steps=1:30", "can be read as different"),
    ("train.steps=0x10", "can be read as different"),
    ("train.steps=0b11", "can be read as different"),
    ("train.steps=0o17", "can be read as different"),
    ("train.steps=-010", "can be read as different"),
    ("optim.lr=1_0.5", "can be read as different"),
    ("optim.lr=1:30.5", "can be read as different"),
    ("optim.betas=[0.9, 1_0]", r"optim.betas\[1\]: '1_0' can be"),
    ("train.seq_len_warmup=[{seq_len: 0100, steps: 5}]", r"train.seq_len_warmup\[0\].seq_len: '0100' can be read"),
    ("engine.deepspeed.steps_per_print=010", "engine.deepspeed.steps_per_print: '010' can be read"),
    ("engine.deepspeed.zero_optimization={overlap_comm: yes}", "overlap_comm: 'yes' can be read as a switch or a word"),
    ("train.activation_offload=on", "train.activation_offload: write true or false, got 'on'"),
    ("train.activation_offload=1", "write true or false, got '1'"),
    ("parallel.sequence='no'", "write true or false, got 'no'"),
    ("train.steps=on", "train.steps: 'on' can be read as a switch"),
    ("optim.lr=.inf", "optim.lr must be greater than 0 and finite, got inf"),
    ("optim.lr=.nan", "optim.lr must be greater than 0 and finite, got nan"),
    ("optim.lr=1e400", "finite, got inf"),
    ("data.val_seq_len=", "data.val_seq_len has no value: write null where none is meant"),
    ("data.val_seq_len=#5", "data.val_seq_len has no value"),
    ("data.val_seq_len=&a 5", "anchors, aliases and tags are not read"),
    ("train.steps=!!python/name:os.system", "anchors, aliases and tags are not read"),
    ("train.run_dir=???", r"train.run_dir has no value: write one instead of \?\?\?"),
    ("train.run_dir=null", "train.run_dir must be a string, got null"),
    ("train.run_dir=", "train.run_dir must be a path, got ''"),
    ("train.run_dir=' '", "train.run_dir must be a path, got ' '"),
    ("data.shards=''", "data.shards must be a path"),
    ("train.resume=", "train.resume must be a path"),
    ("train..steps=3", "section.key=value"),
    ("train.run_dir=${oc.env:HOME}", r"train.run_dir: .* is not replaced in a configuration"),
    ("engine.deepspeed.log_level=${oc.env:HOME}", r"engine.deepspeed.log_level: .* is not replaced"),
    ("train.run_dir=/tmp/\udce9", r"train.run_dir: '/tmp/.udce9' is not text of UTF-8: write another name"),
    ('train.run_dir="\\uD800"', "train.run_dir: '.ud800' is not text of UTF-8"),
    ('engine.deepspeed.comms_logger.prof_ops=["\\uD800"]', r"prof_ops\[0\]: .* is not text of UTF-8"),
    ("engine.deepspeed.\udce9=1", "is not text of UTF-8"),
    ("engine.deepspeed={comms_logger: {\"\\uD800\": 1}}", "is not text of UTF-8"),
    (f"train.steps={10**23}", "train.steps: 1000.* is too large: write a number of at most 18 digits"),
    ("train.steps=1" + 5000 * "0", "train.steps: 1000.* is too large"),
    (f"train.steps={2**53 + 1}", r"train.steps must be at most 2\*\*53, got 9007199254740993"),
    (f"model.hyena_order={2**53 + 1}", r"model.hyena_order must be at most 2\*\*53"),
    (f"engine.deepspeed.steps_per_print={10**400}", "steps_per_print: 1000.* is too large"),
    (f"optim.lr={10**400}", "optim.lr must be greater than 0 and finite, got inf"),
    (f"train.seq_len_warmup=[{{seq_len: 64, steps: {2**53 + 1}}}]", r"steps must be .* at most 2\*\*53, got"),
    ("optim.betas=[a,b]", r"optim.betas\[0\]: write a number, got 'a'"),
    ("optim.betas=[0.9,[1]]", r"optim.betas\[1\]: write a number, got a list of 1"),
    ("optim.betas=[0.9,null]", r"optim.betas\[1\] has no value: write a number"),
    ("optim.betas=[0.9]", r"optim.betas: write a list like \[0.9, 0.9\], got a list of 1"),
    ("optim.betas={a: 1}", r"optim.betas: write a list like \[0.9, 0.9\], got keys and values"),
    ("optim.betas=0.9", r"optim.betas: write a list like \[0.9, 0.9\], got '0.9'"),
    ("optim.betas=null", r"optim.betas has no value: write a list"),
    ("train.steps={a: 1}", "train.steps: write a whole number, got keys and values"),
    ("train=1", "train: write keys and values"),
    ("engine.deepspeed=[1]", "engine.deepspeed: write keys and values, .* got a list of 1"),
    ("train.steps=\u0665", "train.steps: write a whole number, got '\u0665'"),
    ("train.steps='1\u0665'", "train.steps: write a whole number, got '1\u0665'"),
    ("optim.lr=\uff15", "optim.lr: write a number, got '\uff15'"),
    ("optim.betas=[0.9, \u0660.9]", r"optim.betas\[1\]: write a number"),
    ("train.run_dir=$NO_SUCH_VARIABLE/x", "the environment variable NO_SUCH_VARIABLE is not set"),
    ("train.run_dir=~no_such_user/x", "there is no such home directory"),
])
def test_what_can_be_read_in_two_ways_is_refused(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, MINIMAL, override)
    assert "\n" not in str(caught.value)
    assert override.partition("=")[0].partition(".")[0] in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [
    ("data: {shards: s}\ntrain: {run_dir: r, steps: 010}", "run.yaml: train.steps: '010'"),
    ("", "run.yaml: data.shards has no value, and there is no default for it: set it there, or as an argument"),
    ("data: {shards: s}\n", "run.yaml: train.run_dir has no value, and there is no default"),
    ("data: {shards: s}\ntrain:\n  run_dir:\n", "run.yaml: train.run_dir has no value"),
    ("data: {shards: s}\ntrain: {run_dir: ~}\n", "run.yaml: train.run_dir has no value: .* quotes around a word"),
    ("data: {shards: s}\ntrain: {run_dir: r, resume: ~}\n", "run.yaml: train.resume has no value"),
    ("data: {shards: s}\ntrain: {run_dir: \"\\uD800\"}\n", "run.yaml: train.run_dir: .* is not text of UTF-8"),
    ("data: {shards: s}\ntrain: {run_dir: r, steps: \u0665}\n", "run.yaml: train.steps: write a whole number"),
    ("data: {shards: s}\ntrain: {run_dir: [r]}\n", "run.yaml: train.run_dir: write a word, got a list of 1"),
    ("data: {shards: s}\ntrain: null\n", "run.yaml: train has no value: write keys and values"),
    ("data: {~: s}", "a key must be a word"),
    ("data: {shards: '${oc.env:HOME}'}\ntrain: {run_dir: r}", "run.yaml: data.shards: .* is not replaced"),
    ("data: {shards: s}\ntrain: {run_dir: r}\nengine: {deepspeed: {'${oc.env:HOME}': 1}}", "is not replaced"),
    ("data: &a {shards: s}\ntrain: {run_dir: r}\nmodel: *a", "line 1: anchors, aliases and tags"),
    ("data: !!map {shards: s}", "line 1: anchors, aliases and tags"),
    ("data: {<<: {shards: s}}", "a key must be a word"),
    ("data: {[1]: s}", "a key must be a word"),
    ("data: {shards: s, shards: t}", "data.shards: duplicate key in line 1"),
    ("[" * 500 + "]" * 500, "more than 20 mappings"),
    ("a word", "run.yaml"),
    ("a: 1\n---\nb: 2", "not a valid YAML file: expected a single document"),
])
def test_files_are_read_as_strictly(tmp_path, text, message):
    for read in (load_config, read_config):
        with pytest.raises(ConfigError, match=message) as caught:
            load(tmp_path, text, read=read)
        assert "\n" not in str(caught.value)


def test_numbers_and_switches_are_as_written(tmp_path):
    config = load(tmp_path, MINIMAL, "train.steps=20", "optim.lr=6e-4", "optim.betas=[0.9,.95]", "optim.eps=1.e-8",
                  "train.activation_offload=true", "parallel.sequence=False", "data.val_seq_len=null", "train.seed=0",
                  "engine.deepspeed.zero_optimization.reduce_bucket_size=5e8", "optim.weight_decay=0",
                  "train.seq_len_warmup=[{seq_len: 64, steps: 5}]")
    assert (config.train.steps, config.optim.lr, config.optim.betas, config.optim.eps) == (20, 6e-4, (0.9, 0.95), 1e-8)
    assert (config.train.activation_offload, config.parallel.sequence, config.data.val_seq_len) == (True, False, None)
    assert config.engine.deepspeed == {"zero_optimization": {"reduce_bucket_size": 5e8}}
    assert config.train.seq_len_warmup == [{"seq_len": 64, "steps": 5}]


def test_paths_are_expanded_for_ones_own_run_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("HOME", "/home/me")
    config = load(tmp_path, "data: {shards: ~/shards}\ntrain: {run_dir: $SCRATCH/runs, resume: ~/old}\n")
    assert (config.data.shards, config.train.run_dir, config.train.resume) == (
        "/home/me/shards", "/scratch/me/runs", "/home/me/old")
    assert load(tmp_path, MINIMAL, "train.run_dir=~").train.run_dir == "/home/me"
    assert load(tmp_path, MINIMAL, "model.layer_pattern=H").train.resume == "auto"
    # A file of someone else's run: nothing of this process gets into it.
    strange = load(tmp_path, "data: {shards: $SCRATCH/x}\ntrain: {run_dir: ~/r}\n", read=read_config)
    assert (strange.data.shards, strange.train.run_dir) == ("$SCRATCH/x", "~/r")
    monkeypatch.setenv("SCRATCH", "")
    with pytest.raises(ConfigError, match=r"train.run_dir=\$SCRATCH/x: the environment variable SCRATCH is not set"):
        load(tmp_path, MINIMAL, "train.run_dir=$SCRATCH/x")


@pytest.mark.parametrize(("value", "message"), [
    ("???", r"train.run_dir=\$X has no value: write one instead of \?\?\?"),
    ("${oc.env:HOME}", r"train.run_dir=\$X: .* is not replaced in a configuration"),
    ("${", r"is not replaced in a configuration"),
    ("/scratch/$HOME", r"becomes '/scratch/\$HOME', and a \$NAME in a variable is not replaced"),
    ("/tmp/\udce9", "train.run_dir=.X: .* is not text of UTF-8"),
    (" ", "train.run_dir must be a path, got ' '"),
    ("a\0b", "train.run_dir must be a path"),
])
def test_what_a_variable_holds_is_a_plain_path(tmp_path, value, message):
    """One that config.yaml gives back. The control: it does."""
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path, ["train.run_dir=$X"], env={"X": value})
    assert "\n" not in str(caught.value)
    config = load_config(path, ["train.run_dir=$X"], env={"X": "/tmp/\u00e9 ? 5$"})
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path, env={}) == config


@pytest.mark.parametrize("section", [{"num_layers": "\u0665"}, {"num_layers": "5"}, {"num_layers": 10**23},
                                     {"filter_sine_freq": 10**400}, {"num_layers": True}])
def test_a_strangers_numbers_are_numbers(section):
    with pytest.raises(UserError, match=next(iter(section)) + "|too large"):
        checked_section(section)
    assert checked_section({"num_layers": 5}).num_layers == 5  # the control


def test_a_strangers_model_section_is_not_interpolated(monkeypatch):
    monkeypatch.setenv("SECRET", "HHAH")
    with pytest.raises(UserError, match=r"layer_pattern: .*SECRET.* is not replaced") as caught:
        checked_section({"layer_pattern": "${oc.env:SECRET}"})
    assert "HHAH" not in str(caught.value)
    assert checked_section({"layer_pattern": "HHAH"}).layer_pattern == "HHAH"  # the control
