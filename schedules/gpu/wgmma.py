"""Products of bfloat16 by the matrix units of NVIDIA's Hopper: a warpgroup multiplies 64 rows of
weights, which its threads hold, with up to 128 rows of activations, which lie in shared memory.

The names are those of functions that a target's source begins with. `MULTIPLY`(sums, weights,
rows) takes the addresses of a thread's sums and of its four words of weights for 16 inputs, and
the description of the activations; it starts the product, which `WAIT` and `FINISH` wait for.
Threads hold what NVIDIA's description of PTX says for wgmma.m64nNk16. Activations lie in rows of
128 bytes, whose pieces of 16 bytes change places (`swizzled`), so that a column of them lies in
different banks.
"""

from tvm.ir import Expr
from tvm.script import tirx as T

from ..formats import PANEL

MULTIPLY = {n: f"wgmma_64x{n}x16" for n in (64, 128)}  # by the number of rows of activations
FINISH = {n: f"wgmma_finish_{n}" for n in MULTIPLY}  # waits for all products; takes the sums
BEGIN = "wgmma_begin"  # before a product of words that were just made
COMMIT = "wgmma_commit"  # ends a group of products
WAIT = "wgmma_wait"  # for all groups but the last
DESCRIBE = "wgmma_describe"  # the description of what begins at an address
MULTIPLY_PAIRS = "multiply_bf16x2"  # of bfloat16 in two words
PACK = "pack_bf16x2"  # rounds two float32 into a word, the first into the lower half
COPY = "copy_16"  # starts a copy of 16 bytes into shared memory
COPY_COMMIT = "copy_commit"  # ends a group of copies
COPY_WAIT = "copy_wait"  # COPY_WAIT<n> waits for all groups but the last n
SHOW = "copy_show"  # lets the matrix units see what this thread has copied

THREADS = 128  # in a warpgroup
WARP = 32
ROWS = 64  # of weights, in a product
INPUTS = 16  # in a product
STEP = PANEL  # inputs whose activations fill a row of shared memory
ROW_WORDS = STEP // 2  # of shared memory
PIECE = 4  # words that lie together
SWIZZLE_BYTES = 1024  # after which pieces lie as at the beginning
DESCRIBED = 16  # bytes that a description counts in


def row(thread: Expr) -> Expr:
    """Return the first of a thread's two rows of weights in a product; the other is 8 below."""
    return thread % THREADS // WARP * 16 + thread % WARP // 4


def quarter(thread: Expr) -> Expr:
    """Return which quarter of the inputs of a step a thread has."""
    return thread % 4


def token(thread: Expr, i: Expr) -> Expr:
    """Return the row of activations of a thread's i-th sum; its weights' row is i // 2 % 2."""
    return i // 4 * 8 + thread % 4 * 2 + i % 2


def swizzled(row: Expr, piece: Expr) -> Expr:
    """Return the word at which a piece of a row lies, counted from a multiple of 1,024 bytes."""
    return row * ROW_WORDS + T.bitwise_xor(piece, row % 8) * PIECE
