"""Read GGUF files that nobody vouches for: metadata and where the tensors lie, no weights.

The container (ggml's docs/gguf.md, versions 2 and 3): magic, version, counts, key-value pairs,
tensor table, and the data from the next multiple of `general.alignment` on. Nothing is taken before
the file is known to have it, so that no count in it can ask for more memory than the file has.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from ...errors import CheckpointError
from ...options import shown
from ..config import refuse_pointer
from ..encodings import ENCODINGS
from ..stored import Stored

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # unless the metadata names another
MAX_DIMENSIONS = 4
MAX_VALUES = 1 << 22  # of one list; each takes more memory here than there
MAX_NAME = (1 << 16) - 1  # bytes of a key, as the format says, or of a tensor's name
MAX_TEXT = 1 << 26  # bytes of another string; the longest that people write is a tokenizer.json
MAX_ARRAYS_IN_ARRAYS = 4

# Value types of the metadata: numpy's of scalars, by number; 8 is a string, 9 an array.
SCALARS = {
    number: np.dtype(name)
    for number, name in enumerate("u1 i1 <u2 <i2 <u4 <i4 <f4 ? - - <u8 <i8 <f8".split())
    if name != "-"
}
STRING, ARRAY = 8, 9

# Tensor types by number; 4 was removed from ggml, and taken by Ollama for its first MXFP4 files.
TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    4: "MXFP4 in pairs",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    20: "IQ4_NL",
    23: "IQ4_XS",
    30: "BF16",
    39: "MXFP4",
}
# Those that are not read, for messages.
OTHER_TYPES = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    40: "NVFP4",
    41: "Q1_0",
}


@dataclass(frozen=True)
class GgufFile:
    """Metadata: numbers and strings as Python has them, lists of numbers as numpy arrays, lists of
    strings as lists. Tensors: shapes with the innermost axis last."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]

    def scalar(self, key: str) -> Any:
        """A number or string of the metadata, or None. Raises CheckpointError for a list."""
        value = self.metadata.get(key)
        if isinstance(value, list | np.ndarray):
            raise CheckpointError(
                f"{self.path}: {key}: expected one value, found a list of {len(value)}; "
                "convert the model again with a current llama.cpp"
            )
        return value


