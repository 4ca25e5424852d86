"""Plans as tables for people, and as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Column, Table

from hyena_dist.cli.print_table import print_table
from hyena_dist.config.schema import Config
from hyena_dist.costs.devices import ESTIMATED, MEASURED
from hyena_dist.costs.plan import RECOMPUTE, Machines, Plan, fewest_gpus, longest
from hyena_dist.train.wording import amount, binary, duration

EXACT = "EXACT"
NO_TIME = 1e-6
"""Seconds below which a part of a step has no row."""


def answers(config: Config, machines: Machines, plans: Sequence[Plan], ranked: Sequence[Plan]) -> list[str]:
    """What is asked before one pays, each as a sentence."""
    gpus, said = machines.gpus, []
    found = longest(config, machines)
    if found:
        said.append(f"longest length on {_gpus(machines)}: {found[0]:,} tokens, with {how(found[1])}")
    if not ranked:
        least = min(plans, key=lambda plan: plan.bytes)
        said.append(f"nothing fits {binary(machines.gpu.memory)}: the least is {binary(least.bytes)} a rank, with "
                    f"{how(least)}: take more GPUs, larger ones, or shorter windows")
        return said
    best, parallel = ranked[0], ranked[0].config.parallel
    sizes = dict.fromkeys(RECOMPUTE, 0)
    for plan in ranked:
        train = plan.config.train
        if plan.config.parallel == parallel:
            sizes[train.activation_checkpointing] = max(sizes[train.activation_checkpointing], train.micro_batch_size)
    said.append("largest micro-batch that fits, split as in the first row: "
                + ", ".join(f"{size or 'none'} with {value}" for value, size in sizes.items())
                + " (train.activation_checkpointing)")
    said.append(f"recomputation: train.activation_checkpointing={best.config.train.activation_checkpointing} is the "
                "fastest that fits")
    fewest = fewest_gpus(config, machines)
    if fewest and fewest.machines.gpus < gpus:
        said.append(f"fewest GPUs: {fewest.machines.gpus}, with {how(fewest)}, {duration_of(fewest.seconds)} a step")
    elif fewest:
        said.append(f"fewest GPUs: all {gpus}" if gpus > 1 else "fewest GPUs: 1")
    return said


def how(plan: Plan) -> str:
    """A layout in words."""
    config, parallel = plan.config, plan.config.parallel
    sizes = (("tensor", parallel.tensor), ("context", parallel.context))
    split = [f"{name} {size}" for name, size in sizes if size > 1]
    if parallel.context > 1:
        split[-1] += f" by {parallel.context_method}"
    if parallel.sequence:
        split.append("sequence")
    return ", ".join([*split, engine_of(config), f"recompute {config.train.activation_checkpointing}",
                      f"micro-batch {config.train.micro_batch_size}"])


def engine_of(config: Config) -> str:
    return "FSDP2" if config.engine.name == "fsdp" else f"ZeRO {config.engine.zero_stage}"


def duration_of(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s" if seconds < 60 else duration(seconds)


def _gpus(machines: Machines) -> str:
    return f"{machines.gpus} x {machines.gpu.name}"


def print_plans(plans: Sequence[Plan], said: Sequence[str], machines: Machines, *, legal: int, fitting: int) -> None:
    """The ranked table, the first row in detail, and the answers."""
    print(f"{legal:,} legal layouts on {_gpus(machines)} ({machines.gpus_per_node} a node, "
          f"{binary(machines.gpu.memory)} each), {fitting:,} fit; the fastest of each way to split"
          + (f", and the run of {plans[0].config.train.steps:,} steps:" if plans else ":"))
    if plans:
        print_table(_ranking(plans))
        print(f"the first row: {how(plans[0])}")
        print_table(_bytes(plans[0]))
        print_table(_time(plans[0]))
    for line in said:
        print(line)


def _ranking(plans: Sequence[Plan]) -> Table:
    numbers = [Column(name, justify="right", no_wrap=True) for name in
               ("tensor", "context", "data", "micro", "a rank needs", "sent in node", "between", "a step", "the run")]
    tensor, context, data, micro, *rest = numbers
    method, engine, recompute = (Column(name, no_wrap=True) for name in ("method", "engine", "recompute"))
    table = Table(tensor, context, method, data, engine, recompute, micro, *rest)
    for plan in plans:
        parallel, train = plan.config.parallel, plan.config.train
        table.add_row(f"{parallel.tensor}{' +seq' if parallel.sequence else ''}", str(parallel.context),
                      parallel.context_method if parallel.context > 1 else "-", str(plan.layout.data),
                      engine_of(plan.config), train.activation_checkpointing, str(train.micro_batch_size),
                      binary(plan.bytes), binary(plan.links["inside"]), binary(plan.links["between"]),
                      duration_of(plan.seconds), duration(3600 * plan.hours))
    return table


def _bytes(plan: Plan) -> Table:
    table = Table("bytes of a rank", Column("", justify="right"), "", title=f"most at the {plan.memory.moment}",
                  title_justify="left")
    for name, size in plan.categories.items():
        if size:
            table.add_row(name, binary(size), ESTIMATED)
    table.add_row("all", binary(plan.bytes), ESTIMATED, style="bold")
    for (axis, kind), size in plan.sent.items():
        table.add_row(f"sent a step: {axis} ranks, {kind}", binary(size), EXACT)
    return table


def _time(plan: Plan) -> Table:
    rates = plan.machines.rates_of(plan.config)
    table = Table("seconds of a step", Column("", justify="right"), Column("work of a rank", justify="right"), "")
    work = plan.work
    amounts = {"product": f"{amount(work.products)} FLOPs", "fft": f"{amount(work.ffts)} FLOPs",
               "elements": f"{binary(work.bytes)} at least", "inside": binary(plan.links["inside"]),
               "between": binary(plan.links["between"])}
    for name, seconds in plan.parts.items():
        if seconds > NO_TIME or name in ("product", "fft"):
            table.add_row(WORDS[name], duration_of(seconds), amounts.get(name, ""), rates.source(name))
    table.add_row("recomputed", "in these", f"{amount(work.recomputed)} FLOPs", "") if work.recomputed else None
    table.add_row("all", duration_of(plan.seconds), "", _source(rates.sources, plan.parts), style="bold")
    return table


WORDS = {"product": "matrix products", "fft": "FFTs (on a GPU within elements)", "elements": "elementwise",
         "host": "the host's launches", "inside": "sending inside the node", "between": "sending between nodes"}


def _source(sources: Mapping[str, str], parts: Mapping[str, float]) -> str:
    return MEASURED if all(sources.get(name) == MEASURED for name, seconds in parts.items() if seconds) else ESTIMATED


def as_json(plans: Sequence[Plan], said: Sequence[str], *, legal: int, fitting: int) -> dict[str, Any]:
    """Everything that the tables show, in bytes, operations and seconds."""
    return {"legal": legal, "fitting": fitting, "answers": list(said), "plans": [_row(plan) for plan in plans]}


def _row(plan: Plan) -> dict[str, Any]:
    config, work, rates = plan.config, plan.work, plan.machines.rates_of(plan.config)
    return {"gpu": plan.machines.gpu.name, "gpus": plan.machines.gpus, "tensor": plan.layout.tensor,
            "context": plan.layout.context, "data": plan.layout.data, "sequence": config.parallel.sequence,
            "context_method": config.parallel.context_method, "engine": config.engine.name,
            "zero_stage": config.engine.zero_stage, "activation_checkpointing": config.train.activation_checkpointing,
            "micro_batch_size": config.train.micro_batch_size, "micro_batches": plan.layout.micro_batches,
            "bytes": {name: round(size) for name, size in plan.categories.items()},
            "bytes_of_a_rank": round(plan.bytes),
            "peak": plan.memory.moment, "sent": {f"{axis} {kind}": size for (axis, kind), size in plan.sent.items()},
            "links": {name: round(size) for name, size in plan.links.items()},
            "flops": {"product": work.products, "fft": work.ffts, "recomputed": work.recomputed},
            "elementwise_bytes": work.bytes, "seconds": plan.parts, "seconds_of_a_step": plan.seconds,
            "hours": plan.hours, "sources": {"bytes": ESTIMATED, "sent": EXACT,
                                             **{name: rates.source(name) for name in plan.parts}}}
