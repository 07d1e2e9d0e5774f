"""The artifact: a directory with a manifest, compiled libraries, weights and a tokenizer.

This file defines the format (`osscompile/write.py` writes it) and checks everything that can be
checked before a library, which is code, is loaded.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ArtifactError, InputError
from .machine import Machine
from .safetensors import FormatError, TensorEntry, map_tensors, read_header

FORMAT_VERSION = 4
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.json"
PROGRAMS_SUFFIX = ".launches"  # in place of a library's: what launches its kernels
ANY = "any"  # system and architecture of an artifact whose code the device's driver compiles
# A library that TVM's runtime loads; or kernels and the programs that launch them: as OpenCL C, or
# as machine code that CUDA's driver loads.
RUNTIMES = ("tvm", "opencl", "cuda")
CPU = "cpu"
DEVICES = (CPU, "metal")  # of TVM's runtime
ALIGNMENT = 64  # bytes; kernels read aligned vectors, and an unaligned one is a crash
PADDING = "__padding__"  # prefix of the tensors that align the others: the format forbids holes

# Smaller files are hashed at every load; larger ones once a copy, because it takes seconds.
ALWAYS_HASHED_BYTES = 64 << 20


@dataclass(frozen=True)
class Tensor:
    """Name, shape and numpy dtype of a weight or cache."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class File:
    """Size and hash of one file of the artifact."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Variant:
    """A library for machines whose CPU has certain features."""

    name: str
    cpu_features: tuple[str, ...]  # names as in /proc/cpuinfo
    library: str  # file name

    @property
    def programs(self) -> str:
        """File name of what launches the kernels, if the library does not."""
        return self.library.rpartition(".")[0] + PROGRAMS_SUFFIX

    def missing_features(self) -> list[str]:
        """What this machine's CPU lacks to run it."""
        return [f for f in self.cpu_features if f not in Machine.here().cpu_features]


@dataclass(frozen=True)
class Manifest:
    """What an artifact is, for which machine, and what its functions take."""

    model: str
    compiler: str  # version of osscompile
    profile: str
    target: str
    runtime: str  # what its libraries are: one of RUNTIMES
    device: str  # of TVM's runtime, which the functions run on: one of DEVICES
    system: str  # platform.system() and platform.machine() where it runs, or ANY
    architecture: str
    variants: tuple[Variant, ...]  # best first; all read the same weights
    vocab_size: int
    context: int  # positions
    window: int  # of the sliding layers, in positions
    sliding: tuple[bool, ...]  # of each layer
    chunk: int  # tokens of one prefill, at most
    score_chunk: int  # tokens of one scoring, at most
    workspace_bytes: dict[str, int]  # of each function's activations
    caches: tuple[Tensor, ...]  # keys and values of each layer: arguments before the weights
    weights: tuple[Tensor, ...]
    decode_bytes: int  # of weights that one decode step reads
    gathered: tuple[str, ...]  # weights of which a run reads the rows of its tokens only
    eos_token_ids: tuple[int, ...]
    files: dict[str, File]

    @property
    def on_cpu(self) -> bool:
        """Whether its functions run on the CPU, and read weights where the file is mapped."""
        return self.runtime == "tvm" and self.device == CPU

    def fits(self, here: Machine) -> bool:
        """Whether it was made for this system and architecture."""
        return self.system in (ANY, here.system) and self.architecture in (ANY, here.architecture)

    def variant_here(self) -> Variant | None:
        """The best variant that this machine can run."""
        if not self.fits(Machine.here()):
            return None
        return next((v for v in self.variants if not v.missing_features()), None)

    def to_json(self) -> str:
        """Text of manifest.json; its last field is a hash of all others."""
        fields = {"format_version": FORMAT_VERSION, **asdict(self)}
        fields["manifest_sha256"] = _hash_fields(fields)
        return json.dumps(fields, indent=1) + "\n"


@dataclass(frozen=True)
class Artifact:
    """A checked artifact. `weights` are mapped, in the order in which functions take them."""

    path: Path
    manifest: Manifest
    variant: Variant  # whose library is to be loaded
    weights: tuple[np.ndarray, ...]

    @property
    def library(self) -> Path:
        return self.path / self.variant.library

    @property
    def programs(self) -> Path:
        return self.path / self.variant.programs

    @property
    def tokenizer(self) -> Path | None:
        return self.path / TOKENIZER if TOKENIZER in self.manifest.files else None


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
        _check_files(path, manifest, verify, progress)
        return Artifact(path, manifest, chosen, _map_weights(path / WEIGHTS, manifest.weights))
    except OSError as error:
        raise ArtifactError(
            f"{path}: expected an artifact, found files that cannot be read: {error}; check their "
            "permissions, or copy the artifact again"
        ) from error


