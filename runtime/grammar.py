"""What must be said, as grammars -> constraints, through llguidance."""

import json
import math
import re
import threading
import time
from collections.abc import Sequence, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .constraint import is_allowed
from .errors import InputError, OsscompileError
from .exact_schema import check_regex, exact_schema
from .harmony.answer_grammar import Grammar
from .harmony.structured import ResponseFormat
from .tokenizer import Tokenizer

# Between the parts of JSON: a blank, or a new line with its indentation. More has no meaning, and
# models that have nothing to say any more would write it until the context is full.
BLANKS = r" |\r?\n[ \t]{0,64}"
MOST_DIGITS = 64  # in a row, where JSON may go on without: such models write digits as well
# What may follow a backslash. With \u llguidance would not know a property by its name, and what
# its schema says would not hold.
ESCAPES = 'nrbtf\\"'
# Grammars may come from anybody, and others wait meanwhile. Other limits are llguidance's own.
MOST_LEXER_STATES = 50_000  # a state takes 1 to 2 kB
MOST_LEXER_FUEL = 500_000  # before the first token: it takes up to half a second
MOST_ITEMS_OF_BYTE = 1000  # each is compared with all; a property that may come next takes four
# What a grammar may take on the whole, in seconds of a core: so many, and so many a token. Those of
# 200 schemas of the world take 0.0001 to 0.001 a token.
SECONDS, SECONDS_OF_TOKEN = 0.5, 0.005
# llguidance's words for what its own callers can do, and ours.
ADVICE = ("Enable 'coerce_one_of' option to approximate oneOf with anyOf", "Use anyOf")
MOST_FORCED = 256  # letters, of which llguidance wants the first token

# In Lark: strings, regular expressions and comments, and names of special tokens outside of them.
_SPECIAL_IN_LARK = re.compile(
    r'"(?:\\.|[^"\\])*"|/(?:\\.|[^/\\])+/|(?:#|//)[^\n]*|(?P<name><[^<>\s]+>)'
)


def grammar_of(where: str, asked: ResponseFormat) -> Grammar:
    """Raises InputError, which `where` begins."""
    if asked.syntax == "json":
        options = {"whitespace_pattern": BLANKS, "json_allowed_escapes": ESCAPES}
        return {"json_schema": {**exact_schema(where, asked.schema), "x-guidance": options}}
    if asked.syntax == "lark":
        names = [found["name"] for found in _SPECIAL_IN_LARK.finditer(asked.definition)]
        if any(names):
            raise InputError(
                f"{where}: expected a grammar of text, found the special token "
                f"{next(filter(None, names))}, which no text may become"
            )
        return {"lark_grammar": asked.definition}
    check_regex(where, asked.definition)
    pattern = _llguidance().regex_to_lark(asked.definition, "")
    return {"lark_grammar": f"start: /{pattern}/"}


