"""Quantise activations to whole numbers with a scale for every 32, as products with packed weights
take them."""

from collections.abc import Callable
from functools import cache

from tvm import te, tirx
from tvm.ir import Expr
from tvm.tirx import PrimFunc

from ..schedules.formats import BLOCK, DIGIT, DIGITS, FP4_OFFSET, Index, const, extent

# The largest whole number whose every digit is DIGIT / 2 - 1.
DIGITS_MAX = sum((DIGIT // 2 - 1) * DIGIT**place for place in range(DIGITS))


@cache
def quantize(kind: str, tokens: Index, inputs: int) -> PrimFunc:
    """x [tokens, inputs] float32 -> the tensors of `quantized`."""
    x = te.placeholder((extent(tokens), extent(inputs)), "float32", name="x")
    function = te.create_prim_func([x, *quantized(kind, x)])
    return function.with_attr("op", f"quantize_{kind}")


def quantized(kind: str, x: te.Tensor, suffix: str = "") -> list[te.Tensor]:
    """Return x [tokens, inputs] float32 as tensors xq, xs and xoffset; `suffix` ends their names.

    xq: whole numbers, int8 [tokens, blocks, 32] ("q8"), or int8 digits of larger ones, the highest
    first, [tokens, blocks, 3, 32] ("digits"). xs: float32 [tokens, blocks]. xoffset: int32 [tokens,
    blocks], the sum of a block's whole numbers times `FP4_OFFSET`, by which a product with offset
    weights is too large.

    scale = max |x| / the largest whole number (127, or `DIGITS_MAX`); whole number = round half
    to even (x / scale). A block of zeros has scale 0; a block with a NaN has scale NaN, so that it
    shows. Digits hold 20 bits of a block's largest x.
    """
    assert kind in ("q8", "digits")
    tokens, inputs = x.shape
    shape = (tokens, extent(int(inputs) // BLOCK))
    xs, whole_of = _scaled(x, shape, 127 if kind == "q8" else DIGITS_MAX, f"xs{suffix}")
    if kind == "q8":
        whole = xq = te.compute(
            (*shape, extent(BLOCK)), lambda *i: whole_of(*i).astype("int8"), name=f"xq{suffix}"
        )
    else:
        whole = te.compute((*shape, extent(BLOCK)), whole_of, name="whole")
        xq = te.compute(
            (*shape, extent(DIGITS), extent(BLOCK)),
            lambda i, g, j, k: _digit(whole[i, g, k], j),
            name=f"xq{suffix}",
        )
    return [xq, xs, _offset(whole, shape, f"xoffset{suffix}")]


def _digit(whole: Expr, place: Expr) -> Expr:
    """Return digit `place` of a whole number as int8; place 0 is the highest."""
    # from the lowest digit on, each is centred and subtracted before the next
    digits: list[Expr] = []
    half = const(DIGIT // 2, "int32")
    for _ in range(DIGITS - 1):
        low = ((whole + half) & const(DIGIT - 1, "int32")) - half
        digits.insert(0, low)
        whole = (whole - low) >> const(DIGIT.bit_length() - 1, "int32")
    value = whole
    for j, low in enumerate(digits, start=1):
        value = tirx.Select(place == j, low, value)
    return value.astype("int8")


def _scaled(
    x: te.Tensor, shape: tuple[Expr, Expr], most: int, name: str
) -> tuple[te.Tensor, Callable[[Expr, Expr, Expr], Expr]]:
    """Return scales [tokens, blocks] float32 that make each block's largest x the whole number
    `most`, and a function (token, block, input) -> whole number, int32."""
    k = te.reduce_axis((extent(0), extent(BLOCK)), name="k")
    largest = te.compute(
        shape, lambda i, g: te.max(_magnitude(x[i, g * BLOCK + k]), axis=k), name="largest"
    )
    bound = const(float(most), "float32")
    xs = te.compute(
        shape, lambda i, g: tirx.reinterpret("float32", largest[i, g]) / bound, name=name
    )

    def whole(i: Expr, g: Expr, k: Expr) -> Expr:
        # a block of scale 0 holds zeros: divide them by 1
        zero = const(0.0, "float32")
        scale = tirx.Select(xs[i, g] > zero, xs[i, g], const(1.0, "float32"))
        rounded = tirx.nearbyint(x[i, g * BLOCK + k] / scale)
        # a subnormal scale may round down so far that the quotient exceeds the bound
        return tirx.max(tirx.min(rounded, bound), -bound).astype("int32")

    return xs, whole


def _magnitude(x: Expr) -> Expr:
    """Return the bits of |x|, which are ordered as |x| is. NaN is greater than all numbers there,
    while a maximum of floats may pass over it."""
    return tirx.reinterpret("uint32", x) & const(0x7FFFFFFF, "uint32")


def _offset(whole: te.Tensor, shape: tuple[Expr, Expr], name: str) -> te.Tensor:
    k = te.reduce_axis((extent(0), extent(BLOCK)), name="k")
    total = te.compute(
        shape, lambda i, g: te.sum(whole[i, g, k].astype("int32"), axis=k), name="sum_of_whole"
    )
    offset = const(FP4_OFFSET, "int32")
    return te.compute(shape, lambda i, g: total[i, g] * offset, name=name)
