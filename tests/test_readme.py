"""Every example of README runs, with nano in place of the big models, or is named here with the
reason why it does not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_serve_process import server

from osscompile.targets import Target

README = Path(__file__).parents[1] / "README.md"

ADDRESS = "http://127.0.0.1:8000"

# What runs here for a line of a shell's block, {target} and {variant} being this machine's.
LINES = {
    "osscompile compile openai/gpt-oss-20b --target x86 -o 20b.osc": (
        "osscompile compile nano --target {target} --variants {variant} -o 20b.osc"
    ),
    'osscompile run 20b.osc "Why is the sky blue?" --reasoning low': (
        'osscompile run 20b.osc "Why is the sky blue?" --reasoning low --max-tokens 20'
    ),
    'git log | osscompile run 20b.osc "Sum up:" > summary.txt': (
        'echo "What is 17 + 25?" | osscompile run 20b.osc "Sum up:" --max-tokens 20 > summary.txt'
    ),
    'osscompile run 20b.osc "What is 12 times 11?" --tools tools.py': (
        "printf 'def multiply(a: int, b: int):\\n    return a * b\\n' > tools.py "
        '&& osscompile run 20b.osc "What is 12 times 11?" --tools tools.py'
    ),
    "osscompile inspect 20b.osc --context 8192": "osscompile inspect 20b.osc --context 8192",
    'osscompile run openai/gpt-oss-20b "Why is the sky blue?"': (
        'osscompile run nano "Why is the sky blue?" --target {target} --max-tokens 20'
    ),
    "osscompile list": "osscompile list",
    "osscompile measure-fidelity 20b.osc openai/gpt-oss-20b": (
        "osscompile measure-fidelity 20b.osc nano --tokens 100"
    ),
    "osscompile targets": "osscompile targets",
    "osscompile bundle out/": "osscompile bundle out/",
    "osscompile bench 20b.osc --json here.json --plot here.png": (
        "osscompile bench 20b.osc --json here.json --plot here.png --prefill 16 --decode 0 "
        "&& cp here.json there.json"
    ),
    "osscompile bench --compare here.json there.json": (
        "osscompile bench --compare here.json there.json"
    ),
    "osscompile tune --target x86 --trials 64": (
        "osscompile tune --target {target} --trials 1 --model nano --emit candidates"
    ),
}
SERVED = (  # a test of its own runs it, and the blocks of Python that ask the server
    'curl http://127.0.0.1:8000/v1/chat/completions --json \'{"model": "20b", '
    '"messages": [{"role": "user", "content": "17 + 25?"}]}\''
)
LEFT_OUT = {
    "osscompile serve 20b.osc --name 20b": "it runs until it is ended; the next one asks one",
    SERVED: "test_server_answers does it",
    "python3.11 -m venv .venv && .venv/bin/pip install -q -e . && .venv/bin/osscompile demo": (
        "CI begins with it, and test_cli.py runs the demo"
    ),
    ".venv/bin/pip install -q -e '.[test]' && .venv/bin/pytest": "this is its run",
    "pip install -e '.[opencl]' pocl-binary-distribution": "CI installs both as extras of test",
    "osscompile compile nano --target snapdragon-gpu --context 4096 -o gpu.osc && osscompile run "
    'gpu.osc "What is 17 + 25?"': "test_opencl.py does it, which takes a minute",
    ".venv/bin/python tests/aarch64.py .aarch64 && OSSCOMPILE_AARCH64=$PWD/.aarch64 "
    ".venv/bin/pytest tests/test_aarch64.py": "CI does it, in an environment of its own",
}


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text("utf-8"), re.M | re.S)
    assert {name for name, _ in fences} <= {"sh", "python"}
    return [text for name, text in fences if name == language]


def shell_lines() -> list[str]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines]


def test_every_line_is_known() -> None:
    """One that is new needs its place above, and one that is gone leaves it."""
    assert sorted(shell_lines()) == sorted([*LINES, *LEFT_OUT])


def test_lines_run_one_after_the_other(this_machine: Target, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    function = f'osscompile() {{ "{sys.executable}" -m osscompile "$@"; }}\n'
    for line in shell_lines():
        if line in LEFT_OUT:
            continue
        here = LINES[line].format(target=this_machine.name, variant=this_machine.variant)
        run(["sh", "-c", function + here], tmp_path)
    assert {"20b.osc", "out", "here.json", "here.png"} <= {path.name for path in tmp_path.iterdir()}


def test_python_runs(this_machine: Target, tmp_path: Path) -> None:
    """As it stands, one block after the other, but for the model and the machine."""
    block = "\n".join(block for block in blocks("python") if ADDRESS not in block)
    there = 'compile("openai/gpt-oss-20b", target="x86")'
    here = f'compile("nano", target={this_machine.name!r}, variants=[{this_machine.variant!r}])'
    assert there in block
    shown = run([sys.executable, "-c", block.replace(there, here)], tmp_path)
    assert "17 + 25 = 42" in shown
    assert '{"name":"Emma","age":28}' in shown


def test_server_answers(nano_artifact: Path, tmp_path: Path) -> None:
    for package in ("agents", "fastapi", "openai", "uvicorn"):
        pytest.importorskip(package)
    asking = [block for block in blocks("python") if ADDRESS in block]
    with server(nano_artifact, "--name", "20b") as (_, url, _):
        if shutil.which("curl"):
            said = run(["sh", "-c", SERVED.replace(ADDRESS, url)], tmp_path)
            assert "17 + 25 = 42" in said
        for block in asking:
            said = run([sys.executable, "-c", block.replace(ADDRESS, url)], tmp_path)
            assert "17 + 25 = 42" in said and "7" in said.splitlines()[-1]


def run(command: list[str], folder: Path) -> str:
    """What it prints; nothing of it is left in this home."""
    result = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"HOME": str(folder / "home")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout
