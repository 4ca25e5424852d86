"""`score perplexity` against sums that are made base by base, by the definitions."""

import json
import re
import tracemalloc
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from hyena_dist.cli.score import main
from hyena_dist.config.errors import ConfigError
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.convert import write_model
from hyena_dist.data.build import build
from hyena_dist.data.contigs import Source
from hyena_dist.data.errors import DataError
from hyena_dist.data.gff import Gff
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.pool import Pool
from hyena_dist.data.splits import ContigSplits, FractionSplits
from hyena_dist.data.tokenizer import encode, tokenizer_of
from hyena_dist.model.config import hyena_config
from hyena_dist.model.model import HyenaModel
from hyena_dist.model.trained import Trained
from hyena_dist.parallel.groups import Groups, init_groups
from hyena_dist.tasks.held_out import HeldOut
from hyena_dist.tasks.parts import Parts
from hyena_dist.tasks.score import perplexity as perplexity_module
from hyena_dist.tasks.score.intervals import Blocks
from hyena_dist.tasks.score.output import read_scores
from hyena_dist.tasks.score.perplexity import Found, Request, facts_of_file, score_perplexity
from hyena_dist.tasks.score.perplexity_report import _bars, report
from hyena_dist.tasks.score.tables import write_table
from tests.dist.harness import run_distributed
from tests.genomes import genome, write_fasta

L = 80
FEW_LOGITS = {"cpu": 4 * L * 16}
"""So that a batch has some windows and the shards several batches."""
TOLERANCE = 1e-6  # a base that is scored in the wrong group moves a perplexity by more than 1e-3
TEXT = genome(3, 3000, 1700)
GFF = """##gff-version 3
human.chr1\tx\tgene\t1\t2900\t.\t+\t.\tID=g
human.chr1\tx\texon\t101\t300\t.\t+\t.\tParent=t1,t2
human.chr1\tx\texon\t1001\t2950\t.\t+\t.\tParent=t1
human.chr1\tx\texon\t501\t600\t.\t+\t.\tParent=t2
human.chr1\tx\tintron\t1\t3000\t.\t+\t.\tName=of reads
human.chr1\tx\trepeat_region\t2901\t3000\t.\t.\t.\t
other\tx\texon\t1\t10\t.\t+\t.\tParent=t3
##FASTA
>human.chr1
"""


