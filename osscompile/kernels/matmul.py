"""Matrix products: rows of activations x packed weights, for the experts and for the dense layers.

In the experts' kernels every row has its own expert, `row_expert`; rows of one expert follow each
other (`experts.sort_by_expert`), which a schedule may use. Weights appear in the graph as [.., row,
block, word]; `passes/pack_weights.py` gives them the order that the target's vectors read.

Every kernel has the stages `dot` (sum over one block of 32; absent for bfloat16 weights, which have
no blocks), `acc` (float32 sum over blocks) and `out` (bias, residual, SwiGLU). Some have further
stages that read `out`; the attribute `columns_needed` says how many columns of a row these need
together: 1, `BLOCK`, or, if it is absent, all. Such kernels return `out` as their first result,
which gives it memory; it may stay unread.
"""

from collections.abc import Callable
from functools import cache

from tvm import te, tirx
from tvm.ir import Expr
from tvm.tirx import PrimFunc

from ..schedules.formats import (
    BLOCK,
    DIGITS,
    FP4_PER_WORD,
    INT8_PER_WORD,
    Index,
    bf16_to_float32,
    const,
    extent,
    fp4_offset_by_12,
    half_e8m0_to_float32,
    int8_of_word,
    is_few,
    sum_of_digits,
)
from .experts import chosen
from .quantize import quantized

SWIGLU_ALPHA = 1.702  # in gpt-oss; its config.json does not say


@cache
def moe_mxfp4_swiglu(
    activation: str, tokens: Index, experts: int, inputs: int, rows: int, limit: float
) -> PrimFunc:
    """The gate/up projection by each row's expert, with bias and clamped SwiGLU.

    activations (see `_activations`), words [expert, 2, rows, blocks, 4] uint32,
    scales [expert, 2, rows, blocks] uint8, bias [expert, 2, rows] float32, row_expert [tokens]
    int32 -> [tokens, rows] float32, and the tensors that `quantized` makes of it. On axis 1 of the
    weights 0 is gate and 1 is up.
    """
    x = _activations(activation, tokens, inputs)
    words, scales, bias, expert = _expert_weights(tokens, (experts, 2, rows), inputs)
    acc = _expert_sum(x, words, scales, expert, (tokens, 2, rows), inputs)

    def swiglu(i: Expr, r: Expr) -> Expr:
        bound = const(limit, "float32")
        gate, up = (acc[i, extent(h), r] + bias[expert[i], extent(h), r] for h in (0, 1))
        gate = tirx.min(gate, bound)
        up = tirx.max(tirx.min(up, bound), -bound)
        one = const(1.0, "float32")
        # sigmoid(z), with z kept where e^-z is finite
        z = tirx.max(gate * const(SWIGLU_ALPHA, "float32"), const(-87.0, "float32"))
        return gate / (one + tirx.exp(-z)) * (up + one)

    out = te.compute(_shape(tokens, rows), swiglu, name="out")
    tensors = [*x, words, scales, bias, expert, out, *quantized(activation, out, "_out")]
    return _prim_func(f"moe_mxfp4_swiglu_{activation}", tensors, 2, BLOCK)


@cache
def moe_mxfp4_sum(
    activation: str,
    tokens: Index,
    expert_rows: Index,
    experts: int,
    inputs: int,
    rows: int,
    top_k: int,
) -> PrimFunc:
    """The down projection by each row's expert, with bias; then the residual + the weighted sum of
    each token's experts.

    activations of `expert_rows`, words [expert, rows, blocks, 4] uint32, scales [expert, rows,
    blocks] uint8, bias [expert, rows] float32, row_expert [expert_rows] int32; slots [tokens,
    top_k] int32, a token's rows; weights [tokens, top_k], residual [tokens, rows] float32 ->
    [expert_rows, rows] and the sums [tokens, rows] float32.
    """
    x = _activations(activation, expert_rows, inputs)
    words, scales, bias, expert = _expert_weights(expert_rows, (experts, rows), inputs)
    acc = _expert_sum(x, words, scales, expert, (expert_rows, rows), inputs)
    out = te.compute(
        _shape(expert_rows, rows), lambda i, r: acc[i, r] + bias[expert[i], r], name="out"
    )
    slots = te.placeholder(_shape(tokens, top_k), "int32", name="slots")
    weights = te.placeholder(_shape(tokens, top_k), "float32", name="weights")
    residual = te.placeholder(_shape(tokens, rows), "float32", name="residual")

    def total(i: Expr, r: Expr) -> Expr:
        sum_of = residual[i, r]
        for k in range(top_k):
            sum_of = sum_of + out[slots[i, k], r] * weights[i, k]
        return sum_of

    sums = te.compute(_shape(tokens, rows), total, name="sums")
    tensors = [*x, words, scales, bias, expert, slots, weights, residual, out, sums]
    return _prim_func(f"moe_mxfp4_sum_{activation}", tensors, 1, 1)


