"""A small step through every engine: time, peak memory, where the host waits, and whether its state goes out and in."""

from functools import partial

import torch

from benchmarks.gpu.measure import forget_peak, peak_bytes, waits
from benchmarks.gpu.task import Task, median_seconds
from hyena_dist.config.schema import Config
from hyena_dist.config.sections.engine import EngineSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.train import TrainSection
from hyena_dist.costs.memory import training_memory
from hyena_dist.model.loss import token_loss
from hyena_dist.model.model import build_model
from hyena_dist.parallel.groups import Groups, init_groups
from hyena_dist.runtime.launch import init_distributed
from hyena_dist.train.build_engine import build_engine

ENGINES = (*(EngineSection(zero_stage=stage) for stage in (1, 0, 2, 3)), EngineSection(name="fsdp"),
           EngineSection(zero_stage=1, offload="optimizer"), EngineSection(zero_stage=3, offload="parameters"),
           EngineSection(name="fsdp", offload="parameters"))
WEIGHT = "layers.0.mixer.in_proj.weight"
LEAST_SECONDS = 4.0


def run(task: Task) -> None:
    device, groups = init_distributed(), init_groups()
    for section in (ENGINES[0], ENGINES[4]) if task.tiny else ENGINES:
        label = ("fsdp" if section.name == "fsdp" else f"ZeRO-{section.zero_stage}") + (
            f" offload={section.offload}" if section.offload != "none" else "")
        if task.left() < LEAST_SECONDS:
            task.note(f"{label}: no time left")
            return
        task.attempt(label, partial(_one, task, section, label, device, groups))
        forget_peak()


def _one(task: Task, section: EngineSection, label: str, device: torch.device, groups: Groups) -> None:
    length, batch, width = (64, 2, 16) if task.tiny else (1024, 4, 128)
    config = Config(model=ModelSection(num_layers=2, hidden_size=width, max_seq_len=length, embed_dropout=0.0),
                    train=TrainSection(precision="bf16", micro_batch_size=batch, global_batch_size=2 * batch),
                    engine=section)
    forget_peak()
    model = build_model(config, groups).to(device)
    engine = build_engine(config, model, model.placement(), groups)
    ids = torch.randint(7, 11, (batch, length + 1), generator=torch.Generator().manual_seed(0)).to(device)
    norms = []

    def step() -> None:
        engine.module.train()
        for _ in range(2):
            total, count = token_loss(engine.module(ids[:, :-1], None), ids[:, 1:])
            engine.backward(total / (2 * count))
        norms.append(engine.step(1e-3).grad_norm)

    seconds = median_seconds(step, rounds=10, warm=3, at_most=2.0)
    peak, waiting = peak_bytes()[0], waits(step)
    formula = training_memory(config.model, length, batch, precision="bf16", engine=section, device=device.type).total
    state = engine.export_parameter(WEIGHT)
    engine.import_parameter(WEIGHT, {key: value.cpu() for key, value in state.items()})
    again = engine.export_parameter(WEIGHT)
    same = all(torch.equal(state[key], again[key]) for key in state)
    first, last = float(norms[0]), float(norms[-1])
    share = f" = {peak / formula:.2f} of the formula" if section.offload == "none" else ""
    task.note(f"{label}: {seconds * 1e3:.1f} ms a step of 2 micro-batches, peak {peak / 2**20:.0f} MiB{share}, norm "
              f"{first:.3f} to {last:.3f}, state out and in the same: {same}, waits {waiting or 'none'}",
              ok=same and last == last, engine=label, seconds=seconds, peak=peak, formula=formula, waits=waiting)
