"""The manifest: what an artifact is, for which machine, and what its functions take.

The dataclasses are the format. `parse_manifest` reads each field as its type says, and checks what
must hold between fields, so that nothing that comes after has to doubt them: whatever number a
manifest names is the size of something that the weights' file holds, or small.
"""

import hashlib
import json
import math
import re
import reprlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ArtifactError, InputError
from .fields import MAX_NUMBER, FieldError, parse_fields
from .machine import Machine
from .sampling_options import Sampling
from .step import FUNCTIONS

FORMAT_VERSION = 7
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"  # the checkpoint's own
REQUANTISED = "requantised.json"  # see `requantised.py`
PROGRAMS_SUFFIX = ".launches"  # in place of a library's: what launches its kernels
ANY = "any"  # system and architecture of an artifact whose code the device's driver compiles
# A library that TVM's runtime loads; or kernels and the programs that launch them: as OpenCL C, or
# as machine code that CUDA's driver loads.
RUNTIMES = ("tvm", "opencl", "cuda")
CPU = "cpu"
DEVICES = (CPU, "metal")  # of TVM's runtime
DTYPES = ("float32", "float16", "uint8", "uint16", "uint32")  # of weights and caches
ROPE = "rope"  # the weight of which a run reads a row for each position
MAX_DIMENSIONS = 16
MAX_TEMPLATE_BYTES = 256 << 10  # fifteen times what that of gpt-oss has


@dataclass(frozen=True)
class Tensor:
    """Name, shape and numpy dtype of a weight or cache."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


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
    experts_per_token: int
    norm_eps: float  # this and the next are in the kernels; they tell which checkpoint it is of
    swiglu_limit: float
    chunk: int  # tokens of one prefill, at most
    most_wanted: int  # rows of a step whose logits are wanted, at most
    workspace_bytes: dict[str, int]  # of each function's activations
    caches: tuple[Tensor, ...]  # a page of each layer's keys and values: arguments before weights
    weights: tuple[Tensor, ...]
    decode_bytes: int  # of weights that one decode step reads
    gathered: tuple[str, ...]  # weights of which a run reads the rows of its tokens only
    eos_token_ids: tuple[int, ...]
    sampling: Sampling  # unless a caller says otherwise
    files: dict[str, File]

    @property
    def on_cpu(self) -> bool:
        """Whether its functions run on the CPU, and read weights where the file is mapped."""
        return self.runtime == "tvm" and self.device == CPU

    @property
    def page_tokens(self) -> int:
        """Positions of a page of keys and values."""
        return self.caches[1].shape[-2]

    def fits(self, here: Machine) -> bool:
        """Whether it was made for this system and architecture."""
        return self.system in (ANY, here.system) and self.architecture in (ANY, here.architecture)

    def variant_here(self) -> Variant | None:
        """The best variant that this machine can run."""
        if not self.fits(Machine.here()):
            return None
        return next((v for v in self.variants if not v.missing_features()), None)

    @property
    def sha256(self) -> str:
        """Hash of all fields, which tells this artifact from any other."""
        return hash_fields(self._fields())

    def to_json(self) -> str:
        """Text of manifest.json; its last field is a hash of all others."""
        return json.dumps(self._fields() | {"manifest_sha256": self.sha256}, indent=1) + "\n"

    def _fields(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **asdict(self)}


def parse_manifest(fields: dict[str, Any], file: Path) -> Manifest:
    """The manifest that `file` holds, out of its JSON without version and hash; ArtifactError if
    there cannot be such a one."""
    try:
        manifest: Manifest = parse_fields(Manifest, fields, "the manifest")
    except FieldError as error:
        raise damaged(file, error.expected, error.found) from None
    except InputError as error:  # the same ranges as for a caller
        raise damaged(file, "options of sampling in their ranges", str(error)) from None
    _check(manifest, file)
    return manifest


def hash_fields(fields: dict[str, Any]) -> str:
    """sha256 of a manifest's fields, in hexadecimal."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def damaged(file: Path, expected: str, found: str) -> ArtifactError:
    return ArtifactError(
        f"{file}: expected {expected}, found {found}; the artifact is damaged or incomplete: "
        "copy it again, or compile the model again"
    )


