"""`python tests/speaker.py ARGUMENTS..`: the runtime's command `run` with a model that is made up,
so that tests choose what it says and how slowly. It answers with the conversation that it was
asked."""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from osscompile.runtime import (
    Arguments,
    Finish,
    InputError,
    Piece,
    Reasoning,
    Text,
    ToolCall,
    ToolResult,
    Usage,
)
from osscompile.runtime.cli import run
from osscompile.runtime.cli.main import CommandParser, run_command

USAGE = Usage(prompt_tokens=100, cached_tokens=64, completion_tokens=20, reasoning_tokens=8)


class Speaker:
    context = 4096

    def chat(self, messages: Sequence[Mapping[str, object]], **options: object) -> Iterator[Piece]:
        question = str(messages[-1]["content"])
        if question == "too long":
            raise InputError("prompt: expected at most 4096 tokens, found 5000")
        return self._answer(question, messages, options)

    def _answer(
        self, question: str, messages: Sequence[Mapping[str, object]], options: object
    ) -> Iterator[Piece]:
        yield Reasoning("analysis", "Let me ")
        yield Reasoning("analysis", "see.")
        match question:
            case "endless":
                for number in itertools.count():
                    yield Text("final", f"{number} ")
                    time.sleep(0.01)
            case "slow":
                time.sleep(1.5)
            case "silent":
                time.sleep(1000)
            case "broken":
                raise RuntimeError("a traceback")
            case "codes":
                yield Text("final", "\033[2mdim\x07\x9b31m\n")
            case "odd":
                yield Text("Final?", "odd")
            case "cut" | "full":
                yield Finish("length", Usage(4000, 0, 97 if question == "full" else 96, 1))
                return
            case "twice":
                yield Text("final", "One.", begins=True)
                yield Text("final", "Two.", begins=True)
            case "call":
                yield ToolCall("commentary", "call_0", "f")
                yield Arguments("commentary", "call_0", '{"x": 1}')
            case "tool":
                yield ToolCall("commentary", "call_0", "f")
                yield Arguments("commentary", "call_0", '{"x": 1}')
                yield Finish("tool_calls", USAGE)
                yield ToolResult("commentary", "y" * 1000, "call_0", "f")
                yield Text("final", "It is y.")
            case _:
                yield Text("final", json.dumps({"messages": messages, "options": options}))
        yield Finish("tool_calls" if question == "call" else "stop", USAGE)


if __name__ == "__main__":
    run._load = lambda arguments: Speaker()  # type: ignore[assignment, return-value]
    command_line = argparse.ArgumentParser(prog="osscompile")
    run.add_run(command_line.add_subparsers(parser_class=CommandParser))
    sys.exit(run_command(command_line, ["run", "speaker.osc", *sys.argv[1:]]))
