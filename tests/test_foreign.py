"""Checkpoints that are not what they should be: each is told what it is, and what to do."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import config_json, hf_tensors, write_checkpoint, write_container
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
    "nvfp4_of_experts": (f"{EXPERTS}gate_up_proj_weight_scale_2", "NVFP4"),
    "fp8": ("model.layers.0.self_attn.q_proj.weight_scale", "FP8"),
    "fp8_of_experts": (f"{EXPERTS}down_proj_input_scale", "FP8"),
    "bitsandbytes_int8": ("model.layers.0.self_attn.q_proj.SCB", "bitsandbytes"),
    "mlx": (f"{EXPERTS}gate_proj.biases", "MLX"),
    "mlx_unquantised": (f"{EXPERTS}up_proj.weight", "MLX"),
    "unmerged": ("model.layers.0.self_attn.q_proj.lora_A.default.weight", "merge_and_unload"),
    "unmerged_base": ("model.layers.0.self_attn.q_proj.base_layer.weight", "merge_and_unload"),
    "reward_head": ("v_head.summary.weight", "head of a classifier or reward model"),
    "classifier": ("score.weight", "head of a classifier or reward model"),
    "another_head": ("regression_head.weight", "head of a classifier or reward model"),
}


@pytest.mark.parametrize("case", SIGNS)
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("beside", [True, False])
def test_names_that_tell_what_it_is(
    tmp_path: Path, tensors: Tensors, case: str, shards: int, beside: bool
) -> None:
    """One tensor that we need has another name or gives way to a head, or all are there."""
    name, message = SIGNS[case]
    missing = "lm_head.weight" if "head of" in message else f"{EXPERTS}down_proj_blocks"
    renamed = {(name if n == missing else n): t for n, t in tensors.items()}
    if beside:
        renamed[missing] = tensors[missing]
    write_checkpoint(tmp_path, SOURCE, tensors=renamed, shards=shards)
    with pytest.raises(CheckpointError, match=f"found tensor {name}.*{message}"):
        open_checkpoint(tmp_path)


def test_scales_of_two_levels_are_no_fp8(tmp_path: Path, tensors: Tensors) -> None:
    scales = {
        f"{EXPERTS}down_proj_weight_scale{end}": np.zeros(8, np.float32) for end in ("", "_2")
    }
    write_checkpoint(tmp_path, SOURCE, tensors=tensors | scales)
    with pytest.raises(CheckpointError, match="weight_scale_2: this is an NVFP4 checkpoint"):
        open_checkpoint(tmp_path)


def test_head_of_a_model_with_tied_embeddings(tmp_path: Path, tensors: Tensors) -> None:
    headed = {("score.weight" if n == "lm_head.weight" else n): t for n, t in tensors.items()}
    config = config_json(TINY) | {"tie_word_embeddings": True}
    write_checkpoint(tmp_path, SOURCE, tensors=headed, config=config)
    with pytest.raises(CheckpointError, match=r"found tensor score\.weight, the head of"):
        open_checkpoint(tmp_path)


def test_types_of_fp8(tmp_path: Path, tensors: Tensors) -> None:
    write_checkpoint(tmp_path, SOURCE, tensors=tensors, shards=1)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    for fields in header.values():
        fields["dtype"] = fields["dtype"].replace("U8", "F8_E4M3")
    write_container(path, header, data[size:])
    with pytest.raises(CheckpointError, match=r"found F8_E4M3: this is an FP8 checkpoint; .*give"):
        open_checkpoint(tmp_path)


def test_quantisation_that_another_file_tells(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SOURCE)
    path = tmp_path / "hf_quant_config.json"
    path.write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: .*'NVFP4', of NVIDIA"):
        open_checkpoint(tmp_path)
    path.write_text('{"quantization": {"quant_algo": null}}')
    assert_same_model(open_checkpoint(tmp_path).source)


def test_gguf_beside_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_json(TINY)))
    (tmp_path / "m.gguf").touch()
    with pytest.raises(CheckpointError, match=r"give the GGUF file itself: .*/m\.gguf$"):
        open_checkpoint(tmp_path)


def test_adapter_beside_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_json(TINY)))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"found an adapter for org/base; .*--adapter"):
        open_checkpoint(tmp_path)


WRAPPED: dict[str, Callable[[str], str]] = {
    "peft": lambda name: f"base_model.model.{name}",
    "parallel_and_compiled": lambda name: f"module._orig_mod.{name}",
    "sharded": lambda name: name.replace(".mlp.", "._fsdp_wrapped_module.mlp."),
    "checkpointed_and_sharded": lambda name: (
        "_fsdp_wrapped_module."
        + name.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn.")
    ),
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
    "an_adapter": (
        {"general": {"general.type": "adapter"}},
        "general.type: expected 'model', found 'adapter'; give its base .*--adapter",
    ),
    "a_part_that_sees": (
        {"general": {"general.type": "mmproj"}},
        "general.type: expected 'model', found 'mmproj'; give the GGUF of the language model",
    ),
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
    "another_concentration": (
        {"fields": {"rope.scaling.attn_factor": 0.5}},
        "gpt-oss.rope.scaling.attn_factor: expected 1 or nothing, as in gpt-oss, found 0.5",
    ),
    "no_yarn": ({"fields": {"rope.scaling.yarn_ext_factor": 0.0}}, "yarn_ext_factor: expected 1"),
    "half_is_rotated": (
        {"fields": {"rope.dimension_count": 16}},
        "rope.dimension_count: expected 32 or nothing, .*found 16",
    ),
    "scaled_experts": ({"fields": {"expert_weights_scale": 2.5}}, "expert_weights_scale: .*2.5"),
    "shared_experts": ({"fields": {"expert_shared_count": 1}}, "expert_shared_count: .*found 1"),
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


def test_gguf_split_whose_place_is_a_long_text(tmp_path: Path) -> None:
    path = damaged_gguf(tmp_path, general={"split.no": "x" * 90000})
    with pytest.raises(CheckpointError, match=r"found split\.no 'x+ of 1; ") as caught:
        open_checkpoint(path)
    assert len(str(caught.value)) < 1000


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


def test_gguf_whose_key_takes_the_whole_file(tmp_path: Path) -> None:
    """It is neither read nor printed."""
    path = damaged_gguf(tmp_path)
    data = bytearray(path.read_bytes())
    data[24:32] = (len(data) - 32).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="key: expected at most 65535 bytes") as caught:
        open_checkpoint(path)
    assert len(str(caught.value)) < 500


PIECES = {  # what follows the counts, and what is told
    "key": (0, 1, b"k\n" * 30000, 10, r"expected 8 bytes of k\?k\?"),
    "type": (0, 1, b"k" * 60000, 77, "k: unknown value type 77"),
    "value": (0, 1, b"k" * 60000, 8, "expected at most 67108864 bytes, found"),
    "tensor": (1, 0, b"t" * 60000, 99, "expected at most 4 dimensions, dimensions=99"),
}


@pytest.mark.parametrize("case", PIECES)
def test_gguf_with_a_long_name_and_a_fault_after_it(tmp_path: Path, case: str) -> None:
    tensors, pairs, name, number, message = PIECES[case]
    path = tmp_path / "m.gguf"
    ending = b"" if case == "key" else b"\xff" * 8  # a number of eight bytes is missing
    path.write_bytes(
        b"GGUF\3\0\0\0"
        + struct.pack("<QQQ", tensors, pairs, len(name))
        + name
        + struct.pack("<I", number)
        + ending
    )
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("field", ["name", "dtype"])
def test_long_texts_in_a_header_of_safetensors(tmp_path: Path, field: str) -> None:
    write_checkpoint(tmp_path, SOURCE, shards=1)
    text = "x\n" * 50000
    name, dtype = (text, "BF17") if field == "name" else ("x", text)
    header = {name: {"dtype": dtype, "shape": [0], "data_offsets": [0, 0]}}
    write_container(tmp_path / "model.safetensors", header)
    with pytest.raises(CheckpointError, match=r"; download the file again$") as caught:
        open_checkpoint(tmp_path)
    assert len(str(caught.value)) < 1100 and "\n" not in str(caught.value)


def test_model_of_an_odd_name() -> None:
    with pytest.raises(CheckpointError, match=r"^a\?b/.*: no such model; expected") as caught:
        resolve_model("a\nb/" + "x" * 9000)
    assert len(str(caught.value)) < 600


def test_names_of_many_letters_are_cut_in_messages(tmp_path: Path, tensors: Tensors) -> None:
    for name in ("x\n" * 5000 + ".absmax", "x\n" * 5000 + "embed_tokens.weight"):
        renamed = {(name if n.startswith("model.embed") else n): t for n, t in tensors.items()}
        write_checkpoint(tmp_path, SOURCE, tensors=renamed)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(tmp_path)
        assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


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
