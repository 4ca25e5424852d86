"""Scores of variants: what each row of a file is, and that every number is the published equations'."""

import gzip
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pysam
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.baseline import BaselineHyenaDNA
from hyena_dist.cli.score import main
from hyena_dist.config.errors import UserError
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.convert import to_published, write_model
from hyena_dist.data.errors import DataError
from hyena_dist.data.reference import read_reference
from hyena_dist.data.tokenizer import decode, encode
from hyena_dist.data.variants import OUTCOMES, Row, Variants, judge, window_of
from hyena_dist.model.config import hyena_config
from hyena_dist.model.model import HyenaModel
from hyena_dist.model.trained import Trained
from hyena_dist.parallel.groups import Groups, init_groups
from hyena_dist.tasks.score import numerics
from hyena_dist.tasks.score import variants as task
from hyena_dist.tasks.score.numerics import NumericsError
from hyena_dist.tasks.score.observe import AROUND, SCORES, score_sites
from hyena_dist.tasks.score.output import Table, read_scores
from hyena_dist.tasks.score.report import PRESETS, auprc, auroc, labels_of, significance, worths
from hyena_dist.tasks.score.windows import batches
from tests.dist.harness import run_distributed

WINDOW = 64
TOLERANCE = 1e-6  # a window that is one base off, or a strand that is left out, moves a mean by more than 1e-3
SECTION = ModelSection(num_layers=2, hidden_size=16, filter_order=8, max_seq_len=WINDOW)


@pytest.fixture(scope="module")
def bases() -> str:
    letters = np.random.default_rng(1).choice(list("ACGT"), 600)
    letters[300] = "N"
    return "".join(letters)


