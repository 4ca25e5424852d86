"""What shards/show.py says of shards, compared with the genome that they were built from."""

import builtins
import json
import re

import pytest

from hyena_dist.cli.main import main as hyena_dist
from hyena_dist.cli.show import main as show
from hyena_dist.data.build import build
from hyena_dist.data.contigs import Source
from hyena_dist.data.splits import FractionSplits
from tests.genomes import genome, write_fasta

CONTIGS = genome(3, 5000, 40, 3000, 900)


@pytest.fixture
def directory(tmp_path):
    path = write_fasta(tmp_path / "a.fa", CONTIGS)
    build([Source(path, "yeast")], tmp_path / "shards", FractionSplits(0.2), segment_bases=700, allow_copies=1.0)
    return tmp_path / "shards"


def cells(printed):
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]


def test_composition_coverage_and_windows_are_shown(directory, capsys):
    assert hyena_dist(["show", str(directory), "--windows", "4", "--contigs", "3"]) == 0
    printed = capsys.readouterr().out
    rows = {row[0]: row[1:] for row in cells(printed)}
    assert rows["a"][:3] == ["yeast", "4", "5,000"]
    assert rows["train"][0] == f"{8940 - round(8940 * 0.2):,}"
    assert rows["yeast.chr1"] == ["5,000", "80.0 %", "20.0 %", "0.0 %"]
    assert rows["yeast.chr4"] == ["900", "80.0 %", "20.0 %", "0.0 %"]
    assert "yeast.chr2" not in rows
    assert "and 1 shorter contigs" in printed
    shown = re.findall(r"^(train|val|test) +yeast\.(chr\d):([\d,]+) ([A-Za-z]+)$", printed, re.MULTILINE)
    assert sorted({split for split, *_ in shown}) == ["train", "val"]
    assert len(shown) == 8
    for _, contig, place, bases in shown:
        start = int(place.replace(",", "")) - 1
        assert CONTIGS[contig][start : start + len(bases)].decode() == bases


@pytest.mark.parametrize("name", ["a.png", "a.pdf"])
def test_a_picture_is_drawn(directory, tmp_path, capsys, name):
    assert show([str(directory), "--picture", str(tmp_path / name)]) == 0
    assert f"{tmp_path / name}: written" in capsys.readouterr().out
    assert (tmp_path / name).read_bytes()[:4] in (b"\x89PNG", b"%PDF")


def test_mistakes_end_in_one_line(directory, tmp_path, capsys, monkeypatch):
    for arguments, status, message in (
            ([tmp_path / "none"], 2, "shards.json: cannot be read"),
            ([directory, "--picture", tmp_path / "a.xyz"], 2, "let its name end in .png or .pdf"),
            ([directory, "--picture", tmp_path / "no/a.png"], 2, "no/a.png: there is no directory")):
        assert show([str(argument) for argument in arguments]) == status
        shown, error = capsys.readouterr()
        assert message in error
        assert shown == "", "nothing is said before the picture is known to have a place"
        assert error.count("\n") == 1
    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest: imported(
        "no_such_module" if name.startswith("matplotlib") else name, *rest))
    assert show([str(directory), "--picture", str(tmp_path / "a.png")]) == 2
    assert "pip install 'hyena-dist[plots]'" in capsys.readouterr().err


def test_an_audit_that_is_missing_damaged_or_of_other_shards(directory, capsys):
    path = directory / "audit.json"
    audit = json.loads(path.read_text())
    for text in ("{", "[]", '{"splits": 1}', json.dumps({**audit, "assemblies": [1]})):
        path.write_text(text)
        assert show([str(directory)]) == 2
        assert f"{path}: is damaged" in capsys.readouterr().err
    audit["splits"]["train"]["bases"] += 1
    path.write_text(json.dumps(audit))
    assert show([str(directory)]) == 2
    assert "is of other shards than those beside it" in capsys.readouterr().err
    path.unlink()
    assert show([str(directory)]) == 0
    printed = capsys.readouterr().out
    assert "the shards were built without an audit" in printed
    assert "yeast.chr1" in printed
