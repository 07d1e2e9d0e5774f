"""The three steps of tuning, for all kernels of some models."""

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from .. import targets
from ..errors import CompileError
from ..importer.graph import PROFILES
from ..importer.resolve import resolve_model
from ..runtime.errors import DefaultError, TuningError
from ..runtime.machine import Machine
from ..runtime.trials.files import kernel_folders, read_plan
from ..runtime.trials.measure import Attempt, measure_kernel
from ..targets import Target, TargetError
from .emit import emit_kernel, folder_name
from .records import Finding, read_findings
from .workloads import Workload, collect_workloads

MODELS = ("synthetic:gpt-oss-20b", "synthetic:gpt-oss-120b")


def choose_target(name: str | None, variant: str | None) -> Target:
    """Return the variant of that name, else the best that runs here, else the first; TargetError if
    there is none."""
    if name is None:
        name = targets.of_this_machine().name
    variants = targets.load_variants(name)
    if variant is not None:
        named = [v for v in variants if v.variant == variant]
        if not named:
            raise TargetError(
                f"variant of {name}: expected one of {', '.join(v.variant for v in variants)}, "
                f"found {variant!r}"
            )
        return named[0]
    here = Machine.here()
    fitting = (v for v in variants if set(v.cpu_features) <= set(here.cpu_features))
    return next(fitting, variants[0])


def tune(
    work: Path,
    target: Target,
    models: Sequence[str],
    profile: str,
    trials: int,
    attempt: Attempt,
) -> list[Finding]:
    """Build, measure and compare; trials in `work` are not made again. `attempt` picks the machine.

    Raises CompileError, CheckpointError or TuningError.
    """
    if trials < 1:
        raise CompileError(
            f"trials: expected at least 1, found {trials}; to check kernels, give --emit DIR too"
        )
    workloads = _workloads(models, profile, target, trials)
    _make_directory(work)
    folders = [work / folder_name(workload) for workload in workloads]
    for number, (folder, workload) in enumerate(zip(folders, workloads, strict=True), start=1):
        with tqdm(desc=_named(number, len(folders), folder), unit="trial", postfix="builds") as bar:
            emit_kernel(folder, workload, target, trials, tqdm.write)
            _measure(folder, attempt, bar)
    return read_findings(folders, target)


def emit(directory: Path, target: Target, models: Sequence[str], profile: str, trials: int) -> int:
    """Build the candidates of all kernels for another machine; returns the number of kernels.

    With 0 `trials` it builds the default of every kernel for a check, also of kernels that cannot
    be tuned.
    """
    if trials < 0:
        raise CompileError(f"trials: expected at least 0, found {trials}")
    workloads = _workloads(models, profile, target, trials)
    _make_directory(directory)
    for workload in tqdm(workloads, desc="building", unit="kernel"):
        emit_kernel(directory / folder_name(workload), workload, target, trials, tqdm.write)
    return len(workloads)


def measure(directory: Path, attempt: Attempt) -> None:
    """Measure what `emit` built, but nothing that was measured before.

    Raises TuningError; if a kernel's default fails, only after all others were measured.
    """
    folders, failed = kernel_folders(directory), []
    for number, folder in enumerate(folders, start=1):
        with tqdm(desc=_named(number, len(folders), folder), unit="trial") as bar:
            try:
                tqdm.write(f"{folder.name}: {_measure(folder, attempt, bar)}")
            except DefaultError as error:
                tqdm.write(str(error))
                failed.append(folder.name)
    if failed:
        raise TuningError(
            f"{directory}: expected the default of every kernel to work, found some that do not, "
            f"told above: {', '.join(failed)}; the others were measured, and can be ingested"
        )


def table(findings: Sequence[Finding]) -> str:
    """Return a text table: kernel, default and best in microseconds, their ratio, constants."""
    rows = [("default us", "best us", "ratio", "constants", "kernel")]
    for f in findings:
        times = (f"{f.default_seconds * 1e6:.1f}", f"{f.best_seconds * 1e6:.1f}", f"{f.ratio:.3f}")
        constants = " ".join(f"{k}={v}" for k, v in f.constants.items()) or "default"
        rows.append((*times, constants, f.key))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join([f"{t:>{w}}" for t, w in zip(row[:3], widths[:3], strict=True)])
        + f"  {row[3]:<{widths[3]}}  {row[4]}"
        for row in rows
    )


def _workloads(models: Sequence[str], profile: str, target: Target, trials: int) -> list[Workload]:
    if profile not in PROFILES:
        raise CompileError(f"profile: expected one of {', '.join(PROFILES)}, found {profile!r}")
    found: dict[str, Workload] = {}
    for model in models:
        config = resolve_model(model).source.config
        for workload in collect_workloads(config, profile, target):
            if workload.tuned or trials == 0:
                found.setdefault(folder_name(workload), workload)
    return list(found.values())


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / ".gitignore").write_text("*\n", encoding="utf-8")  # nothing here is committed
    except OSError as error:
        raise CompileError(
            f"{directory}: expected a folder that can be written, found: {error}; give another"
        ) from error


def _named(number: int, count: int, folder: Path) -> str:
    return f"kernel {number} of {count}, {folder.name.rpartition('-')[0]}"


def _measure(folder: Path, attempt: Attempt, bar: "tqdm[NoReturn]") -> str:
    bar.reset(total=max(1, len(read_plan(folder).candidates) - 1))

    def progress(done: int, best: float) -> None:
        bar.set_postfix_str(f"best {best:.3f} of the default")
        bar.update(done - bar.n)

    return measure_kernel(folder, attempt, progress, tqdm.write)
