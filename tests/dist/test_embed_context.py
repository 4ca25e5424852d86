"""Ranks that share each sequence embed it as one rank does; ranks that share the sequences write the file of one."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hyena_dist.config.errors import ConfigError
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.convert.trained import load_trained
from hyena_dist.data.tokenizer import A, T
from hyena_dist.model.config import hyena_config
from hyena_dist.model.model import HyenaModel
from hyena_dist.model.trained import Trained
from hyena_dist.parallel.groups import Groups, init_groups
from hyena_dist.tasks.embed import embeddings
from hyena_dist.tasks.embed.embeddings import Request, write_embeddings
from hyena_dist.tasks.embed.inputs import Records
from hyena_dist.tasks.embed.states import embed
from tests.compare import rel
from tests.dist.harness import run_distributed
from tests.unit.test_generate import save

TOLERANCE = 2e-5  # a token that its slice's neighbour has, and nobody counts, moves a mean of 100 by 1e-2


def means(length: int, width: int, bins: list[int | None], ranks: int) -> list[np.ndarray]:
    """Of one long sequence, of a short one that is on the first rank alone, and of two of one forward pass."""
    section = ModelSection(num_layers=2, hidden_size=width, max_seq_len=length)
    trained = Trained(section, HyenaModel(hyena_config(section), seed=1).eval(), Path("model"), length)
    if ranks > 1:
        trained = trained.to("cpu", "fp32", init_groups(context=ranks))
    draw = np.random.default_rng(0)
    sequences = [draw.integers(A, T + 1, size).astype(np.uint8) for size in (length, 50, 49)]
    return [rows for bin in bins for layer in (None, 1) for rows in embed(trained, sequences, bin, layer)]


def compared(length: int, width: int, bins: list[int | None], ranks: int) -> None:
    one = means(length, width, bins, 1)
    several = run_distributed(means, ranks, length, width, bins, ranks, timeout=3000.0)
    errors = [rel(found, wanted) for found, wanted in zip(several[0], one, strict=True)]
    print(f"{ranks} context ranks, {length:,} bases: largest error {max(errors):.1e}, tolerance {TOLERANCE}")
    assert max(errors) < TOLERANCE
    assert all(np.array_equal(a, b) for other in several[1:] for a, b in zip(other, several[0], strict=True))
    assert rel(one[0], one[3]) > 1e-3, "control: the layers differ"


def test_context_ranks_embed_as_one_rank() -> None:
    compared(1000, 16, [None, 1, 48], 2)


@pytest.mark.slow
def test_four_context_ranks_embed_a_million_bases_as_one_rank() -> None:
    compared(2**20, 64, [None, 4096], 4)


def write(model: str, fasta: str, out: str, context: int) -> None:
    embeddings.CHUNK_BASES = 150
    groups = init_groups(context=context) if context else Groups.single()
    trained = load_trained(model).to("cpu", "fp32", groups)
    write_embeddings(trained, Request(Records(Path(fasta)), Path(out), "some.fa", 16), groups)


def test_ranks_write_the_file_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "CHUNK_BASES", 150)
    model, fasta = str(save(tmp_path / "model")), tmp_path / "some.fa"
    draw = np.random.default_rng(1)
    fasta.write_text("".join(f">s{size}\n{''.join(draw.choice(list('ACGT'), size))}\n" for size in range(5, 200, 13)))
    write(model, str(fasta), f"{tmp_path}/one.npy", 0)
    save(tmp_path / "other", num_layers=1)
    (tmp_path / "other.fa").write_text(fasta.read_text("utf-8").replace("A", "C", 1), encoding="utf-8")
    first, second = run_distributed(write_both, 2, model, str(fasta), str(tmp_path))
    for name in ("npy", "npy.tsv"):
        assert (tmp_path / f"data.{name}").read_bytes() == (tmp_path / f"one.{name}").read_bytes()
    assert rel(torch.from_numpy(np.load(tmp_path / "context.npy")), np.load(tmp_path / "one.npy")) < TOLERANCE
    assert "##hyena_dist.context=2\n" in (tmp_path / "context.npy.tsv").read_text()
    assert first == second, "what one rank reads otherwise all refuse"
    assert f'the ranks differ: model is "{model}" on rank 0' in first[0]
    assert f'"{tmp_path}/other" on rank 1' in first[0]
    assert "; weights_sha256 is " in first[0]
    assert "; sequences_sha256 is " in first[1]
    assert not list(tmp_path.glob("refused*"))


def write_both(model: str, fasta: str, folder: str) -> list[str]:
    """And what is said where the second rank reads another model, or other sequences."""
    for name, context in (("data", 1), ("context", 2)):
        write(model, fasta, f"{folder}/{name}.npy", context)
    other, refused = dist.get_rank() == 1, []
    for source, file in ((f"{folder}/other", fasta), (model, f"{folder}/other.fa")):
        with pytest.raises(ConfigError) as caught:
            write(source if other else model, file if other else fasta, f"{folder}/refused.npy", 1)
        refused.append(str(caught.value))
    return refused
