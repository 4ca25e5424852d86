"""The model card of an exported directory, README.md: what is known of a model's data, training and validation, and
what it is not good for."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hyena_dist.checkpoint.directory import read_metadata
from hyena_dist.checkpoint.files import MARKER
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.versions import own_version
from hyena_dist.model.model import HyenaModel
from hyena_dist.model.trained import weights_digest

CARD = "README.md"

_USE = {"huggingface": """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(DIRECTORY, trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)
batch = tokenizer(["ACGTTGCA", "GATTACA"], padding=True, add_special_tokens=False, return_tensors="pt")
loss = model(**batch, labels=batch.input_ids).loss      # nats of a base, given all before it
made = model.generate(**batch, max_new_tokens=20, do_sample=True)
```

`modeling_hyena_dist.py` beside this file is all the code that is run, and needs torch and transformers 4 or 5 alone.
Under transformers 5 the line of the tokenizer prints "You are using a model of type `hyenadna` to instantiate a model
of type ``": it is harmless, and says that without trust_remote_code no code for the model was looked at.
`generate` reads the whole sequence again for every base; `hyena-dist generate` does not."""}
"""By format: how it is loaded where hyena_dist is not installed."""


def model_card(format: str, section: ModelSection, model: HyenaModel, source: str) -> str:
    """The text of a card.

    Args:
        format: of the directory that it is for.
        source: where the model came from; a checkpoint's metadata says how it was trained.
    """
    metadata = read_metadata(Path(source)) if source and (Path(source) / MARKER).is_file() else {}
    library = ["library_name: transformers"] if format in _USE else []
    return "\n".join(["---", "tags:", "- dna", "- hyenadna", *library, "---", "", "# HyenaDNA", "",
                      *_model(section, model), _USE.get(format, ""), "", "## Data", "",
                      *_data(metadata), "", "## Training", "", *_training(metadata), "", "## Validation", "",
                      *_validation(metadata), "", "## Limits", "", *_limits(section), ""])


def _model(section: ModelSection, model: HyenaModel) -> Iterator[str]:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = "single bases" if section.kmer == 1 else f"{section.kmer}-mers"
    yield (f"A causal language model of DNA (Nguyen et al. 2023): {section.num_layers} layers of {section.hidden_size} "
           f"channels, {parameters:,} parameters, {tokens} as tokens, at most {section.max_seq_len:,} of them. Written "
           f"by hyena_dist {own_version()}; sha256 of the weights {weights_digest(model)}.")


def _data(metadata: Mapping[str, Any]) -> Iterator[str]:
    identity, data = metadata.get("identity", {}), metadata.get("data") or {}
    if "data.seq_len" not in identity:
        yield "Not known: the files that it was exported from do not say."
        return
    shards = _shards(metadata)
    yield f"- shards: {shards or 'not named'}; sha256 of their index {data.get('manifest', 'not known')}"
    if mixture := identity.get("data.mixture"):
        yield f"- mixture: `{mixture}`"
    yield f"- windows of {identity['data.seq_len']:,} tokens" + (
        "; half of them as the reverse complement" if identity.get("data.rc_augment") else "; forward strand only")
    weight = identity.get("data.lower_case_weight", 1.0)
    if weight != 1:
        yield f"- weight of soft-masked (lower-case) bases in the loss: {weight}"


def _shards(metadata: Mapping[str, Any]) -> str:
    """What data.shards was, in the text of the run's configuration."""
    import yaml

    try:
        config = yaml.safe_load(metadata.get("config") or "") or {}
        return str(config["data"]["shards"])
    except (yaml.YAMLError, KeyError, TypeError):
        return ""


def _training(metadata: Mapping[str, Any]) -> Iterator[str]:
    identity = metadata.get("identity", {})
    if not metadata.get("step") or "train.global_batch_size" not in identity:
        yield "Not known: the files that it was exported from do not say."
        return
    yield (f"- {metadata['step']:,} of {identity.get('train.steps', metadata['step']):,} steps of "
           f"{identity['train.global_batch_size']:,} windows, in {identity.get('train.precision', 'fp32')}")
    if identity.get("train.seq_len_warmup"):
        yield "- windows became longer in stages: `train.seq_len_warmup` of the run"
    yield (f"- AdamW, learning rate {identity.get('optim.lr')} ({identity.get('optim.schedule')}), weight decay "
           f"{identity.get('optim.weight_decay')}, seed {identity.get('train.seed')}")
    if metadata.get("objective", "pretraining") != "pretraining":
        yield f"- objective: {metadata['objective']}"


def _validation(metadata: Mapping[str, Any]) -> Iterator[str]:
    loss, best = metadata.get("val_loss"), metadata.get("best_val_loss")
    if loss is None:
        yield "This checkpoint was not validated" + (f"; the best of its run had {best:.4f} nats a base." if best
                                                     else ".")
        return
    identity = metadata.get("identity", {})
    tokens = identity.get("data.val_tokens")
    of = ("" if "data.val_tokens" not in identity else ", the whole validation split" if tokens is None else
          f", {tokens:,} tokens (data.val_tokens) at even distances over the validation split")
    yield (f"Held-out bases{of}: {loss:.4f} nats a base, a perplexity of {math.exp(loss):.4f}; the best of its run had "
           f"{best if best is not None else loss:.4f}. Even guessing has 1.3863.")


def _limits(section: ModelSection) -> Iterator[str]:
    yield f"- It reads from left to right, and at most {section.max_seq_len:,} tokens. Strands are not alike to it."
    yield "- It was trained to predict A, C, G and T; what it says of N and of special tokens means nothing."
    yield "- Of organisms and regions that its data lacks, nothing is known."
    yield "- A likelihood is no measure of harm. No result was checked for use in medicine."
