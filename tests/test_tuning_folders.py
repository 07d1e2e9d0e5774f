"""Folders of `osscompile tune --emit` that are damaged, or meant for another machine."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from treacherous_kernel import FAST, KNOB, SLOW, emit_tiny, treacherous

from osscompile import cli, targets
from osscompile.runtime.errors import TuningError
from osscompile.runtime.trials.files import read_plan
from osscompile.runtime.trials.measure import measure_kernel
from osscompile.schedules import rule as schedule_rule
from osscompile.schedules.cpu.loops import loops
from osscompile.schedules.cpu.rows import rows as fallback
from osscompile.schedules.formats import DIGIT
from osscompile.targets import Target
from osscompile.tuning.records import read_findings


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A plan and results; tests damage copies of them."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            here = targets.of_this_machine()
        except targets.TargetError as error:
            pytest.skip(str(error))
        rules = (treacherous((SLOW, FAST)), loops, fallback)
        patch.setattr(schedule_rule, "RULES", {"cpu": rules})
        folder = emit_tiny(tmp_path_factory.mktemp("planned"), here)
    measure_kernel(folder)
    yield folder


@pytest.fixture
def copy(planned: Path, tmp_path: Path) -> Path:
    return shutil.copytree(planned, tmp_path / "copy")


def change(file: Path, *path: Any, value: Any) -> None:
    fields = json.loads(file.read_text())
    inner = functools.reduce(lambda part, key: part[key], path[:-1], fields)
    inner[path[-1]] = value
    file.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format_version",), 1),
        (("cpu_features",), None),
        (("arguments",), []),
        (("candidates",), []),
        (("key",), 3),
        (("unknown",), 3),
        (("candidates", 0, "library"), "../plan.json"),
        (("candidates", 0, "constants"), {KNOB: "1"}),
        (("arguments", 0, "dtype"), "float64"),
        (("arguments", 0, "shape"), [512]),
        (("arguments", 0, "shape"), [512, 0]),
        (("arguments", 0, "shape"), [512, 1 << 30]),
        (("arguments", 0, "shape"), [512.0, 64]),
        (("arguments", 0, "fill"), "chaos"),
        (("arguments", 0, "high"), 1 << 40),
        (("arguments", 0), "x"),
    ],
)
def test_damaged_plan(copy: Path, path: tuple[Any, ...], value: Any) -> None:
    change(copy / "plan.json", *path, value=value)
    with pytest.raises(TuningError, match=r"plan.json: expected .*, found"):
        measure_kernel(copy)


@pytest.mark.parametrize("numbers", [(), (5, 2), (5, 3, 32), (5, 2, 1, 3, 32)])
def test_plan_whose_offsets_belong_to_no_numbers(copy: Path, numbers: tuple[int, ...]) -> None:
    plan = json.loads((copy / "plan.json").read_text())
    template = plan["arguments"][0]

    def argument(name: str, dtype: str, shape: tuple[int, ...], fill: str) -> dict[str, Any]:
        shapes = {"shape": shape, "check_shape": shape}
        bounds = {"low": DIGIT, "high": 1000, "written": False}
        return template | {"name": name, "dtype": dtype, "fill": fill} | shapes | bounds

    plan["arguments"].append(argument("xoffset", "int32", (5, 2), "offsets"))
    if numbers:
        plan["arguments"].append(argument("xq", "int8", numbers, "integers"))
    (copy / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(TuningError, match="offsets"):
        read_plan(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 100000])
def test_files_that_are_not_json_objects(copy: Path, this_machine: Target, text: str) -> None:
    for name in ("results.json", "plan.json"):
        (copy / name).write_bytes(text.encode("latin-1"))
        with pytest.raises(TuningError, match=rf"{name}: expected a JSON object"):
            read_findings([copy], this_machine)


@pytest.mark.parametrize("value", [None, "fast", float("nan"), -1.0])
def test_damaged_results(copy: Path, this_machine: Target, value: Any) -> None:
    (library,) = json.loads((copy / "results.json").read_text())["trials"]
    change(copy / "results.json", "trials", library, "ratio", value=value)
    with pytest.raises(TuningError, match=r"results.json: expected the fields of results"):
        read_findings([copy], this_machine)


def test_library_that_was_swapped_is_not_loaded(copy: Path) -> None:
    default, other = (copy / c.library for c in read_plan(copy).candidates)
    shutil.copyfile(default, other)
    with pytest.raises(TuningError, match=rf"{other.name}: expected sha256"):
        measure_kernel(copy)


def test_library_that_is_missing(copy: Path) -> None:
    (copy / read_plan(copy).default.library).unlink()
    with pytest.raises(TuningError, match="found no such file"):
        measure_kernel(copy)


def test_folder_without_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--measure", str(tmp_path)]) == 1
    assert "expected a folder that `osscompile tune --emit` wrote" in capsys.readouterr().err


def test_machine_without_the_cpu_features(copy: Path) -> None:
    (copy / "results.json").unlink()
    change(copy / "plan.json", "cpu_features", value=["flux_capacitor"])
    with pytest.raises(TuningError, match="this one lacks flux_capacitor"):
        measure_kernel(copy)


def test_machine_of_another_architecture(copy: Path) -> None:
    (copy / "results.json").unlink()
    change(copy / "plan.json", "architecture", value="riscv64")
    with pytest.raises(TuningError, match="made for Linux on riscv64, this machine is"):
        measure_kernel(copy)


def test_results_of_another_target(copy: Path, this_machine: Target) -> None:
    change(copy / "plan.json", "target", value="other")
    with pytest.raises(TuningError, match=rf"expected results for {this_machine.name}"):
        read_findings([copy], this_machine)
