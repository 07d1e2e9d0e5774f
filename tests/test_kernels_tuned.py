"""Kernels under the constants of the committed records, at sizes that those constants divide.

Records are for the shapes of gpt-oss; elsewhere tests compile small kernels, which have none.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from kernel_cases import DECODE, HERE, MATMULS, OTHERS, PREFILL, Case, Form, assert_close
from kernel_runner import Rule
from test_kernels_attention import Layer, every_window
from tvm.s_tir import Schedule
from tvm.tirx import PrimFunc

from osscompile.schedules.records import Choose, records_file
from osscompile.schedules.rule import schedule
from osscompile.targets import Target

Constants = dict[str, int]


def records(target: Target) -> dict[str, Constants]:
    file = records_file(target)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


TARGETS = [target for target in (HERE, *OTHERS) if records(target)]
every_tuned = pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.variant)


def rules(target: Target, op: str) -> list[Rule]:
    """The target's rules, with each of the constants that records of `op` hold."""
    found = [c for key, c in records(target).items() if key.split()[0] == op]
    return [answering(c) for i, c in enumerate(found) if c not in found[:i]]


def answering(constants: Constants) -> Rule:
    def rule(function: PrimFunc, target: Target, choose: Choose) -> Schedule:
        def answer(name: str, candidates: object, default: int) -> int:
            value = constants.get(name, default)
            return value if value in candidates else default  # type: ignore[operator]

        return Schedule(schedule(function, target, answer))

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
        layer = Layer(
            window, "float16", heads=16, head_dim=64, capacity=192, target=target, rule=rule
        )
        qkv = layer.tokens(1, 141)
        expected = layer.expected(qkv)
        for start in range(0, 140, 20):
            assert_close(layer.run(qkv[start : start + 20], start), expected[start : start + 20])
        assert_close(layer.run(qkv[140:], 140, DECODE), expected[140:])


def test_records_name_kernels_that_ask() -> None:
    """A record of a kernel that is no more would stay for ever."""
    ops = {str(make(DECODE).kernel.attrs["op"]) for make in MATMULS} | {"attention"}
    for target in TARGETS:
        assert {key.split()[0] for key in records(target)} <= ops
        assert all(np.all(np.array(list(c.values())) >= 0) for c in records(target).values())
