"""One model in every form: the same canonical tensors, to the bit where the form allows it."""

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from forms import (
    Tensors,
    Type,
    by_expert,
    dequantised,
    gguf_fields,
    gguf_tensors,
    gguf_tokenizer,
    mislabelled,
    old_ollama_tensors,
    ollama_fields,
    ollama_tensors,
    relabel_mxfp4,
    write_dense,
    write_gguf,
    write_original,
)
from o200k import RANKS, write_o200k
from tokenizers import Tokenizer as Backend

from osscompile.errors import CheckpointError
from osscompile.importer.checkpoint import Source, canonical_shapes
from osscompile.importer.encodings import ENCODINGS
from osscompile.importer.forms import open_checkpoint
from osscompile.importer.graph import weight_parameters
from osscompile.importer.resolve import NANO_CHECKPOINT
from osscompile.importer.synthetic import TINY, SyntheticSource
from osscompile.importer.weights import weight_pieces

SOURCE = SyntheticSource(TINY)
CORPUS = [
    Path(__file__).read_text(),
    "Straße, naïve café, ÀÉÎ, don't we'll they'RE 12345678901 3.14e-10",
    "東京都の天気は晴れです。 한국어 텍스트 हिन्दी देवनागरी עברית العربية ไทย",
    "👩‍👩‍👧 🇩🇪 a\u0301\u0327 \u200b\ufeff \u0085 \r\n\r\n \t\t  x   \n  y",
    "<|start|>assistant<|channel|>final<|message|>a<|end|>b<|return|>",
    "".join(map(chr, range(0x20, 0x2000, 7))),
]


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings(action="error"):
        yield


def assert_same_model(found: Source, expected: Source = SOURCE) -> None:
    """Every canonical tensor has the same numbers, of experts the dequantised ones (where codes are
    small, another scale can hold them too), -0 apart from 0."""
    assert found.config == expected.config
    for name, (shape, _) in canonical_shapes(expected.config).items():
        if not name.endswith(".scales"):
            ours, theirs = (numbers(source, name) for source in (found, expected))
            assert found.shape(name) == shape and ours.flags.c_contiguous, name
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
            np.testing.assert_array_equal(np.signbit(ours), np.signbit(theirs), err_msg=name)


def numbers(source: Source, name: str) -> np.ndarray:
    stop = source.shape(name)[0]
    array = source.read(name, 0, stop)
    if name.endswith(".blocks"):
        return dequantised(array, source.read(name.replace(".blocks", ".scales"), 0, stop))
    return array.astype(np.float32)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("change", [dict, mislabelled, by_expert])
def test_dense_checkpoint_gives_back_the_mxfp4_it_was_made_from(
    tmp_path: Path, dtype: type, change: Callable[[Tensors], Tensors]
) -> None:
    source = open_checkpoint(write_dense(tmp_path, SOURCE, dtype, change)).source
    if dtype == np.float16:  # has fewer exponents: what it lost is lost before us
        lost = numbers(source, "layers.0.qkv.weight") - numbers(SOURCE, "layers.0.qkv.weight")
        assert np.abs(lost).max() < 2**-24
        assert_same_experts(source)
    else:
        assert_same_model(source)
    assert source.requantised() == {}


def assert_same_experts(source: Source) -> None:
    for part in ("gate_up", "down"):
        name = f"layers.1.{part}.blocks"
        np.testing.assert_array_equal(numbers(source, name), numbers(SOURCE, name))


def test_original_folder(tmp_path: Path) -> None:
    write_original(tmp_path / "original", SOURCE)
    (tmp_path / "tokenizer.json").write_text("{}")
    opened = open_checkpoint(tmp_path / "original")
    assert_same_model(opened.source)
    assert opened.tokenizer == tmp_path / "tokenizer.json"


@pytest.mark.parametrize("dense", [Type.BF16, Type.F32])
def test_gguf_of_llama_cpp(tmp_path: Path, dense: Type) -> None:
    path = write_gguf(tmp_path / "m.gguf", TINY, gguf_tensors(SOURCE, dense))
    with pytest.warns(UserWarning, match="tokenizer: expected model 'gpt2'"):
        opened = open_checkpoint(path)
    assert_same_model(opened.source)
    assert opened.tokenizer is None


@pytest.mark.parametrize("key", ["attention.head_count_kv", "feed_forward_length"])
def test_gguf_with_a_value_for_each_layer(tmp_path: Path, key: str) -> None:
    fields = gguf_fields(TINY)
    fields.pop("expert_feed_forward_length")
    tensors = gguf_tensors(SOURCE, Type.BF16)
    each = fields | {key: [fields[key]] * TINY.num_layers}
    assert_same_model(open_gguf(write_gguf(tmp_path / "a.gguf", TINY, tensors, fields=each)))
    each[key][-1] += 1
    with pytest.raises(CheckpointError, match=f"{key}: expected one value, found a list of 4"):
        open_gguf(write_gguf(tmp_path / "b.gguf", TINY, tensors, fields=each))


