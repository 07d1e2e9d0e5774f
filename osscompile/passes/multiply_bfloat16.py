"""Multiply many rows of activations as bfloat16, where the target's matrix units take it.

The graph quantises activations to int8, for all targets. Here the kernels of functions for any
number of rows lose the stages that make and multiply int8, and get those of
`kernels/bfloat16.py`: one tensor of panels takes the place of whole numbers, scales and offsets.
Rows are gathered where they are multiplied, and what nobody reads any more is no result. Functions
for a few rows, whose speed memory limits, stay as they are.
"""

from collections.abc import Sequence

from tvm import ir, relax, te, tirx
from tvm.relax import TensorType
from tvm.tirx import Buffer, PrimFunc
from tvm_ffi import structural_map, structural_walk

from ..kernels.bfloat16 import dense_sum, expert_sum, in_panels, num_panels
from ..schedules.formats import BLOCK, PANEL, extent
from ..targets import Target
from .replace_stages import buffers_by_name, replace_stages, stage_names

OPS = {
    "rms_norm_q8": "rms_norm_bf16",
    "quantize_q8": "round_bf16",
    "dense_q8": "dense_int8_bf16",
    "moe_mxfp4_swiglu_q8": "moe_mxfp4_swiglu_bf16",
    "moe_mxfp4_sum_q8": "moe_mxfp4_sum_bf16",
}
GATHER = "gather_rows"
QUANTISED = ("xq", "xs", "xoffset")  # three tensors of a product
MADE = ("xq_out", "xs_out", "xoffset_out")  # those that a product makes for the next
QUANTISING = ("largest", "sum_of_whole", *QUANTISED, *MADE)  # stages
MULTIPLYING = ("dot", "acc")


def multiply_bfloat16(module: ir.IRModule, target: Target) -> ir.IRModule:
    """Rewrite the functions for any number of rows, and drop the kernels that nobody calls."""
    if target.bf16_matrix is None:
        return module
    functions = dict(module.functions_items())
    rewritten = {n: f for n, f in functions.items() if _has_any_rows(f)}
    kept = {n: f for n, f in functions.items() if n not in rewritten}
    builder = relax.BlockBuilder(ir.IRModule(kept))
    for name, function in rewritten.items():
        _Rewrite(builder, module, function).emit(name.name_hint)
    return _called(builder.get(), module.attrs)


def product_in_bfloat16(kernel: PrimFunc, gathered: bool) -> PrimFunc:
    """Return a product of int8 activations as one of panels: xb uint16 [rows, panels, 64] takes the
    place of xq, xs and xoffset; with `gathered` they are a token's, and row_token int32 [rows] says
    whose each row is."""
    buffers = buffers_by_name(kernel)
    acc, words, scales = (buffers[name] for name in ("acc", "words", "scales"))
    inputs = int(scales.shape[-1]) * BLOCK
    reads = [words, scales]
    tokens = tirx.Var("tokens", "int64") if gathered else acc.shape[0]
    xb = _panels("xb", tokens, inputs)
    taken = [xb, tirx.decl_buffer((acc.shape[0],), "int32", "row_token")] if gathered else [xb]
    if "row_expert" in buffers:
        reads.append(buffers["row_expert"])

    def sum_of(tensors: dict[str, te.Tensor]) -> te.Tensor:
        x, *rest = (tensors[b.name] for b in (xb, *reads))
        if "row_expert" not in tensors:
            return dense_sum(x, *rest, shape=tuple(acc.shape))
        return expert_sum(x, tensors.get("row_token"), *rest, shape=tuple(acc.shape))

    parameters = [*taken, *(p for p in kernel.params if p.name not in QUANTISED)]
    product = replace_stages(kernel, MULTIPLYING, sum_of, [*taken, *reads], acc, parameters)
    return product.without_attr("packed_params").with_attr("op", OPS[str(kernel.attrs["op"])])


def rounded_to_bfloat16(kernel: PrimFunc, keep: bool) -> PrimFunc:
    """Return a kernel that quantises what it computes as one that returns panels; without `keep`
    it returns nothing else."""
    made = MADE if any(p.name in MADE for p in kernel.params) else QUANTISED
    buffers = buffers_by_name(kernel)
    x = buffers.get("out", buffers.get("x"))
    assert x is not None, kernel
    xb = _panels("xb_out" if made is MADE else "xb", x.shape[0], int(x.shape[1]))
    dropped = (*made, *(() if keep else ("out",)))
    parameters = [*(p for p in kernel.params if p.name not in dropped), xb]
    quantising = [name for name in stage_names(kernel) if name in QUANTISING]

    def in_order(tensors: dict[str, te.Tensor]) -> te.Tensor:
        return in_panels(tensors[x.name], xb.name)

    op = str(kernel.attrs["op"])
    rounded = replace_stages(kernel, quantising, in_order, [x], xb, parameters)
    return rounded.with_attr("op", OPS.get(op, op))


