"""Scores of variants: what each row of a file is, and that every number is the published equations'."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.baseline import BaselineHyenaDNA
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.convert import to_published
from hyena_dist.data.reference import read_reference
from hyena_dist.data.tokenizer import encode
from hyena_dist.data.variants import Variants, judge
from hyena_dist.model.config import hyena_config
from hyena_dist.model.model import HyenaModel
from hyena_dist.model.trained import Trained
from hyena_dist.tasks.score.observe import AROUND, SCORES, score_sites

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
