"""Frozen baseline: HyenaDNA and its training loop in plain torch, straight from the published equations.

Never optimise this file: speed, memory and numbers of the package are compared with it. It does what the published
description says and no more: one padded FFT of exactly 2L, a library depthwise convolution that is padded and cropped,
transposes in and out, a filter evaluated at every lag at once, and autograd's own backward. It imports nothing of the
package, and its state dict has exactly the published keys.

Notation: B batch, L tokens, D channels, N order. The last layer of the implicit filter has (N - 1) * D rows; row
o * D + c is channel c of filter o, and the per-channel skip weights `filter_fn.bias` are packed likewise.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED_TARGET = -100


def fft_causal_conv(u: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """y[b, c, t] = sum over s <= t of k[c, s] * u[b, c, t - s], plus bias[c] * u[b, c, t]; u [B, D, L], k [D, L].

    The transform has exactly 2L points, in float32 or in the inputs' own wider type.
    """
    L = u.shape[-1]
    dtype = torch.promote_types(torch.promote_types(u.dtype, k.dtype), torch.float32)
    wide = u.to(dtype)
    spectrum = torch.fft.rfft(wide, n=2 * L) * torch.fft.rfft(k.to(dtype), n=2 * L)
    y = torch.fft.irfft(spectrum, n=2 * L)[..., :L]
    return (y + wide * bias.to(dtype)[:, None]).to(u.dtype)


class PositionalEmbedding(nn.Module):
    """Time t in [0, 1] and the features z = [t, Re, Im of exp(-i f w)] of each of l_max lags."""

    z: Tensor
    t: Tensor

    def __init__(self, emb_dim: int, l_max: int) -> None:
        super().__init__()
        bands = (emb_dim - 1) // 2
        t = torch.linspace(0, 1, l_max)[None, :, None]
        w = 2 * math.pi * torch.linspace(0, l_max - 1, l_max)[None, :, None] / l_max
        f = torch.linspace(1e-4, bands - 1, bands)[None, None]
        z = torch.exp(-1j * f * w)
        self.register_buffer("z", torch.cat([t, z.real, z.imag], dim=-1))
        self.register_buffer("t", t)


class Sin(nn.Module):
    """sin(freq * x) with a trainable frequency per channel."""

    def __init__(self, width: int, w: float) -> None:
        super().__init__()
        self.freq = nn.Parameter(w * torch.ones(1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.freq * x)


class ExponentialModulation(nn.Module):
    """Window h * (exp(-t |delta|) + shift), from a slow decay in the first channel to a fast one in the last."""

    deltas: Tensor

    def __init__(self, channels: int, shift: float) -> None:
        super().__init__()
        self.shift = shift
        slow, fast = math.log(1e-2) / 1.5, math.log(1e-2) / 0.3
        self.register_buffer("deltas", torch.linspace(slow, fast, channels)[None, None])

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return h * (torch.exp(-t * self.deltas.abs()) + self.shift)


class HyenaFilter(nn.Module):
    """The implicit filter: an MLP with sine activations from lags to one value per channel, under a decaying window."""

    def __init__(self, channels: int, layer: dict[str, Any], shift: float) -> None:
        super().__init__()
        width = layer["filter_order"]
        sin = Sin(width, layer["w"])  # one module in every place, so its frequencies are shared
        trunk: list[nn.Module] = [nn.Linear(layer["emb_dim"], width), sin]
        for _ in range(layer.get("num_inner_mlps", 2)):
            trunk += [nn.Linear(width, width), sin]
        self.bias = nn.Parameter(torch.empty(channels))
        self.pos_emb = PositionalEmbedding(layer["emb_dim"], layer["l_max"])
        self.implicit_filter = nn.Sequential(*trunk, nn.Linear(width, channels, bias=False))
        self.modulation = ExponentialModulation(channels, shift)

    def forward(self, L: int) -> Tensor:
        """The first L lags, [channels, L]."""
        h = self.implicit_filter(self.pos_emb.z[:, :L])
        return self.modulation(self.pos_emb.t[:, :L], h)[0].transpose(0, 1)


class HyenaOperator(nn.Module):
    """Projections x0 | ... | x_{N-1} | v, then N - 1 rounds of gate and long convolution, then the last gate x0."""

    def __init__(self, D: int, layer: dict[str, Any], shift: float) -> None:
        super().__init__()
        self.order = layer.get("order", 2)
        width, taps = (self.order + 1) * D, layer.get("short_filter_order", 3)
        self.in_proj = nn.Linear(D, width)
        self.out_proj = nn.Linear(D, D)
        self.short_filter = nn.Conv1d(width, width, taps, groups=width, padding=taps - 1)
        self.filter_fn = HyenaFilter((self.order - 1) * D, layer, shift)

    def forward(self, x: Tensor) -> Tensor:
        L = x.shape[1]
        p = self.in_proj(x).transpose(1, 2)
        *gates, v = self.short_filter(p)[..., :L].chunk(self.order + 1, dim=1)
        filters = self.filter_fn(L).chunk(self.order - 1)
        biases = self.filter_fn.bias.chunk(self.order - 1)
        for gate, k, bias in zip(reversed(gates[1:]), filters, biases, strict=True):
            v = fft_causal_conv(v * gate, k, bias)
        return self.out_proj((v * gates[0]).transpose(1, 2))


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))) with the tanh approximation of GELU."""

    def __init__(self, D: int, d_inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(D, d_inner)
        self.fc2 = nn.Linear(d_inner, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm residual block: mixer, then MLP."""

    def __init__(self, config: dict[str, Any], shift: float) -> None:
        super().__init__()
        D = config["d_model"]
        self.resid_dropout = config["resid_dropout"]
        self.mixer = HyenaOperator(D, config["layer"], shift)
        self.norm1 = nn.LayerNorm(D)
        self.mlp = Mlp(D, config["d_inner"])
        self.norm2 = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.dropout(self.mixer(self.norm1(x)), self.resid_dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.resid_dropout, self.training)


class Embeddings(nn.Module):
    """Word embeddings with the vocabulary padded to a multiple; a causal convolution needs no positions."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        multiple = config["pad_vocab_size_multiple"]
        rows = math.ceil(config["vocab_size"] / multiple) * multiple
        self.word_embeddings = nn.Embedding(rows, config["d_model"])

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.word_embeddings(input_ids)


class Backbone(nn.Module):
    """Token ids [B, L] to hidden states [B, L, D], the output of the final norm."""

    def __init__(self, config: dict[str, Any], shift: float) -> None:
        super().__init__()
        self.l_max = config["layer"]["l_max"]
        self.embed_dropout = config["embed_dropout"]
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Block(config, shift) for _ in range(config["n_layer"]))
        self.ln_f = nn.LayerNorm(config["d_model"])

    def forward(self, input_ids: Tensor) -> Tensor:
        if input_ids.shape[1] > self.l_max:
            raise ValueError(f"the input has {input_ids.shape[1]} tokens, the model takes at most l_max = {self.l_max}")
        x = F.dropout(self.embeddings(input_ids), self.embed_dropout, self.training)
        for layer in self.layers:
            x = layer(x)
        return self.ln_f(x)


class BaselineHyenaDNA(nn.Module):
    """Published HyenaDNA from its config.json: token ids [B, L] to logits [B, L, V], V padded as published.

    `model.backbone(input_ids)` gives the hidden states [B, L, D]. `filter_shift` is 0.05 in the published inference
    code and 0.0 in the training code; no config records it. `seed` fixes the initial values.
    """

    def __init__(self, config: dict[str, Any], *, filter_shift: float = 0.05, seed: int = 0) -> None:
        super().__init__()
        self.backbone = Backbone(config, filter_shift)
        embedding = self.backbone.embeddings.word_embeddings.weight
        self.lm_head = nn.Linear(config["d_model"], embedding.shape[0], bias=False)
        self.lm_head.weight = embedding
        self._initialise(config, torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _initialise(self, config: dict[str, Any], generator: torch.Generator) -> None:
        """N(0, 0.02) for linears and embedding, less where a layer writes to the residual stream; norms stay (1, 0)."""
        residual_std = 0.02 / math.sqrt(2 * config["n_layer"])
        conv_bound = 1 / math.sqrt(config["layer"].get("short_filter_order", 3))
        for name, parameter in self.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                parameter.normal_(0, residual_std, generator=generator)
            elif "short_filter" in name:
                parameter.uniform_(-conv_bound, conv_bound, generator=generator)
            elif name.endswith("filter_fn.bias"):
                parameter.normal_(0, 1, generator=generator)
            elif "norm" in name or "ln_f" in name or name.endswith("freq"):
                continue
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0, 0.02, generator=generator)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.backbone(input_ids))


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross entropies of the targets that are not -100."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The two published groups: the implicit filters' trunks and frequencies are not decayed, everything else is."""
    trunks = [p for name, p in model.named_parameters() if ".implicit_filter." in name]
    others = [p for name, p in model.named_parameters() if ".implicit_filter." not in name]
    return [{"params": others, "weight_decay": weight_decay}, {"params": trunks, "weight_decay": 0.0}]


def plain_training_loop(
    model: nn.Module,
    batches: Iterable[Sequence[tuple[Tensor, Tensor]]],
    *,
    lr_at: Callable[[int], float],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_clip: float,
) -> Iterator[float]:
    """Train in one process with AdamW and yield each step's loss, in nats per scored token, before its update.

    An item of `batches` is one optimizer step: a sequence of micro-batches (input_ids, targets), both [B, L]. Targets
    of -100 are not scored; a step's loss is the mean over all scored targets of its micro-batches. `lr_at(step)` counts
    steps from 0. A `grad_clip` of 0 does not clip.
    """
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr_at(0), betas=betas, eps=eps)
    model.train()
    for step, micro_batches in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step)
        count = sum(int((targets != IGNORED_TARGET).sum()) for _, targets in micro_batches)
        optimizer.zero_grad()
        loss = 0.0
        for input_ids, targets in micro_batches:
            micro_loss = cross_entropy_sum(model(input_ids), targets) / count
            micro_loss.backward()
            loss += micro_loss.item()
        if grad_clip > 0:
            nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        yield loss
