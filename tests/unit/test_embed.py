"""Embeddings: each row is the mean of a forward pass's states, whatever else is in the file; killed and resumed."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet

from hyena_dist.cli.embed import main
from hyena_dist.convert import read_model, write_model
from hyena_dist.data.tokenizer import encode
from hyena_dist.tasks.embed import embeddings, states
from tests.compare import rel
from tests.unit.test_generate import Killed, kill_after, save

TOLERANCE = 2e-5  # a base more or less in a bin moves its mean by more than 1e-3
LONGEST = 200


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "tiny", layer_pattern="HA")


@pytest.fixture(scope="module")
def sequences() -> dict[str, str]:
    draw = np.random.default_rng(4)
    found = {f"s{number}": "".join(draw.choice(list("ACGT"), length))
             for number, length in enumerate((70, 1, 200, 33, 64, 128, 5))}
    found["s3"] = "nn" + found["s3"][2:].lower()
    return found


@pytest.fixture
def fasta(sequences: dict[str, str], tmp_path: Path) -> Path:
    path = tmp_path / "some.fa"
    path.write_text("".join(f">{name} of a test\n{bases}\n" for name, bases in sequences.items()))
    return path


def wanted(model: Path, bases: str, bin: int | None, layer: int | None) -> torch.Tensor:
    """By one forward pass of one sequence, block by block."""
    net = read_model(model)[1]
    with torch.no_grad():
        ids = torch.from_numpy(encode(bases)).long()[None]
        x = net.embedding(ids)
        for block in list(net.layers)[:layer]:
            x = block(x)
        x = x if layer is not None else net.final_norm(x)
    return torch.stack([part.mean(0) for part in x[:, 0].double().split(bin or len(bases))])


def index(path: Path) -> list[dict[str, str]]:
    header, *rows = [line.split("\t") for line in path.read_text().splitlines() if not line.startswith("##")]
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.mark.parametrize("ending", ["npy", "parquet"])
@pytest.mark.parametrize(("bin", "layer"), [(None, None), (1, None), (16, None), (16, 0), (None, 1), (1, 2)])
def test_rows_are_means_of_a_forward_pass(bin: int | None, layer: int | None, ending: str, model: Path, fasta: Path,
                                          sequences: dict[str, str], tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "CHUNK_BASES", 150)
    monkeypatch.setitem(states.TOKENS, "cpu", 140)  # several sequences of a forward pass, and several of these
    out = tmp_path / f"found.{ending}"
    asked = [*(["--bin", str(bin)] if bin else []), *(["--layer", str(layer)] if layer is not None else [])]
    assert main(["--from", str(model), "--fasta", str(fasta), "--out", str(out), *asked]) == 0
    rows = index(tmp_path / f"found.{ending}.tsv")
    if ending == "npy":
        found = np.load(out)
    else:
        table = parquet.read_table(out)
        assert table.schema.metadata[b"hyena_dist.rows"] == str(len(table)).encode()
        found = np.array(table["embedding"].to_pylist(), np.float32)
        names = [row["name"] for row in rows for _ in range(int(row["rows"]))]
        assert table["name"].to_pylist() == names
        offsets = [place * (bin or 0) for row in rows for place in range(int(row["rows"]))]
        assert table["offset"].to_pylist() == offsets
    assert found.dtype == np.float32
    assert [row["name"] for row in rows] == list(sequences)
    worst = 0.0
    for row, bases in zip(rows, sequences.values(), strict=True):
        first, count = int(row["first_row"]), int(row["rows"])
        worst = max(worst, rel(found[first : first + count], wanted(model, bases, bin, layer)))
    assert first + count == len(found)
    assert worst < TOLERANCE
    first = int(rows[2]["first_row"])
    assert rel(found[first : first + int(rows[2]["rows"])], wanted(model, sequences["s2"][::-1], bin, layer)) > 1e-3 \
        or (layer == 0 and bin is None), "control"


def test_the_index_says_how_it_was_made(model: Path, fasta: Path, tmp_path: Path) -> None:
    assert main(["--from", str(model), "--fasta", str(fasta), "--out", f"{tmp_path}/x.npy", "--bin", "8"]) == 0
    facts = dict(line.removeprefix("##hyena_dist.").split("=", 1)
                 for line in (tmp_path / "x.npy.tsv").read_text().splitlines() if line.startswith("##"))
    assert facts["model"] == str(model)
    assert len(facts["weights_sha256"]) == len(facts["sequences_sha256"]) == 64
    assert facts["bin"] == "8"
    assert json.loads(facts["counts"]) == {"embedded": 7}
    assert facts["assembly"] == "not said by the file"


def test_states_that_are_no_numbers_are_refused(model: Path, fasta: Path, tmp_path: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    section, broken, _ = read_model(model)
    with torch.no_grad():
        broken.final_norm.weight.mul_(1e38)
    write_model(tmp_path / "broken", "safetensors", section, broken)
    common = ["--from", f"{tmp_path}/broken", "--fasta", str(fasta), "--out"]
    assert main([*common, f"{tmp_path}/a.npy"]) == 2
    assert "broken: its predictions are no numbers (NaN) in fp32" in capsys.readouterr().err
    assert main([*common, f"{tmp_path}/b.npy", "--layer", "1"]) == 0, "the control: before that norm they are numbers"


@pytest.fixture
def regions(tmp_path: Path, sequences: dict[str, str]) -> tuple[Path, Path]:
    """A reference, of which one sequence is a slice, and regions of every outcome."""
    reference = tmp_path / "reference.fa"
    reference.write_text(f">s2\n{sequences['s2']}{sequences['s0']}\n"
                         f">slice dna:chromosome chromosome:GRCh37:17:1001:1128:1\n{sequences['s5']}\n")
    bed = tmp_path / "regions.bed"
    bed.write_text("#contig\tstart\tend\nchr17\t1010\t1050\tforward\t0\t+\n17\t1010\t1050\treverse\t0\t-\n"
                   "s2\t0\t200\ns2\t0\t201\tlong\n17\t990\t1050\tbefore\n17\t1100\t1129\tbehind\nX\t1\t2\tother\n"
                   "s2\t10\t10\tnothing\t0\t-\n"
                   "s2\t269\t270\tlast\t0\t.\n")
    return reference, bed


def test_regions_are_read_on_their_strand_and_counted(model: Path, regions: tuple[Path, Path],
                                                      sequences: dict[str, str], tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    reference, bed = regions
    assert main(["--from", str(model), "--fasta", str(reference), "--bed", str(bed), "--bin", "7", "--out",
                 f"{tmp_path}/x.npy"]) == 0
    found, rows = np.load(tmp_path / "x.npy"), index(tmp_path / "x.npy.tsv")
    assert [row["outcome"] for row in rows] == ["embedded", "embedded", "embedded", "too_long", "outside", "outside",
                                                "unknown_contig", "empty", "embedded"]
    assert [row["name"] for row in rows][2] == "s2:0-200"
    assert "##hyena_dist.assembly=GRCh37\n" in (tmp_path / "x.npy.tsv").read_text()
    said = capsys.readouterr().out
    assert "4 of 9 sequences" in said
    assert "2 outside: not wholly on a sequence of the reference" in said
    part = sequences["s5"][10:50]
    texts = [part, part[::-1].translate(str.maketrans("ACGT", "TGCA")), sequences["s2"], sequences["s0"][-1]]
    for row, bases in zip((row for row in rows if row["outcome"] == "embedded"), texts, strict=True):
        first = int(row["first_row"])
        assert rel(found[first : first + int(row["rows"])], wanted(model, bases, 7, None)) < TOLERANCE, row
    assert rel(found[:6], found[6:12]) > 1e-3, "control: the strands differ"


def test_a_name_may_hold_blanks_or_be_empty(model: Path, regions: tuple[Path, Path], tmp_path: Path) -> None:
    """Where tabs stand between the columns. The control: where none do, each blank is between two columns."""
    reference, bed = regions
    bed.write_text("s2\t10\t50\tTP53 promoter +\t0\t-\ns2\t10\t50\t\t0\t-\ns2\t10\t50\tb\t0\t\n"
                   "s2 10 50 TP53 0 -\ns2 10  50\t\ns2\t10\t50\tfive\t-\n")
    assert main(["--from", str(model), "--fasta", str(reference), "--bed", str(bed), "--out", f"{tmp_path}/x.npy"]) == 0
    rows, found = index(tmp_path / "x.npy.tsv"), np.load(tmp_path / "x.npy")
    assert [(row["name"], row["strand"]) for row in rows] == [("TP53 promoter +", "-"), ("s2:10-50", "-"), ("b", "+"),
                                                              ("TP53", "-"), ("s2:10-50", "+"), ("five", "-")]
    assert np.array_equal(found[0], found[3])
    assert np.array_equal(found[0], found[5])
    assert rel(found[0], found[2]) > 1e-3, "control: the strands differ"


@pytest.mark.parametrize("ending", ["npy", "parquet"])
@pytest.mark.parametrize("count", [0, 2])
def test_killed_and_resumed_it_is_the_same_file(count: int, ending: str, model: Path, fasta: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(embeddings, "CHUNK_BASES", 150)
    asked = ["--from", str(model), "--fasta", str(fasta), "--bin", "10", "--out"]
    whole, killed = tmp_path / f"whole.{ending}", tmp_path / f"killed.{ending}"
    assert main([*asked, str(whole)]) == 0
    with monkeypatch.context() as patch:
        kill_after(count, patch)
        with pytest.raises(Killed):
            main([*asked, str(killed)])
    assert not killed.exists()
    if count:  # where nothing was read yet another call may begin
        assert main([*asked, str(killed), "--layer", "1"]) == 2
        assert "was begun with another layer" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        kill_after(4 - count, patch)  # what was there is not computed again
        assert main([*asked, str(killed)]) == 0
    assert killed.read_bytes() == whole.read_bytes()
    assert Path(f"{killed}.tsv").read_bytes() == Path(f"{whole}.tsv").read_bytes()
    assert not Path(f"{killed}.parts").exists()


REFUSED = {"another ending": (["--out", "x.csv"], "--out x.csv: name a file that ends in .npy or .parquet"),
           "no base a bin": (["--bin", "0"], "--bin 0: give a number of bases"),
           "no such layer": (["--layer", "3"], "has 2 layers: give 0"),
           "a layer below 0": (["--layer", "-1"], "--layer -1"),
           "one rank": (["--context", "2"], "1 ranks cannot share a sequence by so many"),
           "a region of nothing": (["--region", "17:1-100"], "give --bed, or leave it out"),
           "no file": (["--fasta", "nothing.fa"], "nothing.fa"),
           "a directory": (["--out", "."], "--out .:"),
           "a place that takes no file": (["--out", "/proc/x.npy"],
                                          "error: --out /proc/x.npy: its directory /proc cannot be written: "),
           "no directory": (["--out", "no/x.npy"], "there is no directory no"),
           "a region of the reverse": (["--bed", "bad.bed"], "bad.bed: line 1: start '20' and end '10' must be"),
           "a strand": (["--bed", "strand.bed"], "strand.bed: line 2: strand 'x' in the sixth column"),
           "columns": (["--bed", "short.bed"], "short.bed: line 1: has 2 columns"),
           "nothing fits": (["--bed", "other.bed"], "none of its sequences can be embedded (1 unknown_contig; "
                           "the file has Y (1), the reference s0, ")}


@pytest.mark.parametrize(("arguments", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_embedded_is_refused_in_one_line(arguments: list[str], said: str, model: Path, fasta: Path,
                                                        tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("bad", "s0\t20\t10\n"), ("strand", "s0\t1\t2\ns0\t1\t2\ta\t0\tx\n"), ("short", "s0\t1\n"),
                       ("other", "Y\t1\t2\n")):
        Path(f"{name}.bed").write_text(text)
    before = set(tmp_path.iterdir())
    assert main(["--from", str(model), "--fasta", str(fasta), "--out", "x.npy", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
    assert set(tmp_path.iterdir()) == before


def test_files_that_are_there_are_kept(model: Path, fasta: Path, tmp_path: Path,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("x.npy", "y.npy.tsv"):
        (tmp_path / name).write_text("mine")
        assert main(["--from", str(model), "--fasta", str(fasta), "--out", f"{tmp_path}/{name[:5]}"]) == 2
        assert "exists: choose another" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == "mine"


def test_k_mers_are_refused(fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "kmers", kmer=3)
    assert main(["--from", f"{tmp_path}/kmers", "--fasta", str(fasta), "--out", f"{tmp_path}/x.npy"]) == 2
    assert "give a model of model.kmer=1" in capsys.readouterr().err


def test_a_layer_that_is_not_there_is_refused_by_the_model(model: Path) -> None:
    net = read_model(model)[1]
    for layers in (-1, 3):
        with pytest.raises(ValueError, match="the model has 2 layers"):
            net.states_after(torch.tensor([[7]]), layers)


def test_memory_does_not_depend_on_the_number_of_sequences(model: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows at once would be 6 MB more."""
    monkeypatch.setattr(embeddings, "CHUNK_SEQUENCES", 256)
    draw, peak = np.random.default_rng(0), []
    (tmp_path / "c.fa").write_text(">c\n" + "ACGT" * 50 + "\n")
    for count in (300, 600, 4_600):  # the first fills what is kept for good
        path = tmp_path / f"{count}.bed"
        path.write_text("".join(f"c\t{start}\t{start + 24}\n" for start in draw.integers(0, 170, count)))
        tracemalloc.start()
        assert main(["--from", str(model), "--fasta", f"{tmp_path}/c.fa", "--bed", str(path), "--bin", "1", "--out",
                     f"{tmp_path}/{count}.npy"]) == 0
        peak.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert np.load(tmp_path / "4600.npy", mmap_mode="r").shape == (24 * 4600, 16)
    print(f"peak of {peak[1]:,} bytes at 600 sequences, {peak[2]:,} at 4,600")
    assert peak[2] < 1.1 * peak[1]
