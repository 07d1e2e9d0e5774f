"""For one token, make one kernel of what is done with its queries, keys and values: rotate them,
extend the cache, attend, and quantise.

What the kernels leave for each other becomes memory of the joined one, which a schedule need not
use. Kernels for several tokens stay apart: a token may see a key that another token appends.
"""

from dataclasses import dataclass

from tvm import ir, relax, tirx
from tvm.relax import BlockBuilder
from tvm.tirx import Buffer, PrimFunc
from tvm_ffi import structural_map

from ..schedules.gpu.step_tiles import STEP_OP, takes_step
from ..schedules.tail import parts_of_root, rooted
from ..targets import Target
from .drop_uncalled import drop_uncalled


def join_attention(module: ir.IRModule, target: Target) -> ir.IRModule:
    """Join the kernels where a schedule of the target takes the joined one."""
    builder = BlockBuilder(module)
    for name, function in module.functions_items():
        if isinstance(function, relax.Function):
            builder.update_func(name, _Joiner(builder, module, target).join(function))
    return drop_uncalled(builder.get().with_attrs(module.attrs or {}))


@dataclass(frozen=True)
class _Chain:
    """Calls that follow each other: variables of their results, and the calls."""

    rotate: ir.Call
    append: ir.Call
    attend: tuple[relax.Var, ir.Call]
    quantize: tuple[relax.Var, ir.Call] | None


class _Joiner:
    def __init__(self, builder: BlockBuilder, module: ir.IRModule, target: Target) -> None:
        self.builder, self.module, self.target = builder, module, target

    def join(self, function: relax.Function) -> relax.Function:
        bindings = [b for block in function.body.blocks for b in block.bindings]
        values = {binding.var: binding.value for binding in bindings}
        replaced: dict[relax.Var, list[relax.VarBinding]] = {}  # by the variable of a call
        for variable, value in values.items():
            chain = self._chain(variable, value, values)
            if chain is not None:
                replaced |= self._replace(chain, values)
        if not replaced:
            return function
        kept = [b for binding in bindings for b in replaced.get(binding.var, [binding])]
        body = self.builder.normalize(relax.SeqExpr([relax.BindingBlock(kept)], function.body.body))
        return relax.Function(
            function.params, body, function.ret_ty, function.is_pure, function.attrs
        )

    def _chain(
        self, variable: relax.Var, value: ir.Expr, values: dict[relax.Var, ir.Expr]
    ) -> _Chain | None:
        if self._op(value) != "attention" or not isinstance(variable.ty.shape[0], tirx.IntImm):
            return None
        queries, keys, *_ = value.args[1].fields
        if int(variable.ty.shape[0]) != 1:
            return None
        quantize = None
        for other, call in values.items():
            if self._op(call) == "quantize_q8" and call.args[1].fields[0].same_as(variable):
                quantize = other, call
        append = values[values[keys].tuple_value]
        return _Chain(values[queries], append, (variable, value), quantize)

    def _op(self, value: ir.Expr) -> str:
        is_call = isinstance(value, ir.Call) and isinstance(value.args[0], ir.GlobalVar)
        return str(self.module[value.args[0]].attrs["op"]) if is_call else ""

    def _replace(
        self, chain: _Chain, values: dict[relax.Var, ir.Expr]
    ) -> dict[relax.Var, list[relax.VarBinding]]:
        """Return the bindings that take the places of those of a chain, none for most."""
        variable, attend = chain.attend
        last, call = chain.quantize or chain.attend
        calls = [chain.rotate, chain.append, attend, chain.quantize[1] if chain.quantize else None]
        kernels = [None if c is None else self.module[c.args[0]] for c in calls]
        kernel = join_kernels(*kernels)
        if not takes_step(kernel, self.target):
            return {}
        outputs = [variable.ty] if chain.quantize is None else list(last.ty.fields)
        sinks = attend.args[1].fields[3]
        arguments = [*chain.append.args[1].fields, sinks]
        caches = [argument.ty for argument in arguments[:2]]
        name = self.builder.add_func(kernel, str(kernel.attrs["op"]))
        step = relax.op.call_tir_inplace(
            name, arguments, [0, 1, *[-1] * len(outputs)], [*caches, *outputs]
        )
        joined = relax.Var("step", ir.TupleType([*caches, *outputs]))
        bindings = [relax.VarBinding(joined, self.builder.normalize(step))]
        gone = [chain.rotate, chain.append, attend, call]
        replaced: dict[relax.Var, list[relax.VarBinding]]
        replaced = {v: [] for v, value in values.items() if any(value.same_as(g) for g in gone)}
        replaced |= {v: [] for v in attend.args[1].fields[1:3]}  # the caches that it read
        if chain.quantize is None:
            bindings.append(relax.VarBinding(variable, self._item(joined, 2)))
        else:  # whose results are taken out of a tuple too
            for other, value in values.items():
                if isinstance(value, relax.TupleGetItem) and value.tuple_value.same_as(last):
                    item = self._item(joined, 2 + value.index)
                    replaced[other] = [relax.VarBinding(other, item)]
        return replaced | {last: bindings}

    def _item(self, results: relax.Var, index: int) -> ir.Expr:
        return self.builder.normalize(relax.TupleGetItem(results, index))


def join_kernels(
    rotate: PrimFunc, append: PrimFunc, attend: PrimFunc, quantize: PrimFunc | None
) -> PrimFunc:
    """Return the kernel of keys and values, in place, qkv, rope, rows, tables, and sinks -> the
    results of `quantize`, or, without it, of `attend`."""
    keys, values, qkv, rope, rows, tables = append.params
    queries, _, _, sinks, _, _, out = attend.params
    bodies = [
        _with_buffers(rotate, [qkv, rope, rows, queries]),
        append,
        _with_buffers(attend, [queries, keys, values, sinks, rows, tables, out]),
    ]
    left, results = [queries], [out]
    if quantize is not None:
        left, results = [queries, out], list(quantize.params[1:])
        bodies.append(_with_buffers(quantize, [out, *results]))
    parts = [parts_of_root(body) for body in bodies]
    statements = [statement for some, _ in parts for statement in some]
    buffers = [*left, *(buffer for _, some in parts for buffer in some)]
    parameters = [keys, values, qkv, rope, rows, tables, sinks, *results]
    attributes = {key: attend.attrs[key] for key in ("window", "tile_rows")}
    attributes["op"] = STEP_OP if quantize is None else f"{STEP_OP}_q8"
    joined = PrimFunc(parameters, rooted(statements, buffers), attend.ret_type)
    return joined.with_attr({**attributes, "s_tir": True, "tirx.noalias": True})


def _with_buffers(kernel: PrimFunc, buffers: list[Buffer]) -> PrimFunc:
    """Return the kernel with the body that uses these in place of its parameters."""
    renamed = dict(zip(kernel.params, buffers, strict=True))
    rename = (tirx.Var, lambda variable: renamed.get(variable, variable))
    return kernel.with_body(structural_map(kernel.body, rename))
