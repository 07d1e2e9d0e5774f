"""What checkpoints say of their use: how to sample, and the chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from forms import Type, gguf_tensors, gguf_tokenizer, write_gguf, write_original

from osscompile.errors import CheckpointError
from osscompile.importer.forms import open_checkpoint
from osscompile.importer.generation import read_chat_template, read_generation
from osscompile.importer.resolve import NANO_CHECKPOINT
from osscompile.importer.synthetic import TINY, SyntheticSource
from osscompile.runtime.manifest import MAX_TEMPLATE_BYTES
from osscompile.runtime.sampling_options import Sampling

SOURCE = SyntheticSource(TINY)
TEMPLATE = "{{ messages }}\r\né"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, Sampling()),
        ({"do_sample": True}, Sampling(1.0, 1.0, 0, 0.0)),  # as in openai/gpt-oss-20b
        ({"do_sample": None, "temperature": None, "top_k": None}, Sampling()),
        (
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05},
            Sampling(0.6, 0.95, 20, 0.05),
        ),
        ({"do_sample": False}, Sampling(temperature=0.0)),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, Sampling(0.0, 0.9)),
        ({"temperature": 1, "top_p": 1, "eos_token_id": "x", "other": []}, Sampling()),
    ],
    ids=str,
)
def test_sampling_of_generation_config(
    tmp_path: Path, fields: dict[str, Any], expected: Sampling
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    assert read_generation(tmp_path) == (fields, expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": "hot"}, "temperature: expected between 0 .greedy. and 100, found 'hot'"),
        ({"temperature": -1}, "temperature: expected .*, found -1"),
        ({"temperature": float("nan")}, "temperature: expected .*, found nan"),
        ({"temperature": 10**400}, "temperature: expected .*, found 1000"),
        ({"temperature": True}, "temperature: expected .*, found True"),
        ({"top_p": 0}, "top_p: expected above 0 and at most 1, found 0"),
        ({"top_p": [0.9]}, r"top_p: expected .*, found \[0.9\]"),
        ({"top_k": 2.5}, "top_k: expected a whole number, 0 for no limit, found 2.5"),
        ({"top_k": -1}, "top_k: expected .*, found -1"),
        ({"min_p": {}}, "min_p: expected between 0 and 1, found {}"),
        ({"do_sample": 0}, "do_sample: expected true or false, found 0"),
        ({"do_sample": "false"}, "do_sample: expected true or false, found 'false'"),
        ({"do_sample": False, "min_p": 7}, "min_p: expected between 0 and 1, found 7"),
    ],
    ids=str,
)
def test_sampling_that_cannot_be(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {message}"):
        read_generation(tmp_path)


def test_no_template(tmp_path: Path) -> None:
    assert read_chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": null}')
    assert read_chat_template(tmp_path) is None


@pytest.mark.parametrize(
    "field",
    [TEMPLATE, [{"name": "tool_use", "template": "b"}, {"name": "default", "template": TEMPLATE}]],
)
def test_template_in_its_file_or_in_the_tokenizers_config(tmp_path: Path, field: Any) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": field}))
    assert read_chat_template(tmp_path) == TEMPLATE
    (tmp_path / "chat_template.jinja").write_bytes(b"newer\r\n")
    assert read_chat_template(tmp_path) == "newer\r\n"


@pytest.mark.parametrize("field", [[], [5], [{"name": "rag", "template": "b"}], [{"name": [1]}]])
def test_only_templates_for_something_else(tmp_path: Path, field: Any) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": field}))
    assert read_chat_template(tmp_path) is None


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (5, "chat_template: expected a text, found int"),
        ({"a": "b"}, "chat_template: expected a text, found dict"),
        ([{"name": "default", "template": 5}], "chat_template: expected a text, found int"),
        ("\ud800", "chat_template: expected valid Unicode"),
        ("a" * (MAX_TEMPLATE_BYTES + 1), "chat_template: expected a chat template of at most"),
        ("é" * (MAX_TEMPLATE_BYTES // 2 + 1), "chat_template: expected a chat template of at most"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_template_that_cannot_be(tmp_path: Path, field: Any, message: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": field}))
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: {message}"):
        read_chat_template(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff", "not UTF-8"),
        (b"a" + "é".encode() * MAX_TEMPLATE_BYTES, "of at most 262144 bytes, found more"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-lfs"),
    ],
)
def test_template_file_that_cannot_be(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"chat_template\.jinja: .*{message}"):
        read_chat_template(tmp_path)


def test_largest_template(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("a" * MAX_TEMPLATE_BYTES)
    assert len(read_chat_template(tmp_path) or "") == MAX_TEMPLATE_BYTES


def write_published(folder: Path) -> Path:
    return write_checkpoint(folder / "m", SOURCE)


def write_original_below(folder: Path) -> Path:
    return write_original(folder / "m" / "original", SOURCE)


@pytest.mark.parametrize("write", [write_published, write_original_below])
def test_forms_bring_them(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path)
    (tmp_path / "m" / "generation_config.json").write_text('{"top_k": 5}')
    (tmp_path / "m" / "chat_template.jinja").write_text("t")
    opened = open_checkpoint(path)
    assert (opened.sampling, opened.chat_template) == (Sampling(top_k=5), "t")


def gguf_with(path: Path, fields: dict[str, Any]) -> Path:
    tokenizer = gguf_tokenizer(NANO_CHECKPOINT / "tokenizer.json", 1024)
    tensors = gguf_tensors(SOURCE, Type.BF16)
    return write_gguf(path, TINY, tensors, tokenizer=tokenizer, general=fields)


def test_metadata_of_gguf(tmp_path: Path) -> None:
    sampling = {"temp": 0.6, "top_p": 0.95, "top_k": 20}
    fields: dict[str, Any] = {f"general.sampling.{key}": value for key, value in sampling.items()}
    fields["tokenizer.chat_template"] = TEMPLATE
    opened = open_checkpoint(gguf_with(tmp_path / "m.gguf", fields))
    assert opened.sampling == Sampling(0.6, 0.95, 20)
    assert opened.chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"general.sampling.temp": -0.5},
            "temperature: expected between 0 .greedy. and 100, found -0.5",
        ),
        ({"general.sampling.top_p": "x"}, "top_p: expected above 0 and at most 1, found 'x'"),
        (
            {"general.sampling.top_k": [1, 2]},
            "sampling.top_k: expected one value, found a list of 2",
        ),
        ({"tokenizer.chat_template": 5}, "tokenizer.chat_template: expected a text, found int"),
        ({"tokenizer.chat_template": ["a"]}, "chat_template: expected one value, found a list"),
    ],
)
def test_metadata_of_gguf_that_cannot_be(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(gguf_with(tmp_path / "m.gguf", fields))
