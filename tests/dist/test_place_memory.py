"""The memory of learning numbers for the bins of very long sequences: what the head adds to its backbone, and a million
bases on four context ranks."""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from benchmarks.memory import peak_tensor_bytes
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.finetune import FinetuneSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.optim import OptimSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.data.labelled import Labelled, read_labelled
from hyena_dist.model.headed import HeadedModel
from hyena_dist.parallel.groups import Groups, init_groups
from hyena_dist.runtime.memory import peak_memory_bytes
from hyena_dist.tasks.finetune import finetune
from hyena_dist.train.finetuning import Finetuning
from tests.dist.harness import run_distributed

WIDTH, BIN_SIZE, TRACKS, GIB = 128, 128, 8, 2**30
MILLION, RANKS, MOST = 2**20, 4, 24 * GIB
"""Bytes that all ranks together may hold of a model of two layers."""
STREAM = 4
"""Bytes of a channel of a base in a hidden state; a million bases may hold 48 of them."""


def table(directory: Path, length: int) -> None:
    """A sequence and its numbers for each split."""
    rng = np.random.default_rng(0)
    directory.mkdir()
    for name in ("train", "dev", "test"):
        (directory / f"{name}.csv").write_text("sequence\n" + "".join(rng.choice(list("ACGT"), length)) + "\n")
        np.save(directory / f"{name}.npy", rng.random((1, length // BIN_SIZE, TRACKS)).astype(np.float32))


def config_of(directory: Path, length: int, width: int, *, ranks: int = 1, recompute: str = "none") -> Config:
    return Config(
        model=ModelSection(num_layers=2, hidden_size=width, max_seq_len=length, embed_dropout=0.0),
        data=DataSection(shards="none", seq_len=length), optim=OptimSection(warmup_steps=1),
        train=TrainSection(run_dir=str(directory / "run"), steps=1, micro_batch_size=1, global_batch_size=1,
                           eval_every=1, save_every=0, activation_checkpointing=recompute),
        parallel=ParallelSection(context=ranks),
        finetune=FinetuneSection(table=str(directory / "table"), task="binned", bin_size=BIN_SIZE, baselines=""))


def read(config: Config) -> Labelled:
    return read_labelled(config.finetune, seed=0, most=config.model.max_seq_len)


def _peak(config: Config, *, headed: bool = True) -> int:
    """Bytes of the tensors of a step, with the loss of its bins or with the sum of all hidden states."""
    task = Finetuning(config, Groups.single(), torch.device("cpu"), labelled=read(config), weights=None)
    batch, = task.next_step().batches
    with peak_tensor_bytes() as peak:
        if headed:
            task.loss(task.module, batch, 0).backward()
        else:
            task.module.hidden(batch.ids, None).sum().backward()  # type: ignore[operator]
    return peak.bytes


def test_a_head_of_bins_holds_next_to_nothing_beside_its_backbone(tmp_path: Path) -> None:
    length, width = 2**14, 64
    table(tmp_path / "table", length)
    config, plain = config_of(tmp_path, length, width), HeadedModel.hidden
    alone, whole = _peak(config, headed=False), _peak(config)
    with patch.object(HeadedModel, "hidden", lambda *args: torch.nn.functional.gelu(plain(*args))):
        wasteful = _peak(config)
    stream = STREAM * length * width
    print(f"in hidden states: {alone / stream:.2f} without a head, {whole / stream:.2f} with it, "
          f"{wasteful / stream:.2f} where it keeps its input")
    assert whole < MOST * (length * width) / (MILLION * WIDTH)
    assert whole - alone < 0.5 * stream < wasteful - whole, "the control: a hidden state that is kept is seen"


def _million(directory: Path, recompute: str) -> tuple[int, int]:
    """A run of one step, its validation and the judgement of the test sequence: bytes of this rank's tensors at their
    peak, and of its process with all libraries."""
    config, groups = config_of(directory, MILLION, WIDTH, ranks=RANKS, recompute=recompute), init_groups(context=RANKS)
    with peak_tensor_bytes() as peak:
        finetune(config, groups, torch.device("cpu"), weights=None, read=lambda _: read(config))
    return peak.bytes, peak_memory_bytes(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_step_over_a_million_bases_fits_into_memory(tmp_path: Path) -> None:
    """Recomputed, as such lengths are trained; without that it was 13.6 GiB of tensors and 15.5 GiB in all."""
    table(tmp_path / "table", MILLION)
    tensors, resident = map(sum, zip(*run_distributed(_million, RANKS, tmp_path, "full", timeout=3000.0), strict=True))
    print(f"summed over the ranks: tensors {tensors / GIB:.1f} GiB, processes {resident / GIB:.1f} GiB")
    assert (tmp_path / "run" / "result.json").is_file()
    assert RANKS * STREAM * MILLION // RANKS * WIDTH < tensors < resident < MOST, "the control: both count bytes"
