"""Draw reports: decode by depth under its roofline, prefill by length."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.bench.report import BenchError, Report, Timing, machine

# Okabe and Ito's palette, which the colour-blind can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, GRID = "#333333", "#DDDDDD"


def check_plotting() -> None:
    """Raise BenchError now rather than after the measuring."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BenchError(
            "--plot: expected matplotlib to be installed, found none; "
            "pip install 'osscompile[plot]'"
        ) from None


def plot(path: Path, reports: Sequence[Report]) -> None:
    """Write a PNG, one colour a report."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), dpi=150, layout="constrained")
    decode, prefill = figure.subplots(1, 2)
    for i, report in enumerate(reports):
        colour = COLOURS[i % len(COLOURS)]
        _draw_decode(decode, report, colour)
        _draw_prefill(prefill, report, colour)
    _finish(decode, "Decode", "tokens before, in the context")
    _finish(prefill, "Prefill", "tokens of the prompt")
    prefill.set_xscale("log", base=2)
    lengths = sorted({length for report in reports for length in report.prefill})
    prefill.set_xticks(lengths, [f"{length:,}" for length in lengths])
    _legend(figure, decode, len(reports))
    figure.supxlabel("\n".join(_caption(reports)), fontsize=8, color=INK, x=0.01, ha="left")
    figure.savefig(path, format="png", facecolor="white")


def _draw_decode(axes: Any, report: Report, colour: str) -> None:
    """Measured steps as points, and what the memory allowed meanwhile as a dashed line."""
    axes.plot(
        [],
        [],
        "o-",
        color=colour,
        label=f"{report.model} {report.profile}, {machine(report)}",
    )
    if not report.decode:
        return
    depths = list(report.decode)
    if report.bandwidth is not None:
        limits = [report.roofline(depth) for depth in depths]
        axes.plot(depths, limits, "--", color=colour, linewidth=1.2)
    axes.errorbar(depths, **_speeds([1] * len(depths), report.decode.values(), colour))


def _draw_prefill(axes: Any, report: Report, colour: str) -> None:
    lengths = list(report.prefill)
    if lengths:
        axes.errorbar(lengths, **_speeds(lengths, report.prefill.values(), colour))


def _speeds(tokens: Sequence[int], timings: Iterable[Timing], colour: str) -> dict[str, Any]:
    """Medians in tokens a second, with bars from the slowest to the fastest run."""
    spans = [
        (n / t.slowest, n / t.median, n / t.fastest) for n, t in zip(tokens, timings, strict=True)
    ]
    low, middle, high = np.array(spans).T
    bars = {"yerr": (middle - low, high - middle), "elinewidth": 1, "capsize": 3}
    return {"y": middle, "fmt": "o-", "color": colour, "markersize": 5, **bars}


def _finish(axes: Any, title: str, xlabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=14, fontweight="bold", color=INK)
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel("tokens a second", color=INK)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,g}")


def _legend(figure: Any, axes: Any, num_reports: int) -> None:
    axes.plot(
        [],
        [],
        "--",
        color=INK,
        label="roofline: all bytes of a step at the memory's speed meanwhile",
    )
    axes.plot([], [], "|", color=INK, label="slowest to fastest run; lines join the medians")
    figure.legend(loc="outside upper left", ncols=1 + num_reports // 3, frameon=False, fontsize=9)


def _caption(reports: Sequence[Report]) -> list[str]:
    """The conditions: what is the same in all reports once."""
    lines = []
    for report in reports:
        busy, what = report.other_processes, report.device or report.cpu
        line = f"{report.model} {report.profile} on {what}: {report.date[:10]}"
        if report.bandwidth is not None:
            line += f", {report.bandwidth / 1e9:.1f} GB/s read bandwidth"
        if busy is not None:
            line += f", other processes used {busy * 100:.0f} % of the CPU"
        lines.append(line)
    for report in reports:
        software = ", ".join(f"{name} {version}" for name, version in report.versions.items())
        lines.append(f"osscompile bench: {software}, commit {(report.commit or 'unknown')[:12]}")
    return list(dict.fromkeys(lines))
