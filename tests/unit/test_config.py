"""The configuration: strict reading, one rule each, and every shipped file."""

import itertools
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hyena_dist.config.checks import accumulation_steps
from hyena_dist.config.errors import ConfigError
from hyena_dist.config.identity import CHANGEABLE, FIXED, MEASURE, PLACES, changes, differences, identity
from hyena_dist.config.load import dump_config, load_config
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.model.kinds import check

CONFIGS = sorted(path for path in (Path(__file__).parents[2] / "configs").rglob("*.yaml")
                 if path.parent.name not in ("sweeps", "studies"))  # of many runs each
MINIMAL = "data: {shards: s}\ntrain: {run_dir: r}\n"


def load(tmp_path, text=MINIMAL, *overrides):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(path, overrides)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_shipped_config(path):
    config = load_config(path)
    for world_size in (1, 2):
        check(config, world_size=world_size)


def test_there_are_shipped_configs():
    assert CONFIGS


def test_what_is_dumped_reads_back_equal(tmp_path):
    config = load(tmp_path, MINIMAL, "optim.lr=6e-4", "engine.deepspeed.comms_logger.enabled=true")
    assert config.optim.lr == 6e-4
    assert config.engine.deepspeed == {"comms_logger": {"enabled": True}}
    assert load(tmp_path, dump_config(config)) == config


def test_overrides_win(tmp_path):
    assert load(tmp_path, MINIMAL + "optim: {lr: 1.0e-3}", "optim.lr=2e-3").optim.lr == 2e-3


@pytest.mark.parametrize(("text", "overrides", "message"), [
    (MINIMAL, ["optim.lrr=1"], r"argument 'optim.lrr=1': optim.lrr: Key 'lrr' not in"),
    (MINIMAL + "optims: {}", [], r"run.yaml: .*optims"),
    (MINIMAL + "optim: {lr: fast}", [], r"run.yaml: optim.lr: .*'fast'"),
    (MINIMAL, ["train.steps=1.5"], r"train.steps: .*1.5"),
    (MINIMAL, ["train.steps"], r"section.key=value"),
    (MINIMAL, ["--steps=4"], r"section.key=value"),
    ("train: {run_dir: r}", [], r"data.shards"),
    ("a: b: c", [], "not a valid YAML"),
    (MINIMAL + "data: {shards: t}", [], "duplicate key"),
    ("- a", [], "run.yaml"),
    (MINIMAL, ["model.filter_emb_dim=4"], "model.filter_emb_dim must be odd"),
    (MINIMAL, ["model.hyena_order=1"], "model.hyena_order"),
    (MINIMAL, ["model.filter_seq_len=0"], "model.filter_seq_len"),
    (MINIMAL, ["model.layer_pattern=HX"], "model.layer_pattern"),
    (MINIMAL, ["model.embed_dropout=1.0"], "model.embed_dropout"),
    (MINIMAL, ["model.num_layers=0"], "model.num_layers"),
    (MINIMAL, ["train.precision=int8"], "train.precision must be one of"),
    (MINIMAL, ["optim.lr=0"], "optim.lr"),
    (MINIMAL, ["optim.min_lr=1"], "optim.min_lr"),
    (MINIMAL, ["engine.zero_stage=4"], "engine.zero_stage"),
    (MINIMAL, ["data.seq_len=-5"], "data.seq_len"),
])
def test_refuses_with_one_line_that_names_the_key(tmp_path, text, overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, text, *overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "overrides", "source"), [
    (MINIMAL, ["optim.lr=0"], "argument 'optim.lr=0': optim.lr must be"),
    (MINIMAL + "optim: {lr: 1.0e-3}", ["train.steps=7", "optim.lr=0"], "argument 'optim.lr=0': optim.lr must be"),
    (MINIMAL, ["train.steps=7", "model.layer_pattern=HX"], "argument 'model.layer_pattern=HX': model.layer_pattern"),
    (MINIMAL, ["train.seq_len_warmup=double"], "argument 'train.seq_len_warmup=double': train.seq_len_warmup_steps"),
    (MINIMAL, ["train.seq_len_warmup=[{seq_len: 0, steps: 1}]"], "argument 'train.seq_len_warmup="),
    (MINIMAL, ["train.steps={"], "argument 'train.steps={': not a valid value of YAML"),
    (MINIMAL, ["train.run_dir=' '"], "argument \"train.run_dir=' '\": train.run_dir must be a path"),
    (MINIMAL + "optim: {lr: 0}", ["train.steps=7"], "{file}: optim.lr must be"),
    (MINIMAL + "optim: {lr: 0}", [], "{file}: optim.lr must be"),
    ("data: {shards: s}", ["optim.lr=0.1"], "{file}: train.run_dir"),
    ("data: {shards: s}", ["train.run_dir=r", "optim.lr=0"], "argument 'optim.lr=0': optim.lr must be"),
])
def test_a_wrong_value_is_blamed_on_where_it_stands(tmp_path, text, overrides, source):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    assert str(caught.value).startswith(source.replace("{file}", str(tmp_path / "run.yaml")))


