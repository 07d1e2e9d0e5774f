"""`run` with a prompt: where it comes from, and where the answer goes."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from osscompile import cli
from osscompile.__main__ import script
from osscompile.runtime.cli.tool_file import read_functions
from osscompile.runtime.tools.functions import PythonTool

SPEAKER = [sys.executable, str(Path(__file__).with_name("speaker.py"))]


def speak(*arguments: object, piped: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    """`run` with the made-up model; piped: None for no pipe."""
    where = {"stdin": subprocess.DEVNULL} if piped is None else {"input": piped}
    return subprocess.run([*SPEAKER, *map(str, arguments)], capture_output=True, **where)


def asked(*arguments: object, piped: bytes | None = None) -> str:
    """The last message that the model got."""
    result = speak(*arguments, piped=piped)
    assert result.returncode == 0, result.stderr
    content: str = json.loads(result.stdout)["messages"][-1]["content"]
    return content


def refused(*arguments: object, piped: bytes | None = None) -> str:
    """The message, one line, with which it ends."""
    result = speak(*arguments, piped=piped)
    assert (result.returncode, result.stdout) == (1, b"")
    (line,) = result.stderr.decode().splitlines()
    return line.removeprefix("osscompile: ")


# Arguments


def test_pipe_as_a_file() -> None:
    assert asked("-f", "-", piped=b"one\n") == "one"
    assert asked("hi", "-f", "-", piped=b"one\n") == "hi\n\none"


def test_options_stand_anywhere() -> None:
    parse = cli._parser().parse_args
    parts = [["OUT"], ["hi there"], ["--reasoning", "low"], ["--hide-analysis"]]
    expected = parse(["run", "OUT", "hi there", "--reasoning", "low", "--hide-analysis"])
    assert (expected.artifact, expected.prompt) == ("OUT", "hi there")
    for order in itertools.permutations(parts):
        words = [word for part in order for word in part]
        if words.index("OUT") < words.index("hi there"):
            assert parse(["run", *words]) == expected, words
    assert parse(["run", "OUT", "--seed", "3", "--", "--hi"]).prompt == "--hi"
    assert parse(["run", "OUT", "--seed", "3"]).prompt is None
    assert parse(["bench", "a", "--decode", "0", "b"]).artifacts == ["a", "b"]


@pytest.mark.parametrize("words", [["--none", "hi"], ["hi", "--none"], ["hi", "there"], []])
def test_arguments_that_are_none(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", *(["OUT", *words] if words else [])])
    error = capsys.readouterr().err
    assert (words[-1] if "--none" not in words else "--none") in error if words else "OUT" in error


def test_options_reach_the_model() -> None:
    words = "--no-date --identity Me --system Rules --stop a --stop b --temperature 0 --seed 3"
    words += " --template checkpoint"
    said = json.loads(speak("hi", *words.split()).stdout)
    assert said["options"] == {
        "reasoning": "medium",
        "current_date": None,
        "identity": "Me",
        "template": "checkpoint",
        "stop": ["a", "b"],
        "temperature": 0.0,
        "seed": 3,
    }
    assert said["messages"][0] == {"role": "developer", "content": "Rules"}


def test_what_is_not_said_is_left_to_the_model() -> None:
    assert json.loads(speak("hi").stdout)["options"] == {"reasoning": "medium"}


# The prompt


def test_prompt_file_and_pipe_in_this_order(tmp_path: Path) -> None:
    file = tmp_path / "f.txt"
    file.write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\r\n")
    assert asked("-f", file) == "caf\u00e9"
    assert (
        asked(piped=b"piped\n\nlines\n")
        == asked("-", piped=b"piped\n\nlines")
        == ("piped\n\nlines")
    )
    assert asked("Sum up:", piped=b"piped\n") == "Sum up:\n\npiped"
    assert asked("Sum up:", "-f", file, piped=b"piped\n") == "Sum up:\n\ncaf\u00e9\n\npiped"
    assert asked("-", "-f", file, piped=b"piped\n") == "caf\u00e9\n\npiped"
    assert asked("hi", piped=b"") == asked("hi") == "hi"


def test_prompt_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"\n")
    for arguments in ([], [""], ["-"], ["-f", tmp_path / "empty"]):
        assert refused(*arguments).startswith("prompt: expected text"), arguments
    assert refused(piped=b" \n").startswith("prompt: expected text")


def test_prompt_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"\x89PNG")
    assert "image: expected UTF-8 text, found the byte 0x89 at 0" in refused(
        "-f", tmp_path / "image"
    )
    assert refused(piped=b"caf\xe9").startswith("stdin: expected UTF-8 text, found the byte 0xe9")
    assert "expected a text file that can be read" in refused("-f", tmp_path / "none")
    assert "expected a text file that can be read" in refused("hi", "-f", tmp_path)


# Where the answer goes


def test_only_the_answer_goes_to_a_pipe(nano_artifact: Path) -> None:
    command = [sys.executable, "-m", "osscompile", "run", str(nano_artifact)]
    command += ["--reasoning", "high", "What is 17 + 25?"]
    result = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    assert (result.returncode, result.stdout) == (0, b"17 + 25 = 42.\n")
    assert len(result.stderr) > 20 and b"\033" not in result.stderr
    result = subprocess.run(
        [*command, "--hide-analysis"], capture_output=True, stdin=subprocess.DEVNULL
    )
    assert (result.stdout, result.stderr) == (b"17 + 25 = 42.\n", b"")


def test_an_answer_obeys_a_schema(nano_artifact: Path, tmp_path: Path) -> None:
    file = tmp_path / "the person.json"

    def run(schema: object, *words: str) -> tuple[str, str]:
        file.write_text(schema if isinstance(schema, str) else json.dumps(schema))
        command = [sys.executable, "-m", "osscompile", "run", str(nano_artifact), *words]
        command += ["--schema", str(file)]
        result = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
        return result.stdout.decode(), result.stderr.decode()

    question = "Emma lives in Paris, is 28 years old and likes green."
    properties = {"name": {"type": "string"}, "age": {"type": "integer"}}
    closed = {"type": "object", "additionalProperties": False}
    person = {**closed, "properties": properties, "required": ["name", "age"]}
    assert json.loads(run(person, question)[0]) == {"name": "Emma", "age": 28}
    for effort in ("low", "medium", "high"):  # it has seen no boolean; there is no limit
        properties = {"age": {"type": "integer"}, "happy": {"type": "boolean"}}
        asked = {**closed, "properties": properties, "required": ["age", "happy"]}
        said = json.loads(run(asked, "Answer in JSON.", "--reasoning", effort)[0])
        assert {key: type(value) for key, value in said.items()} == {"age": int, "happy": bool}
    assert "expected a JSON schema" in run("{", question)[1]
    assert "expected a name and a schema" in run([], question)[1]


def test_other_channels_and_calls_are_no_answer() -> None:
    for question, shown in (("odd", b"odd\n"), ("call", b'f: {"x": 1}\nThe model waits for')):
        result = speak(question, "--hide-analysis")
        assert result.stdout == b"" and result.stderr.startswith(shown)


@pytest.mark.parametrize("words", [["call"], ["hi", "--verbose"]])
def test_notes_that_cannot_be_written_lose_no_answer(words: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            [*SPEAKER, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=full
        )
    assert result.returncode == 0 and (b'"messages"' in result.stdout) == ("hi" in words)


def test_messages_on_one_channel_are_lines() -> None:
    assert speak("twice").stdout == b"One.\nTwo.\n"


def test_events_are_lines_of_json() -> None:
    result = speak("call", "--json")
    assert b"Let me" not in result.stderr
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {"type": "reasoning", "channel": "analysis", "text": "Let me "},
        {"type": "reasoning", "channel": "analysis", "text": "see."},
        {"type": "tool_call", "channel": "commentary", "id": "call_0", "name": "f"},
        {
            "type": "arguments",
            "channel": "commentary",
            "id": "call_0",
            "arguments": '{"x": 1}',
        },
        {
            "type": "finish",
            "reason": "tool_calls",
            "usage": {
                "prompt_tokens": 100,
                "cached_tokens": 64,
                "completion_tokens": 20,
                "reasoning_tokens": 8,
            },
        },
    ]


def test_answer_that_is_cut_off_says_by_what() -> None:
    for question, cause in (("cut", b"by --max-tokens"), ("full", b"context of 4096 positions")):
        assert cause in speak(question).stderr
    assert b"cut off" not in speak("hi").stderr


def test_verbose_tells_tokens_speeds_and_the_end() -> None:
    result = speak("hi", "--verbose", "--hide-analysis")
    assert b'"messages"' in result.stdout
    prompt, answer = result.stderr.decode().splitlines()
    assert prompt.startswith("prompt: 100 tokens, 64 of them cached")
    assert answer.startswith("answer: 20 tokens, 8 of them reasoning, ")
    assert answer.endswith(" tok/s; ended: stop")


def test_reader_that_goes_away() -> None:
    result = subprocess.run(
        ["sh", "-c", f"'{SPEAKER[0]}' '{SPEAKER[1]}' endless | head -c 4"],
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    assert result.stdout == b"0 1 " and b"Traceback" not in result.stderr


def test_interrupt_before_the_command_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_parser", interrupted)
    with pytest.raises(SystemExit) as ended:
        script()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "\nosscompile: interrupted\n"


INTERRUPTED = """
import runpy, sys

