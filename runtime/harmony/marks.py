"""Tell text of a request from text of a template in what the template made of both."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import InputError

# Code points that Unicode keeps for use inside programs: text has none, but may be made to.
NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
SIGN = re.compile(r"[^\w\s]")
BAR = "|"  # which ordinary text seldom has


def choose_mark(*texts: object) -> str:
    """A character that none of what is given, texts or JSON's objects, has. Raises InputError."""
    taken = json.dumps(texts, ensure_ascii=False)
    free = next((mark for mark in NONCHARACTERS if mark not in taken), None)
    if free is None:
        raise InputError("messages: expected text, found all noncharacters of Unicode in it")
    return free


@dataclass(frozen=True)
class Marks:
    """Keeps text of a request from becoming special tokens in a template's output.

    Before a template sees it, some signs in the request that names of special tokens are made of
    get `mark` on both sides. What the template writes of its own has no marks, so a name with a
    mark in it was not written by the template alone: it stays text, and loses the mark. Every
    BAR is marked, the signs of names without one, and at the edge of a text also the sign that
    could begin or end a name there. So what a request has of a whole name is marked whatever the
    template puts together and wherever it cuts, unless it takes out single characters, the mark
    among them; or cuts a text beside the first or last sign of a name and writes the bars itself.

    What templates compare, count and cut at stays as it is: words and other signs, as in
    `</think>`. A word may become part of a name between the signs of a template, as roles do in
    `<|{{ message.role }}|>`. Names without a sign stay text.
    """

    mark: str
    names: frozenset[str]

    @cached_property
    def _signs(self) -> re.Pattern[str]:
        barred = sorted(name for name in self.names if BAR in name)
        others = "".join(sorted(name for name in self.names if BAR not in name))
        first = {sign for name in barred for sign in SIGN.findall(name[:1])}
        last = {sign for name in barred for sign in SIGN.findall(name[-1:])}
        parts = [re.escape(sign) for sign in sorted({BAR, *SIGN.findall(others)})]
        parts += [rf"{re.escape(sign)}\Z" for sign in sorted(first)]
        parts += [rf"\A{re.escape(sign)}" for sign in sorted(last)]
        return re.compile("|".join(parts))

    @cached_property
    def _special(self) -> re.Pattern[str]:
        names = [name for name in self.names if SIGN.search(name)]
        longest_first = sorted(names, key=lambda name: (-len(name), name))
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def put(self, value: Any) -> Any:
        """Mark all texts in one of JSON's values."""
        if isinstance(value, str):
            return self._signs.sub(rf"{self.mark}\g<0>{self.mark}", value)
        if isinstance(value, dict):
            return {self.put(key): self.put(item) for key, item in value.items()}
        return [self.put(item) for item in value] if isinstance(value, list | tuple) else value

    def take(self, value: Any) -> Any:
        """Remove the marks again."""
        if isinstance(value, str):
            return value.replace(self.mark, "")
        if isinstance(value, dict):
            return {self.take(key): self.take(item) for key, item in value.items()}
        return [self.take(item) for item in value] if isinstance(value, list | tuple) else value

    def to_json(
        self,
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """The filter `tojson` of transformers; its text is marked, for JSON may escape marks."""
        text = json.dumps(
            self.take(value),
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )
        marked: str = self.put(text)
        return marked

    def split(self, text: str) -> Iterator[tuple[str, bool]]:
        """What a template wrote, in parts: text without marks, and names of special tokens."""
        for i, part in enumerate(self._special.split(text)):
            if part:
                yield (part, True) if i % 2 else (self.take(part), False)
