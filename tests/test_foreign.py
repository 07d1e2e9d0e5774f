"""Checkpoints that are not what they should be: each is told what it is, and what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import config_json, hf_tensors, write_checkpoint
from forms import Tensors, Type, gguf_fields, gguf_tensors, write_dense, write_gguf
from huggingface_hub import constants
from test_forms import assert_same_model

from osscompile.errors import CheckpointError
from osscompile.importer import resolve
from osscompile.importer.forms import open_checkpoint
from osscompile.importer.resolve import resolve_model
from osscompile.importer.synthetic import TINY, SyntheticSource

SOURCE = SyntheticSource(TINY)
NORM = "model.layers.2.post_attention_layernorm.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0614fe\nsize 27868174\n"


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return hf_tensors(SOURCE)


QUANTISED = {
    "awq": ({"quantization_config": {"quant_method": "awq"}}, "'awq'.*AWQ"),
    "gptq": ({"quantization_config": {"quant_method": "gptq"}}, "'gptq'.*GPTQ"),
    "bitsandbytes": ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
    "nvfp4": ({"quantization_config": {"quant_method": "modelopt"}}, "NVFP4"),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, "FP8"),
    "unheard_of": ({"quantization_config": {"quant_method": ["new"]}}, r"\['new'\]"),
    "mlx": ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
}


@pytest.mark.parametrize("case", QUANTISED)
def test_quantised_in_another_way(tmp_path: Path, case: str) -> None:
    fields, message = QUANTISED[case]
    write_checkpoint(tmp_path, SOURCE, config=config_json(TINY) | fields)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}.*reads MXFP4, bf16"):
        open_checkpoint(tmp_path)


EXPERTS = "model.layers.0.mlp.experts."
SIGNS = {
    "bitsandbytes": (f"{EXPERTS}gate_up_projs.0.weight.absmax", "bitsandbytes"),
    "gptq": ("model.layers.0.self_attn.q_proj.qweight", "AWQ or GPTQ"),
    "nvfp4": (f"{EXPERTS}gate_up_proj_weight_x.weight_scale_2", "NVFP4"),
    "fp8": ("model.layers.0.self_attn.q_proj.weight_scale", "FP8"),
    "mlx": (f"{EXPERTS}gate_proj.biases", "MLX"),
    "unmerged": ("model.layers.0.self_attn.q_proj.lora_A.default.weight", "merge_and_unload"),
    "reward_head": ("v_head.summary.weight", "head of a classifier or reward model"),
    "classifier": ("score.weight", "head of a classifier or reward model"),
}


@pytest.mark.parametrize("case", SIGNS)
@pytest.mark.parametrize("shards", [1, 2])
def test_names_that_tell_what_it_is(
    tmp_path: Path, tensors: Tensors, case: str, shards: int
) -> None:
    """One tensor that we need has another name or gives way to a head."""
    name, message = SIGNS[case]
    missing = (
        "lm_head.weight" if "head" in case or case == "classifier" else f"{EXPERTS}down_proj_blocks"
    )
    renamed = {(name if n == missing else n): t for n, t in tensors.items()}
    write_checkpoint(tmp_path, SOURCE, tensors=renamed, shards=shards)
    with pytest.raises(CheckpointError, match=f"found tensor {name}.*{message}"):
        open_checkpoint(tmp_path)


WRAPPED: dict[str, Callable[[str], str]] = {
    "peft": lambda name: f"base_model.model.{name}",
    "parallel_and_compiled": lambda name: f"module._orig_mod.{name}",
    "text_model_inside": lambda name: name.replace("model.", "model.language_model.", 1),
    "text_model_outside": lambda name: f"language_model.{name}",
}


@pytest.mark.parametrize("case", WRAPPED)
def test_names_in_known_wrappers(tmp_path: Path, tensors: Tensors, case: str) -> None:
    wrapped = {WRAPPED[case](name): tensor for name, tensor in tensors.items()}
    write_checkpoint(tmp_path, SOURCE, tensors=wrapped)
    assert_same_model(open_checkpoint(tmp_path).source)


def test_names_in_an_unknown_wrapper(tmp_path: Path, tensors: Tensors) -> None:
    wrapped = {f"actor.{name}": tensor for name, tensor in tensors.items()}
    write_checkpoint(tmp_path, SOURCE, tensors=wrapped)
    with pytest.raises(CheckpointError, match=r"begin with `model\.`, found `actor\.model\.`"):
        open_checkpoint(tmp_path)


def test_names_with_and_without_a_wrapper(tmp_path: Path, tensors: Tensors) -> None:
    twice = tensors | {"module.lm_head.weight": tensors["lm_head.weight"]}
    write_checkpoint(tmp_path, SOURCE, tensors=twice)
    with pytest.raises(CheckpointError, match=r"once, found lm_head\.weight and module\.lm_head"):
        open_checkpoint(tmp_path)


def test_float32_norms_beside_bfloat16_stay_float32(tmp_path: Path, tensors: Tensors) -> None:
    norm = np.linspace(0.5, 2, 64, dtype=np.float32)
    write_checkpoint(tmp_path, SOURCE, tensors=tensors | {NORM: norm})
    source = open_checkpoint(tmp_path).source
    np.testing.assert_array_equal(source.read("layers.2.mlp_norm.weight", 0, 64), norm)
    np.testing.assert_array_equal(
        source.read("layers.1.mlp_norm.weight", 0, 64),
        SOURCE.read("layers.1.mlp_norm.weight", 0, 64),
    )


LFS_FILES = ["config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"]


@pytest.mark.parametrize("name", [*LFS_FILES, "generation_config.json", "tokenizer.json"])
def test_git_lfs_pointer_in_place_of_a_file(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path, SOURCE)
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=f"{name}: .*git-lfs pointer.*git lfs pull"):
        resolve_model(tmp_path)


def test_git_lfs_pointer_in_place_of_a_gguf(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text(POINTER)
    for path in (tmp_path, tmp_path / "m.gguf"):
        with pytest.raises(CheckpointError, match=r"m\.gguf: .*git-lfs pointer"):
            open_checkpoint(path)


def test_index_with_a_wrong_total(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SOURCE)
    index = tmp_path / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    index.write_text(json.dumps(fields | {"metadata": {"total_size": 17}}))
    with pytest.warns(UserWarning, match=r"index\.json: total_size says 17 bytes, the files hold"):
        assert_same_model(open_checkpoint(tmp_path).source)


def test_shard_that_the_index_does_not_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SOURCE)
    (tmp_path / "model-00002-of-00007.safetensors").write_bytes(b"x")
    with pytest.warns(UserWarning, match="does not name model-00002-of-00007.safetensors"):
        assert_same_model(open_checkpoint(tmp_path).source)


def test_shards_without_an_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SOURCE, shards=3)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_same_model(open_checkpoint(tmp_path).source)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="all of the files 1 to 2 of one checkpoint, found"):
        open_checkpoint(tmp_path)


OTHER_FILES = {
    "pytorch_model-00001-of-00009.bin": "pickled",
    "model.pth": "pickled",
    "weights.npz": "MLX",
    "__0_0.distcp": "distributed checkpoint",
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_weights_in_other_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_json(TINY)))
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=f"found {name}, .*{OTHER_FILES[name]}"):
        open_checkpoint(tmp_path)


def test_blocks_without_scales_are_no_mxfp4(tmp_path: Path, tensors: Tensors) -> None:
    part = {name: tensor for name, tensor in tensors.items() if not name.endswith("_scales")}
    write_checkpoint(tmp_path, SOURCE, tensors=part)
    with pytest.raises(CheckpointError, match=r"_blocks: expected BF16, F16 or F32 \[8, 64, 192\]"):
        open_checkpoint(tmp_path)


def test_experts_that_are_not_finite(tmp_path: Path) -> None:
    def damage(tensors: Tensors) -> Tensors:
        tensors[f"{EXPERTS}down_proj"][6, 95, 63] = np.inf
        return tensors

    source = open_checkpoint(write_dense(tmp_path, SOURCE, change=damage)).source
    source.read("layers.0.down.blocks", 0, 6)
    for kind in ("blocks", "scales"):
        with pytest.raises(CheckpointError, match=r"down_proj: expected finite .* in expert 6"):
            source.read(f"layers.0.down.{kind}", 6, 7)


def damaged_gguf(folder: Path, **changes: Any) -> Path:
    """`without`, `fields`, `architecture` or `tensors` that differ."""
    tensors = gguf_tensors(SOURCE, Type.BF16) | changes.pop("tensors", {})
    for name in changes.pop("without", ()):
        del tensors[name]
    fields = gguf_fields(TINY) | changes.pop("fields", {})
    return write_gguf(folder / "m.gguf", TINY, tensors, fields=fields, **changes)


GGUF_CASES = {
    "another_architecture": (
        {"architecture": "llama"},
        "general.architecture: expected 'gpt-oss' or 'gptoss', found 'llama'",
    ),
    "a_tensor_missing": (
        {"without": ["blk.3.attn_sinks.weight"]},
        "expected tensor blk.3.attn_sinks.weight, found 78 others",
    ),
    "no_context": ({"fields": {"context_length": 0}}, "max_position_embeddings"),
    "another_rope": ({"fields": {"rope.scaling.type": "linear"}}, "rope_type: expected 'yarn'"),
    "another_shape": (
        {"tensors": {"blk.0.attn_k.bias": (np.zeros(60, np.float32), Type.F32)}},
        r"attn_k\.bias: expected BF16, F16 or F32 \[64\], found F32 \[60\]",
    ),
    "a_type_that_is_not_read": (
        {"tensors": {"output.weight": (np.zeros((512, 64), np.int8), Type.I8)}},
        r"output\.weight: expected one of .*MXFP4.*, found I8; give a GGUF",
    ),
}


@pytest.mark.parametrize("case", GGUF_CASES)
def test_gguf_of_something_else(tmp_path: Path, case: str) -> None:
    changes, message = GGUF_CASES[case]
    with pytest.raises(CheckpointError, match=rf"m\.gguf.*{message}"):
        open_checkpoint(damaged_gguf(tmp_path, **changes))


def test_gguf_split_with_a_part_missing(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", TINY, gguf_tensors(SOURCE, Type.BF16), split=30)
    first, second, *_ = sorted(tmp_path.glob("*.gguf"))
    second.rename(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match=f"found no {second.name}; download the missing"):
        open_checkpoint(first)
    second.write_bytes(first.read_bytes())
    with pytest.raises(
        CheckpointError, match=r"expected file 1 of \d of a split, found split.no 0"
    ):
        open_checkpoint(first)


def test_folder_with_several_gguf(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.gguf").touch()
    with pytest.raises(CheckpointError, match=r"expected one model, found a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("cut", [3, 20, 5000, -1])
def test_gguf_that_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = damaged_gguf(tmp_path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="cut off"):
        open_checkpoint(path)


def test_gguf_of_another_version(tmp_path: Path) -> None:
    path = damaged_gguf(tmp_path)
    data = bytearray(path.read_bytes())
    for version, message in ((b"\1\0\0\0", "found 1; convert"), (b"\0\0\0\3", "other byte order")):
        data[4:8] = version
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"version 2 or 3, .*{message}"):
            open_checkpoint(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a download finds of any repository."""
    monkeypatch.chdir(tmp_path)
    folder = write_checkpoint(tmp_path / "cache", SOURCE)
    monkeypatch.setattr(resolve, "snapshot_download", lambda *_, **__: str(folder))
    return folder


def test_offline_with_an_incomplete_cache(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (hub / "model-00001-of-00001.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE is set, and .* unset it once"):
        resolve_model("org/name")


def test_repository_with_gguf_files_only(hub: Path) -> None:
    (hub / "config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"expected a config.json .*`hf download org/name FILE`"
    ):
        resolve_model("org/name")


def test_repository_with_an_adapter(hub: Path) -> None:
    (hub / "config.json").unlink()
    (hub / "adapter_config.json").write_text('{"base_model_name_or_path": "openai/gpt-oss-20b"}')
    with pytest.raises(
        CheckpointError, match=r"^org/name: .*compile openai/gpt-oss-20b --adapter org/name$"
    ):
        resolve_model("org/name")


def test_gated_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gated(resolve.GatedRepoError):
        def __init__(self) -> None:  # the real one wants an HTTP response
            pass

    def download(*_: Any, **__: Any) -> str:
        raise Gated

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolve, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"access on request.*huggingface\.co/org/name"):
        resolve_model("org/name")
