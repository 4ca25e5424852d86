"""The published character tokenizer as files that AutoTokenizer loads without running a stranger's code.

The published repository has a tokenizer of its own code; here it is a tokenizer.json of the `tokenizers` library: one
token for each character, ids as published, [SEP] after a sequence, padding on the left. Lower case reads as upper case,
as everywhere in this package.
"""

import json
from typing import Any

from hyena_dist.data.tokenizer import TOKENS

_BASES = "ACGTN"
_SPECIAL = {"bos_token": "[BOS]", "eos_token": "[SEP]", "sep_token": "[SEP]", "cls_token": "[CLS]",
            "pad_token": "[PAD]", "mask_token": "[MASK]", "unk_token": "[UNK]"}


def tokenizer_files(max_seq_len: int) -> dict[str, bytes]:
    """Contents by name. `max_seq_len` is to what length the tokenizer cuts where it is asked to."""
    ids = {token: number for number, token in enumerate(TOKENS)}
    special = [token for token in TOKENS if token.startswith("[")]
    added = [{"id": ids[token], "content": token, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for token in special]
    sep = {"SpecialToken": {"id": "[SEP]", "type_id": 0}}
    first, second = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    tokenizer: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"String": base.lower()}, "content": base} for base in _BASES]},
        "pre_tokenizer": None,
        "post_processor": {"type": "TemplateProcessing", "single": [first, sep], "pair": [first, sep, second, sep],
                           "special_tokens": {"[SEP]": {"id": "[SEP]", "ids": [ids["[SEP]"]], "tokens": ["[SEP]"]}}},
        "decoder": {"type": "Fuse"},
        # Of pairs of bytes no pair is merged: what is left is one token for each character.
        "model": {"type": "BPE", "dropout": None, "unk_token": "[UNK]", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": ids, "merges": []}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_seq_len, "padding_side": "left",
              "truncation_side": "right", "clean_up_tokenization_spaces": False, "model_input_names": ["input_ids"],
              **_SPECIAL}
    contents = {"tokenizer.json": tokenizer, "tokenizer_config.json": config, "special_tokens_map.json": _SPECIAL}
    return {name: (json.dumps(content, indent=1) + "\n").encode() for name, content in contents.items()}
