"""The formulas of operations and bytes: products as torch counts them, transforms as they are called."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.fft import next_fast_len
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baseline import BaselineHyenaDNA
from benchmarks.step import new_model
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.costs import flops as formulas
from hyena_dist.model.kinds.formulas import fft_flops
from hyena_dist.ops import implicit_filter
from hyena_dist.ops.long_conv import causal_conv

L, B = 60, 3
SECTION = ModelSection(num_layers=3, hidden_size=16, ffn_hidden_size=40, max_seq_len=L, hyena_order=3, filter_order=24,
                       filter_emb_dim=7, filter_num_inner_mlps=1, embed_dropout=0.0, num_attention_heads=2)
MIXED = ModelSection(**{**vars(SECTION), "layer_pattern": "HHA"})
PRODUCTS = ("projections", "filter", "mlp", "head")
CPU = torch.device("cpu")


def ids() -> torch.Tensor:
    return torch.randint(7, 11, (B, L), generator=torch.Generator().manual_seed(0))


def plain() -> BaselineHyenaDNA:
    layer = {"l_max": L, "emb_dim": 7, "filter_order": 24, "num_inner_mlps": 1, "order": 3, "w": 10}
    return BaselineHyenaDNA({"d_model": 16, "n_layer": 3, "d_inner": 40, "vocab_size": 12, "embed_dropout": 0.0,
                             "resid_dropout": 0.0, "pad_vocab_size_multiple": 8, "layer": layer})


def products_by_torch() -> dict[str, float]:
    """Of the plain model: torch counts no FFT and no depthwise convolution's parts that it does not know."""
    model = plain()
    with FlopCounterMode(display=False) as counter:
        model(ids())
    counted = {name: sum(by_operator.values()) for name, by_operator in counter.get_flop_counts().items()}

    def of(*suffixes: str) -> int:
        return sum(count for name, count in counted.items() if name.endswith(suffixes))

    return {"projections": of("in_proj", "out_proj"), "filter": of("implicit_filter"), "mlp": of(".mlp"),
            "head": of("lm_head")}


def differing(**misread: int) -> set[str]:
    """The parts of which the formulas are not what is counted, where the formulas, and not the model, read these keys
    of the configuration."""
    found = formulas.flops(replace(SECTION, **misread), L, B)
    wrong = {name for name, counted in products_by_torch().items() if found[name] != counted}
    for length in (64, 61):
        size = next_fast_len(length)
        convolution = transforms_called(length) * 5 * size * math.log2(size)
        if formulas.flops(replace(one_layer(length), **misread), length, B)["long_conv"] != convolution:
            wrong.add("long_conv")
    return wrong


def test_every_part_is_what_is_counted():
    assert differing() == set()


@pytest.mark.parametrize(("key", "read", "parts"), [
    ("hyena_order", 4, {"projections", "filter", "long_conv"}),
    ("filter_order", 16, {"filter"}),
    ("filter_num_inner_mlps", 0, {"filter"}),
    ("filter_emb_dim", 5, {"filter"}),
    ("ffn_hidden_size", 48, {"mlp"}),
    ("vocab_size", 17, {"head"}),
])
def test_control_a_formula_that_misreads_a_key_is_seen(key, read, parts):
    """In each part that depends on it, and in no other."""
    assert differing(**{key: read}) == parts


def test_our_model_has_the_products_of_the_formula():
    with FlopCounterMode(display=False) as counter:
        new_model(SECTION, CPU)(ids())
    found = formulas.flops(SECTION, L, B)
    assert counter.get_total_flops() == sum(found[name] for name in PRODUCTS)


def test_attention_counts_the_lower_triangle():
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        new_model(MIXED, CPU)(ids())
    found = formulas.flops(MIXED, L, B)
    whole_square = found["attention"] * 2 * L / (L + 1)
    assert counter.get_total_flops() == pytest.approx(sum(found[name] for name in PRODUCTS) + whole_square, rel=1e-12)
    assert found["filter"] == formulas.flops(SECTION, L, B)["filter"] * 2 / 3


