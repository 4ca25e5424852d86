"""Perplexity by source, species, region, case and G and C, of a run of a mixture, against base-by-base sums."""

import json
import math
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from benchmarks.studies import score_run
from hyena_dist.checkpoint.directory import step_directory
from hyena_dist.checkpoint.format import save_checkpoint
from hyena_dist.cli.evaluate import main
from hyena_dist.config.errors import ConfigError
from hyena_dist.config.identity import identity
from hyena_dist.config.load import dump_config
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.data.build import build
from hyena_dist.data.contigs import Source
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.pool import Pool, open_pools
from hyena_dist.data.regions import OUTSIDE
from hyena_dist.data.splits import BedSplits, FractionSplits, Splits
from hyena_dist.data.tokenizer import encode
from hyena_dist.model.model import build_model
from hyena_dist.parallel.groups import Groups
from hyena_dist.tasks import held_out, markov
from hyena_dist.tasks.evaluate import evaluate, load_run
from hyena_dist.tasks.held_out import HeldOut
from hyena_dist.train.report import EVALUATION
from tests.dist.test_checkpoint import DictEngine
from tests.genomes import genome, write_fasta

L, TOLERANCE = 64, 1e-6
LENGTHS = {"man": (3000, 900), "mouse": (2000,), "worm": (5000, 70)}
TEXTS = {f"{name}.{contig}": bases.decode() for number, (name, lengths) in enumerate(LENGTHS.items())
         for contig, bases in genome(number, *lengths).items()}
ROWS = [("man.chr1", 0, 1500, "exon"), ("man.chr1", 1400, 2990, "promoter"), ("man.chr1", 2000, 2500, "exon"),
        ("man.chr1", 2200, 2300, "exon"), ("mouse.chr1", 100, 1900, "repeat"), ("worm.chr1", 0, 4000, "exon"),
        ("worm.chr1", 4900, 9000, "promoter"), ("nowhere", 0, 10, "exon")]
"""Overlapping, past the end of a contig, and of another assembly."""
ROWS_OF_ALL = "".join(f"{name} 0 {len(text)} every\n" for name, text in TEXTS.items())


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    found = tmp_path_factory.mktemp("sets")
    files = {}
    for number, (name, lengths) in enumerate(LENGTHS.items()):
        files[name] = Source(write_fasta(found / f"{name}.fa", genome(number, *lengths)), name)
    build([files["man"], files["mouse"]], found / "sets/mammals", FractionSplits(0.2))
    build([files["worm"]], found / "sets/worms", FractionSplits(0.2))
    (found / "classes.bed").write_text("".join("\t".join(map(str, row)) + "\n" for row in ROWS))
    return found


@pytest.fixture(scope="module")
def run_dir(sets):
    """Of a mixture, in which a part of the worm is a source of its own; its last layer is drawn wide, so that bases
    differ in what they cost."""
    (sets / "part.bed").write_text("worm.chr1\t0\t5000\n")
    mixture = [{"name": "mammals", "shards": "mammals", "weight": 1}, {"name": "worms", "shards": "worms", "weight": 3},
               {"name": "part", "shards": "worms", "regions": str(sets / "part.bed"), "weight": 1}]
    config = Config(model=ModelSection(num_layers=1, hidden_size=8, filter_order=4, max_seq_len=L),
                    data=DataSection(shards=str(sets / "sets"), seq_len=L, mixture=mixture),
                    train=TrainSection(run_dir="none"))
    torch.manual_seed(0)
    model = build_model(config, Groups.single())
    engine = DictEngine({name: dict.fromkeys(("weight", "exp_avg", "exp_avg_sq"), torch.randn_like(parameter))
                         for name, parameter in model.named_parameters()})
    save_checkpoint(step_directory(sets / "run/checkpoints", 5), engine, model.placement(), Groups.single(),
                    {"step": 5, "identity": identity(config)})
    (sets / "run/config.yaml").write_text(dump_config(config))
    return sets / "run"


def each_base(run_dir, pools, trained):
    """Of every scored base, source, contig, position, the window it is in, and its losses: of the model and of the
    Markov chains, by the definitions."""
    model = load_run(run_dir)[1]
    counts = defaultdict(lambda: [0] * 4)
    for pool in trained:
        for interval in pool.intervals("train"):
            text = TEXTS[interval.contig][interval.start : interval.end].upper()
            for at, base in enumerate(text):
                for order in range(min(at, markov.MAX_ORDER) + 1):
                    word = text[at - order : at]
                    if set(word + base) <= set("ACGT"):
                        counts[word]["ACGT".index(base)] += 1
    for pool in pools:
        for interval in pool.intervals("val"):
            text = TEXTS[interval.contig][interval.start : interval.end].upper()
            for first in range(0, len(text) - 1, L):
                window = text[first : first + L + 1]
                with torch.no_grad():
                    logits = model(torch.from_numpy(encode(window)[:-1]).long()[None])[0]
                losses = -torch.log_softmax(logits, -1)
                for at in range(first + 1, first + len(window)):
                    if text[at] in "ACGT":
                        known = len(re.search("[ACGT]*$", text[max(0, at - markov.MAX_ORDER) : at])[0])
                        chains = [counts[text[at - min(k, known) : at]] for k in range(markov.MAX_ORDER + 1)]
                        yield (pool, interval.contig, interval.start + at, (pool.name, interval.contig, first), (
                            losses[at - first - 1, encode(text[at])[0]].item(),
                            *(-math.log((row["ACGT".index(text[at])] + 1) / (sum(row) + 4)) for row in chains)))


