"""Whole compiles of other forms than the published one, their kernels left out."""

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from artifacts import TINY_OPTIONS, leave_libraries_empty
from checkpoints import write_checkpoint
from forms import Tensors, Type, gguf_tensors, gguf_tokenizer, write_dense, write_gguf

import osscompile
from osscompile.cli import main
from osscompile.importer.forms import open_checkpoint
from osscompile.importer.graph import weight_parameters
from osscompile.importer.resolve import NANO_CHECKPOINT
from osscompile.importer.stored import Stored
from osscompile.importer.synthetic import TINY, SyntheticSource
from osscompile.importer.weights import KeptScales, weight_pieces
from osscompile.runtime.artifact import MANIFEST, TOKENIZER, WEIGHTS, read_manifest
from osscompile.runtime.manifest import CHAT_TEMPLATE
from osscompile.runtime.safetensors import read_header
from osscompile.runtime.sampling_options import Sampling
from osscompile.targets import Target

CONFIG = dataclasses.replace(TINY, vocab_size=1024)
SOURCE = SyntheticSource(CONFIG)


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_libraries_empty(monkeypatch)


def compiled(model: Path, target: Target) -> Path:
    output = model.parent / "out.osc"
    return osscompile.compile(model, target.name, output, **TINY_OPTIONS)


def test_gguf_becomes_the_artifact_of_the_published_form(
    tmp_path: Path, this_machine: Target
) -> None:
    published = write_checkpoint(tmp_path / "a" / "m", SOURCE)
    tokenizer = gguf_tokenizer(NANO_CHECKPOINT / "tokenizer.json", 1024)
    (tmp_path / "b").mkdir()
    path = tmp_path / "b" / "m.gguf"
    write_gguf(path, CONFIG, gguf_tensors(SOURCE, Type.BF16), tokenizer=tokenizer)
    (published / "generation_config.json").write_text('{"temperature": 0.5, "top_k": 7}')
    (published / "chat_template.jinja").write_bytes("{{ é }}\r\n".encode())
    with pytest.warns(UserWarning, match=r"no tokenizer\.json"):
        expected = compiled(published, this_machine)
    with warnings.catch_warnings(action="error"):
        found = compiled(path, this_machine)
    assert (found / WEIGHTS).read_bytes() == (expected / WEIGHTS).read_bytes()
    assert "<|return|>" in (found / TOKENIZER).read_text()
    assert json.loads((found / MANIFEST).read_text())["eos_token_ids"] == [7, 9]
    assert (expected / CHAT_TEMPLATE).read_bytes() == "{{ é }}\r\n".encode()
    assert read_manifest(expected).files[CHAT_TEMPLATE].num_bytes == 10
    assert read_manifest(expected).sampling == Sampling(0.5, 1.0, 7, 0.0)
    assert read_manifest(found).sampling == Sampling()
    assert CHAT_TEMPLATE not in read_manifest(found).files
    with warnings.catch_warnings(action="ignore"):
        compiled(published, this_machine)  # an artifact with a template can be replaced


def test_what_quantising_experts_cost_is_told(tmp_path: Path, this_machine: Target) -> None:
    def tune(tensors: Tensors) -> Tensors:
        """The second layer's gates and ups as training leaves them."""
        name = "model.layers.1.mlp.experts.gate_up_proj"
        noise = np.random.default_rng(0).standard_normal(tensors[name].shape) * 0.02
        return tensors | {
            name: (tensors[name].astype(np.float32) + noise).astype(tensors[name].dtype)
        }

    model = write_dense(tmp_path / "m", SOURCE, change=tune)
    with pytest.warns(UserWarning) as told:
        compiled(model, this_machine)
    (table,) = (str(w.message) for w in told if "quantised" in str(w.message))
    *_, line = table.splitlines()
    layer, gate_up, _, down, _ = line.split()
    assert (layer, down) == ("1", "0.000")
    assert 1 < float(gate_up) < 20
    assert len(table.splitlines()) == 3


FORMS: dict[str, Callable[[Path], Path]] = {
    "mxfp4": lambda folder: write_checkpoint(folder / "m", SOURCE, shards=1),
    "bf16": lambda folder: write_dense(folder / "m", SOURCE),
    "gguf": lambda folder: write_gguf(folder / "m", CONFIG, gguf_tensors(SOURCE, Type.Q8_0)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("profile", ["fast", "exact"])
def test_every_byte_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, profile: str
) -> None:
    path = FORMS[form](tmp_path)
    with warnings.catch_warnings(action="ignore"):
        source = open_checkpoint(path).source
    read: list[int] = []
    raw = Stored.raw

    def counting(self: Stored, start: int, stop: int) -> np.ndarray:
        rows = raw(self, start, stop)
        read.append(rows.nbytes)
        return rows

    monkeypatch.setattr(Stored, "raw", counting)
    kept = KeptScales()
    for parameter in weight_parameters(CONFIG, profile, 64):
        for make in weight_pieces(parameter, source, None, kept):
            make()
    if path.is_dir():
        headers = [read_header(file) for file in path.glob("*.safetensors")]
        stored = sum(entry.num_bytes for header in headers for entry in header.values())
    else:
        stored = sum(tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors)
    assert sum(read) == stored


def test_adapter_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    assert main(["compile", "nano", "--adapter", str(tmp_path)]) == 1
    assert "peft_type: expected 'LORA', found 'IA3'" in capsys.readouterr().err
