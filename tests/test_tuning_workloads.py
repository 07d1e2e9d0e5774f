"""The workloads of tuning: the kernels of a model, points of a space, and kernels' inputs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from tvm.s_tir import Schedule
from tvm.tirx import PrimFunc

from osscompile.importer.synthetic import gpt_oss_config
from osscompile.kernels import rows as kernels
from osscompile.runtime.trials import inputs
from osscompile.schedules import rule as schedule_rule
from osscompile.schedules.formats import DIGIT, FP4_OFFSET
from osscompile.schedules.records import Choose
from osscompile.targets import Target
from osscompile.tuning import space
from osscompile.tuning.workloads import collect_workloads

# --- Kernels -----------------------------------------------------------------------------------


def test_large_models_are_tuned_without_kernels_twice(this_machine: Target) -> None:
    configs = [gpt_oss_config(num_layers=n, num_experts=e) for n, e in ((24, 32), (36, 128))]
    small, large = (collect_workloads(c, "fast", this_machine) for c in configs)
    for found in (small, large):
        keys = [workload.key for workload in found]
        assert len(keys) == len(set(keys)) >= 6
        ops = {str(workload.function.attrs["op"]) for workload in found}
        assert ops >= {"dense_q8", "moe_mxfp4_sum_q8", "moe_mxfp4_swiglu_q8"}
    assert {w.key for w in small} & {w.key for w in large}  # dense layers are the same


# --- The space ---------------------------------------------------------------------------------


def test_space_is_enumerated_where_later_questions_depend_on_earlier_answers() -> None:
    asked: list[dict[str, int]] = []

    def answer(choose: Choose) -> None:
        point = {"a": choose("a", (1, 2, 3), 1)}
        if point["a"] == 2:
            point["b"] = choose("b", (5, 6), 5)
        asked.append(point)

    assert len(list(space._every_point(answer))) == 4
    assert asked == [{"a": 1}, {"a": 2, "b": 5}, {"a": 2, "b": 6}, {"a": 3}]


def test_large_space_is_sampled_the_same_every_time(
    this_machine: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rule(function: PrimFunc, target: Target, choose: Choose) -> Schedule:
        numbers = [choose(f"digit {i}", range(10), 0) for i in range(3)]
        return Schedule(function.with_attr("numbers", numbers))

    monkeypatch.setattr(schedule_rule, "RULES", {"cpu": (rule,)})
    function = kernels.rms_norm(1, 64, 1e-5)
    points = space.choose_points(function, this_machine, 20)
    assert len({p.program for p in points}) == len(points) == 21
    assert set(points[0].constants.values()) == {0}  # the default comes first
    assert [p.program for p in space.choose_points(function, this_machine, 20)] == [
        p.program for p in points
    ]


def test_constants_that_give_the_same_program_are_one_point(
    this_machine: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rule(function: PrimFunc, target: Target, choose: Choose) -> Schedule:
        return Schedule(function.with_attr("half", choose("n", range(8), 0) // 2))

    monkeypatch.setattr(schedule_rule, "RULES", {"cpu": (rule,)})
    points = space.choose_points(kernels.rms_norm(1, 64, 1e-5), this_machine, 20)
    assert len(points) == 4


# --- Inputs ------------------------------------------------------------------------------------


def test_weights_are_cold_but_take_no_more_memory_than_there_is(this_machine: Target) -> None:
    """The test computes sizes only, and allocates nothing."""
    config = gpt_oss_config(num_layers=36, num_experts=128)
    for workload in collect_workloads(config, "fast", this_machine):
        turns, share = inputs.count_turns(workload.arguments)
        once = sum(a.num_bytes(a.shape) for a in workload.arguments if not a.written)
        assert once * math.ceil(turns * share) < 1300 << 20, workload.key
        assert turns * share * once >= inputs.COLD_BYTES or turns == inputs.MAX_TURNS, workload.key


def test_experts_of_following_calls_differ() -> None:
    argument = expert_argument(num_experts=8, rows=4)
    calls = [inputs._experts(argument, (4,), turn).tolist() for turn in range(3)]
    assert calls == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]
    assert inputs._experts(argument, (4,), 0, repeated=True).tolist() == [0, 0, 1, 1]


def expert_argument(num_experts: int, rows: int) -> Any:
    return inputs.Argument("row_expert", "int32", (rows,), (3,), "experts", 0, num_experts)


@pytest.mark.parametrize("num_digits", [1, 3])
def test_offsets_belong_to_the_numbers(num_digits: int) -> None:
    digits = (num_digits,) if num_digits > 1 else ()
    shape, low, high = (5, 2), DIGIT, FP4_OFFSET
    arguments = (
        inputs.Argument("xq", "int8", (*shape, *digits, 32), (1,), "integers", -60, 61),
        inputs.Argument("xoffset", "int32", shape, (1,), "offsets", low, high),
    )
    arrays = [inputs.make_array(a, a.shape) for a in arguments]
    inputs._set_dependent(arguments, arrays)
    whole = arrays[0].astype(np.int64)
    if digits:
        whole = whole[:, :, 0] * DIGIT**2 + whole[:, :, 1] * DIGIT + whole[:, :, 2]
    np.testing.assert_array_equal(arrays[1], FP4_OFFSET * whole.sum(axis=-1))


def test_random_inputs_are_the_same_on_every_machine() -> None:
    argument = inputs.Argument("x", "float32", (4, 5), (4, 5), "normal")
    first, second = (inputs.make_array(argument, (4, 5)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.ctypes.data % 64 == 0 and np.isfinite(first).all()