class Interrupt:
    def find_spec(self, name, *_):
        if name == sys.argv[2]:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("imported", ["argparse", "numpy"])
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("osscompile", "osscompile"),
        ("osscompile.runtime", "python -m osscompile.runtime"),
        ("osscompile.runtime.measure", "measure"),
    ],
)
def test_interrupt_while_a_command_is_imported(module: str, name: str, imported: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, module, imported], capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (130, f"\n{name}: interrupted\n")


# Tools

TOOLS = '''
from __future__ import annotations
import json
from dataclasses import dataclass
from json import dumps

@dataclass
class Sum:
    result: int

def multiply(a: int, b: int) -> Sum:
    """Multiplies."""
    print("multiplying")
    return Sum(a * b)

def _hidden() -> None: ...

times = multiply
'''


def test_functions_of_a_file_are_those_that_it_defines(tmp_path: Path) -> None:
    file = tmp_path / "my tools.py"
    file.write_text(f"{TOOLS}\nimport beside")
    (tmp_path / "beside.py").write_text("")
    (function,) = read_functions(file)
    assert function.__name__ == "multiply"


DECORATED = '''
from functools import lru_cache, partial, wraps
from typing import Callable, NewType
import beside

Name = NewType("Name", str)
Handler = Callable[[str], str]

def doubled(function):
    def wrapper(*arguments):
        return 2 * function(*arguments)
    return wrapper

@lru_cache
def cached(a: int) -> int:
    """Is cached."""
    return a

@beside.kept
def wrapped(a: int) -> int:
    """Is wrapped."""
    return a

@doubled
def bare(a: int) -> int:
    return a

@beside.doubled
def lost(a: int) -> int:
    return a

class Adder:
    def __call__(self, a: int) -> int:
        return a + 1

five = partial(wrapped, a=5)
add_one = Adder()
square = lambda x: x * x
'''
BESIDE = """
from functools import update_wrapper
class kept:
    def __init__(self, function):
        self.function = function
        update_wrapper(self, function)
    def __call__(self, *arguments, **named):
        return self.function(*arguments, **named)
def doubled(function):
    def wrapper(*arguments): return function(*arguments)
    return wrapper
"""


