"""Which kernels of a model are worth measuring, and what they are called with."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tvm import ir, relax, tirx
from tvm.ir import Expr
from tvm.sym import Analyzer
from tvm.tirx import PrimFunc
from tvm_ffi import structural_map

from ..importer.config import ModelConfig
from ..importer.graph import DEFAULT_CHUNK, build_graph
from ..passes.pack_weights import pack_weights
from ..runtime.trials import Argument
from ..schedules.formats import DIGIT, FP4_OFFSET
from ..schedules.records import kernel_key
from ..schedules.rule import schedule
from ..targets import Target

NOT_TUNED = ("score",)  # functions whose speed nobody waits for
POSITION = 1024  # of the first new token: attention has that many keys before it
CHECKED_ROWS = 21  # of a kernel with a symbolic number of them, when its result is compared


@dataclass(frozen=True)
class Workload:
    """An unscheduled kernel, packed for the target, and its arguments."""

    key: str
    function: PrimFunc
    arguments: tuple[Argument, ...]

    @property
    def num_elements(self) -> int:
        return sum(math.prod(a.shape) for a in self.arguments)


def collect_workloads(config: ModelConfig, profile: str, target: Target) -> list[Workload]:
    """The distinct kernels of a model whose schedules leave constants open, with arguments as in
    the largest call: that of a whole prefill chunk where the number of tokens is symbolic."""
    kinds = sorted(set(config.sliding))  # a layer of each kind has all kernels
    config = dataclasses.replace(config, num_layers=len(kinds), sliding=tuple(kinds))
    graph = build_graph(config, profile, config.max_context, DEFAULT_CHUNK)
    module = pack_weights(graph.module, target)
    position = max(0, min(POSITION, config.max_context - DEFAULT_CHUNK))
    found: dict[str, Workload] = {}
    for call, sizes in _kernel_calls(module):
        function = module[call.args[0]]
        if not _asks(function, target):
            continue
        shapes = [_shape(ty.shape, sizes) for ty in _argument_types(call)]
        arguments = _arguments(function, shapes, _written(call), position)
        workload = Workload(kernel_key(function), function, arguments)
        known = found.get(workload.key)
        if known is None or known.num_elements < workload.num_elements:
            found[workload.key] = workload
    return list(found.values())


def _kernel_calls(module: ir.IRModule) -> Iterator[tuple[ir.Call, dict[str, int]]]:
    """Calls of kernels, and the largest value of each symbol in their shapes."""
    for name, function in module.functions_items():
        if isinstance(function, relax.Function) and name.name_hint not in NOT_TUNED:
            bounds = function.attrs.get("tir_var_upper_bound", {})
            sizes = {str(symbol): int(bound) for symbol, bound in bounds.items()}
            for block in function.body.blocks:
                for binding in block.bindings:
                    call = binding.value
                    if isinstance(call, ir.Call) and isinstance(call.op, ir.Op):
                        if call.op.name in ("relax.call_tir", "relax.call_tir_inplace"):
                            yield call, sizes


def _argument_types(call: ir.Call) -> list[relax.TensorType]:
    """Of the inputs, then of the outputs that are arguments of their own."""
    types = [field.ty for field in call.args[1].fields]
    if call.op.name == "relax.call_tir":
        types += getattr(call.ty, "fields", [call.ty])
    return types


def _written(call: ir.Call) -> set[int]:
    if call.op.name == "relax.call_tir_inplace":
        return {int(i) for i in call.attrs.inplace_indices}
    num_inputs = len(call.args[1].fields)
    return set(range(num_inputs, len(_argument_types(call))))


def _asks(function: PrimFunc, target: Target) -> bool:
    asked = []

    def choose(name: str, candidates: Sequence[int], default: int) -> int:
        asked.append(name)
        return default

    schedule(function, target, choose)
    return bool(asked)


def _arguments(
    function: PrimFunc, shapes: list[tuple[int, ...]], written: set[int], position: int
) -> tuple[Argument, ...]:
    checked = {
        extent.name: CHECKED_ROWS
        for parameter in function.params
        for extent in parameter.shape
        if isinstance(extent, tirx.Var)
    }
    sizes = {p.name: shape for p, shape in zip(function.params, shapes, strict=True)}
    arguments = []
    for i, (parameter, shape) in enumerate(zip(function.params, shapes, strict=True)):
        is_output = i in written and i == len(shapes) - len(written) + sorted(written).index(i)
        fill = _OUTPUT if is_output else _fill(parameter, sizes, position)
        check_shape = _shape(parameter.shape, checked)
        dtype = str(parameter.dtype)
        arguments.append(
            Argument(parameter.name, dtype, shape, check_shape, *fill, written=i in written)
        )
    return tuple(arguments)


_OUTPUT = ("output", DIGIT, 0)


def _fill(
    parameter: tirx.Buffer, sizes: dict[str, tuple[int, ...]], position: int
) -> tuple[str, int, int]:
    """What an argument holds: (one of `FILLS`, low, high). Results must be neither lost beside
    others nor clamped, and indices must exist."""
    name, dtype = parameter.name, str(parameter.dtype)
    if dtype == "int32":
        if name == "row_expert":
            return "experts", 0, sizes["words"][0]
        if name == "position":
            return "integers", position, position + 1
        if name == "slots":  # of the rows that are there also when the result is compared
            return "integers", 0, min(CHECKED_ROWS, sizes["row_expert"][0])
        assert name == "xoffset", f"{name}: say here which int32 values it may hold"
        return "offsets", DIGIT, FP4_OFFSET
    if dtype == "uint8":
        return "integers", 116, 122  # e8m0: 2^-11 to 2^-6
    if dtype == "int8":
        if len(sizes[name]) == 4:  # digits
            return "integers", 1 - DIGIT // 2, DIGIT // 2
        return "integers", -127, 128  # -128 never occurs: our int8 is symmetric
    if dtype in ("uint32", "uint16"):
        return ("bits" if dtype == "uint32" else "bfloat16"), 0, 0
    return ("small" if name == "scales" else "normal"), 0, 0


def _shape(extents: Sequence[Expr], sizes: dict[str, int]) -> tuple[int, ...]:
    """Extents, which may be expressions, with values for their symbols."""

    def value(extent: Expr) -> int:
        replaced = structural_map(extent, (tirx.Var, lambda v: tirx.const(sizes[v.name], "int64")))
        return int(Analyzer().simplify(replaced))

    return tuple(value(extent) for extent in extents)
