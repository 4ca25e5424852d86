"""HyenaDNA (Nguyen et al. 2023) in transformers 4 and 5: configuration and models, in one file that needs torch and
transformers alone. An exported directory carries a copy, which `trust_remote_code=True` loads.

    y = x_0 (h_0 * ( ... x_{N-1} v)),   x_0 | ... | x_{N-1} | v = short_conv(in_proj(x)),   h = implicit filters

Differences from a usual decoder: there is no cache, so that `generate` reads the whole sequence for every token, and a
convolution knows no mask. Rows that are padded on the left, by a mask or by [PAD] alone, are moved to the left before
they are read, so that each gives what it gives alone; padding between tokens is read as tokens.

Legend: B sequences, L tokens, D channels, N order of the operator, V rows of the embedding.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, SequenceClassifierOutput

A, T = 7, 10
"""Token ids of the bases: A, C, G and T are 7 to 10. Only they are scored."""


class HyenaDNAConfig(PretrainedConfig):
    """The keys of config.json; those of the LongSafari/hyenadna-*-hf models, and filter_shift."""

    model_type = "hyenadna"
    attribute_map = {"hidden_size": "d_model", "num_hidden_layers": "n_layer"}

    def __init__(self, d_model: int = 128, d_inner: int | None = None, n_layer: int = 2, max_seq_len: int = 1024,
                 hyena_order: int = 2, short_filter_order: int = 3, filter_order: int = 64, emb_dim: int = 5,
                 num_inner_mlps: int = 2, activation_freq: float = 10.0, filter_shift: float = 0.05,
                 vocab_size: int = 12, pad_vocab_size_multiple: int = 8, embed_dropout: float = 0.1,
                 resid_dropout: float = 0.0, layer_norm_epsilon: float = 1e-5, initializer_range: float = 0.02,
                 tie_word_embeddings: bool = False, **others: Any) -> None:
        self.d_model, self.d_inner, self.n_layer = d_model, d_inner or 4 * d_model, n_layer
        self.max_seq_len, self.hyena_order, self.short_filter_order = max_seq_len, hyena_order, short_filter_order
        self.filter_order, self.emb_dim, self.num_inner_mlps = filter_order, emb_dim, num_inner_mlps
        self.activation_freq, self.filter_shift = activation_freq, filter_shift
        self.vocab_size, self.pad_vocab_size_multiple = vocab_size, pad_vocab_size_multiple
        self.embed_dropout, self.resid_dropout = embed_dropout, resid_dropout
        self.layer_norm_epsilon, self.initializer_range = layer_norm_epsilon, initializer_range
        super().__init__(**{"use_cache": False, "pad_token_id": 4, "tie_word_embeddings": tie_word_embeddings} | others)

    @property
    def rows(self) -> int:
        """Of the embedding: the vocabulary, padded."""
        multiple = self.pad_vocab_size_multiple
        return -(-self.vocab_size // multiple) * multiple


class _Sine(nn.Module):
    """The frequency of every sine of a filter."""

    def __init__(self, config: HyenaDNAConfig) -> None:
        super().__init__()
        self.freq = nn.Parameter(torch.full((1, config.filter_order), float(config.activation_freq)))


class _Filter(nn.Module):
    """The implicit filters: a small sine network of the lag, under a window that decays. Always in float32 or wider,
    and its positions are computed, because half precision cannot count lags."""

    def __init__(self, config: HyenaDNAConfig) -> None:
        super().__init__()
        self.config, width = config, config.filter_order
        self.channels = (config.hyena_order - 1) * config.d_model
        self.bias = nn.Parameter(torch.randn(self.channels))
        trunk: dict[str, nn.Module] = {"0": nn.Linear(config.emb_dim, width), "1": _Sine(config)}
        for layer in range(1, config.num_inner_mlps + 1):
            trunk[str(2 * layer)] = nn.Linear(width, width)
        trunk[str(2 * config.num_inner_mlps + 2)] = nn.Linear(width, self.channels, bias=False)
        self.implicit_filter = nn.ModuleDict(trunk)

    def forward(self, length: int) -> Tensor:
        """The first `length` lags, [(N - 1) D, L]."""
        *trunk, last = [part for part in self.implicit_filter.values() if isinstance(part, nn.Linear)]
        freq: Tensor = self.implicit_filter["1"].freq  # type: ignore[assignment]
        dtype = torch.promote_types(freq.dtype, torch.float32)
        time, x = self._positions(length, dtype, freq.device)
        for linear in trunk:
            x = torch.sin(freq.to(dtype) * F.linear(x, linear.weight.to(dtype), linear.bias.to(dtype)))
        rates = torch.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, self.channels).to(freq.device, dtype)
        window = torch.exp(time * rates) + self.config.filter_shift
        return (F.linear(x, last.weight.to(dtype)) * window).transpose(0, 1)

    def _positions(self, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Time [L, 1], and features [L, E]: time, cosines and negative sines. From float32 on a CPU, as published."""
        longest, bands = self.config.max_seq_len, (self.config.emb_dim - 1) // 2
        time = torch.linspace(0, 1, longest, device="cpu")[:length, None]
        place = 2 * math.pi * torch.linspace(0, longest - 1, longest, device="cpu")[:length, None] / longest
        wave = torch.exp(-1j * torch.linspace(1e-4, bands - 1, bands, device="cpu")[None] * place)
        features = torch.cat([time, wave.real, wave.imag], dim=-1)
        return time.to(device, dtype), features.to(device, dtype)


