"""Names that files and users give, in messages: nothing that a terminal obeys, and cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import config_json, hf_tensors, write_checkpoint
from forms import Type, gguf_fields, gguf_tensors, write_gguf
from test_adapter import pair, write_adapter

import osscompile
from osscompile import CompileError, OsscompileError
from osscompile.cache import entries
from osscompile.importer import resolve
from osscompile.importer.forms import open_checkpoint
from osscompile.importer.forms.adapter import merge_adapter
from osscompile.importer.synthetic import TINY, SyntheticSource
from osscompile.options import shown

SOURCE = SyntheticSource(TINY)
ODD = "a\n\x1b[2J\x9b\udcff"
LONG = ODD + "x" * 100_000
MOST = 2000  # characters of a message


def check(error: OsscompileError) -> None:
    message = str(error)
    assert message.isprintable() and 20 < len(message) < MOST, message[:MOST]


@pytest.mark.parametrize("kind", [OsscompileError, CompileError, resolve.AbsentError])
def test_whatever_a_message_quotes_can_be_printed(kind: type[OsscompileError]) -> None:
    assert str(kind(f"two\tlines:\n{ODD}")) == "two     lines:\na\n?[2J??"
    assert shown(f"{ODD}\t") == "a??[2J???" and len(shown(LONG)) < MOST


CALLS: dict[str, Callable[[], object]] = {
    "model": lambda: resolve.find_model(LONG),
    "synthetic": lambda: resolve.resolve_model(f"synthetic:{LONG}"),
    "ollama": lambda: resolve.find_model(f"{'x' * 100_000}:tag"),
    "adapter": lambda: resolve.find_adapter(LONG),
    "adapter of a synthetic model": lambda: resolve.resolve_model("synthetic:tiny", [LONG]),
    "entry": lambda: entries.choose_entry(LONG),
    "target": lambda: osscompile.compile("nano", LONG),
    "variants": lambda: osscompile.compile("nano", "x86", variants=[LONG]),
    "variants that are none": lambda: osscompile.compile("nano", variants=[LONG, 5]),  # type: ignore[list-item]
    "profile": lambda: osscompile.compile("nano", profile=LONG),
    "context": lambda: osscompile.compile("nano", context=LONG),  # type: ignore[arg-type]
    "output": lambda: osscompile.compile("nano", output=LONG),
    "output without a place": lambda: osscompile.compile("nano", output="/dev/null/" + "x" * 9999),
    "records": lambda: osscompile.compile("nano", records=LONG),
    "dump": lambda: osscompile.compile("nano", dump=LONG),
    "artifact": lambda: osscompile.load(LONG),
}


@pytest.mark.parametrize("call", CALLS)
def test_names_that_a_user_gives(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OSSCOMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    with pytest.raises(OsscompileError) as caught:
        CALLS[call]()
    check(caught.value)


NAME = "a\n\x1b[2J\x9b" + "x" * 3000
FILE = "a\n\x1b[2J\x9b" + "x" * 200

TENSORS = [f"{NAME}.absmax", f"{NAME}.lora_A.x", "model.layers.9.\x1b" + "x" * 3000]
TENSORS += [f"\x1b{'x' * 3000}.score.weight", f"_orig_mod.{NAME}", "_orig_mod.model.norm.weight"]


@pytest.mark.parametrize("tensor", TENSORS, ids=["sign", "part", "layer", "head", "twice", "known"])
def test_names_of_tensors(tmp_path: Path, tensor: str) -> None:
    more = {tensor: np.zeros(3, np.float32)}
    if tensor == f"_orig_mod.{NAME}":
        more[NAME] = np.zeros(3, np.float32)
    write_checkpoint(tmp_path / "\x1b[2J", SOURCE, tensors=hf_tensors(SOURCE) | more, shards=1)
    refused(tmp_path / "\x1b[2J")


CONFIGS: dict[str, dict[str, Any]] = {
    "config.json": {
        "model_type": NAME,
        "hidden_act": NAME,
        "architectures": [NAME],
        "layer_types": [NAME],
        "vocab_size": NAME,
        "rope_scaling": {"rope_type": NAME},
        "quantization_config": {"quant_method": NAME},
        "quantization": NAME,
    },
    "generation_config.json": {"temperature": NAME, "do_sample": NAME},
    "hf_quant_config.json": {"quantization": {"quant_algo": NAME}},
}
FIELDS = [(file, field) for file, fields in CONFIGS.items() for field in fields]


@pytest.mark.parametrize(("file", "field"), FIELDS)
def test_values_in_configs(tmp_path: Path, file: str, field: str) -> None:
    write_checkpoint(tmp_path / "m", SOURCE)
    fields = config_json(TINY) if file == "config.json" else {}
    (tmp_path / "m" / file).write_text(json.dumps(fields | {field: CONFIGS[file][field]}))
    refused(tmp_path / "m")


@pytest.mark.parametrize("kind", ["index", "outside", "gguf", "bin", "several"])
def test_names_of_files(tmp_path: Path, kind: str) -> None:
    folder = write_checkpoint(tmp_path / "m", SOURCE)
    index = folder / "model.safetensors.index.json"
    if kind in ("index", "outside"):
        names = json.loads(index.read_text())["weight_map"]
        file = FILE if kind == "index" else f"../{NAME}"
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))
    else:
        for file in folder.glob("*.safetensors*"):
            file.unlink()
        (folder / f"{FILE}.{kind.replace('several', 'gguf')}").touch()
    if kind == "several":
        (folder / "config.json").unlink()
        (folder / "other.gguf").touch()
    refused(folder)


GENERAL = {"general.type": NAME, "general.architecture": NAME, "split.no": NAME, NAME: [1]}


@pytest.mark.parametrize("key", [*GENERAL, "rope.scaling.type", "logit_scale"])
def test_values_in_gguf(tmp_path: Path, key: str) -> None:
    fields, tensors = gguf_fields(TINY), gguf_tensors(SOURCE, Type.BF16)
    if key in GENERAL:
        general = {key: GENERAL[key]}
    else:
        general, fields[key] = {}, NAME
    if key == NAME:  # a tensor that lies nowhere
        tensors[f"blk.9.{NAME}"] = (np.zeros(32, np.float32), Type.F32)
    path = write_gguf(tmp_path / "m.gguf", TINY, tensors, fields=fields, general=general)
    refused(path)


@pytest.mark.parametrize("field", ["peft_type", "modules_to_save", "alpha_pattern", "tensor"])
def test_names_in_adapters(tmp_path: Path, field: str) -> None:
    source = open_checkpoint(write_checkpoint(tmp_path / "m", SOURCE)).source
    value = {"modules_to_save": [NAME], "alpha_pattern": {NAME: 1}}.get(field, NAME)
    module = f"base_model.model.{NAME if field == 'tensor' else 'lm_head'}"
    fields = {} if field == "tensor" else {field: value}
    adapter = write_adapter(tmp_path / "a", pair(module, 512, 64), **fields)
    with pytest.raises(OsscompileError) as caught:
        merge_adapter(source, adapter)  # type: ignore[arg-type]
    check(caught.value)


def refused(path: Path) -> None:
    with pytest.raises(OsscompileError) as caught:
        open_checkpoint(path)
    check(caught.value)
