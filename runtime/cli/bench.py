"""`bench`: measure artifacts, or put measurements side by side."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..bench.models import DECODE_DEPTHS, PREFILL_LENGTHS, bench_each
from ..bench.report import (
    BenchError,
    Report,
    check_writable,
    comparison,
    read_reports,
    table,
    write_reports,
)
from .main import Commands
from .terminal import say_stage

# Artifacts, prefill lengths, decode depths, numbers of sequences -> a report of each artifact.
Measure = Callable[[Sequence[str], Sequence[int], Sequence[int], Sequence[int]], Iterable[Report]]


def add_bench(commands: Commands) -> argparse.ArgumentParser:
    command = commands.add_parser("bench", help="measure artifacts on this machine, or compare")
    command.add_argument("artifacts", nargs="*", metavar="OUT", help="measured one by one")
    command.add_argument(
        "--compare",
        nargs="+",
        metavar="FILE",
        help="instead of measuring, put reports of --json side by side",
    )
    command.add_argument(
        "--prefill",
        type=_counts,
        default=PREFILL_LENGTHS,
        metavar="N,N",
        help="tokens (default: 16 to 4096)",
    )
    command.add_argument(
        "--decode",
        type=_counts,
        default=DECODE_DEPTHS,
        metavar="N,N",
        help="after tokens (default: 0 to 16384)",
    )
    command.add_argument(
        "--sequences",
        type=_counts,
        default=(),
        metavar="N,N",
        help="that are computed together, 1 to 64 (default: none)",
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    command.set_defaults(command=_bench)
    return command


def _bench(arguments: argparse.Namespace) -> None:
    def measure(
        artifacts: Sequence[str],
        lengths: Sequence[int],
        depths: Sequence[int],
        sequences: Sequence[int],
    ) -> Iterable[Report]:
        return bench_each(artifacts, lengths, depths, say_stage, None, sequences)

    report_all(arguments, measure)


def report_all(arguments: argparse.Namespace, measure: Measure) -> list[Report]:
    """Print a table of each artifact, measured, or one of the reports that are compared; write the
    reports that --json asks for."""
    if bool(arguments.artifacts) == bool(arguments.compare):
        given = "both" if arguments.compare else "neither"
        raise BenchError(f"bench: expected artifacts or --compare with files, found {given}")
    if 0 in arguments.prefill:
        raise BenchError("--prefill: expected at least 1 token, found 0")
    if 0 in arguments.sequences:
        raise BenchError("--sequences: expected at least 1, found 0")
    if arguments.json:
        check_writable(arguments.json)  # now, not after minutes of measuring
    if arguments.compare:
        reports = [report for file in arguments.compare for report in read_reports(Path(file))]
        print(comparison(reports))
    else:
        reports = []
        for report in measure(
            arguments.artifacts, arguments.prefill, arguments.decode, arguments.sequences
        ):
            say_stage("")
            print(table(report), end="\n\n", flush=True)
            reports.append(report)
    if arguments.json:
        write_reports(arguments.json, reports)
    return reports


def _counts(text: str) -> tuple[int, ...]:
    """For example "16,128"."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"expected numbers like 16,128, found {text!r}")
    return tuple(int(part) for part in parts)