def read_manifest(path: Path) -> Manifest:
    """The manifest alone, checked for its version and integrity; any machine can read it."""
    file = path / MANIFEST
    if not file.is_file():
        raise ArtifactError(
            f"{path}: expected an artifact, found no {MANIFEST} there; "
            "compile a model with `osscompile compile MODEL --target TARGET -o OUT`"
        )
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        version = fields["format_version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(file, "a JSON object with a format_version", repr(error)) from error
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{file}: expected format version {FORMAT_VERSION}, found {version!r}; compile the "
            "model again with this version of osscompile, or run it with the version that made it"
        )
    found = fields.pop("manifest_sha256", None)
    if found != _hash_fields(fields):
        raise _damaged(file, f"contents with the hash {found}", "other contents")
    del fields["format_version"]
    try:
        return Manifest(
            **fields
            | {
                "variants": tuple(_variant(v) for v in fields["variants"]),
                "caches": tuple(_tensor(t) for t in fields["caches"]),
                "weights": tuple(_tensor(t) for t in fields["weights"]),
                "sliding": tuple(fields["sliding"]),
                "gathered": tuple(fields["gathered"]),
                "eos_token_ids": tuple(fields["eos_token_ids"]),
                "files": {name: File(**file) for name, file in fields["files"].items()},
            }
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, "the fields of an artifact's manifest", repr(error)) from error


def hash_file(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(4 << 20):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


def mark_verified(path: Path, sha256: str) -> None:
    """Remember that this copy of a large file has this hash, until the file changes."""
    stamp = _stamp(path, sha256)
    if stamp is None or path.stat().st_size <= ALWAYS_HASHED_BYTES:
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
    if manifest.runtime not in RUNTIMES:
        raise _damaged(path / MANIFEST, f"one of {RUNTIMES} as runtime", repr(manifest.runtime))
    if manifest.runtime == "tvm" and manifest.device not in DEVICES:
        raise _damaged(path / MANIFEST, f"one of {DEVICES} as device", repr(manifest.device))
    if not manifest.variants:
        raise _damaged(path / MANIFEST, "at least one variant", "none")
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


def _check_files(
    path: Path, manifest: Manifest, verify: bool, progress: Callable[[int], object] | None
) -> None:
    def check_entry(name: str) -> None:
        if name not in manifest.files:
            raise _damaged(path / MANIFEST, f"an entry for {name}", "none")

    check_entry(WEIGHTS)
    for variant in manifest.variants:
        check_entry(variant.library)
        if manifest.runtime != "tvm":
            check_entry(variant.programs)
    for name, expected in manifest.files.items():
        file = path / name
        if Path(name).name != name:
            raise _damaged(path / MANIFEST, "file names without a folder", repr(name))
        if not file.is_file():
            raise _damaged(file, f"a file of {expected.num_bytes} bytes", "none")
        found = file.stat().st_size
        if found != expected.num_bytes:
            raise _damaged(file, f"{expected.num_bytes} bytes", f"{found} bytes")
        if not verify and _was_verified(file, expected):
            continue
        sha256 = hash_file(file, progress)
        if sha256 != expected.sha256:
            raise _damaged(file, f"sha256 {expected.sha256}", sha256)
        mark_verified(file, sha256)


def _was_verified(file: Path, expected: File) -> bool:
    """Whether this copy is one that `mark_verified` remembers; a small file never is."""
    stamp = _stamp(file, expected.sha256)
    # os.path, because pathlib raises where the folder may not be read
    large = expected.num_bytes > ALWAYS_HASHED_BYTES
    return large and stamp is not None and os.path.exists(stamp)


def _map_weights(file: Path, expected: tuple[Tensor, ...]) -> tuple[np.ndarray, ...]:
    try:
        entries = read_header(file)
        _check_alignment(file, entries)
        tensors = map_tensors(file)
    except FormatError as error:
        raise ArtifactError(f"{error}; copy or compile the artifact again") from error
    for tensor in expected:
        found = tensors.get(tensor.name)
        if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
            actual = "none" if found is None else f"{found.dtype} {list(found.shape)}"
            wanted = f"{tensor.name} as {tensor.dtype} {list(tensor.shape)}"
            raise _damaged(file, wanted, actual)
    return tuple(tensors[tensor.name] for tensor in expected)


def _check_alignment(file: Path, entries: dict[str, TensorEntry]) -> None:
    for name, entry in entries.items():
        if entry.offset % ALIGNMENT and not name.startswith(PADDING):
            raise _damaged(file, f"{name} at a multiple of {ALIGNMENT}", f"offset {entry.offset}")


def _stamp(file: Path, sha256: str) -> Path | None:
    """The file whose existence says that `file`, as it is now, was found to have this hash."""
    status = file.stat()
    facts = (str(file.resolve()), status.st_ino, status.st_size, status.st_mtime_ns, sha256)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):  # a user without a home
        return None
    name = hashlib.sha256(repr(facts).encode()).hexdigest()
    return Path(cache) / "osscompile" / "verified" / name


def _tensor(fields: dict[str, Any]) -> Tensor:
    return Tensor(fields["name"], tuple(fields["shape"]), fields["dtype"])


def _variant(fields: dict[str, Any]) -> Variant:
    return Variant(fields["name"], tuple(fields["cpu_features"]), fields["library"])


def _hash_fields(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _damaged(file: Path, expected: str, found: str) -> ArtifactError:
    return ArtifactError(
        f"{file}: expected {expected}, found {found}; the artifact is damaged or incomplete: "
        "copy it again, or compile the model again"
    )
