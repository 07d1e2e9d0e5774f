"""Matrix products: tiles of rows x packed weights, for the experts and for the dense layers.

A tile is the rows of activations that one pass over the weights serves: 1 in decode, more in
prefill. Activations come as [tiles, tile, ...]; the rows of one expert tile have the same expert,
`tile_expert`, and were gathered before. Weights appear in the graph as [.., row, block, word];
`passes/pack_weights.py` gives them the order that the target's vectors read.

Every kernel has the stages `dot` (sum over one block of 32; absent for bfloat16 weights, which have
no blocks), `acc` (float32 sum over blocks) and `out` (bias, residual, SwiGLU).
"""

from collections.abc import Callable
from functools import cache

from tvm import te, tirx
from tvm.ir import Expr
from tvm.tirx import PrimFunc

from ..schedules.formats import (
    BLOCK,
    FP4_OFFSET,
    FP4_PER_WORD,
    INT8_PER_WORD,
    Index,
    bf16_to_float32,
    const,
    extent,
    fp4_offset_by_12,
    half_e8m0_to_float32,
    int8_of_word,
)

SWIGLU_ALPHA = 1.702  # of gpt-oss; not in its config.json


@cache
def moe_mxfp4_swiglu(
    quantized: bool, tiles: Index, tile: int, experts: int, inputs: int, rows: int, limit: float
) -> PrimFunc:
    """gate/up projection of the tiles' experts, bias and clamped SwiGLU.

    activations (see `_activations`), words [expert, 2, rows, blocks, 4] uint32,
    scales [expert, 2, rows, blocks] uint8, bias [expert, 2, rows] float32, tile_expert [tiles]
    int32 -> [tiles, tile, rows] float32. Axis 1 of the weights: 0 gate, 1 up.
    """
    x = _activations(quantized, tiles, tile, inputs)
    words, scales, bias, expert = _expert_weights(tiles, (experts, 2, rows), inputs)

    acc = _expert_sum(x, words, scales, expert, (tiles, tile, 2, rows), inputs)

    def swiglu(i: Expr, t: Expr, r: Expr) -> Expr:
        bound = const(limit, "float32")
        gate, up = (
            acc[i, t, extent(half), r] + bias[expert[i], extent(half), r] for half in (0, 1)
        )
        gate = tirx.min(gate, bound)
        up = tirx.max(tirx.min(up, bound), -bound)
        one = const(1.0, "float32")
        # sigmoid(z) with |z| kept where e^-z is finite
        z = tirx.max(gate * const(SWIGLU_ALPHA, "float32"), const(-87.0, "float32"))
        return gate / (one + tirx.exp(-z)) * (up + one)

    out = te.compute(_shape(tiles, tile, rows), swiglu, name="out")
    return _prim_func("moe_mxfp4_swiglu", quantized, [*x, words, scales, bias, expert, out], 2)


@cache
def moe_mxfp4(
    quantized: bool, tiles: Index, tile: int, experts: int, inputs: int, rows: int
) -> PrimFunc:
    """down projection of the tiles' experts, and bias.

    activations, words [expert, rows, blocks, 4] uint32, scales [expert, rows, blocks] uint8,
    bias [expert, rows] float32, tile_expert [tiles] int32 -> [tiles, tile, rows] float32.
    """
    x = _activations(quantized, tiles, tile, inputs)
    words, scales, bias, expert = _expert_weights(tiles, (experts, rows), inputs)
    acc = _expert_sum(x, words, scales, expert, (tiles, tile, rows), inputs)
    out = te.compute(
        _shape(tiles, tile, rows),
        lambda i, t, r: acc[i, t, r] + bias[expert[i], r],
        name="out",
    )
    return _prim_func("moe_mxfp4", quantized, [*x, words, scales, bias, expert, out], 1)


