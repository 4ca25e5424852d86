"""The budget of a step: its table adds up to what is counted, what operators declare is in it, and a step does not wait
for the device."""

import dataclasses
import json
from functools import cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import roofline
from benchmarks.counting import CallCounter, as_on_cuda, call_cost, is_on
from benchmarks.models import Size
from benchmarks.roofline import META, Step
from hyena_dist.costs import roofline as formulas
from hyena_dist.ops import costs
from hyena_dist.ops.costs import Cost, declare_cost
from launchers.bench import main

GIB = 2**30
SMALL = Size(96, 16, batch=2, layers=2)


class _Whole(TorchDispatchMode):
    """Every call, without knowledge of parts. It holds no tensor: a gradient that is held is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.cost = Cost()

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if is_on((args, kwargs, result), "meta"):
            self.cost += call_cost(func, args, kwargs or {}, result)
        return result


def small_step(precision: str = "bf16") -> Step:
    step = Step(SMALL.section(), SMALL.batch, precision, META)
    with CallCounter(META):
        step()
    return step


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_table_adds_up_to_what_is_counted(precision):
    found = roofline.report([SMALL], precision, META)
    rows = {row["part"]: row for row in found["rows"]}
    total = rows.pop("total")
    with as_on_cuda():
        step = small_step(precision)
        with _Whole() as counted, CallCounter(META):  # the inner mode sees a call first, and makes up what is read
            step()
        whole = counted.cost
    for key, value in (("counted_bytes", whole.bytes), ("counted_flops", whole.flops), ("launches", whole.launches)):
        assert value == pytest.approx(total[key], rel=1e-12), key
        assert value == pytest.approx(sum(row[key] for row in rows.values()), rel=1e-12), key
        assert value > 0
    assert total["fewest_bytes"] == sum(row["fewest_bytes"] for row in rows.values())
    for card, floor in total["floor_seconds"].items():
        assert floor == pytest.approx(sum(row["floor_seconds"][card] for row in rows.values()))
    assert total["counted_bytes"] > total["fewest_bytes"]


def test_products_are_as_torch_counts_them():
    with as_on_cuda():
        step = small_step()
        with FlopCounterMode(display=False) as plain, CallCounter(META) as counter:
            step()
    transforms = counter.parts[formulas.LONG_CONV].flops
    assert counter.total.flops - transforms == plain.get_total_flops()
    assert transforms > 0, "torch's counter knows no transform"


@pytest.mark.parametrize(("values", "precision", "recompute"), [
    ({"hyena_order": 3}, "fp16", "none"), ({"layer_pattern": "HA", "num_attention_heads": 2}, "bf16", "full"),
    ({"resid_dropout": 0.1, "embed_dropout": 0.1}, "fp32", "selective"), ({"max_seq_len": 97}, "bf16", "block")])
def test_every_model_can_be_counted(values, precision, recompute):
    section = dataclasses.replace(SMALL.section(), **values)
    found = roofline.count(section, 3, precision, recompute)
    assert set(found.parts) <= set(formulas.PARTS)
    more = roofline.count(section, 6, precision, recompute)
    assert found.total.launches <= more.total.launches < 2 * found.total.launches
    assert 1.5 * found.total.bytes < more.total.bytes < 2 * found.total.bytes, "weights and filters are the same"
    least = formulas.fewest(section, section.max_seq_len, 3, precision=precision)
    assert sum(cost.bytes for cost in least.values()) < found.total.bytes


def test_parts_are_told_apart():
    """By what each must multiply: norms, gates and the loss nothing, the others as the formula of the model says."""
    section = dataclasses.replace(SMALL.section("HA"), hyena_order=3)
    found = roofline.count(section, 2, "fp32").parts
    least = formulas.fewest(section, section.max_seq_len, 2)
    for part in (formulas.PROJECTIONS, formulas.MLP, formulas.HEAD):
        assert found[part].flops == least[part].flops, part
    for part in (formulas.NORMS, formulas.GATES, formulas.LOSS, formulas.ENGINE,
                 formulas.OPTIMIZER, formulas.SHORT_CONV):
        assert found[part].flops == 0, part
        assert found[part].launches > 0, part
    for part in (formulas.FILTER, formulas.LONG_CONV):
        assert found[part].flops == pytest.approx(least[part].flops, rel=0.5), part


def test_a_measured_step_has_the_same_parts():
    """On a CPU, where the parts' seconds are the host's."""
    seconds, whole = roofline.measure(SMALL.section(), 2, "bf16", torch.device("cpu"))
    assert set(seconds) == set(roofline.count(SMALL.section(), 2, "fp32").parts)
    assert 0 < whole < 60
    assert all(value > 0 for value in seconds.values())
    (row,) = [row for row in roofline.report([SMALL], "bf16", torch.device("cpu"))["rows"] if row["part"] == "mlp"]
    shown = roofline.shown(row, "H100")
    assert shown["share"].endswith("%")
    assert "share" not in roofline.shown({**row, "seconds": None}, "H100")


def test_a_step_that_does_not_fit_is_counted_all_the_same(monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(roofline, "measure", too_large)
    found = roofline.report([SMALL], "bf16", torch.device("cpu"))
    assert "does not fit" in roofline.note(found["steps"][0])
    assert "does not fit" not in roofline.note({**found["steps"][0], "note": ""})
    assert all(row["seconds"] is None and row["launches"] >= 0 for row in found["rows"])


@pytest.mark.parametrize(("name", "card"), [
    ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-80GB", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None)])
def test_a_card_is_known_by_its_name(name, card):
    assert roofline.card_of(name) == card


@pytest.fixture
def dummy():
    """A custom operator of ours whose kernel reads its input twice."""
    @torch.library.custom_op("hyena_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @twice.register_fake
    def _(x):
        return torch.empty_like(x)

    yield twice
    costs._declared.pop("hyena_test::twice", None)


def test_a_custom_operator_counts_as_it_declares(dummy):
    x = torch.empty(64, 32, device=META)
    with pytest.raises(ValueError, match=r"hyena_test::twice has not declared its cost"), CallCounter(META):
        dummy(x)
    declare_cost("hyena_test::twice", lambda x: Cost(3 * x.numel() * x.element_size(), x.numel(), 2))
    with CallCounter(META) as counter:
        dummy(x)
    assert counter.total == Cost(3 * 4 * 64 * 32, 64 * 32, 2)
    assert counter.signatures == counter.total, "its own kernels are not seen from outside"


def test_a_call_reads_and_writes():
    x = torch.empty(8, 4, device=META)
    cases = [(lambda: x + x[0], 4 * (32 + 4 + 32), 1), (lambda: x.add_(x), 4 * 3 * 32, 1),
             (lambda: x.copy_(x[0].expand(8, 4)), 4 * (4 + 32), 1), (lambda: x.zero_(), 4 * 32, 1),
             (lambda: torch.mul(x, x, out=torch.empty_like(x)), 4 * 3 * 32, 1), (lambda: x.t()[1:].unbind(0), 0, 0),
             (lambda: torch.empty(100, device=META), 0, 0),
             (lambda: torch.fft.rfft(x), 4 * 32 + 8 * 24, 1),
             # A copy of the 4 numbers that it destroys, the transform to 6, and their scale.
             (lambda: torch.fft.irfft(x.to(torch.complex64)), 4 * 32 + 8 * 32 + 2 * 8 * 32 + 8 * 32 + 3 * 4 * 48, 4),
             (lambda: torch._foreach_mul_([x, x], 2.0), 4 * 4 * 32, 1),
             (lambda: torch._foreach_mul_([torch.empty(0, device=META)] * 200, 2.0), 0, 2)]
    for work, moved, launches in cases:
        with CallCounter(META) as counter:
            work()
        assert (counter.total.bytes, counter.total.launches) == (moved, launches)


def test_a_step_does_not_wait_for_the_device():
    with as_on_cuda():
        step = small_step()
        with CallCounter(META) as counter:
            step()
        assert counter.waits == {}
        waits = [lambda: float(step.ids.sum()), lambda: bool(step.ids.any()), lambda: step.ids.cpu(),
                 lambda: torch.empty(step.ids.shape).copy_(step.ids),
                 lambda: torch.ones(3).to(META)]
        with CallCounter(META) as counter:
            for wait in waits:
                wait()
            torch.ones(3).to(META, non_blocking=True)
        assert sum(counter.waits.values()) == len(waits), "the control"


def test_the_command_writes_what_it_shows(tmp_path, capsys):
    assert main(["step", "--roofline", "--device", "meta", "--layers", "1", "--width", "8", "--lengths", "64", "128",
                 "--dtype", "bf16", "--threads", "1", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("roofline-1x8-")
    result = json.loads(path.read_text())
    assert [step["length"] for step in result["steps"]] == [64, 128]
    for row in result["rows"]:
        assert f"{row['launches']:,}" in shown


@pytest.mark.parametrize("arguments", [["conv", "--device", "meta"], ["step", "--device", "meta"],
                                       ["step", "--roofline", "--device", "cpu"],
                                       ["step", "--roofline", "--dry-run"]])
def test_what_cannot_be_counted_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "--device" in capsys.readouterr().err


# Bars of the step on a GPU, in half precision. Bytes are by signatures alone, in which they were set: the step counted
# 61,009 launches and 2,741 GiB of them before the operator had a path of its own for GPUs.
MILLION, SHORT = Size(2**20, 256, batch=1, layers=8), Size(1024, 128, batch=4, layers=2)


@cache
def million(backend: str, activation_checkpointing: str = "none") -> roofline.Counted:
    return roofline.count(MILLION.section(), MILLION.batch, "bf16", activation_checkpointing, backend)


def test_a_million_tokens_stay_below_the_bars():
    found = million("torch")
    print(f"{found.total.launches:,} calls, {found.signatures.bytes / GIB:,.0f} GiB, {found.peak_bytes / 1e9:.0f} GB")
    assert found.total.launches <= 12_000
    assert found.signatures.bytes <= 2000 * GIB
    assert found.peak_bytes < 60e9
    assert found.peak_bytes == pytest.approx(found.memory.total, rel=0.1)
    assert found.waits == {}


def test_a_million_tokens_by_kernels_stay_below_the_bars():
    """By what the kernels declare. The control: torch's operations move more than twice as much."""
    pytest.importorskip("triton", reason="needs the extra `kernels`")
    found = million("triton")
    print(f"{found.total.launches:,} launches, {found.total.bytes / GIB:,.0f} GiB, {found.peak_bytes / GIB:.1f} GiB")
    assert found.total.launches <= 2_000
    fewest = sum(cost.bytes for cost in formulas.fewest(MILLION.section(), 2**20, 1, precision="bf16").values())
    assert found.total.bytes <= 1.4 * fewest
    assert found.peak_bytes <= 40 * GIB
    assert found.peak_bytes == pytest.approx(found.memory.total, rel=0.1)
    assert million("torch").total.bytes > 1_800 * GIB
    assert million("torch").total.launches > 4_000


