"""Keep the constants of clear winners, for compiles to read."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import CompileError
from ..runtime.errors import TuningError
from ..runtime.trials.files import read_plan, read_trials, write_json
from ..schedules.records import Records, load_records, records_file, user_records_file
from ..targets import Target
from .watched_records import WatchedRecords

LEAST_GAIN = 0.02  # share of the default's time, beyond the measured spread: less may be chance


@dataclass(frozen=True)
class Finding:
    """A kernel's best candidate and its default, in seconds a call."""

    key: str
    default_seconds: float
    best_seconds: float
    ratio: float
    constants: dict[str, int]  # of the best candidate; empty if the default is as good


def read_findings(folders: list[Path], target: Target) -> list[Finding]:
    """Return the finding of each measured kernel; TuningError for a kernel of another target."""
    findings = []
    for folder in folders:
        plan = read_plan(folder)
        if (plan.target, plan.variant) != (target.name, target.variant):
            raise TuningError(
                f"{folder}: expected results for {target.name}, variant {target.variant}, found "
                f"them for {plan.target}, variant {plan.variant}; name those with --target and "
                "--variant"
            )
        trials = read_trials(folder, plan)
        trials.pop(plan.default.library, None)  # a check of the default alone is no finding
        if not trials:
            continue
        library = min(trials, key=lambda name: trials[name].ratio + trials[name].spread)
        best = trials[library]
        if best.ratio + best.spread < 1 - LEAST_GAIN:
            (constants,) = (c.constants for c in plan.candidates if c.library == library)
            times = (best.default_seconds, best.seconds, best.ratio)
            findings.append(Finding(plan.key, *times, constants))
        else:
            default = best.default_seconds
            findings.append(Finding(plan.key, default, default, 1.0, {}))
    return findings


def own_records_file(target: Target) -> Path:
    """Where `tune` writes: into the package, or for a user who cannot, into a folder of theirs."""
    package, user = records_file(target), user_records_file(target)
    return package if user is None or _can_write(package) else user


def records_of_compile(target: Target, file: Path | None) -> tuple[Records, Path | None]:
    """The package's records and after them those of `file`, which are watched, or where that is
    None of the user's own file, if there is one; and the file that was read. Raises CompileError.
    """
    if file is not None:
        return WatchedRecords(load_records(target), read_records(file), file), file
    user = user_records_file(target)
    if user is None or not os.path.exists(user):
        return load_records(target), None
    return {**load_records(target), **read_records(user)}, user


def check_records(file: Path) -> None:
    """Raise CompileError, before hours of measuring, unless records can be written there."""
    if not _can_write(file):
        raise CompileError(f"{file}: expected a file that can be written; give --output FILE")
    _read_if_any(file)


def write_records(file: Path, findings: list[Finding], below: Records | None = None) -> None:
    """Merge findings into the records. A kernel whose default is as good loses its record, or gets
    one without constants if there is another in `below`, which compiles read before."""
    records = _read_if_any(file)
    for finding in findings:
        records.pop(finding.key, None)
        if finding.constants or finding.key in (below or {}):
            records[finding.key] = finding.constants
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, dict(sorted(records.items())))
    except OSError as error:
        raise CompileError(
            f"{file}: cannot be written: {error}; --ingest what was measured with --output FILE"
        ) from error


def read_records(file: Path) -> dict[str, Mapping[str, int]]:
    """What `write_records` wrote. Raises CompileError."""
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CompileError(
            f"{file}: expected records of `osscompile tune`, found: {error}; remove it or name "
            "another"
        ) from error
    if not isinstance(records, dict) or not all(map(_is_record, records.values())):
        raise CompileError(
            f"{file}: expected records of `osscompile tune`, found a JSON {type(records).__name__} "
            "of something else; remove it or name another"
        )
    return records


def _is_record(value: object) -> bool:
    return isinstance(value, dict) and all(type(constant) is int for constant in value.values())


def _read_if_any(file: Path) -> dict[str, Mapping[str, int]]:
    return read_records(file) if os.path.exists(file) else {}


def _can_write(file: Path) -> bool:
    """Whether it, or else the folder that it would be made in, takes it."""
    existing = next(path for path in (file, *file.absolute().parents) if os.path.exists(path))
    return (existing == file or os.path.isdir(existing)) and os.access(existing, os.W_OK)
