"""The tokenizer on a small byte-level BPE vocabulary whose tokens cut characters in two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from osscompile.runtime.errors import ArtifactError, InputError
from osscompile.runtime.tokenizer import REQUIRED_SPECIALS, StreamDecoder, Tokenizer

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


def test_added_token_that_is_not_special_is_spelled_as_it_is(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json")
    table = json.loads(path.read_text())
    id = max(token["id"] for token in table["added_tokens"]) + 1
    table["added_tokens"].append({**table["added_tokens"][0], "id": id, "content": "東 京"})
    table["added_tokens"][-1]["special"] = False
    path.write_text(json.dumps(table))
    tokenizer = Tokenizer(path)
    assert tokenizer.vocab_size == id + 1
    assert "東 京" not in tokenizer.special
    assert tokenizer.decode([id]) == "東 京"


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
