"""What is scored: a dialogue of our own in the chat format; without a tokenizer, random ids."""

import json
from pathlib import Path

from ..runtime.bench.artifact import random_ids
from ..runtime.harmony.messages import read_messages
from ..runtime.harmony.render import render_chat, render_messages
from ..runtime.manifest import Manifest
from ..runtime.tokenizer import Tokenizer

DIALOGUE = Path(__file__).parent / "dialogue.json"  # 2,000 tokens of o200k


def scored_text(manifest: Manifest, tokenizer: Tokenizer | None) -> tuple[str, list[int]]:
    """What it is called, and its ids."""
    if tokenizer is None:
        return "seeded random ids, as it has no tokenizer", random_ids(manifest)
    return "the shipped dialogue", dialogue_ids(tokenizer)


def dialogue_ids(tokenizer: Tokenizer) -> list[int]:
    """The dialogue up to its last answer as a prompt, and that answer as a model says it."""
    dialogue = json.loads(DIALOGUE.read_text(encoding="utf-8"))
    *history, answer = dialogue.pop("messages")
    prompt = render_chat(history, tokenizer, **dialogue)
    said = render_messages(read_messages([answer]), tokenizer)
    opening = [tokenizer.special["<|start|>"], *tokenizer.encode("assistant")]
    assert prompt[-len(opening) :] == said[: len(opening)] == opening
    return [*prompt, *said[len(opening) : -1], tokenizer.special["<|return|>"]]
