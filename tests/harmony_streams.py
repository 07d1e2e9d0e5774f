"""Random answers, and what must hold of whatever is parsed.

A million of them: `python tests/harmony_streams.py 0 1000000` (the first seed and the last), about
ten minutes on two cores at half each.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

from harmony_texts import marked

import osscompile.nano
from osscompile.runtime.harmony import (
    Arguments,
    Finish,
    Piece,
    PieceStream,
    ToolCall,
    as_messages,
    render_chat,
)
from osscompile.runtime.harmony.parse import MOST_HELD, AnswerParser
from osscompile.runtime.tokenizer import Tokenizer

SPECIALS = (
    *("<|start|>", "<|channel|>", "<|channel|>", "<|message|>", "<|message|>", "<|constrain|>"),
    *("<|end|>", "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>", "<|startoftext|>"),
)
HEADER_WORDS = (
    *("assistant", "analysis", "commentary", "final", " to=functions.f", " to=python", "json"),
    *(" code", " to=", "to", "user", "functions.f", "Final", "commentary?", "musing", " ", "\n"),
)
# None of these can be a word of a header, so each must be shown.
TEXTS = ("¿uno", " ¿dos", "\n¿tres", "¿🙂", "{¿}", "¿to=x")


def stream_answer(
    ids: Iterable[int], tokenizer: Tokenizer, stop: tuple[str, ...] = ()
) -> Iterator[Piece]:
    """What ids tell, as they come, until the answer ends; then no more are taken."""
    stream = PieceStream(tokenizer, stop)
    for id in ids:
        yield from stream.push(id)
        if stream.ended:
            return
    yield from stream.finish("length")


def said(pieces: Iterable[Piece]) -> list[Piece]:
    """Join what follows each other of the same kind."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        same = type(last) is type(piece) and last is not None and last.channel == piece.channel
        if same and isinstance(last, Arguments) and isinstance(piece, Arguments):
            joined[-1] = dataclasses.replace(last, delta=last.delta + piece.delta)
        elif same and last is not None and last.text:
            joined[-1] = dataclasses.replace(last, text=last.text + piece.text)
        else:
            joined.append(piece)
    return joined


def check_stream(tokenizer: Tokenizer, random: Random) -> None:
    """Raise AssertionError if a random answer is not read right."""
    parts = random.choices(
        [SPECIALS, HEADER_WORDS, TEXTS],
        weights=random.choice([(2, 2, 1), (1, 1, 3), (3, 1, 1)]),
        k=random.randrange(24),
    )
    text = "".join(random.choice(part) for part in parts)
    ids = marked(tokenizer, text)
    pieces = list(stream_answer(ids, tokenizer))
    assert [isinstance(piece, Finish) for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(_text_of(piece) for piece in pieces[:-1]), text
    # Cut anywhere, an answer begins in the same way, but for what was held back.
    parser = AnswerParser(tokenizer)
    so_far = [piece for id in ids for piece in parser.push(id)]
    assert so_far == pieces[: len(so_far)], text
    # The same text in other tokens, a byte each, says the same while nothing is held too long.
    in_bytes = _in_bytes(tokenizer, ids)
    if len(in_bytes) < MOST_HELD:
        assert said(stream_answer(in_bytes, tokenizer)) == said(pieces), text
    cut = random.randrange(len(ids) + 1)
    list(stream_answer(ids[:cut], tokenizer))
    # Nothing is lost, until the answer ends or another begins to speak.
    shown = "".join(_text_of(piece) for piece in pieces)
    others = re.search(r"user|(?<!to=)(functions\.f|python)", text)
    num_recipients = text.count(" to=")  # only the first stands, and none that was cut off
    if not others and num_recipients <= (pieces[-1] != Finish("length")):
        before = re.split(r"<\|(?:return|call|endoftext)\|>", text)[0]
        expected, found = _texts(before), _texts(shown)
        if num_recipients:  # what stands between a name and its arguments is told before the call
            expected, found = sorted(expected), sorted(found)
        assert expected == found, (text, pieces)
    # The conversation can go on with it.
    messages = [{"role": "user", "content": "Hi"}, *as_messages(pieces)]
    render_chat([*messages, {"role": "user", "content": "And?"}], tokenizer)


@functools.cache
def _byte_ids(tokenizer: Tokenizer) -> dict[int, int]:
    """Return the ids of the tokens that stand for one byte each."""
    spelled = ((tokenizer.token_bytes(id), id) for id in range(tokenizer.vocab_size))
    return {token[0]: id for token, id in spelled if len(token) == 1}


def _in_bytes(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    specials, bytes_ = set(tokenizer.special.values()), _byte_ids(tokenizer)
    return [
        byte_id
        for id in ids
        for byte_id in ([id] if id in specials else [bytes_[b] for b in tokenizer.token_bytes(id)])
    ]


def _text_of(piece: Piece) -> str:
    if isinstance(piece, ToolCall):
        return piece.name
    return piece.delta if isinstance(piece, Arguments) else piece.text


def _texts(text: str) -> list[str]:
    return re.findall(r"¿(?:uno|dos|tres|🙂|\}|to=x)", text)


if __name__ == "__main__":
    nano = Tokenizer(Path(osscompile.nano.__file__).parent / "checkpoint" / "tokenizer.json")
    first, last = int(sys.argv[1]), int(sys.argv[2])
    for seed in range(first, last):
        try:
            check_stream(nano, Random(seed))
        except BaseException:  # also an interrupt: the seed tells how far it went
            print(f"seed {seed}", file=sys.stderr)
            raise
    print(f"{last - first} streams")