def _panels(name: str, rows: ir.Expr, inputs: int) -> Buffer:
    shape = (rows, extent(num_panels(inputs)), extent(PANEL))
    return tirx.decl_buffer(shape, "uint16", name)


def _has_any_rows(function: relax.Function | PrimFunc) -> bool:
    """Whether this is a function of the graph, for a symbolic number of rows."""
    if not isinstance(function, relax.Function):
        return False
    return isinstance(function.params[0].ty.shape[0], tirx.Var)


class _Rewrite:
    """Emits a function anew."""

    def __init__(
        self, builder: relax.BlockBuilder, module: ir.IRModule, function: relax.Function
    ) -> None:
        self.builder, self.module, self.function = builder, module, function
        # What a variable has become: several where rows are gathered later, or nothing.
        self.known: dict[relax.Var, list[relax.Var]] = {}
        self.items: dict[relax.Var, list[list[relax.Var]]] = {}  # of a tuple
        self.read: set[relax.Var] = set()
        structural_walk(function.body, (ir.Call, lambda call: self.read.update(_arguments(call))))

    def emit(self, name: str) -> None:
        function, builder = self.function, self.builder
        with builder.function(name, list(function.params), dict(function.attrs), pure=False):
            for block in function.body.blocks:
                for binding in block.bindings:
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
            *x, row_token = (v for a in _arguments(value) for v in self.known.get(a, [a]))
            self.items[variable] = [[*x, row_token], [], []]
        else:
            self._call(variable, value, kernel)

    def _kernel(self, value: ir.Expr) -> PrimFunc | None:
        """Return the kernel of a call that must change."""
        if not isinstance(value, ir.Call) or value.op != ir.Op.get("relax.call_tir"):
            return None
        kernel = self.module[value.args[0]]
        of_bytes = any(p.name in QUANTISED and len(p.shape) == 3 for p in kernel.params)
        return kernel if of_bytes and str(kernel.attrs["op"]) in (*OPS, GATHER) else None

    def _call(self, variable: relax.Var, value: ir.Call, kernel: PrimFunc) -> None:
        arguments = [v for a in _arguments(value) for v in self.known.get(a, [a])]
        results = kernel.params[len(_arguments(value)) :]
        types = _types(value)
        named = dict(zip((p.name for p in results), types, strict=True))
        if "dot" in stage_names(kernel):
            kernel = product_in_bfloat16(kernel, gathered=len(self.known[_arguments(value)[0]]) > 1)
        made = next((name for name in named if name in (*QUANTISED, *MADE)), None)
        if made is not None:
            kernel = rounded_to_bfloat16(kernel, keep=self._is_read(variable, results, "out"))
        parts = kernel.params[len(arguments) :]
        new = [
            named[p.name] if p.name in named else TensorType((named[made].shape[0], *p.shape[1:]), "uint16")
            for p in parts
        ]
        name = self.builder.add_func(kernel, str(kernel.attrs["op"]))
        result = self.builder.emit(relax.call_tir(name, arguments, new if len(new) > 1 else new[0]))
        if len(types) == 1:
            self.known[variable] = [result]
            return
        several = [self.builder.emit(relax.TupleGetItem(result, i)) for i in range(len(new))] if len(new) > 1 else [result]
        by_name = {p.name: [v] for p, v in zip(parts, several, strict=True)}
        self.items[variable] = [by_name.get(p.name, []) for p in results]
        if made is not None:
            self.items[variable][[p.name for p in results].index(made)] = [several[-1]]

    def _is_read(self, variable: relax.Var, results: Sequence[Buffer], name: str) -> bool:
        names = [p.name for p in results]
        for block in self.function.body.blocks:
            for binding in block.bindings:
                v = binding.value
                if isinstance(v, relax.TupleGetItem) and v.tuple_value.same_as(variable):
                    if names[v.index] == name and binding.var in self.read:
                        return True
        return False


def _arguments(call: ir.Call) -> list[relax.Var]:
    """Return what a kernel is called with."""
    tuples = [a for a in call.args if isinstance(a, relax.Tuple)]
    return list(tuples[0].fields) if tuples else []


def _types(call: ir.Call) -> list[TensorType]:
    return list(call.ty.fields) if isinstance(call.ty, relax.TupleType) else [call.ty]


def _called(module: ir.IRModule, attributes: ir.DictAttrs) -> ir.IRModule:
    """Return the module without the kernels that no function calls."""
    called: set[ir.GlobalVar] = set()
    functions = dict(module.functions_items())
    for name, function in functions.items():
        if isinstance(function, relax.Function):
            called.add(name)
            structural_walk(function.body, (ir.GlobalVar, called.add))
    return ir.IRModule({n: f for n, f in functions.items() if n in called}, attrs=attributes)
