"""What `osscompile tune` measures, and what it found: the files of one kernel's folder.

`plan.json` says how the kernel is called and which libraries hold it, `results.json` what they
took. Both are checked when read. Libraries are code: measure only folders that you trust.
"""

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from .errors import TuningError
from .machine import Machine

FORMAT_VERSION = 1
PLAN = "plan.json"
RESULTS = "results.json"
DTYPES = ("float32", "float16", "int8", "int32", "uint8", "uint16", "uint32")
# What an argument holds. "integers": from `low` up to, not including, `high`; "experts": one of
# `high` experts a row; "offsets": see `inputs._set_offsets`; "output": nothing yet, and if it is of
# digits, to the base `low`; "small": the scales of int8 weights.
FILLS = ("bits", "bfloat16", "experts", "integers", "normal", "offsets", "output", "small")
MAX_BYTES = 2 << 30  # of all arguments together


@dataclass(frozen=True)
class Argument:
    """An argument of a kernel and what it holds when it is called."""

    name: str
    dtype: str
    shape: tuple[int, ...]  # when the kernel is timed
    check_shape: tuple[int, ...]  # when its result is compared: smaller if the kernel allows it
    fill: str
    low: int = 0
    high: int = 0
    written: bool = False  # by the kernel

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Candidate:
    """A library that holds the kernel, scheduled with some constants."""

    library: str  # file name; it follows from the program, so that the same program has the same
    sha256: str
    constants: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """A kernel and its candidates: the first has the default constants."""

    target: str
    variant: str
    system: str  # what a machine needs to measure it
    architecture: str
    cpu_features: tuple[str, ...]
    key: str  # of the kernel in the records
    arguments: tuple[Argument, ...]
    reference: Candidate  # unscheduled: what it computes is right
    candidates: tuple[Candidate, ...]

    @property
    def default(self) -> Candidate:
        return self.candidates[0]


@dataclass(frozen=True)
class Trial:
    """What one candidate took beside the default, a call: medians over rounds of both."""

    seconds: float
    default_seconds: float
    ratio: float  # to the default in the same round
    spread: float  # of the ratio: half of what the middle half of the rounds spans


def write_plan(folder: Path, plan: Plan) -> None:
    write_json(folder / PLAN, {"format_version": FORMAT_VERSION, **asdict(plan)})


def read_plan(folder: Path) -> Plan:
    """Raises TuningError if it is missing or damaged, or asks for more memory than it should."""
    file = folder / PLAN
    fields = _read_object(file, f"a folder that `osscompile tune --emit` wrote, with {PLAN}")
    if fields.pop("format_version", None) != FORMAT_VERSION:
        _damaged(file, f"format version {FORMAT_VERSION}", "another")
    try:
        plan = Plan(
            **fields
            | {
                "cpu_features": tuple(fields["cpu_features"]),
                "arguments": tuple(_argument(a) for a in fields["arguments"]),
                "reference": _candidate(fields["reference"]),
                "candidates": tuple(_candidate(c) for c in fields["candidates"]),
            }
        )
        texts = (plan.target, plan.variant, plan.system, plan.architecture, plan.key)
        _check(all(isinstance(text, str) for text in (*texts, *plan.cpu_features)), "names")
        _check(plan.candidates and any(a.written for a in plan.arguments), "candidates, outputs")
        _check_offsets(plan.arguments)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        _damaged(file, "the fields of a plan", repr(error))
    num_bytes = sum(max(a.num_bytes(a.shape), a.num_bytes(a.check_shape)) for a in plan.arguments)
    if num_bytes > MAX_BYTES:
        _damaged(file, f"arguments of at most {MAX_BYTES} bytes", f"{num_bytes}")
    return plan


def check_machine(folder: Path, plan: Plan) -> None:
    """Raises TuningError unless this machine can run the libraries."""
    here = Machine.here()
    if (plan.system, plan.architecture) != (here.system, here.architecture):
        raise TuningError(
            f"{folder}: made for {plan.system} on {plan.architecture}, this machine is "
            f"{here.system} on {here.architecture}; emit it for this machine's target"
        )
    if missing := [f for f in plan.cpu_features if f not in here.cpu_features]:
        raise TuningError(
            f"{folder}: needs a CPU with {', '.join(plan.cpu_features)}, this one lacks "
            f"{', '.join(missing)}; emit it for another variant (`osscompile targets`)"
        )


