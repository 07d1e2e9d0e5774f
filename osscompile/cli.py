"""The command line: compile, run, inspect, targets, bundle, demo."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__, targets
from .runtime.artifact import ALWAYS_HASHED_BYTES, ANY, Manifest, read_manifest
from .runtime.engine import Model, load, memory_bytes
from .runtime.errors import OsscompileError
from .runtime.trials.files import kernel_folders
from .runtime.trials.measure import attempt_here

if TYPE_CHECKING:
    from .remote import Remote

DEMO_QUESTION = "What is 17 + 25?"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 1 after an error of ours, which goes to stderr as one message."""
    arguments = _parser().parse_args(argv)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        arguments.command(arguments)
        sys.stdout.flush()
    except OsscompileError as error:
        print(f"osscompile: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nosscompile: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away: nothing more to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="osscompile", description="Compile gpt-oss models for one machine, and run them."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("compile", help="compile a model into an artifact")
    command.add_argument(
        "model",
        metavar="MODEL",
        help="a directory in the Hugging Face layout, a Hugging Face id, nano, or "
        "synthetic:gpt-oss-20b, synthetic:gpt-oss-120b, synthetic:tiny",
    )
    command.add_argument("--target", help="see `osscompile targets` (default: this machine's)")
    command.add_argument(
        "--variants", metavar="A,B", help="of the target's CPUs, to compile for (default: all)"
    )
    command.add_argument("-o", "--output", metavar="OUT", help="default: MODEL-TARGET.osc")
    command.add_argument(
        "--profile",
        default="fast",
        help="fast: int8 dense weights and activations (default); exact: as in the checkpoint",
    )
    command.add_argument("--context", type=int, metavar="N", help="most positions")
    command.add_argument("--dump", metavar="DIR", help="write the IR after each phase there")
    command.set_defaults(command=_compile)

    command = commands.add_parser("run", help="chat with a compiled model")
    command.add_argument("artifact", metavar="OUT")
    command.add_argument("prompt", nargs="?", help="without it, a chat begins")
    command.add_argument("--reasoning", default="medium", metavar="low|medium|high")
    command.add_argument("--hide-analysis", action="store_true", help="show answers only")
    command.add_argument("--system", metavar="TEXT", help="instructions for the model")
    command.add_argument("--context", type=int, metavar="N", help="most positions")
    command.add_argument("--max-tokens", type=int, metavar="N")
    command.add_argument("--temperature", type=float, default=0.0, help="default: 0, greedy")
    command.add_argument("--top-p", type=float, default=1.0)
    command.add_argument("--top-k", type=int, default=0)
    command.add_argument("--min-p", type=float, default=0.0)
    command.add_argument("--seed", type=int)
    command.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    command.set_defaults(command=_run)

    command = commands.add_parser("inspect", help="say what an artifact is and what it needs")
    command.add_argument("artifact", metavar="OUT")
    command.add_argument("--context", type=int, metavar="N", help="positions to plan for")
    command.set_defaults(command=_inspect)

    command = commands.add_parser("targets", help="list the machines that can be compiled for")
    command.set_defaults(command=_targets)

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
    _add_rpc(command)
    command.set_defaults(command=_bench)

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
        "--output", type=Path, metavar="FILE", help="of records (default: where compiles look)"
    )
    step = command.add_mutually_exclusive_group()  # for a machine without the compiler
    step.add_argument("--emit", type=Path, metavar="DIR", help="only build the candidates")
    step.add_argument("--measure", type=Path, metavar="DIR", help="only measure those built")
    step.add_argument("--ingest", type=Path, metavar="DIR", help="only read what was measured")
    _add_rpc(command)
    command.set_defaults(command=_tune)

    command = commands.add_parser("bundle", help="copy the runtime alone into a directory")
    command.add_argument("directory", metavar="DIR")
    command.set_defaults(command=_bundle)

    command = commands.add_parser("demo", help="compile the shipped model and ask it a question")
    command.add_argument("-o", "--output", metavar="OUT", default="nano.osc")
    command.set_defaults(command=_demo)
    return parser


def _add_rpc(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--rpc", metavar="HOST:PORT", help="measure on a server that this tracker of TVM's knows"
    )
    command.add_argument("--key", metavar="K", help="of the server, for --rpc")


def _remote(arguments: argparse.Namespace) -> "Remote | None":
    from .remote import parse_remote

    return parse_remote(arguments.rpc, arguments.key)


def _compile(arguments: argparse.Namespace) -> None:
    from .compiler import compile  # TVM takes seconds to import: only where it is needed

    output = compile(
        arguments.model,
        arguments.target,
        arguments.output,
        variants=arguments.variants.split(",") if arguments.variants is not None else None,
        profile=arguments.profile,
        context=arguments.context,
        dump=arguments.dump,
        progress=True,
    )
    print(f"wrote {output}; ask it something: osscompile run {output} 'What is 17 + 25?'")


