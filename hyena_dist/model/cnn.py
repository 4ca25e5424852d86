"""A small convolutional network that learns a task from nothing: what a pretrained model is compared with.

Its layers and sizes are those of GenomicBenchmarks (Gresova et al. 2023): an embedding of 100 channels, three
convolutions of 8 taps to 16, 8 and 4 channels, each with a norm, ReLU and a maximum over 2 positions, then two products
by way of 512 channels. Two things differ. Norms are of a sequence and not of a batch, because running means are
buffers, which no checkpoint keeps. And of long sequences, from some 600 bases on, positions are averaged into 64 bins,
where the published network has weights for each position.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyena_dist.model.initial import initialize
from hyena_dist.model.placement import ONE, ZERO, Normal, Placement, Uniform
from hyena_dist.ops.dropout import DropoutKey
from hyena_dist.parallel.groups import Axis

CHANNELS, TAPS, WIDTH, BINS = (100, 16, 8, 4), 8, 512, 64
SHORTEST = 64
"""Tokens that its inputs are padded to at least."""


class ConvolutionalModel(nn.Module):
    """[B, L] -> [B, outputs], whole on every rank.

    Args:
        length: L, of every input, padded on the right.
    """

    token_multiple = 1

    def __init__(self, *, vocabulary: int, padding: int, length: int, outputs: int, seed: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, CHANNELS[0], padding_idx=padding)
        stages = range(len(CHANNELS) - 1)
        self.convolutions = nn.ModuleList(nn.Conv1d(CHANNELS[i], CHANNELS[i + 1], TAPS) for i in stages)
        self.norms = nn.ModuleList(nn.GroupNorm(1, CHANNELS[i + 1]) for i in stages)
        self.bins = min(BINS, _left(length))
        self.first = nn.Linear(CHANNELS[-1] * self.bins, WIDTH)
        self.second = nn.Linear(WIDTH, outputs)
        initialize(self, self.placement(), Axis(), seed)
        with torch.no_grad():
            self.embedding.weight[padding] = 0  # it takes no gradient, and stays so

    def forward(self, input_ids: Tensor, lengths: Tensor,  # noqa: ARG002 - it sees where padding begins
                dropout_key: DropoutKey | None = None) -> Tensor:  # noqa: ARG002 - nothing is dropped
        x = self.embedding(input_ids).transpose(1, 2)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.max_pool1d(F.relu(norm(convolution(x))), 2)
        if x.shape[2] > self.bins:
            x = F.adaptive_avg_pool1d(x, self.bins)
        return self.second(self.first(x.flatten(1)))

    def placement(self) -> dict[str, Placement]:
        """The placement of every parameter: with torch's distributions of initial values."""
        found = {}
        for name, weight in self.named_parameters():
            kind, _, last = name.rpartition(".")
            if kind == "embedding":
                found[name] = Placement(initial=Normal(1))
            elif kind.startswith("norms"):
                found[name] = Placement(initial=ONE if last == "weight" else ZERO)
            else:
                inputs = self.get_parameter(f"{kind}.weight")[0].numel()
                found[name] = Placement(initial=Uniform(inputs), weight_decay=weight.dim() > 1)
        return found


def _left(length: int) -> int:
    """Positions after all convolutions."""
    for _ in CHANNELS[1:]:
        length = (length - TAPS + 1) // 2
    return length
