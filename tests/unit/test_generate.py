"""Sequence from a trained model: the same bases with and without a memory, on any ranks, killed and resumed."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet

from hyena_dist.cli.generate import main
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.convert import read_model, write_model
from hyena_dist.convert.trained import load_trained
from hyena_dist.data.tokenizer import encode
from hyena_dist.model.config import hyena_config
from hyena_dist.model.decode import PlainDecoder
from hyena_dist.model.model import HyenaModel
from hyena_dist.parallel.groups import init_groups
from hyena_dist.tasks.generate import sequences
from hyena_dist.tasks.generate.sampling import Sampling, draw
from hyena_dist.tasks.generate.sequences import Request, generate, prompts_of_file
from hyena_dist.tasks.parts import Parts
from tests.dist.harness import run_distributed


def save(path: Path, **keys: object) -> Path:
    section = ModelSection(**({"num_layers": 2, "hidden_size": 16, "filter_order": 8, "max_seq_len": 200} | keys))
    model = HyenaModel(hyena_config(section), seed=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.5)  # so that predictions are far from even
    write_model(path, "safetensors", section, model)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "starts.fa"
    path.write_text(">a first\nacgtNNacgtacgatcagcat\n>b\nGATTACA\n>c\nT\n")
    return path


def records(path: Path) -> dict[str, tuple[str, str]]:
    """Header and bases by name."""
    found = {}
    for record in path.read_text().split(">")[1:]:
        header, *lines = record.splitlines()
        assert all(len(line) == 80 for line in lines[:-1])
        found[header.split()[0]] = header, "".join(lines)
    return found


def columns(path: Path) -> list[list[str]]:
    lines = path.read_text().splitlines()
    return [line.split("\t") for line in lines if not line.startswith("##")]


@pytest.mark.parametrize("keys", [pytest.param({}, marks=pytest.mark.slow), {"hyena_order": 3},
                                  {"layer_pattern": "HA", "num_attention_heads": 2}],
                         ids=["hyena", "order 3", "hyena and attention"])
def test_the_memory_changes_no_base(keys: dict[str, object], tmp_path: Path, prompts: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "model", **keys)
    asked = ["--from", f"{tmp_path}/model", "--prompts", str(prompts), "--bases", "100", "--samples", "3", "--top-p",
             "0.95", "--batch", "4"]
    assert main([*asked, "--out", f"{tmp_path}/cached.fa"]) == 0
    assert main([*asked, "--seed", "1", "--out", f"{tmp_path}/other.fa"]) == 0
    monkeypatch.setattr(sequences, "Decoder", PlainDecoder)
    assert main([*asked, "--out", f"{tmp_path}/plain.fa"]) == 0
    cached = (tmp_path / "cached.fa").read_text()
    assert cached == (tmp_path / "plain.fa").read_text()
    found, other = records(tmp_path / "cached.fa"), records(tmp_path / "other.fa")
    assert list(found) == [f"{name}_{sample}" for name in "abc" for sample in (1, 2, 3)]
    assert len({bases for _, bases in found.values()} | {bases for _, bases in other.values()}) == 18, "control"
    for header, bases in found.values():
        assert " seed=0 " in header
        assert " top_p=0.95 " in header
        assert bases.startswith(("ACGTNNACGTACGATCAGCAT", "GATTACA", "T"))
        assert set(bases[21:]) <= set("ACGT")


@pytest.mark.parametrize("ending", ["tsv", "parquet"])
def test_log_likelihoods_are_those_of_a_forward_pass(ending: str, model: Path, prompts: Path, tmp_path: Path) -> None:
    file = tmp_path / f"ll.{ending}"
    assert main(["--from", str(model), "--prompts", str(prompts), "--bases", "60", "--out", f"{tmp_path}/made.fa",
                 "--likelihoods", str(file), "--temperature", "0.5"]) == 0
    if ending == "tsv":
        assert "##hyena_dist.seed=0\n" in file.read_text()
        header, *rows = columns(file)
    else:
        table = parquet.read_table(file)
        assert table.schema.metadata[b"hyena_dist.temperature"] == b"0.5"
        header, rows = table.column_names, [["" if value is None else str(value) for value in row.values()]
                                            for row in table.to_pylist()]
    assert header == ["record", "position", "base", "given", "log_likelihood"]
    wanted = []
    for name, (_, bases) in records(tmp_path / "made.fa").items():
        given = len(bases) - 60
        ids = torch.from_numpy(encode(bases)).long()
        with torch.no_grad():
            log_p = read_model(model)[1](ids[None])[0].log_softmax(-1)
        for place, base in enumerate(bases):
            known = place > 0 and base in "ACGT"
            wanted.append((name, place + 1, base, int(place < given), log_p[place - 1, ids[place]] if known else None))
    assert [(name, int(place), base, int(given)) for name, place, base, given, _ in rows] == [row[:4] for row in wanted]
    assert sum(row[4] is None for row in wanted) == 3 + 2
    for row, (*_, value) in zip(rows, wanted, strict=True):
        assert (row[4] == "") == (value is None)
        assert value is None or float(row[4]) == pytest.approx(value.item(), abs=1e-5)


class Killed(BaseException):
    pass


def kill_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the process, as far as it can be seen, when so many parts were written."""
    save, left = Parts.save, [count]

    def until(self: Parts, name: str, **arrays: np.ndarray) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        save(self, name, **arrays)

    monkeypatch.setattr(Parts, "save", until)


