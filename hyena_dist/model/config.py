"""HyenaConfig: the Megatron configuration of a Hyena model, derived from the run's `model` section and never saved."""

from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from hyena_dist.config.mixers import layer_letters
from hyena_dist.config.sections.model import ModelSection
from hyena_dist.config.sections.parallel import ParallelSection
from hyena_dist.ops.implicit_filter import FilterShape

COMPUTE_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

@dataclass
class HyenaConfig(TransformerConfig):
    """A TransformerConfig with what Hyena needs besides; fields have the meaning of the `model` section's keys."""

    hyena_order: int = 2
    filter_order: int = 64
    filter_emb_dim: int = 5
    filter_sine_freq: float = 10.0
    filter_num_inner_mlps: int = 2
    filter_shift: float = 0.05
    filter_seq_len: int = 1024
    max_seq_len: int = 1024
    short_conv_kernel: int = 3
    padded_vocab_size: int = 16
    kmer: int = 1
    kmer_overlap: bool = False
    tie_embeddings: bool = True
    embed_dropout: float = 0.0
    resid_dropout: float = 0.0
    compute_dtype: torch.dtype | None = None
    """Dtype of the matrix products, by autocast inside the model's forward; None: that of the parameters."""
    recompute: str = "none"
    """What the backward pass recomputes: none, selective, block or full (`train.activation_checkpointing`)."""
    offload_activations: bool = False
    """Keep what the backward pass needs in the host's memory."""
    context_method: str = "auto"
    """How the long convolution crosses context ranks: auto, all_to_all or distributed_fft."""
    overlap_groups: int = 1
    """Channel groups that pipeline the exchange under the transform."""
    ops_backend: str = "auto"
    """What computes the Hyena operator on one context rank: `ops.backend`."""
    layer_pattern: str = ""
    """Kinds of mixers, repeated (`config.mixers`)."""
    mixer_heads: int = 1
    """Heads of mixers that have heads. Megatron's own `num_attention_heads` is the number of tensor ranks, because it
    insists that these divide it also where no mixer has heads."""

    @property
    def filter_shape(self) -> FilterShape:
        return FilterShape(self.filter_seq_len, self.filter_emb_dim, self.filter_shift)

    @property
    def layer_kinds(self) -> str:
        """The letter of every layer."""
        return layer_letters(self.layer_pattern, self.num_layers)

    @property
    def recompute_blocks(self) -> bool:
        """Keep only the inputs of blocks."""
        return self.recompute in ("block", "full")

    @property
    def recompute_inner(self) -> bool:
        """Do not keep the inner tensors of a block, of several times its width, either."""
        return self.recompute in ("selective", "full")

    @property
    def num_filters(self) -> int:
        """Long convolutions of a mixer."""
        return self.hyena_order - 1


def hyena_config(model: ModelSection, *, precision: str = "fp32", activation_checkpointing: str = "none",
                 offload_activations: bool = False, params_dtype: torch.dtype = torch.float32,
                 parallel: ParallelSection | None = None, backend: str = "auto") -> HyenaConfig:
    """Derive the Megatron configuration of a `model` section; without `parallel`, of one rank."""
    parallel = parallel or ParallelSection()
    return HyenaConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.inner_size,
        num_attention_heads=parallel.tensor,
        mixer_heads=model.num_attention_heads,
        hidden_dropout=0.0,  # dropout is ours: a hash of the element's place
        attention_dropout=0.0,
        params_dtype=params_dtype,
        use_cpu_initialization=True,
        perform_initialization=False,  # initial values are ours: a function of seed and name, not of the topology
        gradient_accumulation_fusion=False,
        cuda_graph_scope=[],
        tensor_model_parallel_size=parallel.tensor,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        context_method=parallel.context_method,
        overlap_groups=parallel.overlap_groups,
        ops_backend=backend,
        layer_pattern=model.layer_pattern,
        hyena_order=model.hyena_order,
        filter_order=model.filter_order,
        filter_emb_dim=model.filter_emb_dim,
        filter_sine_freq=model.filter_sine_freq,
        filter_num_inner_mlps=model.filter_num_inner_mlps,
        filter_shift=model.filter_shift,
        filter_seq_len=model.filter_seq_len or model.max_seq_len,
        max_seq_len=model.max_seq_len,
        short_conv_kernel=model.short_conv_kernel,
        padded_vocab_size=model.padded_vocab_size,
        kmer=model.kmer,
        kmer_overlap=model.kmer_overlap,
        tie_embeddings=model.tie_embeddings,
        embed_dropout=model.embed_dropout,
        resid_dropout=model.resid_dropout,
        compute_dtype=COMPUTE_DTYPES[precision],
        recompute=activation_checkpointing,
        offload_activations=offload_activations,
    )
