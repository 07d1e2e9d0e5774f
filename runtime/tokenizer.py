"""tokenizer.json <-> text: token ids of ordinary text, special ids by name, bytes of one token."""

import codecs
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer as _Backend

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


class Tokenizer:
    """A byte-level BPE vocabulary with the special tokens of gpt-oss, read from tokenizer.json.

    `special` maps the name of each special token, e.g. "<|start|>", to its id. `vocab_size` is
    the number of ids in the table; the rows of the model's logits beyond it are padding.

    Raises ArtifactError when the file is missing, damaged, not byte-level, or lacks a special
    token of the chat format.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ArtifactError(
                f"tokenizer: expected the file {path}, found none; "
                "was the whole artifact directory copied?"
            )
        try:
            self._backend = _Backend.from_file(str(path))
        except KeyboardInterrupt:
            raise
        except (
            BaseException
        ) as error:  # what the library raises, or its panic, which is no Exception
            raise ArtifactError(
                f"tokenizer: expected a tokenizer.json, found {path} which does not parse "
                f"({error}); compile the model again or copy the file again"
            ) from error
        self._backend.encode_special_tokens = True  # specials inside text stay text
        added = self._backend.get_added_tokens_decoder()
        self.special: dict[str, int] = {
            token.content: id for id, token in sorted(added.items()) if token.special
        }
        self._special_names = {id: name for name, id in self.special.items()}
        self.vocab_size: int = max([self._backend.get_vocab_size(), *(id + 1 for id in added)])
        self._check(path)

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: what looks like a special token is encoded as plain characters.

        Raises InputError for text with unpaired surrogates, which has no UTF-8 form.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"text: expected valid Unicode, found an unpaired surrogate at character "
                f"{error.start}; decode the text with errors='replace'"
            ) from None
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, special tokens by name; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(id) for id in ids).decode(errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes one token stands for; b"" for an id that the table does not have.

        A special token gives its name, an ordinary one its raw bytes, which need not be complete
        UTF-8 characters (see StreamDecoder).
        """
        id = int(id)
        if id in self._special_names:
            return self._special_names[id].encode()
        if not 0 <= id < self.vocab_size:
            return b""
        token: str | None = self._backend.id_to_token(id)
        if token is None:
            return b""
        try:
            return bytes(map(_BYTE_OF_CHAR.__getitem__, token))
        except KeyError:  # an added token is spelled as it is
            return token.encode()

    def _check(self, path: Path) -> None:
        missing = [name for name in REQUIRED_SPECIALS if name not in self.special]
        if missing:
            raise ArtifactError(
                f"tokenizer {path}: expected the special tokens of gpt-oss, found no "
                f"{', '.join(missing)}; use the tokenizer.json of the checkpoint"
            )
        lacking = [c for c in _BYTE_OF_CHAR if self._backend.token_to_id(c) is None]
        if lacking:  # else text would lose characters silently
            raise ArtifactError(
                f"tokenizer {path}: expected a byte-level vocabulary with a token for each of the "
                f"256 bytes, found {256 - len(lacking)}; use the tokenizer.json of the checkpoint"
            )


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
