"""Kernels that treat every token's row by itself: embed, normalise, quantise, rotate, gather."""

from collections.abc import Callable
from functools import cache

from tvm import te, tirx
from tvm.ir import Expr
from tvm.tirx import PrimFunc

from ..schedules.formats import (
    BLOCK,
    DIGIT,
    DIGITS,
    FP4_OFFSET,
    INT8_PER_WORD,
    Index,
    bf16_to_float32,
    const,
    extent,
    int8_of_word,
)

# The largest whole number whose every digit is DIGIT / 2 - 1.
DIGITS_MAX = sum((DIGIT // 2 - 1) * DIGIT**place for place in range(DIGITS))


@cache
def embed_bf16(tokens: Index, vocab: int, hidden: int) -> PrimFunc:
    """ids [tokens] int32, weight [vocab, hidden] bfloat16 bits -> float32 [tokens, hidden]."""
    ids = te.placeholder((extent(tokens),), "int32", name="ids")
    weight = te.placeholder((extent(vocab), extent(hidden)), "uint16", name="weight")
    out = te.compute(
        (extent(tokens), extent(hidden)),
        lambda i, h: bf16_to_float32(weight[ids[i], h]),
        name="out",
    )
    return _row_func("embed_bf16", [ids, weight, out])


@cache
def embed_q8(tokens: Index, vocab: int, hidden: int) -> PrimFunc:
    """token ids [tokens] int32, words [vocab, hidden/32, 8] uint32, scales [vocab, hidden/32]
    float16 -> [tokens, hidden] float32."""
    ids = te.placeholder((extent(tokens),), "int32", name="ids")
    blocks = (extent(vocab), extent(hidden // BLOCK))
    words = te.placeholder((*blocks, extent(BLOCK // INT8_PER_WORD)), "uint32", name="words")
    scales = te.placeholder(blocks, "float16", name="scales")

    def value(i: Expr, h: Expr) -> Expr:
        word = words[ids[i], h // BLOCK, h % BLOCK // INT8_PER_WORD]
        code = int8_of_word(word, h % INT8_PER_WORD)
        return code.astype("float32") * scales[ids[i], h // BLOCK].astype("float32")

    out = te.compute((extent(tokens), extent(hidden)), value, name="out")
    return _row_func("embed_q8", [ids, words, scales, out])


@cache
def rms_norm(tokens: Index, hidden: int, eps: float) -> PrimFunc:
    """x [tokens, hidden], weight [hidden] float32 -> x / sqrt(mean(x^2) + eps) * weight."""
    return _row_func("rms_norm", _rms_norm(tokens, hidden, eps))


@cache
def rms_norm_q8(tokens: Index, hidden: int, eps: float) -> PrimFunc:
    """`rms_norm` and `quantize_q8` of its result: float32, and int8 with scales and offsets."""
    x, weight, normed = _rms_norm(tokens, hidden, eps)
    return _row_func("rms_norm_q8", [x, weight, normed, *_quantize_q8(normed, tokens, hidden)])


@cache
def take_row(tokens: Index, hidden: int) -> PrimFunc:
    """x [tokens, hidden] float32, index [1] int32 of a token -> its row [1, hidden]."""
    x = te.placeholder((extent(tokens), extent(hidden)), "float32", name="x")
    index = te.placeholder((extent(1),), "int32", name="index")
    out = te.compute((extent(1), extent(hidden)), lambda i, h: x[index[i], h], name="out")
    return _row_func("take_row", [x, index, out])


@cache
def quantize_q8(tokens: Index, inputs: int) -> PrimFunc:
    """x [tokens, inputs] float32 -> int8 [tokens, blocks, 32], and per block of 32 one float32
    scale, and the int32 sum of the int8 values times `FP4_OFFSET`: what a product with offset
    weights has too much.

    scale = max |x| / 127; value = round half to even (x / scale); a block of zeros has scale 0.
    """
    x = te.placeholder((extent(tokens), extent(inputs)), "float32", name="x")
    return _row_func("quantize_q8", [x, *_quantize_q8(x, tokens, inputs)])


@cache
def quantize_digits(tokens: Index, inputs: int) -> PrimFunc:
    """x [tokens, inputs] float32 -> digits int8 [tokens, blocks, 3, 32], and per block of 32 one
    float32 scale, and the int32 sum of the whole numbers times `FP4_OFFSET`.

    A whole number of three digits, at most `DIGITS_MAX`, holds 20 bits of the largest x of a block.
    """
    x = te.placeholder((extent(tokens), extent(inputs)), "float32", name="x")
    shape = (extent(tokens), extent(inputs // BLOCK))
    xs, whole_of = _scaled(x, shape, DIGITS_MAX)
    whole = te.compute((*shape, extent(BLOCK)), whole_of, name="whole")

    def digit(i: Expr, g: Expr, j: Expr, k: Expr) -> Expr:
        # the lowest digit first: each is taken off, centred, before the next
        rest = whole[i, g, k]
        digits: list[Expr] = []
        half = const(DIGIT // 2, "int32")
        for _ in range(DIGITS - 1):
            low = ((rest + half) & const(DIGIT - 1, "int32")) - half
            digits.insert(0, low)
            rest = (rest - low) >> const(DIGIT.bit_length() - 1, "int32")
        value = rest
        for place, low in enumerate(digits, start=1):
            value = tirx.Select(j == place, low, value)
        return value.astype("int8")

    xq = te.compute((*shape, extent(DIGITS), extent(BLOCK)), digit, name="xq")
    return _row_func("quantize_digits", [x, xq, xs, _offset(whole, shape)])


@cache
def gather_rows(activation: str, tokens: Index, hidden: int, expert_rows: Index) -> PrimFunc:
    """What `quantize_q8` ("q8") or `quantize_digits` ("digits") gives of x [tokens, hidden],
    row_token [expert_rows] int32 -> the same of the rows of those tokens."""
    blocks = (extent(tokens), extent(hidden // BLOCK))
    digits = (extent(DIGITS),) if activation == "digits" else ()
    xq = te.placeholder((*blocks, *digits, extent(BLOCK)), "int8", name="xq")
    xs = te.placeholder(blocks, "float32", name="xs")
    xoffset = te.placeholder(blocks, "int32", name="xoffset")
    token = te.placeholder((extent(expert_rows),), "int32", name="row_token")

    def gathered(tensor: te.Tensor) -> te.Tensor:
        return te.compute(
            (extent(expert_rows), *tensor.shape[1:]),
            lambda i, *rest: tensor[(token[i], *rest)],
            name=f"{tensor.op.name}_out",
        )

    tensors = [xq, xs, xoffset]
    return _row_func("gather_rows", [*tensors, token, *map(gathered, tensors)])


@cache
def rotate_queries(
    tokens: Index, heads: int, kv_heads: int, head_dim: int, context: int
) -> PrimFunc:
    """RoPE of the query part of qkv, scaled by 1/sqrt(head_dim).

    qkv [tokens, (heads + 2 kv_heads) head_dim] float32, rope [context, head_dim/2, 2] float32
    (cos, sin), position [1] int32 -> [tokens, heads, head_dim] float32.
    """
    width = (heads + 2 * kv_heads) * head_dim
    qkv = te.placeholder((extent(tokens), extent(width)), "float32", name="qkv")
    table = (extent(context), extent(head_dim // 2), extent(2))
    rope = te.placeholder(table, "float32", name="rope")
    position = te.placeholder((extent(1),), "int32", name="position")

    def query(i: Expr, h: Expr, d: Expr) -> Expr:
        x = rotated(qkv, rope, i, position[0] + i, h * head_dim, d, head_dim)
        return x * const(head_dim**-0.5, "float32")

    out = te.compute((extent(tokens), extent(heads), extent(head_dim)), query, name="out")
    return _row_func("rotate_queries", [qkv, rope, position, out])


def rotated(
    qkv: te.Tensor | tirx.Buffer,
    rope: te.Tensor | tirx.Buffer,
    row: Expr,
    position: Expr,
    start: Expr,
    d: Expr,
    head_dim: int,
) -> Expr:
    """Element d of the head that starts at column `start` of a row, rotated: pairs (d, d + D/2)."""
    half = head_dim // 2
    x = qkv[row, start + d]
    partner = qkv[row, start + (d + half) % head_dim]
    cos, sin = rope[position, d % half, 0], rope[position, d % half, 1]
    return x * cos + tirx.Select(d < half, -partner, partner) * sin


def _rms_norm(tokens: Index, hidden: int, eps: float) -> list[te.Tensor]:
    x = te.placeholder((extent(tokens), extent(hidden)), "float32", name="x")
    weight = te.placeholder((extent(hidden),), "float32", name="weight")
    h = te.reduce_axis((extent(0), extent(hidden)), name="h")
    total = te.compute((extent(tokens),), lambda i: te.sum(x[i, h] * x[i, h], axis=h), name="total")
    out = te.compute(
        (extent(tokens), extent(hidden)),
        lambda i, h: (
            x[i, h]
            / tirx.sqrt(total[i] / const(float(hidden), "float32") + const(eps, "float32"))
            * weight[h]
        ),
        name="out",
    )
    return [x, weight, out]


def _quantize_q8(x: te.Tensor, tokens: Index, inputs: int) -> list[te.Tensor]:
    shape = (extent(tokens), extent(inputs // BLOCK))
    xs, whole_of = _scaled(x, shape, 127)
    xq = te.compute((*shape, extent(BLOCK)), lambda *i: whole_of(*i).astype("int8"), name="xq")
    return [xq, xs, _offset(xq, shape)]


def _scaled(
    x: te.Tensor, shape: tuple[Expr, Expr], most: int
) -> tuple[te.Tensor, Callable[[Expr, Expr, Expr], Expr]]:
    """Scales [tokens, blocks] float32 that make each block's largest x a whole number `most`; and
    the whole number, int32, of (token, block, input)."""
    k = te.reduce_axis((extent(0), extent(BLOCK)), name="k")
    largest = te.compute(
        shape, lambda i, g: te.max(tirx.abs(x[i, g * BLOCK + k]), axis=k), name="largest"
    )
    bound = const(float(most), "float32")
    xs = te.compute(shape, lambda i, g: largest[i, g] / bound, name="xs")

    def whole(i: Expr, g: Expr, k: Expr) -> Expr:
        # a zero scale belongs to zeros: divide them by 1
        zero = const(0.0, "float32")
        scale = tirx.Select(xs[i, g] > zero, xs[i, g], const(1.0, "float32"))
        rounded = tirx.nearbyint(x[i, g * BLOCK + k] / scale)
        # a subnormal scale may be rounded so far down that the quotient exceeds the bound
        return tirx.max(tirx.min(rounded, bound), -bound).astype("int32")

    return xs, whole


def _offset(whole: te.Tensor, shape: tuple[Expr, Expr]) -> te.Tensor:
    k = te.reduce_axis((extent(0), extent(BLOCK)), name="k")
    total = te.compute(
        shape, lambda i, g: te.sum(whole[i, g, k].astype("int32"), axis=k), name="sum_of_whole"
    )
    offset = const(FP4_OFFSET, "int32")
    return te.compute(shape, lambda i, g: total[i, g] * offset, name="xoffset")


def _row_func(op: str, tensors: list[te.Tensor]) -> PrimFunc:
    return te.create_prim_func(tensors).with_attr("op", op)