def test_gguf_with_metadata_that_change_nothing(tmp_path: Path) -> None:
    fields = gguf_fields(TINY) | {
        "rope.scaling.attn_factor": 1.0,
        "rope.scaling.yarn_ext_factor": 1.0,
        "rope.dimension_count": TINY.head_dim,
        "expert_weights_scale": 1.0,
        "expert_shared_count": 0,
    }
    tensors = gguf_tensors(SOURCE, Type.BF16)
    assert_same_model(open_gguf(write_gguf(tmp_path / "m.gguf", TINY, tensors, fields=fields)))


def open_gguf(path: Path) -> Source:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*: tokenizer: expected")
        return open_checkpoint(path).source


def test_gguf_in_parts(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", TINY, gguf_tensors(SOURCE, Type.BF16), split=30)
    files = sorted(tmp_path.glob("m-0000?-of-0000?.gguf"))
    assert len(files) > 2
    assert_same_model(open_gguf(files[0]))
    assert_same_model(open_gguf(files[2]))
    assert_same_model(open_gguf(tmp_path))


def test_gguf_of_ollama(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    tensors = ollama_tensors(SOURCE, Type.BF16)
    write_gguf(path, TINY, tensors, architecture="gptoss", fields=ollama_fields(TINY))
    assert_same_model(open_gguf(path))


def test_gguf_of_the_first_ollama(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    tensors = old_ollama_tensors(SOURCE, Type.BF16)
    write_gguf(path, TINY, tensors, architecture="gptoss", fields=ollama_fields(TINY))
    relabel_mxfp4(path)
    assert_same_model(open_gguf(path))


def test_gguf_without_an_output_layer_has_it_tied_to_the_embedding(tmp_path: Path) -> None:
    tensors = gguf_tensors(SOURCE, Type.BF16)
    del tensors["output.weight"]
    source = open_gguf(write_gguf(tmp_path / "m.gguf", TINY, tensors))
    np.testing.assert_array_equal(
        numbers(source, "lm_head.weight"), numbers(SOURCE, "embed.weight")
    )


def test_q8_0_goes_to_int8_without_a_second_rounding(tmp_path: Path) -> None:
    tensors = gguf_tensors(SOURCE, Type.Q8_0)
    path = write_gguf(tmp_path / "m.gguf", TINY, tensors)
    source = open_gguf(path)
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for rows, name in ((slice(0, 512), "q"), (slice(512, 576), "k"), (slice(576, 640), "v")):
        theirs = gguf.dequantize(stored[f"blk.2.attn_{name}.weight"].data, Type.Q8_0)
        np.testing.assert_array_equal(source.read("layers.2.qkv.weight", 0, 640)[rows], theirs)
        int8 = source.read_int8("layers.2.qkv.weight", rows.start, rows.stop)
        assert int8 is not None
        np.testing.assert_array_equal(
            (int8[0] * int8[1][..., None].astype("f4")).reshape(theirs.shape), theirs
        )
    parameters = weight_parameters(TINY, "fast", 64)
    made = {
        p.name: np.concatenate([make() for make in weight_pieces(p, source, None)])
        for p in parameters
        if p.name.startswith("lm_head")
    }
    values = made["lm_head.words"].view(np.int8) * made["lm_head.scales"][..., None].astype("f4")
    theirs = gguf.dequantize(stored["output.weight"].data, Type.Q8_0)
    np.testing.assert_array_equal(values.reshape(theirs.shape), theirs)


def test_q8_0_with_the_number_that_kernels_do_not_take(tmp_path: Path) -> None:
    tensors = gguf_tensors(SOURCE, Type.Q8_0)
    rows, kind = tensors["output.weight"]
    rows = rows.copy()
    rows[3, 2:34] = 0x80
    source = open_gguf(
        write_gguf(tmp_path / "m.gguf", TINY, tensors | {"output.weight": (rows, kind)})
    )
    int8 = source.read_int8("lm_head.weight", 2, 5)
    assert int8 is not None and int8[0].min() == -127 and (int8[0][1, 0] == -127).all()


ALL_TYPES = sorted(set(ENCODINGS) - {"U8", "MXFP4 in pairs"})


@pytest.mark.parametrize("kind", ALL_TYPES)
def test_every_ggml_type_is_decoded_as_ggml_does(kind: str) -> None:
    """Random bytes, with scales that are finite."""
    rng = np.random.default_rng(5)
    encoding = ENCODINGS[kind]
    blocks = rng.integers(0, 256, (64, encoding.num_bytes), np.uint8)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}
    halves |= dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2))
    for at in halves.get(kind, (0,) if encoding.numbers > 1 and kind != "MXFP4" else ()):
        blocks[:, at : at + 2] = rng.standard_normal((64, 1)).astype(np.float16).view(np.uint8)
    if encoding.numbers == 1:
        blocks = (
            rng.standard_normal(64)
            .astype(np.float32)
            .view(np.uint8)
            .reshape(-1, encoding.num_bytes)
        )
        blocks = blocks[2:3] if kind == "F16" else blocks
    expected = gguf.dequantize(blocks, Type[kind]).astype(np.float32)
    found = encoding.decode(blocks).astype(np.float32)
    np.testing.assert_array_equal(found.reshape(-1), expected.reshape(-1))


