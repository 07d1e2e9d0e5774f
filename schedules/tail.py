"""Take off the stages that follow a matrix product in its kernel (`osscompile/kernels/matmul.py`),
so that the product is scheduled as if there were none, and put them back."""

from tvm.s_tir import SBlock, SBlockRealize, Schedule
from tvm.tirx import Buffer, PrimFunc, SeqStmt, Stmt


def split_tail(function: PrimFunc) -> tuple[PrimFunc, PrimFunc | None]:
    """Split a kernel after its stage `out` into two with the same parameters; the second is None if
    nothing follows."""
    sch = Schedule(function)
    stages = [sch.get(block) for block in sch.get_child_blocks(sch.get_sblock("root"))]
    count = [stage.name_hint for stage in stages].index("out") + 1
    if count == len(stages):
        return function, None
    statements, buffers = parts_of_root(function)
    parts = []
    for part in (slice(count), slice(count, None)):
        written = {region.source.name for stage in stages[part] for region in stage.writes}
        shared = [buffer for buffer in buffers if buffer.name in written]
        parts.append(function.with_body(rooted(statements[part], shared)))
    return parts[0], parts[1]


def one_after_the_other(first: PrimFunc, second: PrimFunc) -> PrimFunc:
    """Join two kernels with the same parameters to one that runs both."""
    parts = (parts_of_root(first), parts_of_root(second))
    statements, buffers = ([*a, *b] for a, b in zip(*parts, strict=True))
    return first.with_body(rooted(statements, buffers))


def rooted(statements: list[Stmt], buffers: list[Buffer]) -> Stmt:
    """Return a kernel's body: statements one after the other, and the buffers they share."""
    body = SeqStmt(statements) if len(statements) > 1 else statements[0]
    return SBlockRealize([], True, SBlock([], [], [], "root", body, alloc_buffers=buffers))


def parts_of_root(function: PrimFunc) -> tuple[list[Stmt], list[Buffer]]:
    """Return the statements of a kernel, and the buffers that they share."""
    body, buffers = function.body, []
    if isinstance(body, SBlockRealize):
        body, buffers = body.block.body, list(body.block.alloc_buffers)
    return list(body.seq) if isinstance(body, SeqStmt) else [body], buffers