def test_a_variable_that_holds_no_path_is_not_blamed_on_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    with pytest.raises(ConfigError, match="^train.run_dir must be a path, got ' ': correct the environment variable"):
        load_config(path, ["train.run_dir=$BLANK"], env={"BLANK": " "})


def test_refuses_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match=r"absent.yaml: cannot read"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\x00\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary.yaml: not a valid YAML"):
        load_config(tmp_path / "binary.yaml")
    (tmp_path / "wide.yaml").write_text(MINIMAL, encoding="utf-16")
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/wide.yaml: is text in UTF-16: convert it with `iconv"):
        load_config(tmp_path / "wide.yaml")
    (tmp_path / "pointer.yaml").write_text("version https://git-lfs.github.com/spec/v1\nsize 12\n")
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/pointer.yaml: is a git-lfs pointer .*: run `git lfs pull`"):
        load_config(tmp_path / "pointer.yaml")
    (tmp_path / "marked.yaml").write_text(MINIMAL, encoding="utf-8-sig")
    assert load_config(tmp_path / "marked.yaml").data.shards == "s", "YAML allows a byte order mark"


BASE = Config(data=DataSection(shards="s"), train=TrainSection(run_dir="r", global_batch_size=8, micro_batch_size=2))


@pytest.mark.parametrize(("config", "world_size", "message"), [
    (replace(BASE, data=replace(BASE.data, seq_len=4096)), 1, r"data.seq_len \(4096\) exceeds .* \(1024\)"),
    (replace(BASE, data=replace(BASE.data, val_seq_len=4096)), 1, "data.val_seq_len"),
    (BASE, 3, r"global_batch_size \(8\) is not a multiple of .* 2 x 3 data ranks \(6\): use 6 or 12"),
    (BASE, 8, "use 16"),
    (replace(BASE, parallel=ParallelSection(tensor=2, context=2)), 2, "needs as many ranks"),
    (replace(BASE, optim=replace(BASE.optim, warmup_steps=1000)), 1, "optim.warmup_steps"),
    (replace(BASE, optim=replace(BASE.optim, warmup_steps=10, schedule="wsd", cooldown=991.0)), 1,
     r"warmup_steps \(10\) and the 991 steps of optim.cooldown are more than train.steps \(1000\): .* at most 990"),
    (replace(BASE, parallel=ParallelSection(sequence=True)), 1, "parallel.sequence splits tokens"),
    (replace(BASE, parallel=ParallelSection(tensor=3)), 3, r"hidden_size \(128\) is not .* \(3\): use 126 or 129;"),
    (replace(BASE, parallel=ParallelSection(tensor=32)), 32, r"vocab_size \(16\) is not .*: set .*vocab_size to 32"),
    (replace(BASE, model=replace(BASE.model, kmer=6), parallel=ParallelSection(tensor=16)), 16,
     r"vocab_size \(4104\) is not .*: set model.vocab_size to 4112"),
    (replace(BASE, parallel=ParallelSection(context=3, context_method="all_to_all")), 3,
     r"\(256\) is not a multiple of parallel.context \(3\): set parallel.context_method=distributed_fft$"),
    (replace(BASE, parallel=ParallelSection(context=3)), 8, r"context = 3 does not divide the 8 ranks: start 6 or 12$"),
    (replace(BASE, parallel=ParallelSection(context=2, overlap_groups=3)), 2,
     r"overlap_groups \(3\): set parallel.overlap_groups to 2 or 4"),
    (replace(BASE, parallel=ParallelSection(context=2), data=replace(BASE.data, seq_len=3)), 2, "seq_len .* use 4"),
    (replace(BASE, parallel=ParallelSection(context=2), model=replace(BASE.model, layer_pattern="HA")), 2,
     r"num_attention_heads \(1\) is not a multiple of parallel.tensor x parallel.context \(2\): use 2"),
    (replace(BASE, model=replace(BASE.model, layer_pattern="A", num_attention_heads=3)), 1, r"use 126 or 132"),
    (replace(BASE, parallel=ParallelSection(context=2, context_method="distributed_fft"),
             data=replace(BASE.data, pack=True)), 2,
     r"context_method=distributed_fft does not keep the contigs of a packed window apart: set .*=all_to_all"),
    (replace(BASE, parallel=ParallelSection(context=3), data=replace(BASE.data, pack=True)), 3,
     r"\(256\) is not a multiple of parallel.context \(3\): set parallel.context_method=distributed_fft and data.pack"),
])
def test_rules_across_sections(config, world_size, message):
    with pytest.raises(ConfigError, match=message):
        check(config, world_size=world_size)


def followed(config, ranks, wrong):
    """The configurations and ranks that the advices of messages lead to."""
    for advice in wrong:
        text, _, remedy = advice.rpartition(": ")
        if found := re.fullmatch(r"start (\d+)(?: or (\d+))?", remedy):
            yield from ((config, int(value)) for value in found.groups() if value)
        for key, first, second in re.findall(r"(?:use|set (\S+) to) (\d+)(?: or (\d+))?(?! or more)", remedy):
            key = key or text.split(" ")[0]
            section, name = key.split(".")
            for value in filter(None, (first, second)):
                changed = replace(getattr(config, section), **{name: int(value)})
                yield replace(config, **{section: changed}), ranks
        if "context_method=distributed_fft" in remedy:
            yield replace(config, parallel=replace(config.parallel, context_method="distributed_fft")), ranks


def problems(config, ranks):
    try:
        check(config, world_size=ranks)
    except ConfigError as error:
        return str(error).split("; ")
    return []


@pytest.mark.parametrize(("ranks", "least"), [(4, 100), pytest.param(15, 100, marks=pytest.mark.slow)])
def test_advice_can_be_followed(ranks, least):
    """Over many wrong configurations: each value that is advised leaves fewer violations than there were."""
    advised = 0
    for tensor, context, heads, pattern, micro, method, groups in itertools.product(
            (1, 2), (1, 3), (1, 4), ("", "HA"), (2, 5), ("auto", "all_to_all"), (1, 5)):
        parallel = ParallelSection(tensor=tensor, context=context, context_method=method, overlap_groups=groups)
        config = replace(BASE, parallel=parallel, train=replace(BASE.train, micro_batch_size=micro),
                         model=replace(BASE.model, layer_pattern=pattern, num_attention_heads=heads))
        wrong = problems(config, ranks)
        for changed, new_ranks in followed(config, ranks, wrong):
            advised += 1
            assert len(problems(changed, new_ranks)) < len(wrong), f"{wrong}: {changed} on {new_ranks}"
    print(f"{advised} advices followed")
    assert advised > least


def test_an_advice_that_breaks_another_rule_is_not_given():
    """The nearest multiples of 3 heads are 3 and 6, but no width of 128 has as many."""
    config = replace(BASE, parallel=ParallelSection(context=3, context_method="distributed_fft"),
                     model=replace(BASE.model, layer_pattern="A", num_attention_heads=4))
    with pytest.raises(ConfigError, match=r"heads \(4\) is not .*context \(3\): change parallel.tensor or par"):
        check(config, world_size=3)
    check(replace(config, parallel=ParallelSection(context=2)), world_size=2)  # the control


def test_accumulation_follows_the_ranks():
    assert accumulation_steps(global_batch_size=12, micro_batch_size=2, data_ranks=3) == 2


def test_every_violation_is_named_at_once():
    config = replace(BASE, data=replace(BASE.data, seq_len=4096), optim=replace(BASE.optim, warmup_steps=1000))
    with pytest.raises(ConfigError, match=r"data.seq_len.*optim.warmup_steps"):
        check(config, world_size=1)


@pytest.mark.parametrize("word", ["latest", "Best", "true"])
def test_a_word_that_is_no_path_to_resume_from_is_told_which_there_are(word):
    with pytest.raises(ValueError, match=rf"train.resume must be auto .*none, the path .*weights:PATH, got '{word}'"):
        TrainSection(run_dir="runs/mine", resume=word)
    assert TrainSection(run_dir="runs/mine", resume=f"./{word}").origin == f"./{word}"


def test_every_key_says_whether_a_resume_may_change_it():
    """A key that is in none of the classes would be changed in silence: give it a class in config/identity.py."""
    keys = {f"{section}.{key}" for section, content in asdict(BASE).items() for key in content}
    classes = (FIXED, CHANGEABLE, PLACES)
    assert keys - frozenset().union(*classes) == set(), "without a class"
    assert frozenset().union(*classes) - keys == set(), "no such keys"
    assert sum(len(keys_of_class) for keys_of_class in classes) == len(keys), "in two classes"
    assert set(MEASURE) <= CHANGEABLE
    assert identity(BASE).keys() == FIXED | CHANGEABLE


def test_what_is_fixed_is_refused_and_what_is_changeable_is_said():
    changed = replace(BASE, optim=replace(BASE.optim, lr=1.0, betas=(0.8, 0.9)),
                      model=replace(BASE.model, hidden_size=64, embed_dropout=0.2),
                      train=replace(BASE.train, run_dir="elsewhere"), data=replace(BASE.data, shards="elsewhere"))
    saved, current = identity(BASE), identity(changed)
    assert differences(saved, current) == ["model.hidden_size: saved 128, now 64"]
    assert changes(saved, current) == {"optim.lr": (6e-4, 1.0), "optim.betas": ([0.9, 0.999], [0.8, 0.9]),
                                       "model.embed_dropout": (0.1, 0.2)}
    assert differences(saved, saved) == []
    assert changes(saved, saved) == {}
    older = {key: value for key, value in saved.items() if key not in ("optim.lr", "model.num_layers")}
    assert "optim.lr" not in changes(older, current), "of a key that the older version did not know nothing is known"
    assert "model.num_layers: saved null, now 2" in differences(older, current), "but what is fixed must be known"
    untied = {**saved, "model.tie_embeddings": False}
    assert differences(saved, untied) == ["model.tie_embeddings: saved true, now false"], "as a configuration writes it"


@pytest.mark.parametrize(("overrides", "message"), [
    (["train.keep_last=1"], "train.keep_last must be at least 2, got 1"),
    (["train.keep_every=150", "train.save_every=100"], r"\(150\) is not a multiple of train.save_every \(100\).* 200$"),
    (["train.keep_every=100", "train.save_every=0"], "keeps nothing with train.save_every=0"),
    (["train.keep_every=-1"], "train.keep_every must be 0 or greater"),
    (["train.resume=weights:"], "train.resume must be a path, got ''"),
])
def test_what_is_kept_and_taken(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, MINIMAL, *overrides)


def test_a_path_behind_weights_is_expanded_as_any_other(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    for prefix in ("", "weights:"):
        train = load_config(path, [f"train.resume={prefix}$OLD/x"], env={"OLD": "/runs"}).train
        assert (train.resume, train.origin, train.weights_only) == (f"{prefix}/runs/x", "/runs/x", bool(prefix))
    assert load_config(path).train.origin is None
