"""Generation and embeddings on a device: predictions of every step, the bases that are made, and the rows of a file."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hyena_dist.config.sections.model import ModelSection
from hyena_dist.model.config import hyena_config
from hyena_dist.model.decode import Decoder, PlainDecoder
from hyena_dist.model.model import HyenaModel
from hyena_dist.model.trained import Trained
from hyena_dist.parallel.groups import Groups
from hyena_dist.tasks.embed.states import embed
from hyena_dist.tasks.generate import sequences
from hyena_dist.tasks.generate.sampling import Sampling
from hyena_dist.tasks.generate.sequences import Prompt, Request, generate
from tests.compare import rel
from tests.gpu.devices import DEVICES

SECTION = ModelSection(num_layers=3, hidden_size=32, filter_order=8, max_seq_len=400, layer_pattern="HHA",
                       num_attention_heads=2, hyena_order=3)
BELOW = {torch.float64: 1e-12, torch.float32: 1e-4}


def model_of(dtype: torch.dtype, precision: str = "fp32") -> HyenaModel:
    model = HyenaModel(hyena_config(SECTION, precision=precision, params_dtype=dtype), seed=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", BELOW, ids=["float64", "float32"])
def test_each_step_is_a_forward_pass(dtype: torch.dtype, device: torch.device) -> None:
    model, room = model_of(dtype).to(device), 150
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(7, 11, (2, 200), generator=draw).to(device)
    prompts = [ids[0, :50], ids[1, :7]]
    decoder, worst = Decoder(model, prompts, room), 0.0
    with torch.no_grad():
        whole = model(ids)
    for step in range(room):
        found = decoder.step(torch.stack([ids[0, 50 + step], ids[1, 7 + step]]))
        worst = max(worst, rel(found, torch.stack([whole[0, 50 + step], whole[1, 7 + step]])))
    print(f"largest error of a step's logits on {device.type} {worst:.1e}, tolerance {BELOW[dtype]}")
    assert worst < BELOW[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sequences_are_made_with_and_without_a_memory(precision: str, device: torch.device, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trained(SECTION, model_of(torch.float32), Path("model"), 400).to(device, precision)
    request = Request([Prompt("a", "ACGTTTGACA"), Prompt("b", "G")], 2, 60, Sampling(0.8), 1, 3, tmp_path / "made.fa",
                      tmp_path / "made.tsv")
    generate(trained, request, Groups.single())
    made = [line for line in request.out.read_text().splitlines() if not line.startswith(">")]
    assert [len(bases) for bases in made] == [70, 70, 61, 61]
    if precision == "fp32":
        monkeypatch.setattr(sequences, "Decoder", PlainDecoder)
        plain = replace(request, out=tmp_path / "plain.fa", likelihoods=None)
        generate(trained, plain, Groups.single())
        assert plain.out.read_text() == request.out.read_text()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bin", [None, 1, 16])
def test_rows_are_those_of_float64_on_a_cpu(bin: int | None, device: torch.device) -> None:
    draw = np.random.default_rng(0)
    texts = [draw.integers(7, 11, size).astype(np.uint8) for size in (400, 33, 1)]
    trained = Trained(SECTION, model_of(torch.float32), Path("model"), 400)
    found = embed(trained.to(device, "fp32"), texts, bin, None)
    exact = Trained(SECTION, model_of(torch.float32).double(), Path("model"), 400)
    wanted = embed(exact, texts, bin, None)
    assert max(rel(a, b) for a, b in zip(found, wanted, strict=True)) < 1e-4