def _check(manifest: Manifest, file: Path) -> None:
    """What must hold of the fields and between them."""

    def expect(holds: bool, expected: str, found: object) -> None:
        if not holds:
            text = found if isinstance(found, str) else reprlib.repr(found)
            raise damaged(file, expected, text)

    m = manifest
    expect(m.runtime in RUNTIMES, f"one of {RUNTIMES} as runtime", repr(m.runtime))
    if m.runtime == "tvm":
        expect(m.device in DEVICES, f"one of {DEVICES} as device", repr(m.device))
    expect(len(m.variants) > 0, "at least one variant", "none")
    needed = [WEIGHTS, *(v.library for v in m.variants)]
    needed += [v.programs for v in m.variants if m.runtime != "tvm"]
    for name in needed:
        expect(name in m.files, f"an entry for {name}", "none")
    for name, entry in m.files.items():
        expect(Path(name).name == name != "..", "file names without a folder", repr(name))
        expect(re.fullmatch("[0-9a-f]{64}", entry.sha256) is not None, f"a sha256 of {name}", entry)
    template = m.files.get(CHAT_TEMPLATE, File(0, ""))
    is_small = template.num_bytes <= MAX_TEMPLATE_BYTES
    expect(is_small, f"{CHAT_TEMPLATE} of at most {MAX_TEMPLATE_BYTES} bytes", template)

    for name in ("vocab_size", "context", "window", "chunk", "most_wanted"):
        expect(getattr(m, name) > 0, f"a positive {name}", "0")
    expect(m.most_wanted <= m.chunk, f"most_wanted up to {m.chunk}", m.most_wanted)
    known = m.workspace_bytes.keys()
    expect(known >= set(FUNCTIONS), f"workspace_bytes of {', '.join(FUNCTIONS)}", list(known))
    wrong = [id for id in m.eos_token_ids if id >= m.vocab_size]
    expect(not wrong, f"eos_token_ids below {m.vocab_size}", wrong)

    names = [tensor.name for tensor in (*m.caches, *m.weights)]
    expect(len(set(names)) == len(names), "caches and weights of different names", "two of one")
    for tensor in (*m.caches, *m.weights):
        expect(tensor.dtype in DTYPES, f"{tensor.name} of one of {DTYPES}", repr(tensor.dtype))
        has_shape = 0 < len(tensor.shape) <= MAX_DIMENSIONS and min(tensor.shape) > 0
        expect(has_shape, f"positive extents of {tensor.name}", tensor.shape)
        expect(tensor.num_bytes < MAX_NUMBER, f"{tensor.name} to be smaller", tensor.shape)
    layers = len(m.sliding)
    expect(0 < layers == len(m.caches) / 2, f"{2 * layers} caches", f"{len(m.caches)}")
    for keys, values in zip(m.caches[0::2], m.caches[1::2], strict=True):
        _check_cache(m, keys, values, expect)

    weights = {weight.name: weight for weight in m.weights}
    total, most = sum(w.num_bytes for w in m.weights), m.files[WEIGHTS].num_bytes
    expect(total <= most, f"weights of at most {most} bytes, which their file has", f"{total}")
    expect(m.decode_bytes <= total, f"at most {total} decode_bytes", f"{m.decode_bytes}")
    for name in m.gathered:
        expect(name in weights, f"a weight named {name!r}, which is gathered", "none")
    # Kernels read the rows of positions and of token ids without a check.
    rows = {name: weight.shape[0] for name, weight in weights.items()}
    expect(rows.get(ROPE) == m.context, f"{m.context} rows of {ROPE}", rows.get(ROPE))
    embedded = [count for name, count in rows.items() if name.startswith("embed.")]
    expect(set(embedded) == {m.vocab_size}, f"{m.vocab_size} rows of embed", embedded)


def _check_cache(m: Manifest, keys: Tensor, values: Tensor, expect: Callable[..., None]) -> None:
    """Pages of as many positions as those of all layers, in whole tiles of keys."""
    expect(keys.dtype == values.dtype, f"{values.name} of {keys.dtype}", values.dtype)
    expect(len(keys.shape) == 4, f"4 extents of {keys.name}", keys.shape)
    heads, tiles, dim, per_tile = keys.shape
    shape = (heads, tiles * per_tile, dim)
    expect(values.shape == shape, f"{values.name} of shape {shape}", values.shape)
    page = m.page_tokens
    expect(tiles * per_tile == page, f"{keys.name} of {page} positions", keys.shape)
