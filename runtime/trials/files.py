"""The files of one kernel's folder: what `osscompile tune` measures, and what it found.

`plan.json` says how the kernel is called, which libraries hold its candidates, and which file holds
the right answer; `results.json` says what the candidates took. Both are checked when they are read.
Libraries are code: measure only folders that you trust.
"""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..devices.launch_devices import LAUNCH_DEVICES
from ..devices.program import Launches, parse_launches
from ..errors import TuningError
from ..machine import Machine
from ..manifest import ANY, DEVICES, RUNTIMES

FORMAT_VERSION = 3
PLAN = "plan.json"
RESULTS = "results.json"
DTYPES = ("float32", "float16", "int8", "int32", "uint8", "uint16", "uint32")
# The contents of an argument. "integers": from `low` up to, not including, `high`; "indices":
# integers that say where a kernel reads or writes in other arguments; "normal", "bfloat16": random
# numbers times 2 to the power `low`; "experts": one of `high` experts for each row; "offsets": see
# `inputs._set_dependent`; "output": nothing yet (digits will have the base `low`);
# "permutation": the numbers below its size in random order; "zeros": zeros, of which a kernel
# overwrites some.
FILLS = (
    "bits",
    "bfloat16",
    "experts",
    "indices",
    "integers",
    "normal",
    "offsets",
    "output",
    "permutation",
    "rows",
    "tiles",
    "zeros",
)
MAX_EXPONENT = 24  # of a power of two, positive or negative
MAX_BYTES = 2 << 30  # in all arguments together
CHECKED, TIMED = "checked", "timed"  # calls, with the arguments' `check_shape` and `shape`


@dataclass(frozen=True)
class Argument:
    """An argument of a kernel and what it holds when it is called."""

    name: str
    dtype: str
    shape: tuple[int, ...]  # when the kernel is timed
    check_shape: tuple[int, ...]  # when its result is compared; smaller if the kernel allows
    fill: str
    low: int = 0
    high: int = 0
    written: bool = False  # whether the kernel writes it

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Candidate:
    """A library that holds the kernel, scheduled with some constants."""

    library: str  # file name, which follows from the program: the same program has the same
    sha256: str
    constants: dict[str, int]
    # The launches of each kind of call, bound to the arguments; None if the library makes them.
    programs: dict[str, Launches] | None = None


@dataclass(frozen=True)
class Answer:
    """The output of a right kernel in the checked call: the arrays one after the other, compressed
    by zlib, because a cache with a few written rows is mostly zeros."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Plan:
    """A kernel and its candidates: the first has the default constants."""

    target: str
    variant: str
    runtime: str  # that executes them, as in an artifact's manifest
    device: str  # of TVM's runtime, as in a manifest; empty for other runtimes
    system: str  # of machines that can measure it
    architecture: str
    cpu_features: tuple[str, ...]
    key: str  # of the kernel in the records
    arguments: tuple[Argument, ...]
    answer: Answer
    candidates: tuple[Candidate, ...]

    @property
    def default(self) -> Candidate:
        return self.candidates[0]


@dataclass(frozen=True)
class Trial:
    """The time of a candidate and of the default, per call: medians over rounds of both."""

    seconds: float
    default_seconds: float
    ratio: float  # of the candidate's time to the default's in the same round
    spread: float  # of the ratio: half the span of the middle half of the rounds


def write_plan(folder: Path, plan: Plan) -> None:
    write_json(folder / PLAN, {"format_version": FORMAT_VERSION, **asdict(plan)})


def read_plan(folder: Path) -> Plan:
    """Read a plan; TuningError if it is missing, damaged, or asks for too much memory."""
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
                "answer": Answer(**fields["answer"]),
                "candidates": tuple(
                    _candidate(c, len(fields["arguments"])) for c in fields["candidates"]
                ),
            }
        )
        texts = (plan.target, plan.variant, plan.system, plan.architecture, plan.key)
        _check(all(isinstance(text, str) for text in (*texts, *plan.cpu_features)), "names")
        _check(plan.candidates and any(a.written for a in plan.arguments), "candidates, outputs")
        _check(plan.runtime in RUNTIMES, f"runtime {plan.runtime!r}")
        devices = DEVICES if plan.runtime == "tvm" else ("",)
        _check(plan.device in devices, f"device {plan.device!r} of runtime {plan.runtime!r}")
        for candidate in plan.candidates:
            launched = candidate.programs is not None
            _check(launched == (plan.runtime in LAUNCH_DEVICES), f"programs of {candidate.library}")
        _check_name(plan.answer.file)
        _check_offsets(plan.arguments)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        _damaged(file, "the fields of a plan", repr(error))
    num_bytes = sum(max(a.num_bytes(a.shape), a.num_bytes(a.check_shape)) for a in plan.arguments)
    if num_bytes > MAX_BYTES:
        _damaged(file, f"arguments of at most {MAX_BYTES} bytes", f"{num_bytes}")
    return plan


def check_machine(folder: Path, plan: Plan) -> None:
    """Raise TuningError unless this machine can run the libraries, as far as that is known before a
    device is opened."""
    here = Machine.here()
    if plan.system not in (ANY, here.system) or plan.architecture not in (ANY, here.architecture):
        raise TuningError(
            f"{folder}: made for {plan.system} on {plan.architecture}, this machine is "
            f"{here.system} on {here.architecture}; emit it for this machine's target"
        )
    if missing := [f for f in plan.cpu_features if f not in here.cpu_features]:
        raise TuningError(
            f"{folder}: needs a CPU with {', '.join(plan.cpu_features)}, this one lacks "
            f"{', '.join(missing)}; emit it for another variant (`osscompile targets`)"
        )


def check_files(folder: Path, plan: Plan) -> None:
    """Raise TuningError unless the libraries and the answer are those planned."""
    files = {plan.answer.file: plan.answer.sha256}
    for name, sha256 in (files | {c.library: c.sha256 for c in plan.candidates}).items():
        found = sha256_of(folder / name)
        if found != sha256:
            _damaged(folder / name, f"sha256 {sha256}", found or "no such file")


def write_answer(file: Path, arrays: Sequence[np.ndarray]) -> None:
    file.write_bytes(zlib.compress(b"".join(array.tobytes() for array in arrays), level=1))


def read_answer(folder: Path, plan: Plan) -> list[np.ndarray]:
    """Read what a right kernel writes: every written argument, in its `check_shape`. Raises
    TuningError if the file holds something else."""
    written = [a for a in plan.arguments if a.written]
    file, num_bytes = folder / plan.answer.file, sum(a.num_bytes(a.check_shape) for a in written)
    try:
        content = zlib.decompressobj().decompress(file.read_bytes(), num_bytes + 1)
    except zlib.error as error:
        _damaged(file, "what zlib compressed", repr(error))
    if len(content) != num_bytes:
        _damaged(file, f"{num_bytes} bytes", f"{len(content)}")
    arrays, start = [], 0
    for argument in written:
        count = math.prod(argument.check_shape)
        array = np.frombuffer(content, np.dtype(argument.dtype), count, start)
        arrays.append(array.reshape(argument.check_shape))
        start += array.nbytes
    return arrays


def sha256_of(file: Path) -> str | None:
    """Return the sha256 of a file in hexadecimal; None if there is no file."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def write_trials(folder: Path, plan: Plan, trials: dict[str, Trial]) -> None:
    """Write the results; `trials` maps the names of libraries to their trials."""
    measured = {library: asdict(trial) for library, trial in sorted(trials.items())}
    fields = {"key": plan.key, "default": plan.default.library, "trials": measured}
    write_json(folder / RESULTS, {"format_version": FORMAT_VERSION, **fields})


