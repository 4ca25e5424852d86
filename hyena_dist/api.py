"""The public names of the package, each by the module that has it: `from hyena_dist import HyenaModel` imports that
module and no other. Importing the package itself takes no time and starts nothing."""

import importlib
from typing import Any

MODULES = {
    # configuration
    "Config": "config.schema",
    "ModelSection": "config.sections.model",
    "DataSection": "config.sections.data",
    "TrainSection": "config.sections.train",
    "OptimSection": "config.sections.optim",
    "ParallelSection": "config.sections.parallel",
    "EngineSection": "config.sections.engine",
    "OpsSection": "config.sections.ops",
    # ranks
    "init_distributed": "runtime.launch",
    "init_groups": "parallel.groups",
    "Groups": "parallel.groups",
    "slice_tokens": "parallel.tokens",
    # bases to token ids
    "tokenizer_of": "data.tokenizer",
    # model and loss
    "HyenaModel": "model.model",
    "HyenaMixer": "model.mixer",
    "build_model": "model.model",
    "token_loss": "model.loss",
    "DropoutKey": "ops.dropout",
    "hyena_layer_spec": "model.megatron",
    "megatron_config": "model.megatron",
    # engines
    "prepare_deepspeed": "engine.deepspeed",
    "apply_fsdp2": "engine.fsdp",
    "clip_grad_norm": "engine.fsdp",
    "parameter_groups": "train.optimizer",
    # other layouts
    "from_published": "convert",
    "to_published": "convert",
}
"""Public name -> module of this package."""


def public(name: str) -> Any:
    """The object of a public name, or the version of the package for `__version__`.

    Raises:
        AttributeError: there is no such public name.
    """
    if name == "__version__":
        from hyena_dist.config.versions import own_version
        return own_version()
    if name not in MODULES:
        raise AttributeError(f"module 'hyena_dist' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hyena_dist.{MODULES[name]}"), name)
