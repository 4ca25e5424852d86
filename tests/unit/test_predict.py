"""What a fine-tuned run says of new sequences: of its own test split what its evaluation said, whatever file they come
in; averaged over seeds, killed and gone on."""

import csv
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyena_dist.cli.predict import main
from hyena_dist.config.load import dump_config, read_config
from hyena_dist.config.sections.finetune import FinetuneSection
from hyena_dist.tasks.predict import answers
from hyena_dist.train.predictions import probabilities
from tests.finished import config_of, finish
from tests.unit.test_generate import Killed, kill_after

TASKS: dict[str, dict[str, Any]] = {
    "classification": {"rc": "average", "longer": "center", "seeds": 2},
    "regression": {"task": "regression", "pooling": "max"},
    "multilabel": {"task": "multilabel", "pooling": "last"},
    "prompt": {"trained": "prompt", "prompt_tokens": 3, "from_": "nowhere"},
    "shots": {"trained": "lora", "shots": 1, "from_": "nowhere"},
}
COUNTS = {"train": 8, "dev": 2, "test": 10}


def label_of(task: str, number: int) -> str:
    return {"regression": f"{100 + number}", "multilabel": ("a;answer", "a", "answer", "-")[number % 4]}.get(
        task, ("no", "yes")[number % 2])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs of every task, each of a table beside it; sequences of `classification` are longer than the model,
    those of `shots` are short."""
    directory, found = tmp_path_factory.mktemp("runs"), {}
    for name, tune in TASKS.items():
        draw, table = np.random.default_rng(1), directory / f"{name}-table"
        table.mkdir()
        low, high = {"classification": (50, 80), "shots": (5, 16)}.get(name, (20, 60))
        for split, count in COUNTS.items():
            rows = [["sequence", "label", "name"]]
            rows += [["".join(draw.choice(list("ACGTN"), draw.integers(low, high), p=[0.24] * 4 + [0.04])),
                      label_of(str(tune.get("task")), number), f"s {number}"] for number in range(count)]
            with (table / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(rows)
        found[name] = finish(config_of(directory / name, table, **tune))
    return found


def rows_of_test(run: Path) -> list[dict[str, str]]:
    with Path(f"{run}-table", "test.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read(path: Path) -> list[dict[str, str]]:
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("##")]
    header, *rows = [line.split("\t") for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


def judged(run: Path, seed: int = 0) -> list[list[str]]:
    """What the evaluation of the run wrote, without names and labels."""
    lines = (run / f"seed-{seed}" / "predictions.tsv").read_text("utf-8").splitlines()
    return [line.split("\t")[2:] for line in lines[1:]]


def said(rows: list[dict[str, str]]) -> list[list[str]]:
    return [[value for key, value in row.items() if key not in ("name", "label")] for row in rows]


@pytest.mark.parametrize("name", TASKS)
def test_of_its_own_test_split_it_says_what_the_evaluation_said(name: str, runs: dict[str, Path],
                                                                tmp_path: Path) -> None:
    run, out = runs[name], tmp_path / "answers.tsv"
    assert main(["--from", str(run), "--seed", "0", "--sequences", f"{run}-table/test.csv", "--out", str(out)]) == 0
    rows = read(out)
    assert said(rows) == judged(run)
    assert len({tuple(row) for row in said(rows)}) > len(rows) / 2, "the control: sequences have answers of their own"
    assert [row["label"] for row in rows] == [row["label"] for row in rows_of_test(run)]
    assert [row["name"] for row in rows] == [f"s {number}" for number in range(COUNTS["test"])]


def test_files_of_other_kinds_say_the_same(runs: dict[str, Path], tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    run, fasta, packed, genome = (runs["multilabel"], tmp_path / "new.fa", tmp_path / "new.parquet",
                                  tmp_path / "genome.fa")
    rows = rows_of_test(run)
    fasta.write_text("".join(f">{number} of them\n{row['sequence'][:20]}\n{row['sequence'][20:].lower()}\n"
                             for number, row in enumerate(rows)), encoding="utf-8")
    parquet.write_table(pa.table({"id": [f"x{number}" for number in range(len(rows))],
                                  "sequence": [row["sequence"].replace("T", "U") for row in rows]}), packed)
    other = str.maketrans("ACGTN", "TGCAN")
    genome.write_text(">chr1\n" + "".join(row["sequence"] for row in rows) + "\n>chr2\n"
                      + "".join(row["sequence"][::-1].translate(other) for row in rows) + "\n", encoding="utf-8")
    ends = np.cumsum([0, *(len(row["sequence"]) for row in rows)]).tolist()
    for contig, strand in (("chr1", "+"), ("chr2", "-")):
        (tmp_path / f"{contig}.bed").write_text("".join(
            f"{contig}\t{start}\t{end}\tpeak\t.\t{strand}\n" for start, end in zip(ends, ends[1:], strict=False)),
            encoding="utf-8")
    for file, more, names in ((fasta, [], "{}"), (packed, [], "x{}"),
                              *((tmp_path / f"{contig}.bed", ["--fasta", str(genome)], None)
                                for contig in ("chr1", "chr2"))):
        out = tmp_path / f"{file.name}.tsv"
        assert main(["--from", str(run), "--sequences", str(file), "--out", str(out), *more]) == 0
        found = read(out)
        assert [[value for key, value in row.items() if key not in ("name", "id")] for row in found] == judged(run)
        if names:
            assert [row["name"] for row in found] == [names.format(number) for number in range(len(rows))]
    assert found[0]["name"] == f"chr2:0-{ends[1]}(-)"


def test_seeds_are_averaged_before_the_softmax(runs: dict[str, Path], tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    from pyarrow import parquet

    run, found = runs["classification"], {}
    for name, more in (("0", ["--seed", "0"]), ("1", ["--from", f"{run}/seed-1"]), ("all", [])):
        out = tmp_path / f"{name}.parquet"
        assert main(["--from", str(run), "--sequences", f"{run}-table/test.csv", "--out", str(out), *more]) == 0
        table = parquet.read_table(out)
        found[name] = np.stack([table[key].to_numpy() for key in ("no", "yes")], 1)
    logits = np.log(found["0"]) + np.log(found["1"])
    assert found["all"] == pytest.approx(probabilities("classification", logits / 2), abs=1e-12)
    assert np.abs(found["all"] - (found["0"] + found["1"]) / 2).max() > 1e-4, "the control: not of probabilities"
    said = capsys.readouterr()
    assert "10 sequences, classification by 2 seeds" in said.out
    counts = "".join(f"  {count} sequence{'s' * (count > 1)}: class {answer}\n"
                     for answer, count in Counter(table["answer"].to_pylist()).most_common())
    assert said.out.endswith(counts)
    assert "sequences were longer than 64 bases, and their center part was kept" in said.err
    assert "are no A, C, G or T" in said.err


def test_killed_it_goes_on_and_writes_the_same_file(runs: dict[str, Path], tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    run, parts = runs["regression"], 2  # of 3 chunks
    command = ["--from", str(run), "--sequences", f"{run}-table/test.csv", "--out"]
    assert main([*command, str(tmp_path / "whole.tsv")]) == 0
    monkeypatch.setattr(answers, "CHUNK_SEQUENCES", 4)
    cut = tmp_path / "cut.tsv"
    with monkeypatch.context() as killing:
        kill_after(parts, killing)
        with pytest.raises(Killed):
            main([*command, str(cut)])
    assert not cut.exists()
    assert len(list(tmp_path.glob("cut.tsv.parts/*.npz"))) == parts
    with monkeypatch.context() as counting:
        kill_after(3 - parts, counting)  # nothing is computed twice
        assert main([*command, str(cut)]) == 0
    assert cut.read_bytes() == (tmp_path / "whole.tsv").read_bytes()
    assert not list(tmp_path.glob("cut.tsv.*"))


@pytest.mark.parametrize("name", ["regression", "shots"])
def test_what_the_training_sequences_decide_is_read_from_them(name: str, runs: dict[str, Path], tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    """Labelled examples are shown before a sequence; and older versions did not save the scale of numbers."""
    from hyena_dist.tasks.predict import finished

    run, out, train = runs[name], tmp_path / "answers.tsv", Path(f"{runs[name]}-table/train.csv")
    command = ["--from", str(run), "--sequences", f"{run}-table/test.csv", "--out", str(out)]
    opened = finished.read_metadata

    def without_scale(path: Path) -> Any:
        found = opened(path)
        found["data"].pop("scale")
        return found

    monkeypatch.setattr(finished, "read_metadata", without_scale)
    assert main(command) == 0
    assert said(read(out)) == judged(run)
    text = train.read_text("utf-8")
    try:
        train.write_text(text.replace("A", "C", 1), encoding="utf-8")
        assert main([*command[:-1], str(tmp_path / "other.tsv")]) == 2
        assert "does not hold the sequences any more" in capsys.readouterr().err
    finally:
        train.write_text(text, encoding="utf-8")


def test_what_does_not_fit_behind_examples_is_refused(runs: dict[str, Path], tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    new = tmp_path / "new.fa"
    new.write_text(f">a\n{'ACGT' * 9}\n", encoding="utf-8")
    assert main(["--from", str(runs["shots"]), "--sequences", str(new), "--out", str(tmp_path / "x.tsv"),
                 "--dry-run"]) == 2
    assert "and the model takes 64 (model.max_seq_len): lower them, or shorten the" in capsys.readouterr().err


def test_columns_that_are_called_as_ours_are_renamed(runs: dict[str, Path], tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    new, out = tmp_path / "new.csv", tmp_path / "answers.tsv"
    new.write_text("sequence,answer,class_answer,,a\nACGTACGT,1,2,3,4\n", encoding="utf-8")
    assert main(["--from", str(runs["multilabel"]), "--sequences", str(new), "--out", str(out)]) == 0
    row = read(out)[0]
    words = {"-": "no label", "a": "label a", "answer": "label answer", "a;answer": "labels a;answer"}
    assert capsys.readouterr().out.endswith(f"  1 sequence: {words[row['answer']]}\n")
    assert list(row) == ["name", "given_answer", "given_class_answer", "column", "given_a", "answer", "a",
                         "class_answer"]
    assert list(row.values())[1:5] == ["1", "2", "3", "4"]


def test_weights_that_are_damaged_or_gone_are_refused(runs: dict[str, Path], tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "answers.tsv"
    shutil.copytree(runs["regression"], run)
    command = ["--from", str(run), "--sequences", f"{runs['regression']}-table/test.csv", "--out", str(out)]
    checkpoint = run / "seed-0/checkpoints/step-00000001"
    weights = next(checkpoint.glob("*.distcp"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert main(command) == 2
    shutil.rmtree(checkpoint)
    assert main(command) == 2
    damaged, gone = capsys.readouterr().err.splitlines()
    assert "step-00000001: the weights that were judged are damaged: bring them back" in damaged
    assert "step-00000001: the weights that were judged are not there: bring them back" in gone


def test_a_dry_run_writes_nothing(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs["regression"]
    assert main(["--from", str(run), "--sequences", f"{run}-table/test.csv", "--out", str(tmp_path / "x.tsv"),
                 "--dry-run"]) == 0
    assert "would answer 10 sequences, regression by seed 0 of " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


NEW = "name,sequence\n1,ACGTACGT\n"
MISTAKES = {
    "no run": ({}, ["--from", "nowhere"], "--from nowhere: there is no such directory"),
    "not ended": ({}, ["--from", "unfinished"], "unfinished: this fine-tuning has not ended, there is no result.json"),
    "one seed not ended": ({}, ["--from", "begun"], "begun: this fine-tuning has not ended, there is no result.json"),
    "a pretraining": ({}, ["--from", "pretrained"], "pretrained: is no fine-tuning, there is no result.json"),
    "no fine-tuning": ({}, ["--from", "."], "is no fine-tuning, there is no result.json"),
    "probe": ({}, ["--from", "probed"], "is of finetune.trained=probe, which keeps no model"),
    "too long": ({"new.csv": f"sequence\n{'A' * 65}\n"}, [], "new.csv: line 2: has 65 bases, and the model takes 64: "
                 "shorten it, or give a run that was fine-tuned with finetune.longer=left"),
    "no column": ({"new.csv": "seq\nACGT\n"}, [], "has no column 'sequence'"),
    "twice": ({"new.csv": "sequence,x,x\nACGT,1,2\n"}, [], "has the column 'x' twice"),
    "no sequence": ({"new.csv": "sequence,label\n,1\n"}, [], "new.csv: line 2: has no sequence"),
    "none": ({"new.csv": "sequence,label\n"}, [], "new.csv: holds no sequences"),
    "out": ({}, ["--out", "answers.csv"], "--out answers.csv: name a file that ends in .tsv or .parquet"),
    "ranks": ({}, ["--context", "2"], "--context 2: 1 ranks cannot share a sequence"),
}


@pytest.mark.parametrize(("files", "more", "wanted"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line(files: dict[str, str], more: list[str], wanted: str, runs: dict[str, Path],
                               tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("unfinished/seed-0").mkdir(parents=True)
    Path("probed").mkdir()
    for name, tune in (("begun", FinetuneSection(table="a.tsv")), ("pretrained", FinetuneSection())):
        Path(name).mkdir()
        config = replace(read_config(runs["regression"] / "seed-0/config.yaml"), finetune=tune)
        Path(name, "config.yaml").write_text(dump_config(config), encoding="utf-8")
    Path("probed/result.json").write_text(json.dumps({"seed": 0, "classes": ["a"], "checkpoint": None, "sequences": "",
                                                      "trained": "probe"}), encoding="utf-8")
    for name, text in ({"new.csv": NEW} | files).items():
        Path(name).write_text(text, encoding="utf-8")
    before = set(Path().iterdir())
    assert main(["--from", str(runs["regression"]), "--sequences", "new.csv", "--out", "answers.tsv", *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert wanted in error
    assert set(Path().iterdir()) == before
