"""Models of k-mers: what they learn, how they are scored and kept, and who must not read them."""

import json
import math
from itertools import islice
from pathlib import Path

import pytest
import torch

from hyena_dist.checkpoint.directory import step_directory
from hyena_dist.checkpoint.format import save_checkpoint
from hyena_dist.cli import convert
from hyena_dist.cli.evaluate import main as evaluate_main
from hyena_dist.config.identity import identity
from hyena_dist.config.load import dump_config, load_config
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.convert import read_model, to_published
from hyena_dist.convert.section import ConversionError
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.splits import FractionSplits
from hyena_dist.data.stream import TrainStream
from hyena_dist.data.tokenizer import Tokenizer, decode, tokenizer_of
from hyena_dist.model.kinds import check
from hyena_dist.model.loss import token_loss
from hyena_dist.model.model import HyenaModel, build_model
from hyena_dist.parallel.groups import Groups
from hyena_dist.tasks.evaluate import load_run, rows_per_batch
from hyena_dist.tasks.sweep.expand import expand
from hyena_dist.tasks.sweep.file import read_sweep
from hyena_dist.tasks.sweep.point import learnt
from tests.dist.test_checkpoint import DictEngine
from tests.genomes import shards

L = 24
PERIOD = b"ACGTTGCAGGATC"  # 13 bases: no frame of 3-mers repeats before 39
KINDS = {"3": {"kmer": 3}, "3o": {"kmer": 3, "kmer_overlap": True}}


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory) -> Path:
    """The directory of a run that has learnt a sequence that repeats."""
    directory = tmp_path_factory.mktemp("run")
    manifest = shards(directory, {"a": PERIOD * 150}, FractionSplits(0.2))
    section = ModelSection(num_layers=1, hidden_size=32, filter_order=8, max_seq_len=L, embed_dropout=0.0,
                           **KINDS[request.param])
    config = Config(model=section, data=DataSection(shards=str(directory / "shards"), seq_len=L),
                    train=TrainSection(run_dir=str(directory / "run")))
    model = build_model(config, Groups.single())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    stream = TrainStream(manifest, seq_len=L, seed=0, tokenizer=tokenizer_of(section))
    batches = stream.batches(stream.start(), micro_batch_size=8, global_batch_size=8)
    for batch in islice(batches, 60):
        inputs, targets, _ = batch.to(torch.device("cpu"))
        total, _ = token_loss(model(inputs), targets)
        optimizer.zero_grad()
        (total / batch.scored).backward()
        optimizer.step()
    engine = DictEngine({name: {"weight": weight.detach(), "exp_avg": torch.zeros_like(weight),
                                "exp_avg_sq": torch.zeros_like(weight)} for name, weight in model.named_parameters()})
    save_checkpoint(step_directory(directory / "run" / "checkpoints", 60), engine, model.placement(), Groups.single(),
                    {"step": 60, "val_loss": 1.0, "identity": identity(config)})
    (directory / "run" / "config.yaml").write_text(dump_config(config))
    return directory / "run"


def perplexity_by_hand(model: HyenaModel, section: ModelSection, bases: bytes) -> float:
    """Per base, a token at a time: its windows begin at the same tokens as those of a validation."""
    tokenizer = tokenizer_of(section)
    ids, total, told = torch.tensor(tokenizer.encode(bases).tolist()), 0.0, 0
    for first in range(0, len(ids) - 1, L):
        window = ids[first : first + L + 1]
        with torch.no_grad():
            scores = torch.log_softmax(model(window[None, :-1])[0].double(), -1)
        total -= sum(scores[place, target].item() for place, target in enumerate(window[1:].tolist()))
        told += tokenizer.stride * (len(window) - 1)
    return math.exp(total / told)


def test_a_model_learns_what_repeats_and_is_scored_per_base(run, capsys):
    assert evaluate_main([str(run)]) == 0
    assert "perplexity per base" in capsys.readouterr().out
    found = json.loads((run / "evaluation.json").read_text())
    config, model, _ = load_run(run)
    manifest = Manifest.load(config.data.shards)
    (interval,) = manifest.intervals("val")
    bases = decode(manifest.read(interval.contig, interval.start, interval.end)).encode()
    by_hand = perplexity_by_hand(model, config.model, bases)
    assert found["model"] == pytest.approx(by_hand, rel=1e-5)
    assert found["model"] < 1.15 < found["markov"][1] < found["markov"][0]
    assert perplexity_by_hand(model, config.model, bases[::-1]) > 3, "the control: a sequence that it has not learnt"


@pytest.mark.parametrize(("k", "seq_len", "rows"), [(1, 1024, 32), (3, 1024, 32), (6, 64, 127), (6, 1024, 7),
                                                    (8, 64, 7), (8, 1024, 1), (1, 10**6, 1)])
def test_large_vocabularies_are_scored_in_smaller_batches(k, seq_len, rows):
    """The logits of 32,768 tokens of 8-mers would be 8.6 GB, and the loss holds three times as much."""
    section = ModelSection(kmer=k)
    assert rows_per_batch(section, seq_len) == rows
    assert rows == 1 or rows * seq_len * section.padded_vocab_size <= 2**25


def test_the_study_compares_at_equal_bases():
    points = expand(read_sweep(Path(__file__).parents[2] / "configs" / "studies" / "kmers.yaml"))
    tokenizers = [tokenizer_of(point.config.model) for point in points]
    kinds = [Tokenizer(), Tokenizer(3), Tokenizer(6), Tokenizer(3, overlap=True)]
    assert tokenizers == [kind for kind in kinds for _ in range(2)], "each with two seeds"
    for point, tokenizer in zip(points, tokenizers, strict=True):
        config = point.config
        check(config, world_size=1)
        assert (config.data.seq_len * tokenizer.stride, config.train.global_batch_size, config.train.steps) == (
            1536, 4, 400)
        assert ("model.kmer" in learnt(config, data="")) == (tokenizer.k > 1), "ids of points of single bases stay"


@pytest.mark.parametrize("format", ["safetensors", "checkpoint"])
def test_the_tokens_travel_with_the_model(run, tmp_path, format):
    section = load_config(run / "config.yaml").model
    assert convert.main([str(run), str(tmp_path / "kept"), "--to", format]) == 0
    found, model, _ = read_model(tmp_path / "kept")
    assert tokenizer_of(found) == tokenizer_of(section) != tokenizer_of(ModelSection())
    assert (model.config.kmer, model.config.kmer_overlap) == (section.kmer, section.kmer_overlap)


@pytest.mark.parametrize("format", ["published", "huggingface"])
def test_others_are_not_given_ids_that_they_would_read_as_bases(run, tmp_path, capsys, format):
    assert convert.main([str(run), str(tmp_path / "kept"), "--to", format]) == 2
    assert "the tokens of this model are 3-mers" in capsys.readouterr().err
    assert not (tmp_path / "kept").exists()
    with pytest.raises(ConversionError, match="model.kmer"):
        to_published(load_run(run)[1])