def _causal_conv(u: Tensor, h: Tensor, bias: Tensor) -> Tensor:
    """y[t] = sum_{s <= t} h[t - s] u[s] + bias u[t]; u [B, D, L], h [D, L], in the dtype of h."""
    x, size = u.to(h.dtype), 2 * u.shape[-1]
    spectrum = torch.fft.rfft(x, n=size) * torch.fft.rfft(h, n=size)
    return (torch.fft.irfft(spectrum, n=size)[..., : u.shape[-1]] + x * bias.to(h.dtype)[:, None]).to(u.dtype)


class _Operator(nn.Module):
    """The Hyena operator of order N, [B, L, D] -> the same."""

    def __init__(self, config: HyenaDNAConfig) -> None:
        super().__init__()
        self.order, width, taps = config.hyena_order, (config.hyena_order + 1) * config.d_model, \
            config.short_filter_order
        self.in_proj, self.out_proj = nn.Linear(config.d_model, width), nn.Linear(config.d_model, config.d_model)
        self.short_filter = nn.Conv1d(width, width, taps, groups=width, padding=taps - 1)
        self.filter_fn = _Filter(config)

    def forward(self, x: Tensor) -> Tensor:
        projected = self.short_filter(self.in_proj(x).transpose(1, 2))[..., : x.shape[1]]
        *gates, u = projected.chunk(self.order + 1, dim=1)
        with torch.autocast(x.device.type, enabled=False):  # transforms never run in half precision
            filters = self.filter_fn(x.shape[1]).chunk(self.order - 1)
            for h, bias in zip(filters, self.filter_fn.bias.chunk(self.order - 1), strict=True):
                u = _causal_conv(u * gates.pop(), h, bias)
            u = u * gates.pop()
        return self.out_proj(u.transpose(1, 2))


