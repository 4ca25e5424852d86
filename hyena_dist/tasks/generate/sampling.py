"""How the next base is drawn from a model's predictions: of A, C, G and T alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hyena_dist.config.errors import ConfigError
from hyena_dist.data.tokenizer import A, T

BASES = T - A + 1


@dataclass(frozen=True)
class Sampling:
    """What is drawn from: the probabilities p^(1 / temperature), of which the least likely may be left out."""

    temperature: float = 1.0
    """Below 1 likely bases become likelier; 0: always the likeliest one."""
    top_k: int = BASES
    """Only so many of the likeliest bases."""
    top_p: float = 1.0
    """Only as many of the likeliest bases as have this probability together."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature {self.temperature}: give a number of at least 0")
        if not 1 <= self.top_k <= BASES:
            raise ConfigError(f"--top-k {self.top_k}: there are {BASES} bases: give 1 to {BASES}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p}: give a probability above 0 and at most 1")


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """The next token of every sequence: logits [B, V] and one number of [0, 1) for each, float64 [B] -> int64 [B]. The
    same numbers give the same bases, however the logits were found."""
    scores = logits[:, A : T + 1].double()
    if sampling.temperature == 0:
        return A + scores.argmax(-1)
    scores = (scores - scores.amax(-1, keepdim=True)) / sampling.temperature
    p = scores.softmax(-1)
    if sampling.top_k < BASES or sampling.top_p < 1:
        ordered, order = p.sort(dim=-1, descending=True, stable=True)
        kept = ordered.cumsum(-1) - ordered < sampling.top_p  # the likelier ones do not have it yet
        kept[:, sampling.top_k :] = False
        p = torch.zeros_like(p).scatter(-1, order, ordered * kept)
    edges = p.cumsum(-1)
    return A + (uniform[:, None] >= edges / edges[:, -1:]).sum(-1)
