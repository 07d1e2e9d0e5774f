"""Lay the rows of every weight side by side, as many as the target's vectors have lanes.

A weight [.., rows, ..] becomes [.., rows / lanes, .., lanes]: the same word of neighbouring rows
fills one vector. Kernels read through the new layout; `importer/weights.py` writes it.
"""

from tvm import ir, relax, s_tir
from tvm.tirx import PrimFunc
from tvm_ffi import structural_map

from ..targets import Target

PACKED_ROWS = "packed_rows"  # module attribute: {weight: [axis of its rows, lanes]}


def pack_weights(module: ir.IRModule, target: Target) -> ir.IRModule:
    """Reorder the weights of every kernel that declares `packed_params`, and retype its callers.

    A kernel whose rows do not fill whole vectors keeps its layout.
    """
    lanes = target.vector_lanes
    builder = relax.BlockBuilder()  # gives every kernel a name with the new type
    kernels: dict[ir.GlobalVar, tuple[ir.GlobalVar, dict[int, int]]] = {}
    for name, function in module.functions_items():
        if isinstance(function, PrimFunc):
            axes = packable(function, lanes)
            packed = pack_kernel(function, axes, lanes)
            kernels[name] = (builder.add_func(packed, name.name_hint), axes)
    layout: dict[str, list[int]] = {}
    result = builder.get()
    for name, function in module.functions_items():
        if isinstance(function, relax.Function):
            result[name], found = _retype(function, kernels, lanes)
            layout |= found
    return result.with_attr(PACKED_ROWS, layout)


def packable(function: PrimFunc, lanes: int) -> dict[int, int]:
    """Return the weights of a kernel that can be packed, {parameter: axis of its rows}. Vectors of
    one lane need no packing: the checkpoint's order suits them."""
    if lanes == 1:
        return {}
    axes = {int(i): int(axis) for i, axis in function.attrs.get("packed_params", [])}
    rows = {int(function.params[i].shape[axis]) for i, axis in axes.items()}
    return axes if all(count % lanes == 0 for count in rows) else {}


def pack_kernel(function: PrimFunc, axes: dict[int, int], lanes: int) -> PrimFunc:
    """Return the kernel, which now reads the weights of `axes` with `lanes` rows side by side."""
    if not axes:
        return function
    sch = s_tir.Schedule(function)
    for i, axis in axes.items():
        weight = function.params[i].name
        for block in sch.get_child_blocks(sch.get_sblock("root")):
            if any(region.source.name == weight for region in sch.get(block).reads):
                sch.transform_layout(block, weight, _row_map(axis, lanes))
    return sch.mod["main"].without_attr("global_symbol").without_attr("packed_params")


def _row_map(axis: int, lanes: int):  # type: ignore[no-untyped-def]
    return lambda *i: (*i[:axis], i[axis] // lanes, *i[axis + 1 :], i[axis] % lanes)


def _retype(
    function: relax.Function,
    kernels: dict[ir.GlobalVar, tuple[ir.GlobalVar, dict[int, int]]],
    lanes: int,
) -> tuple[relax.Function, dict[str, list[int]]]:
    """Call the packed kernels, and give parameters that are packed weights their new shapes."""
    layout: dict[str, list[int]] = {}
    for block in function.body.blocks:
        for binding in block.bindings:
            call = binding.value
            if isinstance(call, ir.Call) and call.op == ir.Op.get("relax.call_tir"):
                for i, axis in kernels[call.args[0]][1].items():
                    layout[call.args[1].fields[i].name] = [axis, lanes]
    retyped = {}
    for variable in function.params:
        if variable.name in layout:
            axis, _ = layout[variable.name]
            shape = [int(e) for e in variable.ty.shape]
            shape = [*shape[:axis], shape[axis] // lanes, *shape[axis + 1 :], lanes]
            ty = relax.TensorType(shape, variable.ty.dtype)
            retyped[variable] = relax.Var(variable.name, ty)
    renames = [
        (relax.Var, lambda v: retyped.get(v, v)),
        (relax.Tuple, lambda args: relax.Tuple(list(args.fields))),  # a new tuple infers its type
        (ir.GlobalVar, lambda name: kernels[name][0] if name in kernels else name),
    ]
    return structural_map(function, renames), layout
