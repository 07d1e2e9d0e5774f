"""What the threads of every subgroup of a work-group find together, of several numbers each.

By way of shared memory: TVM's own reduction declares its memory where it stands, and in a loop
neither Metal nor OpenCL has that.
"""

import functools
from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T


def reduction(
    combine: Callable[[Expr, Expr], Expr], threads: int, count: int
) -> Callable[..., object]:
    """Statements of (numbers, results, all_numbers, some_results, member, thread): `results`
    [count] float32 are those of all `threads` numbers [count] combined, in every thread.

    They use `all_numbers` [subgroups, threads, count] and `some_results` [subgroups,
    `num_slices`, count], both shared, and leave the numbers in the first.
    """
    slices = num_slices(threads, count)

    def combined(of: Callable[[int], Expr], number: int) -> Expr:
        return functools.reduce(combine, map(of, range(number)))

    @T.macro
    def reduce(numbers, results, all_numbers, some_results, member, thread):  # type: ignore[no-untyped-def]
        for i in T.unroll(count):
            all_numbers[member, thread, i] = numbers[i]
        if thread < slices * count:
            some_results[member, thread // count, thread % count] = combined(
                lambda i: all_numbers[member, thread // count + slices * i, thread % count],
                threads // slices,
            )
        for i in T.unroll(count):
            results[i] = combined(lambda j: some_results[member, j, i], slices)

    return reduce  # type: ignore[no-any-return]


def num_slices(threads: int, count: int) -> int:
    """Of the threads, each combined by one thread for each of `count` numbers."""
    return max(n for n in range(1, threads + 1) if threads % n == 0 and n * count <= threads)
