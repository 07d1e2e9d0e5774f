"""Open checkpoints: the canonical tensors of good ones, and the message for each bad one."""

import dataclasses
import json
import math
import os
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import config_json, hf_tensors, write_checkpoint, write_container

from osscompile.errors import CheckpointError
from osscompile.importer import forms
from osscompile.importer.checkpoint import Source, canonical_shapes
from osscompile.importer.synthetic import TINY, SyntheticSource, synthetic_source

SOURCE = SyntheticSource(TINY)
EXPERTS = "model.layers.0.mlp.experts."


def open_checkpoint(directory: Path) -> Source:
    return forms.open_checkpoint(directory).source


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return hf_tensors(SOURCE)


def read_index(directory: Path) -> tuple[Path, dict[str, Any]]:
    path = directory / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_round_trip(tmp_path: Path, shards: int) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, SOURCE, shards=shards))
    assert checkpoint.config == TINY
    for name, (shape, dtype) in canonical_shapes(TINY).items():
        expected = SOURCE.read(name, 0, shape[0])
        found = checkpoint.read(name, 0, shape[0])
        assert found.shape == checkpoint.shape(name) == shape, name
        assert found.dtype == (ml_dtypes.bfloat16 if dtype == "bf16" else np.uint8), name
        assert found.flags.c_contiguous, name
        np.testing.assert_array_equal(found, expected, err_msg=name)


def test_rows_across_q_k_and_v(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, SOURCE))
    whole = SOURCE.read("layers.1.qkv.weight", 0, TINY.qkv_size)
    q, k = TINY.q_size, TINY.q_size + TINY.kv_size
    for start, stop in ((0, q), (q, k), (q - 1, k + 1), (k, k + 1), (k, TINY.qkv_size), (q, q)):
        found = checkpoint.read("layers.1.qkv.weight", start, stop)
        np.testing.assert_array_equal(found, whole[start:stop], err_msg=f"{start}..{stop}")


def test_one_expert_at_a_time(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, SOURCE))
    for kind in ("gate_up.blocks", "gate_up.scales", "gate_up.bias", "down.blocks"):
        found = checkpoint.read(f"layers.0.{kind}", 5, 6)
        np.testing.assert_array_equal(found, SOURCE.read(f"layers.0.{kind}", 5, 6))


def test_stored_gate_rows_are_the_even_ones(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, SOURCE))
    stored = tensors[EXPERTS + "gate_up_proj_bias"]
    gate_up = checkpoint.read("layers.0.gate_up.bias", 3, 4)
    np.testing.assert_array_equal(gate_up[0, 0], stored[3, 0::2])
    np.testing.assert_array_equal(gate_up[0, 1], stored[3, 1::2])


def test_unneeded_tensors_and_shards_are_ignored(
    tmp_path: Path, tensors: dict[str, np.ndarray]
) -> None:
    extra = {"model.rotary.inv_freq": np.zeros(4, np.float32)}
    write_checkpoint(tmp_path, SOURCE, tensors=tensors | extra)
    path, index = read_index(tmp_path)
    index["weight_map"]["something.else"] = "absent.safetensors"
    path.write_text(json.dumps(index))
    open_checkpoint(tmp_path)


def test_index_wins_over_file_names(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SOURCE)
    path, index = read_index(tmp_path)
    odd = {
        "model-00000-of-00001.safetensors": "a.bin",
        "model-00001-of-00001.safetensors": "sub/b",
    }
    (tmp_path / "sub").mkdir()
    for old, new in odd.items():
        (tmp_path / old).rename(tmp_path / new)
    index["weight_map"] = {name: odd[file] for name, file in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    open_checkpoint(tmp_path)


def test_shards_that_link_out_of_the_directory(tmp_path: Path) -> None:
    """The download cache keeps the files elsewhere and links them."""
    stored = write_checkpoint(tmp_path / "blobs", SOURCE)
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in stored.iterdir():
        os.symlink(file, linked / file.name)
    open_checkpoint(linked)


def test_byte_totals_of_the_published_models() -> None:
    totals = {"gpt-oss-20b": 13_761_264_768, "gpt-oss-120b": 65_248_815_744}
    for name, total in totals.items():
        shapes = canonical_shapes(synthetic_source(name).config).values()
        assert sum(math.prod(shape) * {"bf16": 2, "u8": 1}[dtype] for shape, dtype in shapes) == (
            total
        )


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent: no such directory"):
        open_checkpoint(tmp_path / "absent")


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: not found"):
        open_checkpoint(tmp_path)


def test_neither_index_nor_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_json(TINY)))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file.*an index"):
        open_checkpoint(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SOURCE)
    (tmp_path / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-00001.*no such file.*index"):
        open_checkpoint(tmp_path)


def test_truncated_shard(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SOURCE)
    shard = tmp_path / "model-00001-of-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model-00001-of-00001.*cut off; download"):
        open_checkpoint(tmp_path)


