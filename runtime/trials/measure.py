"""Measure the candidates of kernels without the compiler: `python -m osscompile_runtime.measure
DIR` where there is only a copy of the runtime (`osscompile bundle`).

Candidates run in a process of their own: one that crashes or hangs ends that process only. Each is
compared with the answer in the folder before it is timed, by the device's clock where that can be
read. All machines measure alike, through the methods of `TrialMachine`.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..devices.tvm_cpu import aligned_copy
from ..errors import DefaultError, OsscompileError, TuningError
from ..machine import choose_threads
from .files import (
    Plan,
    Trial,
    check_files,
    check_machine,
    kernel_folders,
    read_answer,
    read_plan,
    read_trials,
    write_trials,
)
from .inputs import Arrays, checked_inputs, moved_bytes, timed_inputs, whole_numbers
from .machines import TrialMachine, open_machine

BATCH = 8  # candidates measured together, in turns; an interrupt loses one batch
ROUNDS = (5, 15)  # least and most: medians of fewer are noise
BURST_SECONDS = 0.02  # for the calls of one candidate in a round
# Times to measure the default, in bursts of more and more calls: a single call seems to take long
# where the machine needs time to begin, or to say that it is ready.
LOOKS = 2
CANDIDATE_SECONDS = 1.0  # for all bursts of a candidate, if that is enough rounds
HOPELESS = 1.5  # times the default's time: a candidate that takes this in the first round is out
# Allowed error, relative to the result's rms: sums of float32 in another order differ by 1e-6. If
# no argument has floats, nothing may differ.
TOLERANCE = 1e-4
COMPARED_ELEMENTS = 1 << 20  # compared at once: a whole cache as float64 would take gigabytes
TIMEOUT_SECONDS = 120  # without a word from the measuring process


@dataclass(frozen=True)
class Failure:
    """A candidate that cannot be used, and why."""

    library: str
    reason: str


Seconds: TypeAlias = dict[str, list[float]]  # library -> seconds in each round
# Measures the libraries of a folder, the default first; None if the last failure ended the process.
Attempt: TypeAlias = Callable[[Path, list[str]], tuple[Seconds | None, list[Failure]]]
Tell: TypeAlias = Callable[[tuple[Any, ...]], object]  # hears of each step as it begins


def measure_kernel(
    folder: Path,
    attempt: Attempt | None = None,
    progress: Callable[[int, float], object] = lambda done, best: None,
    report: Callable[[str], object] = print,
) -> str:
    """Measure the candidates of one kernel that have no result yet, and write their results.

    If a kernel has no candidates, its default is measured. Returns a text for people: the default
    is right, and its speed. `attempt` picks the machine (default: this one, on its physical cores).
    `progress` hears the candidates done and the best ratio to the default so far; `report` hears of
    each candidate that fails. Raises DefaultError if the default fails, TuningError if the folder
    is damaged or for another machine.
    """
    plan = read_plan(folder)
    check_files(folder, plan)
    attempt = attempt or attempt_here(None)
    trials = read_trials(folder, plan)
    constants = {c.library: c.constants for c in plan.candidates}
    candidates = plan.candidates[1:] or plan.candidates
    left = [c.library for c in candidates if c.library not in trials]
    done = len(candidates) - len(left)
    while True:
        progress(done, min((trial.ratio for trial in trials.values()), default=1.0))
        if not left:
            return f"the default is right{_speed(plan, trials)}"
        batch, left = left[:BATCH], left[BATCH:]
        measured, failures = _measure_batch(folder, plan, batch, attempt)
        for failure in failures:
            report(f"{plan.key.split()[0]} with {constants[failure.library]}: {failure.reason}")
        trials |= measured
        write_trials(folder, plan, trials)
        done += len(batch)


def _measure_batch(
    folder: Path, plan: Plan, libraries: Sequence[str], attempt: Attempt
) -> tuple[dict[str, Trial], list[Failure]]:
    """Measure beside the default; a candidate that ends the process is left out next time."""
    default = plan.default.library
    left = [default, *(library for library in libraries if library != default)]
    failures: list[Failure] = []
    while True:
        seconds, failed = attempt(folder, left)
        failures += failed
        for failure in failed:
            if failure.library == default:
                raise DefaultError(
                    f"{folder}: expected the kernel's default to work, found: {failure.reason}; "
                    "if the machine lacks nothing, this is an error in its schedule, or of the "
                    f"device's compiler: run the kernels' tests; it is {plan.key}"
                )
            left.remove(failure.library)
        if seconds is not None:
            measured = [name for name in libraries if name in seconds]
            return {n: _trial(seconds[n], seconds[default]) for n in measured}, failures


def _speed(plan: Plan, trials: dict[str, Trial]) -> str:
    """Return a text with the default's speed, if that was measured."""
    if not trials:
        return ""
    seconds = statistics.median(trial.default_seconds for trial in trials.values())
    num_bytes = moved_bytes(plan.arguments)
    memory = "" if num_bytes is None else f", {num_bytes / seconds / 1e9:.1f} GB/s"
    return f", {seconds * 1e6:.1f} us a call{memory}"


