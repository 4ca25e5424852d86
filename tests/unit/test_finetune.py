"""The command that fine-tunes: a dry run says what is in a table, and mistakes are one line."""

from pathlib import Path

import pytest

from hyena_dist.cli.finetune import main
from hyena_dist.config.load import read_config
from hyena_dist.data.labelled import reader_of
from hyena_dist.tasks.finetune import of_seed
from hyena_dist.tasks.made_of import keep_made_of, made_of

RUN = ["--config", "finetune/gue", "--dry-run"]


def gue(directory: Path) -> Path:
    directory.mkdir()
    for number, name in enumerate(("train", "dev", "test")):
        lines = [f"{'ACGT'[number]}{'ACGT'[n]}ACGTNACGT,{n % 2}" for n in range(4)]
        (directory / f"{name}.csv").write_text("\n".join(["sequence,label", *lines]) + "\n", encoding="utf-8")
    return directory


def test_a_dry_run_says_what_is_in_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, f"finetune.table={gue(tmp_path / 'gue')}", f"train.run_dir={tmp_path / 'run'}",
                 "finetune.epochs=400"]) == 0
    said = capsys.readouterr()
    assert "note: sequences: 4 train, 4 valid, 4 test; 2 classes (0, 1); at most 11 tokens; 50 steps" in said.err
    assert "12 of 132 bases, in 12 sequences, are no A, C, G or T" in said.err
    assert "  from: null" in said.out
    assert "steps: 50" in said.out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_refuses_what_the_run_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [*RUN, f"train.run_dir={tmp_path / 'run'}", "finetune.epochs=400", "finetune.seeds=1"]
    argv = [*run, f"finetune.table={gue(tmp_path / 'gue')}"]
    assert main(argv) == 0
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    config = of_seed(read_config(tmp_path / "config.yaml"), 0)
    seed = tmp_path / "run/seed-0"
    keep_made_of(seed, made_of(config, reader_of(config.finetune, most=config.model.max_seq_len)(0).digest(), None))
    (seed / "result.json").write_text("{}", encoding="utf-8")
    assert main(argv) == 0, "the control: the same is handed back"
    capsys.readouterr()
    other = gue(tmp_path / "other")
    (other / "train.csv").write_text("sequence,label\nACGTC,0\nACCC,1\nTTACG,0\nGGC,1\n", encoding="utf-8")
    assert main([*run, f"finetune.table={other}"]) == 2
    said = capsys.readouterr()
    assert "run/seed-0 holds a result or a run of other settings: finetune.table was " in said.err
    assert (said.err.count("\n"), said.out) == (1, "")


@pytest.mark.parametrize(("argument", "said"), [
    ("finetune.table=nowhere.csv", "nowhere.csv: cannot be read"), ("finetune.from=nowhere", "nowhere: no such file"),
    ("finetune.pooling=middle", "finetune.pooling must be one of"),
    ("finetune.trained=head", "needs a pretrained model"),
    ("finetune.label_column=class", "name the right one with finetune.label_column"),
    ("finetune.shots=2", "training has 2 of '0': lower it"), ("finetune.shots=-1", "shots must be 0 or greater"),
    ("finetune.baselines=kmer", "finetune.baselines must be one of kmers, cnn, scratch"),
    ("finetune.lr_decay=0", "lr_decay must be greater than 0, at most 1"),
    ("finetune.homology=alike.bed", "a table without finetune.genome has no intervals: give both, or leave it out"),
    ("finetune.trained=probe", "needs a pretrained model"), ("finetune.trained=lora", "needs a pretrained model"),
])
def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], argument: str, said: str) -> None:
    assert main([*RUN, f"finetune.table={gue(tmp_path / 'gue')}", "finetune.epochs=400", argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error


def _uneven(directory: Path) -> str:
    """Two classes, one of a third of the sequences, and one sequence that is longer than the others."""
    bases = [f"{'ACGT'[n % 4]}{'ACGT'[n // 4 % 4]}{'ACGT'[n // 16]}ACGT" for n in range(40)]
    lines = [f"{text}{'ACGT' * 20 * (n == 7)},{int(n % 3 == 0)}" for n, text in enumerate(bases)]
    (directory / "t.csv").write_text("\n".join(["sequence,label", *lines]) + "\n", encoding="utf-8")
    return f"finetune.table={directory / 't.csv'}"


def test_a_dry_run_reads_the_splits_of_all_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which sequences are shown as examples depends on the part that each seed draws for validation."""
    argv = [*RUN, _uneven(tmp_path), "finetune.valid_fraction=0.4", "finetune.epochs=400"]
    lengths = []
    for seed in (0, 3):
        assert main([*argv, "finetune.shots=1", f"train.seed={seed}", "finetune.seeds=1"]) == 0
        lengths.append(int(capsys.readouterr().err.partition(" at most ")[2].partition(" tokens")[0]))
    assert main([*argv, "finetune.shots=1", "finetune.seeds=4"]) == 0
    assert f"at most {max(lengths)} tokens" in capsys.readouterr().err
    assert min(lengths) < max(lengths), "the control"
    argv += ["finetune.shots=8", "model.max_seq_len=2048"]
    assert main([*argv, "finetune.seeds=3"]) == 0, "the control: the first seeds have enough"
    assert main([*argv, "finetune.seeds=4"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: seed 3: finetune.shots=8 asks for 8 examples")
