"""Join kernels that run one after the other, and put calls of the joined ones in their place."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from tvm import ir, relax, tirx
from tvm.relax import BlockBuilder
from tvm.tirx import Buffer, PrimFunc
from tvm_ffi import structural_map

from ..schedules.tail import parts_of_root, rooted
from .drop_uncalled import drop_uncalled

Values: TypeAlias = Mapping[relax.Var, ir.Expr]  # of a function's variables
# What takes the place of a variable's binding: nothing, or one and those that it needs.
Replaced: TypeAlias = dict[relax.Var, list[relax.VarBinding]]


def replace_bindings(
    module: ir.IRModule, builder: BlockBuilder, find: Callable[[Values], Replaced]
) -> ir.IRModule:
    """Return the module with the bindings that `find` gives for each function; kernels that nobody
    calls any more are dropped. `builder`: one of the module, where `find` adds kernels."""
    for name, function in module.functions_items():
        if isinstance(function, relax.Function):
            builder.update_func(name, _replace(function, builder, find))
    return drop_uncalled(builder.get().with_attrs(module.attrs or {}))


def _replace(
    function: relax.Function, builder: BlockBuilder, find: Callable[[Values], Replaced]
) -> relax.Function:
    bindings = [b for block in function.body.blocks for b in block.bindings]
    replaced = find({binding.var: binding.value for binding in bindings})
    if not replaced:
        return function
    kept = [b for binding in bindings for b in replaced.get(binding.var, [binding])]
    body = builder.normalize(relax.SeqExpr([relax.BindingBlock(kept)], function.body.body))
    return relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)


def concatenated(
    attributes: Mapping[str, Any], parts: Sequence[PrimFunc], parameters: Sequence[Buffer]
) -> PrimFunc:
    """Return a kernel that runs all parts; what is none of its parameters is memory in between."""
    bodies = [parts_of_root(part) for part in parts]
    statements = [statement for some, _ in bodies for statement in some]
    buffers = [
        b for part, (_, own) in zip(parts, bodies, strict=True) for b in (*part.params, *own)
    ]
    between = {buffer: None for buffer in buffers if buffer not in set(parameters)}
    joined = PrimFunc(list(parameters), rooted(statements, list(between)), parts[0].ret_type)
    return joined.with_attr({**attributes, "s_tir": True, "tirx.noalias": True})


def with_buffers(kernel: PrimFunc, buffers: Sequence[Buffer]) -> PrimFunc:
    """Return the kernel with these parameters in place of its own."""
    renamed = dict(zip(kernel.params, buffers, strict=True))
    rename = (tirx.Var, lambda variable: renamed.get(variable, variable))
    return PrimFunc(list(buffers), structural_map(kernel.body, rename), kernel.ret_type)
