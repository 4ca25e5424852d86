"""The frozen baseline is the published model, and its loop the published recipe."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.baseline import IGNORED_TARGET, BaselineHyenaDNA, parameter_groups, plain_training_loop

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-9  # rounding is 5e-15; not scoring N moves the loss by 2e-4, another filter shift the logits by 8e-2


def rel(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def config_of(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def golden_of(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def published_weights(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {key.removeprefix("weight/"): value for key, value in golden.items() if key.startswith("weight/")}
    return weights | {"lm_head.weight": weights["backbone.embeddings.word_embeddings.weight"]}


def golden_model(name: str, golden: dict[str, Tensor], **kwargs: float) -> BaselineHyenaDNA:
    model = BaselineHyenaDNA(config_of(name), **kwargs)
    model.load_state_dict(published_weights(golden))
    return model.double().eval()


@pytest.mark.parametrize("name", ["tiny", "wide"])
def test_reproduces_published_values_and_gradients(name: str) -> None:
    golden = golden_of(name)
    model = golden_model(name, golden)
    input_ids = golden["input_ids"].long()
    hidden = model.backbone(input_ids[:, :-1])
    logits = model(input_ids[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())
    loss.backward()

    errors = {f"grad/{key}": rel(p.grad, golden[f"grad/{key}"]) for key, p in model.named_parameters()}
    assert set(errors) == {key for key in golden if key.startswith("grad/")}
    values = {"hidden": hidden, "logits": logits, "loss": loss}
    errors |= {key: rel(value.detach(), golden[key]) for key, value in values.items()}
    print(f"{name}: largest error {max(errors.values()):.1e}, tolerance {TOLERANCE:.0e}")
    assert {key: error for key, error in errors.items() if not error <= TOLERANCE} == {}


def test_golden_numbers_tell_the_filter_shifts_apart() -> None:
    golden = golden_of("tiny")
    logits = golden_model("tiny", golden, filter_shift=0.0)(golden["input_ids"][:, :-1].long()).detach()
    assert rel(logits, golden["logits"]) > 1e-2


@pytest.mark.parametrize("name", ["tiny", "wide"])
def test_state_dict_has_the_published_keys_and_buffers(name: str) -> None:
    weights = published_weights(golden_of(name))
    state = BaselineHyenaDNA(config_of(name)).state_dict()
    assert list(state) == list(weights)
    for key, value in state.items():
        assert value.shape == weights[key].shape
        if key.endswith((".z", ".t", ".deltas")):
            assert torch.equal(value, weights[key]), key


@pytest.mark.parametrize("order", [2, 3])
def test_later_tokens_do_not_change_earlier_logits(order: int) -> None:
    config = config_of("tiny")
    config["layer"]["order"] = order
    model = BaselineHyenaDNA(config).double().eval()
    input_ids = torch.randint(7, 11, (2, 97), generator=torch.Generator().manual_seed(1))
    position = 40
    changed = input_ids.clone()
    changed[:, position] = 7 + (changed[:, position] - 6) % 4
    with torch.no_grad():
        difference = (model(changed) - model(input_ids)).abs().amax(dim=(0, 2)) / model(input_ids).abs().max()
    assert difference[:position].max() < 1e-13  # rounding of the FFT
    assert (difference[position:] > 1e-8).all()


def test_order_three_equals_direct_sums() -> None:
    config = config_of("tiny")
    config["layer"]["order"] = 3
    mixer = BaselineHyenaDNA(config).double().backbone.layers[0].mixer
    D, L = config["d_model"], 24
    x = torch.randn(1, L, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    p = F.pad(mixer.in_proj(x)[0], (0, 0, 2, 0))
    taps = mixer.short_filter.weight[:, 0]
    p = sum(taps[:, j] * p[j : j + L] for j in range(3)) + mixer.short_filter.bias
    x0, x1, x2, v = (p[:, i * D : (i + 1) * D] for i in range(4))
    h, skip = mixer.filter_fn(L), mixer.filter_fn.bias
    for o, gate in enumerate([x2, x1]):
        u, rows = v * gate, slice(o * D, (o + 1) * D)
        v = torch.stack([(h[rows, : t + 1].flip(1).T * u[: t + 1]).sum(0) for t in range(L)]) + skip[rows] * u
    assert rel(mixer(x)[0].detach(), mixer.out_proj(v * x0).detach()) < 1e-12


def test_input_longer_than_l_max_is_refused() -> None:
    with pytest.raises(ValueError, match=r"131 tokens.*l_max = 130"):
        BaselineHyenaDNA(config_of("tiny"))(torch.full((1, 131), 7))


def test_bfloat16_module_runs_its_transforms_in_float32() -> None:
    golden = golden_of("tiny")
    model = golden_model("tiny", golden).bfloat16()
    logits = model(golden["input_ids"][:, :-1].long())
    assert logits.dtype == torch.bfloat16
    assert rel(logits.double().detach(), golden["logits"]) < 0.1


def test_initial_values_are_the_published_distributions() -> None:
    config = config_of("wide")
    state = BaselineHyenaDNA(config, seed=3).state_dict()
    again, other = (BaselineHyenaDNA(config, seed=seed).state_dict() for seed in (3, 4))
    assert all(torch.equal(state[key], again[key]) for key in state)
    assert not torch.equal(state["lm_head.weight"], other["lm_head.weight"])

    mixer, mlp = "backbone.layers.1.mixer.", "backbone.layers.1.mlp."
    for key, std in {
        "lm_head.weight": 0.02,
        mixer + "in_proj.weight": 0.02,
        mixer + "filter_fn.implicit_filter.2.weight": 0.02,
        mixer + "out_proj.weight": 0.02 / math.sqrt(6),
        mlp + "fc2.weight": 0.02 / math.sqrt(6),
        mixer + "short_filter.weight": 1 / 3,
        mixer + "filter_fn.bias": 1.0,
    }.items():
        assert state[key].std().item() == pytest.approx(std, rel=0.25), key
    assert (state[mixer + "filter_fn.implicit_filter.5.freq"] == 10).all()
    assert not state[mixer + "filter_fn.implicit_filter.0.bias"].any()


def test_only_the_filter_trunks_are_spared_weight_decay() -> None:
    model = BaselineHyenaDNA(config_of("tiny"))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, spared = parameter_groups(model, weight_decay=0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    assert all(".implicit_filter." in names[id(p)] for p in spared["params"])
    assert "backbone.layers.0.mixer.filter_fn.implicit_filter.1.freq" in {names[id(p)] for p in spared["params"]}
    assert "backbone.layers.0.mixer.filter_fn.bias" in {names[id(p)] for p in decayed["params"]}


def test_training_loop_learns_and_accumulates_by_scored_tokens() -> None:
    input_ids = torch.randint(7, 11, (4, 65), generator=torch.Generator().manual_seed(1))
    inputs, targets = input_ids[:, :-1], input_ids[:, 1:].clone()
    targets[0, 10:] = IGNORED_TARGET  # the micro-batches score different numbers of tokens
    whole = [(inputs, targets)]
    halves = [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]
    losses, weights = [], []
    for step in (whole, halves):
        model = BaselineHyenaDNA(config_of("tiny")).double()
        losses.append(
            list(plain_training_loop(model, [step] * 5, lr_at=lambda step: 1e-3 * (step + 1), betas=(0.9, 0.999),
                                     eps=1e-8, weight_decay=0.1, grad_clip=1.0))
        )
        weights.append(model.backbone.layers[0].mixer.in_proj.weight.detach())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert rel(weights[0], weights[1]) < 1e-9
    assert losses[0][0] == pytest.approx(math.log(16), rel=0.05)
    assert losses[0][-1] < losses[0][0] - 0.1