def read_trials(folder: Path, plan: Plan) -> dict[str, Trial]:
    """Read the trials of the plan's candidates, by library; none if the default has changed.

    Raises TuningError if the file is damaged.
    """
    file = folder / RESULTS
    if not os.path.exists(file):
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
    """Return the folders of all kernels; TuningError if there is none."""
    expected = f"{directory}: expected a folder that `osscompile tune --emit` wrote"
    try:
        names = sorted(os.listdir(directory))
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise TuningError(f"{expected}, found: {error}; name another, or emit it") from None
    if PLAN in names:
        raise TuningError(
            f"{expected}, with a folder for each kernel, found the one of a kernel; give the "
            "folder above it"
        )
    folders = [directory / name for name in names if os.path.exists(directory / name / PLAN)]
    if not folders:
        raise TuningError(
            f"{expected}, found no {PLAN} in its folders; emit it again, or copy all of it"
        )
    return folders


def write_json(file: Path, value: Any) -> None:
    """Write a file at once, so that an interrupt leaves the old contents."""
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
    if argument.fill == "tiles":
        _check(argument.low > 0, f"tiles of {argument.low} rows")
    if argument.fill in ("rows", "tiles"):
        columns = {"rows": 3, "tiles": 2}[argument.fill]
        for shape in (argument.shape, argument.check_shape):
            _check(len(shape) == 2 and shape[1] == columns, f"{argument.fill} of {shape}")
    if argument.fill == "rows":
        _check(argument.low >= 0 and argument.high > 0, f"bounds {bounds!r}")
    if argument.fill in ("experts", "indices", "integers"):
        _check(argument.low < argument.high, f"bounds {bounds!r}")
    if argument.fill in ("bfloat16", "normal"):
        _check(abs(argument.low) <= MAX_EXPONENT, f"exponent {argument.low}")
    return argument


def _check_offsets(arguments: tuple[Argument, ...]) -> None:
    """Check that offsets, which sum int8 numbers, fit rows and blocks of such an argument."""
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


def _candidate(fields: dict[str, Any], num_arguments: int) -> Candidate:
    programs = fields["programs"]
    if programs is not None:
        programs = {c: parse_launches(c, programs[c], num_arguments) for c in (CHECKED, TIMED)}
    candidate = Candidate(**fields | {"programs": programs})
    _check_name(candidate.library)
    constants = candidate.constants.items()
    _check(all(isinstance(k, str) and type(v) is int for k, v in constants), "constants")
    return candidate


def _check_name(file: str) -> None:
    """Check that a name is that of a file in the folder itself."""
    _check(file and Path(file).name == file, f"name {file!r}")


def _check(condition: Any, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _read_object(file: Path, expected: str) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TuningError(f"{file.parent}: expected {expected}, found none; emit it") from error
    except OSError as error:
        raise TuningError(
            f"{file}: expected {expected}, found: {error}; check the permissions of its folder"
        ) from error
    except (ValueError, RecursionError) as error:
        _damaged(file, "a JSON object", repr(error))
    if not isinstance(fields, dict):
        _damaged(file, "a JSON object", type(fields).__name__)
    return fields


def _damaged(file: Path, expected: str, found: str) -> NoReturn:
    raise TuningError(
        f"{file}: expected {expected}, found {found}; copy the folder again, or remove it and "
        "let `osscompile tune` write it again"
    )
