"""LoRA adapters merged into every form, against a merge written from PEFT's layout."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import config_json, write_checkpoint, write_safetensors
from forms import Type, by_expert, dequantised, gguf_tensors, write_dense, write_gguf
from test_forms import numbers

from osscompile.compiler import open_model
from osscompile.errors import CheckpointError, CompileError
from osscompile.importer import resolve
from osscompile.importer.checkpoint import Source
from osscompile.importer.mxfp4 import quantise
from osscompile.importer.resolve import resolve_model
from osscompile.importer.synthetic import TINY, SyntheticSource

pytestmark = pytest.mark.filterwarnings("ignore:.*tokenizer. expected model")

SOURCE = SyntheticSource(TINY)
RNG = np.random.default_rng(3)
LAYER = "base_model.model.model.layers.1."
RANK = 3


def normal(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) * 0.1).astype(np.float32)


def pair(module: str, out: int, inputs: int, rank: int = RANK) -> dict[str, np.ndarray]:
    return {
        f"{module}.lora_A.weight": normal(rank, inputs),
        f"{module}.lora_B.weight": normal(out, rank),
    }


def write_adapter(folder: Path, tensors: dict[str, np.ndarray], **fields: Any) -> Path:
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "openai/gpt-oss-20b",
        "r": RANK,
        "lora_alpha": 6,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    return folder


def product(tensors: dict[str, np.ndarray], module: str) -> np.ndarray:
    return tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "model", SOURCE)


def merged(base: Path, *adapters: Path) -> Source:
    return resolve_model(base, adapters).source


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, 6 / 3),
        ({"use_rslora": True}, 6 / math.sqrt(3)),
        ({"alpha_pattern": {"k_proj": 12}, "r": 8, "rank_pattern": {"k_proj": 3}}, 12 / 3),
        ({"r": None}, 6 / 3),
        ({"alpha_pattern": {"layers.2.self_attn.k_proj": 12}}, 6 / 3),
    ],
)
def test_attention(tmp_path: Path, base: Path, fields: dict[str, Any], scale: float) -> None:
    module = f"{LAYER}self_attn.k_proj"
    tensors = pair(module, TINY.kv_size, 64)
    source = merged(base, write_adapter(tmp_path / "a", tensors, **fields))
    expected = numbers(SOURCE, "layers.1.qkv.weight")
    keys = slice(TINY.q_size, TINY.q_size + TINY.kv_size)
    expected[keys] += scale * product(tensors, module)
    found = source.read("layers.1.qkv.weight", 0, TINY.qkv_size)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    part = source.read("layers.1.qkv.weight", TINY.q_size + 5, TINY.q_size + 9)
    np.testing.assert_array_equal(part, found[TINY.q_size + 5 : TINY.q_size + 9])
    np.testing.assert_array_equal(
        source.read("layers.0.qkv.weight", 0, 640), SOURCE.read("layers.0.qkv.weight", 0, 640)
    )


@pytest.mark.parametrize(
    ("module", "name", "out", "inputs"),
    [
        (f"{LAYER}self_attn.o_proj", "layers.1.out.weight", 64, TINY.q_size),
        (f"{LAYER}mlp.router", "layers.1.router.weight", 8, 64),
        ("base_model.model.lm_head", "lm_head.weight", 512, 64),
    ],
)
def test_other_matrices(
    tmp_path: Path, base: Path, module: str, name: str, out: int, inputs: int
) -> None:
    tensors = pair(module, out, inputs)
    source = merged(base, write_adapter(tmp_path / "a", tensors))
    expected = numbers(SOURCE, name) + 2 * product(tensors, module)
    np.testing.assert_allclose(numbers(source, name), expected, atol=1e-6)


def test_two_adapters_one_after_the_other(tmp_path: Path, base: Path) -> None:
    """The second is DoRA: the first changes what it stretches."""
    module = f"{LAYER}self_attn.o_proj"
    first, second = (pair(module, 64, TINY.q_size) for _ in range(2))
    magnitude = np.abs(normal(64)) + 1
    adapters = [
        write_adapter(tmp_path / "a", first),
        write_adapter(
            tmp_path / "b", second | {f"{module}.lora_magnitude_vector": magnitude}, use_dora=True
        ),
    ]
    weights = numbers(SOURCE, "layers.1.out.weight") + 2 * (
        product(first, module) + product(second, module)
    )
    expected = magnitude[:, None] * weights / np.linalg.norm(weights, axis=1, keepdims=True)
    found = numbers(merged(base, *adapters), "layers.1.out.weight")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    other = numbers(merged(base, *adapters[::-1]), "layers.1.out.weight")
    assert np.abs(other - expected).max() > 0.01


def write_gguf_base(folder: Path) -> Path:
    return write_gguf(folder / "m.gguf", TINY, gguf_tensors(SOURCE, Type.BF16))


BASES: dict[str, Callable[[Path], Path]] = {
    "mxfp4": lambda folder: write_checkpoint(folder / "m", SOURCE),
    "bf16": lambda folder: write_dense(folder / "m", SOURCE),
    "by_expert": lambda folder: write_dense(folder / "m", SOURCE, change=by_expert),
    "gguf": write_gguf_base,
}
SIZES = {"gate_up": (192, 64), "down": (64, 96)}


def expert_pair(module: str, part: str) -> dict[str, np.ndarray]:
    out, inputs = SIZES[part]
    return {
        f"{module}.lora_A.weight": normal(8 * RANK, inputs),
        f"{module}.lora_B.weight": normal(out, 8 * RANK),
    }


def expert_deltas(tensors: dict[str, np.ndarray], module: str) -> np.ndarray:
    """[experts, rows, inputs] of 2 B A: expert by expert in A, expert fastest in B."""
    a, b = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
    each = [(b[:, e::8], a[e * RANK : (e + 1) * RANK]) for e in range(8)]
    return np.stack([2 * b_of @ a_of for b_of, a_of in each])


def assert_experts(source: Source, part: str, deltas: np.ndarray) -> None:
    name = f"layers.1.{part}.blocks"
    weights = numbers(SOURCE, name)
    if part == "gate_up":
        deltas = deltas.reshape(8, -1, 2, 64).swapaxes(1, 2)
    rows = np.ascontiguousarray(weights + deltas).reshape(-1, weights.shape[-1])
    made = quantise(rows)
    np.testing.assert_allclose(
        numbers(source, name).reshape(rows.shape), dequantised(made.blocks, made.scales), atol=1e-6
    )
    changed = source.requantised()[f"layers.1.{part}"]
    assert changed == pytest.approx(math.sqrt(made.changed / made.total), rel=1e-4)


@pytest.mark.parametrize("form", BASES)
def test_both_matrices_of_all_experts(tmp_path: Path, form: str) -> None:
    """PEFT calls the inner one of the two base_layer, whichever parameters they are."""
    inner, outer = f"{LAYER}mlp.experts.base_layer", f"{LAYER}mlp.experts"
    tensors = expert_pair(inner, "gate_up") | expert_pair(outer, "down")
    source = merged(BASES[form](tmp_path), write_adapter(tmp_path / "a", tensors))
    assert_experts(source, "gate_up", expert_deltas(tensors, inner))
    assert_experts(source, "down", expert_deltas(tensors, outer))
    assert set(source.requantised()) == {"layers.1.gate_up", "layers.1.down"}


@pytest.mark.parametrize("part", SIZES)
def test_one_matrix_of_all_experts(tmp_path: Path, base: Path, part: str) -> None:
    """Then the name is the same for either."""
    module = f"{LAYER}mlp.experts"
    tensors = expert_pair(module, part)
    assert_experts(
        merged(base, write_adapter(tmp_path / "a", tensors)), part, expert_deltas(tensors, module)
    )


@pytest.mark.parametrize("form", ["mxfp4", "gguf"])
@pytest.mark.parametrize("part", SIZES)
def test_experts_that_are_modules(tmp_path: Path, form: str, part: str) -> None:
    module = f"{LAYER}mlp.experts.{part}_projs.5"
    tensors = pair(module, *SIZES[part])
    deltas = np.zeros((8, *SIZES[part]), np.float32)
    deltas[5] = 2 * product(tensors, module)
    source = merged(BASES[form](tmp_path), write_adapter(tmp_path / "a", tensors))
    assert_experts(source, part, deltas)


def test_whole_modules(tmp_path: Path, base: Path) -> None:
    tensors = {
        "base_model.model.lm_head.weight": normal(512, 64),
        f"{LAYER}mlp.router.bias": normal(8),
    }
    source = merged(base, write_adapter(tmp_path / "a", tensors, modules_to_save=["lm_head"]))
    np.testing.assert_array_equal(
        numbers(source, "lm_head.weight"), tensors["base_model.model.lm_head.weight"]
    )
    np.testing.assert_array_equal(
        numbers(source, "layers.1.router.bias"), tensors[f"{LAYER}mlp.router.bias"]
    )


def test_whole_module_replaces_what_adapters_before_it_changed(tmp_path: Path, base: Path) -> None:
    """What comes after it is added, and so is what the same adapter has besides."""
    module, name = "base_model.model.lm_head", "base_model.model.lm_head.weight"
    lora, head = pair(module, 512, 64), normal(512, 64)
    added = write_adapter(tmp_path / "a", lora)
    replaced = write_adapter(tmp_path / "b", {name: head})
    both = write_adapter(tmp_path / "c", lora | {name: head})
    delta = 2 * product(lora, module)
    for adapters, expected in (
        ((added, replaced), head),
        ((replaced, added), head + delta),
        ((added, both), head + delta),
    ):
        found = numbers(merged(base, *adapters), "lm_head.weight")
        np.testing.assert_allclose(found, expected, atol=1e-6)


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("form", ["huggingface", "gguf"])
@pytest.mark.parametrize("saved", [(EMBEDDING,), (HEAD,), (HEAD, EMBEDDING)], ids=len)
def test_whole_modules_that_were_tied_part(
    tmp_path: Path, saved: tuple[str, ...], form: str
) -> None:
    base = write_tied(tmp_path, form)
    tensors = {f"base_model.model.{name}": normal(512, 64) for name in saved}
    before = resolve_model(base).source
    source = merged(base, write_adapter(tmp_path / "a", tensors))
    for name, ours in ((EMBEDDING, "embed.weight"), (HEAD, "lm_head.weight")):
        expected = tensors.get(f"base_model.model.{name}", numbers(before, ours))
        np.testing.assert_array_equal(numbers(source, ours), expected)


@pytest.mark.parametrize("saved", [EMBEDDING, HEAD])
def test_whole_module_that_stays_tied(tmp_path: Path, saved: str) -> None:
    tensors = {f"base_model.model.{saved}": normal(512, 64)}
    fields = {"ensure_weight_tying": True, "modules_to_save": ["embed_tokens", "lm_head"]}
    adapter = write_adapter(tmp_path / "a", tensors, **fields)
    source = merged(write_tied(tmp_path, "huggingface"), adapter)
    for name in ("embed.weight", "lm_head.weight"):
        np.testing.assert_array_equal(numbers(source, name), *tensors.values())


def write_tied(folder: Path, form: str) -> Path:
    if form == "gguf":
        tensors = gguf_tensors(SOURCE, Type.BF16)
        del tensors["output.weight"]
        return write_gguf(folder / "m.gguf", TINY, tensors)
    config = config_json(TINY) | {"tie_word_embeddings": True}
    return write_checkpoint(folder / "m", SOURCE, config=config)


REFUSED_FIELDS = {
    "another_method": ({"peft_type": "IA3"}, "peft_type: expected 'LORA', found 'IA3'"),
    "method_of_many_letters": ({"peft_type": "x" * 9000}, "peft_type: .{,400}$"),
    "rslora_is_text": ({"use_rslora": "true"}, "use_rslora: expected False, found 'true'"),
    "rslora_is_a_number": ({"use_rslora": 1}, "use_rslora: expected False, found 1"),
    "dora_is_text": ({"use_dora": "false"}, "use_dora: expected False, found 'false'"),
    "saved_modules_that_are_not_there": (
        {"modules_to_save": ["lm_head"]},
        "modules_to_save: expected tensors of 'lm_head' in adapter_model.*found none",
    ),
    "biases": ({"bias": "all"}, "bias: expected 'none', found 'all'"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights: expected True, found 'pissa'"),
    "new_tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    "alpha_is_text": ({"lora_alpha": "6"}, "lora_alpha"),
    "another_rank": ({"r": 8}, "r, rank_pattern: expected 3, as the tensors"),
    "rank_is_text": ({"r": "3"}, "r, rank_pattern: expected ranks"),
    "rank_is_none_of_these": ({"rank_pattern": {"k_proj": 0}}, "r, rank_pattern: expected ranks"),
    "alpha_is_nan": ({"lora_alpha": math.nan}, "lora_alpha"),
    "pattern_is_no_expression": ({"alpha_pattern": {"(": 3}}, r"alpha_pattern.*'\('"),
    "pattern_that_takes_for_ever": (
        {"alpha_pattern": {"(l*)*x": 3}},
        "alpha_pattern: expected names",
    ),
}


@pytest.mark.parametrize("case", REFUSED_FIELDS)
def test_refused_fields(tmp_path: Path, base: Path, case: str) -> None:
    fields, message = REFUSED_FIELDS[case]
    adapter = write_adapter(tmp_path / "a", pair("lm_head", 512, 64), **fields)
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: .*{message}"):
        merged(base, adapter)


REFUSED_TENSORS = {
    "embedding": {"base_model.model.model.embed_tokens.lora_embedding_A": normal(3, 512)},
    "unknown_module": pair(f"{LAYER}mlp.gate_proj", 96, 64),
    "layer_beyond": pair("base_model.model.model.layers.9.self_attn.o_proj", 64, 512),
    "expert_beyond": pair(f"{LAYER}mlp.experts.down_projs.8", 64, 96),
    "half_a_pair": {f"{LAYER}self_attn.o_proj.lora_A.weight": normal(3, 512)},
    "another_size": pair(f"{LAYER}self_attn.o_proj", 64, 500),
    "experts_of_another_size": pair(f"{LAYER}mlp.experts", 64, 64, rank=24),
    "fewer_ranks_than_experts": pair(f"{LAYER}mlp.experts", 64, 96, rank=3),
    "another_vocabulary": {"base_model.model.lm_head.weight": normal(513, 64)},
    "no_numbers": {"base_model.model.lm_head.weight": np.zeros((512, 64), np.uint8)},
}


@pytest.mark.parametrize("case", REFUSED_TENSORS)
def test_refused_tensors(tmp_path: Path, base: Path, case: str) -> None:
    adapter = write_adapter(tmp_path / "a", REFUSED_TENSORS[case])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: tensor .*expected"):
        merged(base, adapter)


def test_dora_without_magnitudes(tmp_path: Path, base: Path) -> None:
    """They are needed for every module: without them it is another adapter."""
    module, other = f"{LAYER}self_attn.o_proj", f"{LAYER}self_attn.k_proj"
    tensors = pair(module, 64, TINY.q_size) | pair(other, TINY.kv_size, 64)
    tensors[f"{module}.lora_magnitude_vector"] = normal(64)
    with pytest.raises(
        CheckpointError, match=r"k_proj.*its lora_magnitude_vector too, as use_dora"
    ):
        merged(base, write_adapter(tmp_path / "a", tensors, use_dora=True))


def test_the_same_tensor_under_two_names(tmp_path: Path, base: Path) -> None:
    for number, tensors in enumerate(
        (pair("lm_head", 512, 64), {"lm_head.weight": normal(512, 64)})
    ):
        twice = tensors | {f"base_model.model.{name}": t for name, t in tensors.items()}
        with pytest.raises(CheckpointError, match=r"expected it once, but lm_head\..* is the same"):
            merged(base, write_adapter(tmp_path / f"{number}", twice))


def test_adapter_without_tensors(tmp_path: Path, base: Path) -> None:
    with pytest.raises(CheckpointError, match="expected the tensors of an adapter, found none"):
        merged(base, write_adapter(tmp_path / "a", {}))


RENAMED = {
    "language_model": lambda name: name.replace("model.layers", "model.language_model.layers"),
    "inner_router": lambda name: name.replace(".mlp.router", ".mlp.router.linear"),
    "saved": lambda name: name.replace("router.weight", "router.modules_to_save.weight"),
    "named": lambda name: name.replace("router.weight", "router.modules_to_save.default.weight"),
}


@pytest.mark.parametrize("case", RENAMED)
def test_other_names_of_the_same(tmp_path: Path, base: Path, case: str) -> None:
    module = f"{LAYER}self_attn.o_proj"
    router = normal(8, 64)
    tensors = pair(module, 64, TINY.q_size) | {f"{LAYER}mlp.router.weight": router}
    renamed = {RENAMED[case](name): tensor for name, tensor in tensors.items()}
    source = merged(base, write_adapter(tmp_path / "a", renamed))
    np.testing.assert_array_equal(numbers(source, "layers.1.router.weight"), router)
    expected = numbers(SOURCE, "layers.1.out.weight") + 2 * product(tensors, module)
    np.testing.assert_allclose(numbers(source, "layers.1.out.weight"), expected, atol=1e-6)


@pytest.mark.parametrize("wrong", [5, True, [5], [None], b"x", [b"x"], [True]], ids=repr)
def test_what_is_no_adapter(base: Path, wrong: Any) -> None:
    with pytest.raises(CompileError, match=r"^adapters: expected folders of .*, found "):
        open_model(base, wrong)


def test_no_adapters(base: Path) -> None:
    for none in (None, (), iter([])):
        open_model(base, none)


def test_adapter_as_the_model(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", pair("lm_head", 512, 64))
    with pytest.raises(
        CheckpointError,
        match=r"found an adapter for openai/gpt-oss-20b.* compile openai.* --adapter .*/a$",
    ):
        resolve_model(adapter)


@pytest.mark.parametrize("base", ["my base\nx", "x" * 9000, "a; b"])
def test_odd_base_of_an_adapter(tmp_path: Path, base: str) -> None:
    adapter = write_adapter(tmp_path / "a b", {}, base_model_name_or_path=base)
    with pytest.raises(CheckpointError, match=r"compile (BASE|x+|'a; b') --adapter '.*/a b'$"):
        resolve_model(adapter)


def test_adapter_without_weights(tmp_path: Path, base: Path) -> None:
    adapter = write_adapter(tmp_path / "a", {})
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: no such file"):
        merged(base, adapter)


def test_adapter_by_its_id(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = write_adapter(tmp_path / "a", pair("base_model.model.lm_head", 512, 64))
    asked: list[Any] = []

    def download(repo_id: str, **patterns: Any) -> str:
        asked.append((repo_id, patterns["allow_patterns"]))
        return str(adapter)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolve, "snapshot_download", download)
    resolve_model(base, ["org/adapter"])
    assert asked == [("org/adapter", ["adapter_config.json", "adapter_model.safetensors"])]


def test_adapter_for_random_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="synthetic:tiny: expected a checkpoint to merge"):
        resolve_model("synthetic:tiny", [tmp_path])
