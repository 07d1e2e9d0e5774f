"""The artifact: a directory with a manifest, compiled libraries, weights and a tokenizer, and the
checkpoint's chat template if it had one.

`manifest.py` and this file define the format (`osscompile/write.py` writes it). Everything that can
be checked is checked here, before a library, which is code, is loaded.
"""

import hashlib
import io
import json
import os
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np

from .errors import ArtifactError, InputError, shown
from .machine import Machine
from .manifest import (
    CHAT_TEMPLATE,
    FORMAT_VERSION,
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    File,
    Manifest,
    Tensor,
    Variant,
    damaged,
    hash_fields,
    parse_manifest,
)
from .safetensors import FormatError, TensorEntry, map_tensors, read_header
from .tokenizer import Tokenizer

ALIGNMENT = 64  # bytes; kernels read aligned vectors, and an unaligned one is a crash
PADDING = "__padding__"  # prefix of the tensors that align the others: the format forbids holes
MAX_MANIFEST_BYTES = 16 << 20  # a hundred times what that of gpt-oss-120b has
# Smaller files are hashed at every load; larger ones once a copy, because it takes seconds.
ALWAYS_HASHED_BYTES = 64 << 20


@dataclass(frozen=True)
class Artifact:
    """A checked artifact. `weights` are mapped, in the order in which functions take them;
    `contents` are those of smaller files that a load needs. Both are of the files that were
    hashed, whatever their names lead to by now."""

    path: Path
    manifest: Manifest
    variant: Variant  # whose library is to be loaded
    weights: tuple[np.ndarray, ...]
    contents: Mapping[str, bytes]

    @property
    def library(self) -> Path:
        return self.path / self.variant.library

    @property
    def programs(self) -> Path:
        return self.path / self.variant.programs

    def read_tokenizer(self) -> Tokenizer | None:
        """None without one. Raises ArtifactError."""
        content = self.contents.get(TOKENIZER)
        return None if content is None else Tokenizer(self.path / TOKENIZER, content)

    def read_chat_template(self) -> str | None:
        """The text of the checkpoint's own template, None without one. Raises ArtifactError."""
        content = self.contents.get(CHAT_TEMPLATE)
        try:
            return None if content is None else content.decode()
        except UnicodeDecodeError as error:
            raise damaged(self.path / CHAT_TEMPLATE, "a text in UTF-8", str(error)) from None