def _run(arguments: argparse.Namespace) -> None:
    from .chat import answer, converse

    model = _load(arguments)
    names = ("reasoning", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed")
    options = {name: getattr(arguments, name) for name in names}
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    if arguments.prompt is None:
        converse(model, messages, arguments.hide_analysis, options)
        return
    messages.append({"role": "user", "content": arguments.prompt})
    answer(model, messages, arguments.hide_analysis, options)


def _inspect(arguments: argparse.Namespace) -> None:
    manifest = read_manifest(Path(arguments.artifact))
    context = arguments.context or manifest.context
    if not 1 <= context <= manifest.context:
        raise OsscompileError(f"context: expected 1 to {manifest.context}, found {context}")
    by_system = manifest.system != ANY
    here = manifest.variant_here() if by_system else None  # a device is asked when it is used
    machine = (
        f"{manifest.system} {manifest.architecture}, {manifest.device}"
        if by_system
        else f"any device of {manifest.runtime}"
    )
    _table(
        [
            ("model", f"{manifest.model}, profile {manifest.profile}"),
            ("made by", f"osscompile {manifest.compiler}"),
            ("target", f"{manifest.target}: {machine}"),
            ("layers", f"{len(manifest.sliding)}, {sum(manifest.sliding)} of them sliding"),
            ("context", f"{manifest.context} positions, prefill in {manifest.chunk}"),
            ("vocabulary", f"{manifest.vocab_size} ids"),
        ]
    )
    print("\nvariants, best first" + (": none runs here" if by_system and here is None else ""))
    _table(
        [
            (f"  {v.name}", ", ".join(v.cpu_features) + " (runs here)" * (v == here))
            for v in manifest.variants
        ]
    )
    print(f"\nmemory at {context} positions")
    needed = memory_bytes(manifest, context)
    rows = [*needed.items(), ("total", sum(needed.values()))]
    _table([(f"  {name}", f"{size / 1e6:,.1f} MB") for name, size in rows])
    print("\nfiles")
    _table([(f"  {n}", f"{f.num_bytes:,} bytes") for n, f in sorted(manifest.files.items())])


def _targets(arguments: argparse.Namespace) -> None:
    rows = [("target", "machine; what was run of its variants, best first")]
    for name in targets.names():
        variants = targets.load_variants(name)
        rows.append((name, variants[0].description))
        rows += [(f"  {v.variant}", v.checked) for v in variants]
    _table(rows)


def _bench(arguments: argparse.Namespace) -> None:
    from .bench.models import DECODE_DEPTHS, PREFILL_LENGTHS, bench_each
    from .bench.plot import check_plotting, plot
    from .bench.report import (
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
    remote = _remote(arguments)
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
            found = bench_each(arguments.artifacts, lengths, depths, _say_stage)
        else:
            from .bench.far import bench_far

            found = (
                bench_far(artifact, remote, lengths, depths, _say_stage)
                for artifact in arguments.artifacts
            )
        for report in found:
            _say_stage("")
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


def _say_stage(stage: str) -> None:
    """On one line of a terminal, each in the place of the one before."""
    if sys.stderr.isatty():
        print(f"\r\033[K{stage}", end="", file=sys.stderr, flush=True)


def _tune(arguments: argparse.Namespace) -> None:
    from .schedules.records import records_file
    from .tuning import records, tune

    remote = _remote(arguments)
    if remote is not None and (arguments.emit or arguments.ingest):
        step = "--emit" if arguments.emit else "--ingest"
        raise OsscompileError(
            f"{step}: expected no --rpc, because nothing is measured, found one; give it with "
            "--measure"
        )
    if remote is None:
        attempt = attempt_here(arguments.threads)
    else:
        from .tuning.far import attempt_there

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
    output = arguments.output or records_file(target)
    records.check_records(output)  # now, not after hours of measuring
    if arguments.ingest:
        findings = records.read_findings(kernel_folders(arguments.ingest), target)
    else:
        work = arguments.work or Path(".osscompile-tuning", f"{target.name}-{target.variant}")
        print(f"trials are kept in {work}: once interrupted, run the same command to go on")
        findings = tune.tune(work, *what, attempt)
    print(tune.table(findings))
    records.write_records(output, findings)
    print(f"wrote {sum(bool(f.constants) for f in findings)} records to {output}")


def _bundle(arguments: argparse.Namespace) -> None:
    from .bundle import bundle_runtime

    folder = bundle_runtime(Path(arguments.directory))
    print(f"wrote {folder}; beside it, `import {folder.name}` needs what its README.txt says")


def _demo(arguments: argparse.Namespace) -> None:
    from .chat import answer
    from .compiler import compile

    print("nano, a tiny gpt-oss that ships with osscompile, is compiled for this machine.")
    here = targets.of_this_machine()
    output = compile(
        "nano", here.name, arguments.output, variants=[here.variant], context=4096, progress=True
    )
    model = load(output)
    print(f"\n> {DEMO_QUESTION}")
    answer(model, [{"role": "user", "content": DEMO_QUESTION}], False, {})
    print(
        f"\nChat with it: osscompile run {output}    Compile the real one: osscompile compile "
        "openai/gpt-oss-20b"
    )


def _load(arguments: argparse.Namespace) -> Model:
    manifest: Manifest = read_manifest(Path(arguments.artifact))
    size = sum(file.num_bytes for file in manifest.files.values())
    if size <= ALWAYS_HASHED_BYTES:
        return load(arguments.artifact, context=arguments.context, threads=arguments.threads)
    from tqdm import tqdm

    with tqdm(total=size, unit="B", unit_scale=True, desc="verifying", leave=False, delay=1) as bar:
        return load(
            arguments.artifact,
            context=arguments.context,
            threads=arguments.threads,
            progress=bar.update,
        )


def _table(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
