"""What `bench` measured: as a table, as JSON, and side by side with other reports."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from ..errors import OsscompileError

FIRST_PROMPT = 16  # tokens before the first one, after a load
BUSY_SHARE = 0.05  # of the CPUs, used by others: more spoils a measurement


class BenchError(OsscompileError):
    """A measurement cannot begin, or a file of reports cannot be read or written."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one thing, over `runs` repeats."""

    median: float
    fastest: float
    slowest: float
    runs: int
    other_processes: float | None  # share of all CPU time that was not ours meanwhile


@dataclass(frozen=True)
class Report:
    """What one run measured, on what. The keys of `prefill` are token counts, those of `decode` and
    `bandwidth_at` numbers of tokens before."""

    model: str
    profile: str
    target: str
    variant: str  # of the target: which library of the artifact ran
    manifest_sha256: str
    cpu: str  # with a device, that of its host
    cores: int | None  # of a far machine nobody tells
    memory_bytes: int | None
    versions: dict[str, str]
    commit: str | None  # of the checkout that measured
    date: str  # ISO 8601, when the run began
    other_processes: float | None  # share of all CPU time that was not ours, over the whole run
    bandwidth: float | None  # bytes a second, on all cores, or of the device's memory: the best
    bandwidth_at: dict[int, float]  # the median of reads by turns with the steps of `decode`
    int8_peak: float | None  # multiply-adds a second on all cores
    weight_bytes: int  # that one decode step reads
    token_macs: int  # multiply-adds of the weights that a token uses, without lm_head
    full_kv_bytes: int  # keys and values of one position, in all full layers
    sliding_kv_bytes: int  # the same in all sliding layers, which read `window` positions at most
    window: int
    load_seconds: float | None
    first_token_seconds: float | None  # load included
    resident_bytes: int | None  # after all runs
    peak_bytes: int | None
    outside_share: float | None  # of a streamed decode step: not in the compiled function
    prefill: dict[int, Timing]
    decode: dict[int, Timing]
    device: str | None = None  # that ran the kernels, if the CPU did not
    device_bytes: int | None = None  # of its memory, held after all runs, or as planned
    # By numbers of sequences: steps that choose a token of each, the bytes that such a step must
    # read, and the median of reads by turns with them.
    sequences: dict[int, Timing] = field(default_factory=dict)
    sequences_bytes: dict[int, int] = field(default_factory=dict)
    sequences_bandwidth: dict[int, float] = field(default_factory=dict)

    def step_bytes(self, depth: int) -> int:
        """Bytes that a decode step must read after `depth` tokens: weights, keys and values; its
        own among them."""
        full, sliding = depth + 1, min(depth + 1, self.window)
        return self.weight_bytes + full * self.full_kv_bytes + sliding * self.sliding_kv_bytes

    def roofline(self, depth: int) -> float | None:
        """Decode steps a second at the speed that the memory had meanwhile: none can be faster.
        None if that was not measured."""
        if self.bandwidth is None:
            return None
        return self.bandwidth_at[depth] / self.step_bytes(depth)


class Row(NamedTuple):
    """One figure: `value` in `unit`; `share` is how much of the limit `of` that is."""

    name: str
    value: float
    unit: str
    note: str = ""
    share: float | None = None
    of: str = ""


