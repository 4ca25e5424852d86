"""The budget of a training step: for every part of the model the fewest bytes and operations, those that the code asks
for, and the time that the fewest take on a card. Counted on meta tensors, in seconds and without a GPU."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.attribution import Attribution
from benchmarks.counting import CallCounter, as_on_cuda
from benchmarks.memory import peak_tensor_bytes
from benchmarks.models import Size, autocast
from benchmarks.step import new_model
from benchmarks.timing import timed
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.optim import OptimSection
from hyena_dist.costs.memory import TrainingMemory, training_memory
from hyena_dist.costs.roofline import COPY_BYTES_PER_SECOND, PARTS, fewest, floor_seconds
from hyena_dist.engine.adam import guard
from hyena_dist.engine.grad_norm import clip_gradients, global_grad_norm
from hyena_dist.model.loss import token_loss
from hyena_dist.model.model import HyenaModel
from hyena_dist.ops.costs import Cost
from hyena_dist.ops.dropout import DropoutKey
from hyena_dist.parallel.groups import Axis
from hyena_dist.train.optimizer import build_optimizer

META = torch.device("meta")
TOTAL = "total"
_LABEL = "part of the step: "
_WARM_UP, _ROUNDS = 2, 3


@dataclass(frozen=True)
class Counted:
    """What one step in the middle of a run asks for."""

    parts: dict[str, Cost]
    signatures: Cost
    """By the tensors that calls name, each once and in place too, and by calls: less than what they do."""
    operators: dict[tuple[str, str], Cost]
    """By part and operator."""
    waits: dict[str, int]
    """Where the host waits for the device, and how often."""
    peak_bytes: int
    """Of all tensors: weights, moments, and what the step makes."""
    memory: TrainingMemory
    """The same by formula."""

    @property
    def total(self) -> Cost:
        return sum(self.parts.values(), Cost())


class Step:
    """A step as the engines make it: forward, loss, backward, gradient norm and clipping, AdamW."""

    def __init__(self, section: ModelSection, batch: int, precision: str, device: torch.device,
                 activation_checkpointing: str = "none", backend: str = "auto") -> None:
        """Of `batch` sequences of the model's longest length."""
        self.model: HyenaModel = new_model(section, device, activation_checkpointing, backend)
        self._precision, self._device, self._optim = precision, device, OptimSection()
        self._optimizer = build_optimizer(self.model, self.model.placement(), self._optim)
        self.ids = torch.zeros(batch, section.max_seq_len + 1, dtype=torch.int64, device=device)
        self._key = DropoutKey(seed=0, step=0, windows=torch.zeros(batch, dtype=torch.int64, device=device))

    def __call__(self) -> None:
        with autocast(self._device, self._precision):
            logits = self.model(self.ids[:, :-1], self._key)
        total, count = token_loss(logits, self.ids[:, 1:])
        del logits
        (total / count).backward()
        gradients = {name: weight.grad for name, weight in self.model.named_parameters() if weight.grad is not None}
        norm = global_grad_norm(gradients, None, Axis(), device=self._device)
        guard(self._optimizer, norm)
        clip_gradients(gradients.values(), norm, self._optim.grad_clip)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state_bytes(self) -> int:
        """Of the weights and the optimizer's state."""
        state = [value for values in self._optimizer.state.values() for value in values.values()]
        return sum(tensor.untyped_storage().nbytes() for tensor in [*self.model.parameters(), *state])


def count(section: ModelSection, batch: int, precision: str, activation_checkpointing: str = "none",
          backend: str = "auto") -> Counted:
    """Count the second step: the first makes the optimizer's state and what is cached. `backend`: of `ops`."""
    with as_on_cuda():
        step = Step(section, batch, precision, META, activation_checkpointing, backend)
        with CallCounter(META):
            step()
        with peak_tensor_bytes(META) as peak, CallCounter(META) as counter:
            step()
    memory = training_memory(section, section.max_seq_len, batch, precision=precision,
                             activation_checkpointing=activation_checkpointing, backend=backend)
    return Counted(counter.parts, counter.signatures, counter.operators, counter.waits,
                   step.state_bytes() + peak.bytes, memory)


def measure(section: ModelSection, batch: int, precision: str,
            device: torch.device) -> tuple[dict[str, float], float]:
    """Seconds that every part keeps a GPU busy, by the profiler, and seconds of a whole step without it. On a CPU the
    parts' seconds are those of the host."""
    step = Step(section, batch, precision, device)
    for _ in range(_WARM_UP):
        step()
    whole = statistics.median(timed(step, device)[0] for _ in range(_ROUNDS))
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        with _Labels():
            step()
        if cuda:
            torch.cuda.synchronize(device)
    # The host's row of a label has the kernels that were started under it; the device's own has the gaps between them.
    return {event.key.removeprefix(_LABEL): (event.device_time_total if cuda else event.cpu_time_total) / 1e6
            for event in profiler.key_averages()
            if event.key.startswith(_LABEL) and event.device_type == DeviceType.CPU}, whole


class _Labels(TorchDispatchMode):
    """Marks every call for the profiler with the part that it belongs to."""

    def __init__(self) -> None:
        super().__init__()
        self._attribution = Attribution()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with record_function(_LABEL + self._attribution.part(func, args)):
            return func(*args, **(kwargs or {}))