@cache
def route_bf16(tokens: Index, inputs: int, experts: int, top_k: int) -> PrimFunc:
    """The router: the experts that a token goes to, and their weights.

    x [tokens, inputs] float32, weight [experts, inputs] uint16 (bfloat16 bits), bias [experts]
    float32 -> logits [tokens, experts] float32; the experts' places by logit [tokens, experts]
    int32, the best first, ties to the lower id; the top_k experts of each token [tokens, top_k]
    int32, the best first; and their softmax [tokens, top_k] float32.
    """
    x, weight, acc = _bf16_sum(tokens, inputs, experts)
    bias = te.placeholder(_shape(experts), "float32", name="bias")
    out = te.compute(_shape(tokens, experts), lambda i, e: acc[i, e] + bias[e], name="out")
    tensors = [x, weight, bias, out, *chosen(out, top_k)]
    return _prim_func("route_bf16", tensors, 0)


@cache
def dense_q8(tokens: Index, inputs: int, rows: int, bias: bool, residual: bool) -> PrimFunc:
    """A dense layer of int8 weights, with one float16 scale per 32 inputs, on int8 activations.

    activations, words [rows, blocks, 8] uint32, scales [rows, blocks] float16,
    (bias [rows] float32), (residual [tokens, rows] float32) -> [tokens, rows] float32.
    """
    blocks = inputs // BLOCK
    xq, xs, xoffset = _activations("q8", tokens, inputs)
    words = te.placeholder(_shape(rows, blocks, BLOCK // INT8_PER_WORD), "uint32", name="words")
    scales = te.placeholder(_shape(rows, blocks), "float16", name="scales")
    k = te.reduce_axis((extent(0), extent(BLOCK)), name="k")
    dot = te.compute(
        _shape(tokens, blocks, rows),
        lambda i, g, r: te.sum(
            int8_of_word(words[r, g, k // INT8_PER_WORD], k % INT8_PER_WORD)
            * xq[i, g, k].astype("int32"),
            axis=k,
        ),
        name="dot",
    )
    g = te.reduce_axis((extent(0), extent(blocks)), name="g")
    acc = te.compute(
        _shape(tokens, rows),
        lambda i, r: te.sum(
            dot[i, g, r].astype("float32") * scales[r, g].astype("float32") * xs[i, g], axis=g
        ),
        name="acc",
    )
    extra, out = _dense_output(acc, tokens, rows, bias, residual)
    return _prim_func("dense_q8", [xq, xs, xoffset, words, scales, *extra, out], 0)


@cache
def dense_bf16(tokens: Index, inputs: int, rows: int, bias: bool, residual: bool) -> PrimFunc:
    """A dense layer of bfloat16 weights on float32 activations.

    x [tokens, inputs] float32, weight [rows, inputs] uint16 (bfloat16 bits),
    (bias [rows] float32), (residual [tokens, rows] float32) -> [tokens, rows] float32.
    """
    x, weight, acc = _bf16_sum(tokens, inputs, rows)
    extra, out = _dense_output(acc, tokens, rows, bias, residual)
    return _prim_func("dense_bf16", [x, weight, *extra, out], 0)


def _activations(kind: str, tokens: Index, inputs: int) -> list[te.Tensor]:
    """Return placeholders for the tensors that `quantized` makes."""
    blocks = inputs // BLOCK
    digits = (DIGITS,) if kind == "digits" else ()
    xq = te.placeholder(_shape(tokens, blocks, *digits, BLOCK), "int8", name="xq")
    xs = te.placeholder(_shape(tokens, blocks), "float32", name="xs")
    xoffset = te.placeholder(_shape(tokens, blocks), "int32", name="xoffset")
    return [xq, xs, xoffset]


def _expert_weights(
    tokens: Index, rows: tuple[int, ...], inputs: int
) -> tuple[te.Tensor, te.Tensor, te.Tensor, te.Tensor]:
    blocks = inputs // BLOCK
    words = te.placeholder(_shape(*rows, blocks, BLOCK // FP4_PER_WORD), "uint32", name="words")
    scales = te.placeholder(_shape(*rows, blocks), "uint8", name="scales")
    bias = te.placeholder(_shape(*rows), "float32", name="bias")
    return words, scales, bias, te.placeholder(_shape(tokens), "int32", name="row_expert")


def _expert_sum(
    activation: list[te.Tensor],
    words: te.Tensor,
    scales: te.Tensor,
    expert: te.Tensor,
    shape: tuple[Index, ...],
    inputs: int,
) -> te.Tensor:
    """Sum over the inputs to float32 of `shape` = [tokens, *rows]; `rows` may be several axes."""
    tokens, *rows = shape
    blocks = inputs // BLOCK
    k = te.reduce_axis((extent(0), extent(BLOCK)), name="k")
    g = te.reduce_axis((extent(0), extent(blocks)), name="g")

    def weight(i: Expr, r: tuple[Expr, ...], g: Expr, k: Expr) -> Expr:
        return fp4_offset_by_12(words[(expert[i], *r, g, k // FP4_PER_WORD)], k % FP4_PER_WORD)

    xq, xs, xoffset = activation

    def value(i: Expr, g: Expr, k: Expr) -> Expr:
        if len(xq.shape) == 4:
            return sum_of_digits(lambda digit: xq[i, g, digit, k])
        return xq[i, g, k].astype("int32")

    dot = te.compute(
        _shape(tokens, blocks, *rows),
        lambda i, g, *r: te.sum(weight(i, r, g, k) * value(i, g, k), axis=k),
        name="dot",
    )

    def term(i: Expr, *r: Expr) -> Expr:
        unbiased = dot[(i, g, *r)] - xoffset[i, g]
        scale = half_e8m0_to_float32(scales[(expert[i], *r, g)])
        return te.sum(unbiased.astype("float32") * scale * xs[i, g], axis=g)

    return te.compute(_shape(tokens, *rows), term, name="acc")


def _bf16_sum(tokens: Index, inputs: int, rows: int) -> tuple[te.Tensor, te.Tensor, te.Tensor]:
    """Return x, the weights, and the sums over the inputs [tokens, rows] float32."""
    x = te.placeholder(_shape(tokens, inputs), "float32", name="x")
    weight = te.placeholder(_shape(rows, inputs), "uint16", name="weight")
    k = te.reduce_axis((extent(0), extent(inputs)), name="k")
    acc = te.compute(
        _shape(tokens, rows),
        lambda i, r: te.sum(bf16_to_float32(weight[r, k]) * x[i, k], axis=k),
        name="acc",
    )
    return x, weight, acc


def _dense_output(
    acc: te.Tensor, tokens: Index, rows: int, bias: bool, residual: bool
) -> tuple[list[te.Tensor], te.Tensor]:
    extra: list[te.Tensor] = []
    terms: list[Callable[[Expr, Expr], Expr]] = []
    if bias:
        bias_of = te.placeholder(_shape(rows), "float32", name="bias")
        extra.append(bias_of)
        terms.append(lambda i, r: bias_of[r])
    if residual:
        residual_of = te.placeholder(_shape(tokens, rows), "float32", name="residual")
        extra.append(residual_of)
        terms.append(lambda i, r: residual_of[i, r])

    def output(i: Expr, r: Expr) -> Expr:
        total = acc[i, r]
        for term in terms:
            total = total + term(i, r)
        return total

    return extra, te.compute(_shape(tokens, rows), output, name="out")


def _prim_func(
    op: str, tensors: list[te.Tensor], row_axis: int, columns_needed: int | None = None
) -> PrimFunc:
    """Make the kernel. Schedule rules match `op`; its attribute `packed_params` lists the weights
    that `passes/pack_weights.py` may reorder, as pairs (parameter, axis of its rows)."""
    names = {"words", "scales", "weight"}
    packed = [[i, row_axis] for i, t in enumerate(tensors) if t.op.name in names]
    attributes: dict[str, object] = {"op": op, "packed_params": packed}
    if is_few(tensors[0].shape[0]):  # else the kernel for any number would seem the same
        attributes["few_rows"] = True
    if columns_needed is not None:
        attributes["columns_needed"] = columns_needed
    return te.create_prim_func(tensors).with_attr(attributes)


def _shape(*extents: Index) -> tuple[Expr, ...]:
    return tuple(extent(e) for e in extents)