def rows(report: Report) -> Iterator[Row]:
    """All figures of a report, for people; what could not be measured is left out."""
    threads = f"{report.cores or 'all'} threads"
    memory = threads if report.device is None else "of the device's memory"
    if report.bandwidth is not None:
        note = f"{memory}, the best of this run"
        yield Row("read bandwidth", report.bandwidth / 1e9, "GB/s", note)
    if report.int8_peak is not None:
        note = f"{threads}, registers only"
        yield Row("int8 arithmetic peak", report.int8_peak / 1e9, "GMAC/s", note)
    if report.load_seconds is not None:
        yield Row("load", report.load_seconds, "s")
    if report.first_token_seconds is not None:
        note = f"with a prompt of {FIRST_PROMPT} tokens; files as far in memory as they were"
        yield Row("load to first token", report.first_token_seconds, "s", note)
    for length, timing in report.prefill.items():
        macs = report.token_macs * length / timing.median
        share = macs / report.int8_peak if report.int8_peak is not None else None
        note = f"{number(macs / 1e9)} GMAC/s; {_spread(timing)}"
        yield Row(f"prefill {length}", length / timing.median, "tok/s", note, share, "int8 peak")
    for depth, timing in report.decode.items():
        limit = report.roofline(depth)
        note = f"{number(report.step_bytes(depth) / 1e9)} GB"
        if limit is not None:
            speed = number(report.bandwidth_at[depth] / 1e9)
            note = f"{number(limit)} tok/s: {note} at {speed} GB/s by turns"
        note = f"{note}; {_spread(timing)}"
        share = 1 / timing.median / limit if limit is not None else None
        yield Row(f"decode at {depth}", 1 / timing.median, "tok/s", note, share, "roofline")
    for count, timing in report.sequences.items():
        yield _sequences_row(report, count, timing)
    if report.outside_share is not None:
        note = "of a streamed decode step: Python, sampling, text"
        yield Row("outside the kernels", report.outside_share * 100, "%", note)
    if report.resident_bytes is not None:
        yield Row("resident memory", report.resident_bytes / 1e9, "GB", "after these runs")
    if report.peak_bytes is not None:
        yield Row("peak memory", report.peak_bytes / 1e9, "GB")
    if report.device_bytes is not None:
        note = "weights, keys and values, workspace"
        yield Row("device memory", report.device_bytes / 1e9, "GB", note)


def _sequences_row(report: Report, count: int, timing: Timing) -> Row:
    """Output tokens a second of so many sequences together; the limit is the memory's or, where
    that is less, that of arithmetic."""
    note = f"{number(report.sequences_bytes[count] / 1e9)} GB a step; {_spread(timing)}"
    share = None
    if report.sequences_bandwidth:
        limit = count * report.sequences_bandwidth[count] / report.sequences_bytes[count]
        if report.int8_peak is not None:
            limit = min(limit, report.int8_peak / report.token_macs)
        share, note = count / timing.median / limit, f"{number(limit)} tok/s: {note}"
    name = f"{count} sequence{'s' * (count > 1)}"
    return Row(name, count / timing.median, "tok/s", note, share, "roofline")


def table(report: Report) -> str:
    """One report with its conditions, as text."""
    software = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    lines = [
        f"{report.model}, profile {report.profile}, target {report.target} {report.variant}, "
        f"manifest {report.manifest_sha256[:12]}",
        f"{machine(report)}; {report.date}",
        f"{software}; commit {report.commit or 'unknown'}",
    ]
    cells = []
    for row in rows(report):
        share = [] if row.share is None else [f"{row.share * 100:.0f} % of {row.of}"]
        note = ", ".join([*share, row.note]) if row.note else "".join(share)
        cells.append([row.name, number(row.value), row.unit, note])
    lines += ["", *_columns(cells, right={1})]
    if report.bandwidth is None:
        lines.append("read bandwidth: not measured, because that takes a compiler")
    if report.int8_peak is None:
        lines.append("int8 arithmetic peak: not measured on this machine")
    if busy := _busy(report):
        lines.append(f"warning: other processes used {busy} of the CPU: figures suffer")
    return "\n".join(lines)


def machine(report: Report) -> str:
    """The device, the processor, its cores and memory, as far as they are known."""
    parts = [report.cpu] if report.device is None else [report.device, report.cpu]
    if report.cores is not None:
        parts.append(f"{report.cores} cores")
    if report.memory_bytes is not None:
        parts.append(f"{report.memory_bytes / 1e9:.1f} GB")
    return ", ".join(parts)


def comparison(reports: Sequence[Report]) -> str:
    """Reports side by side, as text: ratios are to the first, percentages are of the limit."""
    conditions = {
        "model": [r.model for r in reports],
        "profile": [r.profile for r in reports],
        "target": [f"{r.target} {r.variant}" for r in reports],
        "device": [r.device or "-" for r in reports],
        "CPU": [r.cpu for r in reports],
        "cores": [str(r.cores or "-") for r in reports],
        "osscompile": [r.versions.get("osscompile", "-") for r in reports],
        "commit": [(r.commit or "-")[:12] for r in reports],
        "date": [r.date for r in reports],
        "other processes": [
            "-" if r.other_processes is None else f"{r.other_processes * 100:.0f} %"
            for r in reports
        ],
    }
    figures = [{(row.name, row.unit): row for row in rows(report)} for report in reports]
    names = dict.fromkeys(key for column in figures for key in column)  # in order, each once
    cells = [[name, *values] for name, values in conditions.items()]
    for name, unit in names:
        found = [column.get((name, unit)) for column in figures]
        cells.append([f"{name}, {unit}", *(_compared(row, found[0]) for row in found)])
    return "\n".join(_columns(cells, right=set(range(1, len(reports) + 1))))


