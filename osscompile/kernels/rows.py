"""Kernels that treat every token's row by itself: embed, normalise, quantise, rotate, gather."""

from functools import cache

from tvm import te, tirx
from tvm.ir import Expr
from tvm.tirx import PrimFunc

from ..schedules.formats import (
    BLOCK,
    INT8_PER_WORD,
    Index,
    bf16_to_float32,
    const,
    extent,
    int8_of_word,
)


@cache
def embed_bf16(tiles: Index, tile: int, vocab: int, hidden: int) -> PrimFunc:
    """token ids [tiles, tile] int32, weight [vocab, hidden] bfloat16 bits
    -> [tiles, tile, hidden] float32."""
    ids = te.placeholder((extent(tiles), extent(tile)), "int32", name="ids")
    weight = te.placeholder((extent(vocab), extent(hidden)), "uint16", name="weight")
    out = te.compute(
        (extent(tiles), extent(tile), extent(hidden)),
        lambda i, t, h: bf16_to_float32(weight[ids[i, t], h]),
        name="out",
    )
    return _row_func("embed_bf16", [ids, weight, out])


@cache
def embed_q8(tiles: Index, tile: int, vocab: int, hidden: int) -> PrimFunc:
    """token ids [tiles, tile] int32, words [vocab, hidden/32, 8] uint32, scales
    [vocab, hidden/32] float16 -> [tiles, tile, hidden] float32."""
    ids = te.placeholder((extent(tiles), extent(tile)), "int32", name="ids")
    blocks = (extent(vocab), extent(hidden // BLOCK))
    words = te.placeholder((*blocks, extent(BLOCK // INT8_PER_WORD)), "uint32", name="words")
    scales = te.placeholder(blocks, "float16", name="scales")

    def value(i: Expr, t: Expr, h: Expr) -> Expr:
        word = words[ids[i, t], h // BLOCK, h % BLOCK // INT8_PER_WORD]
        code = int8_of_word(word, h % INT8_PER_WORD)
        return code.astype("float32") * scales[ids[i, t], h // BLOCK].astype("float32")

    out = te.compute((extent(tiles), extent(tile), extent(hidden)), value, name="out")
    return _row_func("embed_q8", [ids, words, scales, out])


@cache
def rms_norm(tiles: Index, tile: int, hidden: int, eps: float) -> PrimFunc:
    """x [tiles, tile, hidden], weight [hidden] float32 -> x / sqrt(mean(x^2) + eps) * weight."""
    x = te.placeholder((extent(tiles), extent(tile), extent(hidden)), "float32", name="x")
    weight = te.placeholder((extent(hidden),), "float32", name="weight")
    h = te.reduce_axis((extent(0), extent(hidden)), name="h")
    total = te.compute(
        (extent(tiles), extent(tile)),
        lambda i, t: te.sum(x[i, t, h] * x[i, t, h], axis=h),
        name="total",
    )
    out = te.compute(
        (extent(tiles), extent(tile), extent(hidden)),
        lambda i, t, h: (
            x[i, t, h]
            / tirx.sqrt(total[i, t] / const(float(hidden), "float32") + const(eps, "float32"))
            * weight[h]
        ),
        name="out",
    )
    return _row_func("rms_norm", [x, weight, out])


@cache
def take_row(tiles: Index, tile: int, hidden: int) -> PrimFunc:
    """x [tiles, tile, hidden] float32, index [1] int32 of a token -> its row [1, 1, hidden]."""
    x = te.placeholder((extent(tiles), extent(tile), extent(hidden)), "float32", name="x")
    index = te.placeholder((extent(1),), "int32", name="index")
    out = te.compute(
        (extent(1), extent(1), extent(hidden)),
        lambda i, t, h: x[index[i] // tile, index[i] % tile, h],
        name="out",
    )
    return _row_func("take_row", [x, index, out])


@cache
def quantize_q8(tiles: Index, tile: int, inputs: int) -> PrimFunc:
    """x [tiles, tile, inputs] float32 -> int8 [tiles, tile, blocks, 32], and per block of 32 one
    float32 scale and the int32 sum of the int8 values.

    scale = max |x| / 127; value = round half to even (x / scale); a block of zeros has scale 0.
    """
    blocks = inputs // BLOCK
    x = te.placeholder((extent(tiles), extent(tile), extent(inputs)), "float32", name="x")
    shape = (extent(tiles), extent(tile), extent(blocks))
    k = te.reduce_axis((extent(0), extent(BLOCK)), name="k")
    largest = te.compute(
        shape,
        lambda i, t, g: te.max(tirx.abs(x[i, t, g * BLOCK + k]), axis=k),
        name="largest",
    )
    xs = te.compute(shape, lambda i, t, g: largest[i, t, g] / const(127.0, "float32"), name="xs")

    def value(i: Expr, t: Expr, g: Expr, k: Expr) -> Expr:
        # a zero scale belongs to zeros: divide them by 1
        zero = const(0.0, "float32")
        scale = tirx.Select(xs[i, t, g] > zero, xs[i, t, g], const(1.0, "float32"))
        rounded = tirx.nearbyint(x[i, t, g * BLOCK + k] / scale)
        # a subnormal scale may be rounded so far down that the quotient exceeds 127
        clipped = tirx.max(tirx.min(rounded, const(127.0, "float32")), const(-127.0, "float32"))
        return clipped.astype("int32").astype("int8")

    xq = te.compute((*shape, extent(BLOCK)), value, name="xq")
    k = te.reduce_axis((extent(0), extent(BLOCK)), name="k")
    xsum = te.compute(
        shape,
        lambda i, t, g: te.sum(xq[i, t, g, k].astype("int32"), axis=k),
        name="xsum",
    )
    return _row_func("quantize_q8", [x, xq, xs, xsum])


@cache
def gather_rows(tiles: Index, tile: int, hidden: int, expert_tiles: Index) -> PrimFunc:
    """x [tiles, tile, hidden] float32, tile_token [expert_tiles, tile] int32 -> the rows of those
    tokens [expert_tiles, tile, hidden]."""
    x = te.placeholder((extent(tiles), extent(tile), extent(hidden)), "float32", name="x")
    shape = (extent(expert_tiles), extent(tile))
    token = te.placeholder(shape, "int32", name="tile_token")
    out = te.compute(
        (*shape, extent(hidden)),
        lambda i, t, h: x[token[i, t] // tile, token[i, t] % tile, h],
        name="out",
    )
    return _row_func("gather_rows", [x, token, out])


@cache
def rotate_queries(
    tiles: Index, tile: int, heads: int, kv_heads: int, head_dim: int, context: int
) -> PrimFunc:
    """RoPE of the query part of qkv, scaled by 1/sqrt(head_dim).

    qkv [tiles, tile, (heads + 2 kv_heads) head_dim] float32, rope [context, head_dim/2, 2] float32
    (cos, sin), position [1] int32 -> [tiles, tile, heads, head_dim] float32.
    """
    width = (heads + 2 * kv_heads) * head_dim
    qkv = te.placeholder((extent(tiles), extent(tile), extent(width)), "float32", name="qkv")
    table = (extent(context), extent(head_dim // 2), extent(2))
    rope = te.placeholder(table, "float32", name="rope")
    position = te.placeholder((extent(1),), "int32", name="position")

    def query(i: Expr, t: Expr, h: Expr, d: Expr) -> Expr:
        x = rotated(qkv, rope, (i, t), position[0] + i * tile + t, h * head_dim, d, head_dim)
        return x * const(head_dim**-0.5, "float32")

    shape = (extent(tiles), extent(tile), extent(heads), extent(head_dim))
    out = te.compute(shape, query, name="out")
    return _row_func("rotate_queries", [qkv, rope, position, out])


def rotated(
    qkv: te.Tensor | tirx.Buffer,
    rope: te.Tensor | tirx.Buffer,
    row: tuple[Expr, ...],
    position: Expr,
    start: Expr,
    d: Expr,
    head_dim: int,
) -> Expr:
    """Element d of the head that starts at column `start` of a row, rotated: pairs (d, d + D/2)."""
    half = head_dim // 2
    x = qkv[(*row, start + d)]
    partner = qkv[(*row, start + (d + half) % head_dim)]
    cos, sin = rope[position, d % half, 0], rope[position, d % half, 1]
    return x * cos + tirx.Select(d < half, -partner, partner) * sin


def _row_func(op: str, tensors: list[te.Tensor]) -> PrimFunc:
    return te.create_prim_func(tensors).with_attr("op", op)
