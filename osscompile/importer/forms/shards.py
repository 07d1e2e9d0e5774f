"""Open the safetensors files of a folder: those that its index names, or all that lie in it."""

import os
import re
import warnings
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ...errors import CheckpointError
from ...options import shown
from ...runtime.safetensors import FormatError, TensorEntry, read_header
from ..config import has_file, read_json_object, refuse_pointer
from ..stored import MAX_FAULT, Stored

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_NAME = 255  # letters, as file systems have it
# OpenAI writes two hyphens.
SHARD = re.compile(r"model-?-(\d{5})-of-(\d{5})\.safetensors")
# What may lie there instead.
OTHER_FILES = {
    "*.bin": "weights that are pickled, which is code",
    "*.pt*": "weights that are pickled, which is code",
    "*.npz": "weights of MLX",
    "*.distcp": "a distributed checkpoint of a training run",
}


def read_index(directory: Path) -> dict[str, Path] | None:
    """Tensor -> its file, or None if the folder has no index, or only one that was left over beside
    a whole model. Raises CheckpointError, also where either could be meant.

    The index is not trusted: it may not lead out of the directory.
    """
    index = directory / INDEX
    if not has_file(index):
        return None
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: expected an object `weight_map`; download the file again")
    files = {name: _shard_path(index, name, file) for name, file in weight_map.items()}
    single = directory / SINGLE_FILE
    if os.path.lexists(single) and single not in files.values():
        shards = sorted(path.name for path in set(files.values()) if os.path.lexists(path))
        if not shards:
            return None
        raise _two_models(directory, [INDEX, *shards])
    return files


def _two_models(directory: Path, others: list[str]) -> CheckpointError:
    named = ", ".join(map(shown, others[:4])) + (", .." if len(others) > 4 else "")
    return CheckpointError(
        f"{directory}: expected one checkpoint, found {SINGLE_FILE} and {named}, which may be of "
        f"another; remove {SINGLE_FILE}, or all of the others, whichever is left over"
    )


def open_shards(directory: Path, needed: set[str] | None = None) -> dict[str, Stored]:
    """Every tensor of the folder's files; of files that hold no `needed` tensor, none.

    Raises CheckpointError for a file that is absent or damaged.
    """
    files = read_index(directory)
    if files is None:
        paths = sorted(p for p in directory.glob("model*.safetensors") if SHARD.fullmatch(p.name))
        single = directory / SINGLE_FILE
        if paths and os.path.lexists(single):
            raise _two_models(directory, [path.name for path in paths])
        _check_complete(paths)
        paths = paths or [single]
        headers = {path: _read_header(path) for path in paths}
        return {n: _stored(p, n, e) for p, h in headers.items() for n, e in h.items()}
    wanted = {n: path for n, path in files.items() if needed is None or n in needed}
    headers = {path: _read_header(path) for path in dict.fromkeys(wanted.values())}
    for name, path in wanted.items():
        if name not in headers[path]:
            raise CheckpointError(
                f"{path}: expected tensor {shown(name)}, as {INDEX} says, found "
                f"{len(headers[path])} others; "
                "the index or the file is of another checkpoint: download both again"
            )
    _check_total(directory / INDEX, headers, set(files.values()))
    _check_extra(directory, set(files.values()))
    return {name: _stored(path, name, headers[path][name]) for name, path in wanted.items()}


def _stored(path: Path, name: str, entry: TensorEntry) -> Stored:
    return Stored(path, name, entry.dtype, entry.shape, entry.offset)


def _shard_path(index: Path, name: str, file: Any) -> Path:
    if (
        not isinstance(file, str)
        or not PurePosixPath(file).name
        or "\0" in file
        or len(file) > MAX_NAME
        or PureWindowsPath(file).anchor  # a drive, or a leading slash of either kind
        or ".." in PureWindowsPath(file).parts
    ):
        raise CheckpointError(
            f"{index}: tensor {shown(name)}: expected a file name inside {index.parent}, "
            f"found {file!r:.200}"
        )
    return index.parent / file


def _read_header(path: Path) -> dict[str, TensorEntry]:
    if not os.path.isfile(path):  # of pathlib, a name too long is an error
        _refuse_other_files(path.parent)
        named_by = "expected it, or an index" if path.name == SINGLE_FILE else f"{INDEX} names it"
        raise CheckpointError(
            f"{shown(path, MAX_FAULT)}: no such file, but {named_by}; download the missing file"
        )
    refuse_pointer(path)
    try:
        return read_header(path)
    except FormatError as error:
        raise CheckpointError(f"{shown(str(error), MAX_FAULT)}; download the file again") from error


def _refuse_other_files(directory: Path) -> None:
    """Tell what lies in the folder instead of safetensors files."""
    if any(directory.glob("*.safetensors")):
        return
    gguf = next(directory.glob("*.gguf"), None)
    if gguf is not None:
        raise CheckpointError(
            f"{directory}: expected safetensors files beside config.json, found "
            f"{shown(gguf.name)}; give the GGUF file itself: "
            f"{shown(gguf, MAX_FAULT)}"
        )
    for pattern, kind in OTHER_FILES.items():
        found = next(directory.glob(pattern), None)
        if found is not None:
            raise CheckpointError(
                f"{directory}: expected safetensors files, found {shown(found.name)}, {kind}; "
                "load it with transformers and save it again with `save_pretrained()`"
            )


def _check_complete(paths: list[Path]) -> None:
    """Without an index the names tell how many files there are: counted from 0 or from 1."""
    numbers = {}
    for path in paths:
        match = SHARD.fullmatch(path.name)
        assert match is not None
        numbers[int(match[1])] = int(match[2])
    totals = set(numbers.values())
    if not numbers:
        return
    last = max(totals)
    if len(totals) > 1 or not set(range(1, last + 1)) <= numbers.keys() <= set(range(last + 1)):
        raise CheckpointError(
            f"{paths[0].parent}: expected {INDEX}, or all of the files 1 to {last} of one "
            f"checkpoint, found {', '.join(path.name for path in paths[:8])}; download what is "
            "missing"
        )


def _check_total(
    index: Path, headers: dict[Path, dict[str, TensorEntry]], files: set[Path]
) -> None:
    """Warn if the index gives another size, unless files were left out."""
    metadata = read_json_object(index).get("metadata")
    claimed = metadata.get("total_size") if isinstance(metadata, dict) else None
    found = sum(entry.num_bytes for header in headers.values() for entry in header.values())
    if headers.keys() == files and isinstance(claimed, int) and claimed != found:
        warnings.warn(
            f"{index}: total_size says {claimed} bytes, the files hold {found}: it is wrong, or of "
            "another checkpoint",
            stacklevel=2,
        )


def _check_extra(directory: Path, files: set[Path]) -> None:
    extra = [p.name for p in directory.glob("model-*.safetensors") if p not in files]
    if extra:
        warnings.warn(
            f"{directory}: {INDEX} does not name {', '.join(map(shown, sorted(extra)[:8]))}, which "
            "is not read: left over from another checkpoint?",
            stacklevel=2,
        )