def _trial(seconds: list[float], default_seconds: list[float]) -> Trial:
    ratios = [s / d for s, d in zip(seconds, default_seconds, strict=False)]
    quartiles = np.percentile(ratios, [25, 75])
    return Trial(
        seconds=statistics.median(seconds),
        default_seconds=statistics.median(default_seconds),
        ratio=statistics.median(ratios),
        spread=float(quartiles[1] - quartiles[0]) / 2,
    )


def attempt_here(threads: int | None) -> Attempt:
    """Return an attempt in a process of its own, on the plan's device or with so many threads
    (default: the physical cores). Raises TuningError."""
    if threads is not None and threads < 1:
        raise TuningError(f"threads: expected at least 1, found {threads}")

    def attempt(folder: Path, libraries: list[str]) -> tuple[Seconds | None, list[Failure]]:
        plan = read_plan(folder)
        check_machine(folder, plan)
        context = multiprocessing.get_context("spawn")  # a fork would inherit the compiler
        ours, theirs = context.Pipe(duplex=False)
        arguments = (theirs, folder, libraries, choose_threads(threads))
        process = context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        theirs.close()
        failures, running = [], plan.default.library
        try:
            while ours.poll(TIMEOUT_SECONDS):
                match ours.recv():
                    case "running", library:
                        running = library
                    case "failed", library, reason:
                        failures.append(Failure(library, reason))
                    case "measured", seconds:
                        return seconds, failures
                    case "no machine", reason:
                        raise TuningError(f"{folder}: cannot be measured here: {reason}")
                    case "ended", reason:
                        return None, [*failures, Failure(running, reason)]
            reason = f"no answer for {TIMEOUT_SECONDS} seconds"
        except EOFError:
            process.join()
            reason = f"ended the measuring process with status {process.exitcode}"
        finally:
            process.kill()
            process.join()
        return None, [*failures, Failure(running, reason)]

    return attempt


