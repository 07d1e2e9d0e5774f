"""Build nano's tokenizer.json: byte-level BPE with the special tokens of gpt-oss last."""

import json
import re
from collections.abc import Iterable
from random import Random

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from osscompile.nano.dialogues import EFFORTS, TASKS, draw_dialogue
from osscompile.nano.lookups import NAMES, PLACES

VOCAB_SIZE = 1024
NUM_DIALOGUES = 6000
MIN_FREQUENCY = 30

# The 21 special tokens in the order of the real vocabulary (199998..200018).
SPECIALS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|reserved_200000|>",
    "<|reserved_200001|>",
    "<|return|>",
    "<|constrain|>",
    "<|reserved_200004|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|reserved_200009|>",
    "<|reserved_200010|>",
    "<|reserved_200011|>",
    "<|call|>",
    *(f"<|reserved_{number}|>" for number in range(200013, 200018)),
    "<|endofprompt|>",
)

# Lower-case words include the space before them, capitalised words do not: a name has the same
# tokens after a space, a quote or a newline, so that copying it needs no second spelling. Digits
# are single, as column arithmetic needs them.
PIECES = (
    r" ?[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[\p{Lu}\p{Lt}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}\p{M}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(seed: int = 1) -> Tokenizer:
    """Train the BPE merges on dialogues drawn from `seed`; any UTF-8 text round-trips."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIALS),
        min_frequency=MIN_FREQUENCY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(Random(seed)), trainer)
    return _with_specials(tokenizer)


def _with_specials(tokenizer: Tokenizer) -> Tokenizer:
    """Pad the vocabulary, so that the special tokens are its last ids."""
    state = json.loads(tokenizer.to_str())
    for index in range(tokenizer.get_vocab_size(), VOCAB_SIZE - len(SPECIALS)):
        state["model"]["vocab"][f"<|unused_{index}|>"] = index
    filled = Tokenizer.from_str(json.dumps(state))
    filled.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS])
    return filled


def _texts(rng: Random) -> Iterable[str]:
    for _ in range(2 * MIN_FREQUENCY):
        yield from (*NAMES, *PLACES)  # so that most are one token
    for _ in range(NUM_DIALOGUES):
        dialogue = draw_dialogue(rng, rng.choice(TASKS), rng.choice(EFFORTS))
        texts = [dialogue.prefix]
        texts += [branch.prompt + branch.completion for branch in dialogue.branches]
        for text in texts:
            yield from (part for part in re.split(r"<\|[a-z]+\|>", text) if part)
