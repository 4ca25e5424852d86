"""Which Adam is taken, where each keeps its step count, and that it goes on from a count that was set.

The fakes have the constructor, the state and the arithmetic of the real ones: NVIDIA Apex needs CUDA, DeepSpeed's
operator minutes of a compiler.
"""

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hyena_dist.config.sections.engine import EngineSection
from hyena_dist.config.sections.optim import OptimSection
from hyena_dist.engine.adam import create_state, guard, require_adam, set_step_count, step_count
from hyena_dist.train import optimizer as optim
from hyena_dist.train.optimizer import build_optimizer, nvidia_apex, parameter_groups
from tests.compare import rel
from tests.unit.test_optim import TABLE, Model

TOLERANCE = 1e-6  # float32 rounding; an Adam that starts counting afresh moves a weight by 1e-1 of its step
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6}


def adamw(weight: Tensor, grad: Tensor, state: dict[str, Tensor], step: int, group: dict[str, Any]) -> None:
    """AdamW (Loshchilov and Hutter 2019), written out."""
    beta1, beta2 = group["betas"]
    state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    second = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt() + group["eps"]
    weight.addcdiv_(state["exp_avg"] / (1 - beta1**step), second, value=-group["lr"])


class FusedAdam(torch.optim.Optimizer):
    """As NVIDIA Apex's: one count for each parameter group, made at its first step."""

    def __init__(self, params: Any, lr: float = 1e-3, bias_correction: bool = True, betas: tuple = (0.9, 0.999),
                 eps: float = 1e-8, adam_w_mode: bool = True, weight_decay: float = 0.0, amsgrad: bool = False,
                 set_grad_none: bool = True, capturable: bool = False) -> None:
        assert adam_w_mode
        assert set_grad_none
        assert not amsgrad
        assert not capturable
        super().__init__(params, {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps,
                                  "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state.update(exp_avg=torch.zeros_like(weight), exp_avg_sq=torch.zeros_like(weight))
                adamw(weight, weight.grad, state, group["step"], group)


FusedAdam.__module__ = "apex.optimizers.fused_adam"


class CpuAdamOp(ModuleType):
    """As DeepSpeed's operator `cpu_adam`."""

    def create_adam(self, *_args: Any) -> None:
        pass

    def destroy_adam(self, _number: int) -> None:
        pass

    def adam_update(self, _number: int, step: int, lr: float, beta1: float, beta2: float, eps: float, decay: float,
                    _bias_correction: bool, weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        adamw(weight, grad, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, step,
              {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": decay})


@pytest.fixture
def cpu_adam(monkeypatch: pytest.MonkeyPatch) -> Callable[..., torch.optim.Optimizer]:
    from deepspeed.ops.adam import DeepSpeedCPUAdam, cpu_adam
    monkeypatch.setattr(cpu_adam.CPUAdamBuilder, "load", lambda _self: CpuAdamOp("cpu_adam"))
    return DeepSpeedCPUAdam


def weights() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(5))]


def groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": [parameter], "weight_decay": decay} for parameter, decay in zip(parameters, (0.1, 0.0),
                                                                                         strict=True)]


def take(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for i, parameter in enumerate(parameters):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * step + i))
        optimizer.step()


@pytest.mark.parametrize("kind", ["torch", "torch fused", "apex", "deepspeed"])
def test_a_count_that_was_set_goes_on(kind: str, cpu_adam: Callable[..., torch.optim.Optimizer]) -> None:
    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if kind.startswith("torch"):
            return torch.optim.AdamW(groups(parameters), fused=kind != "torch", **SETTINGS)
        return (FusedAdam if kind == "apex" else cpu_adam)(groups(parameters), **SETTINGS)

    expected = weights()
    take(torch.optim.AdamW(groups(expected), **SETTINGS), expected, range(4))

    first, second = weights(), weights()
    before, after = make(first), make(second)
    for optimizer, parameters in ((before, first), (after, second)):
        require_adam(optimizer)
        create_state(optimizer, parameters)
        assert step_count(optimizer, parameters) == 0
    take(before, first, range(2))
    assert step_count(before, first) == 2
    with torch.no_grad():
        for source, target in zip(first, second, strict=True):
            target.copy_(source)
            for key in ("exp_avg", "exp_avg_sq"):
                after.state[target][key].copy_(before.state[source][key])
    forgetful = [nn.Parameter(parameter.detach().clone()) for parameter in second]
    control = make(forgetful)
    create_state(control, forgetful)
    for source, target in zip(second, forgetful, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            control.state[target][key].copy_(after.state[source][key])
    set_step_count(after, second, 2)
    take(after, second, range(2, 4))
    take(control, forgetful, range(2, 4))
    assert step_count(after, second) == 4
    errors, bug = (max(rel(a, b) for a, b in zip(found, expected, strict=True)) for found in (second, forgetful))
    print(f"{kind}: {errors:.1e}, tolerance {TOLERANCE}; with a count that starts afresh {bug:.1e}")
    assert errors < TOLERANCE < bug / 100


def test_other_optimizers_are_refused() -> None:
    with pytest.raises(ValueError, match="must be torch's Adam or AdamW, .* got SGD"):
        require_adam(torch.optim.SGD(weights(), lr=0.1))


# Which Adam


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on the path in which packages can be put, all of them forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("apex", "amp_C")]:
        del sys.modules[name]


