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
    """Reorder the weights of every kernel that declares `packed_params`, and its callers' types.

    A kernel whose rows do not fill whole vectors keeps its layout.
    """
    lanes = target.vector_lanes
    packed = ir.IRModule({}, attrs=module.attrs)
    row_axes: dict[str, dict[int, int]] = {}
    for name, function in module.functions_items():
        if isinstance(function, PrimFunc):
            row_axes[name.name_hint] = _packable(function, lanes)
            function = _pack_kernel(function, row_axes[name.name_hint], lanes)
            packed[name] = function
    layout: dict[str, list[int]] = {}
    for name, function in module.functions_items():
        if isinstance(function, relax.Function):
            function, found = _retype_weights(function, row_axes, lanes)
            packed[name] = function
            layout |= found
    return packed.with_attr(PACKED_ROWS, layout)


def _packable(function: PrimFunc, lanes: int) -> dict[int, int]:
    axes = {int(i): int(axis) for i, axis in function.attrs.get("packed_params", [])}
    rows = {int(function.params[i].shape[axis]) for i, axis in axes.items()}
    return axes if all(count % lanes == 0 for count in rows) else {}


def _pack_kernel(function: PrimFunc, axes: dict[int, int], lanes: int) -> PrimFunc:
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


def _retype_weights(
    function: relax.Function, row_axes: dict[str, dict[int, int]], lanes: int
) -> tuple[relax.Function, dict[str, list[int]]]:
    """Give the packed weights among the function's parameters their new shapes."""
    layout: dict[str, list[int]] = {}
    for block in function.body.blocks:
        for binding in block.bindings:
            call = binding.value
            if isinstance(call, ir.Call) and call.op == ir.Op.get("relax.call_tir"):
                for i, axis in row_axes[call.args[0].name_hint].items():
                    layout[call.args[1].fields[i].name_hint] = [axis, lanes]
    renamed = {}
    for variable in function.params:
        if variable.name_hint in layout:
            axis, _ = layout[variable.name_hint]
            shape = [int(e) for e in variable.ty.shape]
            shape = [*shape[:axis], shape[axis] // lanes, *shape[axis + 1 :], lanes]
            ty = relax.TensorType(shape, variable.ty.dtype)
            renamed[variable] = relax.Var(variable.name_hint, ty)
    return structural_map(function, (relax.Var, lambda v: renamed.get(v, v))), layout
