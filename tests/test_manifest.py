"""Manifests with right hashes whose fields are not what they must be, or do not fit each other."""

from __future__ import annotations

import functools
import json
import operator
from pathlib import Path
from typing import Any

import pytest
from fuzz import MANIFEST_TEXT, small_manifest

from osscompile.runtime.errors import ArtifactError
from osscompile.runtime.manifest import CHAT_TEMPLATE, WEIGHTS, parse_manifest

FILE = Path("some.osc") / "manifest.json"
NO_HASH = {"num_bytes": 1, "sha256": "0" * 63}

# What is changed, to what, and words of the message.
WRONG: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "huge_number": (("vocab_size",), 1 << 63, "vocab_size of the manifest to be a whole number"),
    "negative_number": (("window",), -1, "window of the manifest to be a whole number"),
    "fraction": (("chunk",), 16.0, "chunk of the manifest to be a whole number"),
    "true_for_a_number": (("chunk",), True, "chunk of the manifest to be a whole number"),
    "number_for_true": (("sliding", 0), 1, "an item of sliding of the manifest to be true or"),
    "no_positions": (("context",), 0, "a positive context"),
    "no_tokens": (("chunk",), 0, "a positive chunk"),
    "text_that_moves_the_cursor": (("model",), "a\x1b[2J", "a text that can be printed"),
    "unpaired_surrogate": (("target",), "\ud800", "a text that can be printed"),
    "number_for_a_text": (("profile",), 7, "profile of the manifest to be a text"),
    "text_for_a_list": (("eos_token_ids",), "12", "eos_token_ids of the manifest to be a list"),
    "list_for_an_object": (
        ("workspace_bytes",),
        [],
        "workspace_bytes of the manifest to be an obj",
    ),
    "unknown_field": (("weights", 0, "colour"), "red", "found also 'colour'"),
    "stop_id_beyond_the_vocabulary": (("eos_token_ids", 1), 512, "eos_token_ids below 512"),
    "scores_of_more_than_a_chunk": (("score_chunk",), 17, "a score_chunk up to 16"),
    "function_without_workspace": (
        ("workspace_bytes",),
        {"decode": 1},
        "workspace_bytes of prefill",
    ),
    "hash_that_is_none": (("files", WEIGHTS), NO_HASH, "a sha256 of weights"),
    "file_in_a_folder": (
        ("files", "a/b"),
        {"num_bytes": 1, "sha256": "0" * 64},
        "without a folder",
    ),
    "folder_above": (("files", ".."), {"num_bytes": 1, "sha256": "0" * 64}, "without a folder"),
    "device_that_is_none": (("device",), "abacus", "as device, found 'abacus'"),
    "dtype_that_is_none": (("weights", 0, "dtype"), "float33", "rope of one of"),
    "dtype_of_no_kernel": (("weights", 0, "dtype"), "complex64", "rope of one of"),
    "no_extents": (("weights", 2, "shape"), [], "positive extents of"),
    "extent_0": (("weights", 2, "shape"), [0], "positive extents of"),
    "seventeen_extents": (("weights", 2, "shape"), [1] * 17, "positive extents of"),
    "product_of_extents": (("weights", 2, "shape"), [1 << 20] * 16, "to be smaller"),
    "weights_beyond_their_file": (("weights", 2, "shape"), [1 << 30], "which their file has"),
    "decode_of_more_than_all": (("decode_bytes",), 1 << 40, "decode_bytes"),
    "temperature_above_all": (
        ("sampling", "temperature"),
        101.0,
        "temperature: expected between 0",
    ),
    "temperature_below_0": (
        ("sampling", "temperature"),
        -1.0,
        "temperature of sampling of the man",
    ),
    "temperature_that_is_no_number": (("sampling", "temperature"), None, "to be a number from 0"),
    "temperature_that_is_true": (("sampling", "temperature"), True, "to be a number from 0"),
    "temperature_that_is_nan": (("sampling", "temperature"), float("nan"), "to be a number from 0"),
    "probability_0": (
        ("sampling", "top_p"),
        0.0,
        "top_p: expected above 0 and at most 1, found 0.0",
    ),
    "half_a_count": (("sampling", "top_k"), 0.5, "top_k of sampling of the manifest to be a whole"),
    "min_p_above_1": (("sampling", "min_p"), 1.5, "min_p: expected between 0 and 1"),
    "sampling_by_another_name": (("sampling", "seed"), 1, "found also 'seed'"),
    "no_sampling": (("sampling",), None, "sampling of the manifest to be an object with temp"),
    "huge_template": (("files", CHAT_TEMPLATE, "num_bytes"), 1 << 20, "of at most 262144 bytes"),
    "name_twice": (("weights", 3, "name"), "rope", "of different names"),
    "gathered_that_is_no_weight": (("gathered", 0), "ropes", "a weight named 'ropes'"),
    "fewer_rows_of_rope": (("weights", 0, "shape", 0), 63, "64 rows of rope"),
    "fewer_rows_of_embed": (("weights", 1, "shape", 0), 511, "512 rows of embed"),
    "larger_vocabulary": (("vocab_size",), 513, "513 rows of embed"),
    "layer_without_caches": (("sliding",), [True, False, True], "6 caches, found 4"),
    "no_layers": (("sliding",), [], "0 caches"),
    "longer_context": (("context",), 80, "80 rows of rope"),
    "values_of_other_heads": (("caches", 1, "shape", 0), 3, "layers.0.values of shape (2, 64, 32)"),
    "pages_of_other_sizes": (("caches", 2, "shape", 1), 2, "layers.1.values of shape (2, 32, 32)"),
    "values_without_extents": (("caches", 1, "shape"), [64], "layers.0.values of shape"),
    "values_of_another_dtype": (("caches", 1, "dtype"), "float16", "layers.0.values of float32"),
    "keys_without_tiles": (("caches", 0, "shape"), [2, 32, 32], "4 extents of layers.0.keys"),
}


@pytest.mark.parametrize("case", WRONG)
def test_manifest_that_does_not_fit_itself(case: str) -> None:
    path, value, words = WRONG[case]
    fields = json.loads(MANIFEST_TEXT)
    functools.reduce(operator.getitem, path[:-1], fields)[path[-1]] = value
    with pytest.raises(ArtifactError) as caught:
        parse_manifest(fields, FILE)
    assert words in str(caught.value) and str(FILE) in str(caught.value), str(caught.value)
    assert len(str(caught.value)) < 1000


def test_whole_manifest_is_read_as_it_was_written() -> None:
    assert parse_manifest(json.loads(MANIFEST_TEXT), FILE) == small_manifest("tvm")
