"""Tiles for GPUs with other constants than the defaults, and numbers of rows around their borders.

They run on the stand-ins for CUDA and Metal, whose kernels use the matrix units, for bytes and for
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from cuda_device import H100
from kernel_cases import (
    HERE,
    Case,
    Form,
    dense_bf16,
    dense_q8,
    moe_mxfp4_sum_digits,
    moe_mxfp4_sum_q8,
    moe_mxfp4_swiglu_digits,
    moe_mxfp4_swiglu_q8,
)
from kernel_runner import LaunchedKernel, Rule, build
from metal_device import needs_gxx, on_this_machine
from tvm.s_tir import Schedule
from tvm.tirx import PrimFunc

from osscompile.importer.graph import TOKENS
from osscompile.schedules.gpu.mma import MMA
from osscompile.schedules.gpu.tiles import tiles
from osscompile.schedules.gpu.tiles_int8 import tiles_int8
from osscompile.schedules.records import Choose
from osscompile.targets import Target

pytestmark = needs_gxx
CASES = [
    dense_q8,
    moe_mxfp4_sum_q8,
    moe_mxfp4_sum_digits,
    moe_mxfp4_swiglu_q8,
    moe_mxfp4_swiglu_digits,
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)


def with_constants(of: Rule, **constants: int) -> Rule:
    """Return the rule `of` with constants for all that it asks."""

    def rule(function: PrimFunc, target: Target, choose: Choose) -> Schedule | None:
        def answer(name: str, candidates: Sequence[int], default: int) -> int:
            assert constants[name] in candidates, (name, candidates)
            return constants[name]

        return of(function, target, answer)

    return rule


@every_case
@pytest.mark.parametrize(
    ("rows", "columns", "blocks"), [(2, 2, 1), (2, 8, 2), (8, 2, 3), (8, 4, 1)]
)
def test_other_constants(case: Callable[..., Case], rows: int, columns: int, blocks: int) -> None:
    """The rows fill no tile; there are 6 blocks of inputs and 64 columns."""
    rule = with_constants(tiles_int8, rows_each=rows, columns_each=columns, blocks_together=blocks)
    checked = case(Form("prefill", TOKENS, 83), 192, 64)
    checked.check(H100, rule)
    main = build(checked.kernel, H100, rule=rule).main
    assert isinstance(main, LaunchedKernel) and f"{MMA}(" in main.source


BORDERS = with_constants(tiles_int8, rows_each=2, columns_each=4, blocks_together=1)


@every_case
@pytest.mark.parametrize("count", [1, 31, 32, 33, 65])
def test_rows_around_the_borders_of_tiles(case: Callable[..., Case], count: int) -> None:
    """Tiles have 32 rows; experts begin and end within them."""
    case(Form("prefill", TOKENS, count), 96, 32).check(H100, BORDERS)


METAL = on_this_machine(HERE)
on_metal = pytest.mark.parametrize(
    "case", [dense_bf16, moe_mxfp4_swiglu_q8], ids=lambda case: case.__name__
)


@on_metal
@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (1, 8), (4, 2), (4, 8)])
def test_other_constants_for_metal(case: Callable[..., Case], rows: int, columns: int) -> None:
    """The rows fill no tile, and there are several tiles of columns."""
    rule = with_constants(tiles, rows_each=rows, columns_each=columns)
    case(Form("prefill", TOKENS, 83), 64, 128).check(METAL, rule)


@on_metal
@pytest.mark.parametrize("count", [1, 31, 32, 33, 65])
def test_rows_around_the_borders_of_tiles_for_metal(case: Callable[..., Case], count: int) -> None:
    case(Form("prefill", TOKENS, count), 96, 32).check(METAL)
