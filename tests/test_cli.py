"""The command line: the commands a person types, their output, and their errors."""

import subprocess
import sys
from pathlib import Path

import pytest

from osscompile import cli
from osscompile.targets import Target


def test_demo_compiles_nano_and_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "-o", str(tmp_path / "nano.osc")]) == 0
    assert "17 + 25 = 42" in capsys.readouterr().out


def test_run_hides_or_shows_the_analysis(
    nano_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", str(nano_artifact), "What is 17 + 25?", "--reasoning", "high"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert cli.main([*arguments, "--hide-analysis"]) == 0
    hidden = capsys.readouterr().out
    assert shown.endswith(hidden.lstrip()) and len(shown) > len(hidden)
    assert hidden.strip() == "17 + 25 = 42."


def test_chat_loop_keeps_the_history_and_ends_at_an_empty_line(nano_artifact: Path) -> None:
    command = [sys.executable, "-m", "osscompile", "run", str(nano_artifact), "--reasoning", "low"]
    questions = "What is 2 + 2?\nWhat is 3 + 4?\n\nnever read\n"
    result = subprocess.run(command, input=questions, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "2 + 2 = 4" in result.stdout and "3 + 4 = 7" in result.stdout
    assert "never read" not in result.stdout


def test_inspect_says_what_machine_and_memory(
    nano_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(nano_artifact), "--context", "100"]) == 0
    small = capsys.readouterr().out
    assert cli.main(["inspect", str(nano_artifact)]) == 0
    large = capsys.readouterr().out
    for word in ("nano", "profile fast", "x86_64", "sse4_2", "weights", "KV cache", "total"):
        assert word in small
    assert _total(small) < _total(large)


def test_inspect_works_for_an_artifact_of_another_machine(
    nano_artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert cli.main(["inspect", str(nano_artifact)]) == 0


def test_dump_writes_the_ir_after_each_phase(this_machine: Target, tmp_path: Path) -> None:
    """Phases of one variant's instructions are in a folder of its name."""
    arguments = ["compile", "nano", "-o", str(tmp_path / "out"), "--context", "256"]
    arguments += ["--target", this_machine.name, "--variants", this_machine.variant]
    folder = tmp_path / "ir"
    assert cli.main([*arguments, "--dump", str(folder)]) == 0
    shared = sorted(path.name for path in folder.iterdir() if path.is_file())
    own = sorted(path.name for path in (folder / this_machine.variant).iterdir())
    numbers = [int(name.split("_")[0]) for name in (*shared, *own)]
    assert numbers == list(range(len(numbers)))
    assert shared[0] == "0_imported.py" and own[-1].endswith("_lower_graph.py")
    assert "moe_mxfp4_swiglu_q8" in (folder / shared[0]).read_text()


def test_an_error_is_one_message_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", str(tmp_path / "nothing"), "hello"]) == 1
    error = capsys.readouterr().err
    assert "expected an artifact" in error and "osscompile compile" in error
    assert "Traceback" not in error


def test_unknown_target_lists_the_known_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compile", "nano", "--target", "abacus", "-o", str(tmp_path / "x")]) == 1
    assert "x86" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_does_not_import_the_compiler() -> None:
    code = "import sys; from osscompile import cli; cli._parser(); print('tvm' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr


def test_output_to_a_closed_pipe_is_quiet(nano_artifact: Path) -> None:
    command = f"{sys.executable} -m osscompile inspect {nano_artifact} | true"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in result.stderr


def _total(text: str) -> float:
    line = next(line for line in text.splitlines() if line.strip().startswith("total"))
    return float(line.split()[1].replace(",", ""))