def write_reports(path: Path, reports: Sequence[Report]) -> None:
    """A list of reports as JSON. `figures` repeats them as `table` shows them."""
    objects = [
        asdict(r) | {"figures": {f"{row.name}, {row.unit}": row.value for row in rows(r)}}
        for r in reports
    ]
    path.write_text(json.dumps(objects, indent=1) + "\n", encoding="utf-8")


def read_reports(path: Path) -> list[Report]:
    """What `write_reports` wrote. Raises BenchError."""
    try:
        objects = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(objects, list) or not objects:
            raise TypeError("not a list of reports")
        reports: list[Report] = []
        for report in objects:
            report.pop("figures")
            reports.append(_read(Report, report, "report"))
            list(rows(reports[-1]))  # zeros where there is division
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise BenchError(
            f"{path}: expected reports of `bench --json`, found: {error}; measure again with this "
            "version of osscompile"
        ) from error
    return reports


def check_writable(path: Path) -> None:
    """Raise BenchError now rather than after the measuring."""
    try:
        exists = path.exists()  # raises for a folder that may not be searched
        path.open("ab").close()
        if not exists:
            path.unlink()
    except OSError as error:
        raise BenchError(
            f"{path}: expected a file that can be written, found: {error.strerror}; name another"
        ) from error


def number(value: float) -> str:
    """Three significant digits, and all digits before the point."""
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, digits)}f}"


def _compared(row: Row | None, first: Row | None) -> str:
    if row is None:
        return "-"
    share = "" if row.share is None else f"  {row.share * 100:3.0f} %"
    if first is None or first is row or not first.value:
        return f"{number(row.value)}{share}"
    return f"{number(row.value)}{share}  {row.value / first.value:.2f}x"


def _spread(timing: Timing) -> str:
    unit, scale = ("ms", 1e3) if timing.slowest < 1 else ("s", 1)
    fastest, slowest = (number(t * scale) for t in (timing.fastest, timing.slowest))
    busy = f"; other processes used {_busy(timing)}" if _busy(timing) else ""
    return f"{fastest} to {slowest} {unit} in {timing.runs} runs{busy}"


def _busy(measured: Report | Timing) -> str:
    """What other processes used, if it was enough to matter."""
    share = measured.other_processes
    return f"{share * 100:.0f} %" if share is not None and share > BUSY_SHARE else ""


def _columns(cells: list[list[str]], right: set[int]) -> list[str]:
    """Lines of aligned cells, those of the columns `right` to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def _read(kind: Any, value: Any, name: str) -> Any:
    """A value of JSON as the type of a field of a report; TypeError or ValueError if it is not."""
    if isinstance(kind, UnionType):  # X | None
        return None if value is None else _read(get_args(kind)[0], value, name)
    if get_origin(kind) is dict and isinstance(value, dict):
        key, item = get_args(kind)
        return {key(k): _read(item, v, f"{name} {k}") for k, v in value.items()}
    if hasattr(kind, "__dataclass_fields__") and isinstance(value, dict):
        hints = get_type_hints(kind)
        may_lack = {f.name for f in fields(kind) if {f.default, f.default_factory} != {MISSING}}
        if not hints.keys() - may_lack <= value.keys() <= hints.keys():
            raise TypeError(f"{name} with other fields: {sorted(value.keys() ^ hints.keys())}")
        return kind(**{name: _read(hints[name], value[name], name) for name in value})
    if kind is float and type(value) in (int, float) and math.isfinite(value) and value >= 0:
        return float(value)
    if kind in (int, str) and type(value) is kind:
        return value
    raise TypeError(f"{name} {value!r}")