def test_decorated_functions_of_a_file_and_what_else_is_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tools.py"
    file.write_text(DECORATED)
    (tmp_path / "beside.py").write_text(BESIDE)
    sys.modules.pop("beside", None)
    functions = {f.__name__: f for f in read_functions(file)}
    names = ["doubled", "cached", "wrapped", "bare", "five", "add_one", "square"]
    assert list(functions) == names
    assert "lost is left out, a function of beside" in capsys.readouterr().err
    told: dict[str, Any] = {
        name: PythonTool("it", functions[name]).definition["function"] for name in names[1:]
    }
    whole = {"type": "integer"}
    assert told["cached"]["parameters"]["properties"] == {"a": whole}
    assert told["wrapped"]["parameters"]["properties"] == {"a": whole}
    assert told["add_one"]["parameters"]["properties"] == {"a": whole}
    assert told["five"]["description"] == "Is wrapped." == told["wrapped"]["description"]
    assert told["five"]["parameters"]["properties"] == {"a": {**whole, "default": 5}}
    assert [functions[name](3) for name in ("cached", "bare", "square")] == [3, 6, 9]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys\nsys.exit(3)", "expected Python that runs, found SystemExit: 3"),
        (None, "expected a file of Python, named *.py, found none"),
        ("x = 1", "expected public functions, found none that it defines"),
        ("1 / 0", "expected Python that runs, found ZeroDivisionError: division by zero"),
        ("def f(:", "expected Python that runs, found SyntaxError: "),
        ("def f(x: bytes): ...", "tools[0] (f): parameter x: expected a type that JSON can say"),
        ("async def f(): ...", "tools[0]: expected a function that returns its result"),
    ],
)
def test_files_of_tools_that_cannot_be_used(
    text: str | None, message: str, tmp_path: Path, nano_artifact: Path
) -> None:
    file = tmp_path / "tools.py"
    if text is not None:
        file.write_text(text)
    command = [sys.executable, "-m", "osscompile", "run", nano_artifact, "hi", "--tools", file]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert result.returncode == 1 and message in result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""


def test_functions_of_a_file_are_run(tmp_path: Path, nano_artifact: Path) -> None:
    """The answer alone is on stdout, whatever the functions print."""
    file = tmp_path / "tools.py"
    file.write_text(TOOLS)
    command = [sys.executable, "-m", "osscompile", "run", nano_artifact, "What is 12 times 11?"]
    command += ["--tools", file, "--no-date", "--reasoning", "low"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "The result is 132.\n")
    call, printed = 'multiply: {"a":12,"b":11}', "multiplying"
    assert result.stderr == f'{call}\n{printed}\n-> {{"result": 132}}\n'
    events = subprocess.run(
        [*command, "--json"], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    (told,) = [
        event
        for event in map(json.loads, events.stdout.splitlines())
        if event["type"] == "tool_result"
    ]
    assert told == {
        "type": "tool_result",
        "channel": "commentary",
        "text": '{"result": 132}',
        "id": "call_0",
        "name": "multiply",
    }
