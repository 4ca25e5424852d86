"""HyenaModel: token ids [B, L] -> logits [B, L, V], a causal language model."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hyena_dist.config.schema import Config
from hyena_dist.model.block import Block, mixer_spec
from hyena_dist.model.config import HyenaConfig, hyena_config
from hyena_dist.model.heads import HeadKind, head_of
from hyena_dist.model.initial import initialize
from hyena_dist.model.kinds import check_mixers
from hyena_dist.model.layers import Embedding, Norm, active_key, enter_tensor_region
from hyena_dist.model.offload import on_host
from hyena_dist.model.placement import Placement
from hyena_dist.model.table import placement_table
from hyena_dist.ops.dropout import DropoutKey, dropout
from hyena_dist.ops.precision import autocast_kind
from hyena_dist.ops.segments import Offsets, segments_of
from hyena_dist.parallel.groups import Groups, context_axis, tensor_axis
from hyena_dist.parallel.tokens import padded_length, token_multiple


class HyenaModel(nn.Module):
    """Embedding, blocks, final norm and head, as published (HyenaDNA, Nguyen et al. 2023). The head's weight is the
    embedding's, unless the configuration unties them.

    The same model in plain python and under every engine: autocast is entered inside `forward`, parameters keep their
    own dtype.

    Args:
        seed: of the initial values (`model.initial`).
        head: in place of the language model's, of another task: the model's output is then this head's.
    """

    def __init__(self, config: HyenaConfig, pg_collection: ProcessGroupCollection | None = None, *,
                 seed: int = 0, head: HeadKind | None = None) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        self.adapters: dict[str, Placement] = {}
        """Of weights that were added to it (`model.lora`, `model.prompt`), by name."""
        self.head_kind = head or head_of(config)
        self.tensor, self.context = tensor_axis(pg_collection), context_axis(pg_collection)
        self.embedding = Embedding(config, pg_collection, seed=None)
        self.layers = nn.ModuleList(Block(config, mixer_spec(kind), i + 1, pg_collection, seed=None)
                                    for i, kind in enumerate(config.layer_kinds))
        self.final_norm = Norm(config, pg_collection)
        self.head = self.head_kind.module(config, pg_collection)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial values again, a function of the seed: also of weights that were on the meta device, after
        `to_empty`, and of those that FSDP2 has sharded."""
        initialize(self, self.placement(), self.tensor, self.seed)

    def forward(self, input_ids: Tensor, dropout_key: DropoutKey | None = None,
                segments: Offsets | None = None) -> Tensor:
        """int64 [B, l] -> [B, l, V / T], V padded as published; l is all tokens of the sequence on one context rank.

        On a context rank the input is that rank's slice (`parallel.tokens.slice_tokens`), on a tensor rank the logits
        are those of its part of the vocabulary (`model.loss.token_loss` takes them).

        Args:
            dropout_key: what the dropout masks depend on, so that they are the same after a resume and at every
                layout; None: drawn from torch's generator. Not looked at in eval mode or without dropout.
            segments: the offsets of sequences that stand one after the other in a row, as (0, 100, 250), of each row or
                the same for all; each gets the logits that it has alone. They begin with 0 and end with the number
                of tokens, on context ranks with that of all ranks.

        An empty batch, [0, l], gives [0, l, V / T]: of its loss, which is 0, every weight has a gradient of 0.

        Raises:
            ValueError: another shape or type, no token, L exceeds max_seq_len, offsets that do not fit, or segments
                that a mixer does not know.
        """
        if _is_empty(input_ids):
            return self.forward(*_one_row(input_ids))[:0]
        with self.autocast(input_ids.device):
            x = enter_tensor_region(self._run_blocks(input_ids, dropout_key, segments), self.config, self.tensor)
            return self.head(x, self.final_norm.in_tensor_region(), self.embedding.word_embeddings.weight)

    def states_after(self, input_ids: Tensor, layers: int) -> Tensor:
        """int64 [B, l] -> the residual stream behind so many layers, before any norm, [l or l / T, B, D]; 0 is what the
        embedding gives. B is at least 1.

        Raises:
            ValueError: the model has not so many layers.
        """
        if not 0 <= layers <= len(self.layers):
            raise ValueError(f"the model has {len(self.layers)} layers, and the states behind {layers} were asked for")
        with self.autocast(input_ids.device):
            return self._run_blocks(input_ids, None, None, layers)

    def hidden_states(self, input_ids: Tensor, dropout_key: DropoutKey | None = None,
                      segments: Offsets | None = None) -> Tensor:
        """int64 [B, l] -> the final norm's output in Megatron's layout, [l or l / T, B, D]."""
        if _is_empty(input_ids):
            return self.hidden_states(*_one_row(input_ids))[:, :0]
        with self.autocast(input_ids.device):
            return self.final_norm(self._run_blocks(input_ids, dropout_key, segments))

    def logits_and_states(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [B, L] -> what `forward` gives and what `hidden_states` gives, for the price of one of them. B is at
        least 1."""
        with self.autocast(input_ids.device):
            x = enter_tensor_region(self._run_blocks(input_ids, None, None), self.config, self.tensor)
            logits = self.head(x, self.final_norm.in_tensor_region(), self.embedding.word_embeddings.weight)
            return logits, self.final_norm(x)

    def _run_blocks(self, input_ids: Tensor, dropout_key: DropoutKey | None, segments: Offsets | None,
                    count: int | None = None) -> Tensor:
        """int64 [B, l] -> what the final norm reads, or what is behind so many layers, [l or l / T, B, D]."""
        config = self.config
        if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32) or input_ids.numel() == 0:
            raise ValueError("HyenaModel takes int64 token ids of [B, L], L at least 1, got "
                             f"{str(input_ids.dtype).removeprefix('torch.')} {list(input_ids.shape)}: a single "
                             "sequence is input_ids[None]")
        length = input_ids.shape[1] * self.context.size
        if length > padded_length(config.max_seq_len, self.token_multiple):
            raise ValueError(f"the input has {length} tokens, but this model takes at most max_seq_len = "
                             f"{config.max_seq_len}: shorten the input or use a model of a longer context")
        apart = segments_of(segments, len(input_ids), length)
        key = self._active_key(dropout_key, input_ids)
        x = self.embedding(input_ids)
        if key is not None:
            x = dropout(x, config.embed_dropout, key, site=0)
        recompute = config.recompute_blocks and torch.is_grad_enabled()
        with on_host() if config.offload_activations else nullcontext():
            for layer in list(self.layers)[:count]:
                # Dropout is a hash of the element's place: no generator's state has to be kept and brought back.
                x = (checkpoint(layer, x, key, apart, use_reentrant=False, preserve_rng_state=False) if recompute
                     else layer(x, key, apart))
        return x

    @property
    def token_multiple(self) -> int:
        """What the length of a padded sequence must be a multiple of, before it is cut into context slices."""
        return token_multiple(context=self.context.size, tensor=self.tensor.size,
                              sequence=self.config.sequence_parallel)

    def placement(self) -> dict[str, Placement]:
        """The placement table of this model's parameters, by name."""
        names = (name for name, _ in self.named_parameters() if name not in self.adapters)
        return placement_table(names, self.config, self.head_kind) | self.adapters

    def _active_key(self, key: DropoutKey | None, input_ids: Tensor) -> DropoutKey | None:
        if not self.training or self.config.embed_dropout == self.config.resid_dropout == 0:
            return None
        rows, tokens = input_ids.shape
        if self.config.sequence_parallel:
            tokens //= self.tensor.size
        return active_key(key, rows, tokens, self.config, self.tensor, self.context, input_ids.device)

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """A context in which the parts of the model compute in the configuration's `compute_dtype`."""
        dtype = self.config.compute_dtype
        return nullcontext() if dtype is None else torch.autocast(autocast_kind(device), dtype=dtype)


def _is_empty(input_ids: Tensor) -> bool:
    return input_ids.dim() == 2 and input_ids.shape[0] == 0 < input_ids.shape[1]


def _one_row(input_ids: Tensor) -> tuple[Tensor, DropoutKey]:
    """What is computed instead of an empty batch, and cut off again: so every weight takes part, and every collective
    that other ranks wait for. Nothing is drawn for it."""
    return (input_ids.new_zeros(1, input_ids.shape[1]),
            DropoutKey(seed=0, step=0, windows=torch.zeros(1, dtype=torch.int64, device=input_ids.device)))


def build_model(config: Config, groups: Groups, *, head: HeadKind | None = None) -> HyenaModel:
    """The run's model with its initial values: a function of (train.seed, weight name), the same at every topology.

    It is split as the groups are: with `Groups.single()` it is whole, whatever the configuration's `parallel` says.

    Args:
        head: as HyenaModel's.

    Raises:
        ConfigError: a kind of mixer in it cannot be of its sizes, or split over these ranks.
    """
    parallel = replace(config.parallel, tensor=groups.tensor.size, context=groups.context.size,
                       sequence=config.parallel.sequence and groups.tensor.size > 1)
    check_mixers(replace(config, parallel=parallel))
    model_config = hyena_config(config.model, precision=config.train.precision,
                                activation_checkpointing=config.train.activation_checkpointing,
                                offload_activations=config.train.activation_offload, backend=config.ops.backend,
                                parallel=parallel)
    return HyenaModel(model_config, groups.collection(), seed=config.train.seed, head=head)
