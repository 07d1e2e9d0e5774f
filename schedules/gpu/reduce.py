"""Reduce several numbers of each thread over the threads of every subgroup of a work-group.

This goes through shared memory of the caller: TVM's own reduction declares its memory where it
stands, which neither Metal nor OpenCL allows in a loop.
"""

import functools
from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T

from ...targets import Target
from .lanes import combined_lanes


def reduction(
    combine: Callable[[Expr, Expr], Expr], threads: int, count: int, target: Target
) -> Callable[..., object]:
    """Return a macro (numbers, results, all_numbers, some_results, member, thread). It combines the
    `numbers` [count] of all `threads` into `results` [count] float32, the same in every thread.

    It may use `all_numbers` [subgroups, threads, count] and `some_results` [subgroups,
    `num_slices`, count], both shared.
    """
    if target.has_shuffles:
        return _by_shuffles(combine, count)
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


def _by_shuffles(combine: Callable[[Expr, Expr], Expr], count: int) -> Callable[..., object]:
    combine_lanes = combined_lanes(combine)

    @T.macro
    def reduce(numbers, results, all_numbers, some_results, member, thread):  # type: ignore[no-untyped-def]
        for i in T.unroll(count):
            combine_lanes(numbers[i], results, i)

    return reduce  # type: ignore[no-any-return]


def num_slices(threads: int, count: int) -> int:
    """Return in how many slices the threads are first combined, each by `count` threads."""
    return max(n for n in range(1, threads + 1) if threads % n == 0 and n * count <= threads)
