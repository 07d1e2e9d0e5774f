"""Kernels with the constants of the committed records, at sizes that those constants divide.

Records are for the shapes of gpt-oss; other tests compile small kernels, which have none.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from kernel_cases import DECODE, HERE, MATMULS, OTHERS, PREFILL, Case, Form
from kernel_runner import Rule
from test_kernels_attention import Layer, every_window
from tvm.s_tir import Schedule
from tvm.tirx import PrimFunc

from osscompile.schedules.records import Choose, answering, load_records
from osscompile.schedules.rule import schedule
from osscompile.targets import Target

TARGETS = [target for target in (HERE, *OTHERS) if load_records(target)]
every_tuned = pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.variant)


def rules(target: Target, op: str) -> list[Rule]:
    """Return the target's rules with each set of constants in the records of `op`."""
    found = [c for key, c in load_records(target).items() if key.split()[0] == op]
    return [with_constants(c) for i, c in enumerate(found) if c not in found[:i]]


def with_constants(constants: dict[str, int]) -> Rule:
    def rule(function: PrimFunc, target: Target, choose: Choose) -> Schedule:
        return Schedule(schedule(function, target, answering(constants)))

    return rule


@every_tuned
@pytest.mark.parametrize("form", [DECODE, PREFILL], ids=repr)
@pytest.mark.parametrize("make", MATMULS, ids=lambda make: make.__name__)
def test_matmul(target: Target, make: Callable[..., Case], form: Form) -> None:
    case = make(form, 32 * 18, 8 * 96)
    for rule in rules(target, str(case.kernel.attrs["op"])):
        case.check(target, rule)


@every_tuned
@every_window
def test_attention(target: Target, window: int | None) -> None:
    for rule in rules(target, "attention"):
        layer = Layer(window, "float16", heads=16, head_dim=64, target=target, rule=rule)
        layer.check_in_parts(1)


def test_records_name_kernels_that_ask() -> None:
    """Otherwise the record of a kernel that no longer exists would stay for ever."""
    ops = {str(make(DECODE).kernel.attrs["op"]) for make in MATMULS} | {"attention"}
    for target in TARGETS:
        assert {key.split()[0] for key in load_records(target)} <= ops
        assert all(np.all(np.array(list(c.values())) >= 0) for c in load_records(target).values())
