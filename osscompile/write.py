"""Write an artifact: weights streamed through, then everything under its final name at once.

The format is defined in `runtime/artifact.py`. Until the last rename the output lies beside its
final name as NAME.partial; the next compile to the same name removes what an interrupted one left.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from .errors import CompileError
from .runtime.artifact import ALIGNMENT, MANIFEST, PADDING, Tensor

SAFETENSORS_NAMES = {
    "float32": "F32",
    "float16": "F16",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
}


@contextlib.contextmanager
def staged_directory(output: Path, needed_bytes: int) -> Iterator[Path]:
    """A directory that becomes `output` if the block succeeds, and vanishes if it does not.

    Raises CompileError if `output` exists and is not an artifact, another compile writes it, or
    the disk has less than `needed_bytes` free.
    """
    _check_replaceable(output)
    partial = output.with_name(output.name + ".partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with _only_writer(partial):
            _check_free_space(output.parent, needed_bytes)
            try:
                yield partial
                _replace(partial, output)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(output.parent, needed_bytes) from error
        raise CompileError(
            f"{output}: expected a place to write, found: {error.strerror}; choose another -o"
        ) from error


def write_weights(
    path: Path,
    tensors: tuple[Tensor, ...],
    chunks_of: Callable[[Tensor], Iterator[np.ndarray]],
    progress: Callable[[int], object],
) -> str:
    """Write tensors one after the other, each at a multiple of 64 bytes -> the file's sha256.

    `chunks_of` yields a tensor's memory in order; `progress` is told the bytes written.
    """
    header, padding = _header(tensors)
    digest = hashlib.sha256()
    with path.open("wb") as stream:

        def write(block: bytes | memoryview) -> None:
            stream.write(block)
            digest.update(block)

        write(header)
        for tensor in tensors:
            written = 0
            for chunk in chunks_of(tensor):
                write(memoryview(chunk).cast("B"))
                written += chunk.nbytes
                progress(chunk.nbytes)
            assert written == tensor.num_bytes, (tensor, written)
            write(bytes(padding[tensor.name]))
    return digest.hexdigest()


def weights_file_bytes(tensors: tuple[Tensor, ...]) -> int:
    header, padding = _header(tensors)
    return len(header) + sum(t.num_bytes for t in tensors) + sum(padding.values())


def _header(tensors: tuple[Tensor, ...]) -> tuple[bytes, dict[str, int]]:
    """The safetensors header, padded with spaces, and the bytes to add after each tensor."""
    entries: dict[str, object] = {}
    padding: dict[str, int] = {}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.num_bytes
        entries[tensor.name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = math.ceil(end / ALIGNMENT) * ALIGNMENT
        padding[tensor.name] = offset - end
        if offset > end:  # the format allows no holes: name them
            entries[f"{PADDING}{tensor.name}"] = {
                "dtype": "U8",
                "shape": [offset - end],
                "data_offsets": [end, offset],
            }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, padding


def _check_replaceable(output: Path) -> None:
    if output.exists() and not (output / MANIFEST).is_file():
        if output.is_dir() and not any(output.iterdir()):
            return
        raise CompileError(
            f"{output}: expected a new name or an artifact to replace, found something else; "
            "choose another -o"
        )


@contextlib.contextmanager
def _only_writer(partial: Path) -> Iterator[None]:
    """Own `partial`, empty; the lock goes with the process, whatever ends it."""
    lock_path = partial.with_name(partial.name + ".lock")
    with lock_path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CompileError(
                f"{partial}: another compile is writing there; wait for it, or choose another -o"
            ) from error
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield
        finally:
            lock_path.unlink(missing_ok=True)


def _check_free_space(folder: Path, needed_bytes: int) -> None:
    if shutil.disk_usage(folder).free < needed_bytes:
        raise _disk_full(folder, needed_bytes)


def _disk_full(folder: Path, needed_bytes: int) -> CompileError:
    free = shutil.disk_usage(folder).free
    return CompileError(
        f"{folder}: the artifact needs {needed_bytes / 1e9:.2f} GB of disk, found "
        f"{free / 1e9:.2f} GB free; make room, or choose another -o"
    )


def _replace(partial: Path, output: Path) -> None:
    for file in sorted(partial.iterdir()):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    if output.exists():
        old = output.with_name(output.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
        partial.rename(output)
        shutil.rmtree(old)
    else:
        partial.rename(output)
