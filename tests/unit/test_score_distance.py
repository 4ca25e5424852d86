"""`score distance`: exact shuffles, and losses and scores that are those of the changed sequences read one by one."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from hyena_dist.cli.score import main
from hyena_dist.convert import write_model
from hyena_dist.data.shuffle import shuffled
from hyena_dist.data.tokenizer import UNK, A, T, encode
from hyena_dist.data.variants import Site
from hyena_dist.tasks.score.distance import (
    UNKNOWN,
    Row,
    distances,
    mean_losses,
    take_away,
    variant_scores,
)
from hyena_dist.tasks.score.distance_report import conclusion
from tests.unit.test_score_perplexity import L, model_of, shards  # noqa: F401 - a fixture

RANDOM = np.random.default_rng(0)


def test_a_shuffle_keeps_pairs_and_ends_and_is_evenly_drawn() -> None:
    for size in (*range(8), 50, 3000):
        ids = RANDOM.integers(A, T + 2, size).astype(np.uint8)
        found = shuffled(ids, RANDOM)
        assert Counter(pairwise(found.tolist())) == Counter(pairwise(ids.tolist()))
        assert found[:1].tolist() + found[-1:].tolist() == ids[:1].tolist() + ids[-1:].tolist()
    assert (shuffled(ids, RANDOM) != ids).mean() > 0.5  # the control
    text = encode("ACAGATACCGA")
    drawn = Counter(shuffled(text, RANDOM).tobytes() for _ in range(6000))
    pairs = Counter(pairwise(text.tolist()))

    def walks(at: int, left: Counter, done: bytes) -> list[bytes]:
        if not left:
            return [done]
        found: list[bytes] = []
        for pair in list(left):
            if pair[0] == at:
                rest = left.copy()
                rest[pair] -= 1
                found += walks(pair[1], +rest, done + bytes([pair[1]]))
        return found
    all_of_them = walks(int(text[0]), pairs, bytes([text[0]]))
    assert set(drawn) == set(all_of_them)
    assert len(all_of_them) == len(set(all_of_them)) > 20
    expected = 6000 / len(all_of_them)
    chi2 = sum((drawn[walk] - expected) ** 2 / expected for walk in all_of_them)
    assert chi2 < len(all_of_them) + 5 * np.sqrt(2 * len(all_of_them)), "not every sequence is as likely"


def test_what_is_near_stays_and_the_rest_is_taken_away() -> None:
    ids = RANDOM.integers(A, T + 1, 100).astype(np.uint8)
    for way in ("cropped", "shuffled", "masked"):
        found, at = take_away(ids, 30, 80, way, (1, 2))
        assert found[at : at + 50].tolist() == ids[30:80].tolist()
        assert found.size == (50 if way == "cropped" else 100)
    assert set(take_away(ids, 30, 80, "masked", (1,))[0][:30].tolist()) == {UNKNOWN}
    assert UNKNOWN not in range(A, T + 1)
    assert UNKNOWN != UNK or UNK > T
    mixed = take_away(ids, 30, 80, "shuffled", (1, 2))[0]
    assert mixed.tolist() == take_away(ids, 30, 80, "shuffled", (1, 2))[0].tolist() != ids.tolist()
    assert mixed.tolist() != take_away(ids, 30, 80, "shuffled", (2, 2))[0].tolist()
    assert take_away(ids, -5, 300, "cropped", (1,))[0].tolist() == ids.tolist()
    assert distances(64) == [8, 16, 32]
    assert distances(65) == [8, 16, 32, 64]


@torch.no_grad()
def test_losses_are_of_the_last_bases_alone() -> None:
    trained, ids = model_of(), RANDOM.integers(A, T + 1, (3, L)).astype(np.uint8)
    found = mean_losses(trained, list(ids), 20)
    for row, loss in zip(ids, found, strict=True):
        log_p = trained.model(torch.from_numpy(row)[None].long())[0].double().log_softmax(-1)
        assert loss == pytest.approx(-np.mean([log_p[at - 1, row[at]] for at in range(L - 20, L)]), rel=1e-6)


@torch.no_grad()
def test_scores_of_variants_are_those_of_the_changed_windows() -> None:
    """By strands and alleles, one sequence at a time; a deletion, an insertion, and one whose contig ends near it."""
    trained, ids = model_of(), RANDOM.integers(A, T + 1, 400).astype(np.uint8)
    other = A + (ids - A + 1) % 4
    sites = [Site(0, 400, 200, 1, other[200:201]), Site(0, 400, 230, 3, other[:0]), Site(0, 400, 210, 0, other[:2]),
             Site(0, 400, 5, 1, other[5:6])]

    def likelihood(sequence: np.ndarray) -> float:
        total = 0.0
        for text in (sequence, np.where((sequence >= A) & (sequence <= T), A + T - sequence, sequence)[::-1]):
            log_p = trained.model(torch.from_numpy(text.copy())[None].long())[0].double().log_softmax(-1)
            total += sum(log_p[at - 1, text[at]].item() for at in range(1, text.size) if A <= text[at] <= T)
        return total / 2

    for way in ("whole", "cropped", "masked", "shuffled"):
        found = variant_scores(trained, sites, ids, L, way, 16)
        for number, (site, score) in enumerate(zip(sites, found, strict=True)):
            start = max(site.at - L // 2, 0)
            piece = ids[start : min(site.at - L // 2 + L + site.removed, 400)]
            at = site.at - start
            if way != "whole":
                piece, kept = take_away(piece, at - 16, at + max(site.removed, 1) + 16, way, (number, 16))
                at = at if way != "cropped" else min(16, at)
                assert kept == (0 if way == "cropped" else max(at - 16, 0))
            changed = np.concatenate([piece[:at], site.alt, piece[at + site.removed :]])
            length = min(L - max(L // 2 - site.at, 0) if way != "cropped" else piece.size, piece.size, changed.size)
            wanted = likelihood(changed[:length]) - likelihood(piece[:length])
            assert score == pytest.approx(wanted, abs=1e-4), (way, number)
    whole = variant_scores(trained, sites, ids, L, "whole", 16)
    assert np.abs(variant_scores(trained, sites, ids, L, "masked", 8) - whole).max() > 1e-3


def test_how_far_it_looks_is_read_from_the_intervals() -> None:
    def row(distance: int, low: float) -> Row:
        return Row("loss", "masked", distance, 9, 1.0, 0.9, 1.1, low + 0.1, low, low + 0.2)
    longest = "without what is beyond {} bases, the longest distance here, the loss is surely larger"
    smaller = "; without what is beyond {} bases it is surely smaller"
    for lows, said in (((0.5, 0.1, -0.1, -0.1), "beyond 32 bases the loss is not surely larger"),
                       ((0.5, -0.1, 0.1), longest.format(32)),
                       ((-0.1, -0.3, -0.4), f"beyond 8 bases the loss is not surely larger{smaller.format('16, 32')}"),
                       ((-0.3, 0.1), longest.format(16) + smaller.format(8)),
                       ((float("nan"),) * 3, "one window has no interval, so that nothing can be told: read more with "
                        "--most")):
        assert conclusion([row(8 << number, low) for number, low in enumerate(lows)], "masked") == said


def test_the_command(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    trained = model_of()
    write_model(tmp_path / "model", "safetensors", trained.section, trained.model)
    bases = "".join(RANDOM.choice(list("ACGT"), 400))
    (tmp_path / "r.fa").write_text(f">1\n{bases}\n")
    rows = "".join(f"1\t{at + 1}\t{bases[at]}\t{'A' if bases[at] != 'A' else 'C'}\n" for at in range(100, 300, 10))
    rows += f"1\t50\t{bases[49:59]}\t{bases[49]}\n1\t60\t{bases[59:68]}\t{bases[59]}\n2\t50\tA\tC\n"
    (tmp_path / "v.tsv").write_text(f"chrom\tpos\tref\talt\n{rows}")
    (tmp_path / "wrong.tsv").write_text("chrom\tpos\tref\talt\n" + "".join(  # every place is one base off
        f"1\t{at}\t{bases[at]}\t{'A' if bases[at] != 'A' else 'C'}\n" for at in range(100, 300)))
    common = ["distance", "--from", str(tmp_path / "model"), "--shards", str(shards), "--most", "6", "--out"]
    extra = ["--table", str(tmp_path / "v.tsv"), "--fasta", str(tmp_path / "r.fa")]
    assert main([*common, str(tmp_path / "d.tsv"), *extra]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "## Scores of variants" in said
    for line in ("21 of the 23 alleles of v.tsv can be scored.", "- 1 too_long: an allele has more than 8 bases",
                 "- 1 unknown_contig: the reference has no"):
        assert line in said
    assert '"scored": 21' in (tmp_path / "d.tsv").read_text().partition("##hyena_dist.counts=")[2].partition("\n")[0]
    assert (tmp_path / "d.png").stat().st_size > 1000
    names, *rows = [line.split("\t") for line in (tmp_path / "d.tsv").read_text().splitlines() if line[:2] != "##"]
    found = [dict(zip(names, row, strict=True)) for row in rows]
    assert {(row["of"], row["way"]) for row in found} == {("loss", "whole"), *((of, way) for of in ("loss", "variants")
                                                          for way in ("cropped", "shuffled", "masked"))}
    last = [row for row in found if row["of"] == "variants" and row["distance"] == "32"]
    assert all(float(row["value"]) > 0.5 for row in last)
    assert all(row["count"] == "6" for row in last)
    wrong, few = [str(tmp_path / "wrong.tsv"), *extra[2:]], ["--most", "2", *common[-1:], str(tmp_path / "e.tsv")]
    for bad, message in (([*common, str(tmp_path / "e.tsv"), *extra[:2]], "variants need their reference"),
                         ([*common, str(tmp_path / "e.tsv"), "--table", *wrong], "it is of another assembly"),
                         ([*common[:-3], *few, *extra], "give --most 3 or more"),
                         ([*common[:-2], "0", "--out", str(tmp_path / "e.tsv")], "--most 0"),
                         ([*common, str(tmp_path / "e.tsv"), "--window", "16"], "--window 16: give 32 to the 80")):
        assert main(bad) == 2
        assert message in capsys.readouterr().err