def _work(connection: Connection, folder: Path, libraries: list[str], threads: int) -> None:
    """Run the measuring process. It tells each step, so that we know which one ended it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles an interrupt, and ends us
    with contextlib.suppress(BrokenPipeError):  # the parent was killed
        try:
            machine = open_machine(read_plan(folder), threads)
        except OsscompileError as error:
            connection.send(("no machine", str(error)))
            return
        try:
            seconds = compare_and_time(folder, libraries, machine, connection.send)
        except Exception as error:  # of a lost device, for example
            connection.send(("ended", f"ended the measuring: {error}"))
            return
        connection.send(("measured", seconds))


def compare_and_time(
    folder: Path, libraries: Sequence[str], machine: TrialMachine, tell: Tell
) -> Seconds:
    """Return the seconds of the libraries that answer right; none if the default, the first, does
    not. `tell` hears ("running", library) and ("failed", library, reason)."""
    plan = read_plan(folder)
    calls = timed_inputs(plan)
    known: dict[int, Any] = {}  # tensors of arrays that several calls share

    def placed(array: np.ndarray) -> Any:
        if id(array) not in known:
            known[id(array)] = machine.tensor(array)
        return known[id(array)]

    kernels = {}
    for library, result in _compare(plan, folder, libraries, calls[0], machine, placed, tell):
        if isinstance(result, str):
            tell(("failed", library, result))
        else:
            kernels[library] = result
    if libraries[0] not in kernels:
        return {}
    tell(("running", libraries[0]))  # if memory is short for all calls, the default is blamed
    tensors = [[placed(array) for array in arrays] for arrays in calls]
    return _time_in_turns(kernels, tensors, machine, tell)


def _compare(
    plan: Plan,
    folder: Path,
    libraries: Sequence[str],
    timed: Arrays,
    machine: TrialMachine,
    placed: Callable[[np.ndarray], Any],
    tell: Tell,
) -> Iterator[tuple[str, Any]]:
    """Yield each library with its kernel, or with what is wrong with it."""
    inputs = checked_inputs(plan.arguments, timed)
    expected = _whole(plan, read_answer(folder, plan))
    rounds = any(np.dtype(a.dtype).kind == "f" for a in plan.arguments)
    allowed = TOLERANCE if rounds else 0.0
    candidates = {candidate.library: candidate for candidate in plan.candidates}

    def answer(kernel: Any) -> Arrays:
        """Return what one call writes; the inputs stay as they are."""
        arguments = list(zip(plan.arguments, inputs, strict=True))
        tensors = [
            machine.output(aligned_copy(array)) if argument.written else placed(array)
            for argument, array in arguments
        ]
        machine.call(kernel, tensors)
        found = zip(arguments, tensors, strict=True)
        return [machine.array(t, array) for (a, array), t in found if a.written]

    for library in libraries:
        tell(("running", library))
        try:
            kernel = machine.load(folder, candidates[library])
            error = _error(_whole(plan, answer(kernel)), expected)
        except Exception as failure:  # kernels may raise anything
            if not machine.is_alive():
                raise
            yield library, str(failure) or repr(failure)
            continue
        if error <= allowed:  # false for NaN
            yield library, kernel
        else:
            yield library, f"wrong: off by {error:.1e} of the result's rms, allowed {allowed:.0e}"


def _whole(plan: Plan, written: Arrays) -> Arrays:
    """Return what a kernel wrote, with digits turned into the numbers that they mean."""
    pairs = zip((a for a in plan.arguments if a.written), written, strict=True)
    return [whole_numbers(x, a.low) if x.dtype == np.int8 else x for a, x in pairs]


def _error(found: Arrays, expected: Arrays) -> float:
    """Return the largest difference, less one rounding step, over the rms of the expected numbers
    that are not 0; NaN if a number is not finite. For whole numbers it is the mean difference,
    because sums of float32 in another order round to other whole numbers."""
    errors = []
    for actual, right in zip(found, expected, strict=True):
        squares, count, difference = 0.0, 0, np.float64(0.0)
        for start in range(0, right.size, COMPARED_ELEMENTS):
            part = slice(start, start + COMPARED_ELEMENTS)
            narrow = right.reshape(-1)[part]
            wanted = narrow.astype(np.float64)
            squares += float(wanted @ wanted)
            count += int(np.count_nonzero(wanted))
            differences = np.abs(actual.reshape(-1)[part] - wanted)
            if right.dtype.kind == "f":
                beyond = differences - np.spacing(np.abs(narrow))
                difference = np.maximum(difference, beyond.max())
            else:
                difference += differences.sum() / right.size
        rms = max(np.sqrt(squares / max(count, 1)), np.finfo(np.float32).tiny)
        errors.append(difference / rms)
    return float(np.max(errors))


def _time_in_turns(
    kernels: dict[str, Any], calls: list[list[Any]], machine: TrialMachine, tell: Tell
) -> Seconds:
    """Return the seconds of a call for each kernel and round. Kernels take turns, because the
    machine's speed changes: the ratio to the default, the first, in the same round counts."""
    turns = itertools.cycle(calls)

    def burst(library: str, count: int) -> float:
        tell(("running", library))
        return machine.seconds(kernels[library], list(itertools.islice(turns, count)))

    default = next(iter(kernels))
    once = min(burst(default, 1) for _ in range(3))
    count = _count_calls(once, machine)
    for _ in range(LOOKS):
        if count > 1:
            once = min(once, burst(default, count))
            count = _count_calls(once, machine)
    least, most = ROUNDS
    rounds = min(most, max(least, round(CANDIDATE_SECONDS / (count * once))))
    seconds: Seconds = {}
    for library in kernels:
        if count > 1:
            burst(library, 1)  # warms up
        seconds[library] = [burst(library, count)]
    hopeful = [n for n, s in seconds.items() if s[0] < HOPELESS * seconds[default][0]]
    for _ in range(1, rounds):
        for library in hopeful:
            seconds[library].append(burst(library, count))
    return seconds


def _count_calls(once: float, machine: TrialMachine) -> int:
    """Return the calls in a burst if one takes so many seconds."""
    count = max(1, round(BURST_SECONDS / once))
    return min(count, machine.most_calls or count)


def main() -> int:
    """Check and measure a folder of `osscompile tune --emit`; the status is 1 after an error of
    ours. A kernel whose default fails is reported, and the others are measured."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    arguments = parser.parse_args()
    failed = []
    try:
        folders = kernel_folders(arguments.directory)
        for number, folder in enumerate(folders, start=1):
            print(f"kernel {number} of {len(folders)}, {folder.name}", flush=True)
            try:
                attempt = attempt_here(arguments.threads)
                print(f"  {measure_kernel(folder, attempt, _print_progress)}", flush=True)
            except DefaultError as error:
                print(f"measure: {error}", file=sys.stderr, flush=True)
                failed.append(folder.name)
    except OsscompileError as error:
        print(f"measure: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: run it again to go on", file=sys.stderr)
        return 130
    if failed:
        which = f"{len(failed)} of {len(folders)} kernels: {', '.join(failed)}"
        print(f"measure: the default does not work, as told above, of {which}", file=sys.stderr)
    return int(bool(failed))


def _print_progress(done: int, best: float) -> None:
    if done:
        print(f"  {done} trials done, best {best:.3f} of the default", flush=True)
