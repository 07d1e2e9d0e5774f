"""The published vocabulary, built from its ranks where those are at hand: for tests only."""

import base64
import itertools
import os
from pathlib import Path

from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from osscompile.runtime.tokenizer import byte_alphabet

RANKS = "TIKTOKEN_ENCODINGS_BASE"  # names the folder with o200k_base.tiktoken

# The special tokens of o200k_harmony that a table may hold: ids 199998..200018.
NAMED = {
    199998: "<|startoftext|>",
    199999: "<|endoftext|>",
    200002: "<|return|>",
    200003: "<|constrain|>",
    200005: "<|channel|>",
    200006: "<|start|>",
    200007: "<|end|>",
    200008: "<|message|>",
    200012: "<|call|>",
    200018: "<|endofprompt|>",
}
SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_o200k(path: Path) -> Path:
    """Write a tokenizer.json of 200,019 ids."""
    ranks: dict[bytes, int] = {}
    for line in (Path(os.environ[RANKS]) / "o200k_base.tiktoken").read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    letters = {byte: letter for letter, byte in byte_alphabet().items()}

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    merges = [tuple(map(spell, last_merge(token, ranks))) for token in ranks if len(token) > 1]
    backend = Backend(models.BPE(vocabulary, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_letters])
    names = [NAMED.get(id, f"<|reserved_{id}|>") for id in range(199998, 200019)]
    backend.add_special_tokens(names)
    backend.save(str(path), pretty=False)
    return path


def last_merge(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that BPE joins last to make this one."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [a + b for a, b in itertools.pairwise(parts)]
        i = min(range(len(joined)), key=lambda i: ranks.get(joined[i], len(ranks)))
        parts[i : i + 2] = [joined[i]]
    return parts
