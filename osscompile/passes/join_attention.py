"""For one token, make one kernel of what is done with its queries, keys and values: rotate them,
extend the cache, attend, and quantise.

What the kernels leave for each other becomes memory of the joined one, which a schedule need not
use. Kernels for several tokens stay apart: a token may see a key that another token appends.
"""

from dataclasses import dataclass

from tvm import ir, relax, tirx
from tvm.relax import BlockBuilder
from tvm.tirx import PrimFunc

from ..schedules.gpu.step_tiles import STEP_OP, takes_step
from ..targets import Target
from .joining import Replaced, Values, concatenated, replace_bindings, with_buffers


def join_attention(module: ir.IRModule, target: Target) -> ir.IRModule:
    """Join the kernels where a schedule of the target takes the joined one."""
    builder = BlockBuilder(module)
    return replace_bindings(module, builder, _Joiner(builder, module, target).find)


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

    def find(self, values: Values) -> Replaced:
        """Return what takes the place of the chains of a function."""
        replaced: Replaced = {}
        for variable, value in values.items():
            chain = self._chain(variable, value, values)
            if chain is not None:
                replaced |= self._replace(chain, values)
        return replaced

    def _chain(self, variable: relax.Var, value: ir.Expr, values: Values) -> _Chain | None:
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

    def _replace(self, chain: _Chain, values: Values) -> Replaced:
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
        replaced: Replaced = {
            v: [] for v, value in values.items() if any(value.same_as(g) for g in gone)
        }
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
    parts = [
        with_buffers(rotate, [qkv, rope, rows, queries]),
        append,
        with_buffers(attend, [queries, keys, values, sinks, rows, tables, out]),
    ]
    results = [out]
    if quantize is not None:
        results = list(quantize.params[1:])
        parts.append(with_buffers(quantize, [out, *results]))
    parameters = [keys, values, qkv, rope, rows, tables, sinks, *results]
    attributes = {key: attend.attrs[key] for key in ("window", "tile_rows")}
    attributes["op"] = STEP_OP if quantize is None else f"{STEP_OP}_q8"
    return concatenated(attributes, parts, parameters)
