"""The tokenizer.json that GGUF's metadata stand for, and the generation_config.json."""

import json
import re
import warnings
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from tokenizers import Tokenizer

from ...errors import CheckpointError
from .gguf_file import GgufFile

# Where o200k_harmony, the published vocabulary, cuts text before it merges bytes.
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = ("gpt-4o", "default", None)  # what Ollama calls `default`, it cuts this way
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # token types; the others stand for no text
PADDING = re.compile(r"\[PAD\d+\]")

EOS_KEYS = ("eos_token_id", "eot_token_id", "eos_token_ids")
# Field of generation_config.json -> key after `general.sampling.`
SAMPLING_KEYS = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}


def make_tokenizer(file: GgufFile) -> bytes | None:
    """The bytes of a tokenizer.json, or None, with a warning, where the file has no tokenizer of
    this kind. Raises CheckpointError if what it has is damaged."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    model, pre = file.scalar("tokenizer.ggml.model"), file.scalar("tokenizer.ggml.pre")
    if tokens is None or model != "gpt2" or pre not in PRE_TOKENIZERS:
        found = "none" if tokens is None else f"{model!r}, pre {pre!r}"
        warnings.warn(
            f"{file.path}: tokenizer: expected model 'gpt2', pre 'gpt-4o', as of gpt-oss, found "
            f"{found}",
            stacklevel=2,
        )
        return None
    types = file.metadata.get("tokenizer.ggml.token_type")
    merges = file.metadata.get("tokenizer.ggml.merges")
    if not _are_strings(tokens) or not _are_strings(merges):
        raise _damaged(file.path, "lists of tokens and merges")
    types = np.full(len(tokens), NORMAL) if types is None else types
    if not isinstance(types, np.ndarray) or len(types) != len(tokens):
        raise _damaged(file.path, f"the types of {len(tokens)} tokens")
    vocab: dict[str, int] = {}
    added = []
    for id, (token, kind) in enumerate(zip(tokens, types.tolist(), strict=True)):
        if kind == NORMAL:
            vocab[token] = id
        elif kind in (CONTROL, USER_DEFINED) and not PADDING.fullmatch(token):
            added.append(_added_token(id, token, special=kind == CONTROL))
    pairs = [merge.split(" ", 1) for merge in merges]
    for pair in pairs:  # on some of these the library panics, which shows on stderr
        if len(pair) != 2 or "".join(pair) not in vocab:
            raise _damaged(file.path, f"tokens that its merges make, such as of {pair}")
    text = json.dumps(_tokenizer_json(vocab, pairs, added), ensure_ascii=False)
    try:
        data = text.encode()
        Tokenizer.from_str(text)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # what the library raises, or its panic, which is no Exception
        raise _damaged(file.path, f"tokens and merges that fit each other ({error})") from error
    return data


def generation_of(file: GgufFile) -> dict[str, Any]:
    """What stands in generation_config.json: the ids that end an answer, and how to sample."""
    ids: list[Any] = []
    for key in EOS_KEYS:
        value = file.metadata.get(f"tokenizer.ggml.{key}")
        ids += value.tolist() if isinstance(value, np.ndarray) else [value]
    ids = [id for id in ids if id is not None]
    generation = {n: file.scalar(f"general.sampling.{k}") for n, k in SAMPLING_KEYS.items()}
    generation["eos_token_id"] = list(dict.fromkeys(ids)) or None
    return {name: value for name, value in generation.items() if value is not None}


def _are_strings(values: Any) -> TypeGuard[list[str]]:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _damaged(path: Path, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: tokenizer: expected {expected}, found something else; download the file again"
    )


def _added_token(id: int, token: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": token, **flags, "special": special}


def _tokenizer_json(
    vocab: dict[str, int], merges: list[list[str]], added: list[dict[str, Any]]
) -> dict[str, Any]:
    """In the fields of the published file."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": O200K},
                    "behavior": "Isolated",
                    "invert": False,
                },
                _byte_level(add_prefix_space=False, trim_offsets=True, use_regex=False),
            ],
        },
        "post_processor": _byte_level(add_prefix_space=True, trim_offsets=False, use_regex=True),
        "decoder": _byte_level(add_prefix_space=True, trim_offsets=True, use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": merges,
        },
    }


def _byte_level(**flags: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", **flags}