def test_shard_that_shrinks_after_opening(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, SOURCE, shards=1))
    os.truncate(tmp_path / "model.safetensors", 20_000)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: expected .* the file shrank"):
        checkpoint.read("lm_head.weight", 0, TINY.vocab_size)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read("lm_head.weight", 0, TINY.vocab_size)


def test_tensor_missing_from_the_index(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    others = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    write_checkpoint(tmp_path, SOURCE, tensors=others)
    with pytest.raises(CheckpointError, match=r"index\.json: expected tensor model\.norm"):
        open_checkpoint(tmp_path)


def test_tensor_missing_from_its_shard(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SOURCE)
    path, index = read_index(tmp_path)
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["lm_head.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=r"model-0000\d-of-00001\.safetensors: expected tensor model\.norm"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], "model.safetensors"])
def test_index_without_a_weight_map(tmp_path: Path, weight_map: object) -> None:
    write_checkpoint(tmp_path, SOURCE)
    path, index = read_index(tmp_path)
    path.write_text(json.dumps(index | {"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="expected an object `weight_map`"):
        open_checkpoint(tmp_path)


ESCAPES = ["../x", "a/../../x", "/etc/passwd", "..\\x", "C:\\x", "\\x", "", ".", "a\0b", 3, None]


@pytest.mark.parametrize("file", ESCAPES)
def test_index_that_leaves_the_directory(tmp_path: Path, file: object) -> None:
    write_checkpoint(tmp_path, SOURCE)
    path, index = read_index(tmp_path)
    index["weight_map"]["lm_head.weight"] = file
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight: expected a file name"):
        open_checkpoint(tmp_path)


def test_wrong_dtype(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    wrong = {"lm_head.weight": tensors["lm_head.weight"].view(np.uint8)[:, :64]}
    write_checkpoint(tmp_path, SOURCE, tensors=tensors | wrong)
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight: expected BF16.* \[512, 64\], found U8 \[512, 64\]"
    ):
        open_checkpoint(tmp_path)


def test_wrong_shape(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    name = EXPERTS + "gate_up_proj_scales"
    write_checkpoint(tmp_path, SOURCE, tensors=tensors | {name: tensors[name][:, 1:]})
    with pytest.raises(
        CheckpointError, match=r"scales: expected U8 \[8, 192, 2\], found U8 \[8, 191, 2\]"
    ):
        open_checkpoint(tmp_path)


def test_another_quantisation(tmp_path: Path) -> None:
    config = config_json(TINY) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    write_checkpoint(tmp_path, SOURCE, config=config)
    with pytest.raises(CheckpointError, match=r"quant_method: expected 'mxfp4'.*'bitsandbytes'"):
        open_checkpoint(tmp_path)


def test_scale_255_is_refused_when_read(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    name = EXPERTS + "down_proj_scales"
    scales = tensors[name].copy()
    scales[6, 3, 1] = 255
    checkpoint = open_checkpoint(
        write_checkpoint(tmp_path, SOURCE, tensors=tensors | {name: scales})
    )
    checkpoint.read("layers.0.down.scales", 0, 6)
    with pytest.raises(CheckpointError, match=r"down_proj_scales: .* byte 255 \(NaN\) in rows 5"):
        checkpoint.read("layers.0.down.scales", 5, 7)


def test_shard_that_is_no_safetensors_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SOURCE)
    (tmp_path / "model-00000-of-00001.safetensors").write_text("version https://git-lfs")
    with pytest.raises(CheckpointError, match="not a safetensors file; download"):
        open_checkpoint(tmp_path)


def test_one_row_of_a_shard_too_large_for_memory(tmp_path: Path) -> None:
    """The weights are a hole in the file: embedding and output have half a gigabyte each."""
    config = dataclasses.replace(TINY, vocab_size=1 << 22)
    small = hf_tensors(SOURCE)
    header, offset = {}, 0
    for name, tensor in small.items():
        wide = name in ("model.embed_tokens.weight", "lm_head.weight")
        shape = [1 << 22, 64] if wide else list(tensor.shape)
        end = offset + math.prod(shape) * tensor.itemsize
        dtype = "U8" if tensor.dtype == np.uint8 else "BF16"
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    path = tmp_path / "model.safetensors"
    write_container(path, header)
    os.truncate(path, path.stat().st_size + offset)
    (tmp_path / "config.json").write_text(json.dumps(config_json(config)))
    checkpoint = open_checkpoint(tmp_path)
    tracemalloc.start()
    try:
        row = checkpoint.read("lm_head.weight", (1 << 22) - 1, 1 << 22)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert row.shape == (1, 64)
    assert peak < 100_000