@cache
def dense_q8(
    tiles: Index, tile: int, inputs: int, rows: int, bias: bool, residual: bool
) -> PrimFunc:
    """A dense layer with int8 weights, one float16 scale per 32 inputs, on int8 activations.

    activations, words [rows, blocks, 8] uint32, scales [rows, blocks] float16,
    (bias [rows] float32), (residual [tiles, tile, rows] float32) -> [tiles, tile, rows] float32.
    """
    blocks = inputs // BLOCK
    xq, xs, xsum = _activations(True, tiles, tile, inputs)
    words = te.placeholder(_shape(rows, blocks, BLOCK // INT8_PER_WORD), "uint32", name="words")
    scales = te.placeholder(_shape(rows, blocks), "float16", name="scales")
    k = te.reduce_axis((extent(0), extent(BLOCK)), name="k")
    dot = te.compute(
        _shape(tiles, blocks, tile, rows),
        lambda i, g, t, r: te.sum(
            int8_of_word(words[r, g, k // INT8_PER_WORD], k % INT8_PER_WORD)
            * xq[i, t, g, k].astype("int32"),
            axis=k,
        ),
        name="dot",
    )
    g = te.reduce_axis((extent(0), extent(blocks)), name="g")
    acc = te.compute(
        _shape(tiles, tile, rows),
        lambda i, t, r: te.sum(
            dot[i, g, t, r].astype("float32") * scales[r, g].astype("float32") * xs[i, t, g],
            axis=g,
        ),
        name="acc",
    )
    extra, out = _dense_output(acc, tiles, tile, rows, bias, residual)
    return _prim_func("dense_q8", True, [xq, xs, xsum, words, scales, *extra, out], 0)


@cache
def dense_bf16(
    tiles: Index, tile: int, inputs: int, rows: int, bias: bool, residual: bool
) -> PrimFunc:
    """A dense layer with bfloat16 weights on float32 activations.

    x [tiles, tile, inputs] float32, weight [rows, inputs] uint16 (bfloat16 bits),
    (bias [rows] float32), (residual [tiles, tile, rows] float32) -> [tiles, tile, rows] float32.
    """
    (x,) = _activations(False, tiles, tile, inputs)
    weight = te.placeholder(_shape(rows, inputs), "uint16", name="weight")
    k = te.reduce_axis((extent(0), extent(inputs)), name="k")
    acc = te.compute(
        _shape(tiles, tile, rows),
        lambda i, t, r: te.sum(bf16_to_float32(weight[r, k]) * x[i, t, k], axis=k),
        name="acc",
    )
    extra, out = _dense_output(acc, tiles, tile, rows, bias, residual)
    return _prim_func("dense_bf16", False, [x, weight, *extra, out], 0)


def _activations(quantized: bool, tiles: Index, tile: int, inputs: int) -> list[te.Tensor]:
    """float32 [tiles, tile, inputs], or, quantized by `rows.quantize_q8`, int8
    [tiles, tile, blocks, 32], scales float32 and sums int32 [tiles, tile, blocks]."""
    if not quantized:
        x = te.placeholder(_shape(tiles, tile, inputs), "float32", name="x")
        return [x]
    blocks = inputs // BLOCK
    xq = te.placeholder(_shape(tiles, tile, blocks, BLOCK), "int8", name="xq")
    xs = te.placeholder(_shape(tiles, tile, blocks), "float32", name="xs")
    xsum = te.placeholder(_shape(tiles, tile, blocks), "int32", name="xsum")
    return [xq, xs, xsum]


def _expert_weights(
    tiles: Index, rows: tuple[int, ...], inputs: int
) -> tuple[te.Tensor, te.Tensor, te.Tensor, te.Tensor]:
    blocks = inputs // BLOCK
    words = te.placeholder(_shape(*rows, blocks, BLOCK // FP4_PER_WORD), "uint32", name="words")
    scales = te.placeholder(_shape(*rows, blocks), "uint8", name="scales")
    bias = te.placeholder(_shape(*rows), "float32", name="bias")
    return words, scales, bias, te.placeholder(_shape(tiles), "int32", name="tile_expert")


def _expert_sum(
    activation: list[te.Tensor],
    words: te.Tensor,
    scales: te.Tensor,
    expert: te.Tensor,
    shape: tuple[Index, ...],
    inputs: int,
) -> te.Tensor:
    """Sum over the inputs, [tiles, tile, *rows] float32; `rows` may be several axes."""
    tiles, tile, *rows = shape
    blocks = inputs // BLOCK
    k = te.reduce_axis((extent(0), extent(BLOCK)), name="k")
    g = te.reduce_axis((extent(0), extent(blocks)), name="g")

    def weight(i: Expr, r: tuple[Expr, ...], g: Expr, k: Expr) -> Expr:
        return fp4_offset_by_12(words[(expert[i], *r, g, k // FP4_PER_WORD)], k % FP4_PER_WORD)

    if len(activation) == 3:
        xq, xs, xsum = activation
        dot = te.compute(
            _shape(tiles, blocks, tile, *rows),
            lambda i, g, t, *r: te.sum(weight(i, r, g, k) * xq[i, t, g, k].astype("int32"), axis=k),
            name="dot",
        )

        def term(i: Expr, t: Expr, *r: Expr) -> Expr:
            unbiased = dot[(i, g, t, *r)] - xsum[i, t, g] * const(FP4_OFFSET, "int32")
            scale = half_e8m0_to_float32(scales[(expert[i], *r, g)])
            return te.sum(unbiased.astype("float32") * scale * xs[i, t, g], axis=g)
    else:
        (x,) = activation
        # One block's sum first: its weights are small integers, scaled once.
        dot = te.compute(
            _shape(tiles, blocks, tile, *rows),
            lambda i, g, t, *r: te.sum(
                (weight(i, r, g, k) - const(FP4_OFFSET, "int32")).astype("float32")
                * x[i, t, g * BLOCK + k],
                axis=k,
            ),
            name="dot",
        )

        def term(i: Expr, t: Expr, *r: Expr) -> Expr:
            scale = half_e8m0_to_float32(scales[(expert[i], *r, g)])
            return te.sum(dot[(i, g, t, *r)] * scale, axis=g)

    return te.compute(_shape(tiles, tile, *rows), term, name="acc")


def _dense_output(
    acc: te.Tensor, tiles: Index, tile: int, rows: int, bias: bool, residual: bool
) -> tuple[list[te.Tensor], te.Tensor]:
    extra: list[te.Tensor] = []
    terms: list[Callable[[Expr, Expr, Expr], Expr]] = []
    if bias:
        bias_of = te.placeholder(_shape(rows), "float32", name="bias")
        extra.append(bias_of)
        terms.append(lambda i, t, r: bias_of[r])
    if residual:
        residual_of = te.placeholder(_shape(tiles, tile, rows), "float32", name="residual")
        extra.append(residual_of)
        terms.append(lambda i, t, r: residual_of[i, t, r])

    def output(i: Expr, t: Expr, r: Expr) -> Expr:
        total = acc[i, t, r]
        for term in terms:
            total = total + term(i, t, r)
        return total

    return extra, te.compute(_shape(tiles, tile, rows), output, name="out")


def _prim_func(op: str, quantized: bool, tensors: list[te.Tensor], row_axis: int) -> PrimFunc:
    """`op` is what schedule rules match; `packed_params` are the weights that
    `passes/pack_weights.py` may reorder: (parameter, axis of its rows) pairs."""
    names = {"words", "scales", "weight"}
    packed = [[i, row_axis] for i, t in enumerate(tensors) if t.op.name in names]
    function = te.create_prim_func(tensors)
    suffix = "_q8" if quantized and not op.endswith("q8") else ""
    return function.with_attr({"op": op + suffix, "packed_params": packed})


def _shape(*extents: Index) -> tuple[Expr, ...]:
    return tuple(extent(e) for e in extents)