def model_of(**keys) -> Trained:
    section = ModelSection(num_layers=1, hidden_size=8, filter_order=4, max_seq_len=L, **keys)
    model = HyenaModel(hyena_config(section), seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return Trained(section, model, Path("model"), L)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    file = write_fasta(directory / "human.fa", TEXT)
    build([Source(file, "human")], directory / "shards", FractionSplits(0.3))
    (directory / "genes.gff3").write_text(GFF)
    return directory / "shards"


def request(shards: Path, **keys) -> Request:
    return Request(shards, "val", **{"window": L, "block": 300, **keys})


def found_by(trained: Trained, asked: Request, out: Path, groups: Groups) -> Found | None:
    return score_perplexity(trained, asked, facts_of_file(trained, asked), Parts(out), groups)


def by_hand(trained: Trained, shards: Path) -> list[tuple[str, int, int, float, dict[int, float]]]:
    """Of each scored base its contig, its place, the tokens up to the one that predicts it, its loss, and those from
    shorter contexts."""
    found = []
    for interval in Manifest.load(shards).intervals("val"):
        text = TEXT[interval.contig.removeprefix("human.")].decode()[interval.start : interval.end].upper()
        for first in range(0, len(text) - 1, L):
            ids = torch.from_numpy(encode(text[first : first + L + 1])).long()

            def losses(start: int, end: int, ids: torch.Tensor = ids) -> list[float]:
                with torch.no_grad():
                    log_p = trained.model(ids[None, start:end])[0].double().log_softmax(-1)
                return [-log_p[at - 1 - start, ids[at]].item() for at in range(start + 1, min(end + 1, len(ids)))]
            whole = losses(0, min(L, len(ids) - 1))
            shorter: dict[int, dict[int, float]] = {at: {} for at in range(1, len(ids))}
            for context in (16, 32):
                for start in range(32, 64, context // 2):
                    end = min(start + context // 2, len(ids) - 1)
                    if start < end:
                        for at, loss in enumerate(losses(start - context // 2, end), start - context // 2 + 1):
                            if at > start:
                                shorter[at][context] = loss
            found += [(interval.contig, interval.start + first + at, at, whole[at - 1], shorter[at])
                      for at in range(1, len(ids)) if text[first + at] in "ACGT"]
    return found


def perplexity(losses: list[float]) -> float:
    return float(np.exp(np.mean(losses)))


def test_every_group_is_that_of_the_bases_one_by_one(shards: Path, tmp_path: Path) -> None:
    trained = model_of()
    asked = request(shards, regions=shards.parent / "genes.gff3")
    found = found_by(trained, asked, tmp_path / "p.tsv", Groups.single())
    rows = {(row.by, row.group): row for row in found.rows}
    bases = by_hand(trained, shards)
    assert rows["position", "1"].markov[7] != pytest.approx(rows["position", "1"].markov[1]), \
        "chains read across the start of a window, as the text says"
    exons = {at for start, end in ((100, 300), (1000, 2950), (500, 600)) for at in range(start, end)}
    introns = set(range(300, 1000)) - exons
    classes = {"exon": exons, "intron": introns, "repeat": set(range(2900, 3000))}
    wanted = {("all", "all"): [loss for *_, loss, _ in bases]}
    for name, inside in classes.items():
        wanted["region", name] = [loss for contig, at, _, loss, _ in bases if contig == "human.chr1" and at in inside]
    lower = [chr(TEXT[contig.removeprefix("human.")][at]).islower() for contig, at, *_ in bases]
    for name, is_lower in (("lower", True), ("upper", False)):
        wanted["case", name] = [base[3] for base, low in zip(bases, lower, strict=True) if low == is_lower]
    for first, last in ((1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64), (65, 80)):
        name = f"{last}" if first == last else f"{first} to {last}"
        wanted["position", name] = [loss for _, _, at, loss, _ in bases if first <= at <= last]
    wanted["context", "33 to 64"] = wanted["position", "33 to 64"]
    for context in (16, 32):
        wanted["context", f"{context // 2 + 1} to {context}"] = [
            shorter[context] for *_, shorter in bases if context in shorter]
    assert wanted["region", "exon"] or wanted["region", "intron"]
    for key, losses in wanted.items():
        if not losses:
            assert key not in rows, key
            continue
        assert rows[key].bases == len(losses), key
        assert rows[key].perplexity == pytest.approx(perplexity(losses), rel=TOLERANCE), key
        assert len(rows[key].markov) == 8
    assert rows["context", "9 to 16"].markov == rows["context", "33 to 64"].markov
    assert rows["context", "9 to 16"].bases == rows["context", "33 to 64"].bases > 0
    whole = rows["all", "all"]
    assert whole.low < whole.perplexity < whole.high
    assert whole.gain == pytest.approx(np.log(min(whole.markov)) - np.log(whole.perplexity))


def _of_ranks(shards: Path, directory: Path) -> list[Found | None]:
    """Shared by pairs of ranks, of which each pair shares every window; and by four ranks, each of which reads some."""
    found = []
    perplexity_module.LOGITS = FEW_LOGITS
    for context in (2, 1):
        groups = init_groups(context=context)
        found.append(found_by(model_of().to("cpu", "fp32", groups), request(shards), directory / f"{context}.tsv",
                              groups))
    return found


def test_ranks_share_the_windows_and_each_window(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity_module, "LOGITS", FEW_LOGITS)
    one = found_by(model_of(), request(shards), tmp_path / "one.tsv", Groups.single())
    (pairs, four), *others = run_distributed(_of_ranks, 4, shards, tmp_path)
    assert others == [[None, None]] * 3
    assert repr(four) == repr(one), "the numbers do not depend on how many ranks share the windows"
    assert len(list((tmp_path / "1.tsv.parts").glob("0*.npz"))) > 4
    for row, other in zip(pairs.rows, one.rows, strict=True):
        assert (row.by, row.group, row.bases) == (other.by, other.group, other.bases)
        assert row.perplexity == pytest.approx(other.perplexity, rel=2e-5)
        assert (row.low, row.gain_high) == pytest.approx((other.low, other.gain_high), rel=1e-3, abs=1e-4, nan_ok=True)


def test_a_batch_has_few_tokens_and_the_numbers_do_not_depend_on_it(shards: Path, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the bar moves, and a kill loses little, also where all windows would fit into the memory at once."""
    facts = facts_of_file(model_of(), request(shards))
    assert 0 < facts["windows_of_a_batch"] * L <= 2**14
    found = []
    for windows in (100, 7):
        monkeypatch.setattr(perplexity_module, "TOKENS", {"cpu": windows * L})
        found.append(found_by(model_of(), request(shards), tmp_path / f"{windows}.tsv", Groups.single()).rows)
    assert [len(list((tmp_path / f"{windows}.tsv.parts").glob("0*.npz"))) for windows in (100, 7)] == [1, 3]
    for row, other in zip(*found, strict=True):
        assert (row.by, row.group, row.bases, row.blocks) == (other.by, other.group, other.bases, other.blocks)
        assert row.perplexity == pytest.approx(other.perplexity, rel=TOLERANCE)


@pytest.mark.parametrize("overlap", [False, True])
def test_models_of_k_mers_are_scored_per_base(shards: Path, overlap: bool, tmp_path: Path) -> None:
    trained = model_of(kmer=3, kmer_overlap=overlap)
    found = found_by(trained, request(shards), tmp_path / "p.tsv", Groups.single())
    whole, tokenizer = found.rows[0], tokenizer_of(trained.section)
    total = count = 0.0
    for interval in Manifest.load(shards).intervals("val"):
        text = TEXT[interval.contig.removeprefix("human.")].decode()[interval.start : interval.end].upper()
        ids = torch.from_numpy(tokenizer.encode(text))
        for first in range(0, len(ids) - 1, L):
            inputs, targets = tokenizer.split_window(ids[None, first : first + L + 1])
            with torch.no_grad():
                losses = torch.nn.functional.cross_entropy(trained.model(inputs)[0], targets[0], ignore_index=-100,
                                                           reduction="sum")
            total, count = total + losses.item(), count + int((targets != -100).sum()) * tokenizer.stride
    assert whole.bases == count
    assert whole.perplexity == pytest.approx(np.exp(total / count), rel=1e-5)


def test_the_command_writes_a_table_a_text_and_a_picture(shards: Path, tmp_path: Path,
                                                         capsys: pytest.CaptureFixture) -> None:
    trained = model_of()
    write_model(tmp_path / "model", "safetensors", trained.section, trained.model)
    arguments = ["perplexity", "--from", str(tmp_path / "model"), "--shards", str(shards), "--regions",
                 str(shards.parent / "genes.gff3"), "--block", "500", "--out"]
    for name in ("p.tsv", "p2.parquet"):
        assert main([*arguments, str(tmp_path / name)]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "## The same bases with shorter context" in said
    assert "too few for intervals to be trusted" in said
    assert (tmp_path / "p.png").stat().st_size > 1000
    names, first, *_ = [line.split("\t") for line in (tmp_path / "p.tsv").read_text().splitlines()
                        if not line.startswith("##")]
    assert (names[:4], first[:2]) == (["by", "group", "bases", "perplexity"], ["all", "all"])
    import pyarrow.parquet as parquet
    table = parquet.read_table(tmp_path / "p2.parquet")
    assert table["perplexity"][0].as_py() == pytest.approx(float(first[3]))
    assert json.loads(table.schema.metadata[b"hyena_dist.block"]) == 500
    for bad, message in (([*arguments, str(tmp_path / "p.tsv")], "exists"), ([*arguments, "p.txt"], "ends in .tsv"),
                         ([*arguments[:-1], "--window", "81", "--out", str(tmp_path / "q.tsv")], "was trained on"),
                         ([*arguments[:-1], "--window", "1", "--out", str(tmp_path / "q.tsv")], "--window 1: no token"),
                         ([*arguments[:-2], "0", "--out", str(tmp_path / "q.tsv")], "--block 0")):
        assert main(bad) == 2
        assert message in capsys.readouterr().err


def test_annotations_are_read_as_classes_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gtf"
    path.write_text('c\tx\texon\t1\t10\t.\t+\t.\tgene_id "g"; transcript_id "t";\n'
                    'c\tx\texon\t21\t30\t.\t+\t.\tgene_id "g"; transcript_id "t";\nc\tx\tgene\t1\t30\t.\t+\t.\t\n')
    found = Gff(path)
    assert [(row.start, row.end, row.name) for row in found.rows["c"]] == [
        (0, 10, "exon"), (20, 30, "exon"), (10, 20, "intron")]
    assert "1 gene" in found.note()[-1]
    for text, message in (("c\tx\texon\t5\t4\t.\t+\t.\t\n", "line 1: start '5' and end '4'"),
                          ("c\tx\texon\t0\t4\t.\t+\t.\t\n", "line 1"), ("c x exon 1 2\n", "1 columns between tabs"),
                          ("c\tx\tgene\t1\t4\t.\t+\t.\t\n", "has no row of"), ("", "holds no rows")):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            Gff(path)


def test_intervals_hold_what_is_true_as_often_as_they_say() -> None:
    """Means of 40 blocks of normal numbers: 95 of 100 intervals have 0, within four standard errors of that share."""
    rng, held = np.random.default_rng(0), 0
    blocks = Blocks(40)
    for _ in range(400):
        interval = blocks.interval(blocks.sums(rng.standard_normal((40, 1)))[:, 0] / 40)
        held += interval.low <= 0 <= interval.high
    assert 0.88 <= held / 400 <= 0.98
    assert all(np.isnan(end) for end in Blocks(1).interval(np.ones(1000)))


def test_what_lies_in_one_block_has_no_interval(tmp_path: Path) -> None:
    """Resamples of a class in one block are all the same: an interval of width zero, as if it were known exactly."""
    text = {"chr1": genome(5, 2000)["chr1"], "chr2": genome(6, 300)["chr1"]}
    build([Source(write_fasta(tmp_path / "s.fa", text), "s")], tmp_path / "shards", ContigSplits(["s.chr1"]))
    (tmp_path / "r.bed").write_text("s.chr1\t90\t120\tone\ns.chr1\t90\t310\ttwo\n")
    trained, asked = model_of(), Request(tmp_path / "shards", "val", L, L, tmp_path / "r.bed")
    found = found_by(trained, asked, tmp_path / "p.tsv", Groups.single())
    one, _, two = (row for row in found.rows if row.by == "region")
    assert (one.group, one.bases, one.blocks) == ("one", 30, 1)
    assert np.isnan([one.low, one.high, one.gain_low, one.gain_high]).all()
    assert (two.group, two.blocks) == ("two", 3)
    assert two.low < two.perplexity < two.high, "the control"
    assert found.blocks >= 20
    [note] = found.notes
    assert "region one (1), region two (3)" in note
    text = report(found, facts_of_file(trained, asked), "")
    assert re.search(r"\| one \| 30 \| 1 \| [0-9.]+ \| one block \| .* \| one block \|", text)
    drawn = []
    axes = Mock(set_yticks=lambda _, labels, **__: drawn.extend(labels))
    _bars(axes, found.rows)
    assert "region: one (one block)" in drawn
    assert "region: two" in drawn


def test_many_blocks_and_short_contigs_take_little_memory(tmp_path: Path) -> None:
    """A kilobyte a block, where numbers of eight bytes would take eight; and many contigs are in one block."""
    values = np.random.default_rng(0).standard_normal((2000, 2))
    tracemalloc.start()
    found = Blocks(2000).sums(values)
    assert tracemalloc.get_traced_memory()[1] < 7e6, "the control is what these weights are as float64: 1.6e7"
    tracemalloc.stop()
    weights = np.random.default_rng(0).multinomial(2000, np.full(2000, 1 / 2000), 1000)
    np.testing.assert_allclose(found, weights @ values, atol=1e-9)
    contigs = {f"c{number}": genome(number, 70)["chr1"] for number in range(30)}
    build([Source(write_fasta(tmp_path / "s.fa", contigs), "s")], tmp_path / "shards",
          ContigSplits([f"s.c{number}" for number in range(1, 30)]))
    held_out = HeldOut([Pool(Manifest.load(tmp_path / "shards"))], split="val", seq_len=L, batch_size=4)
    for block, last in ((1000, 1), (70, 28)):  # the second is the control
        found = perplexity_module._blocks(held_out, block)
        assert found[-1] == last
        assert set(np.diff(found)) <= {0, 1}


def test_scores_and_tables_share_their_header(tmp_path: Path) -> None:
    """A table of perplexities is no file of scores."""
    write_table(tmp_path / "t.tsv", [{"a": 1.5, "b": None}, {"a": float("nan"), "b": float("inf")}], {"m": "x", "n": 3})
    assert (tmp_path / "t.tsv").read_text() == "##hyena_dist.m=x\n##hyena_dist.n=3\na\tb\n1.5\t\n\t\n"
    with pytest.raises(ConfigError, match="is no .tsv or .parquet of scores"):
        read_scores(tmp_path / "t.tsv")
