"""Read a gpt-oss checkpoint: whatever its layout, out comes one canonical set of tensors.

MXFP4 stays packed and bf16 stays bf16. Everything is checked when the checkpoint opens, from the
headers alone; after that, rows are read as they are asked for.
"""

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from ..errors import CheckpointError
from ..runtime.safetensors import NUMPY_DTYPES, FormatError, TensorEntry, read_header
from .config import ModelConfig, parse_config, read_json_object

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SCALE_NAN = 255  # the only e8m0 byte that is no power of two (OCP Microscaling, section 5.4.1)
SAFETENSORS_DTYPES = {"bf16": "BF16", "u8": "U8"}

# Canonical name -> Hugging Face names, stacked along the leading axis.
_MODEL_NAMES = {
    "embed.weight": ("model.embed_tokens.weight",),
    "norm.weight": ("model.norm.weight",),
    "lm_head.weight": ("lm_head.weight",),
}
_LAYER_NAMES = {
    "attn_norm.weight": ("input_layernorm.weight",),
    "qkv.weight": tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
    "qkv.bias": tuple(f"self_attn.{part}_proj.bias" for part in "qkv"),
    "sinks": ("self_attn.sinks",),
    "out.weight": ("self_attn.o_proj.weight",),
    "out.bias": ("self_attn.o_proj.bias",),
    "mlp_norm.weight": ("post_attention_layernorm.weight",),
    "router.weight": ("mlp.router.weight",),
    "router.bias": ("mlp.router.bias",),
    "gate_up.blocks": ("mlp.experts.gate_up_proj_blocks",),
    "gate_up.scales": ("mlp.experts.gate_up_proj_scales",),
    "gate_up.bias": ("mlp.experts.gate_up_proj_bias",),
    "down.blocks": ("mlp.experts.down_proj_blocks",),
    "down.scales": ("mlp.experts.down_proj_scales",),
    "down.bias": ("mlp.experts.down_proj_bias",),
}


class Source(Protocol):
    """The weights of one model under their canonical names (see `canonical_shapes`).

    Several threads read at once.
    """

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one canonical tensor."""

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the leading axis, contiguous, as ml_dtypes.bfloat16 or uint8.

        Raises CheckpointError if the stored values cannot be read or used.
        """


def canonical_shapes(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, "bf16" or "u8") of every tensor, in the order in which data flows.

    `qkv` holds the rows of q, then k, then v. Axis 1 of `gate_up` is 0 = gate, 1 = up. `blocks`
    hold 32 fp4 values in 16 bytes, the first of each pair in the low nibble; `scales` are e8m0.
    """
    vocab, hidden, intermediate = config.vocab_size, config.hidden_size, config.intermediate_size
    experts = config.num_experts
    gate_up = (experts, 2, intermediate)
    down = (experts, hidden)
    layer: dict[str, tuple[tuple[int, ...], str]] = {
        "attn_norm.weight": ((hidden,), "bf16"),
        "qkv.weight": ((config.qkv_size, hidden), "bf16"),
        "qkv.bias": ((config.qkv_size,), "bf16"),
        "sinks": ((config.num_heads,), "bf16"),
        "out.weight": ((hidden, config.q_size), "bf16"),
        "out.bias": ((hidden,), "bf16"),
        "mlp_norm.weight": ((hidden,), "bf16"),
        "router.weight": ((experts, hidden), "bf16"),
        "router.bias": ((experts,), "bf16"),
        "gate_up.blocks": ((*gate_up, config.hidden_blocks, 16), "u8"),
        "gate_up.scales": ((*gate_up, config.hidden_blocks), "u8"),
        "gate_up.bias": (gate_up, "bf16"),
        "down.blocks": ((*down, config.intermediate_blocks, 16), "u8"),
        "down.scales": ((*down, config.intermediate_blocks), "u8"),
        "down.bias": (down, "bf16"),
    }
    shapes: dict[str, tuple[tuple[int, ...], str]] = {"embed.weight": ((vocab, hidden), "bf16")}
    for index in range(config.num_layers):
        shapes |= {f"layers.{index}.{name}": spec for name, spec in layer.items()}
    shapes["norm.weight"] = ((hidden,), "bf16")
    shapes["lm_head.weight"] = ((vocab, hidden), "bf16")
    return shapes


def open_checkpoint(directory: str | Path) -> "HuggingFaceCheckpoint":
    """Open a Hugging Face MXFP4 checkpoint and check that all of it is there.

    Reads config.json, the index (or the header of a single model.safetensors) and the headers of
    the shards, no weights. Raises CheckpointError naming the file or tensor at fault.
    """
    directory = Path(directory)
    config, shards = read_metadata(directory)
    if not shards:  # no index: one file holds everything
        shards = dict.fromkeys(_expected_tensors(config), directory / SINGLE_FILE)
    headers = {path: _read_shard_header(path) for path in dict.fromkeys(shards.values())}
    entries: dict[str, tuple[Path, TensorEntry]] = {}
    for name, (shape, dtype) in _expected_tensors(config).items():
        path = shards[name]
        if name not in headers[path]:
            raise _missing(name, path, headers[path])
        entry = headers[path][name]
        _check_entry(f"{path}: tensor {name}", entry, shape, SAFETENSORS_DTYPES[dtype])
        entries[name] = (path, entry)
    return HuggingFaceCheckpoint(config, entries)


def read_metadata(directory: Path) -> tuple[ModelConfig, dict[str, Path]]:
    """Check what can be checked without the weights: config.json and, if there is one, the index.

    Returns the config and the file of every tensor we need: empty if there is no index. Raises
    CheckpointError. A download can stop here before it fetches gigabytes of another model.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; expected a Hugging Face checkpoint")
    raw = read_json_object(directory / "config.json")
    config = parse_config(raw, str(directory / "config.json"))
    _check_quantization(raw, directory / "config.json")
    index = directory / INDEX
    if not index.exists():
        return config, {}
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: expected an object `weight_map`; download the file again")
    shards = {}
    for name in _expected_tensors(config):
        if name not in weight_map:
            raise _missing(name, index, weight_map)
        shards[name] = _shard_path(index, name, weight_map[name])
    return config, shards


