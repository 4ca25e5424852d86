"""Initial values, as published, from a generator per weight: a function of (seed, name) at the weight's global shape.

    embedding, head, every linear and the filter's      N(0, 0.02); biases 0
    out_proj and fc2                                    N(0, 0.02 / sqrt(2 num_layers)); biases 0
    short convolution                                   torch's Conv1d default: U(-1/sqrt(K), 1/sqrt(K)), bias too
    conv_bias (the direct term)                         N(0, 1)
    sine frequency                                      filter_sine_freq
    norms                                               weight 1, bias 0
"""

import hashlib
import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hyena_dist.model.config import HyenaConfig
from hyena_dist.model.placement import Placement, placements, tensor_share
from hyena_dist.parallel.groups import Axis

STD = 0.02


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
    names = [f"{name}.{own}" for own, _ in part.named_parameters()]
    initialize(part, config, placements(names, config.hyena_order), tensor, seed, prefix=f"{name}.")


def initialize(model: nn.Module, config: HyenaConfig, table: Mapping[str, Placement], tensor: Axis, seed: int, *,
               prefix: str = "") -> None:
    """Fill every parameter of a HyenaModel of this configuration with this tensor rank's share of its global value.

    Args:
        prefix: before the names of `model`'s parameters in `table`, where it is a part of a HyenaModel.
    """
    rules = [
        (r".*norm\.weight", lambda w, _: w.fill_(1)),
        (r".*mixer\.short_conv\.(weight|bias)", lambda w, g: w.uniform_(-1, 1, generator=g)
         .div_(math.sqrt(config.short_conv_kernel))),
        (r".*mixer\.conv_bias", lambda w, g: w.normal_(0, 1, generator=g)),
        (r".*filter\.freq", lambda w, _: w.fill_(config.filter_sine_freq)),
        (r".*(out_proj|fc2)\.weight", lambda w, g: w.normal_(0, STD / math.sqrt(2 * config.num_layers), generator=g)),
        (r".*(bias|trunk_bias_\d+)", lambda w, _: w.zero_()),
        (r".*(weight|trunk_weight_\d+)", lambda w, g: w.normal_(0, STD, generator=g)),
    ]
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            if parameter.is_meta:  # it has no memory to fill
                continue
            name = prefix + own
            fill = next(rule for pattern, rule in rules if re.fullmatch(pattern, name))
            shape = list(parameter.shape)  # of one that FSDP2 has sharded, that without the sharding
            split = table[name].tp_dim
            if split is not None:
                shape[split] *= tensor.size
            value: Tensor = fill(torch.empty(shape, dtype=torch.float32, device="cpu"), _generator(seed, name))
            share = tensor_share(value, table[name], tensor.rank, tensor.size)
            if isinstance(parameter, DTensor):  # every rank has the whole share, and takes its own part of it
                share = distribute_tensor(share.to(parameter.device_mesh.device_type), parameter.device_mesh,
                                          parameter.placements, src_data_rank=None)
            parameter.copy_(share)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
