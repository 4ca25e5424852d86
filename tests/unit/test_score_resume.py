"""`score perplexity`, `distance` and `substitutions`, interrupted after any of their parts, go on and write the same
files; with other inputs they do not go on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyena_dist.cli.score import main
from hyena_dist.convert import write_model
from hyena_dist.data.build import build
from hyena_dist.data.contigs import Source
from hyena_dist.data.splits import FractionSplits
from hyena_dist.tasks.parts import Parts
from hyena_dist.tasks.score import distance, perplexity, substitutions
from tests.genomes import write_fasta
from tests.unit.test_score_perplexity import model_of

COMMANDS = ("perplexity", "distance", "substitutions")
RANDOM = np.random.default_rng(5)


def bases(count: int) -> str:
    return "".join(RANDOM.choice(list("ACGT"), count))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, two sets of shards of two species, variants and their reference, regions."""
    directory = tmp_path_factory.mktemp("inputs")
    for name, scale in (("model", 1.0), ("other_model", 1.5), ("broken_model", 5e37)):
        trained = model_of()
        for key, parameter in trained.model.named_parameters():
            parameter.data.mul_(scale if name != "broken_model" or key == "final_norm.weight" else 1.0)
        write_model(directory / name, "safetensors", trained.section, trained.model)
    for name in ("shards", "other_shards"):
        files = [Source(write_fasta(directory / f"{name}-{species}.fa", {"c": bases(2400).encode()}), species)
                 for species in ("left", "right")]
        build(files, directory / name, FractionSplits(0.4))
    text = bases(400)
    (directory / "r.fa").write_text(f">1\n{text}\n")
    for name, places in (("v.tsv", range(100, 300, 20)), ("other_v.tsv", range(110, 310, 20))):
        (directory / name).write_text("chrom\tpos\tref\talt\n" + "".join(
            f"1\t{at + 1}\t{text[at]}\t{'A' if text[at] != 'A' else 'C'}\n" for at in places))
    for name, end in (("b.bed", 900), ("other_b.bed", 901)):
        (directory / name).write_text(f"left.c\t0\t{end}\tnear\nright.c\t10\t{end}\tfar\n")
    return directory


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "LOGITS", {"cpu": 6 * 80 * 16})
    monkeypatch.setattr(distance, "PART", 8 * 80)
    monkeypatch.setattr(substitutions, "PART", 8 * 80)


def arguments(command: str, inputs: Path, **other: str) -> list[str]:
    """Of a call; `other` replaces values of options."""
    values, shards = {"from": f"{inputs}/model"}, {"shards": f"{inputs}/shards"}
    variants = {"table": f"{inputs}/v.tsv", "fasta": f"{inputs}/r.fa"}
    values |= {"perplexity": {**shards, "block": "200", "regions": f"{inputs}/b.bed"},
               "distance": {**shards, "most": "12", **variants}, "substitutions": {**shards, "most": "10"},
               "variants": variants}[command]
    return [command, *(text for key, value in (values | other).items() for text in (f"--{key}", value))]


