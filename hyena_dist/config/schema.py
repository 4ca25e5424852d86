"""Every key of a run: the sections of `config/sections/`, held together.

OmegaConf refuses unknown keys and wrong types against these frozen dataclasses (`load.py`). Nothing here touches disk,
network, torch or a process group. Lengths are in tokens, one token per base.
"""

from dataclasses import dataclass, field

from hyena_dist.config.sections.data import DataSection
from hyena_dist.config.sections.engine import EngineSection
from hyena_dist.config.sections.finetune import FinetuneSection
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.ops import OpsSection
from hyena_dist.config.sections.optim import OptimSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.config.sections.train import TrainSection


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    optim: OptimSection = field(default_factory=OptimSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    engine: EngineSection = field(default_factory=EngineSection)
    ops: OpsSection = field(default_factory=OpsSection)
    finetune: FinetuneSection = field(default_factory=FinetuneSection)
