"""What chooses the next tokens, for devices whose memory the host does not share: functions beside
the steps of the graph, which take their logits on; `runtime/chooser.py` calls them.

- `report` tells the most probable tokens, and what log-probabilities are made of;
- `change` adds to some logits;
- `limit` finds the last token that may be drawn, of those within other limits;
- `choose` chooses a token within limits.
"""

import math
from typing import Any, TypeAlias

from tvm import ir, relax, tirx
from tvm.relax import BlockBuilder, TensorType
from tvm.tirx import PrimFunc

from ..kernels import choose, limit, report
from ..runtime.chooser import MOST_CHANGES, OPTIONS, REPORTED, mask_words
from ..schedules.formats import Index

CANDIDATES_PER_TASK = 24  # of the vocabulary, when a token is chosen
CANDIDATES_PER_LIST = 192  # of which a task keeps the best in order

Result: TypeAlias = tuple[tuple[Index, ...], str]  # shape and dtype


def with_choose(module: ir.IRModule, vocab: int, most_rows: int) -> ir.IRModule:
    """The module and the functions that choose for at most `most_rows` rows at once, (inputs,
    logits, [masks, limits]) -> float32: see `kernels/` for each."""
    builder = BlockBuilder(module)
    _Choice(builder, vocab, most_rows, "choose").choose()
    _Choice(builder, vocab, most_rows, "limit").limit()
    _Choice(builder, vocab, most_rows, "report").report()
    _Choice(builder, vocab, most_rows, "change").change()
    return builder.get()


class _Choice:
    """Emits one of the functions."""

    def __init__(self, builder: BlockBuilder, vocab: int, most_rows: int, name: str) -> None:
        self.builder, self.vocab, self.most_rows, self.name = builder, vocab, most_rows, name
        # each function needs symbols of its own
        self.rows, self.changes = (tirx.Var(n, "int64") for n in ("wanted_rows", "changes"))
        self.options = self._variable("options", "int32", self.rows, OPTIONS)
        self.mask_rows = self._variable("mask_rows", "int32", self.rows)
        self.places, self.amounts = (
            self._variable(name, "int32", self.changes) for name in ("places", "amounts")
        )
        self.logits = self._variable("logits", "float32", self.rows, vocab)
        self.masks = self._variable("masks", "uint32", most_rows + 1, mask_words(vocab))
        self.limits = self._variable("limits", "float32", most_rows, 2)

    def choose(self) -> None:
        inputs, bound = [self.options, self.mask_rows], [self.logits, self.masks, self.limits]
        with self._function(inputs, bound, wanted_rows=self.most_rows):
            scores, ids = self._best(is_greedy=False)
            kernel = choose.choice(self.vocab)
            self._emit_result(kernel, [scores, ids, self.logits], self.rows, 2)

    def limit(self) -> None:
        inputs, bound = [self.options, self.mask_rows], [self.logits, self.masks, self.limits]
        with self._function(inputs, bound, wanted_rows=self.most_rows):
            _, ids = self._best(is_greedy=True)
            state_shape = (self.rows, limit.STATE)
            (state,) = self._call(limit.begin(), [], (state_shape, "int32"))
            shape = (self.rows, limit.num_parts(self.vocab), limit.DIGITS)
            sums, decide = limit.sums(self.vocab, self.most_rows), limit.decide(self.vocab)
            for _ in range(limit.num_levels(self.vocab)):
                (summed,) = self._call(sums, [*inputs, *bound, ids, state], (shape, "float32"))
                arguments = [self.options, summed, state]
                (state,) = self._call(decide, arguments, (state_shape, "int32"))
            kernel = limit.finish(self.vocab, self.most_rows)
            arguments = [self.options, self.logits, ids, state]
            self._emit_result(kernel, arguments, self.most_rows, 2)

    def report(self) -> None:
        parts = -(-self.vocab // CANDIDATES_PER_LIST)
        fewer = math.isqrt(parts)
        with self._function(
            [self.mask_rows], [self.logits, self.masks], wanted_rows=self.most_rows
        ):
            kernel = report.best_logits(self.vocab, parts, self.most_rows)
            lists = self._call(kernel, [self.logits, self.masks], *self._lists(parts))
            lists = self._call(report.best_of(parts, fewer), lists, *self._lists(fewer))
            lists = self._call(report.best_of(fewer, 1), lists, *self._lists(1))
            kernel = report.masses(self.vocab, self.most_rows)
            shape = (self.rows, limit.num_parts(self.vocab))
            (masses,) = self._call(kernel, [self.logits, self.masks, lists[1]], (shape, "float32"))
            kernel = report.report(self.vocab)
            self._emit_result(kernel, [*lists, self.logits, masses], self.rows, 2 + 2 * REPORTED)

    def change(self) -> None:
        with self._function([self.places, self.amounts], [self.logits], changes=MOST_CHANGES):
            taken = self._call(
                choose.take_logits(self.vocab),
                [self.places, self.logits],
                ((self.changes, 1), "float32"),
            )
            self.builder.emit(
                relax.op.call_tir_inplace(
                    self._add(choose.change_logits(self.vocab)),
                    [self.logits, self.places, self.amounts],
                    [0],
                    [self.logits.ty],
                )
            )
            self.builder.emit_func_output(taken[0])

    def _best(self, is_greedy: bool) -> list[relax.Var]:
        """The score and the id of each row's token [rows, 1]: that is drawn, or the best."""
        parts = -(-self.vocab // CANDIDATES_PER_TASK)
        fewer = math.isqrt(parts)
        kernel = choose.draw(self.vocab, parts, self.most_rows, is_greedy)
        arguments = [self.options, self.mask_rows, self.logits, self.masks, self.limits]
        left = self._call(kernel, arguments, *[((self.rows, parts), "int32")] * 2)
        left = self._call(choose.narrow(parts, fewer), left, *[((self.rows, fewer), "int32")] * 2)
        return self._call(choose.narrow(fewer, 1), left, *[((self.rows, 1), "int32")] * 2)

    def _lists(self, parts: int) -> list[Result]:
        return [((self.rows, parts, REPORTED), "int32")] * 2

    def _function(self, inputs: list[relax.Var], bound: list[relax.Var], **most: int) -> Any:
        """Begin the function, whose symbols stand for so much at most; for a `with` statement."""
        attributes = {"num_input": len(inputs), "tir_var_upper_bound": most}
        return self.builder.function(self.name, [*inputs, *bound], attrs=attributes, pure=False)

    def _add(self, kernel: PrimFunc) -> ir.GlobalVar:
        return self.builder.add_func(kernel, str(kernel.attrs["op"]))

    def _call(
        self, kernel: PrimFunc, arguments: list[relax.Var], *results: Result
    ) -> list[relax.Var]:
        types = [TensorType(shape, dtype) for shape, dtype in results]
        out = self.builder.emit(
            relax.call_tir(self._add(kernel), arguments, types if len(types) > 1 else types[0])
        )
        if len(types) == 1:
            return [out]
        return [self.builder.emit(relax.TupleGetItem(out, i)) for i in range(len(types))]

    def _emit_result(self, kernel: PrimFunc, arguments: list[relax.Var], *shape: Index) -> None:
        (result,) = self._call(kernel, arguments, (shape, "float32"))
        self.builder.emit_func_output(result)

    def _variable(self, name: str, dtype: str, *shape: Index) -> relax.Var:
        return relax.Var(name, TensorType(shape, dtype))
