"""tokenizer.json <-> text: token ids of ordinary text, special ids by name, bytes of one token."""

import codecs
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import Tokenizer as _Backend
from tokenizers.models import BPE

from .errors import ArtifactError, InputError

# What the chat format cannot do without. Ids differ between vocabularies, names do not.
REQUIRED_SPECIALS = (
    "<|start|>",
    "<|channel|>",
    "<|constrain|>",
    "<|message|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|endoftext|>",
)
# Characters, from which on a batch is made of a text: that begins later, but is faster, and other
# threads run meanwhile.
LONG_TEXT = 4096


class Tokenizer:
    """A byte-level BPE vocabulary with the special tokens of gpt-oss, read from tokenizer.json.

    `special` maps the name of each special token, e.g. "<|start|>", to its id. `vocab_size` is
    the number of ids in the table; the rows of the model's logits beyond it are padding.

    What a text is encoded to stands for all of it and for nothing else: what the file says of
    truncation, padding and templates is not used.

    `content`: that of the file, if it was read already.

    Raises ArtifactError when the file is missing, damaged, or not byte-level, when it would lose,
    change or add text, or lacks a special token of the chat format.
    """

    def __init__(self, path: Path, content: bytes | None = None) -> None:
        if content is None and not path.is_file():
            raise ArtifactError(
                f"tokenizer: expected the file {path}, found none; "
                "was the whole artifact directory copied?"
            )
        self._path = path
        try:
            self._backend = _Backend.from_buffer(path.read_bytes() if content is None else content)
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.post_processor = None
            self._backend.encode_special_tokens = True  # specials inside text stay text
        except BaseException as error:
            _raise_unless_of_library(error)
            raise ArtifactError(
                f"tokenizer: expected a tokenizer.json, found {path} which does not parse "
                f"({error}); copy or download the file again (itself, not git-lfs's pointer)"
            ) from error
        added = self._backend.get_added_tokens_decoder()
        self._added: dict[int, Any] = dict(sorted(added.items()))
        self._bytes: dict[int, bytes] = {}  # of the tokens that were asked for
        self.special: dict[str, int] = {
            token.content: id for id, token in self._added.items() if token.special
        }
        self._check_splitting()
        self.vocab_size: int = 1 + max(*self._check_vocabulary(), *self._added)

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: what looks like a special token is encoded as plain characters.

        Raises InputError for what is no text, or has unpaired surrogates and so no UTF-8 form.
        """
        if not isinstance(text, str):
            raise InputError(f"text: expected a string, found {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"text: expected valid Unicode, found an unpaired surrogate at character "
                f"{error.start}; decode the text with errors='replace'"
            ) from None
        try:
            if len(text) < LONG_TEXT:
                encoding = self._backend.encode(text, add_special_tokens=False)
            else:
                (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
            ids: list[int] = encoding.ids
        except BaseException as error:
            _raise_unless_of_library(error)
            self._refuse("patterns that split any text", f"one that fails: {error}", error)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, special tokens by name; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(id) for id in ids).decode(errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes one token stands for; b"" for an id that the table does not have.

        An added token gives its name, an ordinary one its raw bytes, which need not be complete
        UTF-8 characters (see StreamDecoder).
        """
        id = int(id)
        known = self._bytes.get(id)
        if known is None and 0 <= id < self.vocab_size:
            known = self._bytes[id] = self._find_bytes(id)
        return known or b""

    def _find_bytes(self, id: int) -> bytes:
        if id in self._added:
            name: str = self._added[id].content
            return name.encode()
        token: str | None = self._backend.id_to_token(id)
        return b"" if token is None else _spelled(token)

    def _check_splitting(self) -> None:
        """Before text is cut into tokens it may be split, without a loss, and written as bytes."""
        backend = self._backend
        if backend.normalizer is not None:
            self._refuse("no normalizer, which changes text", "one")
        splitter = backend.pre_tokenizer
        state = json.loads(splitter.__getstate__()) if splitter is not None else {}
        *splits, last = state.get("pretokenizers", [state]) or [{}]
        if any(s["type"] != "Split" or s["behavior"] == "Removed" for s in splits):
            self._refuse("pre-tokenizers that split and remove nothing", "others")
        if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
            self._refuse("ByteLevel, without a space before the text, as pre-tokenizer", "another")
        model = backend.model
        if not isinstance(model, BPE):
            self._refuse("BPE as model", type(model).__name__)
        if model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
            self._refuse("a model without dropout, prefixes and suffixes", "one with them")

    def _check_vocabulary(self) -> list[int]:
        """The ids of ordinary tokens, each of which stands for one text."""
        ids: dict[str, int] = self._backend.get_vocab(with_added_tokens=False)
        token_of = {id: token for token, id in ids.items()}
        missing = [name for name in REQUIRED_SPECIALS if name not in self.special]
        if missing:
            self._refuse("the special tokens of gpt-oss", f"no {', '.join(missing)}")
        lacking = [c for c in _BYTE_OF_CHAR if c not in ids]
        if lacking:  # else text would lose characters silently
            self._refuse(
                "a byte-level vocabulary with a token for each of the 256 bytes",
                f"{256 - len(lacking)}",
            )
        if len(token_of) < len(ids):
            self._refuse("an id for each token", f"{len(ids) - len(token_of)} that share one")
        for id, added in self._added.items():
            name: str = added.content
            if added.special:
                if id in token_of:  # text could become a special token
                    self._refuse(f"no ordinary token with the id of {name!r}", repr(token_of[id]))
            elif added.lstrip or added.rstrip:
                self._refuse(f"{name!r} to leave the space beside it alone", "that it strips it")
            elif id in token_of and _spelled(token_of[id]) != name.encode():
                self._refuse(f"no ordinary token with the id of {name!r}", repr(token_of[id]))
        return list(token_of)

    def _refuse(self, expected: str, found: str, cause: BaseException | None = None) -> NoReturn:
        raise ArtifactError(
            f"tokenizer {self._path}: expected {expected}, found {found}; use the tokenizer.json "
            "of the checkpoint"
        ) from cause


class StreamDecoder:
    """Turns ids into text one at a time and holds back characters that are not complete yet."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The text that became complete with this id; "" while a character is incomplete."""
        return self._utf8.decode(self._tokenizer.token_bytes(id))

    def flush(self) -> str:
        """What is left when no id follows: "", or U+FFFD for an incomplete character."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's scheme).

    Printable Latin-1 characters stand for themselves, the other bytes, in order, for U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in sorted(printable)} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }


_BYTE_OF_CHAR = byte_alphabet()


def _spelled(token: str) -> bytes:
    """The bytes of an ordinary token."""
    try:
        return bytes(map(_BYTE_OF_CHAR.__getitem__, token))
    except KeyError:  # of no text: what is encoded has characters of the alphabet only
        return token.encode()


def _raise_unless_of_library(error: BaseException) -> None:
    """Go on with an interrupt. What the library raises is any Exception, and where its code panics
    a BaseException that it does not export."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
