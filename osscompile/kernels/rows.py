"""Kernels that treat every token's row by itself: embed, normalise, rotate, gather."""

from functools import cache

from tvm import te, tirx
from tvm.ir import Expr
from tvm.tirx import PrimFunc

from ..schedules.formats import (
    BLOCK,
    DIGITS,
    FACTS,
    ID,
    INT8_PER_WORD,
    POSITION,
    Index,
    bf16_to_float32,
    const,
    extent,
    int8_of_word,
)
from .quantize import quantized


@cache
def embed_bf16(tokens: Index, vocab: int, hidden: int) -> PrimFunc:
    """rows [tokens, 3] int32, weight [vocab, hidden] bfloat16 bits -> float32 [tokens, hidden]."""
    rows = row_facts(tokens)
    weight = te.placeholder((extent(vocab), extent(hidden)), "uint16", name="weight")
    out = te.compute(
        (extent(tokens), extent(hidden)),
        lambda i, h: bf16_to_float32(weight[rows[i, ID], h]),
        name="out",
    )
    return _row_func("embed_bf16", [rows, weight, out])


@cache
def embed_q8(tokens: Index, vocab: int, hidden: int) -> PrimFunc:
    """rows [tokens, 3] int32, words [vocab, hidden/32, 8] uint32, scales [vocab, hidden/32] float16
    -> [tokens, hidden] float32."""
    rows = row_facts(tokens)
    blocks = (extent(vocab), extent(hidden // BLOCK))
    words = te.placeholder((*blocks, extent(BLOCK // INT8_PER_WORD)), "uint32", name="words")
    scales = te.placeholder(blocks, "float16", name="scales")

    def value(i: Expr, h: Expr) -> Expr:
        word = words[rows[i, ID], h // BLOCK, h % BLOCK // INT8_PER_WORD]
        code = int8_of_word(word, h % INT8_PER_WORD)
        return code.astype("float32") * scales[rows[i, ID], h // BLOCK].astype("float32")

    out = te.compute((extent(tokens), extent(hidden)), value, name="out")
    return _row_func("embed_q8", [rows, words, scales, out])


@cache
def rms_norm(tokens: Index, hidden: int, eps: float) -> PrimFunc:
    """x [tokens, hidden], weight [hidden] float32 -> x / sqrt(mean(x^2) + eps) * weight."""
    return _row_func("rms_norm", _rms_norm(tokens, hidden, eps))


@cache
def rms_norm_quantized(kind: str, tokens: Index, hidden: int, eps: float) -> PrimFunc:
    """Return `rms_norm`, float32 [tokens, hidden], and the tensors that `quantized` makes of it."""
    tensors = _rms_norm(tokens, hidden, eps)
    return _row_func(f"rms_norm_{kind}", [*tensors, *quantized(kind, tensors[-1])])


@cache
def take_rows(tokens: Index, wanted_rows: Index, hidden: int) -> PrimFunc:
    """x [tokens, hidden] float32, wanted [wanted_rows] int32, tokens -> their rows [wanted_rows,
    hidden] float32."""
    x = te.placeholder((extent(tokens), extent(hidden)), "float32", name="x")
    wanted = te.placeholder((extent(wanted_rows),), "int32", name="wanted")
    shape = (extent(wanted_rows), extent(hidden))
    out = te.compute(shape, lambda i, h: x[wanted[i], h], name="out")
    return _row_func("take_rows", [x, wanted, out])


@cache
def gather_rows(activation: str, tokens: Index, hidden: int, expert_rows: Index) -> PrimFunc:
    """The tensors of `quantized` for x [tokens, hidden], row_token [expert_rows] int32 -> the same
    tensors for those tokens' rows."""
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
    """Rotate the queries in qkv (RoPE) and scale them by 1/sqrt(head_dim).

    qkv [tokens, (heads + 2 kv_heads) head_dim] float32, rope [context, head_dim/2, 2] float32
    (cos, sin), rows [tokens, 3] int32 -> [tokens, heads, head_dim] float32.
    """
    width = (heads + 2 * kv_heads) * head_dim
    qkv = te.placeholder((extent(tokens), extent(width)), "float32", name="qkv")
    table = (extent(context), extent(head_dim // 2), extent(2))
    rope = te.placeholder(table, "float32", name="rope")
    rows = row_facts(tokens)

    def query(i: Expr, h: Expr, d: Expr) -> Expr:
        x = rotated(qkv, rope, i, rows[i, POSITION], h * head_dim, d, head_dim)
        return x * const(head_dim**-0.5, "float32")

    out = te.compute((extent(tokens), extent(heads), extent(head_dim)), query, name="out")
    return _row_func("rotate_queries", [qkv, rope, rows, out])


def row_facts(tokens: Index) -> te.Tensor:
    """What a step is told of each row, int32: the columns ID, POSITION and TABLE."""
    return te.placeholder((extent(tokens), extent(FACTS)), "int32", name="rows")


def rotated(
    qkv: te.Tensor | tirx.Buffer,
    rope: te.Tensor | tirx.Buffer,
    row: Expr,
    position: Expr,
    start: Expr,
    d: Expr,
    head_dim: int,
) -> Expr:
    """Return element d, rotated, of the head at column `start` of a row; pairs are (d, d + D/2)."""
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


def _row_func(op: str, tensors: list[te.Tensor]) -> PrimFunc:
    return te.create_prim_func(tensors).with_attr("op", op)