class HuggingFaceCheckpoint:
    """A `Source` over the shards of a checkpoint; made by `open_checkpoint`.

    Reads with plain file reads instead of a mapping: memory in use is what was asked for, and a
    file that shrinks under us is an error instead of a signal.
    """

    def __init__(self, config: ModelConfig, entries: dict[str, tuple[Path, TensorEntry]]) -> None:
        self.config = config
        self._entries = entries
        self._shapes = canonical_shapes(config)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one canonical tensor."""
        return self._shapes[name][0]

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the leading axis, contiguous, as ml_dtypes.bfloat16 or uint8.

        Raises CheckpointError if a file shrank or vanished, or if a scale is NaN.
        """
        shape, dtype = self._shapes[name]
        assert 0 <= start <= stop <= shape[0], f"{name}: rows {start}..{stop} of {shape[0]}"
        bits = self._read_stored(name, start, stop)
        if ".gate_up." in name:  # stored row 2n is gate n, row 2n + 1 is up n
            interleaved = bits.reshape(stop - start, shape[2], 2, *shape[3:])
            bits = np.ascontiguousarray(interleaved.swapaxes(1, 2))
        return bits.view(ml_dtypes.bfloat16) if dtype == "bf16" else bits

    def _read_stored(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of the stored tensors, stacked; bf16 as uint16."""
        pieces = []
        first = 0  # the canonical row at which the stored tensor starts
        for stored in _stored_names(name):
            path, entry = self._entries[stored]
            num_rows = entry.shape[0]
            begin, end = (min(max(row - first, 0), num_rows) for row in (start, stop))
            if begin < end or start == stop:
                pieces.append(_read_rows(path, stored, entry, begin, end))
            first += num_rows
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _stored_names(name: str) -> tuple[str, ...]:
    if name in _MODEL_NAMES:
        return _MODEL_NAMES[name]
    _, layer, kind = name.split(".", 2)
    return tuple(f"model.layers.{layer}.{stored}" for stored in _LAYER_NAMES[kind])


def _expected_tensors(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    """Hugging Face name -> (shape, "bf16" or "u8")."""
    expected: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, (shape, dtype) in canonical_shapes(config).items():
        stored = _stored_names(name)
        if len(stored) == 3:
            rows = (config.q_size, config.kv_size, config.kv_size)
            expected |= {
                part: ((count, *shape[1:]), dtype) for part, count in zip(stored, rows, strict=True)
            }
        elif ".gate_up." in name:
            expected[stored[0]] = ((shape[0], 2 * shape[2], *shape[3:]), dtype)
        else:
            expected[stored[0]] = (shape, dtype)
    return expected


def _check_quantization(raw: dict[str, Any], path: Path) -> None:
    """Refuse other quantisations by name; without an entry the tensors themselves decide."""
    quantization = raw.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method not in (None, "mxfp4"):
        raise CheckpointError(
            f"{path}: quant_method: expected 'mxfp4', found {method!r}; "
            "give the original MXFP4 checkpoint"
        )


def _shard_path(index: Path, name: str, file: Any) -> Path:
    """The shard's path. The index is not trusted: it may not lead out of the directory."""
    if (
        not isinstance(file, str)
        or not PurePosixPath(file).name
        or "\0" in file
        or PureWindowsPath(file).anchor  # a drive, or a leading slash of either kind
        or ".." in PureWindowsPath(file).parts
    ):
        raise CheckpointError(
            f"{index}: tensor {name}: expected a file name inside {index.parent}, found {file!r}"
        )
    return index.parent / file


def _read_shard_header(path: Path) -> dict[str, TensorEntry]:
    if not path.is_file():
        named_by = "expected it, or an index" if path.name == SINGLE_FILE else f"{INDEX} names it"
        raise CheckpointError(f"{path}: no such file, but {named_by}; download the missing file")
    try:
        return read_header(path)
    except FormatError as error:
        raise CheckpointError(f"{error}; download the file again") from error


def _missing(name: str, where: Path, present: dict[str, Any]) -> CheckpointError:
    if name.endswith("_blocks") and name.removesuffix("_blocks") in present:
        return _dequantised(f"{where}: tensor {name}", name.removesuffix("_blocks"))
    if name.endswith("_scales") and name.replace("_scales", "_blocks") in present:
        return _dequantised(f"{where}: tensor {name}", "_blocks without _scales")
    return CheckpointError(
        f"{where}: expected tensor {name}, found {len(present)} others; "
        "the checkpoint is incomplete: download it again"
    )


def _check_entry(where: str, entry: TensorEntry, shape: tuple[int, ...], dtype: str) -> None:
    if (entry.dtype, entry.shape) == (dtype, shape):
        return
    # transformers 5 writes a dequantised model under the names of the quantised tensors.
    if where.endswith("_blocks") and entry.dtype in ("BF16", "F16", "F32"):
        raise _dequantised(where, f"{entry.dtype} {list(entry.shape)}")
    raise CheckpointError(
        f"{where}: expected {dtype} {list(shape)}, found {entry.dtype} {list(entry.shape)}; "
        "do config.json and the weights belong together?"
    )


def _dequantised(where: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: expected MXFP4 blocks and scales, found {found}; dequantised (bf16) checkpoints "
        "are not supported yet: give the MXFP4 checkpoint"
    )


def _read_rows(path: Path, name: str, entry: TensorEntry, start: int, stop: int) -> np.ndarray:
    """Rows of a stored tensor as its numpy type (bf16 as uint16), checked."""
    dtype = NUMPY_DTYPES[entry.dtype]
    row_bytes = entry.num_bytes // entry.shape[0]
    count = (stop - start) * row_bytes // dtype.itemsize
    try:
        flat = np.fromfile(path, dtype, count, offset=entry.offset + start * row_bytes)
    except OSError as error:
        raise CheckpointError(
            f"{path}: tensor {name}: cannot be read: {error.strerror or error}"
        ) from error
    if flat.size != count:
        raise CheckpointError(
            f"{path}: tensor {name}: expected {count} values from row {start}, found {flat.size}; "
            "the file shrank while it was read: download it again"
        )
    if name.endswith("_scales") and count and flat.max() == SCALE_NAN:
        raise CheckpointError(
            f"{path}: tensor {name}: expected scales that are powers of two, found the byte "
            f"{SCALE_NAN} (NaN) in rows {start} to {stop - 1}; download the checkpoint again"
        )
    return flat.reshape(stop - start, *entry.shape[1:])