def expected(found):
    """By group: the bases, and the mean losses."""
    windows = defaultdict(list)
    for _, contig, position, window, _ in found:
        windows[window].append(TEXTS[contig][position].upper())
    shares = {window: sum(base in "CG" for base in bases) / len(bases) for window, bases in windows.items()}
    groups = defaultdict(list)
    for pool, contig, position, window, losses in found:
        regions = {name for of, start, end, name in ROWS if of == contig and start <= position < end} or {OUTSIDE}
        names = [("source", pool.name), ("species", contig.partition(".")[0]), *(("region", name) for name in regions),
                 ("case", "upper" if TEXTS[contig][position].isupper() else "lower"), ("G and C", shares[window])]
        for name in names:
            groups[name].append(losses)
    return {name: (len(rows), [sum(column) / len(rows) for column in zip(*rows, strict=True)])
            for name, rows in groups.items()}


def worst(found, want):
    """The largest relative error of perplexities, of groups with the same bases."""
    assert {name: group.bases for name, group in found.items()} == {name: bases for name, (bases, _) in want.items()}
    return max(abs(value / math.exp(loss) - 1) for name, group in found.items()
               for value, loss in zip([group.model, *group.markov], want[name][1], strict=True))


@pytest.mark.parametrize("chunk", [97, markov._CHUNK])
def test_every_group_is_the_mean_of_its_bases(run_dir, sets, monkeypatch, chunk):
    monkeypatch.setattr(markov, "_CHUNK", chunk)
    pools = open_pools(load_run(run_dir)[0].data)
    want = expected(list(each_base(run_dir, pools, pools)))
    found = evaluate(run_dir, regions=sets / "classes.bed")
    for what in ("source", "species", "case", "region"):
        own = {name: value for (by, name), value in want.items() if by == what}
        assert len(own) > 1
        error = worst(found.groups[what], own)
        print(f"{what}: {error:.1e}, tolerance {TOLERANCE}")
        assert error < TOLERANCE
        apart = max(abs(math.exp(a[1][0] - b[1][0]) - 1) for a in own.values() for b in own.values())
        assert apart > 100 * TOLERANCE, "control: the groups differ"
        if what != "region":
            assert sum(group.bases for group in found.groups[what].values()) == found.bases
    regions = found.groups["region"]
    assert set(regions) == {"exon", "promoter", "repeat", OUTSIDE}
    _deciles_are_right(found, want)


def _deciles_are_right(found, want):
    """They hold every window, in order of its share of G and C, which their names say."""
    shares = sorted((share, *value) for (by, share), value in want.items() if by == "G and C")
    deciles = found.groups["G and C"]
    assert 5 <= len(deciles) <= held_out.DECILES
    for name, group in deciles.items():
        low, high = map(float, re.fullmatch(r"decile \d+: (\S+) to (\S+)", name).groups())
        inside = [row for row in shares if low - 5e-4 <= row[0] <= high + 5e-4]
        bases = sum(row[1] for row in inside)
        losses = [sum(row[1] * row[2][column] for row in inside) / bases for column in range(markov.MAX_ORDER + 2)]
        assert worst({name: group}, {name: (bases, losses)}) < TOLERANCE
    assert sum(group.bases for group in deciles.values()) == found.bases


def test_windows_of_a_study_add_up_to_the_groups(run_dir, sets):
    shards, regions = str(sets / "sets/mammals"), sets / "classes.bed"
    found = evaluate(run_dir, shards=shards, regions=regions)
    by = ("species", "G and C", "case", "region")
    windows = score_run(str(run_dir), shards, "val", regions, by)
    assert windows["all", "all"].shape == (2, len(HeldOut([Pool(Manifest.load(shards))], split="val", seq_len=L,
                                                           batch_size=1).batches.windows))
    sums = {group: of_windows.sum(1).tolist() for group, of_windows in windows.items()}
    assert set(sums) == {("all", "all"), *((what, name) for what in by for name in found.groups[what])}
    for (what, name), (total, bases) in sums.items():
        group = found if what == "all" else found.groups[what][name]
        assert (group.bases, group.model) == (bases, pytest.approx(math.exp(total / bases)))
    with pytest.raises(ConfigError, match="--by kind"):
        score_run(str(run_dir), shards, "val", None, ["kind"])


