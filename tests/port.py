"""A PreTrainedModel with the keys and the configuration of Hugging Face's port of HyenaDNA, whose code is not ours to
copy: the frozen baseline under its names, with a head of its own. Works with transformers 4 and 5."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from benchmarks.baseline import Backbone


class PortConfig(PretrainedConfig):
    """The keys of the port's config.json."""

    model_type = "hyenadna"

    def __init__(self, d_model: int = 8, d_inner: int = 32, n_layer: int = 2, max_seq_len: int = 254, emb_dim: int = 5,
                 filter_order: int = 8, hyena_order: int = 2, short_filter_order: int = 3, activation_freq: float = 10,
                 num_inner_mlps: int = 2, vocab_size: int = 12, pad_vocab_size_multiple: int = 8,
                 embed_dropout: float = 0.0, layer_norm_epsilon: float = 1e-5, initializer_range: float = 0.02,
                 hyena_dropout: float = 0.0, hyena_filter_dropout: float = 0.0, use_bias: bool = True,
                 train_freq: bool = True, tie_word_embeddings: bool = False, **rest: Any) -> None:
        for key, value in {**locals()}.items():
            if key not in ("self", "rest", "tie_word_embeddings", "__class__"):
                setattr(self, key, value)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **rest)


class Hyena(nn.Module):
    """Under the prefix `hyena.`."""

    def __init__(self, config: PortConfig) -> None:
        super().__init__()
        layer = {"order": config.hyena_order, "filter_order": config.filter_order, "emb_dim": config.emb_dim,
                 "w": config.activation_freq, "num_inner_mlps": config.num_inner_mlps, "l_max": config.max_seq_len,
                 "short_filter_order": config.short_filter_order}
        names = ("d_model", "d_inner", "n_layer", "vocab_size", "pad_vocab_size_multiple", "embed_dropout")
        top = {name: getattr(config, name) for name in names}
        self.backbone = Backbone({"layer": layer, "resid_dropout": 0.0} | top, 0.05)
        for block in self.backbone.layers:
            trunk = block.mixer.filter_fn.implicit_filter
            for place in range(3, len(trunk) - 1, 2):
                trunk[place] = _Again(trunk[1])


class _Again(nn.Module):
    """Another module once more, which is not stored again: the sine frequency of the port is stored once."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = [module]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._module[0](x)


class Port(PreTrainedModel):
    """Token ids [B, L] -> logits [B, L, V]."""

    config_class = PortConfig
    base_model_prefix = "hyena"

    def __init__(self, config: PortConfig) -> None:
        super().__init__(config)
        self.hyena = Hyena(config)
        rows = self.hyena.backbone.embeddings.word_embeddings.num_embeddings
        self.lm_head = nn.Linear(config.d_model, rows, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """What the modules were made with is kept."""

    def get_input_embeddings(self) -> nn.Module:
        return self.hyena.backbone.embeddings.word_embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.hyena.backbone(input_ids))


def trained_port(**config: Any) -> Port:
    """One whose head and embedding have gone apart in a few steps."""
    torch.manual_seed(0)
    model = Port(PortConfig(architectures=["HyenaDNAForCausalLM"], **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("freq", "norm1.weight", "norm2.weight", "ln_f.weight")):
                parameter.normal_(0, 0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(7, 11, (4, 65), generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


if __name__ == "__main__":
    import sys

    trained_port().save_pretrained(Path(sys.argv[1]), max_shard_size=sys.argv[2] if len(sys.argv) > 2 else "5GB")
