"""The tokenizer on a small byte-level BPE vocabulary whose tokens cut characters in two."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from osscompile.runtime.errors import ArtifactError, InputError
from osscompile.runtime.tokenizer import LONG_TEXT, REQUIRED_SPECIALS, StreamDecoder, Tokenizer

SPECIALS = ("<|startoftext|>", *REQUIRED_SPECIALS, "<|reserved_9|>")
TEXTS = (
    "",
    "hello  world\r\n\tx",
    "grüße, 東京!",
    "👩‍👩‍👧 ok",
    "\x00\x7f\u0085\ufeff",
    "a<|end|>b",
)


def write_tokenizer(
    path: Path, specials: tuple[str, ...] = SPECIALS, alphabet: list[str] | None = None
) -> Path:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if alphabet is None:
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["hello world hello", "the world, the end"], trainer)
    backend.add_special_tokens(list(specials))
    backend.save(str(path))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("bpe") / "tokenizer.json"))


@pytest.mark.parametrize("text", TEXTS)
def test_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@pytest.mark.parametrize("text", [*TEXTS, "<|start|>", "x", " "])
def test_long_text_is_encoded_as_if_it_were_short(
    tokenizer: Tokenizer, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another function of the library does it."""
    text = text * (LONG_TEXT // max(1, len(text)) + 1)
    found = tokenizer.encode(text)
    monkeypatch.setattr("osscompile.runtime.tokenizer.LONG_TEXT", 1 << 30)
    assert found == tokenizer.encode(text)


def test_other_threads_run_while_a_long_text_is_encoded(tokenizer: Tokenizer) -> None:
    """They get several turns before it is done."""
    text, ticks = "The quick brown fox jumps over 17 dogs. " * 20_000, 0

    def tick() -> None:
        nonlocal ticks
        while encoding.is_alive():
            ticks += 1
            time.sleep(0.001)

    encoding = threading.Thread(target=tokenizer.encode, args=(text,))
    encoding.start()
    tick()
    assert ticks > 5


def test_special_tokens_inside_text_stay_text(tokenizer: Tokenizer) -> None:
    for name, id in tokenizer.special.items():
        ids = tokenizer.encode(f"a{name}b")
        assert not set(ids) & set(tokenizer.special.values())
        assert tokenizer.decode([id]) == name
        assert tokenizer.token_bytes(id) == name.encode()


def test_every_single_byte_has_its_token(tokenizer: Tokenizer) -> None:
    found = {tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= found


def test_specials_end_the_table_and_ids_beyond_it_are_empty(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == max(tokenizer.special.values()) + 1
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert tokenizer.token_bytes(-1) == b""
    assert tokenizer.decode([*tokenizer.encode("x"), tokenizer.vocab_size + 5]) == "x"


def test_decode_replaces_bytes_that_are_no_character(tokenizer: Tokenizer) -> None:
    first_byte = tokenizer.encode("ü")[:1]
    assert tokenizer.decode(first_byte) == "\ufffd"


def test_stream_holds_back_incomplete_characters(tokenizer: Tokenizer) -> None:
    text = "é東👍x"
    decoder = StreamDecoder(tokenizer)
    pushed = [decoder.push(id) for id in tokenizer.encode(text)]
    assert pushed == ["", "é", "", "", "東", "", "", "", "👍", "x"]
    assert decoder.flush() == ""


def test_stream_flush_replaces_a_cut_off_character_once(tokenizer: Tokenizer) -> None:
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(id) for id in tokenizer.encode("a👍")[:3]] == ["a", "", ""]
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""
    assert decoder.push(tokenizer.encode("b")[0]) == "b"


def test_unpaired_surrogate_is_an_input_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="surrogate at character 1"):
        tokenizer.encode("a\ud800")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="found none"):
        Tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("content", ["", "{", "{}", '{"version": "1.0"}', "\x00\x01"])
def test_damaged_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ArtifactError, match="does not parse"):
        Tokenizer(path)


def test_missing_special_token_is_named(tmp_path: Path) -> None:
    specials = tuple(name for name in SPECIALS if name != "<|call|>")
    path = write_tokenizer(tmp_path / "tokenizer.json", specials)
    with pytest.raises(ArtifactError, match=r"found no <\|call\|>"):
        Tokenizer(path)


def test_vocabulary_that_loses_bytes_is_refused(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json", alphabet=["a", "b"])
    with pytest.raises(ArtifactError, match="byte-level"):
        Tokenizer(path)


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> Tokenizer:
    """The tokenizer with its file changed."""
    table = json.loads(write_tokenizer(path / "tokenizer.json").read_text())
    change(table)
    (path / "tokenizer.json").write_text(json.dumps(table))
    return Tokenizer(path / "tokenizer.json")


def add_token(table: dict[str, Any], content: str, **flags: Any) -> int:
    """Add a token that is not special; returns its id."""
    last: dict[str, Any] = max(table["added_tokens"], key=lambda token: token["id"])
    added = {**last, "id": last["id"] + 1, "content": content, "special": False, **flags}
    table["added_tokens"].append(added)
    return int(added["id"])


@pytest.mark.parametrize("content", ["東 京", "né!", "halo"])
def test_added_token_that_is_not_special_is_spelled_as_it_is(tmp_path: Path, content: str) -> None:
    """Characters of its name can be those that bytes are written with."""
    ids = []
    tokenizer = changed(tmp_path, lambda table: ids.append(add_token(table, content)))
    (id,) = ids
    assert tokenizer.vocab_size == id + 1
    assert content not in tokenizer.special
    assert tokenizer.decode([id]) == content
    assert id in tokenizer.encode(f"a {content} b")
    assert tokenizer.decode(tokenizer.encode(f"a {content} b")) == f"a {content} b"


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|start|>", "type_id": 0}}],
    "pair": [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"],
    "special_tokens": {"<|start|>": {"id": "<|start|>", "ids": [1], "tokens": ["<|start|>"]}},
}
TRUNCATION = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 64},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "x",
}


