"""The forms in which a model is exchanged; here, so that a command can list them without importing torch."""

FORMATS = {
    "safetensors": "model.safetensors by this package's parameter names, and config.json",
    "published": "weights.ckpt and config.json as the published HyenaDNA code loads them",
    "huggingface": "model.safetensors, config.json, tokenizer and code, for transformers without this package",
    "checkpoint": "a checkpoint of step 0 for train.resume=weights:DEST",
}
