"""The formula of a training step's memory against the peak that is measured."""

import pytest
import torch

from benchmarks.memory import peak_tensor_bytes
from benchmarks.models import autocast
from benchmarks.step import new_model
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.costs import memory as costs
from hyena_dist.costs.engines import parameters
from hyena_dist.costs.memory import training_memory
from hyena_dist.model.kinds import hyena
from hyena_dist.model.loss import token_loss
from hyena_dist.ops import chunking
from hyena_dist.ops.triton import plans

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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_of_kmers_is_most_of_a_step(precision):
    model = section(num_layers=1, kmer=6)
    found, memory = measured(model, 512, 1, precision, "none"), training_memory(model, 512, precision=precision,
                                                                                 device="cpu")
    assert memory.saved + memory.working == pytest.approx(found, rel=TOLERANCE)
    logits = 4 * 512 * model.padded_vocab_size
    assert 2 * logits < (1 - TOLERANCE) * found, "the control: two tensors of logits would be too few"


@pytest.mark.parametrize(("pattern", "tied"), [("H", True), ("HA", True), ("H", False)])
def test_states_are_those_of_every_weight(pattern, tied):
    model = section(hyena_order=3, filter_num_inner_mlps=1, filter_emb_dim=7, layer_pattern=pattern,
                    tie_embeddings=tied)
    weights = sum(weight.numel() for weight in new_model(model, CPU).parameters())
    assert parameters(model) == weights
    assert training_memory(model, 1024).states == 16 * weights


@pytest.fixture
def _as_on_that_day(monkeypatch):
    """When the H100 was measured, products had smaller chunks, and the kernels smaller groups with more spectra."""
    monkeypatch.setattr(chunking, "MOST_PRODUCT_CHUNKS", 2**30)
    monkeypatch.setattr(plans, "GROUP_ELEMENTS", 2**25)
    monkeypatch.setattr(hyena, "KERNELS_FILTER", (20, 20))
    costs._activations.cache_clear()
    yield
    costs._activations.cache_clear()


@pytest.mark.parametrize(("model", "seq_len", "batch", "recompute", "peak"), [
    ("4x256", 131072, 1, "none", 4680478208), ("4x256", 131072, 1, "selective", 3001427456),
    ("4x256", 131072, 1, "block", 2465885696), ("4x256", 131072, 1, "full", 2196121088),
    ("2x256", 32768, 4, "none", 2936427008), ("2x128 HA", 65536, 1, "none", 1012268544),
    ("8x256", 2**20, 1, "none", 54.93 * 2**30), ("8x256", 2**20, 1, "selective", 28.43 * 2**30),
    ("8x256", 2**20, 1, "full", 14.43 * 2**30), ("4x256", 131072, 1, "offload", 1.93 * 2**30),
])
@pytest.mark.usefixtures("_as_on_that_day")
def test_formula_gives_what_an_h100_measured(model, seq_len, batch, recompute, peak):
    """Peaks of steps in bfloat16 on 2026-11-26, with Triton's kernels of the operator (`benchmarks/results`)."""
    size, _, pattern = model.partition(" ")
    layers, width = map(int, size.split("x"))
    built = section(num_layers=layers, hidden_size=width, max_seq_len=seq_len, layer_pattern=pattern,
                    num_attention_heads=width // 32)
    offload = recompute == "offload"
    found = training_memory(built, seq_len, batch, precision="bf16", activation_offload=offload,
                            activation_checkpointing="none" if offload else recompute)
    assert found.total == pytest.approx(peak, rel=TOLERANCE)
