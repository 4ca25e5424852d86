"""What is trained: the architecture."""

from dataclasses import dataclass

from hyena_dist.config.mixers import check_letters, layer_letters
from hyena_dist.config.sections.ranges import not_negative, positive, probability

NUM_TOKENS = 12
"""Token ids of the published vocabulary; the data holds all but some special ones."""

NUM_SPECIAL = 7
"""Of these, the special ones, which k-mers have too."""

MOST_KMER = 8
"""Bases of the longest k-mer: 65,543 ids."""

VOCAB_MULTIPLE = 8
"""The published models pad the vocabulary to a multiple of this."""

BEFORE_THE_KEY = {"tie_embeddings": True, "kmer": 1, "kmer_overlap": False}
"""Keys of the section that are younger than the checkpoint format, and what every model was that was saved before."""


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The architecture; part of the model's identity, except for the dropout probabilities."""

    num_layers: int = 2
    """Blocks (mixer + MLP)."""
    hidden_size: int = 128
    """Channels D of the residual stream."""
    ffn_hidden_size: int | None = None
    """Inner width of the MLP; null: 4 * hidden_size."""
    max_seq_len: int = 1024
    """Longest input the model takes. A longer one is an error, never cropped. `extend.py` makes it longer."""
    hyena_order: int = 2
    """Order N of the Hyena operator: N gates, N - 1 long convolutions."""
    filter_order: int = 64
    """Width of the implicit filter's trunk."""
    filter_emb_dim: int = 5
    """Positional features of the implicit filter: time and (filter_emb_dim - 1) / 2 complex bands."""
    filter_sine_freq: float = 10.0
    """Initial frequency of the filter's sine activations."""
    filter_num_inner_mlps: int = 2
    """Hidden layers of the filter's trunk after the first."""
    filter_shift: float = 0.05
    """Constant added to the decay window: 0.05 in the published inference code, 0.0 in the training code."""
    filter_seq_len: int | None = None
    """Length by which the filter's positions are normalised; null: max_seq_len. Part of the filter's meaning; lags
    past it go on along the same curve."""
    short_conv_kernel: int = 3
    """Taps of the depthwise causal convolution."""
    kmer: int = 1
    """Bases of a token, 1 to 8. 1: single bases with the published ids; more: k-mers, whose 7 + 4^k ids are listed in
    `data/tokenizer.py`. All lengths of sequences are in tokens; losses and perplexities stay per base."""
    kmer_overlap: bool = False
    """Whether the next k-mer starts one base further, so that every base has a token; false: behind the last one, so
    that a sequence has k times fewer tokens than bases."""
    vocab_size: int = 12
    """Token ids; the embedding is padded to the next multiple of 8, as published. With k-mers it has at least theirs,
    so that this may stay as it is."""
    tie_embeddings: bool = True
    """Whether the head's weight is the embedding's, as published. false: the head has a weight of its own, as in models
    that Hugging Face's port has trained."""
    embed_dropout: float = 0.1
    """Dropout on the embedding's output."""
    resid_dropout: float = 0.0
    """Dropout on the outputs of mixers and MLPs."""
    num_attention_heads: int = 1
    """Heads of mixers that have heads: of attention's."""
    layer_pattern: str = ""
    """Kinds of mixers, one for each layer, repeated to num_layers: H Hyena, A attention; "" is all Hyena."""

    @property
    def layer_kinds(self) -> str:
        """The letter of every layer's mixer."""
        return layer_letters(self.layer_pattern, self.num_layers)

    @property
    def inner_size(self) -> int:
        """Width of the MLP."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        ids = self.vocab_size if self.kmer == 1 else max(self.vocab_size, NUM_SPECIAL + 4**self.kmer)
        return -(-ids // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def __post_init__(self) -> None:
        positive("model", num_layers=self.num_layers, hidden_size=self.hidden_size, max_seq_len=self.max_seq_len,
                  filter_order=self.filter_order, short_conv_kernel=self.short_conv_kernel,
                  vocab_size=self.vocab_size, num_attention_heads=self.num_attention_heads,
                  filter_sine_freq=self.filter_sine_freq, kmer=self.kmer)
        if self.kmer > MOST_KMER:
            raise ValueError(f"model.kmer must be at most {MOST_KMER}, got {self.kmer}: there are 4^k k-mers, and each "
                             "has a row of the embedding")
        if self.kmer_overlap and self.kmer == 1:
            raise ValueError("model.kmer_overlap is true, and model.kmer is 1: single bases do not overlap: give the "
                             "k-mers' length in model.kmer, or leave model.kmer_overlap out")
        not_negative("model", filter_num_inner_mlps=self.filter_num_inner_mlps, filter_shift=self.filter_shift)
        probability("model", embed_dropout=self.embed_dropout, resid_dropout=self.resid_dropout)
        if self.vocab_size < NUM_TOKENS:
            raise ValueError(f"model.vocab_size must be at least {NUM_TOKENS}, the number of token ids, "
                             f"got {self.vocab_size}")
        positive("model", hyena_order=self.hyena_order, filter_emb_dim=self.filter_emb_dim)
        if self.hyena_order < 2:
            raise ValueError(f"model.hyena_order must be 2 or greater, got {self.hyena_order}")
        if self.filter_emb_dim < 3 or self.filter_emb_dim % 2 == 0:
            raise ValueError(f"model.filter_emb_dim must be odd and at least 3 (time and complex bands), "
                             f"got {self.filter_emb_dim}")
        for key in ("ffn_hidden_size", "filter_seq_len"):
            value = getattr(self, key)
            if value is not None:
                positive("model", **{key: value})
        check_letters(self.layer_pattern)