def test_a_million_tokens_by_kernels_fit_into_40_gigabytes_when_a_little_is_computed_again():
    """The control: with nothing computed again they do not."""
    pytest.importorskip("triton", reason="needs the extra `kernels`")
    none, selective = million("triton"), million("triton", "selective")
    print(f"{selective.total.bytes / GIB:,.0f} GiB, {selective.peak_bytes / 1e9:.1f}, {none.peak_bytes / 1e9:.1f} GB")
    assert selective.peak_bytes <= 32e9
    assert none.peak_bytes > 40e9
    assert selective.total.bytes <= 1.05 * none.total.bytes


@pytest.mark.parametrize(("layers", "width", "length", "batch", "order"), [
    (2, 128, 65_536, 1, 2), (8, 256, 200_000, 1, 2), (4, 256, 8192, 4, 3), (4, 256, 1024, 16, 2)])
def test_the_memory_formula_knows_the_backend(layers, width, length, batch, order):
    """By kernels it is that of the tensors; torch's transforms work in memory besides, which is no tensor's."""
    pytest.importorskip("triton", reason="needs the extra `kernels`")
    section = dataclasses.replace(Size(length, width, batch=batch, layers=layers).section(), hyena_order=order)
    kernels, plain = (roofline.count(section, batch, "bf16", backend=backend) for backend in ("triton", "torch"))
    print(kernels.memory.total / kernels.peak_bytes, plain.memory.total / plain.peak_bytes)
    assert 0.98 <= kernels.memory.total / kernels.peak_bytes <= 1.2
    assert plain.memory.total >= plain.peak_bytes
    assert plain.peak_bytes > 1.2 * kernels.memory.total  # the control


def test_a_short_step_stays_below_its_bar():
    found = roofline.count(SHORT.section(), SHORT.batch, "bf16")
    print(f"{found.total.launches:,} launches")
    assert found.total.launches <= 350
