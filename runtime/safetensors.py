"""Read safetensors files that nobody vouches for: check the header, then map the tensors.

The container: u64 little-endian header size, JSON header, data. Every tensor is a byte range of the
data; the ranges cover it without holes or overlaps, as the format demands.
"""

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeGuard

import numpy as np

from .errors import OsscompileError

# safetensors name -> numpy type. Numpy knows no bfloat16 and no float8: their bits are presented.
NUMPY_DTYPES = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
MAX_DIMENSIONS = 16  # numpy stops at 64; no real tensor comes near
MAX_SHAPE = 1 << 48  # product of the extents that are not 0, which numpy limits too


class FormatError(OsscompileError):
    """A file is not a whole, consistent safetensors file."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies. `offset` counts bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def read_header(path: str | Path, stream: BinaryIO | None = None) -> dict[str, TensorEntry]:
    """Read and check the header; the tensors come in the order of the header. `stream`: the file,
    if it is open already.

    Raises FormatError, naming the file, for anything that is not a whole and consistent
    safetensors file. After it every entry is known to lie inside the file.
    """
    path = Path(path)
    data_start, data_bytes, header = _read_json(path, stream)
    header.pop("__metadata__", None)
    entries = {
        name: _parse_entry(path, name, fields, data_start) for name, fields in header.items()
    }
    _check_ranges(path, entries, data_start, data_bytes)
    return entries


def map_tensors(path: str | Path, stream: BinaryIO | None = None) -> dict[str, np.ndarray]:
    """Map a file once and return a zero-copy view per tensor; BF16 comes as uint16 bits. `stream`:
    as for `read_header`.

    The mapping is copy-on-write: read-only arrays cannot be exported through DLPack, and a write
    must never reach the file. Raises FormatError like `read_header`.
    """
    entries = read_header(path, stream)
    mapped = np.memmap(stream or path, dtype=np.uint8, mode="c")
    return {
        name: np.ndarray(entry.shape, NUMPY_DTYPES[entry.dtype], mapped, entry.offset)
        for name, entry in entries.items()
    }


def _read_json(path: Path, stream: BinaryIO | None) -> tuple[int, int, dict[str, Any]]:
    """Return the offset of the data, its size in bytes, and the header as JSON gives it."""
    try:
        with path.open("rb") if stream is None else contextlib.nullcontext(stream) as file:
            file_bytes = file.seek(0, 2)
            if file_bytes < 8:
                _fail(path, f"expected at least 8 bytes, found {file_bytes}: the file is cut off")
            file.seek(0)
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > min(file_bytes - 8, MAX_HEADER_BYTES):
                _fail(
                    path,
                    f"the header claims {header_bytes} bytes, the file has {file_bytes}: "
                    "it is cut off or not a safetensors file",
                )
            text = file.read(header_bytes)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, JSON nested too deeply
        raise FormatError(f"{path}: the header is not UTF-8 JSON: {error}") from error
    if not isinstance(header, dict):
        _fail(path, f"expected a JSON object as header, found {type(header).__name__}")
    return 8 + header_bytes, file_bytes - 8 - header_bytes, header


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name appears twice")
    return fields


def _parse_entry(path: Path, name: str, fields: Any, data_start: int) -> TensorEntry:
    if not isinstance(fields, dict):
        _fail(path, f"tensor {name}: expected an object, found {type(fields).__name__}")
    dtype: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in NUMPY_DTYPES:
        _fail(path, f"tensor {name}: unknown dtype {dtype!r}; known: {', '.join(NUMPY_DTYPES)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        _fail(path, f"tensor {name}: expected a list of sizes as shape, found {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        _fail(path, f"tensor {name}: expected [begin, end] as data_offsets, found {offsets!r}")
    begin, end = offsets
    num_bytes = math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
    if end - begin != num_bytes:
        _fail(
            path,
            f"tensor {name}: {dtype} of shape {shape} takes {num_bytes} bytes, "
            f"but data_offsets {offsets} hold {end - begin}",
        )
    if math.prod(size or 1 for size in shape) > MAX_SHAPE:
        _fail(path, f"tensor {name}: expected smaller extents beside 0, found {shape}")
    return TensorEntry(dtype, tuple(shape), data_start + begin, num_bytes)


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_ranges(
    path: Path, entries: dict[str, TensorEntry], data_start: int, data_bytes: int
) -> None:
    file_end = data_start + data_bytes
    end = data_start
    for name, entry in sorted(
        entries.items(), key=lambda item: (item[1].offset, item[1].num_bytes)
    ):
        if entry.offset + entry.num_bytes > file_end:
            _fail(
                path,
                f"tensor {name} ends at byte {entry.offset + entry.num_bytes}, the file at "
                f"{file_end}: the file is cut off",
            )
        if entry.offset != end:
            found = "overlaps the one before" if entry.offset < end else "leaves a hole before it"
            _fail(path, f"tensor {name} starts at byte {entry.offset}, expected {end}: it {found}")
        end += entry.num_bytes
    if end != file_end:
        _fail(path, f"the tensors end at byte {end}, the file at {file_end}: unknown data follows")


def _fail(path: Path, problem: str) -> NoReturn:
    raise FormatError(f"{path}: {problem}")
