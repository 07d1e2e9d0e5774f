"""Measure the candidates of kernels, without the compiler: `python -m osscompile_runtime.measure
DIR` where the runtime alone was copied to (`osscompile bundle`).

Candidates run in a process of their own: one that crashes or hangs ends that process only. Each is
compared with the reference before it is timed.
"""

import argparse
import contextlib
import multiprocessing
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from .device import aligned_copy, load_function, tensor
from .errors import OsscompileError, TuningError
from .inputs import Arrays, checked_inputs, timed_inputs
from .machine import physical_cores
from .trials import (
    Plan,
    Trial,
    check_plan,
    kernel_folders,
    read_plan,
    read_trials,
    write_trials,
)

FUNCTION = "kernel"  # in every library
BATCH = 8  # candidates measured together, in turns; an interrupt loses one batch
ROUNDS = (5, 15)  # at least and at most: medians of fewer are noise
BURST_SECONDS = 0.02  # of calls of one candidate in a round
CANDIDATE_SECONDS = 1.0  # of all bursts of a candidate, if that is enough rounds
HOPELESS = 1.5  # times the default in the first round: not measured further
TOLERANCE = 1e-4  # of the rms of the result: sums of float32 in another order differ by 1e-6
COMPARED_ELEMENTS = 1 << 20  # at once: a whole cache as float64 would take gigabytes
TIMEOUT_SECONDS = 120  # without a word from the measuring process


@dataclass(frozen=True)
class Failure:
    """A candidate that cannot be used, and why."""

    library: str
    reason: str


def measure_kernel(
    folder: Path,
    threads: int | None = None,
    progress: Callable[[int, float], object] = lambda done, best: None,
    report: Callable[[str], object] = print,
) -> None:
    """Measure the candidates of one kernel that have no result yet, and write their results.

    `threads`: default the physical cores. `progress` hears the candidates done and the best ratio
    to the default so far; `report` hears of each candidate that fails. Raises TuningError if the
    folder is damaged or for another machine, or the default fails.
    """
    if threads is not None and threads < 1:
        raise TuningError(f"threads: expected at least 1, found {threads}")
    plan = read_plan(folder)
    check_plan(folder, plan)
    trials = read_trials(folder, plan)
    constants = {c.library: c.constants for c in plan.candidates}
    left = [c.library for c in plan.candidates[1:] if c.library not in trials]
    done = len(plan.candidates) - 1 - len(left)
    while True:
        progress(done, min((trial.ratio for trial in trials.values()), default=1.0))
        if not left:
            return
        batch, left = left[:BATCH], left[BATCH:]
        measured, failures = _measure_batch(folder, plan, batch, threads or physical_cores())
        for failure in failures:
            report(f"{plan.key.split()[0]} with {constants[failure.library]}: {failure.reason}")
        trials |= measured
        write_trials(folder, plan, trials)
        done += len(batch)


def _measure_batch(
    folder: Path, plan: Plan, libraries: Sequence[str], threads: int
) -> tuple[dict[str, Trial], list[Failure]]:
    """Measure beside the default; who ends the process is left out of the next attempt."""
    default = plan.default.library
    left, failures = [default, *libraries], []
    while True:
        seconds, failed = _attempt(folder, left, threads)
        failures += failed
        for failure in failed:
            if failure.library in (default, plan.reference.library):
                which = "default" if failure.library == default else "reference"
                raise TuningError(
                    f"{folder}: expected the kernel's {which} to work, found: {failure.reason}; "
                    "this is an error in its schedule: run the kernels' tests"
                )
            left.remove(failure.library)
        if seconds is not None:
            trials = {name: _trial(s, seconds[default]) for name, s in seconds.items()}
            return {name: trial for name, trial in trials.items() if name != default}, failures


def _trial(seconds: list[float], default_seconds: list[float]) -> Trial:
    ratios = [s / d for s, d in zip(seconds, default_seconds, strict=False)]
    quartiles = np.percentile(ratios, [25, 75])
    return Trial(
        seconds=statistics.median(seconds),
        default_seconds=statistics.median(default_seconds),
        ratio=statistics.median(ratios),
        spread=float(quartiles[1] - quartiles[0]) / 2,
    )


