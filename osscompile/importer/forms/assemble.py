"""From the names a form uses to a `Source`: everything that is needed is there and fits.

A form says under which names it holds each canonical tensor; what is checked then is the same for
all of them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ...errors import CheckpointError
from ..checkpoint import canonical_shapes
from ..config import ModelConfig
from ..encodings import ENCODINGS
from ..experts import Experts, Half, split_gate_and_up
from ..mxfp4 import BLOCK
from ..stored import Rows, Stored

# (rows [n, inputs] float32, to change in place; the place of the first in the matrix)
Edit = Callable[[np.ndarray, int], None]


@dataclass(frozen=True)
class HalfNames:
    """Where the weights of all experts lie, or of gate or up alone: in one tensor, or in one an
    expert. See `Half`."""

    weights: tuple[str, ...]
    scales: str | None = None
    transposed: bool = False


@dataclass
class Plan:
    """Canonical name -> names in the form.

    `tensors`: halves, one below the other; more than one only where gate and up lie apart.
    `experts`: "layers.N.gate_up" and "layers.N.down". `by_expert`: weights and biases of experts
    are a tensor an expert.
    """

    tensors: dict[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    experts: dict[str, tuple[HalfNames, ...]] = field(default_factory=dict)
    by_expert: bool = False

    def names(self) -> Iterable[str]:
        """All names that must be there."""
        for halves in self.tensors.values():
            for half in halves:
                yield from half
        for parts in self.experts.values():
            for part in parts:
                yield from part.weights
                if part.scales is not None:
                    yield part.scales


def assemble(config: ModelConfig, plan: Plan, stored: Mapping[str, Stored]) -> "FormSource":
    """A source over stored tensors, of which all names of the plan exist.

    Raises CheckpointError naming the tensor whose shape or type is not what it must be.
    """
    _check_fields(config, plan, stored)
    shapes = canonical_shapes(config)
    tensors = {}
    for name, halves in plan.tensors.items():
        shape = shapes[name][0]
        if name.endswith(".gate_up.bias"):
            shape = (shape[0], 2 // len(halves) * shape[2])
        by_expert = plan.by_expert and name.endswith((".gate_up.bias", ".down.bias"))
        read = _stack if by_expert else _rows
        tensors[name] = tuple(read([stored[n] for n in half], shape, config) for half in halves)
    experts = {}
    for name, parts in plan.experts.items():
        shape = shapes[f"{name}.scales"][0]  # [experts, rows, groups] or [experts, 2, rows, groups]
        if len(shape) == 4:
            shape = (shape[0], 2 // len(parts) * shape[2], shape[3])
        experts[name] = Experts(
            tuple(_half(part, shape, stored, config, plan.by_expert) for part in parts),
            gate_up=name.endswith("gate_up"),
        )
    return FormSource(config, tensors, experts)


class FormSource:
    """A `Source` over the tensors of a checkpoint, whatever its form."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: dict[str, tuple[Rows, ...]],
        experts: dict[str, Experts],
    ) -> None:
        self.config = config
        self.experts = experts
        self.tensors = tensors
        self._edits: dict[str, list[Edit]] = {}
        self._shapes = canonical_shapes(config)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one canonical tensor."""
        return self._shapes[name][0]

    def edit(self, name: str, edit: Edit) -> None:
        """Change a matrix whenever rows of it are read; edits come in order."""
        self._edits.setdefault(name, []).append(edit)

    def replace(self, name: str, rows: Rows) -> None:
        """Another tensor in place of one; what has been changed of that one goes with it."""
        self.tensors[name] = (rows,)
        self._edits.pop(name, None)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the leading axis, contiguous: see `Source`."""
        shape = self._shapes[name][0]
        assert 0 <= start <= stop <= shape[0], f"{name}: rows {start}..{stop} of {shape[0]}"
        matrix, _, kind = name.rpartition(".")
        if kind == "blocks":
            return self.experts[matrix].blocks(start, stop)
        if kind == "scales":
            return self.experts[matrix].scales(start, stop)
        halves = [rows.numbers(start, stop) for rows in self.tensors[name]]
        numbers = split_gate_and_up(halves) if ".gate_up." in name else halves[0]
        if name in self._edits:
            numbers = numbers.astype(np.float32)  # a copy of our own
            for edit in self._edits[name]:
                edit(numbers, start)
        return numbers

    def read_int8(self, name: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Rows [start, stop) of a matrix that is Q8_0 in its file: see `Source`."""
        (rows,) = self.tensors[name]
        if rows.encodings != {"Q8_0"} or name in self._edits:
            return None
        blocks = rows.raw(start, stop).reshape(stop - start, -1, 2 + BLOCK)
        scales = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0]
        values = np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
        # No writer rounds to -128, which the kernels do not take; it comes within a step.
        return np.maximum(values, -127, out=values), scales

    def requantised(self) -> dict[str, float]:
        """See `Source`."""
        changed = {name: experts.changed() for name, experts in self.experts.items()}
        return {name: value for name, value in changed.items() if value > 0}


def _check_fields(config: ModelConfig, plan: Plan, stored: Mapping[str, Stored]) -> None:
    """Raise CheckpointError naming the first size in the config that is not the tensors' outside of
    the layers, or in the first one."""

    def first(name: str, part: int = 0) -> Stored:
        return stored[plan.tensors[name][0][part]]

    fused = len(plan.tensors["layers.0.qkv.bias"][0]) == 1
    k = first("layers.0.qkv.bias", 0 if fused else 1)
    per_kv_head, queries = (2 * config.head_dim, config.q_size) if fused else (config.head_dim, 0)
    gate_up = first("layers.0.gate_up.bias")
    halves = 2 // len(plan.tensors["layers.0.gate_up.bias"])
    sizes = (  # in the config's spelling; numbers of each unit along an axis, and others before
        ("num_attention_heads", config.num_heads, first("layers.0.sinks"), 0, 1, 0),
        ("hidden_size", config.hidden_size, first("norm.weight"), 0, 1, 0),
        ("vocab_size", config.vocab_size, first("embed.weight"), 0, 1, 0),
        ("head_dim", config.head_dim, first("layers.0.out.weight"), 1, config.num_heads, 0),
        ("num_key_value_heads", config.num_kv_heads, k, 0, per_kv_head, queries),
        ("num_local_experts", config.num_experts, first("layers.0.router.weight"), 0, 1, 0),
        ("intermediate_size", config.intermediate_size, gate_up, -1, halves, 0),
    )
    for name, size, tensor, axis, unit, others in sizes:  # each takes those before it for granted
        found, rest = divmod(sum(tensor.shape[axis:][:1]) - others, unit)
        is_padded = name == "vocab_size" and found > size
        if found > 0 and rest == 0 and found != size and not is_padded:
            raise CheckpointError(
                f"{tensor}: {name}: expected {found}, as the tensor has, found {size}: correct the "
                "config, or give the weights that belong to it"
            )


def _rows(parts: list[Stored], shape: tuple[int, ...], config: ModelConfig) -> Rows:
    """Tensors one below the other, which together have this shape."""
    counts = [shape[0]]
    if len(parts) > 1:
        counts = [config.q_size, config.kv_size, config.kv_size]
    elif shape[0] == config.vocab_size and parts[0].shape[:1] > shape[:1]:
        counts = [parts[0].shape[0]]  # padded: the rows beyond the vocabulary are never read
    for part, count in zip(parts, counts, strict=True):
        _check(part, (count, *shape[1:]))
    return Rows(tuple(parts))


def _stack(parts: list[Stored], shape: tuple[int, ...], config: ModelConfig) -> Rows:
    """A tensor an expert."""
    for part in parts:
        _check(part, shape[1:])
    return Rows(tuple(part.with_leading_axis() for part in parts))


def _half(
    names: HalfNames,
    shape: tuple[int, ...],
    stored: Mapping[str, Stored],
    config: ModelConfig,
    by_expert: bool,
) -> Half:
    """`shape`: experts, rows, groups."""
    experts, rows, groups = shape
    parts = [stored[name] for name in names.weights]
    if names.scales is not None:
        scales = stored[names.scales]
        _check(parts[0], (*shape, BLOCK // 2), "U8")
        _check(scales, shape, "U8")
        return Half(Rows((parts[0],)), Rows((scales,)))
    matrix = (groups * BLOCK, rows) if names.transposed else (rows, groups * BLOCK)
    read = _stack if by_expert else _rows
    return Half(read(parts, (experts, *matrix), config), transposed=names.transposed)


def _check(part: Stored, shape: tuple[int, ...], encoding: str | None = None) -> None:
    """Numbers of any type will do unless one is named; vectors have no blocks of them."""
    known = ENCODINGS.get(part.encoding)
    good = part.encoding == encoding if encoding else known is not None and part.encoding != "U8"
    if len(shape) == 1:
        good = good and known is not None and known.numbers == 1
    if part.shape != shape or not good:
        raise CheckpointError(
            f"{part}: expected {encoding or 'BF16, F16 or F32'} {list(shape)}, "
            f"found {part.encoding} {list(part.shape)}; do config.json and the weights belong "
            "together?"
        )
