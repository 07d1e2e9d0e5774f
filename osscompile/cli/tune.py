"""`tune`: measure what schedules leave open."""

import argparse
from pathlib import Path

from ..options import path_option
from ..runtime.cli.main import Commands
from ..runtime.errors import OsscompileError
from ..runtime.trials.files import kernel_folders
from ..runtime.trials.measure import attempt_here
from .remote import add_remote, chosen_remote

PLACES = ("work", "output", "emit", "measure", "ingest")  # options that name one


def add_tune(commands: Commands) -> None:
    command = commands.add_parser("tune", help="measure what schedules leave open, for compiles")
    command.add_argument("--target", help="default: this machine's")
    command.add_argument("--variant", metavar="NAME", help="default: the best that runs here")
    command.add_argument(
        "--model", action="append", metavar="MODEL", help="default: gpt-oss-20b and gpt-oss-120b"
    )
    command.add_argument("--profile", default="fast", help="fast (default) or exact")
    command.add_argument(
        "--trials",
        type=int,
        default=64,
        metavar="N",
        help="of each kernel, at most (default: 64); 0 with --emit: to check every kernel",
    )
    command.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    command.add_argument(
        "--work", type=Path, metavar="DIR", help="default: .osscompile-tuning/TARGET-VARIANT"
    )
    command.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="of records (default: where compiles look)",
    )
    step = command.add_mutually_exclusive_group()  # for a machine without the compiler
    step.add_argument("--emit", type=Path, metavar="DIR", help="only build the candidates")
    step.add_argument("--measure", type=Path, metavar="DIR", help="only measure those built")
    step.add_argument("--ingest", type=Path, metavar="DIR", help="only read what was measured")
    add_remote(command)
    command.set_defaults(command=_tune)


def _tune(arguments: argparse.Namespace) -> None:
    from ..schedules.records import load_records, records_file
    from ..tuning import records, tune

    for option in PLACES:
        if (place := getattr(arguments, option)) is not None:
            path_option(f"--{option}", place)
    remote = chosen_remote(arguments)
    if remote is not None and (arguments.emit or arguments.ingest):
        step = "--emit" if arguments.emit else "--ingest"
        raise OsscompileError(
            f"{step}: expected no --rpc, because nothing is measured, found one; give it with "
            "--measure"
        )
    if remote is None:
        attempt = attempt_here(arguments.threads)
    else:
        from ..tuning.far import attempt_there

        attempt = attempt_there(remote)
    if arguments.measure:
        tune.measure(arguments.measure, attempt)
        print(f"measured; copy {arguments.measure} to where `osscompile tune --ingest` runs")
        return
    target = tune.choose_target(arguments.target, arguments.variant)
    what = (target, arguments.model or tune.MODELS, arguments.profile, arguments.trials)
    if arguments.emit:
        count = tune.emit(arguments.emit, *what)
        print(f"wrote {count} kernels; measure them: osscompile tune --measure {arguments.emit}")
        return
    output = arguments.output or records.own_records_file(target)
    records.check_records(output)  # now, not after hours of measuring
    if arguments.ingest:
        findings = records.read_findings(kernel_folders(arguments.ingest), target)
    else:
        work = arguments.work or Path(".osscompile-tuning", f"{target.name}-{target.variant}")
        print(f"trials are kept in {work}: once interrupted, run the same command to go on")
        findings = tune.tune(work, *what, attempt)
    print(tune.table(findings))
    below = load_records(target) if output != records_file(target) else None
    records.write_records(output, findings, below)
    print(f"wrote {sum(bool(f.constants) for f in findings)} records to {output}")
