"""Counts what a step asks of a GPU, call by call: bytes, operations and kernel launches of every part of the model.

On meta tensors nothing is computed, and a step of any size is counted in seconds; the model takes the way there that it
takes on CUDA. What is counted is a floor of the code as it is: every call reads its inputs and writes its outputs once
through memory, except for the operators below, of which more is known.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.attribution import Attribution
from hyena_dist.model.kinds.formulas import fft_flops
from hyena_dist.ops.costs import Cost, declared_cost

aten = torch.ops.aten
TORCHS_OWN = ("aten", "prims", "c10d", "_c10d_functional", "fsdp")

FREE = {aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided, aten.detach,
        aten.alias, aten._unsafe_view, aten._reshape_alias, aten.lift_fresh, aten.resize_, aten.set_,
        aten._local_scalar_dense}
"""Memory and metadata only, and not views by their schema; and the read of a number, which is counted as a wait."""
OVERWRITTEN = {aten.copy_, aten.fill_, aten.zero_, aten.uniform_, aten.normal_}
"""In place, without reading what was there."""
FFTS = {aten._fft_r2c, aten._fft_c2r, aten._fft_c2c}
FFT_PASSES = 1
"""Reads and writes of the whole data in a transform. cuFFT makes one up to some 8,192 points and two or more beyond; it
counts as one, the fewest that there can be: a library or a kernel of another kind need not make more."""
LAUNCHES = {aten.native_layer_norm_backward: 2, aten.constant_pad_nd: 2}
"""Kernels of one call, where there are more than one: of the input and of the weights; a fill and a copy."""
MULTI_TENSOR_CHUNK, MULTI_TENSOR_BLOCKS, MULTI_TENSOR_LISTS = 65536, 320, (110, 64, 48, 36, 30)
"""torch's multi_tensor_apply: elements of a block, blocks of a launch, tensors of a launch by the number of lists."""

HOST_READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_consecutive,
              aten.unique_dim}
"""The host waits for the device to know a value or a shape."""


class CallCounter(TorchDispatchMode):
    """Adds up the calls inside the block, backward passes included. Calls on tensors of the host cost the GPU nothing.

    Raises:
        ValueError: a custom operator that has not declared its cost (`hyena_dist.ops.costs`).
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.parts: dict[str, Cost] = {}
        self.waits: Counter[str] = Counter()
        """Calls in which the host waits for the device: reads of a value, and copies that block. A tensor that torch
        makes of Python numbers is not seen."""
        self.operators: dict[tuple[str, str], Cost] = {}
        """By part and operator."""
        self.signatures = Cost()
        """By signatures alone: each tensor that a call names once, and each call as one launch."""
        self._kind = device.type
        self._attribution = Attribution()

    @property
    def total(self) -> Cost:
        return sum(self.parts.values(), Cost())

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        part = self._attribution.part(func, args)
        waits = self._waits(func, args, kwargs)
        if waits:
            self.waits[f"{func} in {part}"] += 1
        made_up = waits and self._kind == "meta"
        result = _made_up(func, args, kwargs) if made_up else func(*args, **kwargs)
        if is_on((args, kwargs, result), self._kind):
            cost = call_cost(func, args, kwargs, result)
            self.parts[part] = self.parts.get(part, Cost()) + cost
            if cost.launches:
                key = part, str(func)
                self.operators[key] = self.operators.get(key, Cost()) + cost
                self.signatures += _signature(func, args, kwargs, result, cost)
        return result

    def _waits(self, func: Any, args: Any, kwargs: Any) -> bool:
        packet = func.overloadpacket
        if packet in HOST_READS:
            return is_on(args, self._kind)
        if packet is aten._to_copy:
            here, there, lazy = args[0].device, kwargs.get("device"), kwargs.get("non_blocking")
        elif packet is aten.copy_:
            here, there, lazy = args[1].device, args[0].device, args[2] if len(args) > 2 else False
        else:
            return False
        return not lazy and there is not None and self._kind in (here.type, there.type) and here.type != there.type


def _made_up(func: Any, args: Any, kwargs: Any) -> Any:
    """In place of a value that a meta tensor does not have: ones, with which a step goes on."""
    packet = func.overloadpacket
    if packet is aten._local_scalar_dense:
        return torch.ones((), dtype=args[0].dtype).item()
    if packet is aten._to_copy and kwargs["device"].type == "cpu":
        return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
    if packet is aten.copy_ and args[0].device.type == "cpu":
        return args[0].fill_(1)
    return func(*args, **kwargs)


def call_cost(func: Any, args: Any, kwargs: Any, result: Any) -> Cost:
    """Of one call of an operator.

    Raises:
        ValueError: a custom operator that has not declared it.
    """
    declared = declared_cost(func.name().partition(".")[0])
    if declared is not None:
        return declared(*args, **kwargs)
    if func.namespace not in TORCHS_OWN:
        raise ValueError(f"operator {func.name()} has not declared its cost: call hyena_dist.ops.costs.declare_cost "
                         "where it is registered")
    packet = func.overloadpacket
    if packet in FREE or _is_view(func):
        return Cost()
    read, written = _moved(func, args, kwargs, result)
    moved = sum(map(_bytes, read)) + sum(map(_bytes, written))
    if packet in FFTS:
        return _transform(func, args, result)
    if packet.__name__.startswith(("_foreach_", "_fused_")):
        return Cost(moved, 0.0, _multi_tensor_launches(args))
    flops = flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0.0
    return Cost(moved, flops, LAUNCHES.get(packet, 1))


def _signature(func: Any, args: Any, kwargs: Any, result: Any, cost: Cost) -> Cost:
    """What a call looks like from outside; of a custom operator what it declares."""
    if func.namespace not in TORCHS_OWN:
        return cost
    named = {id(leaf): leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)}
    return Cost(sum(tensor.numel() * tensor.element_size() for tensor in named.values()), cost.flops, 1)


def _is_view(func: Any) -> bool:
    return any(found.alias_info is not None and not found.alias_info.is_write for found in func._schema.returns)


def _moved(func: Any, args: Any, kwargs: Any, result: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that a call reads, and that it writes."""
    read: list[Tensor] = []
    written: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        tensors = _tensors(value)
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        # The fused optimizers may unscale gradients in place, and are not asked to.
        if is_written and argument.name != "grads":
            written += tensors
        if not is_written or not (argument.kwarg_only or func.overloadpacket in OVERWRITTEN):
            read += tensors
    known = {id(tensor) for tensor in written}
    return read, written + [tensor for tensor in _tensors(result) if id(tensor) not in known]