def is_gguf(path: Path) -> bool:
    """Whether the file begins as a GGUF does, whatever its name."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_gguf(path: Path) -> GgufFile:
    """Read and check all but the data. Raises CheckpointError naming file and fault.

    After it every tensor of a type that is read is known to lie inside the file.
    """
    refuse_pointer(path)
    try:
        with path.open("rb") as file:
            return _read(_Reader(path, file))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


class _Reader:
    """Takes bytes from the front of a file, never more than it has."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self.size = file.seek(0, 2)
        file.seek(0)
        self.position = 0

    def fail(self, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {problem}; download the file again")

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.position:
            self.fail(
                f"expected {count} bytes of {what} at byte {self.position}, found "
                f"{self.size - self.position}: the file is cut off or damaged"
            )
        self.position += count
        return self._file.read(count)

    def number(self, code: str, what: str) -> int:
        (value,) = struct.unpack(f"<{code}", self.take(struct.calcsize(code), what))
        return int(value)

    def string(self, what: str, limit: int = MAX_TEXT) -> str:
        count = self.number("Q", what)
        if count > limit:
            self.fail(f"{what}: expected at most {limit} bytes, found {count}")
        return self.take(count, what).decode("utf-8", "surrogateescape")


def _read(reader: _Reader) -> GgufFile:
    if reader.take(4, "magic") != MAGIC:
        reader.fail("expected a GGUF file, which begins with `GGUF`, found something else")
    version = reader.number("I", "version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        why = " of a machine of the other byte order" if swapped else ""
        raise CheckpointError(
            f"{reader.path}: expected GGUF version 2 or 3, found {version}{why}; "
            "convert the model again with a current llama.cpp"
        )
    num_tensors = reader.number("Q", "tensor count")
    num_pairs = reader.number("Q", "metadata count")
    metadata: dict[str, Any] = {}
    for _ in range(num_pairs):
        key = reader.string("a metadata key", MAX_NAME)
        label = shown(key)
        if key in metadata:
            reader.fail(f"the metadata have {label} twice")
        metadata[key] = _read_value(reader, reader.number("I", f"the type of {label}"), label)
    entries = [_read_entry(reader) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        reader.fail(f"general.alignment: expected a size, found {alignment!r:.200}")
    start = -(-reader.position // alignment) * alignment
    tensors: dict[str, Stored] = {}
    for name, type_number, shape, offset in entries:
        if name in tensors:
            reader.fail(f"tensor {shown(name)} is there twice")
        tensors[name] = _place(reader, name, type_number, shape, start + offset)
    return GgufFile(reader.path, metadata, tensors)


def _read_value(reader: _Reader, kind: int, key: str, depth: int = 0) -> Any:
    if kind == STRING:
        return reader.string(key)
    if kind == ARRAY:
        return _read_array(reader, key, depth)
    if kind not in SCALARS:
        reader.fail(f"{key}: unknown value type {kind}")
    dtype = SCALARS[kind]
    value = np.frombuffer(reader.take(dtype.itemsize, key), dtype)[0]
    # A float32 becomes the number that was meant: 1e-5, not 9.999999747378752e-06.
    return float(str(value)) if dtype == np.float32 else value.item()


def _read_array(reader: _Reader, key: str, depth: int) -> Any:
    kind = reader.number("I", f"the type of {key}")
    count = reader.number("Q", f"the length of {key}")
    if count > MAX_VALUES:
        reader.fail(f"{key}: expected at most {MAX_VALUES} values, found {count}")
    if kind in SCALARS:
        dtype = SCALARS[kind]
        return np.frombuffer(reader.take(count * dtype.itemsize, key), dtype)
    if kind == STRING:
        return [reader.string(key) for _ in range(count)]
    if kind != ARRAY or depth == MAX_ARRAYS_IN_ARRAYS:
        reader.fail(f"{key}: unknown value type {kind} in an array")
    return [_read_array(reader, key, depth + 1) for _ in range(count)]


def _read_entry(reader: _Reader) -> tuple[str, int, tuple[int, ...], int]:
    """Name, type, shape with the innermost axis last, and offset into the data."""
    name = reader.string("a tensor's name", MAX_NAME)
    label = shown(name)
    dimensions = reader.number("I", f"the shape of {label}")
    if dimensions > MAX_DIMENSIONS:
        reader.fail(f"tensor {label}: expected at most {MAX_DIMENSIONS} dimensions, {dimensions=}")
    sizes = [reader.number("Q", f"the shape of {label}") for _ in range(dimensions)]
    type_number = reader.number("I", f"the type of {label}")
    return name, type_number, tuple(reversed(sizes)), reader.number("Q", f"the offset of {label}")


def _place(
    reader: _Reader, name: str, type_number: int, shape: tuple[int, ...], offset: int
) -> Stored:
    if type_number not in TYPES:
        kind = OTHER_TYPES.get(type_number, f"ggml type {type_number}")
        return Stored(reader.path, name, kind, shape, offset)
    encoding = ENCODINGS[TYPES[type_number]]
    if not shape or shape[-1] % encoding.numbers:
        reader.fail(
            f"tensor {shown(name)}: expected rows of a multiple of {encoding.numbers} numbers, "
            f"as {TYPES[type_number]} has, found {list(shape)}"
        )
    end = offset + math.prod(shape) // encoding.numbers * encoding.num_bytes
    if end > reader.size:
        reader.fail(
            f"tensor {shown(name)} ends at byte {end}, the file at {reader.size}: it is cut off"
        )
    return Stored(reader.path, name, TYPES[type_number], shape, offset)
