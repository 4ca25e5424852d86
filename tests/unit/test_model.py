"""The model by itself: limits, initial values, placement, recomputation, and its place in Megatron."""

import pytest
import torch
from megatron.core.transformer.spec_utils import ModuleSpec, build_module

from benchmarks.memory import peak_tensor_bytes
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.model.block import mixer_spec
from hyena_dist.model.config import hyena_config
from hyena_dist.model.loss import token_loss
from hyena_dist.model.mixer import HyenaMixer
from hyena_dist.model.model import build_model
from hyena_dist.model.offload import HostStore, on_host
from hyena_dist.model.table import placement_table
from hyena_dist.ops import chunking, implicit_filter
from hyena_dist.ops.dropout import DropoutKey
from hyena_dist.parallel.groups import Groups
from tests.compare import rel

SMALL = dict(num_layers=2, hidden_size=16, max_seq_len=64, filter_order=8, embed_dropout=0.0)


RECOMPUTATION = ("none", "selective", "block", "full")


def small_model(seed=0, precision="fp32", checkpointing="none", offload=False, **model):
    return build_model(Config(model=ModelSection(**{**SMALL, **model}),
                              train=TrainSection(run_dir="r", seed=seed, precision=precision,
                                                 activation_checkpointing=checkpointing, activation_offload=offload)),
                       Groups.single())


def tokens(batch=2, length=64, seed=0):
    return torch.randint(7, 11, (batch, length), generator=torch.Generator().manual_seed(seed))


def key(step=0):
    return DropoutKey(1, step, torch.tensor([3, 4]))


def test_published_size():
    model = build_model(Config(model=ModelSection(num_layers=2, hidden_size=128)), Groups.single())
    assert sum(parameter.numel() for parameter in model.parameters()) == 436_096


def test_refuses_a_longer_input_before_computing():
    with pytest.raises(ValueError, match=r"65 tokens.* max_seq_len = 64"):
        small_model()(tokens(length=65))


@pytest.mark.parametrize("order", [2, 3])
def test_causal(order):
    model = small_model(hyena_order=order).double()
    x = tokens()
    other = x.clone()
    other[:, 40] = 7 + (x[:, 40] - 6) % 4
    difference = (model(x) - model(other)).abs().amax((0, 2))
    assert difference[:40].max() < 1e-14
    assert difference[40:].min() > 1e-7


def test_initial_values_are_a_function_of_seed_and_name():
    first, again, other, deeper = (dict(m.named_parameters()) for m in (
        small_model(), small_model(), small_model(seed=1), small_model(num_layers=3)))
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "layers.0.mixer.in_proj.weight"
    assert not torch.equal(first[name], other[name])
    assert torch.equal(first[name], deeper[name])
    assert not torch.equal(first[name], first["layers.1.mixer.in_proj.weight"])


def test_initial_values_are_as_published():
    model = small_model(hidden_size=256, num_layers=2)
    weights = dict(model.named_parameters())
    expected = {"embedding.word_embeddings.weight": 0.02, "layers.0.mixer.in_proj.weight": 0.02,
                "layers.0.mixer.out_proj.weight": 0.01, "layers.1.mlp.fc1.weight": 0.02,
                "layers.1.mlp.fc2.weight": 0.01, "layers.0.mixer.conv_bias": 1.0,
                "layers.0.mixer.short_conv.weight": 1 / 3, "layers.0.mixer.filter.last_weight": 0.02}
    for name, std in expected.items():
        assert weights[name].std().item() == pytest.approx(std, rel=0.15), name
    assert (weights["layers.0.mixer.filter.freq"] == 10).all()
    assert (weights["layers.0.input_norm.weight"] == 1).all()
    zero = [name for name, weight in weights.items() if (weight == 0).all()]
    assert len(zero) == 1 + 2 * (2 + 4 + 3), zero  # norms', linears' and trunks' biases


def test_placement_covers_every_parameter_once():
    model = small_model(hyena_order=3)
    table = model.placement()
    assert table.keys() == {name for name, _ in model.named_parameters()}
    assert table["layers.1.mixer.in_proj.weight"].parts == ("x0", "x1", "x2", "v")
    undecayed = {name for name, placement in table.items() if not placement.weight_decay}
    assert undecayed == {name for name in table if ".filter." in name}
    with pytest.raises(ValueError, match="unknown.weight must match one"):
        placement_table([*table, "unknown.weight"], model.config)
    with pytest.raises(ValueError, match="without a parameter"):
        placement_table([name for name in table if "fc2" not in name], model.config)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("pattern", ["H", "HA"])
def test_recomputation_and_offload_change_no_bit(precision, pattern):
    results = {}
    for value in RECOMPUTATION:
        for offload in (False, True):
            model = small_model(precision=precision, checkpointing=value, offload=offload, embed_dropout=0.2,
                                resid_dropout=0.3, layer_pattern=pattern, num_attention_heads=4)
            loss, _ = token_loss(model(tokens(), key()), tokens(seed=1))
            loss.backward()
            results[value, offload] = {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}
    plain = results["none", False]
    for case, found in results.items():
        assert found.keys() == plain.keys(), case
        assert all(torch.equal(found[name], plain[name]) for name in plain), case
    other, _ = token_loss(model(tokens(), key(step=1)), tokens(seed=1))
    assert other != plain["loss"], "the control: another dropout mask is another loss"