def report(sizes: Sequence[Size], precision: str, device: torch.device) -> dict[str, Any]:
    """The budget of a step of every size, as a result file holds it. `device` is a GPU, on which the parts are measured
    too, or meta."""
    rows, steps = [], []
    for size in sizes:
        counted = count(size.section(), size.batch, precision)
        seconds, whole, problem = _measured(size, precision, device)
        rows += _rows(size, precision, counted, seconds)
        steps.append({**_step(size, precision, counted), "seconds": whole, "note": problem})
    size = sizes[0]
    return {"subject": "roofline",
            "size": {"width": size.width, "layers": size.layers, "precision": precision, "device": device.type},
            "steps": steps, "rows": rows}


def _measured(size: Size, precision: str, device: torch.device) -> tuple[dict[str, float], float | None, str]:
    """What `measure` gives, or what kept it from that."""
    if device == META:
        return {}, None, ""
    try:
        return *measure(size.section(), size.batch, precision, device), ""
    except torch.OutOfMemoryError:
        return {}, None, "not measured: it does not fit into the device's memory"


def _step(size: Size, precision: str, counted: Counted) -> dict[str, Any]:
    """What is said of a whole step."""
    return {"length": size.length, "batch": size.batch, "launches": counted.total.launches,
            "bytes": counted.total.bytes, "signature_bytes": counted.signatures.bytes,
            "signature_calls": counted.signatures.launches, "peak_bytes": counted.peak_bytes,
            "formula_peak_bytes": counted.memory.total, "counted_floor_seconds": _floors(counted.parts, precision),
            "waits": counted.waits, "operators": _operators(counted)}


def _operators(counted: Counted) -> list[dict[str, Any]]:
    """The operators of every part, those that move most first."""
    found = [{"part": part, "operator": operator, "bytes": cost.bytes, "launches": cost.launches}
             for (part, operator), cost in counted.operators.items()]
    return sorted(found, key=lambda row: row["bytes"], reverse=True)


def _rows(size: Size, precision: str, counted: Counted, seconds: dict[str, float]) -> list[dict[str, Any]]:
    least = fewest(size.section(), size.length, size.batch, precision=precision)
    of_part = {part: (least.get(part, Cost()), counted.parts.get(part, Cost()), seconds.get(part))
               for part in PARTS if part in least or part in counted.parts}
    assert set(counted.parts) <= set(of_part), f"a part of no name: {sorted(set(counted.parts) - set(of_part))}"
    rows = [_row(size, part, *costs, _floors({part: costs[0]}, precision)) for part, costs in of_part.items()]
    return [*rows, _row(size, TOTAL, sum(least.values(), Cost()), counted.total, sum(seconds.values()) or None,
                        _floors(least, precision))]


def _floors(parts: Mapping[str, Cost], precision: str) -> dict[str, float]:
    """Seconds of every card for these parts, one after the other."""
    return {card: sum(floor_seconds(cost, card, precision) for cost in parts.values())
            for card in COPY_BYTES_PER_SECOND}


def _row(size: Size, part: str, least: Cost, counted: Cost, seconds: float | None,
         floors: dict[str, float]) -> dict[str, Any]:
    return {"length": size.length, "batch": size.batch, "part": part, "fewest_bytes": least.bytes,
            "counted_bytes": counted.bytes, "fewest_flops": least.flops, "counted_flops": counted.flops,
            "launches": counted.launches, "floor_seconds": floors, "seconds": seconds}


def shown(row: dict[str, Any], card: str | None = None) -> dict[str, str]:
    """A row as the terminal shows it; `card` is the one that it was measured on."""
    least, seconds = row["fewest_bytes"], row["seconds"]
    found = {"length": f"{row['length']:,}", "batch": f"{row['batch']:,}", "part": row["part"],
             "fewest GiB": f"{least / 2**30:,.3f}", "counted GiB": f"{row['counted_bytes'] / 2**30:,.3f}",
             "times": f"{row['counted_bytes'] / least:,.1f}" if least else "",
             "fewest TFLOP": f"{row['fewest_flops'] / 1e12:,.3f}" if row["fewest_flops"] else "",
             "counted TFLOP": f"{row['counted_flops'] / 1e12:,.3f}" if row["counted_flops"] else "",
             "launches": f"{row['launches']:,}",
             **{f"floor {name}, ms": f"{1e3 * floor:,.3f}" for name, floor in row["floor_seconds"].items()}}
    if seconds:
        found["measured, ms"] = f"{1e3 * seconds:,.3f}"
        found["share"] = f"{row['floor_seconds'][card] / seconds:.1%}" if card else ""
    return found


def card_of(device_name: str) -> str | None:
    """The card of COPY_BYTES_PER_SECOND that a device is; None: of another kind, or a slice."""
    return next((card for card in COPY_BYTES_PER_SECOND if card in device_name and "MIG" not in device_name), None)


def note(step: dict[str, Any]) -> str:
    """What is said of a step beside its parts."""
    peak, formula = step["peak_bytes"], step["formula_peak_bytes"]
    waits = ", ".join(f"{count} x {where}" for where, count in step["waits"].items()) or "never"
    floors = ", ".join(f"{1e3 * seconds:,.1f} ms on an {card}" for card, seconds in
                       step["counted_floor_seconds"].items())
    whole = "" if step["seconds"] is None else f"; the step takes {1e3 * step['seconds']:,.1f} ms"
    whole += f"; {step['note']}" if step["note"] else ""
    return (f"{step['length']:,} x {step['batch']:,}: {step['launches']:,} launches, {step['bytes'] / 2**30:,.1f} GiB"
            f" (by signatures alone {step['signature_calls']:,} and {step['signature_bytes'] / 2**30:,.1f}), at least "
            f"{floors}; "
            f"peak {peak / 2**30:,.2f} GiB, by formula {formula / 2**30:,.2f}; the host waits: {waits}{whole}")
