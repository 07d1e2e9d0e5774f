"""For one token, make three kernels of what follows attention in a layer:

- the norm, quantising and the router's logits;
- gate/up, SwiGLU and quantising;
- down, the weighted sum and the residual.

The last two choose the experts themselves, from the logits. A token's experts all differ, so its
rows need neither sorting nor gathering. What the kernels leave for each other becomes memory of the
joined ones, which a schedule need not use.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import ir, relax, tirx
from tvm.relax import BlockBuilder
from tvm.tirx import PrimFunc

from ..kernels.experts import repeat_row, rows_of_one
from ..schedules.gpu.expert_parts import takes_parts
from ..schedules.gpu.of_one_token import ROUTE_OP, SUM_OP, SWIGLU_OP, takes_one_token
from ..schedules.tail import parts_of_root, rooted
from ..targets import Target
from .joining import Replaced, Values, concatenated, replace_bindings, with_buffers

NUM_ROUTING = 2  # stages of the router that make logits; the others choose


def join_experts(module: ir.IRModule, target: Target) -> ir.IRModule:
    """Join the kernels where schedules of the target take the joined ones."""
    if not takes_parts(target):
        return module
    builder = BlockBuilder(module)
    return replace_bindings(module, builder, _Joiner(builder, module, target).find)


@dataclass(frozen=True)
class Joined:
    """The three kernels: see `join_kernels` for what each takes and returns."""

    route: PrimFunc
    swiglu: PrimFunc
    total: PrimFunc


def join_kernels(norm: PrimFunc, route: PrimFunc, swiglu: PrimFunc, total: PrimFunc) -> Joined:
    """Return the kernels of
    - x, the norm's weight, router, bias -> xq, xs, xoffset, logits;
    - xq, xs, xoffset, words, scales, bias, logits -> xq_out, xs_out, xoffset_out;
    - xq, xs, xoffset, words, scales, bias, logits, residual -> sums.
    """
    x, weight, normed, *quantized = norm.params
    _, router, router_bias, logits, places, ids, weights = route.params
    top_k, inputs = int(ids.shape[1]), int(x.shape[1])
    logits = tirx.decl_buffer(logits.shape, str(logits.dtype), "logits")
    route = with_buffers(route, [normed, router, router_bias, logits, places, ids, weights])
    scoring, choosing = _split(route)

    first = concatenated(
        {"op": ROUTE_OP}, [norm, scoring], [x, weight, router, router_bias, *quantized, logits]
    )
    *rows, words, scales, bias, row_expert, _out, xq_out, xs_out, xoffset_out = swiglu.params
    slots = tirx.decl_buffer((1, top_k), "int32", "slots")
    own = with_buffers(rows_of_one(top_k), [ids, row_expert, slots])
    token = [tirx.decl_buffer((1, *r.shape[1:]), str(r.dtype), r.name) for r in rows]
    repeated = with_buffers(repeat_row(top_k, inputs), [*token, *rows])
    parameters = [*token, words, scales, bias, logits, xq_out, xs_out, xoffset_out]
    second = concatenated({"op": SWIGLU_OP}, [choosing, own, repeated, swiglu], parameters)

    *rows, words, scales, bias, row_expert, slots, its_weights, residual, _out, sums = total.params
    own = with_buffers(rows_of_one(top_k), [ids, row_expert, slots])
    renamed = {its_weights: weights}
    total = with_buffers(total, [renamed.get(p, p) for p in total.params])
    parameters = [*rows, words, scales, bias, logits, residual, sums]
    return Joined(first, second, concatenated({"op": SUM_OP}, [choosing, own, total], parameters))


class _Joiner:
    def __init__(self, builder: BlockBuilder, module: ir.IRModule, target: Target) -> None:
        self.builder, self.module, self.target = builder, module, target

    def find(self, values: Values) -> Replaced:
        """Return what takes the place of the chains of a function."""
        replaced: Replaced = {}
        for variable, value in values.items():
            source = value.tuple_value if isinstance(value, relax.TupleGetItem) else None
            if source is not None and self._is_sum_of_one(values[source]) and value.index == 1:
                replaced |= self._replace(variable, source, values)
        return replaced

    def _kernel(self, call: ir.Expr) -> PrimFunc:
        return self.module[call.args[0]]

    def _is_sum_of_one(self, value: ir.Expr) -> bool:
        """Whether this is the last call of a chain, for a single token."""
        if not isinstance(value, ir.Call) or not isinstance(value.args[0], ir.GlobalVar):
            return False
        kernel = self._kernel(value)
        rows = kernel.params[-1].shape[0]
        is_one = isinstance(rows, tirx.IntImm) and int(rows) == 1
        return str(kernel.attrs["op"]) == "moe_mxfp4_sum_q8" and is_one

    def _replace(self, variable: relax.Var, last: relax.Var, values: Values) -> Replaced:
        """Return the bindings that take the places of those of a chain, none for most; `variable`
        is the result, an item of `last`."""

        def source(item: relax.Var) -> relax.Var:
            return values[item].tuple_value

        total = values[last].args[1].fields
        swiglu_of, sort_of, route_of = source(total[0]), source(total[6]), source(total[8])
        swiglu, route = values[swiglu_of].args[1].fields, values[route_of].args[1].fields
        gather_of, norm_of = source(swiglu[0]), source(route[0])
        chain = (norm_of, route_of, swiglu_of, last)
        joined = join_kernels(*(self._kernel(values[v]) for v in chain))
        if not takes_one_token(joined.route, joined.swiglu, self.target):
            return {}
        norm = values[norm_of].args[1].fields
        first = self._call(joined.route, [*norm, *route[1:]])
        *activation, logits = first[1:]
        second = self._call(joined.swiglu, [*(b.var for b in activation), *swiglu[3:6], logits.var])
        third = self._call(
            joined.total, [*(b.var for b in second[1:]), *total[3:6], logits.var, total[9]]
        )
        gone = {*chain, gather_of, sort_of}
        replaced: Replaced = {v: [] for v in gone}
        for item, value in values.items():
            if isinstance(value, relax.TupleGetItem) and value.tuple_value in gone:
                replaced[item] = []
        (result,) = third
        return replaced | {variable: [*first, *second, relax.VarBinding(variable, result.value)]}

    def _call(self, kernel: PrimFunc, arguments: Sequence[relax.Var]) -> list[relax.VarBinding]:
        """Return the bindings of a call's result, and of its items if it has several."""
        outputs = kernel.params[len(arguments) :]
        types = [relax.TensorType(p.shape, str(p.dtype)) for p in outputs]
        name = self.builder.add_func(kernel, str(kernel.attrs["op"]))
        call = relax.call_tir(name, list(arguments), types if len(types) > 1 else types[0])
        call = self.builder.normalize(call)
        result = relax.Var("step", call.ty)
        bindings = [relax.VarBinding(result, call)]
        for i, ty in enumerate(types if len(types) > 1 else ()):
            item = self.builder.normalize(relax.TupleGetItem(result, i))
            bindings.append(relax.VarBinding(relax.Var("item", ty), item))
        return bindings


def _split(route: PrimFunc) -> tuple[PrimFunc, PrimFunc]:
    """Return the part of the router that makes logits, and the part that chooses."""
    statements, between = parts_of_root(route)
    x, weight, bias, logits, *chosen = route.params
    (acc,) = (buffer for buffer in between if buffer.name == "acc")
    parts = []
    for some, inner, parameters in (
        (statements[:NUM_ROUTING], [acc], [x, weight, bias, logits]),
        (statements[NUM_ROUTING:], [b for b in between if b is not acc], [logits, *chosen]),
    ):
        parts.append(PrimFunc(parameters, rooted(some, inner), route.ret_type))
    return parts[0], parts[1]
