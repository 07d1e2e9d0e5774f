"""Damaged bytes in every reader of files: an error of ours, or a model; no other exception, no
memory beyond what the file accounts for, no hang.

CI takes a few hundred inputs, always the same. OSSCOMPILE_FUZZ=100000 takes so many, at random.
"""

import dataclasses
import json
import os
import signal
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from forms import Type, gguf_fields, gguf_tensors, gguf_tokenizer, write_gguf, write_original
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_adapter import pair, write_adapter

from osscompile.errors import OsscompileError
from osscompile.importer.checkpoint import canonical_shapes
from osscompile.importer.forms import open_checkpoint
from osscompile.importer.forms.adapter import merge_adapter
from osscompile.importer.resolve import NANO_CHECKPOINT, resolve_model
from osscompile.importer.synthetic import TINY, SyntheticSource
from osscompile.runtime.tokenizer import Tokenizer

EXAMPLES = int(os.environ.get("OSSCOMPILE_FUZZ", "100"))
fuzz = settings(
    max_examples=EXAMPLES,
    derandomize="OSSCOMPILE_FUZZ" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SECONDS = 10  # of one input: a hang, however slow the machine
SMALL = dataclasses.replace(
    TINY,
    **{"num_layers": 1, "sliding": (True,), "hidden_size": 32, "intermediate_size": 32},
    **{"num_heads": 2, "num_kv_heads": 1, "vocab_size": 64},
)
SOURCE = SyntheticSource(SMALL)


@contextmanager
def watched(num_bytes: int) -> Iterator[None]:
    """Fail if the block takes memory or time that a file of this size cannot account for. Lists of
    Python's objects take some thirty times the bytes that they come from."""

    def hang(*_: object) -> None:
        raise AssertionError(f"no answer within {SECONDS} s")

    signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert peak < 4_000_000 + 32 * num_bytes, f"{peak} bytes for a file of {num_bytes}"


def read_everything(path: Path, adapters: tuple[Path, ...] = ()) -> None:
    """Open a model and read the ends of every tensor; errors of ours are answers."""
    num_bytes = sum(file.stat().st_size for file in (*path.rglob("*"), path) if file.is_file())
    with warnings.catch_warnings(action="ignore"), watched(num_bytes):
        try:
            source = open_checkpoint(path).source
            for adapter in adapters:
                merge_adapter(source, adapter)
            for name, (shape, _) in canonical_shapes(source.config).items():
                source.read(name, 0, 1)
                source.read(name, shape[0] - 1, shape[0])
                if len(shape) == 2 and name.endswith(".weight"):
                    source.read_int8(name, 0, 1)
        except OsscompileError as error:
            assert 20 < len(str(error)) < 3000 and str(error).isprintable()


INTERESTING = [0, 1, 2, 7, 8, 9, 12, 255, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]
numbers = st.one_of(st.sampled_from(INTERESTING), st.integers(0, 2**64 - 1))
changes = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.one_of(
            st.tuples(st.just("number"), st.sampled_from([1, 2, 4, 8]), numbers),
            st.tuples(st.just("insert"), st.just(0), st.binary(max_size=12)),
            st.tuples(st.just("delete"), st.integers(1, 64), st.none()),
            st.tuples(st.just("cut"), st.just(0), st.none()),
        ),
    ),
    min_size=1,
    max_size=4,
)


def damaged(data: bytes, edits: list[tuple[float, tuple[str, int, Any]]], within: int) -> bytes:
    """Change bytes among the first `within`, where the tables are."""
    content = bytearray(data)
    for place, (kind, width, value) in edits:
        at = int(place * min(within, len(content)))
        if kind == "number":
            content[at : at + width] = (value % 256**width).to_bytes(width, "little")
        elif kind == "insert":
            content[at:at] = value
        elif kind == "delete":
            del content[at : at + width]
        else:
            del content[at:]
    return bytes(content)


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), numbers
)
values = st.recursive(
    leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=8), v, max_size=3)
)
json_changes = st.lists(
    st.tuples(st.integers(0, 10**6), st.booleans(), values), min_size=1, max_size=3
)


def damaged_json(text: str, edits: list[tuple[int, bool, Any]]) -> bytes:
    """Replace, or remove, values anywhere in a JSON document."""
    document = json.loads(text)
    for number, remove, value in edits:
        places = list(_places(document))
        container, key = places[number % len(places)] if places else ({}, "")
        if remove:
            container.pop(key, None) if isinstance(container, dict) else container.pop(key)
        else:
            container[key] = value
    return json.dumps(document).encode("utf-8", "surrogatepass")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield value, key
        if not (isinstance(inner, list) and len(inner) > 100):
            yield from _places(inner)


@cache
def nano_tokenizer() -> dict[str, Any]:
    return gguf_tokenizer(NANO_CHECKPOINT / "tokenizer.json", 1024)


