"""The engine of a run, with its optimizer, offloading and loss scale, from the configuration."""

from torch import nn

from hyena_dist.config.checks import accumulation_steps
from hyena_dist.config.schema import Config
from hyena_dist.engine.fsdp import FsdpEngine, apply_fsdp2
from hyena_dist.engine.loss_scale import LossScaler
from hyena_dist.engine.protocol import Engine, Table
from hyena_dist.parallel.groups import Groups
from hyena_dist.train.optimizer import build_optimizer


def build_engine(config: Config, model: nn.Module, table: Table, groups: Groups) -> Engine:
    """Hand a model on its device to the engine that `config.engine` names; collective.

    Args:
        config: already checked (`config.checks`).

    Raises:
        ConfigError: the engine refuses a key.
    """
    train, optim, engine = config.train, config.optim, config.engine
    scaler = LossScaler() if train.precision == "fp16" else None
    if engine.name == "fsdp":
        apply_fsdp2(model, groups, offload=engine.offload == "parameters")
        steps = accumulation_steps(global_batch_size=train.global_batch_size, micro_batch_size=train.micro_batch_size,
                                   data_ranks=groups.data.size)
        return FsdpEngine(model, build_optimizer(model, table, optim, engine), groups, table,
                          grad_clip=optim.grad_clip, accumulation_steps=steps, loss_scaler=scaler)

    from hyena_dist.engine.deepspeed import prepare_deepspeed  # importing deepspeed takes seconds
    from hyena_dist.engine.deepspeed_config import deepspeed_config

    settings = deepspeed_config(engine, groups, micro_batch_size=train.micro_batch_size,
                                global_batch_size=train.global_batch_size, grad_clip=optim.grad_clip)
    return prepare_deepspeed(model, settings, groups, table, loss_scaler=scaler,
                             optimizer=build_optimizer(model, table, optim, engine))
