"""One model in every form: the same canonical tensors, to the bit where the form allows it."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import config_json, hf_tensors, write_checkpoint
from forms import (
    Tensors,
    Type,
    by_expert,
    cast,
    dense_experts,
    dequantised,
    gguf_fields,
    gguf_tensors,
    mislabelled,
    plain_config,
    write_dense,
    write_gguf,
    write_original,
)

from osscompile.errors import CheckpointError
from osscompile.importer.checkpoint import Source, canonical_shapes
from osscompile.importer.forms import open_checkpoint
from osscompile.importer.synthetic import TINY, SyntheticSource

SOURCE = SyntheticSource(TINY)


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