def interrupt_at(place: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the saving of a part be the end, before it is written; returns the names that are saved, as they come."""
    save, saved = Parts.save, list[str]()

    def interrupted(parts: Parts, name: str, **arrays: Any) -> None:
        if len(saved) == place:
            raise KeyboardInterrupt
        saved.append(name)
        save(parts, name, **arrays)
    monkeypatch.setattr(Parts, "save", interrupted)
    return saved


CHANGES = {
    "perplexity": {"from": "other_model", "shards": "other_shards", "regions": "other_b.bed", "block": "201",
                   "window": "64"},
    "distance": {"from": "other_model", "shards": "other_shards", "table": "other_v.tsv", "most": "13", "window": "64"},
    "substitutions": {"from": "other_model", "shards": "other_shards", "every": "32", "bases": "64"}}


@pytest.mark.parametrize("command", COMMANDS)
def test_interrupted_after_any_part_it_goes_on_to_the_same_files(command: str, inputs: Path, tmp_path: Path,
                                                                 capsys: pytest.CaptureFixture) -> None:
    asked, whole, again = arguments(command, inputs), tmp_path / "whole", tmp_path / "again"
    for directory in (whole, again):
        directory.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        all_names = interrupt_at(-1, patch)
        assert main([*asked, "--out", f"{whole}/p.tsv"]) == 0, capsys.readouterr().err
    assert len(all_names) >= 6
    place = int(RANDOM.integers(1, len(all_names)))
    for at in (place, len(all_names) - 1 - place):  # twice, the second time in what is left
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(at, patch)
            assert main([*asked, "--out", f"{again}/p.tsv"]) == 130
        assert [path.name for path in again.iterdir()] == ["p.tsv.parts"]
    there = {path.stem for path in (again / "p.tsv.parts").glob("*.npz")}
    assert len(there) == len(all_names) - 1
    damaged = sorted(there)[int(RANDOM.integers(len(there)))]
    part = again / "p.tsv.parts" / f"{damaged}.npz"
    part.write_bytes(part.read_bytes()[:-30])
    with pytest.MonkeyPatch.context() as patch:
        saved = interrupt_at(-1, patch)
        assert main([*asked, "--out", f"{again}/p.tsv"]) == 0, capsys.readouterr().err
    assert sorted(saved) == sorted({*all_names} - there | {damaged}), "the control: what is whole is not read again"
    assert sorted(path.name for path in again.iterdir()) == ["p.md", "p.png", "p.tsv"]
    for path in again.iterdir():
        assert path.read_bytes() == (whole / path.name).read_bytes(), path


@pytest.mark.parametrize("command", COMMANDS)
def test_parts_of_another_call_are_refused(command: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture) -> None:
    out = ["--out", f"{tmp_path}/p.tsv"]
    interrupt_at(2, monkeypatch)
    assert main([*arguments(command, inputs), *out]) == 130
    before = _parts(tmp_path)
    capsys.readouterr()
    for option, value in CHANGES[command].items():
        value = f"{inputs}/{value}" if (inputs / value).exists() else value
        assert main([*arguments(command, inputs, **{option: value}), *out]) == 2, option
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "p.tsv.parts: was begun with another" in error, option
    for other in COMMANDS:
        if other != command:
            assert main([*arguments(other, inputs), *out]) == 2
            assert "was begun with another" in capsys.readouterr().err
    assert _parts(tmp_path) == before


def _parts(directory: Path) -> dict[str, bytes]:
    """All that a call has left but its lock, which names the newest one."""
    return {path.name: path.read_bytes() for path in (directory / "p.tsv.parts").iterdir() if path.name != "lock"}


def test_a_changed_file_of_the_same_name_is_another_input(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                          capsys: pytest.CaptureFixture) -> None:
    for command, option, name in (("perplexity", "regions", "b.bed"), ("distance", "table", "v.tsv"),
                                  ("distance", "fasta", "r.fa")):
        (tmp_path / name).write_bytes((inputs / name).read_bytes())
        asked = [*arguments(command, inputs, **{option: f"{tmp_path}/{name}"}), "--out", f"{tmp_path}/{name}.tsv"]
        with monkeypatch.context() as patch:
            interrupt_at(1, patch)
            assert main(asked) == 130
        (tmp_path / name).write_bytes((inputs / name).read_bytes().rstrip(b"\n") + {
            "b.bed": b"\nleft.c\t1000\t1100\tnear\n", "v.tsv": b"\t\n", "r.fa": b"ACGT\n"}[name])
        capsys.readouterr()
        assert main(asked) == 2
        assert "sha256" in capsys.readouterr().err


def test_a_text_or_a_picture_that_is_there_is_not_written_over(inputs: Path, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "README.md").write_text("mine\n")
    assert main([*arguments("substitutions", inputs), "--out", f"{tmp_path}/README.tsv"]) == 2
    assert f"the text of --out {tmp_path}/README.md: exists" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "mine\n"
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_call_that_read_nothing_leaves_nothing_that_refuses_the_next(inputs: Path, tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch,
                                                                       capsys: pytest.CaptureFixture) -> None:
    """One whose inputs cannot be read, and one that is interrupted before its first part."""
    out = ["--out", f"{tmp_path}/p.tsv"]
    for command, options in (("perplexity", {"regions": f"{inputs}/r.fa"}), ("perplexity", {"split": "test"}),
                             ("distance", {"split": "test"}), ("substitutions", {"split": "test"}),
                             ("substitutions", {"every": "81"})):
        assert main([*arguments(command, inputs, **options), *out]) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert not list(tmp_path.iterdir()), (command, options)
    with monkeypatch.context() as patch:
        interrupt_at(0, patch)
        assert main([*arguments("perplexity", inputs), *out]) == 130
    assert main([*arguments("substitutions", inputs), *out]) == 0, capsys.readouterr().err


def test_options_that_would_do_nothing_are_refused(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "s.tsv").write_text("outcome\tllr_mean\nscored\t1\n")
    (tmp_path / "there.json").write_text("{}")
    report = ["report", f"{tmp_path}/s.tsv", "--label", "y"]
    shards = ["distance", "--from", f"{inputs}/model", "--shards", f"{inputs}/shards", "--out", f"{tmp_path}/d.tsv"]
    for bad, message in (([*shards, "--region", "1:1-400"], "--region 1:1-400: says where the slice in --fasta lies"),
                         ([*report, "--min-stars", "2"], "--min-stars 2: give 0 to 4, with --preset clinvar alone"),
                         ([*report[:2], "--preset", "clinvar", "--min-stars", "5"], "--min-stars 5"),
                         ([*report, "--picture", f"{tmp_path}/a.txt"], "a.txt: let its name end in .png or .pdf"),
                         ([*report, "--picture", f"{tmp_path}/no/a.png"], "no/a.png: there is no directory"),
                         ([*report, "--json", f"{tmp_path}/no/a.json"], "no/a.json: there is no directory"),
                         ([*report, "--json", f"{tmp_path}/a.json.gz"], "a.json.gz: name a file that ends in .json"),
                         ([*report, "--json", f"{tmp_path}/there.json"], "there.json: exists: choose another"),
                         (report, "s.tsv: has no column y: give one of outcome, llr_mean")):
        assert main(bad) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert (captured.err.count("\n"), captured.out) == (1, "")


@pytest.mark.parametrize("command", ["variants", "substitutions"])
def test_interrupted_between_the_file_and_the_end_of_its_parts_it_ends(command: str, inputs: Path, tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Parts) -> None:
        raise KeyboardInterrupt
    asked = arguments(command, inputs)
    out = tmp_path / "p.tsv"
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "remove", interrupted)
        assert main([*asked, "--out", str(out)]) == 130
    whole = out.read_bytes()
    assert main([*asked, "--out", str(out)]) == 0
    assert out.read_bytes() == whole
    assert not (tmp_path / "p.tsv.parts").exists()
    assert main([*asked, "--out", str(out)]) == 2, "the control: a file of an earlier call is not written over"


def test_a_model_that_predicts_no_numbers_is_refused(inputs: Path, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture) -> None:
    """Its weights are finite, and its predictions are NaN. The control is every other test: models that are read."""
    for command in (*COMMANDS, "variants"):
        asked = arguments(command, inputs, **{"from": f"{inputs}/broken_model"})
        assert main([*asked, "--out", f"{tmp_path}/{command}.tsv"]) == 2, command
        assert "broken_model: its predictions are no numbers (NaN) in fp32: give another" in capsys.readouterr().err
        assert not (tmp_path / f"{command}.tsv").exists()
