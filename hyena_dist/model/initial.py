"""Initial values, as published, from a generator per weight: a function of (seed, name) at the weight's global shape.
Each weight's distribution stands in its entry of the placement table.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hyena_dist.model.config import HyenaConfig
from hyena_dist.model.placement import Placement, tensor_share
from hyena_dist.model.table import part_placements
from hyena_dist.parallel.groups import Axis


def layer_name(number: int) -> str:
    """Of a layer in the model, by its number from 1 on, as Megatron counts.

    Raises:
        ValueError: another number.
    """
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"layer_number must be a whole number from 1 on, got {number!r}")
    return f"layers.{number - 1}"


def initialize_part(part: nn.Module, name: str, config: HyenaConfig, tensor: Axis, seed: int | None) -> None:
    """Give a part of a HyenaModel, which may be built without the rest of it, the values that it has there.

    Args:
        name: of the part in the model, such as "layers.0.mixer".
        seed: of the values; None: the model around it will fill it.
    """
    if seed is None:
        return
    initialize(part, part_placements(part, name, config), tensor, seed, prefix=f"{name}.")


def initialize(model: nn.Module, table: Mapping[str, Placement], tensor: Axis, seed: int, *, prefix: str = "") -> None:
    """Fill every parameter of a HyenaModel with this tensor rank's share of its global value.

    Args:
        prefix: before the names of `model`'s parameters in `table`, where it is a part of a HyenaModel.
    """
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            if parameter.is_meta:  # it has no memory to fill
                continue
            name = prefix + own
            shape = list(parameter.shape)  # of one that FSDP2 has sharded, that without the sharding
            split = table[name].tp_dim
            if split is not None:
                shape[split] *= tensor.size
            empty = torch.empty(shape, dtype=torch.float32, device="cpu")
            value = table[name].initial.fill(empty, _generator(seed, name))
            share = tensor_share(value, table[name], tensor.rank, tensor.size)
            if isinstance(parameter, DTensor):  # every rank has the whole share, and takes its own part of it
                share = distribute_tensor(share.to(parameter.device_mesh.device_type), parameter.device_mesh,
                                          parameter.placements, src_data_rank=None)
            parameter.copy_(share)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