@pytest.mark.parametrize(
    "fields",
    [
        {"truncation": TRUNCATION},
        {"truncation": TRUNCATION | {"stride": 5}},  # which makes the library panic
        {"padding": PADDING},
        {"post_processor": TEMPLATE},
    ],
    ids=["truncation", "stride", "padding", "template"],
)
def test_whole_text_and_nothing_else_is_encoded(tmp_path: Path, fields: dict[str, Any]) -> None:
    tokenizer = changed(tmp_path, lambda table: table.update(fields))
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("") == []


BYTE_LEVEL = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def set_splits(*splitters: dict[str, Any]) -> Callable[[dict[str, Any]], object]:
    sequence = [*splitters, {"type": "ByteLevel"} | BYTE_LEVEL]
    return lambda table: table.update(pre_tokenizer={"type": "Sequence", "pretokenizers": sequence})


def split(**fields: Any) -> dict[str, Any]:
    pattern = {"Regex": " "}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False} | fields


LOSSES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "lower_case": (lambda t: t.update(normalizer={"type": "Lowercase"}), "no normalizer"),
    "composed": (lambda t: t.update(normalizer={"type": "NFC"}), "no normalizer"),
    "no_splitter": (lambda t: t.update(pre_tokenizer=None), "ByteLevel"),
    "space_before": (lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "ByteLevel"),
    "removed": (set_splits(split(behavior="Removed")), "remove nothing"),
    "white_space_removed": (set_splits({"type": "Whitespace"}), "remove nothing"),
    "bytes_of_bytes": (set_splits({"type": "ByteLevel"} | BYTE_LEVEL), "others"),
    "chance": (lambda t: t["model"].update(dropout=0.5), "without dropout"),
    "prefix": (
        lambda t: t["model"].update(continuing_subword_prefix="##", merges=[]),
        "without dropout",
    ),
    "suffix": (lambda t: t["model"].update(end_of_word_suffix="</w>"), "without dropout"),
    "another_model": (
        lambda t: t.update(
            model={"type": "WordLevel", "vocab": t["model"]["vocab"], "unk_token": "a"}
        ),
        "BPE as model",
    ),
    "two_tokens_of_an_id": (lambda t: t["model"]["vocab"].update(zz=5), "1 that share one"),
    "stripping": (lambda t: add_token(t, "hello", lstrip=True), "space beside it"),
    "ambiguous": (lambda t: add_token(t, "é"), "ordinary token with the id of 'é'"),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_what_would_change_text_is_refused(tmp_path: Path, loss: str) -> None:
    change, words = LOSSES[loss]
    with pytest.raises(ArtifactError, match=f"expected .*{words}"):
        changed(tmp_path, change)


def test_ids_with_a_gap(tmp_path: Path) -> None:
    """The table ends after the last, not after as many as there are."""
    tokenizer = changed(tmp_path, lambda t: t["model"]["vocab"].update({"hello": 100_000}))
    assert tokenizer.vocab_size == 100_001
    assert tokenizer.decode([100_000]) == "hello"


def test_pattern_that_fails_on_a_text(tmp_path: Path) -> None:
    """The library panics, which is no Exception."""
    tokenizer = changed(tmp_path, set_splits(split(pattern={"Regex": "(a+)+c"})))
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"
    with pytest.raises(ArtifactError, match="expected patterns that split any text"):
        tokenizer.encode("a" * 40 + "b")


def test_interrupt_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        @staticmethod
        def from_buffer(content: bytes) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr("osscompile.runtime.tokenizer._Backend", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        Tokenizer(write_tokenizer(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("text", [None, b"x", 5, ["x"]])
def test_text_that_is_none(tokenizer: Tokenizer, text: Any) -> None:
    with pytest.raises(InputError, match=f"expected a string, found {type(text).__name__}"):
        tokenizer.encode(text)


@pytest.mark.parametrize(
    "model",
    [
        {"vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]},  # of a token longer than all others
        {
            "vocab": {"a": 0, "b": 1, "ab": 2},
            "merges": [["a", "b"]],
            "continuing_subword_prefix": "##",
        },
    ],
)
def test_file_on_which_the_library_panics(tmp_path: Path, model: dict[str, object]) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json")
    fields = json.loads(path.read_text())
    fields["model"] |= model
    path.write_text(json.dumps(fields))
    with pytest.raises(ArtifactError, match="which does not parse"):
        Tokenizer(path)
