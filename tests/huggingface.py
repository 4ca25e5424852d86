"""What transformers, 4 or 5, makes of exported directories, without this package: run as a program, whose numbers go to
EXPORT.npz and whose trained model goes to EXPORT-trained. With accelerate, which it wants, its Trainer trains."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

TEXTS = ("ACGTTGCAAGGCTTNA", "GATTACA", "acgt")
ROWS = torch.randint(7, 11, (6, 40), generator=torch.Generator().manual_seed(0))
STEPS, RATE, MADE = 3, 1e-2, 12


def train(model: Any, folder: Path) -> list[float]:
    """Three steps of AdamW, each on all rows; the losses before them."""
    if find_spec("accelerate"):
        arguments = transformers.TrainingArguments(
            str(folder), max_steps=STEPS, per_device_train_batch_size=len(ROWS), learning_rate=RATE, weight_decay=0.0,
            lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1, save_strategy="no", report_to=[],
            use_cpu=True, disable_tqdm=True)
        trainer = transformers.Trainer(model=model, args=arguments,
                                       train_dataset=[{"input_ids": row, "labels": row} for row in ROWS])
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]
    optimizer, losses = torch.optim.AdamW(model.train().parameters(), lr=RATE, weight_decay=0.0), []
    for _ in range(STEPS):
        loss = model(ROWS, labels=ROWS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def look_at(export: Path) -> dict[str, Any]:
    """Everything about one directory."""
    tokenizer = AutoTokenizer.from_pretrained(export, trust_remote_code=False)
    model, said = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, output_loading_info=True)
    assert not any(said[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
    model.eval()
    batch = tokenizer(list(TEXTS), padding=True, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        found = model(**batch, labels=batch["input_ids"], output_hidden_states=True)
        masked = model(batch["input_ids"], (batch["input_ids"] != 4).long(), batch["input_ids"])
        assert torch.equal(found.logits, masked.logits), "a mask says what [PAD] says"
        assert found.loss == masked.loss
        assert len(found.hidden_states) == model.config.n_layer + 1
        made = model.generate(**batch, max_new_tokens=MADE, do_sample=False)
        torch.manual_seed(0)
        drawn = model.generate(**batch, max_new_tokens=MADE, do_sample=True)
        assert set(drawn[:, batch["input_ids"].shape[1]:].unique().tolist()) <= {7, 8, 9, 10}
        states = AutoModel.from_pretrained(export, trust_remote_code=True).eval()(**batch).last_hidden_state
    classes = AutoModelForSequenceClassification.from_pretrained(export, trust_remote_code=True, num_labels=3).eval()
    answer = classes(**batch, labels=torch.tensor([0, 2, 1]))
    answer.loss.backward()
    alone = classes(**tokenizer(TEXTS[1], add_special_tokens=False, return_tensors="pt"))
    wide = model.double()
    losses = train(wide, export.with_name(f"{export.name}-trainer"))
    with torch.no_grad():
        trained = wide.eval()(ROWS).logits
    wide.float().save_pretrained(export.with_name(f"{export.name}-trained"))
    return {"ids": batch["input_ids"], "logits": found.logits, "loss": found.loss, "made": made, "states": states,
            "classes": answer.logits.detach(), "alone": alone.logits.detach(), "losses": losses, "trained": trained,
            "version": transformers.__version__, "by_trainer": find_spec("accelerate") is not None}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        np.savez(f"{name}.npz", **look_at(Path(name)))
    assert "hyena_dist" not in sys.modules