class _Mlp(nn.Module):
    def __init__(self, config: HyenaDNAConfig) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(config.d_model, config.d_inner), nn.Linear(config.d_inner, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class _Block(nn.Module):
    def __init__(self, config: HyenaDNAConfig) -> None:
        super().__init__()
        self.mixer, self.mlp = _Operator(config), _Mlp(config)
        self.norm1 = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.norm2 = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.resid_dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.mixer(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class _Embeddings(nn.Module):
    def __init__(self, config: HyenaDNAConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.rows, config.d_model)


class _Backbone(nn.Module):
    def __init__(self, config: HyenaDNAConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.dropout = nn.Dropout(config.embed_dropout)
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)


class HyenaDNAPreTrainedModel(PreTrainedModel):
    """What the models have in common."""

    config_class = HyenaDNAConfig
    base_model_prefix = "hyena"
    _no_split_modules = ["_Block"]
    # Positions, and copies of the one frequency, which other programs store.
    _keys_to_ignore_on_load_unexpected = [r"pos_emb\.", r"modulation\.", r"implicit_filter\.(?!1\.)\d+\.freq"]

    def real(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Which tokens are no padding: bool [B, L]."""
        return input_ids != self.config.pad_token_id if attention_mask is None else attention_mask != 0

    def _init_weights(self, module: nn.Module) -> None:
        """Of a model that is made from a configuration alone."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, 0.0, std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, _Sine):
            nn.init.constant_(module.freq, float(self.config.activation_freq))
        elif isinstance(module, _Filter):
            nn.init.normal_(module.bias)
        elif isinstance(module, nn.Conv1d):
            bound = self.config.short_filter_order ** -0.5
            for weight in module.parameters():
                nn.init.uniform_(weight, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def _moved(x: Tensor, first: Tensor, back: int = 1) -> Tensor:
    """Rows of x [B, L, ...] turned to the left by `first` [B] places; back=-1 turns them to the right."""
    place = (torch.arange(x.shape[1], device=x.device)[None] + back * first[:, None]) % x.shape[1]
    return x.gather(1, place.view(*place.shape, *[1] * (x.dim() - 2)).expand(*place.shape, *x.shape[2:]))


class HyenaDNAModel(HyenaDNAPreTrainedModel):
    """Token ids [B, L] -> hidden states [B, L, D], the final norm's output."""

    def __init__(self, config: HyenaDNAConfig) -> None:
        super().__init__(config)
        self.backbone = _Backbone(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.embeddings.word_embeddings = value  # type: ignore[assignment]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                output_hidden_states: bool | None = None, return_dict: bool | None = None) -> Any:
        """
        Args:
            attention_mask: [B, L], 0 where padding stands on the left or the right of a row; None: where [PAD] does.
            output_hidden_states: also the states behind the embedding and each block.
        """
        if input_ids.shape[1] > self.config.max_seq_len:
            raise ValueError(f"the input has {input_ids.shape[1]} tokens, but this model takes at most max_seq_len = "
                             f"{self.config.max_seq_len}: shorten it")
        first = self.real(input_ids, attention_mask).to(torch.int64).argmax(1)
        padded = bool((first > 0).any())
        if padded:
            input_ids = _moved(input_ids, first)
        states = [self.backbone.dropout(self.get_input_embeddings()(input_ids))]
        for layer in self.backbone.layers:
            states.append(layer(states[-1]))
            if not output_hidden_states:
                del states[0]
        last = self.backbone.ln_f(states[-1])
        if padded:
            last, states = _moved(last, first, -1), [_moved(x, first, -1) for x in states]
        output = BaseModelOutput(last_hidden_state=last, hidden_states=tuple(states) if output_hidden_states else None)
        return output if return_dict is not False else output.to_tuple()


class HyenaDNAForCausalLM(HyenaDNAPreTrainedModel, GenerationMixin):
    """Token ids [B, L] -> logits [B, L, V] of the token behind each, and the mean loss of those that are bases."""

    _tied_weights_keys = {"lm_head.weight": "hyena.backbone.embeddings.word_embeddings.weight"}

    def __init__(self, config: HyenaDNAConfig) -> None:
        super().__init__(config)
        self.hyena = HyenaDNAModel(config)
        self.lm_head = nn.Linear(config.d_model, config.rows, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.hyena.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.hyena.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
                output_hidden_states: bool | None = None, return_dict: bool | None = None) -> Any:
        """
        Args:
            labels: [B, L], usually input_ids: each is what the token before it predicts. Only A, C, G and T are
                scored, as in training: not N, [UNK], [SEP], [PAD] or -100. Where nothing is scored the loss is 0.
        """
        found = self.hyena(input_ids, attention_mask, output_hidden_states=output_hidden_states)
        logits = self.lm_head(found.last_hidden_state)
        loss = None
        if labels is not None:
            real = self.real(input_ids, attention_mask)  # padding is no target, and predicts none
            targets = labels[:, 1:].to(logits.device)
            scored = (real[:, 1:] & real[:, :-1]).to(logits.device) & (targets >= A) & (targets <= T)
            targets = targets.masked_fill(~scored, -100)
            total = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="sum")
            loss = total / scored.sum().clamp(min=1)  # a batch of N alone has no gradient, rather than NaN
        output = CausalLMOutput(loss=loss, logits=logits, hidden_states=found.hidden_states)
        return output if return_dict is not False else output.to_tuple()

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                                      **_: Any) -> dict[str, Any]:
        """All of the sequence: there is no cache."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}


class HyenaDNAForSequenceClassification(HyenaDNAPreTrainedModel):
    """Token ids [B, L] -> logits [B, num_labels] of the last token's state; with one label a number."""

    def __init__(self, config: HyenaDNAConfig) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 1)
        self.hyena = HyenaDNAModel(config)
        self.score = nn.Linear(config.d_model, self.num_labels, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.hyena.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.hyena.set_input_embeddings(value)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
                output_hidden_states: bool | None = None, return_dict: bool | None = None) -> Any:
        """
        Args:
            labels: [B], classes, or with one label numbers.
        """
        found = self.hyena(input_ids, attention_mask, output_hidden_states=output_hidden_states)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (places * self.real(input_ids, attention_mask)).amax(1)
        logits = self.score(found.last_hidden_state[torch.arange(len(last), device=last.device), last])
        loss = None
        if labels is not None:
            loss = (F.mse_loss(logits[:, 0].float(), labels.float()) if self.num_labels == 1
                    else F.cross_entropy(logits.float(), labels))
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=found.hidden_states)
        return output if return_dict is not False else output.to_tuple()
