"""Exported directories in transformers, without this package: load, generate, fine-tune, and back."""

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from hyena_dist.config.sections.model import ModelSection
from hyena_dist.convert import modeling_hyena_dist, read_model, write_model
from hyena_dist.data.tokenizer import IGNORE, encode, split_window
from hyena_dist.model.config import hyena_config
from hyena_dist.model.decode import Decoder
from hyena_dist.model.loss import token_losses
from hyena_dist.model.model import HyenaModel
from tests.compare import rel
from tests.huggingface import MADE, RATE, ROWS, STEPS, TEXTS

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-6  # another shift of the window, or padding that is read, changes logits by more than 1e-3
VERSIONS = {name: Path(os.environ.get(f"TRANSFORMERS_{name}", ROOT / ".venv" / f"transformers-{name}"))
            for name in ("4", "5")}
"""Where `make transformers` installs each."""

MODELS = {"tied": {}, "untied": {"tie_embeddings": False},
          "order": {"hyena_order": 3, "filter_shift": 0.0, "short_conv_kernel": 4}}


def export(folder: Path, **keys: object) -> Path:
    section = ModelSection(**({"num_layers": 2, "hidden_size": 16, "filter_order": 8, "max_seq_len": 64,
                               "embed_dropout": 0.0} | keys))
    model = HyenaModel(hyena_config(section), seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    write_model(folder, "huggingface", section, model)
    return folder


def ours(folder: Path) -> tuple[HyenaModel, HyenaModel]:
    """The model in float32, and in float64 for training."""
    section, model, _ = read_model(folder)
    wide = HyenaModel(hyena_config(section, params_dtype=torch.float64))
    wide.load_state_dict(model.state_dict())
    return model, wide.eval()


def losses_of_bases(model: HyenaModel, ids: torch.Tensor) -> torch.Tensor:
    """This package's losses [n] of the scored tokens of windows [B, L]."""
    inputs, targets = split_window(ids)
    return token_losses(model(inputs), targets)[targets != IGNORE]


def check(folder: Path, version: str) -> None:
    """What transformers found in a directory is what this package finds in it."""
    found = np.load(f"{folder}.npz")
    assert str(found["version"]).startswith(f"{version}.")
    model, wide = ours(folder)
    losses, errors = [], []
    with torch.no_grad():
        for row, text in enumerate(TEXTS):
            ids = torch.from_numpy(encode(text)).long()[None]
            logits = model(ids)[0]
            errors.append(rel(found["logits"][row, -len(text):], logits))
            errors.append(rel(found["states"][row, -len(text):], model.hidden_states(ids)[:, 0]))
            losses.append(losses_of_bases(model, ids))
        errors.append(rel(found["loss"], torch.cat(losses).mean()))
        prompts = [torch.from_numpy(encode(text)).long() for text in TEXTS]
        decoder = Decoder(model, prompts, MADE)
        for step in range(MADE):
            token = 7 + decoder.logits[:, 7:11].argmax(-1)
            assert token.tolist() == found["made"][:, found["ids"].shape[1] + step].tolist()
            decoder.step(token)
    errors.append(rel(found["alone"][0], found["classes"][1]))
    optimizer = torch.optim.AdamW(wide.parameters(), lr=RATE, weight_decay=0.0)
    before = wide(ROWS).detach()
    for step in range(STEPS):
        loss = torch.nn.functional.cross_entropy(wide(ROWS)[:, :-1].flatten(0, 1), ROWS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert found["losses"][step] == pytest.approx(loss.item(), abs=1e-4), "the Trainer rounds what it logs"
    after = wide(ROWS).detach()
    errors.append(rel(found["trained"], after))
    assert rel(before, after) > 1e-2, "control: it was trained"
    section, back, _ = read_model(folder.with_name(f"{folder.name}-trained"))
    assert section == read_model(folder)[0]
    errors.append(rel(back(ROWS).detach(), after))
    print(f"transformers {found['version']}, {folder.name}, Trainer {found['by_trainer']}: largest error "
          f"{max(errors):.1e}, tolerance {TOLERANCE}")
    assert max(errors) < TOLERANCE


def look_at(folders: list[Path], *, first: str = "") -> None:
    """Run the program beside, without this package, and with the packages of a directory before all others."""
    environment = {**os.environ, "PYTHONPATH": first, "HF_HOME": str(folders[0].parent / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "huggingface.py"), *map(str, folders)], check=False,
                          capture_output=True, text=True, encoding="utf-8", env=environment, cwd=folders[0].parent,
                          timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed: pip install '.[dev]'")
def test_the_installed_transformers_load_generate_and_train(tmp_path: Path) -> None:
    from transformers import __version__
    folders = [export(tmp_path / name, **keys) for name, keys in MODELS.items()]
    look_at(folders)
    for folder in folders:
        check(folder, __version__.partition(".")[0])


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_two_major_versions_load_generate_and_train_by_their_trainer(version: str, tmp_path: Path) -> None:
    if not (VERSIONS[version] / "transformers").is_dir():
        pytest.skip(f"transformers {version} is not in {VERSIONS[version]}: make transformers, or set "
                    f"TRANSFORMERS_{version}")
    folders = [export(tmp_path / name, **keys) for name, keys in MODELS.items()]
    look_at(folders, first=str(VERSIONS[version]))
    for folder in folders:
        assert np.load(f"{folder}.npz")["by_trainer"]
        check(folder, version)


def test_the_file_needs_torch_and_transformers_alone(tmp_path: Path) -> None:
    folder = export(tmp_path / "model")
    text = (folder / "modeling_hyena_dist.py").read_text("utf-8")
    assert text == Path(modeling_hyena_dist.__file__).read_text("utf-8")
    names = {name for node in ast.walk(ast.parse(text))
             for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
                          [node.module] if isinstance(node, ast.ImportFrom) else [])}
    assert {name.partition(".")[0] for name in names} == {"math", "typing", "torch", "transformers"}


@torch.no_grad()
def test_the_loss_is_of_bases_alone_as_in_training(tmp_path: Path) -> None:
    """N, other codes and [SEP] are read, and are no targets."""
    folder = export(tmp_path / "model")
    theirs, model = modeling_hyena_dist.HyenaDNAForCausalLM.from_pretrained(folder).eval(), ours(folder)[0]
    for text in ("ACGTNNNNNNNNACGT", "ACRYKMGT", "NNNA", "ACGT"):
        ids = torch.cat([torch.from_numpy(encode(text)).long(), torch.tensor([1])])[None]
        found, wanted = theirs(ids, labels=ids).loss, losses_of_bases(model, ids).mean()
        every = torch.nn.functional.cross_entropy(theirs(ids).logits[0, :-1], ids[0, 1:])
        assert rel(found, wanted) < TOLERANCE, text
        assert rel(every, wanted) > 1e-3, "the control: every token is scored"
    ids = torch.from_numpy(encode("NNNN")).long()[None]
    assert theirs(ids, labels=ids).loss == 0, "nothing is scored"


def test_half_precision_counts_lags_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are rounded, positions are not: in bfloat16 they would be equal from the 256th on (the control)."""
    filters = modeling_hyena_dist._Filter(modeling_hyena_dist.HyenaDNAConfig(d_model=8, max_seq_len=2048)).bfloat16()
    found = filters(2048).detach()
    exact = filters._positions
    monkeypatch.setattr(filters, "_positions", lambda *args: tuple(part.bfloat16().float() for part in exact(*args)))
    coarse = filters(2048).detach()
    monkeypatch.undo()
    wanted = filters.float()(2048).detach()
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
    assert rel(coarse[:, 1:] - coarse[:, :-1], wanted[:, 1:] - wanted[:, :-1]) > 0.3