@pytest.mark.parametrize("parts", [0, 1, 4, 7])
def test_killed_and_resumed_it_is_the_same_file(parts: int, model: Path, prompts: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sequences, "STRETCH", 16)
    asked = ["--from", str(model), "--prompts", str(prompts), "--bases", "50", "--batch", "2"]

    def arguments(name: str) -> list[str]:
        return [*asked, "--out", f"{tmp_path}/{name}.fa", "--likelihoods", f"{tmp_path}/{name}.tsv"]

    assert main(arguments("whole")) == 0
    with monkeypatch.context() as patch:
        kill_after(parts, patch)
        with pytest.raises(Killed):
            main(arguments("killed"))
    assert not (tmp_path / "killed.fa").exists()
    assert len(list((tmp_path / "killed.fa.parts").glob("*.npz"))) == parts
    if parts:  # where nothing was made yet another call may begin
        assert main([*arguments("killed"), "--seed", "1"]) == 2
        assert "was begun with another seed: go on as it was begun" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        kill_after(8 - parts, patch)  # what was there is not made again
        assert main(arguments("killed")) == 0
    for ending in ("fa", "tsv"):
        assert (tmp_path / f"killed.{ending}").read_bytes() == (tmp_path / f"whole.{ending}").read_bytes()
    assert not (tmp_path / "killed.fa.parts").exists()


def test_a_part_that_is_not_whole_is_made_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "STRETCH", 16)
    asked = ["--from", str(model), "--bases", "40", "--prompt", "acg"]
    assert main([*asked, "--out", f"{tmp_path}/whole.fa"]) == 0
    with monkeypatch.context() as patch:
        kill_after(2, patch)
        with pytest.raises(Killed):
            main([*asked, "--out", f"{tmp_path}/cut.fa"])
    part = sorted((tmp_path / "cut.fa.parts").glob("*.npz"))[0]
    part.write_bytes(part.read_bytes()[:-40])
    assert main([*asked, "--out", f"{tmp_path}/cut.fa"]) == 0
    assert (tmp_path / "cut.fa").read_bytes() == (tmp_path / "whole.fa").read_bytes()


def _on_ranks(model: str, prompts: str, out: str) -> None:
    request = Request(prompts_of_file(Path(prompts)), 2, 40, Sampling(), 5, 2, Path(out))
    generate(load_trained(model), request, init_groups())


def test_ranks_write_the_file_of_one(model: Path, prompts: Path, tmp_path: Path) -> None:
    run_distributed(_on_ranks, 2, str(model), str(prompts), str(tmp_path / "two.fa"))
    assert main(["--from", str(model), "--prompts", str(prompts), "--samples", "2", "--bases", "40", "--seed", "5",
                 "--batch", "2", "--out", f"{tmp_path}/one.fa"]) == 0
    assert (tmp_path / "two.fa").read_bytes() == (tmp_path / "one.fa").read_bytes()


def test_without_a_prompt_the_first_base_is_drawn_evenly(model: Path, tmp_path: Path) -> None:
    assert main(["--from", str(model), "--bases", "1", "--samples", "400", "--batch", "400", "--out",
                 f"{tmp_path}/made.fa"]) == 0
    bases = [bases for _, bases in records(tmp_path / "made.fa").values()]
    assert all(70 < bases.count(base) < 130 for base in "ACGT"), "each 100, within 3.5 standard deviations"


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.5), Sampling(2, top_k=2), Sampling(top_p=0.6),
                                      Sampling(0.7, 3, 0.9), Sampling(0), Sampling(1e-9), Sampling(top_p=1e-9)])
