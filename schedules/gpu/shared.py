"""The layout of blocks of 32 bytes in memory that a work-group shares."""

from tvm.ir import Expr

WORDS = 8  # uint32 in a block


def place(row: Expr, word: Expr) -> Expr:
    """Return where a word lies among those of a row's block: threads that read the same words of
    eight neighbouring rows find them in different banks, of which there are 32."""
    return (word + row // 4 * 4) % WORDS