def small_tokenizer() -> dict[str, Any]:
    """The first of nano's tokens, and the merges among them."""
    tokens = {k: v[:300] if isinstance(v, list) else v for k, v in nano_tokenizer().items()}
    known = set(tokens["tokens"])
    merges = (m for m in nano_tokenizer()["merges"] if {m.replace(" ", ""), *m.split(" ")} <= known)
    return tokens | {"merges": list(merges)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint of every form, to damage again and again."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_checkpoint(folder / "hf", SOURCE, shards=2)
    generation = json.loads((NANO_CHECKPOINT / "generation_config.json").read_text())
    generation["eos_token_id"] = [7, 17, 4]
    (folder / "hf" / "generation_config.json").write_text(json.dumps(generation))
    write_checkpoint(folder / "single", SOURCE, shards=1)
    write_original(folder / "original", SOURCE)
    write_gguf(
        folder / "m.gguf", SMALL, gguf_tensors(SOURCE, Type.Q8_0), tokenizer=small_tokenizer()
    )
    tensors = pair("base_model.model.lm_head", 64, 32)
    write_adapter(folder / "adapter", tensors, alpha_pattern={"lm_head": 3}, modules_to_save=None)
    manifest = {
        "layers": [
            {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:" + "0" * 64}
        ]
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_the_files_are_good(folder: Path) -> None:
    for name in ("hf", "single", "original", "m.gguf"):
        with warnings.catch_warnings(action="ignore"):
            assert open_checkpoint(folder / name).source.config.hidden_size == 32
    resolve_model(folder / "hf", [folder / "adapter"])


@fuzz
@given(edits=changes, whole=st.booleans())
def test_gguf(folder: Path, edits: Any, whole: bool) -> None:
    good = (folder / "m.gguf").read_bytes()
    (folder / "x").mkdir(exist_ok=True)
    path = folder / "x" / "m.gguf"
    path.write_bytes(damaged(good, edits, len(good) if whole else 7000))
    read_everything(path)


metadata_values = st.one_of(
    st.integers(0, 2**32 - 1),
    st.floats(width=32),
    st.text(max_size=5),
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4),
    st.lists(st.text(max_size=5), min_size=1, max_size=4),
)


@fuzz
@given(edits=st.dictionaries(st.integers(0, 99), metadata_values, min_size=1, max_size=3))
def test_gguf_metadata(folder: Path, edits: dict[int, Any]) -> None:
    """Whole files with other values and types."""
    fields, tokenizer = gguf_fields(SMALL), small_tokenizer()
    both = [(fields, key) for key in fields] + [(tokenizer, key) for key in tokenizer]
    for place, value in edits.items():
        where, key = both[place % len(both)]
        where[key] = value
    path = folder / "y" / "m.gguf"
    path.parent.mkdir(exist_ok=True)
    write_gguf(path, SMALL, gguf_tensors(SOURCE, Type.BF16), fields=fields, tokenizer=tokenizer)
    read_everything(path)


@fuzz
@given(edits=changes, whole=st.booleans())
def test_safetensors(folder: Path, edits: Any, whole: bool) -> None:
    check_one_file(
        folder / "single",
        "model.safetensors",
        lambda d: damaged(d, edits, len(d) if whole else 4000),
    )


@fuzz
@given(edits=json_changes)
def test_safetensors_header(folder: Path, edits: Any) -> None:
    def change(data: bytes) -> bytes:
        size = int.from_bytes(data[:8], "little")
        header = damaged_json(data[8 : 8 + size].decode(), edits)
        return len(header).to_bytes(8, "little") + header + data[8 + size :]

    check_one_file(folder / "single", "model.safetensors", change)


JSON_FILES = [
    ("hf", "config.json"),
    ("hf", "generation_config.json"),
    ("hf", "model.safetensors.index.json"),
    ("original", "config.json"),
]


@pytest.mark.parametrize(("form", "name"), JSON_FILES)
@fuzz
@given(edits=st.one_of(changes, json_changes))
def test_json(folder: Path, form: str, name: str, edits: Any) -> None:
    check_one_file(folder / form, name, json_damage(edits))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@fuzz
@given(edits=st.one_of(changes, json_changes))
def test_adapter(folder: Path, name: str, edits: Any) -> None:
    change = (
        json_damage(edits)
        if name.endswith("json")
        else lambda d: damaged(d, byte_edits(edits), 600)
    )
    with replaced(folder / "adapter" / name, change):
        read_everything(folder / "hf", (folder / "adapter",))


@fuzz
@given(edits=st.one_of(changes, json_changes))
def test_ollama_manifest(folder: Path, edits: Any) -> None:
    manifest = folder / "store" / "manifests" / "registry.ollama.ai" / "library" / "a" / "b"
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_bytes(json_damage(edits)((folder / "manifest.json").read_bytes()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OLLAMA_MODELS", str(folder / "store"))
        with watched(manifest.stat().st_size), pytest.raises(OsscompileError):
            resolve_model("a:b")


@settings(fuzz, max_examples=max(1, EXAMPLES // 5))
@given(edits=st.one_of(changes, json_changes))
def test_tokenizer(folder: Path, edits: Any) -> None:
    """The runtime's reader, on what the library makes of the file."""
    path = folder / "tokenizer.json"
    path.write_bytes(json_damage(edits)((NANO_CHECKPOINT / "tokenizer.json").read_bytes()))
    with watched(path.stat().st_size):
        try:
            Tokenizer(path).encode("what is 3 + 4?")
        except OsscompileError:
            pass


def json_damage(edits: Any) -> Callable[[bytes], bytes]:
    """What makes edits of either kind, byte by byte or value by value."""
    if isinstance(edits[0][0], float):
        return lambda data: damaged(data, edits, len(data))
    return lambda data: damaged_json(data.decode(), edits)


def byte_edits(edits: Any) -> Any:
    """Places in a file, made of edits to JSON."""
    if isinstance(edits[0][0], float):
        return edits
    return [(number / 10**6 * 0.999, ("number", 4, number)) for number, _, _ in edits]


def check_one_file(model: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    with replaced(model / name, change):
        read_everything(model)


@contextmanager
def replaced(path: Path, change: Callable[[bytes], bytes]) -> Iterator[None]:
    good = path.read_bytes()
    path.write_bytes(change(good))
    try:
        yield
    finally:
        path.write_bytes(good)