def test_bases_are_drawn_as_often_as_they_are_likely(sampling: Sampling) -> None:
    logits = torch.full((1, 16), 50.0)  # special tokens and N are likelier, and never drawn
    logits[0, 7:11] = torch.tensor([0.3, 1.5, -1.0, 0.6])
    p = np.array([0.3, 1.5, -1.0, 0.6])
    p = np.exp((p - p.max()) / max(sampling.temperature, 1e-12))
    p /= p.sum()
    order = np.argsort(-p)[: sampling.top_k]
    before = np.cumsum(p[order]) - p[order]
    left = np.zeros(4)
    kept = order[before < sampling.top_p]
    left[kept] = p[kept] / p[kept].sum()
    count = 100_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    found = torch.bincount(draw(logits.expand(count, -1), uniform, sampling) - 7, minlength=4) / count
    assert np.abs(found.numpy() - left).max() <= 2 / count
    assert draw(logits, torch.zeros(1, dtype=torch.float64), sampling) == 7 + np.flatnonzero(left)[0], "both ends"
    last = torch.full((1,), 1 - 2**-53, dtype=torch.float64)
    assert draw(logits, last, sampling) == 7 + np.flatnonzero(left)[-1]


def test_letters_of_a_prompt_that_are_no_bases_are_told(model: Path, tmp_path: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    for number, (prompt, count) in enumerate((("ACRyKMT", 4), ("ACGUT", 1), ("ACGNNacgt", 0), ("ACGUNN", 0))):
        out = tmp_path / f"{number}.fa"
        assert main(["--from", str(model), "--prompt", prompt, "--bases", "5", "--out", str(out)]) == 0
        said = capsys.readouterr().out
        assert (f"note: {count} letters of the prompts are none of A, C, G, T and N" in said) == (count > 0)
        assert ("note:" in said) == (count > 0)  # the controls are known bases and N, of DNA and of RNA


REFUSED = {"too long": (["--bases", "201"], "--bases 201: are more than the 200 that"),
           "too long behind a prompt": (["--bases", "199", "--prompt", "AC"], "they are more than the 200 that"),
           "no base": (["--bases", "0"], "--bases 0: give a number of at least 1"),
           "no sample": (["--bases", "9", "--samples", "0"], "--samples 0"),
           "no batch": (["--bases", "9", "--batch", "-1"], "--batch -1"),
           "a seed below 0": (["--bases", "9", "--seed", "-1"], "--seed -1"),
           "temperature": (["--bases", "9", "--temperature", "-1"], "--temperature -1"),
           "temperature that is none": (["--bases", "9", "--temperature", "nan"], "--temperature nan"),
           "top-k": (["--bases", "9", "--top-k", "5"], "--top-k 5: there are 4 bases"),
           "top-p": (["--bases", "9", "--top-p", "0"], "--top-p 0.0"),
           "no sequence": (["--bases", "9", "--prompt", "AC-T"], "byte b'-' at base 3 is not an IUPAC code"),
           "no file": (["--bases", "9", "--prompts", "nothing.fa"], "nothing.fa"),
           "another ending": (["--bases", "9", "--likelihoods", "x.csv"], "--likelihoods x.csv: name a file that ends"),
           "a directory": (["--bases", "9", "--out", "."], "--out .: is a directory: name a file"),
           "a place that takes no file": (["--bases", "9", "--out", "/proc/x.fa"],
                                          "error: --out /proc/x.fa: its directory /proc cannot be written: "),
           "no directory": (["--bases", "9", "--likelihoods", "no/x.tsv"], "there is no directory no"),
           "text under the name of gzip": (["--bases", "9", "--out", "x.fa.gz"], "--out x.fa.gz: name a file that ends "
                                           "in .fa or .fasta or .fna")}


@pytest.mark.parametrize(("arguments", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_made_is_refused_in_one_line(arguments: list[str], said: str, model: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--from", str(model), "--out", "made.fa", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
    assert not list(tmp_path.iterdir())


def test_models_and_files_that_do_not_serve_are_refused(model: Path, tmp_path: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    kmers = save(tmp_path / "kmers", kmer=3)
    assert main(["--from", str(kmers), "--bases", "9", "--out", f"{tmp_path}/made.fa"]) == 2
    assert "give a model of model.kmer=1" in capsys.readouterr().err
    (tmp_path / "there.fa").write_text("mine")
    assert main(["--from", str(model), "--bases", "9", "--out", f"{tmp_path}/there.fa"]) == 2
    assert "exists: choose another" in capsys.readouterr().err
    assert (tmp_path / "there.fa").read_text() == "mine"
    section, broken, _ = read_model(model)
    with torch.no_grad():
        broken.final_norm.weight.mul_(1e38)
    write_model(tmp_path / "broken", "safetensors", section, broken)
    for asked, status in ((["--bases", "9"], 2), (["--bases", "1", "--prompt", "ACGT"], 2),
                          (["--bases", "1"], 0)):  # of the first base of all nothing is predicted
        assert main(["--from", f"{tmp_path}/broken", *asked, "--out", f"{tmp_path}/made{status}.fa"]) == status
        assert ("its predictions are no numbers (NaN) in fp32" in capsys.readouterr().err) == (status == 2)
        shutil.rmtree(tmp_path / f"made{status}.fa.parts", ignore_errors=True)
