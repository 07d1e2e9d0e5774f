"""Read from a kernel what the schedules of matrix products need: its tensors and its last stage."""

from collections.abc import Callable, Sequence

from tvm.ir import Expr
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.tirx import Buffer, PrimFunc

from .formats import (
    BLOCK,
    DIGITS,
    FP4_OFFSET,
    FP4_PER_WORD,
    INT8_PER_WORD,
    bf16_to_float32,
    const,
    fp4_offset_by_12,
    half_e8m0_to_float32,
    int8_of_word,
    sum_of_digits,
)
from .stages import Load, Stages

OPS = (
    "moe_mxfp4_sum_digits",
    "moe_mxfp4_sum_q8",
    "moe_mxfp4_swiglu_digits",
    "moe_mxfp4_swiglu_q8",
    "dense_q8",
    "dense_bf16",
    "route_bf16",
)


def whole_parts(count: int, candidates: Sequence[int], wanted: int) -> tuple[list[int], int]:
    """Return the candidates that divide `count`, at least one, and the greatest up to `wanted`."""
    fitting = [n for n in candidates if count % n == 0] or [1]
    return fitting, max((n for n in fitting if n <= wanted), default=fitting[0])


class Product:
    """A kernel of `osscompile/kernels/matmul.py` whose weights are packed in groups of rows.

    Rows are those of the activations; the rows of the weights are called columns here.
    """

    def __init__(self, function: PrimFunc) -> None:
        self.function = function
        self.tensors = {parameter.name: parameter for parameter in function.params}
        self.out = self.tensors["out"] if "out" in self.tensors else _result_between(function)
        self.num_rows, self.columns = self.out.shape[0], int(self.out.shape[1])
        self.expert = self.tensors.get("row_expert")
        in_digits = "xq" in self.tensors and len(self.tensors["xq"].shape) == 4
        self.digits = DIGITS if in_digits else 1  # int8 digits of a whole number
        self.halves = 2 if "swiglu" in str(function.attrs["op"]) else 1  # gate and up
        if "xq" in self.tensors:
            self.blocks = int(self.tensors["xq"].shape[1])
        elif "xb" in self.tensors:
            self.blocks = int(self.tensors["scales"].shape[-1])
        else:
            self.blocks = int(self.tensors["x"].shape[1]) // BLOCK

    def expert_of(self, row: Expr) -> Expr:
        return T.int64(0) if self.expert is None else self.expert[row].astype("int64")

    def weight_at(self, expert: Expr, half: Expr, group: Expr, block: Expr) -> tuple[Expr, ...]:
        """Return the first indices of a block in words and scales."""
        if self.expert is None:
            return (group, block)
        return (expert, half, group, block) if self.halves == 2 else (expert, group, block)

    def weight(
        self, expert: Expr, half: Expr, group: Expr, block: Expr, k: Expr, *lane: Expr
    ) -> Expr:
        """Return the weight of input k in a block, float32; `lane` is a column of a group."""
        if "weight" in self.tensors:
            return bf16_to_float32(self.tensors["weight"][(group, block * BLOCK + k, *lane)])
        at = self.weight_at(expert, half, group, block)
        words, scale = self.tensors["words"], self.tensors["scales"][(*at, *lane)]
        if self.expert is None:
            code = int8_of_word(words[(*at, k // INT8_PER_WORD, *lane)], k % INT8_PER_WORD)
            return code.astype("float32") * scale.astype("float32")
        value = fp4_offset_by_12(words[(*at, k // FP4_PER_WORD, *lane)], k % FP4_PER_WORD)
        doubled = value - const(FP4_OFFSET, "int32")
        return doubled.astype("float32") * half_e8m0_to_float32(scale)

    def whole_activation(self, row: Expr, block: Expr, k: Expr) -> Expr:
        """Return input k of a block of quantised activations as int32, without its scale."""
        xq = self.tensors["xq"]
        if self.digits > 1:
            return sum_of_digits(lambda digit: xq[row, block, digit, k])
        return xq[row, block, k].astype("int32")

    def activation(self, row: Expr, block: Expr, k: Expr) -> Expr:
        """Return input k of a block as float32."""
        if "x" in self.tensors:
            return self.tensors["x"][row, block * BLOCK + k]
        return (
            self.whole_activation(row, block, k).astype("float32") * self.tensors["xs"][row, block]
        )

    def continues(self, row: Expr, first: Expr, most: int) -> Expr:
        """Whether `row` is one of the at most `most` rows from `first` on that share weights; a row
        past the last is not."""
        more = T.And(row < self.num_rows, row - first < most)
        if self.expert is None:
            return more
        bounded = T.min(row, self.num_rows - 1)
        return T.And(more, self.expert[bounded] == self.expert[first])

    def next_run(self, most: int) -> Callable[..., object]:
        """Return statements that set [first, end) to the next rows, `most` at most, that share
        weights."""
        continues = self.continues

        @T.macro
        def next_run(first, end):  # type: ignore[no-untyped-def]
            first[0] = end[0]
            end[0] = first[0] + T.int64(1)
            while continues(end[0], first[0], most):
                end[0] += T.int64(1)

        return next_run  # type: ignore[no-any-return]

    def output(
        self,
        at_row: Expr,
        at_column: Expr,
        sum_of: Callable[[Expr], Expr],
        expert: Expr | None = None,
    ) -> Expr:
        """Return the kernel's last stage, applied to sums that are computed elsewhere; `expert`, if
        it is given, is known to be the row's."""
        loads: dict[str, Load] = {
            "acc": lambda indices: sum_of(indices[1] if self.halves == 2 else T.int64(0))
        }
        if expert is not None:
            loads["row_expert"] = lambda indices: expert.astype("int32")
        return Stages(self.function).value("out", (at_row, at_column), loads)


def _result_between(function: PrimFunc) -> Buffer:
    """Return what the stage `out` computes where it is no result, but read by a further stage."""
    sch = Schedule(function)
    return sch.get(sch.get_sblock("out")).writes[0].source