def check_libraries(folder: Path, plan: Plan) -> None:
    """Raises TuningError unless they are those planned."""
    for library in (plan.reference, *plan.candidates):
        file = folder / library.library
        found = hash_library(file)
        if found != library.sha256:
            _damaged(file, f"sha256 {library.sha256}", found or "no such file")


def hash_library(file: Path) -> str | None:
    """sha256 of a file in hexadecimal; None if there is none."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def write_trials(folder: Path, plan: Plan, trials: dict[str, Trial]) -> None:
    """`trials`: by the name of their library."""
    measured = {library: asdict(trial) for library, trial in sorted(trials.items())}
    fields = {"key": plan.key, "default": plan.default.library, "trials": measured}
    write_json(folder / RESULTS, {"format_version": FORMAT_VERSION, **fields})


def read_trials(folder: Path, plan: Plan) -> dict[str, Trial]:
    """Trials of the plan's candidates by library; none if the default was another program then.

    Raises TuningError if the file is damaged.
    """
    file = folder / RESULTS
    if not file.exists():
        return {}
    fields = _read_object(file, "results of `osscompile tune`")
    try:
        if fields["key"] != plan.key or fields["default"] != plan.default.library:
            return {}
        trials = {
            c.library: Trial(**fields["trials"][c.library])
            for c in plan.candidates
            if c.library in fields["trials"]
        }
        for trial in trials.values():
            for value in (trial.seconds, trial.default_seconds, trial.ratio, trial.spread):
                _check(isinstance(value, float) and math.isfinite(value) and value >= 0, "times")
    except (KeyError, TypeError, ValueError) as error:
        _damaged(file, "the fields of results", repr(error))
    return trials


def kernel_folders(directory: Path) -> list[Path]:
    """The folders of all kernels; TuningError if there is none."""
    folders = sorted(file.parent for file in directory.glob(f"*/{PLAN}"))
    if not folders:
        raise TuningError(
            f"{directory}: expected a folder that `osscompile tune --emit` wrote, found no {PLAN} "
            "in it; emit it again, or copy all of it"
        )
    return folders


def write_json(file: Path, value: Any) -> None:
    """At once: whoever is interrupted leaves the old contents."""
    staged = file.with_name(f"{file.name}.{os.getpid()}.partial")
    staged.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(staged, file)


def _argument(fields: dict[str, Any]) -> Argument:
    shapes = {name: tuple(fields[name]) for name in ("shape", "check_shape")}
    argument = Argument(**fields | shapes)
    for extent in (*argument.shape, *argument.check_shape):
        _check(type(extent) is int and 0 < extent <= MAX_BYTES, f"extent {extent!r}")
    _check(len(argument.shape) == len(argument.check_shape), "as many extents of both shapes")
    _check(argument.dtype in DTYPES, f"dtype {argument.dtype!r}")
    _check(argument.fill in FILLS, f"fill {argument.fill!r}")
    bounds = (argument.low, argument.high)
    _check(all(type(b) is int and abs(b) < 1 << 31 for b in bounds), f"bounds {bounds!r}")
    if argument.fill in ("integers", "experts"):
        _check(argument.low < argument.high, f"bounds {bounds!r}")
    return argument


def _check_offsets(arguments: tuple[Argument, ...]) -> None:
    """Those that sum int8 numbers need some, and one for each of their rows and blocks."""
    numbers = next((a for a in arguments if a.dtype == "int8"), None)
    for argument in arguments:
        if argument.fill == "offsets":
            if numbers is None:
                raise ValueError("offsets without numbers")
            for shape, of in (
                (argument.shape, numbers.shape),
                (argument.check_shape, numbers.check_shape),
            ):
                _check(shape and shape in (of[:-1], of[:-2]), f"offsets {shape} of {of}")


def _candidate(fields: dict[str, Any]) -> Candidate:
    candidate = Candidate(**fields)
    _check(Path(candidate.library).name == candidate.library, f"name {candidate.library!r}")
    constants = candidate.constants.items()
    _check(all(isinstance(k, str) and type(v) is int for k, v in constants), "constants")
    return candidate


def _check(condition: Any, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _read_object(file: Path, expected: str) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TuningError(f"{file.parent}: expected {expected}, found none; emit it") from error
    except (OSError, ValueError, RecursionError) as error:
        _damaged(file, "a JSON object", repr(error))
    if not isinstance(fields, dict):
        _damaged(file, "a JSON object", type(fields).__name__)
    return fields


def _damaged(file: Path, expected: str, found: str) -> NoReturn:
    raise TuningError(
        f"{file}: expected {expected}, found {found}; copy the folder again, or remove it and "
        "let `osscompile tune` write it again"
    )