def open_artifact(
    path: str | Path,
    verify: bool = False,
    progress: Callable[[int], object] | None = None,
    variant: str | None = None,
    elsewhere: bool = False,
) -> Artifact:
    """Check an artifact and map its weights.

    `verify`: hash every file even if this copy was verified before; `progress` is told the bytes
    hashed. `variant`: default: the best for this machine. `elsewhere`: it is to run on another
    machine, of which nothing is known; then the default is the first variant. Raises ArtifactError
    if the artifact is damaged, incomplete, of another format version, or made for another machine;
    InputError if it has no variant of that name.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path)
        chosen = _choose_variant(path, manifest, variant, elsewhere)
        needed = (TOKENIZER, CHAT_TEMPLATE, chosen.programs)
        weights, contents = _read_files(path, manifest, needed, verify, progress)
        return Artifact(path, manifest, chosen, weights, contents)
    except OSError as error:
        raise _unreadable(path, error) from error


def read_manifest(path: Path) -> Manifest:
    """The manifest alone, checked for its version and integrity; any machine can read it."""
    file = path / MANIFEST
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):  # a zero byte
        raise ArtifactError(
            f"{shown(path)}: expected an artifact, found no {MANIFEST} there; "
            "compile a model with `osscompile compile MODEL --target TARGET -o OUT`"
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        if len(content) > MAX_MANIFEST_BYTES:
            raise ValueError(f"more than {MAX_MANIFEST_BYTES} bytes")
        fields = json.loads(content.decode())
        version = fields["format_version"]
        sha256 = fields.pop("manifest_sha256", None)
        actual = hash_fields(fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(file, "a JSON object with a format_version", repr(error)) from error
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{file}: expected format version {FORMAT_VERSION}, found {reprlib.repr(version)}; "
            "compile the model again with this version of osscompile, or run it with the version "
            "that made it"
        )
    if sha256 != actual:
        raise damaged(file, f"contents with the hash {reprlib.repr(sha256)}", "other contents")
    del fields["format_version"]
    return parse_manifest(fields, file)


def hash_file(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return _hash_stream(stream, None)


def mark_verified(path: Path, sha256: str) -> None:
    """Remember that this copy of a large file has this hash, until the file changes."""
    _mark(path, path.stat(), sha256)


def _unreadable(path: Path, error: OSError) -> ArtifactError:
    return ArtifactError(
        f"{shown(path)}: expected an artifact, found files that cannot be read: {shown(error)}; "
        "check their permissions and those of the folders above, or copy the artifact again"
    )


def _mark(path: Path, status: os.stat_result, sha256: str) -> None:
    stamp = _stamp(path, status, sha256)
    if stamp is None or status.st_size <= ALWAYS_HASHED_BYTES:
        return
    try:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()
    except OSError:
        return  # no place to remember it: the next load hashes again


def _choose_variant(path: Path, manifest: Manifest, name: str | None, elsewhere: bool) -> Variant:
    here = Machine.here()
    if not elsewhere and not manifest.fits(here):
        raise ArtifactError(
            f"{path}: made for {manifest.system} on {manifest.architecture}, this machine is "
            f"{here.system} on {here.architecture}; compile the model for this machine's target"
        )
    candidates = [v for v in manifest.variants if name in (None, v.name)]
    if not candidates:
        raise InputError(
            f"variant: expected one of {', '.join(v.name for v in manifest.variants)}, found "
            f"{name!r}; compile the model again for others"
        )
    for variant in candidates:
        if elsewhere or not variant.missing_features():
            return variant
    needs = "\n".join(
        f"{v.name} needs {', '.join(v.cpu_features)}; this one lacks "
        f"{', '.join(v.missing_features())}"
        for v in candidates
    )
    raise ArtifactError(
        f"{path}: expected a CPU that one of its variants fits, found another; compile the model "
        f"for more variants or another target (`osscompile targets`)\n{needs}"
    )


def _read_files(
    path: Path,
    manifest: Manifest,
    needed: Collection[str],
    verify: bool,
    progress: Callable[[int], object] | None,
) -> tuple[tuple[np.ndarray, ...], dict[str, bytes]]:
    """Check all files, map the weights, and return them with the contents of those `needed`. Each
    is opened once: another artifact may be put in the place of this one meanwhile."""
    weights: tuple[np.ndarray, ...] = ()
    contents = {}
    for name, expected in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise damaged(file, f"a file of {expected.num_bytes} bytes", "none")
        with file.open("rb") as stream:
            status = os.fstat(stream.fileno())
            if status.st_size != expected.num_bytes:
                raise damaged(file, f"{expected.num_bytes} bytes", f"{status.st_size} bytes")
            whole = io.BytesIO(stream.read()) if name in needed else stream
            if verify or not _was_verified(file, status, expected):
                sha256 = _hash_stream(whole, progress)
                if sha256 != expected.sha256:
                    raise damaged(file, f"sha256 {expected.sha256}", sha256)
                _mark(file, status, sha256)
            if name == WEIGHTS:
                weights = _map_weights(file, stream, manifest.weights)
            elif isinstance(whole, io.BytesIO):
                contents[name] = whole.getvalue()
    return weights, contents


def _hash_stream(stream: IO[bytes], progress: Callable[[int], object] | None) -> str:
    digest = hashlib.sha256()
    while block := stream.read(4 << 20):
        digest.update(block)
        if progress is not None:
            progress(len(block))
    return digest.hexdigest()


def _was_verified(file: Path, status: os.stat_result, expected: File) -> bool:
    """Whether this copy is one that `mark_verified` remembers; a small file never is."""
    stamp = _stamp(file, status, expected.sha256)
    # os.path, because pathlib raises where the folder may not be read
    large = expected.num_bytes > ALWAYS_HASHED_BYTES
    return large and stamp is not None and os.path.exists(stamp)


def _map_weights(
    file: Path, stream: BinaryIO, expected: tuple[Tensor, ...]
) -> tuple[np.ndarray, ...]:
    try:
        entries = read_header(file, stream)
        _check_alignment(file, entries)
        tensors = map_tensors(file, stream)
    except FormatError as error:
        raise ArtifactError(f"{error}; copy or compile the artifact again") from error
    for tensor in expected:
        found = tensors.get(tensor.name)
        if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
            actual = "none" if found is None else f"{found.dtype} {list(found.shape)}"
            wanted = f"{tensor.name} as {tensor.dtype} {list(tensor.shape)}"
            raise damaged(file, wanted, actual)
    return tuple(tensors[tensor.name] for tensor in expected)


def _check_alignment(file: Path, entries: dict[str, TensorEntry]) -> None:
    for name, entry in entries.items():
        if entry.offset % ALIGNMENT and not name.startswith(PADDING):
            raise damaged(file, f"{name} at a multiple of {ALIGNMENT}", f"offset {entry.offset}")


def _stamp(file: Path, status: os.stat_result, sha256: str) -> Path | None:
    """The file whose existence says that `file`, as it is now, was found to have this hash."""
    facts = (str(file.resolve()), status.st_ino, status.st_size, status.st_mtime_ns, sha256)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):  # a user without a home
        return None
    name = hashlib.sha256(repr(facts).encode()).hexdigest()
    return Path(cache) / "osscompile" / "verified" / name