def test_training_is_three_times_the_forward_pass():
    """But for the first layer of the filters, whose input has no gradient."""
    model = plain()
    with FlopCounterMode(display=False) as counter:
        model(ids()).sum().backward()
    by_operator = counter.get_flop_counts()["Global"]
    products = sum(count for operator, count in by_operator.items() if "conv" not in str(operator))
    found = formulas.flops(SECTION, L, B)
    no_gradient = SECTION.num_layers * 2 * L * SECTION.filter_emb_dim * SECTION.filter_order
    assert products == 3 * sum(found[name] for name in PRODUCTS) - no_gradient
    assert formulas.training_flops(SECTION, L, B) == 3 * sum(found.values())


def test_recomputation_adds_the_products_of_the_formula(monkeypatch):
    uncounted = {name: formulas.flops(MIXED, L, B)[name] for name in ("short_conv", "long_conv", "attention")}
    counted, repeated = {}, {}
    for kept_lags in (L, L - 1):
        monkeypatch.setattr(implicit_filter, "KEPT_LAGS", kept_lags)
        for value in ("none", "selective", "block", "full"):
            with FlopCounterMode(display=False) as counter:
                new_model(MIXED, CPU, value)(ids()).sum().backward()
            counted[kept_lags, value] = counter.get_total_flops()
            repeated[kept_lags, value] = formulas.recomputed_flops(MIXED, L, B, value)
    assert repeated[L, "none"] == 0 < repeated[L - 1, "none"]
    for (kept_lags, value), found in counted.items():
        whole_blocks = value in ("block", "full")
        expected = repeated[kept_lags, value] - whole_blocks * sum(uncounted.values())
        assert found - counted[L, "none"] == expected, (kept_lags, value)
    by_value = [found for (kept_lags, _), found in counted.items() if kept_lags == L]
    assert by_value == sorted(set(by_value))


class Transforms(TorchDispatchMode):
    """Counts the points of complex FFTs."""

    points = 0

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._fft_c2c.default:
            self.points += result.numel()
        return result


def one_layer(length: int) -> ModelSection:
    return ModelSection(num_layers=1, hidden_size=16, max_seq_len=length)


def transforms_called(length: int) -> float:
    """Complex FFTs of the fast length that the convolution of one layer calls, of B sequences."""
    u = torch.randn(B, 16, length)
    with Transforms() as counter:
        causal_conv(u, torch.randn(16, length), torch.randn(16), u, method="right_angle")
    return counter.points / next_fast_len(length)


@pytest.mark.parametrize("length", [64, 61])
def test_transforms_are_those_of_the_convolution(length):
    assert transforms_called(length) == 16 * (2 * B + 1)
    assert fft_flops(1024) == 5 * 1024 * 10


def test_bytes_by_hand():
    """Forward: inputs read, outputs written. Training adds the inputs and the outputs' gradients read again, and the
    inputs' gradients written."""
    part = formulas.parts(SECTION, L, B)["head"]
    x, weight, y = B * L * 16, 16 * 16, B * L * 16
    assert formulas.training_bytes(part, 2) == 2 * (x + weight + y + (x + weight) + y + (x + weight))


def test_peaks_are_found_by_the_names_that_cuda_gives():
    for name, peak in {"NVIDIA H200": 989.5, "NVIDIA H100 80GB HBM3": 989.5, "NVIDIA H100 PCIe": 756.5,
                       "NVIDIA H100 NVL": 835.5, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A100 80GB PCIe": 312}.items():
        assert formulas.peak_flops(name, "bf16") == formulas.peak_flops(name, "fp16") == peak * 1e12, name
    assert formulas.peak_flops("NVIDIA A100-SXM4-40GB", "fp32") == 19.5e12
    for unknown in ("AMD EPYC", "NVIDIA GH200 480GB", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA RTX A1000"):
        assert formulas.peak_flops(unknown, "bf16") is None, unknown


def test_utilisation_is_model_operations_over_the_peak():
    per_token = formulas.training_flops(SECTION, L, B) / (B * L)
    assert formulas.mfu(SECTION, L, tokens_per_second=10.0, peak=40 * per_token, micro_batch_size=B) == 0.25
