"""`bench`: measure artifacts, or put measurements side by side."""

import argparse
from pathlib import Path

from ..runtime.cli.main import Commands
from ..runtime.cli.terminal import say_stage
from .remote import add_remote, chosen_remote


def add_bench(commands: Commands) -> None:
    command = commands.add_parser("bench", help="measure artifacts on this machine, or compare")
    command.add_argument("artifacts", nargs="*", metavar="OUT", help="measured one by one")
    command.add_argument(
        "--compare",
        nargs="+",
        metavar="FILE",
        help="instead of measuring, put reports of --json side by side",
    )
    command.add_argument(
        "--prefill", type=_counts, metavar="N,N", help="tokens (default: 16 to 4096)"
    )
    command.add_argument(
        "--decode", type=_counts, metavar="N,N", help="after tokens (default: 0 to 16384)"
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    command.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw them")
    add_remote(command)
    command.set_defaults(command=_bench)


def _bench(arguments: argparse.Namespace) -> None:
    from ..bench.models import DECODE_DEPTHS, PREFILL_LENGTHS, bench_each
    from ..bench.plot import check_plotting, plot
    from ..bench.report import (
        BenchError,
        check_writable,
        comparison,
        read_reports,
        table,
        write_reports,
    )

    if bool(arguments.artifacts) == bool(arguments.compare):
        given = "both" if arguments.compare else "neither"
        raise BenchError(f"bench: expected artifacts or --compare with files, found {given}")
    remote = chosen_remote(arguments)
    if arguments.plot:
        check_plotting()
    for file in filter(None, (arguments.json, arguments.plot)):
        check_writable(file)  # now, not after minutes of measuring
    reports = []
    if arguments.compare:
        reports = [report for file in arguments.compare for report in read_reports(Path(file))]
        print(comparison(reports))
    else:
        lengths = arguments.prefill or PREFILL_LENGTHS
        depths = arguments.decode or DECODE_DEPTHS
        if remote is None:
            found = bench_each(arguments.artifacts, lengths, depths, say_stage)
        else:
            from ..bench.far import bench_far

            found = (
                bench_far(artifact, remote, lengths, depths, say_stage)
                for artifact in arguments.artifacts
            )
        for report in found:
            say_stage("")
            print(table(report), end="\n\n", flush=True)
            reports.append(report)
    if arguments.json:
        write_reports(arguments.json, reports)
    if arguments.plot:
        plot(arguments.plot, reports)


def _counts(text: str) -> tuple[int, ...]:
    """For example "16,128"."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"expected numbers like 16,128, found {text!r}")
    return tuple(int(part) for part in parts)
