"""The command line: compile, run, inspect, targets, bundle, demo."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from . import __version__, targets
from .runtime.artifact import ALWAYS_HASHED_BYTES, Manifest, read_manifest
from .runtime.engine import Model, load, memory_bytes
from .runtime.errors import OsscompileError

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

    command = commands.add_parser("bench", help="measure an artifact on this machine")
    command.add_argument("artifact", metavar="OUT")
    command.add_argument("--json", metavar="FILE", help="also write the figures there")
    command.set_defaults(command=_bench)

    command = commands.add_parser("bundle", help="copy the runtime alone into a directory")
    command.add_argument("directory", metavar="DIR")
    command.set_defaults(command=_bundle)

    command = commands.add_parser("demo", help="compile the shipped model and ask it a question")
    command.add_argument("-o", "--output", metavar="OUT", default="nano.osc")
    command.set_defaults(command=_demo)
    return parser


def _compile(arguments: argparse.Namespace) -> None:
    from .compiler import compile  # TVM takes seconds to import: only where it is needed

    output = compile(
        arguments.model,
        arguments.target,
        arguments.output,
        profile=arguments.profile,
        context=arguments.context,
        dump=arguments.dump,
        progress=True,
    )
    print(f"wrote {output}; ask it something: osscompile run {output} 'What is 17 + 25?'")


def _run(arguments: argparse.Namespace) -> None:
    model = _load(arguments)
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    if arguments.prompt is not None:
        _answer(model, [*messages, {"role": "user", "content": arguments.prompt}], arguments)
        return
    print("Ask something; an empty line or Ctrl-D ends the chat.")
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return
        if not question:
            return
        messages.append({"role": "user", "content": question})
        try:
            messages += _answer(model, messages, arguments)
        except KeyboardInterrupt:  # ends the answer, not the chat
            print()
            messages.pop()


def _answer(
    model: Model, messages: list[dict[str, str]], arguments: argparse.Namespace
) -> list[dict[str, str]]:
    """Print an answer as it comes; return it as messages of the history."""
    dim, plain = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")
    answer: list[dict[str, str]] = []
    for piece in model.chat(
        messages,
        reasoning=arguments.reasoning,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        seed=arguments.seed,
    ):
        if not answer or answer[-1]["channel"] != piece.channel:
            if answer and not (arguments.hide_analysis and answer[-1]["channel"] == "analysis"):
                print(plain)
            answer.append({"role": "assistant", "channel": piece.channel, "content": ""})
            if piece.channel == "analysis" and not arguments.hide_analysis:
                print(dim, end="")
        answer[-1]["content"] += piece.text
        if piece.channel != "analysis" or not arguments.hide_analysis:
            print(piece.text, end="", flush=True)
    print(plain)
    return answer


def _inspect(arguments: argparse.Namespace) -> None:
    manifest = read_manifest(Path(arguments.artifact))
    context = arguments.context or manifest.context
    if not 1 <= context <= manifest.context:
        raise OsscompileError(f"context: expected 1 to {manifest.context}, found {context}")
    machine = manifest.machine
    features = ", ".join(machine.cpu_features)
    _table(
        [
            ("model", f"{manifest.model}, profile {manifest.profile}"),
            ("made by", f"osscompile {manifest.compiler}"),
            ("target", f"{manifest.target}: {machine.system} {machine.architecture}, {features}"),
            ("layers", f"{len(manifest.sliding)}, {sum(manifest.sliding)} of them sliding"),
            ("context", f"{manifest.context} positions, prefill in {manifest.chunk}"),
            ("vocabulary", f"{manifest.vocab_size} ids"),
        ]
    )
    print(f"\nmemory at {context} positions")
    needed = memory_bytes(manifest, context)
    rows = [*needed.items(), ("total", sum(needed.values()))]
    _table([(f"  {name}", f"{size / 1e6:,.1f} MB") for name, size in rows])
    print("\nfiles")
    _table([(f"  {n}", f"{f.num_bytes:,} bytes") for n, f in sorted(manifest.files.items())])


def _targets(arguments: argparse.Namespace) -> None:
    loaded = [targets.load(name) for name in targets.names()]
    _table([("target", "machine"), *((t.name, t.description) for t in loaded)])


def _bench(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from .bench import DECODE_DEPTHS, PREFILL_LENGTHS, bench, table

    stages = 1 + len(PREFILL_LENGTHS) + len(DECODE_DEPTHS)
    with tqdm(total=stages, desc="bandwidth", leave=False) as bar:

        def next_stage(name: str) -> None:
            bar.set_description(name)
            bar.update()

        report = bench(arguments.artifact, progress=next_stage)
    print(f"{report.model}, profile {report.profile}, on {report.machine}, {report.cores} cores")
    if report.load_before > 0.5:
        print(f"warning: other processes were busy (load {report.load_before:.1f}): figures suffer")
    _table([(what, f"{speed:>14}  {note}") for what, speed, note in table(report)])
    if arguments.json:
        Path(arguments.json).write_text(report.to_json(), encoding="utf-8")


def _bundle(arguments: argparse.Namespace) -> None:
    from .bundle import bundle_runtime

    folder = bundle_runtime(Path(arguments.directory))
    print(f"wrote {folder}; beside it, `import {folder.name}` needs what its README.txt says")


def _demo(arguments: argparse.Namespace) -> None:
    from .compiler import compile

    print("nano, a tiny gpt-oss that ships with osscompile, is compiled for this machine.")
    output = compile("nano", output=arguments.output, context=4096, progress=True)
    model = load(output)
    print(f"\n> {DEMO_QUESTION}")
    options = _parser().parse_args(["run", str(output), DEMO_QUESTION])
    _answer(model, [{"role": "user", "content": DEMO_QUESTION}], options)
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