class Grammars:
    """Makes constraints for a vocabulary of `vocab_size` logits; `ends` are the ids that end an
    answer where its grammar accepts that. Any thread may use it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Set[int]) -> None:
        self._tokenizer, self.vocab_size, self._ends = tokenizer, vocab_size, ends
        self._lock = threading.Lock()
        self._made: _Vocabulary | None = None

    def check(self, where: str, grammar: Grammar) -> None:
        """Raises InputError for what llguidance does not support, with what it says of it."""
        self.constraint(where, [grammar])

    def constraint(
        self, where: str, grammars: Sequence[Grammar], begun: Sequence[int] = ()
    ) -> "GrammarConstraint":
        """Of what follows `begun`, which obeys as well. The first grammar is the whole one, and
        refers to the others by their names. Raises InputError."""
        llguidance, vocabulary = _llguidance(), self._vocabulary()
        limits = llguidance.LLParserLimits(
            max_lexer_states=MOST_LEXER_STATES,
            initial_lexer_fuel=MOST_LEXER_FUEL,
            max_items_in_row=MOST_ITEMS_OF_BYTE,
            verbose_errors=False,
        )
        asked = json.dumps({"grammars": grammars})
        matcher = llguidance.LLMatcher(vocabulary.backend, asked, log_level=0, limits=limits)
        made = GrammarConstraint(matcher, vocabulary)
        # Where nothing can obey, nothing may come; what is too large shows with the first token.
        fault = made.fault_ahead()
        if fault:
            raise InputError(f"{where}: expected what llguidance supports, found: {fault}")
        for token_id in begun:
            made.push(token_id)
        if made.fault:
            text = self._tokenizer.decode(begun)
            raise InputError(
                f"{where}: expected a template that begins an answer which obeys, "
                f"found {text!r:.100} at its end; chat without it"
            )
        return made

    def _vocabulary(self) -> "_Vocabulary":
        with self._lock:
            if self._made is None:
                self._made = _Vocabulary(self._tokenizer, self.vocab_size, self._ends)
            return self._made


class GrammarConstraint:
    """What llguidance's matcher lets through; a long row of digits ends where it may."""

    def __init__(self, matcher: Any, vocabulary: "_Vocabulary") -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self._num_digits = 0
        self._seconds_left = math.inf

    @property
    def error(self) -> OsscompileError | None:
        """Why nothing more can be said."""
        fault = self.fault
        if not fault:
            return None
        return OsscompileError(
            f"grammar: expected one that llguidance can follow, found: {fault}; simplify it"
        )

    @property
    def fault(self) -> str:
        """What llguidance found; "" for nothing."""
        found = self._matcher.get_error().replace("<non-verbose/>", "")
        if found.startswith("NoExtension"):
            return "one that no text obeys"
        if not found and self._seconds_left < 0:
            return f"more work than {SECONDS_OF_TOKEN * 1000:g} ms a token"
        return f"{' '.join(found.split()):.300}".replace(*ADVICE)

    def fault_ahead(self) -> str:
        """What llguidance finds at the first token, or after one of those that may come first."""
        mask = self.mask()
        if self.fault:
            return self.fault
        ahead = GrammarConstraint(self._matcher.deep_copy(), self._vocabulary)
        ahead.push(int(is_allowed(mask, len(self._vocabulary.tokens)).argmax()))
        ahead.mask()
        self._seconds_left = SECONDS  # so far only who asked has waited
        return ahead.fault

    def mask(self) -> NDArray[np.uint32]:
        begin = time.thread_time()
        size = self._vocabulary.digits.size  # what llguidance gives may be a word longer
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint32, size)
        self._seconds_left -= time.thread_time() - begin
        if self._num_digits < MOST_DIGITS or self._vocabulary.has_letter(bits):
            return bits
        others = bits & ~self._vocabulary.digits
        return others if others.any() else bits

    def push(self, token_id: int) -> None:
        begin = time.thread_time()
        self._matcher.consume_token(token_id)
        self._seconds_left += SECONDS_OF_TOKEN - (time.thread_time() - begin)
        text = self._vocabulary.tokens[token_id]
        num_before = len(text.rstrip(b"0123456789"))
        self._num_digits = len(text) - num_before + (0 if num_before else self._num_digits)


class _Vocabulary:
    """llguidance's tokenizer, made of ours: special tokens are never text."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Set[int]) -> None:
        llguidance = _llguidance()
        self.tokens = [tokenizer.token_bytes(id) for id in range(vocab_size)]
        self.eos_token_id, self.bos_token_id = min(ends), None
        self.special_token_ids = [id for id in tokenizer.special.values() if id < vocab_size]
        self._encode = tokenizer.encode
        self.backend = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(self), eos_token=sorted(ends)
        )
        starts_with_digit = [text[:1].isdigit() for text in self.tokens]
        octets = np.packbits(starts_with_digit, bitorder="little")
        self.digits = np.pad(octets, (0, -octets.size % 4)).view(np.uint32)
        (self._letter,) = tokenizer.encode("a")

    def __call__(self, text: str) -> list[int]:
        return self._encode(text[:MOST_FORCED])

    def has_letter(self, mask: NDArray[np.uint32]) -> bool:
        """Whether a letter may come next: then no number is being written."""
        return bool(mask[self._letter // 32] >> np.uint32(self._letter % 32) & 1)


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise InputError(
            "response_format: expected llguidance, by which answers and strict arguments keep "
            "their form, found none; install it: pip install 'llguidance>=1.8'"
        ) from None
    return llguidance
