"""Next-token predictions of sequences that grow by a token at a time, without reading them again.

`Decoder` keeps of each sequence what later tokens need of it: of a Hyena mixer the inputs of its convolutions, of
attention keys and values (`model.memories`). `PlainDecoder` is its slow reference, which reads everything again for
every token. What a kind of mixer keeps is in its entry (`model.kinds`).

Legend: B sequences, P tokens of a prompt, D channels, V ids of the padded vocabulary.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hyena_dist.config.mixers import mixer_name
from hyena_dist.model.block import Block
from hyena_dist.model.kinds import MixerMemory, mixer_kind
from hyena_dist.model.memories import Linear
from hyena_dist.model.model import HyenaModel


class Decoder:
    """Reads prompts, then a token of every sequence at a time.

    The sequences may have prompts of different lengths; one that several sequences have is read once.

    Attributes:
        logits: [B, V], predictions of the next token of every sequence.
        prompt_logits: of each sequence, [P, V]: what was predicted behind each token of its prompt.
    """

    def __init__(self, model: HyenaModel, prompts: Sequence[Tensor], room: int) -> None:
        """
        Args:
            model: in eval mode, whole on this rank.
            prompts: int64 [P] of each sequence, at least one token.
            room: how many tokens may follow, at least 1.

        Raises:
            ValueError: no sequence, an empty prompt, a prompt and its room are longer than the model takes, a mixer
                that cannot be read token by token, or a model that is split over ranks.
        """
        check_decodable(model, prompts, room)
        self._model, self._room = model, room
        device = next(model.parameters()).device
        unique: dict[bytes, int] = {}
        rows: list[int] = []
        read: list[Tensor] = []
        for prompt in prompts:
            rows.append(unique.setdefault(prompt.cpu().numpy().tobytes(), len(unique)))
            if rows[-1] == len(read):
                read.append(prompt.to(device))
        blocks = cast("list[Block]", list(model.layers))
        self._memories = [_memory(kind)(block.mixer, block.input_norm, torch.tensor(rows, device=device), room)
                          for block, kind in zip(blocks, model.config.layer_kinds, strict=True)]
        self._mlps = [(Linear(block.mlp.fc1, block.mlp_norm), Linear(block.mlp.fc2)) for block in blocks]
        with torch.no_grad(), model.autocast(device):
            streams = [model.embedding(prompt[None]) for prompt in read]  # each [P, 1, D]
            for block, memory in zip(blocks, self._memories, strict=True):
                mixed = memory.read(streams)
                for place, (stream, added) in enumerate(zip(streams, mixed, strict=True)):
                    streams[place] = block.mlp(stream + added, block.mlp_norm, residual=True)
            logits = [self._predictions(stream)[0] for stream in streams]
        self.prompt_logits = [logits[row] for row in rows]
        self.logits = torch.stack([each[-1] for each in self.prompt_logits])

    def step(self, ids: Tensor) -> Tensor:
        """The next token of every sequence, int64 [B] -> `logits` of the one behind it, [B, V].

        Raises:
            ValueError: there is no more room.
        """
        if self._room == 0:
            raise ValueError("there is no room for another token: make a Decoder with more room")
        self._room -= 1
        with torch.no_grad():
            x = F.embedding(ids[None], self._model.embedding.word_embeddings.weight)  # [1, B, D]
            for memory, (fc1, fc2) in zip(self._memories, self._mlps, strict=True):
                x = x + memory.step(x)
                x = x + fc2(F.gelu(fc1(x), approximate="tanh"))
            with self._model.autocast(ids.device):
                self.logits = self._predictions(x)[:, 0]
        return self.logits

    def _predictions(self, x: Tensor) -> Tensor:
        """[l, B, D] -> [B, l, V]"""
        model = self._model
        return model.head(x, model.final_norm.in_tensor_region(), model.embedding.word_embeddings.weight)


class PlainDecoder:
    """The same by a forward pass over each whole sequence for every token."""

    def __init__(self, model: HyenaModel, prompts: Sequence[Tensor], room: int) -> None:
        check_decodable(model, prompts, room)
        self._model, self._room, self._sequences = model, room, list(prompts)
        self.prompt_logits = [self._predictions(sequence) for sequence in self._sequences]
        self.logits = torch.stack([logits[-1] for logits in self.prompt_logits])

    def step(self, ids: Tensor) -> Tensor:
        """As `Decoder.step`."""
        if self._room == 0:
            raise ValueError("there is no room for another token: make a PlainDecoder with more room")
        self._room -= 1
        self._sequences = [torch.cat([before, token[None]]) for before, token in zip(self._sequences, ids, strict=True)]
        self.logits = torch.stack([self._predictions(sequence)[-1] for sequence in self._sequences])
        return self.logits

    @torch.no_grad()
    def _predictions(self, sequence: Tensor) -> Tensor:
        return self._model(sequence[None])[0]


def check_decodable(model: HyenaModel, prompts: Sequence[Tensor], room: int) -> None:
    """Refuse what cannot be decoded.

    Raises:
        ValueError: as `Decoder`.
    """
    if model.tensor.size > 1 or model.context.size > 1:
        raise ValueError("a model that is split over ranks is not read token by token: give each rank a whole model "
                         "and sequences of its own")
    if model.training:
        raise ValueError("a model in training mode drops values at random: call eval() first")
    if not prompts or room < 1:
        raise ValueError(f"got {len(prompts)} sequences and room for {room} tokens: give at least one of each")
    for prompt in prompts:
        if prompt.dim() != 1 or not len(prompt):
            raise ValueError(f"a prompt is [P] token ids, P at least 1, got {list(prompt.shape)}")
        if len(prompt) + room > model.config.max_seq_len:
            raise ValueError(f"a prompt of {len(prompt)} tokens and {room} behind it are longer than max_seq_len = "
                             f"{model.config.max_seq_len}: make fewer, or use a model of a longer context")


def _memory(letter: str) -> type[MixerMemory]:
    found = mixer_kind(letter).memory_of_tokens()
    if found is None:
        raise ValueError(f"{mixer_name(letter)} layers ({letter} of model.layer_pattern) cannot be read token by "
                         "token: use PlainDecoder")
    return found
