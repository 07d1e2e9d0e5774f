"""Multiply many rows of activations as bfloat16, where the target's matrix units take it.

The graph quantises activations to int8, for all targets. Here the kernels of functions for several
rows lose the stages that make and multiply int8, and get those of
`kernels/bfloat16.py`: one tensor of panels takes the place of whole numbers, scales and offsets.
Rows are gathered where they are multiplied, and what nobody reads any more is no result. The
functions for one row and for two, which hardly share weights, stay as they are.
"""

from collections.abc import Mapping

from tvm import ir, relax, te, tirx
from tvm.relax import TensorType
from tvm.tirx import Buffer, PrimFunc
from tvm_ffi import structural_map

from ..kernels.bfloat16 import dense_sum, expert_sum, in_panels, num_panels
from ..schedules.formats import BLOCK, PANEL, extent
from ..targets import Target
from .drop_uncalled import drop_uncalled
from .replace_stages import buffers_by_name, replace_stages, stage_names

OPS = {
    "rms_norm_q8": "rms_norm_bf16",
    "quantize_q8": "round_bf16",
    "dense_q8": "dense_int8_bf16",
    "moe_mxfp4_swiglu_q8": "moe_mxfp4_swiglu_bf16",
    "moe_mxfp4_sum_q8": "moe_mxfp4_sum_bf16",
}
MOST_ROWS_OF_INT8 = 2  # of a function: up to there every row reads its weights by itself
GATHER = "gather_rows"
QUANTISED = ("xq", "xs", "xoffset")  # three tensors of a product
MADE = ("xq_out", "xs_out", "xoffset_out")  # those that a product makes for the next
QUANTISING = ("largest", "sum_of_whole", *QUANTISED, *MADE)  # stages
MULTIPLYING = ("dot", "acc")
PANELS = {"xq": "xb", "xq_out": "xb_out"}  # what takes the place of the three that a kernel makes


def multiply_bfloat16(module: ir.IRModule, target: Target) -> ir.IRModule:
    """Rewrite the functions for several rows, and drop the kernels that nobody calls."""
    if target.bf16_matrix is None:
        return module
    functions = dict(module.functions_items())
    rewritten = {n: f for n, f in functions.items() if _has_several_rows(f)}
    kept = {n: f for n, f in functions.items() if n not in rewritten}
    builder = relax.BlockBuilder(ir.IRModule(kept))
    for name, function in rewritten.items():
        _Rewrite(builder, module, function).emit(name.name_hint)
    return drop_uncalled(builder.get().with_attrs(module.attrs or {}))


def product_in_bfloat16(kernel: PrimFunc, gathered: bool) -> PrimFunc:
    """Return a product of int8 activations as one of panels: xb uint16 [rows, panels, 64] takes the
    place of xq, xs and xoffset; with `gathered` they are a token's, and row_token int32 [rows] says
    whose each row is."""
    buffers = buffers_by_name(kernel)
    acc, scales = buffers["acc"], buffers["scales"]
    rows, inputs = acc.shape[0], int(scales.shape[-1]) * BLOCK
    xb = _panels("xb", tirx.Var("tokens", "int64") if gathered else rows, inputs)
    taken = [xb, tirx.decl_buffer((rows,), "int32", "row_token")] if gathered else [xb]
    reads = [*taken, *(buffers[n] for n in ("words", "scales", "row_expert") if n in buffers)]

    def sum_of(tensors: Mapping[str, te.Tensor]) -> te.Tensor:
        add = expert_sum if "row_expert" in tensors else dense_sum
        return add(tensors, tuple(acc.shape))

    parameters = [*taken, *(p for p in kernel.params if p.name not in QUANTISED)]
    product = replace_stages(kernel, MULTIPLYING, sum_of, reads, acc, parameters)
    return product.without_attr("packed_params").with_attr("op", OPS[str(kernel.attrs["op"])])


def rounded_to_bfloat16(kernel: PrimFunc, keep: bool) -> PrimFunc:
    """Return a kernel that quantises what it computes as one that returns its panels, and only if
    `keep` the numbers themselves."""
    buffers = buffers_by_name(kernel)
    x = buffers["out"] if "out" in buffers else buffers["x"]
    made = next(name for name in reversed(PANELS) if name in buffers)
    xb = _panels(PANELS[made], x.shape[0], int(x.shape[1]))
    dropped = {*QUANTISING, *(() if keep else ("out",))}
    parameters = [*(p for p in kernel.params if p.name not in dropped), xb]
    quantising = [name for name in stage_names(kernel) if name in QUANTISING]
    rounded = replace_stages(
        kernel, quantising, lambda tensors: in_panels(tensors[x.name], xb.name), [x], xb, parameters
    )
    op = str(kernel.attrs["op"])
    return rounded.with_attr("op", OPS.get(op, op))