@pytest.fixture(scope="module")
def trained() -> Trained:
    model = HyenaModel(hyena_config(SECTION), seed=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that predictions are far from even
    return Trained(SECTION, model, Path("model"), WINDOW)


@pytest.fixture
def fasta(tmp_path: Path, bases: str) -> Path:
    path = tmp_path / "slice.fa"
    path.write_text(f">s dna:chromosome chromosome:GRCh37:17:1001:1600:1\n{bases}\n")
    return path


def vcf(path: Path, *rows: str) -> Path:
    path.write_text("##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
                    + "".join(row.replace(" ", "\t") + "\n" for row in rows))
    return path


def other(base: str, by: int = 1) -> str:
    return "ACGT"[("ACGT".index(base) + by) % 4]


def alleles(bases: str) -> dict[str, tuple[str, int]]:
    """A row for each case, and the length of the alternative less that of the reference."""
    def at(pos: int, length: int = 1) -> str:
        return bases[pos - 1001 : pos - 1001 + length]
    return {"snv": (f"17 1100 . {at(1100)} {other(at(1100))} . . .", 0),
            "mnv": (f"17 1150 . {at(1150, 3)} {other(at(1150))}{at(1151)}{other(at(1152))} . . .", 0),
            "insertion": (f"17 1200 . {at(1200)} {at(1200)}{other(at(1201))}CA . . .", 3),
            "deletion": (f"17 1250 . {at(1250, 5)} {at(1250)} . . .", -4),
            "first": (f"17 1001 . {at(1001)} {other(at(1001))} . . .", 0),
            "last": (f"17 1600 . {at(1600)} {other(at(1600))} . . .", 0),
            "deletion near the end": (f"17 1590 . {at(1590, 3)} {at(1590)} . . .", -2),
            "beside N": (f"17 1300 . {at(1300)} {other(at(1300))} . . .", 0)}


def complement(text: str) -> str:
    return text[::-1].translate(str.maketrans("ACGT", "TGCA"))


def by_hand(trained: Trained, bases: str, row: str) -> dict[str, float]:
    """The scores of a variant by strings, one at a time, with the published model."""
    config, weights = to_published(trained.model)
    plain = BaselineHyenaDNA(config, filter_shift=trained.section.filter_shift)
    plain.load_state_dict(weights, strict=False)
    plain.eval()
    _, pos, _, ref, alt, *_ = row.split()
    at = int(pos) - 1001
    while ref and alt and ref[-1] == alt[-1]:
        ref, alt = ref[:-1], alt[:-1]
    while ref and alt and ref[0] == alt[0]:
        ref, alt, at = ref[1:], alt[1:], at + 1
    while not (ref and alt) and bases[at - 1] == (ref or alt)[-1]:  # the same change, a base further left
        ref, alt, at = bases[at - 1] + ref[:-1] if ref else "", bases[at - 1] + alt[:-1] if alt else "", at - 1
    changed = bases[:at] + alt + bases[at + len(ref):]
    start, end = max(at - WINDOW // 2, 0), min(at + WINDOW // 2, len(bases), len(changed))
    found: dict[str, list[Any]] = {name: [] for name in SCORES}
    for strand in (0, 1):
        ll, site, after, states = [], [], [], []
        for text, allele in ((bases[start:end], ref), (changed[start:end], alt)):
            first = at - start if not strand else len(text) - (at - start) - len(allele)
            text = complement(text) if strand else text
            ids = torch.from_numpy(encode(text)).long()[None]
            with torch.no_grad():
                logits, state = plain(ids)[0].double(), plain.backbone(ids)[0].double()
            log_p = logits.log_softmax(-1)
            of_base = {t: log_p[t - 1, ids[0, t]].item() for t in range(1, len(text)) if text[t] in "ACGT"}
            ll.append((sum(of_base.values()), len(of_base)))
            stop = min(first + len(allele) + (len(ref) != len(alt)), len(text))
            site.append(sum(of_base[t] for t in range(first, stop) if text[t] in "ACGT") if first else np.nan)
            behind = first + len(allele)
            after.append([logits[t - 1, 7:11].softmax(-1) if 1 <= t < len(text) else None
                          for t in range(behind, behind + AROUND)])
            states.append(state.mean(0))
        means = [total / count for total, count in ll]
        found["ll_ref"].append(means[0])
        found["ll_alt"].append(means[1])
        found["llr_mean"].append(means[1] - means[0])
        found["llr_sum"].append(ll[1][0] - ll[0][0])
        found["llr_site"] += [] if np.isnan(site).any() else [site[1] - site[0]]
        for p, q in zip(*after, strict=True):
            if p is not None and q is not None:
                m = (p + q) / 2
                found["jsd"].append(((p * (p / m).log()).sum() + (q * (q / m).log()).sum()).item() / 2)
        found["embedding_l2"].append((states[1] - states[0]).norm().item())
        found["embedding_cosine"].append(1 - torch.cosine_similarity(*states, dim=0).item())
    return {name: float(np.mean(values)) for name, values in found.items()}


def test_scores_are_those_of_a_plain_loop(trained: Trained, bases: str, fasta: Path, tmp_path: Path) -> None:
    cases = alleles(bases)
    reference = read_reference(fasta)
    file = Variants(vcf(tmp_path / "v.vcf", *(row for row, _ in cases.values())), is_vcf=True)
    found = list(judge(file, reference, WINDOW))
    assert [judged.outcome for judged in found] == ["scored"] * len(cases)
    sites = [judged.site for judged in found if judged.site is not None]
    assert [site.alt.size - site.removed for site in sites] == [difference for _, difference in cases.values()]
    scores = score_sites(trained, sites, reference.ids, WINDOW)
    worst = 0.0
    for (name, (row, _)), values in zip(cases.items(), scores, strict=True):
        wanted = by_hand(trained, bases, row)
        errors = {score: abs(value - wanted[score]) / max(1, abs(wanted[score]))
                  for score, value in zip(SCORES, values, strict=True)}
        worst = max(worst, *errors.values())
        assert {score: error for score, error in errors.items() if not error < 10 * TOLERANCE} == {}, name
        assert errors["ll_ref"] < TOLERANCE, name
        assert errors["ll_alt"] < TOLERANCE, name
    assert abs(scores[:, 2]).min() > 1e-4  # the control: the alleles make a difference that is seen
    print(f"largest error {worst:.1e}, tolerance {TOLERANCE:.0e} of a log-likelihood, {10 * TOLERANCE:.0e} of others")


EDGES = {
    "17 1100 . {ref} {alt} . . .": "scored",
    "chr17 1101 . {ref} {alt} . . .": "scored renamed_contig",
    "17 1102 . {low} {alt} . . .": "scored lower_case",
    "17 1002 . {ref} {alt} . . .": "scored window_cut",
    "17 1103 . {ref} {alt},*,<DEL>,. . . .": "scored star symbolic no_alternative",
    "17 1104 . {ref} {ref}[2:321681[ . . .": "breakend",
    "17 1105 . {ref} .{ref} . . .": "breakend",
    "17 1106 . {alt} {ref} . . .": "ref_mismatch",
    "17 1107 . {ref} N . . .": "unknown_base",
    "17 1301 . N A . . .": "unknown_base",
    "17 1108 . {ref} {ref} . . .": "no_alternative",
    "18 1109 . {ref} {alt} . . .": "unknown_contig",
    "17 1000 . A C . . .": "outside",
    "17 1601 . A C . . .": "outside",
    "17 1110 . {ref} {ref}LONG . . .": "too_long",
    "17 1111 . {ref} {alt}? . . .": "malformed",
    "17 -5 . {ref} {alt} . . .": "malformed",
    "17 1112 . {ref}": "malformed",
    "17 1597 . {four} {ref} . . .": "contig_end",
}


def edge_rows(bases: str) -> tuple[list[str], list[str]]:
    """The rows of `EDGES`, behind a hundred that fit, and the outcomes with notes of their alleles."""
    rows = [f"17 {pos} . {bases[pos - 1001]} {other(bases[pos - 1001])} . . ." for pos in range(1400, 1500)]
    wanted = ["scored"] * len(rows)
    for row, outcomes in EDGES.items():
        pos = int(row.split()[1])
        ref = bases[pos - 1001] if 1001 <= pos <= 1600 and bases[pos - 1001] in "ACGT" else "A"
        rows.append(row.format(ref=ref, alt=other(ref), low=ref.lower(), four=bases[pos - 1001 : pos - 997])
                    .replace("LONG", "ACGT" * 20))
        several = outcomes.split()
        wanted += [outcomes] if several[-1] in ("renamed_contig", "lower_case", "window_cut") else several
    return [*rows, rows[0]], [*wanted, "duplicate"]


def exported(trained: Trained, path: Path) -> Path:
    write_model(path, "safetensors", trained.section, trained.model)
    return path


def run(model: Path, *arguments: object) -> int:
    return main(["variants", "--from", str(model), "--window", str(WINDOW), *map(str, arguments)])


def test_each_edge_case_has_its_counted_outcome(trained: Trained, bases: str, fasta: Path, tmp_path: Path,
                                                capsys: pytest.CaptureFixture) -> None:
    model, (rows, wanted) = exported(trained, tmp_path / "model"), edge_rows(bases)
    file = vcf(tmp_path / "v.vcf", *rows)
    outs = [tmp_path / f"scores{ending}" for ending in (".tsv", ".parquet", ".vcf", ".vcf.gz")]
    for out in outs:
        assert run(model, "--vcf", file, "--fasta", fasta, "--out", out) == 0, capsys.readouterr().err
    table = read_scores(outs[0])
    outcome, notes = table.names.index("outcome"), table.names.index("notes")
    assert [" ".join([row[outcome], row[notes]]).strip() for row in table.rows] == wanted
    counts = json.loads(table.facts["counts"])
    assert sum(counts.values()) == len(wanted)
    assert set(counts) == set(OUTCOMES)
    assert json.loads(table.facts["notes"]) == {"lower_case": 1, "renamed_contig": 1, "window_cut": 1}
    assert table.facts["assembly"] == "GRCh37"
    first = table.names.index("ll_ref")
    assert all(bool(row[first]) == (row[outcome] in ("scored", "duplicate")) for row in table.rows)
    assert table.rows[-1][first:] == table.rows[0][first:], "a duplicate has the scores of its first"
    parquet = read_scores(outs[1])
    assert (parquet.rows, parquet.facts) == (table.rows, table.facts)
    assert gzip.decompress(outs[3].read_bytes()) == outs[2].read_bytes()
    lines = [line for line in outs[2].read_text().splitlines() if not line.startswith("#")]
    whole = [row.split()[:7] for row in rows if len(row.split()) == 8 and "-5" not in row]
    assert [line.split("\t")[:7] for line in lines] == whole
    assert len(whole) == len(rows) - 2
    assert "##hyena_dist.left_out=2 lines" in outs[2].read_text()
    of_four = next(line for line in lines if ",*,<DEL>,." in line)
    assert "HD_outcome=scored,star,symbolic,no_alternative" in of_four
    assert of_four.split("HD_llr_mean=")[1].split(";")[0].endswith(",.,.,.")


def test_an_annotated_vcf_is_read_by_others(trained: Trained, bases: str, fasta: Path, tmp_path: Path) -> None:
    """Allele by allele, and through an index, as htslib does."""
    model, out = exported(trained, tmp_path / "model"), tmp_path / "s.vcf.gz"
    rows = sorted((row for row, _ in alleles(bases).values()), key=lambda row: int(row.split()[1]))
    rows.insert(2, f"17 1120 rs1 {bases[119]} {other(bases[119])},{other(bases[119], 2)},* . PASS AC=1")
    path = vcf(tmp_path / "v.vcf", *rows)
    path.write_text(path.read_text().replace("#CHROM", "##contig=<ID=17>\n##INFO=<ID=AC,Number=A,Type=Integer,"
                                             'Description="x">\n##FILTER=<ID=PASS,Description="x">\n#CHROM'))
    for name in (out, tmp_path / "s.tsv"):
        assert run(model, "--vcf", path, "--fasta", fasta, "--out", name) == 0
    table = read_scores(tmp_path / "s.tsv")
    scores = {tuple(row[:4]): row[table.names.index("llr_mean")] for row in table.rows}
    pysam.tabix_index(str(out), preset="vcf")
    with pysam.VariantFile(str(out)) as file:
        found = {("17", str(record.pos), record.ref, alt): value for record in file.fetch("17", 1000, 1600)
                 for alt, value in zip(record.alts, record.info["HD_llr_mean"], strict=True)}
    assert found.keys() == scores.keys()
    assert found["17", "1120", bases[119], "*"] is None
    for key, value in scores.items():
        assert value == "" or found[key] == pytest.approx(float(value), rel=1e-5)


def test_a_wrong_assembly_stops(trained: Trained, bases: str, fasta: Path, tmp_path: Path,
                                capsys: pytest.CaptureFixture) -> None:
    model = exported(trained, tmp_path / "model")
    rows = [f"17 {pos + 1} . {bases[pos - 1001]} {other(bases[pos - 1001])} . . ." for pos in range(1400, 1550)]
    out = tmp_path / "scores.tsv"
    assert run(model, "--vcf", vcf(tmp_path / "v.vcf", *rows), "--fasta", fasta, "--out", out) == 2
    assert "of the first 100 variants on this reference REF fits its bases in" in capsys.readouterr().err
    assert run(model, "--vcf", tmp_path / "v.vcf", "--fasta", fasta, "--region", "18:1001-1600", "--out", out) == 2
    said = capsys.readouterr().err
    assert "no variant can be scored on this reference (150 unknown_contig; the file has 17 (150), the refer" in said
    assert run(model, "--vcf", tmp_path / "v.vcf", "--fasta", fasta, "--region", "17:1001-1700", "--out", out) == 2
    assert "has 600 bases" in capsys.readouterr().err
    assert not out.exists()
    assert run(model, "--vcf", tmp_path / "v.vcf", "--fasta", fasta, "--region", "17:1002-1601", "--out", out) == 0


def test_longer_windows_than_trained_on_are_refused(trained: Trained, fasta: Path, bases: str, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture) -> None:
    model = exported(trained, tmp_path / "model")
    file = vcf(tmp_path / "v.vcf", edge_rows(bases)[0][0])
    assert main(["variants", "--from", str(model), "--vcf", str(file), "--fasta", str(fasta), "--window",
                 str(WINDOW + 1), "--out", str(tmp_path / "o.tsv")]) == 2
    assert f"was trained on sequences of {WINDOW} bases" in capsys.readouterr().err
    assert run(model, "--vcf", file, "--fasta", fasta, "--out", tmp_path / "o.tsv", "--context", 2) == 2
    assert "--context 2: 1 ranks cannot share a sequence by so many" in capsys.readouterr().err


def request_of(tmp_path: Path, out: str) -> task.Request:
    return task.Request(Variants(tmp_path / "v.vcf", is_vcf=True), read_reference(tmp_path / "slice.fa"),
                        tmp_path / out, WINDOW, "slice.fa")


def _of_rank(trained: Trained, tmp_path: Path) -> int:
    task.CHUNK = 16
    return task.score_variants(trained, request_of(tmp_path, "ranks.tsv"), init_groups()).scored_now


def test_killed_and_resumed_and_over_two_ranks_it_is_the_same_file(
        trained: Trained, bases: str, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fasta.parent == tmp_path
    vcf(tmp_path / "v.vcf", *edge_rows(bases)[0])
    monkeypatch.setattr(task, "CHUNK", 16)
    task.score_variants(trained, request_of(tmp_path, "whole.tsv"), Groups.single())
    whole = (tmp_path / "whole.tsv").read_bytes()
    calls = []

    def dies(*args: Any, **kwargs: Any) -> np.ndarray:
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return score_sites(*args, **kwargs)

    monkeypatch.setattr(task, "score_sites", dies)
    with pytest.raises(KeyboardInterrupt):
        task.score_variants(trained, request_of(tmp_path, "killed.tsv"), Groups.single())
    parts = tmp_path / "killed.tsv.parts"
    assert len(list(parts.glob("*.npz"))) == 3
    (parts / "00000001.npz").write_bytes((parts / "00000001.npz").read_bytes()[:-40])  # cut by a crash
    monkeypatch.setattr(task, "score_sites", score_sites)
    other_window = task.Request(**{**vars(request_of(tmp_path, "killed.tsv")), "window": 32})
    with pytest.raises(UserError, match="was begun with another counts, numerics|was begun with another .*window"):
        task.score_variants(trained, other_window, Groups.single())
    result = task.score_variants(trained, request_of(tmp_path, "killed.tsv"), Groups.single())
    assert result.scored_now == result.survey.scored - 2 * 16
    assert (tmp_path / "killed.tsv").read_bytes() == whole
    assert not parts.exists()
    done = run_distributed(_of_rank, 2, trained, tmp_path)
    assert sum(done) == result.survey.scored
    assert min(done) > 0
    assert (tmp_path / "ranks.tsv").read_bytes() == whole


def test_each_reference_window_is_made_once(bases: str, fasta: Path) -> None:
    reference = read_reference(fasta)
    rows = [Row(1, "17", str(pos), bases[pos - 1001], other(bases[pos - 1001], by), [])
            for pos in range(1100, 1110) for by in (1, 2, 3)]
    sites = [judged.site for judged in judge(rows, reference, WINDOW) if judged.site is not None]
    windows = [ids for batch in batches(sites, reference.ids, WINDOW, 7) for ids in batch.ids]
    assert len(windows) == 2 * (10 + 30)
    assert len({ids.tobytes() for ids in windows}) == len(windows)
    start, length = window_of(sites[0], WINDOW)
    assert decode(reference.ids[start : start + length]) == bases[99 - 32 : 99 + 32]


def test_a_precision_that_changes_the_order_is_refused(trained: Trained, bases: str, fasta: Path, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    model = exported(trained, tmp_path / "model")
    file = vcf(tmp_path / "v.vcf", *edge_rows(bases)[0])
    out = tmp_path / "o.tsv"
    monkeypatch.setattr(numerics, "LEAST", 0.5)
    assert run(model, "--vcf", file, "--fasta", fasta, "--precision", "bf16", "--out", out) == 0
    card = json.loads(read_scores(out).facts["numerics"])
    assert card["variants"] == 64
    assert 0.5 < card["spearman"] < 1
    monkeypatch.setattr(numerics, "LEAST", 1.1)
    worse = tmp_path / "worse.tsv"
    assert run(model, "--vcf", file, "--fasta", fasta, "--precision", "bf16", "--out", worse) == 3
    assert not worse.exists()
    assert run(model, "--vcf", file, "--fasta", fasta, "--precision", "bf16", "--accept-numerics", "--out", worse) == 0
    assert "accepted" in json.loads(read_scores(worse).facts["numerics"])["note"]
    assert issubclass(NumericsError, UserError)


FIELD = st.one_of(st.sampled_from(["17", "chr17", "1100", "1300", "A", "C", "AC", "a", "N", ".", "*", "<DEL>", "A,C",
                                   "", "A[2:3[", "99999999999999999999", "-1", "1e3", "\u0661"]), st.text(max_size=6))


read_once = lru_cache(read_reference)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.lists(FIELD, min_size=1, max_size=9), max_size=12), table=st.booleans(), comma=st.booleans())
def test_any_rows_are_counted_or_refused_and_never_a_wrong_allele(bases: str, fasta: Path, rows: list[list[str]],
                                                                  table: bool, comma: bool) -> None:
    reference = read_once(fasta)
    path, between = fasta.parent / "fuzz", "," if comma and table else "\t"
    names = ["chrom", "pos", "ref", "alt"] if table else ["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO"]
    lines = ([] if table else ["##fileformat=VCFv4.2"]) + [between.join(row) for row in (names, *rows)]
    path.write_text("\n".join(lines), encoding="utf-8", errors="replace", newline="")
    if not table and rows and rows[0][0].startswith("#"):  # behind #CHROM comes no other line of the header
        with pytest.raises(DataError, match="#CHROM"):
            Variants(path, is_vcf=True)
        return
    variants = Variants(path, is_vcf=not table)
    for judged in judge(variants, reference, WINDOW):
        assert judged.outcome in OUTCOMES
        assert (judged.site is not None) == (judged.outcome == "scored")
        if judged.site is not None:
            site, row = judged.site, judged.row
            at = int(row.pos) - 1001
            changed = bases[:at] + row.alt.upper() + bases[at + len(row.ref):]
            assert bases[at : at + len(row.ref)] == row.ref.upper()
            assert bases[: site.at] + decode(site.alt) + bases[site.at + site.removed :] == changed


def test_report_on_a_known_ranking(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    positive, values = np.array([True, True, False, False, True]), np.array([5.0, 2.0, 2.0, 1.0, 4.0])
    assert auroc(positive, values) == pytest.approx(5.5 / 6)
    assert auprc(positive, values) == pytest.approx((1 + 1 + 3 / 4) / 3)
    names = ["chrom", "pos", "ref", "alt", "outcome", "llr_mean", "llr_site", "jsd", "embedding_l2", "func_class",
             "consequence", "cadd"]
    rows = [["17", "1", "A", "C", "scored", str(-v), str(v), "0", str(v), "LOF" if p else "FUNC", "Missense", str(-v)]
            for p, v in zip(positive, values, strict=True)]
    file = tmp_path / "s.tsv"
    file.write_text("".join("\t".join(row) + "\n" for row in [names, *rows]))
    assert main(["report", str(file), "--preset", "brca1", "--score", "cadd", "--picture", str(tmp_path / "roc.png"),
                 "--json", str(tmp_path / "r.json")]) == 0
    found = {(worth["score"], worth["group"]): worth for worth in
             json.loads((tmp_path / "r.json").read_text())["worth"]}
    assert found["llr_mean", "all"]["auroc"] == pytest.approx(5.5 / 6)
    assert found["llr_site", "all"]["auroc"] == pytest.approx(0.5 / 6)
    assert found["jsd", "Missense"]["auroc"] == 0.5
    assert (found["cadd", "all"]["auroc"], found["cadd", "all"]["sign"]) == (pytest.approx(5.5 / 6), -1)
    assert (tmp_path / "roc.png").stat().st_size > 1000
    capsys.readouterr()
    assert main(["report", str(file), "--label", "nothing"]) == 2
    assert "no column nothing" in capsys.readouterr().err


def test_labelled_rows_that_are_left_out_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """By their outcome, or by the column in which they have no number; their class is not lost."""
    names = ["outcome", "llr_mean", "llr_site", "jsd", "embedding_l2", "label", "tissue", "cadd"]
    scored = [["scored", "-1", "2", "0", "1", "1", "blood", "3"], ["scored", "2", "2", "0", "1", "0", "blood", "1"]]
    copied = [["duplicate", *row[1:6], "heart", "1"] for row in scored]
    lost = [["duplicate", "", "", "", "", "0", "liver", "1"], ["ref_mismatch", "", "", "", "", "1", "liver", "1"],
            ["duplicate", "", "", "", "", "", "liver", "1"],  # without a label, which is no loss
            ["scored", "1", "", "0", "1", "1", "liver", "1"], ["duplicate", "1", "2", "0", "1", "0", "liver", ""]]

    def report(rows: list[list[str]]) -> tuple[dict[str, Any], str]:
        (tmp_path / "s.tsv").write_text("".join("\t".join(row) + "\n" for row in [names, *rows]))
        (tmp_path / "r.json").unlink(missing_ok=True)
        assert main(["report", str(tmp_path / "s.tsv"), "--label", "label", "--by", "tissue", "--score", "cadd",
                     "--json", str(tmp_path / "r.json")]) == 0
        return json.loads((tmp_path / "r.json").read_text()), capsys.readouterr().out

    found, said = report([*scored, *copied, *lost])
    assert found["left_out"] == {"duplicate": 1, "ref_mismatch": 1, "no number in llr_site": 1, "no number in cadd": 1}
    assert said.splitlines()[1] == "  9 alleles: 5 duplicate, 3 scored, 1 ref_mismatch"
    assert "4 rows with a label are left out of every number: 1 duplicate, 1 ref_mismatch" in said
    assert "2 of the rows below are of variants that have a row before them" in said
    variants = {worth["group"]: worth["variants"] for worth in found["worth"]}
    assert variants == {"all": 4, "blood": 2, "heart": 2, "liver": 0}
    found, said = report(scored)  # the control
    assert found["left_out"] == {}
    assert "left out" not in said
    assert "count again" not in said


def test_a_class_of_one_label_has_no_area(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Without a negative variant every order of the variants has an AUPRC of 1, which says nothing of a score."""
    names = ["outcome", "llr_mean", "llr_site", "jsd", "embedding_l2", "label", "class"]
    rows = [["scored", str(number), "2", "0", "1", label, name] for number, (label, name) in
            enumerate((("1", "both"), ("0", "both"), ("1", "harmful"), ("1", "harmful"), ("0", "harmless")))]
    (tmp_path / "s.tsv").write_text("".join("\t".join(row) + "\n" for row in [names, *rows]))
    assert main(["report", str(tmp_path / "s.tsv"), "--label", "label", "--by", "class", "--json",
                 str(tmp_path / "r.json")]) == 0
    said = capsys.readouterr().out
    assert "nan" not in said
    assert "-: of harmful, harmless there are no positive variants or no negative ones" in said
    found = {worth["group"]: (worth["auroc"], worth["auprc"]) for worth in
             json.loads((tmp_path / "r.json").read_text())["worth"] if worth["score"] == "llr_mean"}
    assert found["harmful"] == found["harmless"] == (None, None)
    assert found["both"] == (1, 1), "the control"


@pytest.mark.parametrize(("value", "label"), [
    ("Pathogenic|drug_response", 1), ("Benign|other", 0), ("Pathogenic/Likely_pathogenic|risk_factor", 1),
    ("Pathogenic/Likely_pathogenic/Pathogenic,_low_penetrance", 1), ("Likely_pathogenic,_low_penetrance", 1),
    ("Likely_pathogenic/Likely_risk_allele", 1), ("Benign/Likely_benign,_association", 0), ("protective|Benign", 0),
    ("Uncertain_significance/Uncertain_risk_allele", None), ("Uncertain_significance|drug_response", None),
    ("Conflicting_classifications_of_pathogenicity|other", None), ("Pathogenic/Uncertain_significance", None),
    ("Pathogenic|Benign", None), ("Established_risk_allele", None), ("drug_response", None), ("", None)])
def test_terms_of_clinvar(value: str, label: float | None) -> None:
    assert significance(value) == label


def test_presets_know_their_sets() -> None:
    single, none = "criteria_provided,_single_submitter", "no_assertion_criteria_provided"
    info = [f"CLNSIG={significance};CLNREVSTAT={review};MC=SO:0001583|missense_variant,SO:1|x"
            for significance, review in
            [("Pathogenic", single), ("Benign/Likely_benign", single), ("Pathogenic", none),
             ("Uncertain_significance", single), ("Likely_pathogenic", "reviewed_by_expert_panel")]]
    table = Table({}, ["outcome", "info"], [["scored", value] for value in info])
    labels = PRESETS["clinvar"](table, None, 1)
    np.testing.assert_equal(labels.values, [1, 0, np.nan, np.nan, 1])
    assert labels.by == ["missense_variant"] * 5
    assert labels.unlabelled == {"reviewed with fewer stars than 1": 1, "CLNSIG Uncertain_significance": 1}
    np.testing.assert_equal(PRESETS["clinvar"](table, None, 0).values, [1, 0, 1, np.nan, 1])
    np.testing.assert_equal(PRESETS["clinvar"](table, None, 2).values, [np.nan] * 4 + [1])
    rows = [["scored", "True", "LOF"], ["scored", "False", "FUNC"], ["scored", "", "INT"]]
    table = Table({}, ["outcome", "label", "func.class"], rows)
    np.testing.assert_equal(PRESETS["traitgym"](table, None, 1).values, [1, 0, np.nan])
    assert labels_of(table, "label", None).unlabelled == {"label ''": 1}
    many = Table({}, ["outcome", "y"], [["scored", str(value)] for value in [*range(100), 7, 7]])
    assert labels_of(many, "y", None).unlabelled == {"y '7'": 3, **{f"y '{each}'": 1 for each in (2, 3, 4, 5, 6, 8, 9)},
                                                     "of other values": 90}
    np.testing.assert_equal(PRESETS["brca1"](table, None, 1).values, [1, 0, 0])


def test_the_published_table_and_a_slice_whose_numbers_count_from_0(tmp_path: Path, bases: str) -> None:
    """The published sheet has two lines of title; the header of a slice may be of BED's kind."""
    (tmp_path / "s.fa").write_text(f">s dna:chromosome chromosome:GRCh37:17:1000:1600\n{bases}\n")
    (tmp_path / "t.csv").write_text("Supplementary Table 1\n,,,\nchromosome,position (hg19),reference,alt,func.class\n"
                                    f'17,1100,{bases[99]},{other(bases[99])},"LOF, sure"\n')
    found = list(judge(Variants(tmp_path / "t.csv", is_vcf=False), read_reference(tmp_path / "s.fa"), WINDOW))
    assert [judged.outcome for judged in found] == ["scored"]
    assert found[0].row.others == ["LOF, sure"]


def test_the_published_spreadsheet_is_read_as_it_is(tmp_path: Path, bases: str, fasta: Path) -> None:
    """Two lines of title, then the names; places are numbers of any kind."""
    from openpyxl import Workbook

    book = Workbook()
    for row in (["Supplementary Table 1"], [], ["gene", "chromosome", "position (hg19)", "reference", "alt",
                                                "function.score.mean", "func.class"],
                ["BRCA1", 17, 1100, bases[99], other(bases[99]), -1.25, "LOF"],
                ["BRCA1", 17.0, 1101.0, bases[100], other(bases[100]), None, "FUNC"], [],
                ["BRCA1", 17, "1102", "N", "A", 0.5, "INT"]):
        book.active.append(row)
    book.save(tmp_path / "t.xlsx")
    variants = Variants(tmp_path / "t.xlsx", is_vcf=False)
    assert variants.names == ["gene", "function.score.mean", "func.class"]
    found = list(judge(variants, read_reference(fasta), WINDOW))
    assert [judged.outcome for judged in found] == ["scored", "scored", "unknown_base"]
    assert [judged.row.others for judged in found] == [["BRCA1", "-1.25", "LOF"], ["BRCA1", "", "FUNC"],
                                                      ["BRCA1", "0.5", "INT"]]
    assert [judged.row.line for judged in found] == [4, 5, 7]
    content = (tmp_path / "t.xlsx").read_bytes()
    for damaged in (content[: len(content) // 2], b"PK\x03\x04" + bytes(200)):
        (tmp_path / "d.xlsx").write_bytes(damaged)
        with pytest.raises(UserError, match="is no spreadsheet, or damaged"):
            list(Variants(tmp_path / "d.xlsx", is_vcf=False))


def test_infinite_and_missing_scores_are_left_out_of_a_report() -> None:
    """Of all scores at once, so that each is of the same variants."""
    names = ["outcome", *("llr_mean", "llr_site", "jsd", "embedding_l2"), "y"]
    rows = [["scored", value, "0.1", "0.2", "0.3", str(number % 2)] for number, value in
            enumerate(["-1", "2", "inf", "nan", "", "-inf", "0.5", "-3"])]
    found = worths(Table({}, names, rows), labels_of(Table({}, names, rows), "y", None), [])
    assert {worth.variants for worth in found} == {4}
    assert np.isfinite([worth.auroc for worth in found]).all()