def test_k_quants_are_told_and_their_experts_quantised_again(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, hidden_size=256, num_layers=1, sliding=(True,))
    source = SyntheticSource(config)
    tensors = gguf_tensors(source, Type.BF16)
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (8, 96, 210), np.uint8)
    blocks[..., 208:] = np.array([1e-3], np.float16).view(np.uint8)
    tensors["blk.0.ffn_gate_exps.weight"] = (blocks, Type.Q6_K)
    path = write_gguf(tmp_path / "m.gguf", config, tensors)
    with (
        pytest.warns(UserWarning, match="tokenizer: expected"),
        pytest.warns(UserWarning, match=r"1 Q6_K tensors .* nearer to them"),
    ):
        opened = open_checkpoint(path).source
    gate, up = numbers(opened, "layers.0.gate_up.blocks").swapaxes(0, 1)
    theirs = gguf.dequantize(blocks, Type.Q6_K)
    error = np.sqrt(((gate - theirs) ** 2).mean() / (theirs**2).mean())
    np.testing.assert_array_equal(up, numbers(source, "layers.0.gate_up.blocks")[:, 1])
    reported = opened.requantised()
    assert list(reported) == ["layers.0.gate_up"]
    assert 0.05 < error < 0.15
    assert reported["layers.0.gate_up"] == pytest.approx(error, rel=1e-4)


def tokens_of(tokenizer: Backend, texts: Sequence[str]) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def test_tokenizer_out_of_the_metadata(tmp_path: Path) -> None:
    """nano's vocabulary, which cuts text elsewhere: compared where that makes no difference."""
    nano = NANO_CHECKPOINT / "tokenizer.json"
    fields = gguf_tokenizer(nano, TINY.vocab_size * 3)
    path = write_gguf(tmp_path / "m.gguf", TINY, gguf_tensors(SOURCE, Type.BF16), tokenizer=fields)
    opened = open_checkpoint(path)
    assert isinstance(opened.tokenizer, bytes)
    assert opened.generation == {"eos_token_id": [7, 9]}
    ours, theirs = Backend.from_str(opened.tokenizer.decode()), Backend.from_file(str(nano))
    assert ours.get_vocab() == theirs.get_vocab()
    texts = ["what is the colour of the sky", "a<|end|>b", "<|start|>user<|message|>hello"]
    assert tokens_of(ours, texts) == tokens_of(theirs, texts)


@pytest.mark.skipif(RANKS not in os.environ, reason=f"{RANKS} names no folder with the vocabulary")
def test_tokenizer_of_the_published_vocabulary(tmp_path: Path) -> None:
    """Made of a GGUF's lists it cuts as tiktoken's expression, which harmony's tests hold."""
    official = tmp_path / "tokenizer.json"
    write_o200k(official)
    fields = gguf_tokenizer(official, 201088)
    path = write_gguf(tmp_path / "m.gguf", TINY, gguf_tensors(SOURCE, Type.BF16), tokenizer=fields)
    opened = open_checkpoint(path)
    assert isinstance(opened.tokenizer, bytes)
    ours, theirs = Backend.from_str(opened.tokenizer.decode()), Backend.from_file(str(official))
    assert ours.get_vocab() == theirs.get_vocab()
    assert tokens_of(ours, CORPUS) == tokens_of(theirs, CORPUS)


@pytest.mark.parametrize(
    ("key", "value"), [("pre", "llama-bpe"), ("model", "llama")], ids=["pre", "model"]
)
def test_tokenizer_of_another_kind(tmp_path: Path, key: str, value: str) -> None:
    fields = gguf_tokenizer(NANO_CHECKPOINT / "tokenizer.json", 1024) | {key: value}
    path = write_gguf(tmp_path / "m.gguf", TINY, gguf_tensors(SOURCE, Type.BF16), tokenizer=fields)
    with pytest.warns(UserWarning, match=f"expected model 'gpt2', pre 'gpt-4o'.*{value}"):
        assert open_checkpoint(path).tokenizer is None


@pytest.mark.parametrize(
    "changes",
    [
        {"merges": ["zzq qqz"]},
        {"merges": ["a"]},
        {"tokens": ["ab"], "token_type": [1], "merges": ["a b"]},
    ],
    ids=["unknown", "half", "of_unknown_parts"],
)
def test_tokenizer_whose_merges_make_no_token(tmp_path: Path, changes: dict[str, Any]) -> None:
    fields = gguf_tokenizer(NANO_CHECKPOINT / "tokenizer.json", 1024) | changes
    path = write_gguf(tmp_path / "m.gguf", TINY, gguf_tensors(SOURCE, Type.BF16), tokenizer=fields)
    with pytest.raises(CheckpointError, match=r"tokenizer: expected tokens (that its|and) merges"):
        open_checkpoint(path)
