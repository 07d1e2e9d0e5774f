"""The kernels of a model, and the arguments with which they are checked and measured."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from tvm import ir, relax, tirx
from tvm.ir import Expr
from tvm.sym import Analyzer
from tvm.tirx import PrimFunc
from tvm_ffi import structural_map

from ..importer.choice import with_choose
from ..importer.config import ModelConfig
from ..importer.graph import MOST_WANTED, TOKENS, WANTED, build_graph
from ..kernels.attention import TILES
from ..kernels.choose import ROWS
from ..kernels.kv_cache import PAGES, TABLE_PAGES
from ..passes.join_attention import join_attention
from ..passes.join_experts import join_experts
from ..passes.multiply_bfloat16 import multiply_bfloat16
from ..passes.pack_weights import pack_weights
from ..runtime.kv_cache import PAGE_TOKENS
from ..runtime.manifest import CPU
from ..runtime.step import FEW, TILE_ROWS
from ..runtime.trials.files import Argument
from ..schedules.formats import FEW_EXPERT_ROWS, FEW_TOKENS
from ..schedules.records import kernel_key
from ..schedules.rule import schedule
from ..targets import PREFILL_CHUNK, Target
from .fills import OUTPUT, Setting, fill_in_place, fill_of

# The position of the first new token: attention sees that many keys before it, and new keys go on
# from the end of a page to the next.
POSITION = 1270
# The rows of a kernel with a symbolic number of them, when its result is compared: more than a tile
# of 64, and fewer where the host would take minutes.
CHECKED_ROWS = 85
CHECKED_ELEMENTS = 1 << 20  # in the result at most, unless one row has more
SEPARATE = -1  # as `relax.call_tir_inplace` says that a result has an argument of its own
PAGE_SYMBOLS = (PAGES.name, TABLE_PAGES.name)


@dataclass(frozen=True)
class Workload:
    """An unscheduled kernel, packed for the target, and its arguments. `tuned` says whether its
    schedule leaves constants open and its speed matters."""

    key: str
    function: PrimFunc
    arguments: tuple[Argument, ...]
    tuned: bool


def collect_workloads(config: ModelConfig, profile: str, target: Target) -> list[Workload]:
    """Return the distinct kernels of a model, with the arguments of the largest call: a whole
    prefill chunk where the number of tokens is symbolic."""
    kinds = sorted(set(config.sliding))  # one layer of each kind has all kernels
    config = dataclasses.replace(config, num_layers=len(kinds), sliding=tuple(kinds))
    module = build_graph(config, profile, config.max_context, PREFILL_CHUNK).module
    if target.device != CPU:
        module = with_choose(module, config.vocab_size, MOST_WANTED)
    # all that replace kernels
    for rewrite in (pack_weights, multiply_bfloat16, join_attention, join_experts):
        module = rewrite(module, target)
    workloads = []
    num_pages = _num_pages(config)
    for kernel, calls in _calls_by_kernel(module, num_pages).items():
        function = module[kernel]
        arguments = [_arguments(function, call, config) for call in calls]
        largest = max(arguments, key=lambda all_of: sum(math.prod(a.shape) for a in all_of))
        tuned = _asks(function, target)
        workloads.append(Workload(kernel_key(function), function, largest, tuned))
    return workloads


@dataclass(frozen=True)
class _Call:
    """A call of a kernel; `sizes` has the largest value of each symbol in the shapes."""

    call: ir.Call
    sizes: dict[str, int]


def _calls_by_kernel(module: ir.IRModule, num_pages: int) -> dict[str, list[_Call]]:
    found = defaultdict(list)
    for _, function in module.functions_items():
        if isinstance(function, relax.Function):
            bounds = function.attrs.get("tir_var_upper_bound", {}) if function.attrs else {}
            sizes = {WANTED.name: MOST_WANTED}  # also where no input says how many
            sizes |= {str(symbol): int(bound) for symbol, bound in bounds.items()}
            sizes |= dict.fromkeys(("full_pages", "window_pages", "table_pages"), num_pages)
            for block in function.body.blocks:
                for binding in block.bindings:
                    call = binding.value
                    if isinstance(call, ir.Call) and isinstance(call.op, ir.Op):
                        if call.op.name in ("relax.call_tir", "relax.call_tir_inplace"):
                            kernel = call.args[0].name_hint
                            found[kernel].append(_Call(call, sizes))
    return found


def _argument_types(call: ir.Call) -> list[relax.TensorType]:
    """Return the types of the inputs, then of the outputs that are separate arguments."""
    results = zip(getattr(call.ty, "fields", [call.ty]), _places(call), strict=True)
    inputs = [field.ty for field in call.args[1].fields]
    return inputs + [result for result, place in results if place == SEPARATE]


def _written(call: ir.Call) -> set[int]:
    num_inputs = len(call.args[1].fields)
    separate = range(num_inputs, len(_argument_types(call)))
    return {place for place in _places(call) if place != SEPARATE} | set(separate)


def _places(call: ir.Call) -> list[int]:
    """Return for each result the input in whose place it is written, or `SEPARATE`."""
    if call.op.name == "relax.call_tir_inplace":
        return [int(i) for i in call.attrs.inplace_indices]
    return [SEPARATE] * len(getattr(call.ty, "fields", [call.ty]))


def _asks(function: PrimFunc, target: Target) -> bool:
    asked = []

    def choose(name: str, candidates: Sequence[int], default: int) -> int:
        asked.append(name)
        return default

    schedule(function, target, choose)
    return bool(asked)


def _position(config: ModelConfig) -> int:
    return max(0, min(POSITION, config.max_context - PREFILL_CHUNK))


def _num_pages(config: ModelConfig) -> int:
    """Pages of a sequence that ends with a chunk, and one that is read in vain."""
    return -(-(_position(config) + PREFILL_CHUNK) // PAGE_TOKENS) + 1


def _arguments(function: PrimFunc, call: _Call, config: ModelConfig) -> tuple[Argument, ...]:
    position = _position(config)
    room = config.max_context - position
    tokens = min(call.sizes.get(TOKENS.name, 1), room)
    most = call.sizes | {TOKENS.name: tokens, TILES.name: -(-tokens // TILE_ROWS)}
    shapes = [_shape(ty.shape, most) for ty in _argument_types(call.call)]
    sizes = {p.name: shape for p, shape in zip(function.params, shapes, strict=True)}
    num_inputs, written = len(call.call.args[1].fields), _written(call.call)
    widest = max((math.prod(shape[1:]) for shape in shapes[num_inputs:]), default=1)
    rows = min(CHECKED_ROWS, room, max(1, CHECKED_ELEMENTS // widest))
    symbols = {e.name for p in function.params for e in p.shape if isinstance(e, tirx.Var)}
    if FEW_TOKENS.name in symbols or FEW_EXPERT_ROWS.name in symbols:
        rows = min(rows, max(FEW))
    checked = dict.fromkeys(symbols, rows) | dict.fromkeys(PAGE_SYMBOLS, _num_pages(config))
    checked[TILES.name] = -(-rows // TILE_ROWS)
    checked[ROWS.name] = min(rows, MOST_WANTED)
    setting = Setting(sizes, rows, position, config)
    arguments = []
    for i, (parameter, shape) in enumerate(zip(function.params, shapes, strict=True)):
        if i in written:
            fill = fill_in_place(setting) if i < num_inputs else OUTPUT
        else:
            fill = fill_of(parameter, setting)
        check_shape = _shape(parameter.shape, checked)
        dtype = str(parameter.dtype)
        arguments.append(
            Argument(parameter.name, dtype, shape, check_shape, *fill, written=i in written)
        )
    return tuple(arguments)


def _shape(extents: Sequence[Expr], sizes: dict[str, int]) -> tuple[int, ...]:
    """Evaluate extents, which may be expressions, with these values for their symbols."""

    def value(extent: Expr) -> int:
        replaced = structural_map(extent, (tirx.Var, lambda v: tirx.const(sizes[v.name], "int64")))
        return int(Analyzer().simplify(replaced))

    return tuple(value(extent) for extent in extents)