def test_bases_that_no_run_has_seen(run_dir, tmp_path, capsys):
    """Another species, of which there is no training base: the chains are the run's own. As .json and as .tsv."""
    fasta = write_fasta(tmp_path / "yeast.fa", {"chrI": TEXTS["man.chr2"].encode()})
    (tmp_path / "all.bed").write_text("yeast.chrI 0 900 test\n")
    build([Source(fasta, "yeast")], tmp_path / "yeast", BedSplits(tmp_path / "all.bed"))
    arguments = [str(run_dir), "--shards", str(tmp_path / "yeast"), "--split", "test"]
    for name in ("a.json", "a.tsv"):
        assert main([*arguments, "--out", str(tmp_path / name)]) == 0
    said = capsys.readouterr().out
    assert "Markov chains fitted on" in said
    assert not (run_dir / EVALUATION).exists(), "not of the run's own validation bases"
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["shards"] == [str(tmp_path / "yeast")]
    assert {Path(path).name for path in content["markov_of"]} == {"mammals", "worms"}
    header, every, *rows = (line.split("\t") for line in (tmp_path / "a.tsv").read_text().splitlines())
    assert header[:5] == ["by", "group", "bases", "model", "markov_0"]
    assert float(every[3]) == content["model"]
    assert [row[:2] for row in rows if row[0] == "species"] == [["species", "yeast"]]
    by_case = {row[1]: float(row[3]) for row in rows if row[0] == "case"}
    assert by_case == {name: group["model"] for name, group in content["groups"]["case"].items()}


def test_a_mixture_whose_sets_were_moved(run_dir, sets, tmp_path, monkeypatch, capsys):
    (tmp_path / "moved").symlink_to(sets / "sets")
    own = tmp_path / "run"
    own.mkdir()
    (own / "checkpoints").symlink_to(run_dir / "checkpoints")
    (own / "config.yaml").write_text((run_dir / "config.yaml").read_text().replace(str(sets / "sets"), "gone"))
    monkeypatch.chdir(tmp_path)
    assert main([str(own)]) == 2
    assert re.search("a mixture, and not all of its .* are here .data.shards=gone.: say with --shards DIR where the "
                     "sets lie", capsys.readouterr().err)
    assert main([str(own), "--shards", "moved", "--out", "here.json"]) == 0
    there, here = evaluate(run_dir), json.loads(Path("here.json").read_text())
    assert here["model"] == there.model
    assert here["markov"] == there.markov
    assert evaluate(own, shards="moved/worms").groups["species"].keys() == {"worm"}


@pytest.mark.parametrize(("text", "message"), [
    ("man.chr1 0 10\n", "line 1: has 3 columns; write contig, start, end, class"),
    ("chr9 0 10 exon\n", "has no base of these shards: give a BED of their assembly"),
    ("".join(f"man.chr1 {row} {row + 1} gene{row}\n" for row in range(61)), "61 different names, and at most 60"),
    (None, "No such file")])
def test_regions_that_are_none(run_dir, tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "a.bed").write_text(text)
    assert main([str(run_dir), "--regions", str(tmp_path / "a.bed")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1]
    assert "a.bed" in said[-1]


@pytest.mark.parametrize(("rows", "without", "shown"), [
    ("man.chr1 0 100 exon\n", ["exon"], [OUTSIDE]), (ROWS_OF_ALL, [], ["every"]),
    (f"man.chr1 0 100 exon\n{ROWS_OF_ALL}", ["exon"], ["every"]),
    ("man.chr1 0 3000 exon\n", [], ["exon", OUTSIDE])])
def test_classes_without_a_held_out_base_are_said(run_dir, tmp_path, capsys, caplog, rows, without, shown):
    """And the classes are shown though there is only one: who gives a BED is never left without a word of it. The
    control: every class has some."""
    (tmp_path / "a.bed").write_text(rows)
    assert main([str(run_dir), "--regions", str(tmp_path / "a.bed")]) == 0
    said = [record.getMessage() for record in caplog.records if "no scored base" in record.getMessage()]
    assert said == [f"--regions: no scored base of split val is of class {name}" for name in without]
    table = capsys.readouterr().out
    assert [name for name in ("exon", "every", OUTSIDE) if name in table] == shown


def test_what_cannot_be_scored_or_written(run_dir, tmp_path, sets, capsys):
    build([Source(sets / "worm.fa")], tmp_path / "trains", Splits())
    (tmp_path / "there.tsv").write_text("kept")
    for arguments, message in ((["--shards", str(tmp_path / "trains")], "trains: no bases of split val to score"),
                               (["--shards", str(tmp_path / "none")], "none: is no shard directory, nor one in which "),
                               (["--out", "a.xlsx"], "--out a.xlsx: name a file that ends in .json or .tsv"),
                               (["--out", "no/where.tsv"], "--out no/where.tsv: there is no directory no"),
                               (["--out", str(tmp_path / "there.tsv")], "there.tsv: exists: choose another")):
        assert main([str(run_dir), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main([str(run_dir), "--shards", str(tmp_path / "trains"), "--split", "train"]) == 0, "control"
    assert (tmp_path / "there.tsv").read_text() == "kept"
