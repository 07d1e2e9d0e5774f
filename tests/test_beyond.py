"""Checkpoints that hold more, or something else, than their config says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import config_json, hf_tensors, write_checkpoint, write_safetensors
from forms import (
    Tensors,
    Type,
    by_expert,
    cast,
    dense_experts,
    gguf_fields,
    gguf_tensors,
    plain_config,
    write_gguf,
    write_original,
)

from osscompile.errors import CheckpointError
from osscompile.importer.forms import open_checkpoint
from osscompile.importer.synthetic import TINY, SyntheticSource

SOURCE = SyntheticSource(TINY)
BEYOND: dict[str, tuple[dict[str, Any], str]] = {
    "layers": (
        {"num_hidden_layers": 3, "layer_types": None},
        r"num_hidden_layers: expected 4, as tensor model\.layers\.3\..* found 3",
    ),
    "experts": (
        {"num_local_experts": 7},
        r"num_local_experts: expected 8, as .* found 7",
    ),
}


@pytest.mark.parametrize("case", BEYOND)
@pytest.mark.parametrize("change", [dict, by_expert])
@pytest.mark.parametrize("shards", [1, 2])
def test_config_of_fewer_than_there_are(
    tmp_path: Path, case: str, change: Callable[[Tensors], Tensors], shards: int
) -> None:
    fields, message = BEYOND[case]
    tensors = change(cast(dense_experts(hf_tensors(SOURCE)), np.float32))
    if change is by_expert:  # of which the router alone would tell
        tensors = {
            n: t[:7] if ".router." in n and case == "experts" else t for n, t in tensors.items()
        }
    config = plain_config(TINY) | fields
    write_checkpoint(tmp_path, SOURCE, tensors=tensors, config=config, shards=shards)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_config_of_more_experts_or_another_vocabulary(tmp_path: Path) -> None:
    for field, found, tensor in (
        ("num_local_experts", 8, r"router\.weight"),
        ("vocab_size", 512, r"embed_tokens\.weight"),
    ):
        config = config_json(TINY) | {field: found + 3}
        write_checkpoint(tmp_path, SOURCE, config=config)
        with pytest.raises(
            CheckpointError, match=f"{tensor}: .*{field}: expected {found}, .*, found {found + 3}"
        ):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize("shards", [1, 2])
def test_config_of_more_layers(tmp_path: Path, shards: int) -> None:
    """It is not a checkpoint that lacks some."""
    config = config_json(TINY) | {"num_hidden_layers": 6, "layer_types": None}
    write_checkpoint(tmp_path, SOURCE, config=config, shards=shards)
    with pytest.raises(CheckpointError, match=r"num_hidden_layers: expected 4, as .*3.*, found 6"):
        open_checkpoint(tmp_path)


SIZES = {
    "vocab_size": (512, 544),
    "hidden_size": (64, 96),
    "intermediate_size": (96, 64),
    "num_local_experts": (8, 16),
    "num_attention_heads": (16, 8),
    "num_key_value_heads": (2, 4),
    "head_dim": (32, 64),
}
ORIGINAL_NAMES = {"num_local_experts": "num_experts"}


@pytest.mark.parametrize("field", SIZES)
def test_sizes_that_the_weights_do_not_have(tmp_path: Path, field: str) -> None:
    """Whatever the form, the message names the field, what it says and what the weights have."""
    right, wrong = SIZES[field]
    assert config_json(TINY)[field] == right
    message = rf"tensor .*: {field}: expected {right}, as the tensor has, found {wrong}: correct"
    forms = {
        "packed": hf_tensors(SOURCE),
        "by_expert": by_expert(cast(dense_experts(hf_tensors(SOURCE)), np.float32)),
    }
    if field == "num_local_experts":  # the names of the experts tell
        forms.pop("by_expert")
    for name, tensors in forms.items():
        config = config_json(TINY) | {field: wrong}
        config = config if name == "packed" else plain_config(TINY) | {field: wrong}
        write_checkpoint(tmp_path / name, SOURCE, tensors=tensors, config=config)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path / name)
    original = write_original(tmp_path / "original", SOURCE)
    config = json.loads((original / "config.json").read_text())
    config[ORIGINAL_NAMES.get(field, field)] = wrong
    (original / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(original)


def test_other_forms_with_a_layer_beyond(tmp_path: Path) -> None:
    fields = gguf_fields(TINY) | {"block_count": 3}
    path = write_gguf(tmp_path / "m.gguf", TINY, gguf_tensors(SOURCE, Type.BF16), fields=fields)
    with pytest.raises(CheckpointError, match=r"block_count: expected 4, as .*blk\.3.*found 3"):
        open_checkpoint(path)
    fields = gguf_fields(TINY) | {"block_count": 5}
    path = write_gguf(tmp_path / "m.gguf", TINY, gguf_tensors(SOURCE, Type.BF16), fields=fields)
    with pytest.raises(CheckpointError, match=r"block_count: expected 4, as .*blk\.3.*found 5"):
        open_checkpoint(path)
    fields = gguf_fields(TINY) | {"feed_forward_length": 64, "expert_feed_forward_length": 64}
    path = write_gguf(tmp_path / "m.gguf", TINY, gguf_tensors(SOURCE, Type.BF16), fields=fields)
    with pytest.raises(CheckpointError, match=r"intermediate_size: expected 96, .* found 64"):
        open_checkpoint(path)
    original = write_original(tmp_path / "original", SOURCE)
    config = json.loads((original / "config.json").read_text()) | {"num_hidden_layers": 3}
    (original / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"num_hidden_layers: expected 4, as .*block\.3"):
        open_checkpoint(original)


def test_experts_in_two_forms(tmp_path: Path) -> None:
    packed = hf_tensors(SOURCE)
    dense = dense_experts(packed)
    for tensors in (dense | packed, packed | by_expert(dense)):
        write_checkpoint(tmp_path, SOURCE, tensors=tensors)
        with pytest.raises(CheckpointError, match=r"experts in one form, found .*_proj.* and "):
            open_checkpoint(tmp_path)


def test_whole_model_beside_an_index_and_its_shards(tmp_path: Path) -> None:
    """Either may be the newer one; an index whose shards are gone is left over."""
    write_checkpoint(tmp_path, SOURCE)
    newer = hf_tensors(SOURCE)
    newer["model.norm.weight"] = newer["model.norm.weight"] * 2
    write_safetensors(tmp_path / "model.safetensors", newer)
    shards = sorted(tmp_path.glob("model-*"))
    with pytest.raises(
        CheckpointError,
        match=rf"found model\.safetensors and model\.safetensors\.index\.json, {shards[0].name}, .*"
        r"remove model\.safetensors, or all",
    ):
        open_checkpoint(tmp_path)
    for shard in shards:
        shard.unlink()
    norm = open_checkpoint(tmp_path).source.read("norm.weight", 0, TINY.hidden_size)
    np.testing.assert_array_equal(norm, newer["model.norm.weight"])


def test_whole_model_that_the_index_names(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SOURCE, shards=1)
    index = {"weight_map": dict.fromkeys(hf_tensors(SOURCE), "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    open_checkpoint(tmp_path)


def test_whole_model_beside_shards_without_an_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SOURCE, shards=1)
    stray = "model-00001-of-00003.safetensors"
    write_safetensors(tmp_path / stray, {"a": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match=rf"found model\.safetensors and {stray}, .*remove"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("file", ["a" * 3000, "a/" * 3000 + "b"], ids=["name", "path"])
def test_index_with_names_that_no_file_system_takes(tmp_path: Path, file: str) -> None:
    write_checkpoint(tmp_path, SOURCE)
    path = tmp_path / "model.safetensors.index.json"
    names = json.loads(path.read_text())["weight_map"]
    path.write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))
    with pytest.raises(CheckpointError, match=r"expected a file name|no such file") as caught:
        open_checkpoint(tmp_path)
    assert len(str(caught.value)) < 1000
