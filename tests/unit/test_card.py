"""The model card of an export says what the model's files say, and that they do not where they do not."""

import json
from pathlib import Path
from typing import Any

import pytest

from hyena_dist.checkpoint.metadata import METADATA, seal
from hyena_dist.cli.convert import main
from hyena_dist.convert import write_model
from hyena_dist.convert.trained import load_trained
from tests.unit.test_generate import save

RUN = {"step": 300, "val_loss": 1.2528, "best_val_loss": 1.25, "config": "data:\n  shards: shards/five genomes\n",
       "data": {"step": 300, "manifest": "ab12" * 16}}
IDENTITY = {"data.seq_len": 200, "data.rc_augment": True, "data.lower_case_weight": 0.5, "data.mixture": None,
            "train.steps": 480, "train.global_batch_size": 32, "train.precision": "bf16", "train.seed": 7,
            "train.seq_len_warmup": [], "optim.lr": 0.0006, "optim.schedule": "cosine", "optim.weight_decay": 0.1}


def checkpoint(folder: Path, run: dict[str, Any], identity: dict[str, Any]) -> Path:
    """A checkpoint with the metadata that a run writes."""
    trained = load_trained(save(folder / "model"))
    path = folder / "start"
    write_model(path, "checkpoint", trained.section, trained.model)
    metadata = json.loads((path / METADATA).read_text())
    (path / METADATA).write_text(seal({**metadata, **run, "identity": {**metadata["identity"], **identity}}))
    return path


def card(source: Path, dest: Path, format: str = "huggingface") -> str:
    assert main([str(source), str(dest), "--to", format]) == 0
    return (dest / "README.md").read_text("utf-8")


def test_a_card_says_how_the_model_was_trained(tmp_path: Path) -> None:
    text = card(checkpoint(tmp_path, RUN, IDENTITY), tmp_path / "out")
    for said in ("2 layers of 16 channels", load_trained(tmp_path / "model").digest(), "shards/five genomes",
                 "ab12" * 16, "windows of 200 tokens; half of them as the reverse complement", "in the loss: 0.5",
                 "300 of 480 steps of 32 windows, in bf16", "learning rate 0.0006 (cosine), weight decay 0.1, seed 7",
                 "1.2528 nats a base, a perplexity of 3.5001; the best of its run had 1.2500", "at most 200 tokens",
                 "library_name: transformers", "trust_remote_code=True"):
        assert said in text, said
    assert "Not known" not in text
    assert "Held-out bases: 1.2528" in text, "a checkpoint that does not say of how many"


@pytest.mark.parametrize(("tokens", "said"), [
    (None, "the whole validation split"),
    (65536, "65,536 tokens (data.val_tokens) at even distances over the validation split")])
def test_a_card_says_over_what_the_model_was_validated(tokens: int | None, said: str, tmp_path: Path) -> None:
    text = card(checkpoint(tmp_path, RUN, IDENTITY | {"data.val_tokens": tokens}), tmp_path / "out")
    assert f"Held-out bases, {said}: 1.2528 nats a base" in text


@pytest.mark.parametrize("format", ["huggingface", "safetensors", "published"])
def test_a_card_says_what_is_not_known(format: str, tmp_path: Path) -> None:
    text = card(save(tmp_path / "model"), tmp_path / "out", format)
    assert text.count("Not known: the files that it was exported from do not say.") == 2
    assert "This checkpoint was not validated." in text
    assert ("transformers" in text) == ('": it is harmless' in text) == (format == "huggingface")


def test_a_checkpoint_between_two_validations_has_the_best_of_its_run(tmp_path: Path) -> None:
    text = card(checkpoint(tmp_path, RUN | {"val_loss": None, "config": ":\n- {"}, IDENTITY), tmp_path / "out")
    assert "This checkpoint was not validated; the best of its run had 1.2500 nats a base." in text
    assert "- shards: not named" in text
