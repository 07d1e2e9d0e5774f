"""`run`: ask a compiled model, or chat with it."""

import argparse
import json
import re
from functools import partial
from pathlib import Path

from ..artifact import ALWAYS_HASHED_BYTES, read_manifest
from ..errors import InputError
from ..model import Model, load
from .chat import converse
from .main import CommandParser, Commands
from .options import add_kv_memory, utf8_text
from .prompt import STDIN, read_prompt, read_text_file
from .terminal import say_stage
from .tool_file import read_functions
from .transcript import Messages
from .view import View

# Those of `Model.chat` by the same names; what is not given is left to its defaults.
OPTIONS = (
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop"),
    *("identity", "template"),
)


def add_run(commands: Commands) -> CommandParser:
    command = commands.add_parser("run", help="ask a compiled model, or chat with it")
    command.add_argument("artifact", metavar="OUT")
    command.add_argument(
        "prompt",
        nargs="?",
        type=utf8_text,
        help=f"{STDIN}: only what is piped, which else follows it; without a prompt, a chat begins",
    )
    command.add_argument(
        "-f", "--file", type=Path, metavar="FILE", help=f"text after the prompt; {STDIN}: the pipe"
    )
    command.add_argument(
        "--system", type=utf8_text, metavar="TEXT", help="instructions of the developer"
    )
    command.add_argument(
        "--identity", type=utf8_text, metavar="TEXT", help="who the model is told to be"
    )
    command.add_argument(
        "--template",
        metavar="harmony|checkpoint",
        help="what writes prompts: harmony's rules (default), or the checkpoint's chat template",
    )
    command.add_argument(
        "--tools",
        type=Path,
        metavar="FILE.py",
        help="Python whose public functions the model may call; they run here, as you",
    )
    command.add_argument("--no-date", action="store_true", help="do not tell it today's date")
    command.add_argument("--reasoning", default="medium", metavar="low|medium|high")
    command.add_argument("--hide-analysis", action="store_true", help="show answers only")
    command.add_argument("--json", action="store_true", help="print events, a line of JSON each")
    command.add_argument("--verbose", action="store_true", help="tell tokens and speeds on stderr")
    command.add_argument("--context", type=int, metavar="N", help="most positions")
    add_kv_memory(command)
    command.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of an answer")
    command.add_argument(
        "--stop",
        action="append",
        type=utf8_text,
        metavar="TEXT",
        help="ends an answer (repeat for several)",
    )
    command.add_argument(
        "--schema", type=Path, metavar="FILE.json", help="a JSON schema, which answers obey"
    )
    command.add_argument("--temperature", type=float, help="0: greedy (default: the checkpoint's)")
    command.add_argument("--top-p", type=float, metavar="P")
    command.add_argument("--top-k", type=int, metavar="K")
    command.add_argument("--min-p", type=float, metavar="P")
    command.add_argument("--seed", type=int, metavar="N")
    command.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    command.set_defaults(command=run_artifact)
    return command


def run_artifact(arguments: argparse.Namespace) -> None:
    """Answer the prompt that the arguments give, or chat."""
    prompt = read_prompt(arguments.prompt, arguments.file)
    response_format = _read_schema(arguments.schema) if arguments.schema else None
    tools = [] if arguments.tools is None else read_functions(arguments.tools)
    model = _load(arguments)
    answer = partial(model.run_tools, tools=tools) if tools else model.chat
    options = {name: getattr(arguments, name) for name in OPTIONS}
    options = {name: value for name, value in options.items() if value is not None}
    options["reasoning"] = arguments.reasoning
    if response_format is not None:
        options["response_format"] = response_format
    if arguments.no_date:
        options["current_date"] = None
    messages: Messages = []
    if arguments.system:
        messages.append({"role": "developer", "content": arguments.system})
    view = View(
        model.context,
        hide_analysis=arguments.hide_analysis,
        events=arguments.json,
        verbose=arguments.verbose,
    )
    if prompt is None:
        converse(answer, messages, options, view)
    else:
        view.show(answer([*messages, {"role": "user", "content": prompt}], **options), [])


def _read_schema(path: Path) -> dict[str, object]:
    """The response format; the model is told the file's name as the schema's."""
    text = read_text_file(path)
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a JSON schema, found no JSON: {error}") from None
    name = re.sub(r"\s+", "_", path.stem)
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}


def _load(arguments: argparse.Namespace) -> Model:
    """Load, and tell how far the hashing of a large new copy is, which takes seconds a gigabyte."""
    files = read_manifest(Path(arguments.artifact)).files
    total = sum(file.num_bytes for file in files.values())
    hashed = 0

    def progress(num_bytes: int) -> None:
        nonlocal hashed
        hashed += num_bytes
        say_stage(f"verifying {hashed / 1e9:.1f} of {total / 1e9:.1f} GB")

    model = load(
        arguments.artifact,
        context=arguments.context,
        kv_memory=arguments.kv_memory,
        threads=arguments.threads,
        progress=progress if total > ALWAYS_HASHED_BYTES else None,
    )
    if hashed:
        say_stage("")
    return model
