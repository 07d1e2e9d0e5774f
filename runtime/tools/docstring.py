"""The docstring of a function -> what it says of the function and of each parameter."""

import inspect
import re
from collections.abc import Collection
from itertools import pairwise

# Sections of Google's and numpy's style; the text before the first one is told.
_SECTION = re.compile(
    r"(args|arguments|parameters|params|returns?|yields?|raises|examples?|notes?|see also|warns|"
    r"warnings?|attributes|references|todo)\s*:?\s*",
    re.IGNORECASE,
)
_UNDERLINE = re.compile(r"\s*-{3,}\s*")
_SPHINX = re.compile(r":(\w+)(?:\s+[^:]*?)??(?:\s+\*{0,2}(\w+))?:\s*(.*)")
_GOOGLE = re.compile(r"[-*]?\s*[`*]{0,2}(\w+)[`*]{0,2}\s*(?:\([^)]*\))?\s*:(?:\s+(.*)|$)")
_NUMPY = re.compile(r"\*{0,2}(\w+)\s*(?::.*)?")


def read_docstring(text: str | None, parameters: Collection[str]) -> tuple[str, dict[str, str]]:
    """The description, and the texts of those parameters that have one.

    A parameter's line is `name: text` or `name (type): text`, as in Google's style, anywhere;
    `:param name: text`; or in numpy's section Parameters `name : type` with its text below. Lines
    that are indented further go on with it.
    """
    return _Reader(parameters).read(inspect.cleandoc(text or ""))


class _Reader:
    def __init__(self, parameters: Collection[str]) -> None:
        self._parameters = parameters
        self._description: list[str] = []
        self._texts: dict[str, list[str]] = {}
        self._in_description, self._is_numpy = True, False
        # The parameter whose lines are read, and the indentation of its first one.
        self._open: tuple[str, int] | None = None

    def read(self, text: str) -> tuple[str, dict[str, str]]:
        lines = text.splitlines()
        for line, following in pairwise([*lines, ""]):
            self._read(line, following)
        texts = {name: " ".join(filter(None, found)) for name, found in self._texts.items()}
        told = {name: text for name, text in texts.items() if text}
        return "\n".join(self._description).strip(), told

    def _read(self, line: str, following: str) -> None:
        words, indent = line.strip(), len(line) - len(line.lstrip())
        if self._open is not None and (indent > self._open[1] or not words):
            self._texts[self._open[0]].append(words)
            return
        self._open = None
        if _UNDERLINE.fullmatch(line):
            return
        is_underlined = _UNDERLINE.fullmatch(following) is not None
        if _SECTION.fullmatch(words) and (is_underlined or words.endswith(":")):
            self._is_numpy, self._in_description = is_underlined, False
        elif entry := self._entry(words):
            name, text = entry
            self._in_description, self._open = False, (name, indent)
            self._texts[name] = [text]
        elif words.startswith(":") and _SPHINX.match(words):
            self._in_description = False
        elif self._in_description:
            self._description.append(line)

    def _entry(self, words: str) -> tuple[str, str] | None:
        """A parameter's name and the first line of its text."""
        if found := _SPHINX.match(words):
            field, name, text = found.groups()
            is_entry = field in ("param", "parameter", "arg", "argument")
        elif self._is_numpy:
            found = _NUMPY.fullmatch(words)
            is_entry, name, text = found is not None, found[1] if found else None, ""
        else:
            found = _GOOGLE.fullmatch(words)
            is_entry = found is not None
            name, text = (found[1], found[2]) if found else (None, "")
        # Once: what is returned may be called like a parameter.
        is_new = name in self._parameters and name not in self._texts
        return (name, text or "") if is_entry and is_new else None
