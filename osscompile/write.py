"""Write an artifact: weights streamed through, then everything under its final name at once.

The format is defined in `runtime/manifest.py`. Until the last rename the output lies beside its
final name, in NAME.partial; the next compile to the same name removes what an interrupted one left.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import NoReturn

import numpy as np

from .errors import CompileError, PlaceError
from .locks import only_holder
from .options import shown
from .runtime.artifact import ALIGNMENT, PADDING
from .runtime.fidelity import FIDELITY, PARTIAL
from .runtime.manifest import (
    CHAT_TEMPLATE,
    MANIFEST,
    PROGRAMS_SUFFIX,
    REQUANTISED,
    TOKENIZER,
    WEIGHTS,
    Tensor,
)
from .threads import worker_threads

# What an artifact may have in it, beside libraries.
FILES = (MANIFEST, TOKENIZER, CHAT_TEMPLATE, WEIGHTS, REQUANTISED, FIDELITY, PARTIAL)
LIBRARY_SUFFIXES = (".so", ".dylib", ".cl", ".fatbin", PROGRAMS_SUFFIX)
# Threads that make weights; one more hashes and writes them and keeps up with no more than these.
# Each has up to 40 MB in hand: an expert as it is read, in another order, and packed.
NUM_MAKERS = min(8, os.cpu_count() or 1)
REPLACED = "replaced"  # in NAME.partial: the artifact that had the name before

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
    output = Path(os.path.realpath(output))  # of a link, what it points to is replaced
    check_replaceable(output)
    partial = output.with_name(output.name + ".partial")
    new_folders = [folder for folder in output.parents if not folder.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with only_holder(partial.with_name(partial.name + ".lock"), lambda: _refuse(partial)):
            _clear(partial, output)
            try:
                # Named anew each time: a thread of an interrupted compile may still write to its
                # own, and so may the linker of a killed one.
                staged = partial / secrets.token_hex(8)
                staged.mkdir(parents=True)
                _check_free_space(output.parent, needed_bytes)
                yield staged
                _replace(staged, output)
            finally:
                _clear(partial, output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(output.parent, needed_bytes) from error
        raise _not_writable(output, error) from error
    finally:
        for folder in new_folders:
            with contextlib.suppress(OSError):  # it stays if there is something in it
                folder.rmdir()


def write_weights(
    path: Path,
    tensors: tuple[Tensor, ...],
    pieces_of: Callable[[Tensor], Iterable[Callable[[], np.ndarray]]],
    progress: Callable[[int], object],
) -> str:
    """Write tensors one after the other, each at a multiple of 64 bytes -> the file's sha256.

    `pieces_of` gives the functions that make a tensor's memory, piece by piece in order; they are
    called on several threads. `progress` is told the bytes written.
    """
    header, padding = _header(tensors)
    digest = hashlib.sha256()
    with path.open("wb") as stream, worker_threads(NUM_MAKERS) as pool:
        pieces = _make_in_order(pool, (make for t in tensors for make in pieces_of(t)))

        def write(block: bytes | memoryview) -> None:
            stream.write(block)
            digest.update(block)

        write(header)
        for tensor in tensors:
            missing = tensor.num_bytes
            while missing > 0:
                piece = next(pieces)
                write(piece.reshape(-1).view(np.uint8).data)
                missing -= piece.nbytes
                progress(piece.nbytes)
            assert missing == 0, (tensor, missing)
            write(bytes(padding[tensor.name]))
    return digest.hexdigest()


def weights_file_bytes(tensors: tuple[Tensor, ...]) -> int:
    header, padding = _header(tensors)
    return len(header) + sum(t.num_bytes for t in tensors) + sum(padding.values())


def check_replaceable(output: Path) -> None:
    """Raise CompileError unless the name is free, or held by an empty folder or an artifact.

    What is replaced is deleted, so the folder must hold nothing but what we may have written; an
    artifact that is damaged can be replaced.
    """
    try:
        if not output.exists():
            return
        found = "a file"
        if output.is_dir():
            names = sorted(path.name for path in output.iterdir())
            strange = [name for name in names if not _is_ours(output / name)]
            if not names or (MANIFEST in names and not strange):
                return
            found = f"a folder with {(strange or names)[0]}"
    except OSError as error:  # a name too long, a folder that may not be read
        raise _not_writable(output, error) from error
    raise CompileError(
        f"{output}: expected a new name or an artifact to replace, found {found}; choose another -o"
    )


def _is_ours(path: Path) -> bool:
    """Whether a compile, or a measurement of what it made, may have written a file of this name."""
    ours = path.name in FILES or path.suffix in LIBRARY_SUFFIXES
    return ours and not path.is_dir()


def _make_in_order(
    pool: Executor, makers: Iterable[Callable[[], np.ndarray]]
) -> Iterator[np.ndarray]:
    """What the functions return, in their order. Few are called ahead, to bound the memory."""
    ahead: deque[Future[np.ndarray]] = deque()
    for make in makers:
        if len(ahead) > 2 * NUM_MAKERS:
            yield ahead.popleft().result()
        ahead.append(pool.submit(make))
    while ahead:
        yield ahead.popleft().result()


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


def _refuse(partial: Path) -> NoReturn:
    raise CompileError(
        f"{partial}: expected no other writer, found another compile that is writing there; wait "
        "for it, or choose another -o"
    )


def _check_free_space(folder: Path, needed_bytes: int) -> None:
    if shutil.disk_usage(folder).free < needed_bytes:
        raise _disk_full(folder, needed_bytes)


def _not_writable(output: Path, error: OSError) -> PlaceError:
    return PlaceError(f"{shown(output)}: cannot be written: {shown(error)}", "choose another -o")


def _disk_full(folder: Path, needed_bytes: int) -> PlaceError:
    free = shutil.disk_usage(folder).free
    return PlaceError(
        f"{folder}: the artifact needs {needed_bytes / 1e9:.2f} GB of disk, found "
        f"{free / 1e9:.2f} GB free",
        "make room, or choose another -o",
    )


def _replace(staged: Path, output: Path) -> None:
    for file in sorted(staged.iterdir()):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    if output.exists():
        output.rename(staged.with_name(REPLACED))
    staged.rename(output)


def _clear(partial: Path, output: Path) -> None:
    """Remove what a compile leaves, interrupted or not; one that was interrupted between the two
    renames of `_replace` gives the name back to what had it before."""
    replaced = partial / REPLACED
    if replaced.exists() and not output.exists():
        replaced.rename(output)
    shutil.rmtree(partial, ignore_errors=True)
