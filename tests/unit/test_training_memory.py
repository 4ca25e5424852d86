"""The formula of a training step's memory against the peak that is measured."""

import pytest
import torch

from benchmarks.memory import peak_tensor_bytes
from benchmarks.models import autocast
from benchmarks.step import new_model
from hyena_dist.config.schema import ModelSection
from hyena_dist.model.loss import token_loss
from hyena_dist.scaling.memory import longest_sequence, parameters, training_memory

TOLERANCE = 0.1
CPU = torch.device("cpu")
RECOMPUTATION = ("none", "selective", "block", "full")
GB = 1e9


def section(**values) -> ModelSection:
    return ModelSection(**{"num_layers": 4, "hidden_size": 32, "max_seq_len": 8192, "embed_dropout": 0.0, **values})


def measured(model: ModelSection, seq_len: int, batch: int, precision: str, recompute: str) -> int:
    """Peak of the tensors that a forward and backward pass makes; gradients are there before."""
    built = new_model(model, CPU, recompute)
    for weight in built.parameters():
        weight.grad = torch.zeros_like(weight)
    ids = torch.randint(7, 11, (batch, seq_len))
    with peak_tensor_bytes() as peak:
        with autocast(CPU, precision):
            logits = built(ids)
        total, count = token_loss(logits, ids)
        del logits
        (total / count).backward()
    return peak.bytes


@pytest.mark.parametrize(("model", "seq_len", "batch", "precision"), [
    (section(), 8192, 1, "fp32"),
    (section(num_layers=2, ffn_hidden_size=64), 4096, 3, "bf16"),
    (section(num_layers=2, hyena_order=3), 4096, 2, "fp32"),
    (section(hidden_size=64, layer_pattern="HA", num_attention_heads=2), 2048, 2, "fp32"),
])
def test_formula_gives_the_measured_peak(model, seq_len, batch, precision):
    for recompute in RECOMPUTATION:
        found = measured(model, seq_len, batch, precision, recompute)
        memory = training_memory(model, seq_len, batch, precision=precision, activation_checkpointing=recompute,
                                 device="cpu")
        assert memory.saved + memory.working == pytest.approx(found, rel=TOLERANCE), recompute
    without = training_memory(model, seq_len, batch, precision=precision, device="cpu")
    assert without.saved + without.working > (1 + TOLERANCE) * found, "the control: recomputation is not forgotten"


@pytest.mark.parametrize("pattern", ["H", "HA"])
def test_states_are_those_of_every_weight(pattern):
    model = section(hyena_order=3, filter_num_inner_mlps=1, filter_emb_dim=7, layer_pattern=pattern)
    weights = sum(weight.numel() for weight in new_model(model, CPU).parameters())
    assert parameters(model) == weights
    assert training_memory(model, 1024).states == 16 * weights


def test_longest_sequence_is_the_last_that_fits():
    model = section(num_layers=8, hidden_size=256)
    for recompute in RECOMPUTATION:
        longest = longest_sequence(model, 24 * GB, activation_checkpointing=recompute)
        assert longest % 1024 == 0
        fits, exceeds = (training_memory(model, length, activation_checkpointing=recompute).total
                         for length in (longest, longest + 1024))
        assert fits <= 24 * GB < exceeds
    assert longest_sequence(model, 1e6) == 0
