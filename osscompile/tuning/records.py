"""Keep the constants of clear winners, for compiles to read."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import CompileError
from ..runtime.errors import TuningError
from ..runtime.trials.files import read_plan, read_trials, write_json
from ..targets import Target

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


def check_records(file: Path) -> None:
    """Raise CompileError, before hours of measuring, unless records can be written there."""
    folder = next(parent for parent in file.parents if parent.exists())
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise CompileError(f"{file}: expected a file that can be written; give --output FILE")
    _read(file)


def write_records(file: Path, findings: list[Finding]) -> None:
    """Merge findings into the records; a kernel whose default is as good loses its record."""
    records = _read(file)
    for finding in findings:
        records.pop(finding.key, None)
        if finding.constants:
            records[finding.key] = finding.constants
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, dict(sorted(records.items())))


def _read(file: Path) -> dict[str, dict[str, int]]:
    if not file.exists():
        return {}
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CompileError(
            f"{file}: expected records, found {error}; remove it or give --output FILE"
        ) from error
    if not isinstance(records, dict):
        raise CompileError(
            f"{file}: expected records, found a JSON {type(records).__name__}; remove it or give "
            "--output FILE"
        )
    return records
