"""Stop strings in text that comes in parts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osscompile.runtime.stop_strings import StopSearch


def shown(parts: list[str], stops: tuple[str, ...]) -> tuple[list[str], bool]:
    search = StopSearch(stops)
    texts = [search.push(part) for part in parts]
    return [*texts, search.flush()], search.found


@pytest.mark.parametrize(
    ("parts", "stops", "texts", "found"),
    [
        (["ab", "cd"], (), ["ab", "cd", ""], False),
        (["ab", "cd"], ("cd",), ["ab", "", ""], True),
        (["ab", "cd"], ("bc",), ["a", "", ""], True),  # across parts
        (["ab", "xd"], ("bc",), ["a", "bxd", ""], False),  # told only by the next part
        (["ab"], ("bc",), ["a", "b"], False),  # nothing more comes
        (["aab"], ("ab",), ["a", ""], True),
        (["a", "a", "b"], ("aab",), ["", "", "", ""], True),
        (["a", "a", "a", "b"], ("aab",), ["", "", "a", "", ""], True),  # a restart inside
        (["abc"], ("b", "abc"), ["a", ""], True),  # b is complete first
        (["a", "b", "c"], ("b", "abc"), ["", "a", "", ""], True),
        (["abc"], ("bc", "abc"), ["", ""], True),  # of two that end together the longest
        (["x stop y stop"], ("stop",), ["x ", ""], True),  # the first
        (["👍a", "é"], ("aé",), ["👍", "", ""], True),
        (["a", "", "b"], ("ab",), ["", "", "", ""], True),
    ],
)
def test_what_is_shown(
    parts: list[str], stops: tuple[str, ...], texts: list[str], found: bool
) -> None:
    assert shown(parts, stops) == (texts, found)


def test_nothing_is_shown_once_it_was_found() -> None:
    search = StopSearch(("b",))
    assert [search.push("abc"), search.push("d"), search.flush()] == ["a", "", ""]


@settings(max_examples=500, derandomize=True, database=None, deadline=None)
@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_parts_change_nothing_and_only_what_is_uncertain_is_held_back(
    parts: list[str], stops: list[str]
) -> None:
    text = "".join(parts)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    texts, found = shown(parts, tuple(stops))
    assert "".join(texts) == expected and found == bool(ends)
    search = StopSearch(tuple(stops))
    come, told = "", ""
    for part in parts:
        come, told = come + part, told + search.push(part)
        if not search.found:
            held = come[len(told) :]
            assert not held or any(stop.startswith(held) for stop in stops)
