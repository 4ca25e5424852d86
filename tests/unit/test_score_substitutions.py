"""`score substitutions`: what is planted, how surprised models and chains are, and what is made of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from hyena_dist.cli.score import main
from hyena_dist.convert import write_model
from hyena_dist.data.build import build
from hyena_dist.data.contigs import Source
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.pool import Pool
from hyena_dist.data.splits import FractionSplits
from hyena_dist.data.tokenizer import A, T, tokenizer_of
from hyena_dist.tasks import markov
from hyena_dist.tasks.score.substitutions import Row, aurocs, chain_surprise, planted, read_windows
from hyena_dist.tasks.score.substitutions_report import SITES, draw
from tests.genomes import write_fasta
from tests.unit.test_score_perplexity import model_of, shards  # noqa: F401 - a fixture

RANDOM = np.random.default_rng(0)
IDS = RANDOM.integers(A, T + 1, (4, 72)).astype(np.uint8)


def test_so_many_bases_are_changed_evenly_and_no_others() -> None:
    ids = np.full((3000, 20), A, dtype=np.uint8)
    found, changed = planted(ids, 3, np.random.default_rng(1))
    assert (changed.sum(1) == 3).all()
    assert ((found != ids) == changed).all()
    assert not changed[:, :8].any()
    assert np.abs(changed[:, 8:].mean(0) - 3 / 12).max() < 0.04
    assert np.abs(np.bincount(found[changed], minlength=T + 1)[A + 1 : T + 1] / changed.sum() - 1 / 3).max() < 0.03


@pytest.mark.parametrize(("k", "overlap"), [(1, False), (3, False), (3, True)])
@torch.no_grad()
def test_surprise_is_that_of_the_token_that_tells_a_base(k: int, overlap: bool) -> None:
    trained = model_of(kmer=k, kmer_overlap=overlap)
    tokenizer = tokenizer_of(trained.section)
    surprise, states = read_windows(trained, IDS)
    for row, found, state in zip(IDS, surprise, states, strict=True):
        tokens = torch.from_numpy(tokenizer.of_bases(row).astype(np.int64))
        log_p = trained.model(tokens[None])[0].double().log_softmax(-1)
        for base in range(row.size):
            token = base - k + 1 if overlap or k == 1 else base // k
            if token < 1:
                assert np.isnan(found[base])
            else:
                assert found[base] == pytest.approx(-log_p[token - 1, tokens[token]].item(), rel=1e-5)
        wanted = trained.model.hidden_states(tokens[None])[:, 0].mean(0)
        assert state == pytest.approx(wanted.numpy(), abs=1e-5)


def test_chains_are_those_that_evaluation_scores(shards: Path) -> None:  # noqa: F811
    pools = [Pool(Manifest.load(shards))]
    tables = markov.fit(pools, 3)
    found = chain_surprise(tables, IDS)
    for order in range(4):
        for at in range(order, 20):
            word = sum(int(IDS[0, at - back] - A) << 2 * back for back in range(order + 1))
            assert found[order, 0, at] == -tables[order][word]


def test_a_known_order_of_surprise() -> None:
    changed = np.array([[True, False, False, True]])
    assert aurocs(np.array([[4.0, 1.0, 2.0, 3.0]]), changed)[0] == 1
    assert aurocs(np.array([[1.0, 1.0, 2.0, np.nan]]), changed)[0] == 0.25


def test_a_picture_names_its_share_and_has_intervals_and_a_legend_beside_the_points(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    rows = [Row(model, what, count, 20, 0.9, 0.8, 0.97) for model in ("model", "chain of order 7")
            for what, counts in (("AUROC of the site", (1,)), ("outputs that move", (1, 4, 16))) for count in counts]
    draw(rows, tmp_path / "s.png", "title")
    [drawn], (_, right) = figures, figures[0].axes
    drawn.draw_without_rendering()
    assert right.get_ylabel() == "share of outputs that move\nby more than 0.05 standard deviations"
    assert [text.get_text() for text in right.get_xticklabels()] == ["1", "4", "16"]
    assert drawn.legends[0].get_window_extent().x0 > right.get_window_extent().x1
    found = [line[:, 1].tolist() for bars in right.containers for line in bars.lines[2][0].get_segments()]
    assert found == [pytest.approx([0.8, 0.97])] * 6


def test_the_command_finds_what_is_planted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Two species, each a repeated word with few errors: a chain of order 5 knows every base, one of order 0 none."""
    files = []
    for name, word in (("left", "ACGTTGCAAC"), ("right", "AGATCCTAGG")):
        text = np.array(list(word * 400))
        places = RANDOM.random(text.size) < 0.01
        text[places] = RANDOM.choice(list("ACGT"), places.sum())
        files.append(Source(write_fasta(tmp_path / f"{name}.fa", {"c": "".join(text).encode()}), name))
    build(files, tmp_path / "shards", FractionSplits(0.3), allow_copies=1.0)
    trained = model_of()
    write_model(tmp_path / "model", "safetensors", trained.section, trained.model)
    common = ["substitutions", "--from", str(tmp_path / "model"), "--shards", str(tmp_path / "shards"), "--most", "20",
              "--out"]
    assert main([*common, str(tmp_path / "s.tsv")]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "## Classes that change" in said
    assert "| 1 substitution | 4 substitutions |" in said
    assert (tmp_path / "s.png").stat().st_size > 1000
    names, *rows = [line.split("\t") for line in (tmp_path / "s.tsv").read_text().splitlines() if line[:2] != "##"]
    found = {(row[0], row[1], int(row[2])): float(row[names.index("value")]) for row in rows}
    chains = {what: {model for model, of, _ in found if of == what} - {"model"} for what in ("accuracy", SITES)}
    assert chains == {"accuracy": {f"chain of order {order}" for order in (2, 5, 7)},
                      SITES: {f"chain of order {order}" for order in range(8)}}
    assert found["chain of order 7", "AUROC of the site", 1] > 0.95
    assert 0.3 < found["chain of order 0", "AUROC of the site", 1] < 0.7
    assert found["chain of order 5", "accuracy", 0] == 1
    moves = [found["chain of order 5", "mean move of an output", count] for count in (1, 4, 16)]
    assert moves == sorted(moves)
    assert found["model", "outputs that move", 16] > 0.5
    assert main([*common, str(tmp_path / "one.tsv"), "--most", "1"]) == 0  # of one window no output has a width
    assert "| model | cannot be told | cannot be told | cannot be told |" in capsys.readouterr().out
    _, *rows = [line.split("\t") for line in (tmp_path / "one.tsv").read_text().splitlines() if line[:2] != "##"]
    values = {row[1]: row[names.index("value")] for row in rows if row[0] == "model"}
    assert values["mean move of an output"] == values["outputs that move"] == ""
    assert values["accuracy"] in ("0", "1")
    for bad, message in (([*common, str(tmp_path / "t.tsv"), "--bases", "81"], "--bases 81: give 25 to the 80"),
                         ([*common, str(tmp_path / "t.tsv"), "--every", "1"], "--every 1")):
        assert main(bad) == 2
        assert message in capsys.readouterr().err
