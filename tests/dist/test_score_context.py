"""Ranks that share the windows of variants score them as one rank does."""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from benchmarks.scoring import Size, trained_of, write_inputs
from hyena_dist.config.errors import ConfigError
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.data.build import build
from hyena_dist.data.contigs import Source
from hyena_dist.data.splits import FractionSplits
from hyena_dist.data.tokenizer import A, T
from hyena_dist.data.variants import Site
from hyena_dist.model.kinds import refuse_context
from hyena_dist.parallel.groups import Groups, init_groups
from hyena_dist.tasks.parts import Parts
from hyena_dist.tasks.score import substitutions
from hyena_dist.tasks.score.distance import mean_losses, take_away
from hyena_dist.tasks.score.observe import SCORES, score_sites
from hyena_dist.tasks.score.output import read_scores
from hyena_dist.tasks.score.variants import score_variants
from tests.compare import rel
from tests.dist.harness import run_distributed
from tests.genomes import write_fasta
from tests.unit.test_score_costs import TINY, request_of

TOLERANCE = 2e-5  # a base that its slice's neighbour predicts and nobody counts moves a mean of 100 by 1e-2


def sites_of(bases: int, window: int) -> tuple[np.ndarray, list[Site]]:
    """Substitutions at borders of slices, and where the sequence's end cuts the window; an insertion, a deletion."""
    ids = np.random.default_rng(0).integers(A, T + 1, bases).astype(np.uint8)
    other = A + (ids - A + 1) % 4
    middle = bases // 2
    places = [middle, middle + 1, middle + window // 4, 2, bases - 3]
    return ids, [*(Site(0, bases, at, 1, other[at : at + 1]) for at in places),
                 Site(0, bases, middle + 7, 5, other[:0]), Site(0, bases, middle - 9, 0, other[:4])]


def scores_of(size: Size, bases: int, count: int | None, context: int) -> np.ndarray:
    trained = trained_of(size)
    for parameter in trained.model.parameters():
        parameter.data.mul_(3)  # so that predictions are far from even
    if context > 1:
        trained = trained.to("cpu", "fp32", init_groups(context=context))
        assert trained.model.context.size == context
    ids, sites = sites_of(bases, size.length)
    return score_sites(trained, sites[-2:][:count] if count else sites, ids, size.length)


def compared(size: Size, bases: int, count: int | None, ranks: int) -> None:
    one = scores_of(size, bases, count, 1)
    several = run_distributed(scores_of, ranks, size, bases, count, ranks, timeout=3000.0)
    errors = {name: rel(several[0][:, number], one[:, number]) for number, name in enumerate(SCORES)}
    print(errors)
    assert all(np.array_equal(each, several[0]) for each in several)
    assert max(errors["ll_ref"], errors["ll_alt"]) <= TOLERANCE
    # Differences of two likelihoods are as exact as these: not relative to what is left of them.
    largest = np.abs(one[:, :2]).max()
    for name, column in zip(("llr_mean", "llr_sum", "llr_site"), range(2, 5), strict=True):
        scale = largest * (size.length if name == "llr_sum" else 1)
        assert np.abs(several[0][:, column] - one[:, column]).max() <= TOLERANCE * scale, name
    assert np.abs(several[0][:, 5:] - one[:, 5:]).max() <= TOLERANCE * max(1, np.abs(one[:, 6]).max())
    assert np.abs(one[:, 2]).min() > 10 * TOLERANCE * largest / size.length  # the control: the alleles differ


def test_shared_windows_have_the_scores_of_one_rank() -> None:
    compared(Size(100, 16, 2), 300, None, 4)


def _file(directory: Path, context: int) -> int:
    trained, request = trained_of(TINY), request_of(directory, directory / f"{context}.tsv")
    groups = init_groups(context=context) if context > 1 else Groups.single()
    return score_variants(trained.to("cpu", "fp32", groups), request, groups).scored_now


def test_pairs_of_ranks_share_windows_and_pairs_share_the_variants(tmp_path: Path) -> None:
    write_inputs(tmp_path, 400, TINY)
    done = run_distributed(_file, 4, tmp_path, 2)
    assert done[0] == done[1] > 0
    assert done[2] == done[3] == 400 - done[0] > 0
    _file(tmp_path, 1)
    one, several = read_scores(tmp_path / "1.tsv"), read_scores(tmp_path / "2.tsv")
    assert (one.names, one.facts | {"context": "2"}) == (several.names, several.facts)
    columns = [one.names.index(name) for name in ("ll_ref", "ll_alt")]
    values = [np.array([[float(row[column]) for column in columns] for row in table.rows]) for table in (one, several)]
    assert rel(*values) <= TOLERANCE


def _substitutions(shards: Path, out: Path, ranks: int) -> tuple[list[substitutions.Row], int]:
    """The rows, and how many windows this rank has read."""
    trained, asked = trained_of(TINY), substitutions.Request(shards, "val", TINY.length, 8, 30)
    facts = substitutions.facts_of_file(trained, asked)
    with (patch.object(substitutions, "PART", 16 * TINY.length),
          patch.object(substitutions, "read_windows", wraps=substitutions.read_windows) as read):
        rows = substitutions.score_substitutions(trained, asked, facts, Parts(out),
                                                 init_groups() if ranks > 1 else Groups.single())
    return rows, sum(len(call.args[1]) for call in read.call_args_list)


def test_ranks_share_windows_with_substitutions(tmp_path: Path) -> None:
    files = []
    for number, species in enumerate(("left", "right")):
        bases = np.random.default_rng(number).choice(list("ACGT"), 3000, p=[0.4, 0.1, 0.2, 0.3][:: 1 - 2 * number])
        files.append(Source(write_fasta(tmp_path / f"{species}.fa", {species: "".join(bases).encode()}), species))
    build(files, tmp_path / "shards", FractionSplits(0.3), allow_copies=1.0)
    one, windows = _substitutions(tmp_path / "shards", tmp_path / "one.tsv", 1)
    (first, of_first), (rest, of_second) = run_distributed(_substitutions, 2, tmp_path / "shards",
                                                           tmp_path / "two.tsv", 2)
    assert {row.what for row in one} >= {"AUROC of the site", "accuracy", "outputs that move"}
    assert first == one
    assert rest == []
    assert of_first + of_second == windows
    assert min(of_first, of_second) > windows / 4


def test_a_model_whose_heads_cannot_be_shared_is_refused() -> None:
    section = ModelSection(num_layers=2, hidden_size=12, max_seq_len=64, layer_pattern="HA", num_attention_heads=3)
    with pytest.raises(ConfigError, match="num_attention_heads"):
        refuse_context(section, 2)


def losses_of(size: Size, context: int) -> np.ndarray:
    """Of two windows, whole and with all but the last eighth masked."""
    trained = trained_of(size)
    if context > 1:
        trained = trained.to("cpu", "fp32", init_groups(context=context))
    ids, _ = sites_of(2 * size.length, size.length)
    windows = [ids[: size.length], ids[size.length :]][: 2 if size.length < 2**16 else 1]
    changed = [take_away(window, window.size * 7 // 8, window.size, "masked", (0,))[0] for window in windows]
    return np.concatenate([mean_losses(trained, each, 16) for each in (windows, changed)])


@pytest.mark.parametrize("length", [100, pytest.param(2**20, marks=pytest.mark.slow)])
def test_losses_without_distant_sequence_are_those_of_one_rank(length: int) -> None:
    size = Size(length, 16 if length == 100 else 64, 2)
    one = losses_of(size, 1)
    for found in run_distributed(losses_of, 4, size, 4, timeout=3000.0):
        assert rel(found, one) <= TOLERANCE
    assert np.abs(one[: len(one) // 2] - one[len(one) // 2 :]).max() > 10 * TOLERANCE  # the control


@pytest.mark.slow
def test_windows_of_a_million_bases() -> None:
    compared(Size(2**20, 64, 2), 2**20 + 1000, 1, 4)