def _transform(func: Any, args: Any, result: Tensor) -> Cost:
    """An FFT as torch calls cuFFT: it scales the result in a pass of its own, and a transform to real numbers destroys
    its input, so that torch hands it a copy."""
    packet, given = func.overloadpacket, args[0]
    inverse_scale = bool(args[2])
    to_real = packet is aten._fft_c2r
    moved = FFT_PASSES * (_bytes(given) + _bytes(result)) + 2 * _bytes(result) * inverse_scale
    moved += 2 * _bytes(given) * to_real
    real, dims = (result if to_real else given), args[1]
    points = math.prod(real.shape[dim] for dim in dims)
    work = real.numel() / max(1, points) * fft_flops(points) / (1 if packet is aten._fft_c2c else 2)
    return Cost(moved, work, 1 + inverse_scale + to_real)


def _multi_tensor_launches(args: Any) -> int:
    lists = [value for value in args if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor)]
    blocks = sum(-(-tensor.numel() // MULTI_TENSOR_CHUNK) for tensor in lists[0])
    most = MULTI_TENSOR_LISTS[min(len(lists), len(MULTI_TENSOR_LISTS)) - 1]
    return max(-(-len(lists[0]) // most), -(-blocks // MULTI_TENSOR_BLOCKS))


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] if isinstance(tree, (list, tuple)) else []


def is_on(tree: Any, kind: str) -> bool:
    """Whether a tensor among arguments or results is on this kind of device."""
    return any(isinstance(leaf, Tensor) and leaf.device.type == kind for leaf in tree_leaves(tree))


def _bytes(tensor: Tensor) -> int:
    """Of the elements that there are in memory: a broadcast dimension is one."""
    shape = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size]
    return tensor.element_size() * math.prod(shape)


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Let torch's optimizers and gradient norms take on meta tensors the way that they take on CUDA: their fused and
    multi-tensor operators, for which torch has shapes on meta, but which it does not choose there."""
    import torch.optim.optimizer as optimizers
    from torch.utils import _foreach_utils as utils

    def also_meta(devices: Callable[[], list[str]]) -> Callable[[], list[str]]:
        return lambda: [*devices(), "meta"]

    names = ("_get_foreach_kernels_supported_devices", "_get_fused_kernels_supported_devices")
    places: Iterable[tuple[Any, str]] = [(module, name) for module in (optimizers, utils) for name in names]
    with ExitStack() as stack:
        for module, name in places:
            stack.enter_context(patch.object(module, name, also_meta(getattr(module, name))))
        yield
