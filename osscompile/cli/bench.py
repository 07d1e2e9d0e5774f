"""`bench`: the runtime's own, beside limits that the compiler measures; far machines, pictures."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..runtime.bench.models import bench_each
from ..runtime.bench.report import BenchError, Report, check_writable
from ..runtime.cli import bench
from ..runtime.cli.main import Commands
from ..runtime.cli.terminal import say_stage
from .remote import add_remote, chosen_remote


def add_bench(commands: Commands) -> None:
    command = bench.add_bench(commands)
    command.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the figures")
    add_remote(command)
    command.set_defaults(command=_bench)


def _bench(arguments: argparse.Namespace) -> None:
    from ..bench.limits import LIMITS
    from ..bench.plot import check_plotting, plot

    remote = chosen_remote(arguments)
    if remote is not None and arguments.sequences:
        raise BenchError("--sequences: expected to measure here, found --rpc, which cannot")
    if arguments.plot:
        check_plotting()
        check_writable(arguments.plot)

    def measure(
        artifacts: Sequence[str],
        lengths: Sequence[int],
        depths: Sequence[int],
        sequences: Sequence[int],
    ) -> Iterable[Report]:
        if remote is None:
            return bench_each(artifacts, lengths, depths, say_stage, LIMITS, sequences)
        from ..bench.far import bench_far

        return (bench_far(artifact, remote, lengths, depths, say_stage) for artifact in artifacts)

    reports = bench.report_all(arguments, measure)
    if arguments.plot:
        plot(arguments.plot, reports)
