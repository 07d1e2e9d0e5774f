"""The safetensors reader on good files, and on every way a file can be bad."""

from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_container

from osscompile.runtime.errors import OsscompileError
from osscompile.runtime.safetensors import FormatError, TensorEntry, map_tensors, read_header


def entry(dtype: object, shape: object, begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.safetensors"


def test_tensors_and_offsets(path: Path) -> None:
    values = np.arange(6, dtype="<f4")
    header = {
        "__metadata__": {"format": "pt"},
        "b": entry("F32", [2, 3], 4, 28),
        "a": entry("BF16", [2], 0, 4),
    }
    write_container(path, header, b"\x80\x3f\x00\xc0" + values.tobytes())
    start = path.stat().st_size - 28
    assert read_header(path) == {
        "b": TensorEntry("F32", (2, 3), start + 4, 24),
        "a": TensorEntry("BF16", (2,), start, 4),
    }
    tensors = map_tensors(path)
    np.testing.assert_array_equal(tensors["b"], values.reshape(2, 3))
    assert tensors["a"].dtype == np.uint16
    assert tensors["a"].tolist() == [0x3F80, 0xC000]


def test_mapping_is_copy_on_write(path: Path) -> None:
    write_container(path, {"a": entry("U8", [3], 0, 3)}, b"abc")
    tensor = map_tensors(path)["a"]
    assert not tensor.flags.owndata  # a view of the file
    tensor[0] = 0
    assert path.read_bytes().endswith(b"abc")


def test_scalar_and_empty_tensors(path: Path) -> None:
    header = {"none": entry("F32", [0, 4], 0, 0), "one": entry("I32", [], 0, 4)}
    write_container(path, header, (7).to_bytes(4, "little"))
    tensors = map_tensors(path)
    assert tensors["none"].shape == (0, 4)
    assert tensors["one"] == 7


def test_file_without_tensors(path: Path) -> None:
    write_container(path, {})
    assert map_tensors(path) == {}


BAD_ENTRIES = {
    "unknown_dtype": (entry("F5", [2], 0, 4), "unknown dtype 'F5'"),
    "dtype_not_a_string": (entry(["F32"], [1], 0, 4), "unknown dtype"),
    "negative_size": (entry("U8", [-4], 0, 4), "list of sizes"),
    "fractional_size": (entry("U8", [4.0], 0, 4), "list of sizes"),
    "boolean_size": (entry("U8", [True, 4], 0, 4), "list of sizes"),
    "shape_not_a_list": (entry("U8", 4, 0, 4), "list of sizes"),
    "too_many_dimensions": (entry("U8", [1] * 70 + [4], 0, 4), "list of sizes"),
    "astronomic_shape": (entry("U8", [10**30, 10**30], 0, 4), "takes 1000"),
    "astronomic_shape_of_nothing": (entry("U8", [0, 1 << 40, 1 << 40], 0, 0), "smaller extents"),
    "negative_offset": (entry("U8", [4], -4, 0), "data_offsets"),
    "end_before_begin": (entry("U8", [4], 4, 0), "takes 4 bytes"),
    "offsets_do_not_match_shape": (entry("F32", [2], 0, 4), "takes 8 bytes"),
    "offsets_missing": ({"dtype": "U8", "shape": [4]}, "data_offsets"),
    "outside_the_file": (entry("U8", [5], 0, 5), "the file is cut off"),
    "entry_not_an_object": (4, "expected an object"),
    "data_left_over": (entry("U8", [3], 0, 3), "unknown data follows"),
    "hole_at_the_start": (entry("U8", [3], 1, 4), "leaves a hole"),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_bad_entry(path: Path, case: str) -> None:
    fields, message = BAD_ENTRIES[case]
    write_container(path, {"a": fields}, b"1234")
    with pytest.raises(FormatError, match=message) as caught:
        map_tensors(path)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, OsscompileError)


def test_overlapping_entries(path: Path) -> None:
    header = {"a": entry("U8", [3], 0, 3), "b": entry("U8", [3], 2, 5)}
    write_container(path, header, b"12345")
    with pytest.raises(FormatError, match=r"tensor b .* overlaps"):
        read_header(path)


BAD_FILES = {
    "empty": (b"", "at least 8 bytes, found 0"),
    "shorter_than_its_length_field": (b"1234567", "at least 8 bytes, found 7"),
    "header_longer_than_the_file": ((100).to_bytes(8, "little") + b"{}", "claims 100 bytes"),
    "header_length_near_2_to_64": (b"\xff" * 8 + b"{}", "claims 18446744073709551615 bytes"),
    "not_utf8": ((4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc", "not UTF-8 JSON"),
    "not_json": ((4).to_bytes(8, "little") + b"{'a'", "not UTF-8 JSON"),
    "not_an_object": ((2).to_bytes(8, "little") + b"[]", "found list"),
    "deeply_nested": ((200_000).to_bytes(8, "little") + b"[" * 200_000, "not UTF-8 JSON"),
    "same_name_twice": ((16).to_bytes(8, "little") + b'{"a": 1, "a": 1}', "twice"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(path: Path, case: str) -> None:
    data, message = BAD_FILES[case]
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_truncated_file(path: Path) -> None:
    write_container(path, {"a": entry("U8", [4], 0, 4)}, b"1234")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"tensor a ends .* cut off"):
        read_header(path)


def test_no_such_file(path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        read_header(path)


def test_directory_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        read_header(tmp_path)
