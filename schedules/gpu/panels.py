"""Schedule kernels that round rows to bfloat16 and write them as panels (`formats.panel_input`).

A thread takes four neighbouring inputs. In a panel the first and third of them lie side by side, as
do the second and fourth: the thread writes two words.
"""

from collections.abc import Callable

from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc

from ...targets import Target
from ..formats import PANEL, const, float32_to_bf16
from ..records import Choose
from ..stages import Stages, always
from .lanes import LANES, add_lanes
from .launch_before import wait_call

QUAD = 4  # inputs of a thread
QUADS = PANEL // QUAD  # in a panel
THREADS = 256  # of a work-group that rounds
MEMBERS = (4, 8, 12, 16, 24)  # subgroups of one that norms


def panels(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
    """Schedule rounding, alone or after a norm; declines others."""
    op = str(function.attrs["op"])
    if op == "round_bf16":
        return _round(function)
    if op == "rms_norm_bf16" and target.has_shuffles:
        members = choose("members", MEMBERS, 8)
        return _norm(function, members, target.has_dependent_launch)
    return None


def _round(function: PrimFunc) -> Schedule:
    x, xb = function.params
    num_rows, quads, load, write = x.shape[0], _quads(xb), _load(x), _write(xb, int(x.shape[1]))

    @T.macro
    def round_quad(row, quad):  # type: ignore[no-untyped-def]
        values = T.alloc_buffer((QUAD,), "float32", scope="local")
        load(values, 0, row, quad)
        write(values, 0, row, quad)

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        for group in T.thread_binding(
            (num_rows * quads + (THREADS - 1)) // THREADS, thread="blockIdx.x"
        ):
            for thread in T.thread_binding(T.int64(THREADS), thread="threadIdx.x"):
                if group * THREADS + thread < num_rows * quads:
                    round_quad(
                        (group * THREADS + thread) // quads, (group * THREADS + thread) % quads
                    )

    return Schedule(function.with_body(body.body))


def _norm(function: PrimFunc, members: int, waits: bool) -> Schedule:
    """A work-group has a row."""
    x, weight, *outs, xb = function.params
    num_rows, inputs, quads = x.shape[0], int(x.shape[1]), _quads(xb)
    threads = members * LANES
    turns, keeps = -(-quads // threads), bool(outs)
    stages, load, write = Stages(function), _load(x), _write(xb, inputs)

    def normed(row: Expr, value: Expr, scale: Expr, total: Expr) -> Expr:
        loads = {"x": value, "weight": scale, "total": total}
        at = (row, const(0, "int64"))
        return stages.value("out", at, {name: always(number) for name, number in loads.items()})

    @T.macro
    def load_row(values, scales, row, thread):  # type: ignore[no-untyped-def]
        for turn in T.unroll(turns):
            scales[turn * QUAD : turn * QUAD + QUAD] = _vector(
                weight, (), T.min(turn * threads + thread, quads - 1), inputs
            )
        if waits:
            T.evaluate(wait_call())
        for turn in T.unroll(turns):
            load(values, turn * QUAD, row, T.min(turn * threads + thread, quads - 1))

    @T.macro
    def add_squares(total, values, all_members, member, lane):  # type: ignore[no-untyped-def]
        total[0] = T.float32(0)
        for turn in T.unroll(turns):
            if (turn * threads + member * LANES + lane) * QUAD < inputs:
                for i in T.unroll(QUAD):
                    total[0] += values[turn * QUAD + i] * values[turn * QUAD + i]
        add_lanes(total[0], total, 0)
        if lane == 0:
            all_members[member] = total[0]
        total[0] = T.Select(lane < members, all_members[T.min(lane, members - 1)], T.float32(0))
        add_lanes(total[0], total, 0)

    @T.macro
    def write_normed(values, first, row, quad):  # type: ignore[no-untyped-def]
        if keeps:
            if quad * QUAD < inputs:
                outs[0][row, quad * QUAD : quad * QUAD + QUAD] = values.vload(
                    [first], f"float32x{QUAD}"
                )
        write(values, first, row, quad)

    @T.macro
    def normalise(row, member, lane):  # type: ignore[no-untyped-def]
        values = T.alloc_buffer((turns * QUAD,), "float32", scope="local")
        scales = T.alloc_buffer((turns * QUAD,), "float32", scope="local")
        total = T.alloc_buffer((1,), "float32", scope="local")
        all_members = T.alloc_buffer((members,), "float32", scope="shared")
        load_row(values, scales, row, member * LANES + lane)
        add_squares(total, values, all_members, member, lane)
        for i in T.unroll(turns * QUAD):
            values[i] = normed(row, values[i], scales[i], total[0])
        for turn in T.unroll(turns):
            if turn * threads + member * LANES + lane < quads:
                write_normed(values, turn * QUAD, row, turn * threads + member * LANES + lane)

    @T.prim_func(private=True, s_tir=True, check_well_formed=False)
    def body() -> None:
        for row in T.thread_binding(num_rows, thread="blockIdx.x"):
            for member in T.thread_binding(T.int64(members), thread="threadIdx.y"):
                for lane in T.thread_binding(T.int64(LANES), thread="threadIdx.x"):
                    normalise(row, member, lane)

    return Schedule(function.with_body(body.body))


def _quads(xb: Buffer) -> int:
    """Count those of a row, with those of zeros after the last input."""
    return int(xb.shape[1]) * QUADS


def _vector(x: Buffer, row: tuple[Expr, ...], quad: Expr, inputs: int) -> Expr:
    """Return the inputs of a quad; of one after the last, some that exist."""
    last = inputs // QUAD - 1
    quad = quad if inputs % PANEL == 0 else T.min(quad, const(last, "int64"))
    return x.vload([*row, quad * QUAD], f"float32x{QUAD}")


def _load(x: Buffer) -> Callable[..., object]:
    """Return a statement that loads a quad of a row into `values` from `first` on."""
    inputs = int(x.shape[1])

    @T.macro
    def load(values, first, row, quad):  # type: ignore[no-untyped-def]
        values[first : first + QUAD] = _vector(x, (row,), quad, inputs)

    return load  # type: ignore[no-any-return]


def _write(xb: Buffer, inputs: int) -> Callable[..., object]:
    """Return statements that write a quad's two words, from `values` from `first` on."""

    def bits(values: Buffer, i: Expr, quad: Expr) -> Expr:
        rounded = float32_to_bf16(values[i])
        if inputs % PANEL == 0:
            return rounded
        return T.Select(quad * QUAD < inputs, rounded, const(0, "uint16"))

    def place(quad: Expr, word: Expr) -> Expr:
        """Return where in the panel the word of inputs `word` and `word` + 2 of a quad begins."""
        q, high, h = quad % QUADS // 4, quad % 4 // 2, quad % 2
        return high * 32 + word * 16 + h * 8 + q * 2

    @T.macro
    def write(values, first, row, quad):  # type: ignore[no-untyped-def]
        word = T.alloc_buffer((2,), "uint16", scope="local")
        for i in T.unroll(2):
            for side in T.unroll(2):
                word[side] = bits(values, first + i + side * 2, quad)
            xb[row, quad // QUADS, place(quad, i) : place(quad, i) + 2] = word.vload(
                [0], "uint16x2"
            )

    return write  # type: ignore[no-any-return]
