"""The pages and the tree of prefixes of the KV cache, on arrays that tell what was written where.

In place of keys and values a position holds a hash of all tokens up to its own, so that a page of
another sequence, or one that was written again, is seen.
"""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from osscompile.runtime import InputError, kv_cache, pages, prefix_tree
from osscompile.runtime.kv_cache import PAGE_TOKENS, KVCache, PageCounts, page_counts

WINDOW, CHUNK, CONTEXT = 128, 96, 1024


class Memory:
    """What a CPU does with the arrays of the cache."""

    def zeros(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return np.zeros(shape, dtype)

    def write(self, array: np.ndarray, part: np.ndarray, start: int = 0) -> None:
        array[start : start + len(part)] = part

    def copy(self, array: np.ndarray, source: int, target: int) -> None:
        array[target] = array[source]

    def clear(self, array: np.ndarray, count: int, start: int = 0) -> None:
        array[start : start + count] = 0


def manifest(sliding: tuple[bool, ...] = (True, False)) -> Any:
    cache = SimpleNamespace(shape=(PAGE_TOKENS,), dtype="int64")
    return SimpleNamespace(
        caches=(cache,) * 2 * len(sliding),
        sliding=sliding,
        window=WINDOW,
        chunk=CHUNK,
        context=CONTEXT,
        page_tokens=PAGE_TOKENS,
    )


class Sequences:
    """Computes sequences as an engine does, and checks every position that a kernel would read."""

    def __init__(self, counts: PageCounts | None = None, **options: Any) -> None:
        facts = manifest(**options)
        self.counts = counts or page_counts(facts, CONTEXT)
        self.cache = KVCache(facts, Memory(), self.counts)
        self.sequence = self.cache.start()
        self.sliding = [sliding for sliding in facts.sliding for _ in "kv"]

    def prompt(self, tokens: Sequence[int]) -> int:
        """How many of the tokens were not computed."""
        kept = self.sequence.reuse(tokens[:-1])
        for start in range(kept, len(tokens), CHUNK):
            self.step(tokens, start, min(CHUNK, len(tokens) - start))
        self.sequence.keep()
        return kept

    def decode(self, tokens: Sequence[int], start: int) -> None:
        for i in range(start, len(tokens)):
            self.step(tokens, i, 1)

    def step(self, tokens: Sequence[int], start: int, count: int) -> None:
        assert self.sequence.begin(count) == start
        hashes = self.hashes(tokens[: start + count])
        at = np.arange(start + count)
        for array, table, first in self._arrays(start):
            pages, slots = table[at // PAGE_TOKENS], at % PAGE_TOKENS
            array[pages[start:], slots[start:]] = hashes[start:]
            np.testing.assert_array_equal(array[pages, slots][first:], hashes[first:])
        self.sequence.append(tokens[start : start + count])

    def _arrays(self, start: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """And the first position that a token at `start` sees."""
        for array, sliding in zip(self.cache.arrays, self.sliding, strict=True):
            first = max(0, start - WINDOW + 1) if sliding else 0
            yield array, self.cache.tables[sliding], first

    def hashes(self, tokens: Sequence[int]) -> np.ndarray:
        """A hash of all tokens up to each."""
        return np.array(list(itertools.accumulate(tokens, lambda h, t: hash((h, t)))))

    def check_no_page_is_lost_or_held_twice(self) -> None:
        self.sequence.reuse(())
        self.cache._count()
        nodes = list(self.cache.root.below())
        full = [node.full for node in nodes] + self.cache._pages._free[0]
        window = [n.window for n in nodes if n.window is not None] + self.cache._pages._free[1]
        assert sorted(full) == list(range(self.counts.full))
        assert sorted(window) == list(range(self.counts.window))


def ids(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 1000, count).tolist()


def test_a_next_turn_computes_what_is_new() -> None:
    sequences, tokens = Sequences(), ids(0, 500)
    assert sequences.prompt(tokens[:300]) == 0
    sequences.decode(tokens[:330], 300)
    assert sequences.prompt(tokens) == 330


def test_the_same_prompt_again_computes_its_last_token() -> None:
    sequences, tokens = Sequences(), ids(1, 300)
    sequences.prompt(tokens)
    sequences.decode([*tokens, *ids(2, 40)], 300)
    assert sequences.prompt(tokens) == 299


@pytest.mark.parametrize("at", [1, 63, 64, 65, 127, 128, 129, 191, 192, 193])
def test_an_edited_message_and_back(at: int) -> None:
    """All pages are there still, so that any position can be gone on from."""
    sequences, tokens = Sequences(), ids(3, 200)
    edited = [*tokens[:at], 1, *ids(4, 100)]
    sequences.prompt(tokens)
    assert sequences.prompt(edited) == at
    assert sequences.prompt(tokens) == 199
    assert sequences.prompt(edited) == len(edited) - 1


def test_a_tool_loop_goes_back_to_the_end_of_a_prompt() -> None:
    """Some tokens of each call after a prompt are dropped in a later turn."""
    sequences = Sequences()
    tokens = ids(5, 420)
    sequences.prompt(tokens)
    for seed in (6, 7):
        tokens += ids(seed, 50)
        sequences.decode(tokens, len(tokens) - 50)
        tokens += ids(seed + 2, 150)
        sequences.prompt(tokens)
    dropped = [*tokens[:430], 2, *tokens[500:]]
    assert sequences.prompt(dropped) >= 420


def test_the_nearest_point_where_the_window_is_there() -> None:
    """With room for few window pages the beginning of a turn is kept, and the rest is not."""
    sequences = Sequences(PageCounts(17, 9))
    tokens = ids(10, 900)
    sequences.prompt(tokens[:200])
    sequences.prompt(tokens)
    assert 200 <= sequences.prompt([*tokens[:350], 1]) <= 256  # to the end of its page
    assert sequences.prompt([*tokens[:150], 1]) < 150


def test_the_least_recently_used_goes_first() -> None:
    sequences = Sequences(PageCounts(17, 17))
    first, second, third = (ids(seed, 300) for seed in (11, 12, 13))
    for tokens in (first, second, third, first):
        sequences.prompt(tokens)
    sequences.prompt(ids(14, 300))
    assert sequences.prompt(first) > 190
    assert sequences.prompt(second) < 190


def test_a_kept_point_outlasts_what_others_passed() -> None:
    sequences, tokens = Sequences(PageCounts(24, 10)), ids(26, 200)
    sequences.prompt(tokens)
    sequences.prompt(ids(27, 900))
    assert sequences.prompt([*tokens, 1]) == 200


def test_a_sequence_apart_has_pages_of_its_own_where_there_is_little_room() -> None:
    sequences, tokens = Sequences(PageCounts(17, 10)), ids(28, 900)
    sequences.prompt(ids(29, 900))
    sequences.sequence.start_apart()
    for start in range(0, 900, 50):
        sequences.step(tokens, start, 50)


def test_a_sequence_apart_leaves_nothing() -> None:
    sequences, tokens = Sequences(), ids(15, 300)
    sequences.sequence.start_apart()
    for start in range(0, 300, 50):
        sequences.step(tokens, start, 50)
    assert sequences.prompt(tokens) == 0
    sequences.check_no_page_is_lost_or_held_twice()


@pytest.mark.parametrize("sliding", [(True,), (False,), (False, True, True)])
def test_other_layers(sliding: tuple[bool, ...]) -> None:
    sequences, tokens = Sequences(sliding=sliding), ids(16, 700)
    sequences.prompt(tokens[:600])
    assert sequences.prompt([*tokens[:590], *ids(17, 300)]) == 590
    assert sequences.prompt(tokens) >= 590


def test_the_whole_context_fills_all_pages_but_one() -> None:
    sequences, tokens = Sequences(), ids(18, CONTEXT)
    sequences.prompt(tokens)
    other = [*tokens[: CONTEXT - 10], *ids(19, 10)]
    assert sequences.prompt(other) == CONTEXT - 10
    assert sequences.prompt(ids(20, CONTEXT)) == 0
    sequences.check_no_page_is_lost_or_held_twice()


@pytest.mark.parametrize("seed", range(8))
def test_random_histories(seed: int) -> None:
    """Prompts that share beginnings with earlier ones, in little room."""
    rng = np.random.default_rng(seed)
    sequences = Sequences(PageCounts(17, int(rng.integers(7, 18))))
    said = [ids(seed, 100)]
    for turn in range(60):
        before = said[rng.integers(len(said))]
        tokens = before[: rng.integers(1, len(before) + 1)] + ids(100 * turn, rng.integers(1, 250))
        tokens = tokens[: CONTEXT - 20]
        sequences.prompt(tokens)
        end = len(tokens) + int(rng.integers(0, 20))
        sequences.decode(tokens := tokens + ids(turn, end - len(tokens)), len(tokens))
        said.append(tokens)
    sequences.check_no_page_is_lost_or_held_twice()


def interrupted(count: int, work: Callable[[], object]) -> bool:
    """Whether `work` was interrupted: at the `count`-th line of the cache, if it gets there."""
    files = {module.__file__ for module in (kv_cache, pages, prefix_tree)}
    left = count

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


SAID = ids(21, 250)
TURN, BRANCH = [*SAID, *ids(24, 100)], [*SAID[:200], *ids(22, 150)]
LONG = ids(23, 800)


def apart(sequences: Sequences) -> None:
    sequences.sequence.start_apart()
    sequences.step(SAID, 0, 90)


CASES: dict[str, Callable[[Sequences], object]] = {
    "turn": lambda sequences: sequences.prompt(TURN),
    "branch": lambda sequences: sequences.prompt(BRANCH),
    "much": lambda sequences: sequences.prompt(LONG),
    "decode": lambda sequences: sequences.decode([*SAID, *ids(25, 10)], 250),
    "apart": apart,
    "clear": lambda sequences: sequences.cache.clear(),
}


@pytest.mark.parametrize("case", CASES)
def test_an_interrupt_at_any_line(case: str) -> None:
    """What comes after is right, whichever line was interrupted, and no page is lost."""
    step = 37 if case == "much" else 1  # it repeats itself
    for line in itertools.count(1, step):
        sequences = Sequences(PageCounts(17, 10))
        sequences.prompt(SAID)
        if not interrupted(line, functools.partial(CASES[case], sequences)):
            break
        said = [token for node in sequences.sequence._path for token in node.tokens]
        sequences.decode([*said, *ids(30, 3)], len(said))  # it goes on from what it says is there
        for tokens in (BRANCH, TURN, LONG, BRANCH):
            sequences.prompt(tokens)
        sequences.check_no_page_is_lost_or_held_twice()
    assert line > 10


def test_a_prefix_whose_window_pages_went_is_found_again_once_it_was_computed() -> None:
    sequences, tokens = Sequences(PageCounts(40, 12)), ids(40, 300)
    sequences.prompt(tokens)
    for seed in range(41, 47):
        sequences.prompt(ids(seed, 250))
    assert sequences.prompt(tokens) < 299
    assert [sequences.prompt(tokens) for _ in range(3)] == [299] * 3
    sequences.check_no_page_is_lost_or_held_twice()


@pytest.mark.parametrize(
    ("prompt", "first", "second"), [(60, 80, 500), (127, 100, 700), (64, 64, 64)]
)
def test_an_answer_that_was_broken_off_and_asked_again(
    prompt: int, first: int, second: int
) -> None:
    """The next turn finds its end, although the tree had the beginning of the answer before."""
    sequences, tokens = Sequences(), ids(48, prompt + second)
    for count in (first, second):
        sequences.prompt(tokens[:prompt])
        sequences.decode(tokens[: prompt + count], prompt)
    assert sequences.prompt([*tokens, 1, 2]) == len(tokens)
    sequences.check_no_page_is_lost_or_held_twice()


def test_no_two_pages_have_the_same_tokens() -> None:
    sequences, tokens = Sequences(), ids(49, 400)
    for length in (400, 30, 130, 200, 64, 65, 399):
        sequences.prompt(tokens[:length])
        sequences.decode(tokens, length)
    full = [n for n in sequences.cache.root.below() if len(n.tokens) == PAGE_TOKENS]
    assert len(full) == 400 // PAGE_TOKENS


def test_window_pages_that_dropped_leaves_give_back_are_used_first() -> None:
    """With as many of both kinds no node loses its window page before it goes itself."""
    sequences = Sequences(PageCounts(17, 17))
    for seed in range(50, 54):
        sequences.prompt(ids(seed, 319))
    assert all(node.window is not None for node in sequences.cache.root.below())


@pytest.mark.parametrize("share", [0.7, 1.0, 1.7, 9.0])
def test_a_budget_is_kept_and_used(share: float) -> None:
    facts = sized_manifest()
    wanted = page_counts(facts, CONTEXT).num_bytes(facts)
    counts = page_counts(facts, CONTEXT, int(share * wanted))
    assert counts.full >= CONTEXT // PAGE_TOKENS + 1 and counts.window >= 5
    used = counts.num_bytes(facts)
    assert used <= share * wanted
    assert used > 0.9 * share * wanted or counts.window == counts.full


def test_a_budget_that_is_too_small_for_the_context() -> None:
    facts = sized_manifest()
    with pytest.raises(InputError, match=r"kv_memory: expected at least \d+ bytes .* which 1024"):
        page_counts(facts, CONTEXT, 1000)


def test_no_array_is_larger_than_what_a_device_allocates_at_once() -> None:
    facts = sized_manifest()
    least = CONTEXT // PAGE_TOKENS + 1
    limit = (least + 2) * facts.caches[0].num_bytes
    plenty = page_counts(facts, CONTEXT, 100 * page_counts(facts, CONTEXT).num_bytes(facts))
    counts = page_counts(facts, CONTEXT, 10**9, limit)
    assert plenty.full > least + 2 == counts.full
    assert counts.window == min(plenty.window, least + 2)
    with pytest.raises(InputError, match="which the device allocates at once"):
        page_counts(facts, CONTEXT, None, least * facts.caches[0].num_bytes - 1)


def sized_manifest() -> Any:
    facts = manifest()
    for cache in facts.caches:
        cache.num_bytes = PAGE_TOKENS * 8
    return facts
