"""Sequences that grow a token at a time: what each step predicts is what a forward pass over all of it does."""

import sys

import pytest
import torch
from torch import Tensor

from hyena_dist.config.mixers import MIXERS
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.model.config import hyena_config
from hyena_dist.model.decode import Decoder, PlainDecoder
from hyena_dist.model.model import HyenaModel
from hyena_dist.ops import online_conv
from hyena_dist.ops.online_conv import OnlineConvolution, online_conv_reference
from tests.compare import rel

EXACT = 1e-12  # one lag too many or too few moves a step's logits by more than 1e-3


def online(u: Tensor, h: Tensor, carried: Tensor) -> Tensor:
    state, found = OnlineConvolution(h, carried.clone()), []
    half = u.shape[1] // 2
    for value in u.unbind(-1):
        found.append(torch.cat([state.step(rows, value[:, rows]) for rows in (slice(0, half), slice(half, None))], 1))
        state.advance()
    return torch.stack(found, -1)


@pytest.mark.parametrize("tokens", [1, 2, 3, 31, 64, 257, 1000])
def test_online_sums_are_direct_ones(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online_conv, "DIRECT", 4)
    monkeypatch.setattr(online_conv, "KEPT", 64)  # so that all three ways of a square are taken
    draw = torch.Generator().manual_seed(tokens)
    u, carried = (torch.randn(2, 5, tokens, generator=draw, dtype=torch.float64) for _ in range(2))
    h = torch.randn(5, tokens, generator=draw, dtype=torch.float64)
    wanted = online_conv_reference(u, h, carried)
    assert rel(online(u, h, carried), wanted) < EXACT
    if tokens > 3:
        h[:, tokens - 1] += 1
        assert rel(online(u, h, carried), wanted) > 1e-3, "control: the farthest lag counts"


def build(dtype: torch.dtype = torch.float64, **keys: object) -> HyenaModel:
    section = ModelSection(**({"num_layers": 2, "hidden_size": 16, "filter_order": 8, "max_seq_len": 128} | keys))
    model = HyenaModel(hyena_config(section, params_dtype=dtype), seed=5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that predictions are far from even
    return model


def bases(*lengths: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(7)
    return [torch.randint(7, 11, (length,), generator=draw) for length in lengths]


MODELS = {"order 2": {}, "order 3": {"hyena_order": 3}, "order 5": {"hyena_order": 5, "short_conv_kernel": 5},
          "one tap": {"short_conv_kernel": 1}, "a filter that goes on": {"filter_seq_len": 20},
          "attention": {"layer_pattern": "A", "num_attention_heads": 2},
          "both": {"layer_pattern": "HA", "num_layers": 3, "num_attention_heads": 4, "tie_embeddings": False}}


@pytest.mark.parametrize("keys", MODELS.values(), ids=MODELS)
def test_each_step_is_a_forward_pass(keys: dict[str, object]) -> None:
    model = build(**keys)
    prompts = bases(1, 40, 2, 17)
    prompts.append(prompts[1])  # two sequences of one prompt, which go apart
    room = 70
    decoder, plain = Decoder(model, prompts, room), PlainDecoder(model, prompts, room)
    ids = torch.randint(7, 11, (room, len(prompts)), generator=torch.Generator().manual_seed(1))
    worst = max(rel(found, wanted) for found, wanted in zip(decoder.prompt_logits, plain.prompt_logits, strict=True))
    worst = max(worst, rel(decoder.logits, plain.logits))
    sequences = [torch.cat([prompt, ids[:, row]]) for row, prompt in enumerate(prompts)]
    with torch.no_grad():
        whole = [model(sequence[None])[0] for sequence in sequences]
    for step in range(room):
        found = decoder.step(ids[step])
        wanted = torch.stack([logits[len(prompt) + step] for logits, prompt in zip(whole, prompts, strict=True)])
        worst = max(worst, rel(found, wanted))
        if step < 3:
            worst = max(worst, rel(found, plain.step(ids[step])))
    print(f"largest error of a step's logits {worst:.1e}, tolerance {EXACT}")
    assert worst < EXACT
    assert rel(found, wanted.roll(1, 0)) > 1e-3, "control: the sequences differ"


def test_a_prompt_is_not_a_later_one() -> None:
    """Nothing is left over from one Decoder in the next, and what stands beside a sequence does not matter."""
    model = build(layer_pattern="HA", num_attention_heads=2)
    first, second = bases(30, 9)
    Decoder(model, [second], 5).step(torch.tensor([7]))
    alone, beside = Decoder(model, [first], 5), Decoder(model, [second, first], 5)
    assert rel(beside.step(torch.tensor([8, 9]))[1:], alone.step(torch.tensor([9]))) < EXACT


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_in_less_precision_predictions_are_near(precision: str) -> None:
    section = ModelSection(num_layers=2, hidden_size=16, filter_order=8, max_seq_len=128, layer_pattern="HA")
    model = HyenaModel(hyena_config(section, precision=precision), seed=5).eval()
    prompts = bases(33)
    decoder, sequence = Decoder(model, prompts, 40), prompts[0]
    for token in bases(40)[0]:
        found, sequence = decoder.step(token[None]), torch.cat([sequence, token[None]])
        with torch.no_grad():
            assert rel(found[0], model(sequence[None])[0, -1]) < (1e-5 if precision == "fp32" else 3e-2)


def test_what_cannot_be_decoded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    for prompts, room, said in (([], 1, "0 sequences"), (bases(3), 0, "room for 0"), (bases(0), 1, r"got \[0\]"),
                                (bases(100), 29, "100 tokens and 29 behind it are longer than max_seq_len = 128"),
                                ([bases(3)[0][None]], 1, r"got \[1, 3\]")):
        with pytest.raises(ValueError, match=said):
            Decoder(model, prompts, room)
    decoder = Decoder(model, bases(127), 1)
    decoder.step(torch.tensor([7]))
    with pytest.raises(ValueError, match="no room"):
        decoder.step(torch.tensor([7]))
    with pytest.raises(ValueError, match="training mode"):
        Decoder(model.train(), bases(3), 1)
    monkeypatch.setitem(MIXERS, "X", "tests.mean")
    monkeypatch.delitem(sys.modules, "tests.mean", raising=False)
    with pytest.raises(ValueError, match=r"mean layers \(X of model.layer_pattern\) cannot be read token by token"):
        Decoder(build(layer_pattern="HX"), bases(3), 1)
