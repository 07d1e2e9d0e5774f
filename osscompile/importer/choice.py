"""The choice of the next token, for devices whose memory the host does not share: `choose`, a
function beside the steps of the graph."""

import math

from tvm import ir, relax
from tvm.relax import BlockBuilder, TensorType
from tvm.tirx import PrimFunc

from ..kernels import choose

CANDIDATES_PER_TASK = 24  # of the vocabulary, when a token is chosen


def with_choose(module: ir.IRModule, vocab: int) -> ir.IRModule:
    """The module and the function `choose` (options [3] int32, logits [1, vocab] float32, mask
    [vocab] float32) -> the token and its logit [1, 2] float32: see `kernels/choose.py`."""
    builder = BlockBuilder(module)
    options = relax.Var("options", TensorType((3,), "int32"))
    logits = relax.Var("logits", TensorType((1, vocab), "float32"))
    mask = relax.Var("mask", TensorType((vocab,), "float32"))

    def call(kernel: PrimFunc, args: list[relax.Var], count: int) -> list[relax.Var]:
        types = [TensorType((count,), "int32")] * 2  # scores and ids
        name = builder.add_func(kernel, str(kernel.attrs["op"]))
        results = builder.emit(relax.call_tir(name, args, types))
        return [builder.emit(relax.TupleGetItem(results, i)) for i in (0, 1)]

    parts = -(-vocab // CANDIDATES_PER_TASK)
    fewer = math.isqrt(parts)
    with builder.function("choose", [options, logits, mask], attrs={"num_input": 1}, pure=False):
        left = call(choose.draw(vocab, parts), [options, logits, mask], parts)
        left = call(choose.narrow(parts, fewer), left, fewer)
        _, token = call(choose.narrow(fewer, 1), left, 1)
        name = builder.add_func(choose.choice(vocab), "choice")
        chosen = relax.call_tir(name, [token, logits], TensorType((1, 2), "float32"))
        builder.emit_func_output(builder.emit(chosen))
    return builder.get()