def _attempt(
    folder: Path, libraries: list[str], threads: int
) -> tuple[dict[str, list[float]] | None, list[Failure]]:
    """Seconds of each library in each round, or None if the process ended early; and who failed."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit the compiler
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, folder, libraries, threads), daemon=True)
    process.start()
    theirs.close()
    failures, running = [], read_plan(folder).reference.library
    try:
        while ours.poll(TIMEOUT_SECONDS):
            match ours.recv():
                case "running", library:
                    running = library
                case "failed", library, reason:
                    failures.append(Failure(library, reason))
                case "measured", seconds:
                    return seconds, failures
        reason = f"no answer for {TIMEOUT_SECONDS} seconds"
    except EOFError:
        process.join()
        reason = f"ended the measuring process with status {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return None, [*failures, Failure(running, reason)]


def _work(connection: Connection, folder: Path, libraries: list[str], threads: int) -> None:
    """The measuring process: tells what it does, so that its end can be blamed on someone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's, who ends us
    with contextlib.suppress(BrokenPipeError):  # the parent was killed
        plan = read_plan(folder)
        calls = timed_inputs(plan)
        kernels = {}
        for library, result in _compare(plan, folder, libraries, calls[0], threads, connection):
            if isinstance(result, str):
                connection.send(("failed", library, result))
            else:
                kernels[library] = result
        default_works = libraries[0] in kernels
        timed = _time_in_turns(kernels, calls, connection) if default_works else {}
        connection.send(("measured", timed))


def _compare(
    plan: Plan,
    folder: Path,
    libraries: list[str],
    timed: Arrays,
    threads: int,
    connection: Connection,
) -> Iterator[tuple[str, Any]]:
    """Each library with its kernel, or with what is wrong with it."""
    inputs = checked_inputs(plan, timed)
    reference = load_function(folder / plan.reference.library, FUNCTION, threads)
    expected = _results(reference, plan, inputs)
    for library in libraries:
        connection.send(("running", library))
        try:
            kernel = load_function(folder / library, FUNCTION, threads)
            error = _error(_results(kernel, plan, inputs), expected)
        except Exception as failure:  # a kernel raises whatever it was made to
            yield library, repr(failure)
            continue
        if error <= TOLERANCE:  # false for NaN
            yield library, kernel
        else:
            yield (
                library,
                f"wrong: off by {error:.1e} of the result's rms, allowed {TOLERANCE:.0e}",
            )


def _results(kernel: Any, plan: Plan, inputs: Arrays) -> Arrays:
    """What one call writes; the inputs stay as they are."""
    arrays = list(inputs)
    for i, argument in enumerate(plan.arguments):
        if argument.written:
            arrays[i] = aligned_copy(inputs[i])
    kernel(*map(tensor, arrays))
    return [array for array, a in zip(arrays, plan.arguments, strict=True) if a.written]


def _error(found: Arrays, expected: Arrays) -> float:
    """The largest difference over the rms of what is expected; NaN if either is not finite."""
    errors = []
    for actual, right in zip(found, expected, strict=True):
        squares, difference = 0.0, np.float64(0.0)
        for start in range(0, right.size, COMPARED_ELEMENTS):
            part = slice(start, start + COMPARED_ELEMENTS)
            wanted = right.reshape(-1)[part].astype(np.float64)
            squares += float(wanted @ wanted)
            difference = np.maximum(difference, np.abs(actual.reshape(-1)[part] - wanted).max())
        errors.append(difference / max(np.sqrt(squares / right.size), np.finfo(np.float32).tiny))
    return float(np.max(errors))


def _time_in_turns(
    kernels: dict[str, Any], calls: list[Arrays], connection: Connection
) -> dict[str, list[float]]:
    """Seconds a call of each kernel in each round. Kernels take turns, because a machine's speed
    changes over seconds: what counts is the ratio to the default, the first, in the same round."""
    tensors = [[tensor(array) for array in arrays] for arrays in calls]
    turn = 0

    def burst(library: str, count: int) -> float:
        nonlocal turn
        connection.send(("running", library))
        kernel = kernels[library]
        start = time.perf_counter()
        for _ in range(count):
            kernel(*tensors[turn % len(tensors)])
            turn += 1
        return (time.perf_counter() - start) / count

    default = next(iter(kernels))
    once = min(burst(default, 1) for _ in range(3))
    count = max(1, round(BURST_SECONDS / once))
    least, most = ROUNDS
    rounds = min(most, max(least, round(CANDIDATE_SECONDS / (count * once))))
    seconds: dict[str, list[float]] = {}
    for library in kernels:
        if count > 1:
            burst(library, 1)  # warms up
        seconds[library] = [burst(library, count)]
    hopeful = [n for n, s in seconds.items() if s[0] < HOPELESS * seconds[default][0]]
    for _ in range(1, rounds):
        for library in hopeful:
            seconds[library].append(burst(library, count))
    return seconds


def main() -> int:
    """Measure a folder of `osscompile tune --emit`; 1 after an error of ours."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    arguments = parser.parse_args()
    try:
        folders = kernel_folders(arguments.directory)
        for number, folder in enumerate(folders, start=1):
            print(f"kernel {number} of {len(folders)}, {folder.name}", flush=True)
            measure_kernel(folder, arguments.threads, _print_progress)
    except OsscompileError as error:
        print(f"measure: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: run it again to go on", file=sys.stderr)
        return 130
    return 0


def _print_progress(done: int, best: float) -> None:
    print(f"  {done} trials done, best {best:.3f} of the default", flush=True)


if __name__ == "__main__":
    sys.exit(main())
