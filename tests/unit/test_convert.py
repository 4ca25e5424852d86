"""The published model: golden numbers, round trips, and what a published checkpoint may look like."""

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.baseline import BaselineHyenaDNA
from hyena_dist.convert import ConversionError, from_published, load_lightning, to_published
from tests.compare import rel

GOLDEN = Path(__file__).parents[1] / "golden"
GRAD_TOLERANCE = 1e-9


def golden(name: str, dtype: torch.dtype) -> tuple[dict, dict[str, torch.Tensor], dict[str, np.ndarray]]:
    config = json.loads((GOLDEN / f"{name}.json").read_text())
    arrays = dict(np.load(GOLDEN / f"{name}.npz"))
    weights = {key.removeprefix("weight/"): torch.from_numpy(value).to(dtype)
               for key, value in arrays.items() if key.startswith("weight/")}
    return config, weights, arrays


def test_published_numbers(name_and_shift):
    name, shift, matches = name_and_shift
    config, weights, arrays = golden(name, torch.float64)
    config["layer"]["shift"] = shift
    model = from_published(config, weights)
    ids = torch.from_numpy(arrays["input_ids"].astype(np.int64))
    logits = model(ids[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    errors = {"hidden": rel(model.hidden_states(ids[:, :-1]).transpose(0, 1), arrays["hidden"]),
              "logits": rel(logits, arrays["logits"]), "loss": rel(loss, arrays["loss"])}
    _, grads = to_published(_gradients_as_weights(model))
    for key, value in arrays.items():
        if key.startswith("grad/"):
            errors[key] = rel(grads[key.removeprefix("grad/")], value)
    worst = max(errors, key=errors.__getitem__)
    print(f"{name}, shift {shift}: worst {worst} {errors[worst]:.1e}, tolerance {GRAD_TOLERANCE}")
    assert (errors[worst] < GRAD_TOLERANCE) == matches


@pytest.fixture(params=[("tiny", 0.05, True), ("wide", 0.05, True), ("tiny", 0.0, False)],
                ids=["tiny", "wide", "control: another filter_shift"])
def name_and_shift(request):
    return request.param


def _gradients_as_weights(model):
    """The model with every weight replaced by its gradient, so that gradients get their published names."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    return model


@pytest.mark.parametrize("name", ["tiny", "wide"])
def test_float32_logits(name):
    config, weights, arrays = golden(name, torch.float32)
    logits = from_published(config, weights)(torch.from_numpy(arrays["input_ids"].astype(np.int64))[:, :-1])
    assert rel(logits, arrays["logits"]) < 2e-5


@pytest.mark.parametrize("name", ["tiny", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_is_bit_exact(name, dtype):
    config, weights, _ = golden(name, dtype)
    new_config, state = to_published(from_published(config, weights))
    assert state.keys() - {"lm_head.weight"} == weights.keys()
    for key, value in weights.items():
        assert state[key].dtype == dtype
        assert torch.equal(state[key], value), key
    again = from_published(new_config, state).state_dict()
    first = from_published(config, weights).state_dict()
    assert all(torch.equal(again[key], first[key]) for key in first)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_every_order_equals_the_plain_model(order):
    """Against plain torch code of the published equations, which shares nothing with ours: values and gradients."""
    config, _, arrays = golden("tiny", torch.float64)
    config["layer"]["order"] = order
    plain = BaselineHyenaDNA(config, seed=3).double()
    model = from_published(config, plain.state_dict())
    ids = torch.from_numpy(arrays["input_ids"].astype(np.int64))
    theirs, ours = plain(ids[:, :-1]), model(ids[:, :-1])
    assert rel(ours, theirs) < 1e-12
    weight = torch.randn(theirs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (theirs * weight).sum().backward()
    (ours * weight).sum().backward()
    _, grads = to_published(_gradients_as_weights(model))
    for name, parameter in plain.named_parameters():
        assert rel(grads[name], parameter.grad) < 1e-10, name


def test_accepts_what_published_checkpoints_hold():
    config, weights, _ = golden("tiny", torch.float32)
    expected = from_published(config, weights).state_dict()
    noisy = {"model." + key.replace(".mixer.", ".mixer.layer.").replace(".mlp.", ".mlp.layer."): value
             for key, value in weights.items() if "pos_emb" not in key}
    noisy["model.lm_head.weight"] = weights["backbone.embeddings.word_embeddings.weight"]
    noisy["train_torchmetrics.num_tokens.count"] = torch.tensor(7)
    found = from_published(config, noisy).state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("change", "message"), [
    (lambda c, w: w.pop("backbone.ln_f.weight"), "lacks key backbone.ln_f.weight"),
    (lambda c, w: w.update(extra=torch.zeros(1)), "unknown key extra"),
    (lambda c, w: c.update(d_model=48), "has shape"),
    (lambda c, w: c["layer"].update(bidirectional=True), "layer.bidirectional"),
    (lambda c, w: c.pop("layer"), "config.json"),
    (lambda c, w: w.update({"backbone.layers.0.mixer.filter_fn.implicit_filter.3.freq": torch.ones(1, 8)}), "differ"),
    (lambda c, w: w.update({"module." + key: value + 1 for key, value in w.items()}), "differ"),
    (lambda c, w: w.update({"lm_head.weight": torch.ones(8, 32)}), r"lm_head.weight has shape \[8, 32\]"),
])
def test_refuses_other_checkpoints(change, message):
    config, weights, _ = golden("tiny", torch.float32)
    change(config, weights)
    with pytest.raises(ConversionError, match=message):
        from_published(config, weights)


def test_initial_values_without_weights():
    config, _, _ = golden("tiny", torch.float32)
    model = from_published(config, None)
    assert not model.training
    assert model(torch.full((1, 8), 7)).isfinite().all()


class _Attack:
    def __reduce__(self):
        return (Path.touch, (Path(self.target),))


class _Settings(dict):
    """Stands for the OmegaConf objects that Lightning checkpoints hold."""


def test_lightning_pickle_runs_nothing(tmp_path):
    _, weights, _ = golden("tiny", torch.float32)
    attack = _Attack()
    attack.target = str(tmp_path / "owned")
    settings = _Settings(lr=1)
    torch.save({"state_dict": {"model." + k: v for k, v in weights.items()}, "hyper_parameters": settings,
                "loops": attack}, tmp_path / "weights.ckpt")
    state = load_lightning(tmp_path / "weights.ckpt")
    assert not (tmp_path / "owned").exists()
    assert all(torch.equal(state["model." + key], value) for key, value in weights.items())
    torch.load(tmp_path / "weights.ckpt", weights_only=False)  # the control: the attack is real
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["_rebuild_tensor_v2", "_rebuild_parameter"])
def test_lightning_pickle_changes_nothing_of_the_process(tmp_path, name):
    """Setting the attributes of a function that it is given would change every later load of the process."""
    torch.save({"state_dict": {"w": torch.ones(2)}}, tmp_path / "good.ckpt")
    attack = f"ctorch._utils\n{name}\n".encode() + b"N}\x8c\x05otherK\x01s\x86b0"
    with zipfile.ZipFile(tmp_path / "good.ckpt") as good, zipfile.ZipFile(tmp_path / "weights.ckpt", "w") as evil:
        for record in good.namelist():
            content = good.read(record)
            evil.writestr(record, content[:2] + attack + content[2:] if record.endswith("data.pkl") else content)
    with pytest.raises(ConversionError, match=f"it changes <function {name}"):
        load_lightning(tmp_path / "weights.ckpt")
    assert not vars(getattr(torch._utils, name))
    assert torch.equal(load_lightning(tmp_path / "good.ckpt")["w"], torch.ones(2))
    torch.load(tmp_path / "weights.ckpt", weights_only=False)  # the control: the attack is real
    assert vars(getattr(torch._utils, name)).pop("other") == 1


class _Program(torch.nn.Module):
    """Makes a file when it is loaded."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.target, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.target, self.training = state
        assert torch.from_file(self.target, True, 4).numel() == 4

    def forward(self) -> str:
        return self.target


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:.*TorchScript")
def test_lightning_runs_no_torchscript(tmp_path):
    owned = tmp_path / "owned"
    torch.jit.script(_Program(str(owned))).save(tmp_path / "weights.ckpt")
    with pytest.raises(ConversionError, match=r"weights.ckpt: .*it is a TorchScript program"):
        load_lightning(tmp_path / "weights.ckpt")
    assert not owned.exists()
    torch.load(tmp_path / "weights.ckpt", weights_only=False)  # the control: torch.load does run it
    assert owned.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps({"state_dict": {}})])
def test_lightning_refuses_other_files(tmp_path, content):
    path = tmp_path / "weights.ckpt"
    path.write_bytes(content)
    with pytest.raises(ConversionError, match="weights.ckpt"):
        load_lightning(path)