@pytest.mark.slow
def test_recomputation_saves_the_memory_that_it_promises(monkeypatch):
    """The shares of `none` that 8 x 256 channels at 32768 tokens keep to, here everything is smaller in proportion."""
    monkeypatch.setattr(chunking, "CHUNK_ELEMENTS", 2**16)
    monkeypatch.setattr(implicit_filter, "LAGS_PER_CHUNK", 1024)
    monkeypatch.setattr(implicit_filter, "KEPT_LAGS", 0)  # a trunk's width is not in proportion
    peaks = {}
    for value in RECOMPUTATION:
        model = small_model(checkpointing=value, num_layers=8, hidden_size=32, max_seq_len=8192)
        ids = tokens(1, 8192)
        with peak_tensor_bytes() as peak:
            token_loss(model(ids), ids)[0].backward()
        peaks[value] = peak.bytes
    shares = {value: peak / peaks["none"] for value, peak in peaks.items()}
    print(", ".join(f"{value} {share:.2f}" for value, share in shares.items()), "limits: selective 0.5, full 0.25")
    assert shares["selective"] <= 0.5
    assert shares["full"] <= 0.25
    assert shares["full"] < shares["block"] < 1


@pytest.mark.parametrize("frozen", [False, True])
def test_offloaded_tensors_leave_the_device(frozen):
    """What autograd holds is a copy; weights stay, frozen ones too."""
    weight, x = torch.nn.Parameter(torch.ones(3), requires_grad=not frozen), torch.ones(3, requires_grad=True)
    hidden = x.exp()
    with on_host():
        y = hidden * weight
    assert y.grad_fn._saved_other.data_ptr() == weight.data_ptr()
    if frozen:
        assert y.grad_fn._saved_self is None, "nothing of it would be used"
        return
    saved = y.grad_fn._saved_self
    assert torch.equal(saved, hidden)
    assert saved.data_ptr() != hidden.data_ptr()


def test_dropout_is_a_function_of_its_key_and_ends_with_eval():
    model = small_model(embed_dropout=0.2)
    assert not torch.equal(model(tokens(), key(0)), model(tokens(), key(1)))
    assert torch.equal(model(tokens(), key(0)), model(tokens(), key(0)))
    assert torch.equal(model.eval()(tokens()), model(tokens(), key(0)))


def test_bf16_lowers_the_products_and_not_the_filter():
    model = small_model(precision="bf16")
    seen = []
    model.layers[0].mixer.filter.register_forward_hook(lambda _m, _i, h: seen.append(h))
    logits = model(tokens())
    assert logits.dtype == torch.bfloat16
    assert torch.equal(seen[0], small_model().layers[0].mixer.filter([slice(0, 64)]))
    assert rel(logits, small_model()(tokens())) < 0.05
    loss, _ = token_loss(logits, tokens(seed=1))
    assert loss.dtype == torch.float32


def test_loss_scores_only_the_targets_that_count():
    logits = torch.randn(2, 5, 16, dtype=torch.float64)
    targets = torch.tensor([[7, -100, 8, -100, 9], [-100] * 5])
    total, count = token_loss(logits, targets)
    expected = -sum(logits[0, t].log_softmax(-1)[targets[0, t]] for t in (0, 2, 4))
    assert count == 3
    assert rel(total, expected) < 1e-14


class _TakesSelfAttention(torch.nn.Module):
    """Builds and calls its `self_attention` with the arguments with which Megatron's TransformerLayer does."""

    def __init__(self, config, submodules):
        super().__init__()
        self.self_attention = build_module(submodules, config=config, layer_number=1, pg_collection=None)

    def forward(self, hidden_states):
        nothing = dict.fromkeys(("attention_mask", "inference_context", "rotary_pos_emb", "rotary_pos_cos",
                                 "rotary_pos_sin", "rotary_pos_cos_sin", "attention_bias", "packed_seq_params",
                                 "sequence_len_offset"))
        return self.self_attention(hidden_states, **nothing)


def test_mixer_stands_where_megatron_expects_self_attention():
    config = hyena_config(ModelSection(**SMALL))
    layer = build_module(ModuleSpec(module=_TakesSelfAttention, submodules=mixer_spec("H")), config=config)
    assert isinstance(layer.self_attention, HyenaMixer)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    output, bias = layer(torch.randn(64, 2, 16))
    assert output.shape == (64, 2, 16)
    assert bias is None
    with pytest.raises(ValueError, match="takes no attention_mask"):
        layer.self_attention(torch.randn(64, 2, 16), attention_mask=torch.ones(1))


def test_what_goes_to_the_host_goes_once_and_comes_back_before_it_is_needed():
    """Views of one storage share a copy; a storage that was written over has another."""
    store = HostStore()
    base = torch.arange(24.0).view(4, 6)
    rows, columns, other = store.pack(base[1:3]), store.pack(base.t()[::2]), store.pack(torch.ones(3))
    base.add_(100)
    after = store.pack(base[0])
    weight = torch.nn.Parameter(torch.ones(2))
    assert store.pack(weight) is weight
    assert [saved.place for saved in (rows, columns, other, after)] == [0, 0, 1, 2]
    assert torch.equal(store.unpack(after), torch.arange(6.0) + 100)
    assert [copy._fetched is not None for copy in store.copies] == [True, True, False], "two are on the way"
    assert torch.equal(store.unpack(other), torch.ones(3))
    assert torch.equal(store.unpack(columns), torch.arange(24.0).view(4, 6).t()[::2])
    assert torch.equal(store.unpack(rows), torch.arange(24.0).view(4, 6)[1:3])


def test_what_is_kept_between_calls_serves_training_after_inference():
    """A tensor that is made in inference mode cannot be saved for a backward pass; the control is one."""
    ids = tokens()
    section = dict(filter_emb_dim=9, max_seq_len=64)  # of no other test: nothing is kept yet
    with torch.inference_mode():
        small_model(**section).eval()(ids)
    token_loss(small_model(**section)(ids), ids)[0].backward()
    with torch.inference_mode():
        made = torch.ones(2)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        torch.ones(2, requires_grad=True) * made
