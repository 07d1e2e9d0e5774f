"""Put other stages in the place of some of a kernel's."""

from collections.abc import Callable, Mapping, Sequence

from tvm import te
from tvm.s_tir import Schedule
from tvm.tirx import Buffer, PrimFunc, Stmt, Var
from tvm_ffi import structural_map

from ..schedules.tail import parts_of_root, rooted

# What makes new stages: from the tensors that they read, by name, to the tensor that they end in.
MakeStages = Callable[[Mapping[str, te.Tensor]], te.Tensor]


def stage_names(function: PrimFunc) -> list[str]:
    sch = Schedule(function)
    return [sch.get(block).name_hint for block in sch.get_child_blocks(sch.get_sblock("root"))]


def buffers_by_name(function: PrimFunc) -> dict[str, Buffer]:
    """Return the tensors of a kernel: its parameters, and those of stages in between."""
    _, between = parts_of_root(function)
    return {buffer.name: buffer for buffer in (*function.params, *between)}


def replace_stages(
    function: PrimFunc,
    dropped: Sequence[str],
    stages: MakeStages,
    reads: Sequence[Buffer],
    result: Buffer,
    parameters: Sequence[Buffer],
) -> PrimFunc:
    """Return the kernel with `stages`, which compute `result` from `reads`, where the first of the
    stages `dropped` was. Its new `parameters` are those of the old that it still needs, and more; a
    tensor that is none of them is memory between stages."""
    names = stage_names(function)
    statements, between = parts_of_root(function)
    inserted, inner = _statements(stages, reads, result)
    at = next(i for i, name in enumerate(names) if name in dropped)
    kept = [(i, s) for i, s in enumerate(statements) if names[i] not in dropped]
    before, after = [s for i, s in kept if i < at], [s for i, s in kept if i > at]
    body = [*before, *inserted, *after]
    used = _written(function, [n for n in names if n not in dropped])
    known = {*used, *(b.name for b in (*inner, result))}
    candidates = [*between, *function.params, *inner, result]
    temporary = {b: None for b in candidates if b.name in known and b not in set(parameters)}
    return PrimFunc(parameters, rooted(body, list(temporary)), attrs=function.attrs)


def _statements(
    stages: MakeStages, reads: Sequence[Buffer], result: Buffer
) -> tuple[list[Stmt], list[Buffer]]:
    """Return the statements of new stages on tensors that exist, and the tensors in between."""
    tensors = {b.name: te.placeholder(b.shape, str(b.dtype), name=b.name) for b in reads}
    made = te.create_prim_func([*tensors.values(), stages(tensors)])
    renames = dict(zip(made.params, [*reads, result], strict=True))
    statements, inner = parts_of_root(made)
    known = (Var, lambda variable: renames.get(variable, variable))
    return [structural_map(statement, known) for statement in statements], inner


def _written(function: PrimFunc, names: Sequence[str]) -> set[str]:
    """Return the names of the tensors that some of a kernel's stages write."""
    sch = Schedule(function)
    return {sch.get(sch.get_sblock(name)).writes[0].source.name for name in names}