def _panels(name: str, rows: ir.Expr, inputs: int) -> Buffer:
    shape = (rows, extent(num_panels(inputs)), extent(PANEL))
    return tirx.decl_buffer(shape, "uint16", name)


def _has_several_rows(function: relax.Function | PrimFunc) -> bool:
    """Whether this is a function of the graph, for more rows than int8 is best for."""
    if not isinstance(function, relax.Function):
        return False
    rows = function.params[0].ty.shape[0]
    return isinstance(rows, tirx.Var) or int(rows) > MOST_ROWS_OF_INT8


class _Rewrite:
    """Emits a function anew."""

    def __init__(
        self, builder: relax.BlockBuilder, module: ir.IRModule, function: relax.Function
    ) -> None:
        self.builder, self.module, self.function = builder, module, function
        self.bindings = [b for block in function.body.blocks for b in block.bindings]
        # What a variable has become: several where rows are gathered later, or nothing.
        self.known: dict[relax.Var, list[relax.Var]] = {}
        self.items: dict[relax.Var, list[list[relax.Var]]] = {}  # of a tuple
        read = {v for b in self.bindings for v in _arguments(b.value)}
        items = [b for b in self.bindings if isinstance(b.value, relax.TupleGetItem)]
        self.read = {(b.value.tuple_value, int(b.value.index)) for b in items if b.var in read}

    def emit(self, name: str) -> None:
        function, builder = self.function, self.builder
        with builder.function(name, list(function.params), dict(function.attrs), pure=False):
            for binding in self.bindings:
                self._bind(binding.var, binding.value)
            builder.emit_func_output(self.known[function.body.body][0])

    def _bind(self, variable: relax.Var, value: ir.Expr) -> None:
        if isinstance(value, relax.TupleGetItem) and value.tuple_value in self.items:
            self.known[variable] = self.items[value.tuple_value][value.index]
            return
        kernel = self._kernel(value)
        if kernel is None:
            renames = (relax.Var, lambda v: self.known.get(v, [v])[0])
            self.known[variable] = [self.builder.emit(structural_map(value, renames))]
        elif str(kernel.attrs["op"]) == GATHER:
            self.items[variable] = [self._renamed(value), [], []]
        else:
            self._call(variable, value, kernel)

    def _kernel(self, value: ir.Expr) -> PrimFunc | None:
        """Return the kernel of a call that must change."""
        if not isinstance(value, ir.Call) or value.op != ir.Op.get("relax.call_tir"):
            return None
        kernel = self.module[value.args[0]]
        of_bytes = any(p.name in QUANTISED and len(p.shape) == 3 for p in kernel.params)
        return kernel if of_bytes and str(kernel.attrs["op"]) in (*OPS, GATHER) else None

    def _renamed(self, call: ir.Call) -> list[relax.Var]:
        return [v for a in _arguments(call) for v in self.known.get(a, [a])]

    def _call(self, variable: relax.Var, call: ir.Call, kernel: PrimFunc) -> None:
        arguments, num_arguments = self._renamed(call), len(_arguments(call))
        names = [p.name for p in kernel.params[num_arguments:]]
        types = dict(zip(names, getattr(call.ty, "fields", [call.ty]), strict=True))
        if "dot" in stage_names(kernel):
            gathered = len(self.known[_arguments(call)[0]]) > 1
            kernel = product_in_bfloat16(kernel, gathered)
        if any(name in PANELS for name in names):
            kept = [n for i, n in enumerate(names) if (variable, i) in self.read]
            kernel = rounded_to_bfloat16(kernel, keep="out" in kept)
        results = kernel.params[len(arguments) :]
        rows = types[names[-1]].shape[0]
        new = [types.get(p.name, TensorType((rows, *p.shape[1:]), "uint16")) for p in results]
        values = self._emit(kernel, arguments, new)
        if len(names) == 1:
            self.known[variable] = values
            return
        by_name = {p.name: [v] for p, v in zip(results, values, strict=True)}
        self.items[variable] = [by_name.get(PANELS.get(name, name), []) for name in names]

    def _emit(
        self, kernel: PrimFunc, arguments: list[relax.Var], types: list[TensorType]
    ) -> list[relax.Var]:
        name = self.builder.add_func(kernel, str(kernel.attrs["op"]))
        result = self.builder.emit(relax.call_tir(name, arguments, types))
        if len(types) == 1:
            return [result]
        return [self.builder.emit(relax.TupleGetItem(result, i)) for i in range(len(types))]


def _arguments(value: ir.Expr) -> list[relax.Var]:
    """Return what a kernel is called with."""
    arguments = value.args if isinstance(value, ir.Call) else []
    return [v for a in arguments if isinstance(a, relax.Tuple) for v in a.fields]