def put(site: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    importlib.invalidate_caches()


APEX = """
class FusedAdam:
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0., amsgrad=False, set_grad_none=True, capturable=False):
        self.params, self.settings = params, (lr, betas, eps, adam_w_mode, capturable)
"""
OPTIM = OptimSection(lr=0.5, betas=(0.8, 0.95), eps=1e-6)


def put_nvidia_apex(site: Path) -> None:
    put(site, {"amp_C.py": "", "apex/__init__.py": "", "apex/optimizers/fused_adam.py": APEX,
               "apex/optimizers/__init__.py": "from apex.optimizers.fused_adam import FusedAdam\n"})


def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "_on_cuda", lambda _model: True)


def test_nvidia_apex_is_taken_on_cuda_with_the_published_groups(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_nvidia_apex(site)
    model = Model()
    assert type(build_optimizer(model, TABLE, OPTIM)) is torch.optim.AdamW, "it needs CUDA"
    on_cuda(monkeypatch)
    for engine in (None, *(EngineSection(zero_stage=stage) for stage in (0, 1, 2))):
        optimizer: Any = build_optimizer(model, TABLE, OPTIM, engine)
        assert type(optimizer).__module__ == "apex.optimizers.fused_adam"
        assert optimizer.settings == (0.5, (0.8, 0.95), 1e-6, True, False)
        assert [(group["params"], group["weight_decay"]) for group in optimizer.params] == [
            ([model.linear.weight, model.linear.bias], 0.1), ([model.filter], 0.0)]


@pytest.mark.parametrize("engine", [EngineSection(zero_stage=3), EngineSection(name="fsdp"),
                                    EngineSection(zero_stage=1, offload="optimizer")])
def test_nvidia_apex_is_left_alone_where_it_does_not_fit(site: Path, monkeypatch: pytest.MonkeyPatch,
                                                         engine: EngineSection) -> None:
    put_nvidia_apex(site)
    on_cuda(monkeypatch)
    optimizer = build_optimizer(Model(), TABLE, OPTIM, engine)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["fused"]


def test_the_web_toolkit_of_the_same_name_is_never_imported(site: Path, monkeypatch: pytest.MonkeyPatch,
                                                            caplog: pytest.LogCaptureFixture) -> None:
    on_cuda(monkeypatch)
    put(site, {"apex/__init__.py": "raise SystemExit('the impostor was imported')\n"})
    assert type(build_optimizer(Model(), TABLE, OPTIM)) is torch.optim.AdamW
    assert "is not NVIDIA's and is left alone" in caplog.text
    put(site, {"amp_C.py": ""})
    assert nvidia_apex() is None, "its CUDA extension alone makes it no Apex"
    assert "apex" not in sys.modules


def test_nvidia_apex_without_its_extensions_is_left_alone(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    put_nvidia_apex(site)
    (site / "amp_C.py").unlink()
    importlib.invalidate_caches()
    assert nvidia_apex() is None
    assert "without its CUDA extensions (amp_C)" in caplog.text


def test_deepspeeds_adam_is_taken_for_offloaded_state_where_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineSection(zero_stage=2, offload="optimizer")
    from hyena_dist.engine import deepspeed
    monkeypatch.setattr(deepspeed, "installed_ops", {"cpu_adam": False})
    assert type(build_optimizer(Model(), TABLE, OPTIM, engine)) is torch.optim.AdamW, "it is not built on the fly"
    monkeypatch.setattr(deepspeed, "installed_ops", {"cpu_adam": True})
    monkeypatch.setattr(deepspeed, "accelerator_name", "another")
    assert type(build_optimizer(Model(), TABLE, OPTIM, engine)) is torch.optim.AdamW, "built for another device"
    monkeypatch.setattr(deepspeed, "accelerator_name", deepspeed.get_accelerator()._name)
    monkeypatch.setattr("deepspeed.ops.adam.cpu_adam.CPUAdamBuilder.load", lambda _self: CpuAdamOp("cpu_adam"))
    optimizer = build_optimizer(Model(), TABLE, OPTIM, engine)
    assert type(optimizer).__name__ == "DeepSpeedCPUAdam"
    assert optimizer.adam_w_mode
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert type(build_optimizer(Model(), TABLE, OPTIM, EngineSection(zero_stage=2))) is torch.optim.AdamW


@pytest.mark.parametrize("norm", [0.0, 3e38, float("inf"), float("-inf"), float("nan")])
def test_a_guarded_step_changes_nothing_unless_the_norm_is_finite(norm: float) -> None:
    model = Model()
    optimizer = build_optimizer(model, TABLE, OPTIM)
    create_state(optimizer, model.parameters())
    before = [weight.detach().clone() for weight in model.parameters()]
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, 1.0 if math.isfinite(norm) else norm)
    assert guard(optimizer, torch.tensor(norm))
    optimizer.step()
    kept = [torch.equal(weight, old) for weight, old in zip(model.parameters(), before, strict=True)]
    assert not any(kept) if math.isfinite(norm) else all(kept), kept
    assert step_count(optimizer, list(model.parameters())) == math.isfinite(norm)
    assert all(state[key].isfinite().all() for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))


def test_fused_equals_unfused_on_cpu() -> None:
    models = Model(), Model()
    models[1].load_state_dict(models[0].state_dict())
    fused = build_optimizer(models[0], TABLE, OPTIM)
    plain = torch.optim.AdamW(parameter_groups(models[1].named_parameters(), TABLE, 0.1), lr=0.5, betas=(0.8, 0.95),
                              eps=1e-6)
    assert fused.defaults["fused"]
    for step in range(5):
        for model in models:
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        fused.step()
        plain.step()
    errors = [rel(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True)]
    print(f"fused AdamW on CPU differs by {max(errors):.1e}, tolerance 1e-6")
    assert max(errors) < 1e-6
