"""A coordinate check: do activations, and their changes by training, stay of one size as a model becomes wider?

Where they do, one learning rate serves all widths. Two rules are tried on real bases: the published one, whose initial
values and learning rate know nothing of the width, and a derived one, that of the maximal update (docs/scaling.md).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hyena_dist.config.errors import ConfigError
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.optim import OptimSection
from hyena_dist.data.manifest import Manifest
from hyena_dist.data.stream import TrainStream
from hyena_dist.model.config import hyena_config
from hyena_dist.model.loss import token_loss
from hyena_dist.model.model import HyenaModel
from hyena_dist.tasks.scaling.pictures import figure

RULES = ("published", "maximal update")
MATRICES = ("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")
"""Ends of the names of weights both of whose dimensions grow with the width."""


@dataclass(frozen=True)
class Check:
    """Root mean squares of one rule: of every place in the model, by width."""

    rule: str
    widths: tuple[int, ...]
    places: tuple[str, ...]
    before: Tensor
    """Of activations before training, [widths, places]."""
    after: Tensor
    """The same after the steps."""
    changes: Tensor
    """Of what the steps changed in them."""
    losses: tuple[float, ...]
    """Of each width, the training loss of the last step."""

    def slopes(self, values: Tensor) -> list[float]:
        """Exponents of the width, of each place: 0 is flat."""
        logs = np.log(np.array(self.widths, dtype=float))
        return [float(np.polyfit(logs, np.log(np.maximum(values[:, j].numpy(), 1e-30)), 1)[0])
                for j in range(values.shape[1])]


def check_widths(shards: str | Path, rule: str, widths: Sequence[int], *, steps: int = 20, lr: float = 2e-3,
                 layers: int = 2, seq_len: int = 128, batch: int = 4, seed: int = 0) -> Check:
    """Train a model of each width on the same bases, and look at it before and after on a batch of its own.

    Args:
        rule: of `RULES`; at the smallest width both are the same.
        lr: at the smallest width.

    Raises:
        UserError: fewer than two widths, unreadable shards, or none with bases to train on.
    """
    if len(set(widths)) < 2 or min(widths) < 1:
        raise ConfigError(f"widths {', '.join(map(str, widths))}: give at least two different ones, greater than 0")
    stream = TrainStream(Manifest.load(shards), seq_len=seq_len, seed=seed)
    widths = tuple(sorted(set(widths)))
    found = [_train(stream, rule, width, widths[0], steps=steps, lr=lr, batch=batch, seed=seed,
                    section=ModelSection(num_layers=layers, hidden_size=width, max_seq_len=seq_len, embed_dropout=0.0))
             for width in widths]
    places = tuple(found[0][0])

    def table(kind: int) -> Tensor:
        return torch.tensor([[of_width[kind][place] for place in places] for of_width in found])

    return Check(rule, widths, places, table(0), table(1), table(2), tuple(of_width[3] for of_width in found))


def _train(stream: TrainStream, rule: str, width: int, smallest: int, *, section: ModelSection, steps: int, lr: float,
           batch: int, seed: int) -> tuple[dict[str, float], dict[str, float], dict[str, float], float]:
    """(activations before, after, changes, the last loss) of one width."""
    model = HyenaModel(hyena_config(section), seed=seed)
    groups = _follow(rule, model, smallest / width, lr)
    optim = OptimSection()
    optimizer = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps, weight_decay=0.0)
    batches = stream.batches(stream.start(), micro_batch_size=batch, global_batch_size=batch)
    cpu = torch.device("cpu")
    try:
        fixed, _, _ = next(batches).to(cpu)
        before = _look(model, fixed)
        loss = torch.zeros(())
        for _ in range(steps):
            input_ids, targets, _ = next(batches).to(cpu)
            optimizer.zero_grad()
            total, scored = token_loss(model(input_ids), targets, model.tensor)
            loss = total / scored.clamp(min=1)
            loss.backward()
            optimizer.step()
    finally:
        batches.close()
    after = _look(model, fixed)
    return ({place: _rms(value) for place, value in before.items()}, {p: _rms(value) for p, value in after.items()},
            {place: _rms(after[place] - value) for place, value in before.items()}, float(loss.detach()))


def _follow(rule: str, model: HyenaModel, ratio: float, lr: float) -> list[dict[str, Any]]:
    """Give a model the initial values of a rule, and its weights their learning rates, as an optimizer's groups.

    The maximal update: products whose two dimensions grow start smaller by the root of the width, and learn more slowly
    by the width, since Adam's steps add up over their inputs; the head, which is the embedding, reads a norm that is
    smaller by the width. What has one dimension that grows is left alone: the embedding, the short convolution, the
    filters' last product, biases and norms.

    Args:
        ratio: the smallest width over this one.
    """
    groups = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0
            if rule == "maximal update" and name.endswith(MATRICES):
                parameter.mul_(ratio**0.5)
                scale = ratio
            elif rule == "maximal update" and name.startswith("final_norm."):
                parameter.mul_(ratio)
                scale = ratio
            groups.append({"params": [parameter], "lr": lr * scale})
    return groups


def _rms(value: Tensor) -> float:
    return float(value.double().pow(2).mean().sqrt())


def _look(model: HyenaModel, input_ids: Tensor) -> dict[str, Tensor]:
    """What every part of the model gives for a batch; of mixers and MLPs what they add to the residual stream."""
    found: dict[str, Tensor] = {}
    with _watching(model, found), torch.no_grad():
        model.eval()
        found["logits"] = model(input_ids)
        model.train()
    return found


@contextmanager
def _watching(model: HyenaModel, found: dict[str, Tensor]) -> Iterator[None]:
    def watch(name: str, module: nn.Module, *, branch: bool) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            found[name] = (value - inputs[0] if branch else value).detach()
        return module.register_forward_hook(hook)

    handles = [watch("embedding", model.embedding, branch=False)]
    for number, layer in enumerate(model.layers, 1):
        assert isinstance(layer.mixer, nn.Module)
        assert isinstance(layer.mlp, nn.Module)
        handles += [watch(f"mixer {number}", layer.mixer, branch=True), watch(f"MLP {number}", layer.mlp, branch=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def describe(checks: Sequence[Check], steps: int) -> str:
    """The exponents of the width as a table of Markdown."""
    lines = ["# Coordinate check", "",
             f"Root mean squares over widths {', '.join(map(str, checks[0].widths))}, as powers of the width: 0 is "
             f"flat, 0.5 grows with its root. Changes are those of {steps} steps.", "",
             "| rule | place | activations before | after | changes |", "| --- | --- | --- | --- | --- |"]
    for check in checks:
        values = [check.slopes(of) for of in (check.before, check.after, check.changes)]
        lines += [f"| {check.rule} | {place} | {before:+.2f} | {after:+.2f} | {change:+.2f} |"
                  for place, before, after, change in zip(check.places, *values, strict=True)]
    losses = [f"{check.rule}: " + ", ".join(f"{loss:.4f}" for loss in check.losses) for check in checks]
    return "\n".join([*lines, "", f"Loss of the last step by width: {'; '.join(losses)}.", ""])


def draw_widths(checks: Sequence[Check], path: Path, steps: int) -> None:
    """Activations and their changes against the width, a row for each rule.

    Raises:
        ImportError: matplotlib is missing.
        OSError: the picture cannot be written.
    """
    with figure(path, 2, len(checks), width=5.2, height=3.7) as (drawn, all_axes):
        from matplotlib import colormaps
        for number, check in enumerate(checks):
            for axes, values, what in ((all_axes[2 * number], check.after, f"activations after {steps} steps"),
                                       (all_axes[2 * number + 1], check.changes, f"their changes by {steps} steps")):
                for j, place in enumerate(check.places):
                    axes.plot(check.widths, values[:, j].tolist(), "o-", markersize=4, linewidth=1.2,
                              color=colormaps["viridis"](0.95 * j / max(len(check.places) - 1, 1)), label=place)
                axes.set(xscale="log", yscale="log", xlabel="width", title=f"{check.rule}: {what}")
                axes.set_xticks(check.widths, [str(width) for width in check.widths])
                axes.xaxis.minorticks_off()
            all_axes[2 * number].set_ylabel("root mean square")
        for column in (0, 1):  # rows are there to be compared
            low = min(axes.get_ylim()[0] for axes in all_axes[column::2])
            high = max(axes.get_ylim()[1] for axes in all_axes[column::2])
            for axes in all_axes[column::2]:
                axes.set_ylim(low, high)
        handles, labels = all_axes[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside right upper", fontsize=8)
        drawn.suptitle("Coordinate check: a flat line is a rate that serves every width")
