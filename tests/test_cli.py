"""The command line: the commands a person types, their output, and their errors."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from artifacts import VARIANTS_HERE, reseal

from osscompile import cli
from osscompile.targets import Target


def test_demo_compiles_nano_and_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "-o", str(tmp_path / "nano.osc")]) == 0
    assert "17 + 25 = 42" in capsys.readouterr().out


def test_inspect_says_what_machine_and_memory(
    nano_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(nano_artifact), "--context", "100"]) == 0
    small = capsys.readouterr().out
    assert cli.main(["inspect", str(nano_artifact)]) == 0
    large = capsys.readouterr().out
    for word in (
        "nano",
        "profile fast",
        "x86_64",
        "sse4_2",
        "weights",
        "KV cache",
        "total",
        "for 16 sequences, as serve runs",
        "temperature 0, top_p 1",
    ):
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


# Where output goes


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    line = command.replace("osscompile ", f"'{sys.executable}' -m osscompile ")
    return subprocess.run(["sh", "-c", line], capture_output=True, env=os.environ | environment)


def test_closed_streams_are_as_if_they_led_nowhere(nano_artifact: Path) -> None:
    result = shell(f"osscompile run '{nano_artifact}' hello --hide-analysis >&-")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    result = shell(f"osscompile run '{nano_artifact}.none' hello 2>&-")
    assert (result.returncode, result.stdout) == (1, b"")  # an error does not go to the output
    result = shell(f"osscompile run '{nano_artifact}' <&-")
    assert result.returncode == 1 and b"prompt: expected text" in result.stderr


def test_output_to_a_full_disk(nano_artifact: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("the system has no full device")
    result = shell(f"osscompile inspect '{nano_artifact}' > /dev/full")
    assert result.returncode == 1
    (line,) = result.stderr.decode().splitlines()
    assert line.startswith("osscompile: expected output that can be written, found: ")


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize("help", ["--help", "--version", "run --help"])
def test_help_to_a_full_disk(help: str, buffered: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("the system has no full device")
    result = shell(f"osscompile {help} > /dev/full", PYTHONUNBUFFERED=buffered)
    assert result.returncode == 1
    (line,) = result.stderr.decode().splitlines()
    assert line.startswith("osscompile: expected output that can be written, found: ")


def test_messages_that_cannot_be_written(nano_artifact: Path, tmp_path: Path) -> None:
    """The result is what counts: stages, bars, warnings and errors are dropped."""
    if not Path("/dev/full").exists():
        pytest.skip("the system has no full device")
    output = tmp_path / "out"
    variants = f"--variants {VARIANTS_HERE[0]}" if VARIANTS_HERE else ""
    for command in (
        f"compile synthetic:tiny -o '{output}' --context 64 {variants}",  # a warning and a bar
        f"run '{nano_artifact}' 'What is 17 + 25?' --verbose",
    ):
        result = shell(f"osscompile {command} 2> /dev/full")
        assert result.returncode == 0 and result.stdout, command
    assert (output / "manifest.json").exists()
    result = shell(f"osscompile inspect '{tmp_path}' 2> /dev/full")
    assert (result.returncode, result.stdout) == (1, b"")


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_text_in_any_locale(nano_artifact: Path, locale: str) -> None:
    options = {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = f"osscompile run '{nano_artifact}'"
    assert shell(f"{run} 'é 17 + 25?' --system 'ü' --stop 'é'", **options).returncode == 0
    for wrong in (
        rb"'\xff'",
        rb"hi --system '\xff'",
        rb"hi --identity '\xff'",
        rb"hi --stop '\xff'",
    ):
        line = wrong.replace(rb"\xff", b"\xff").decode(errors="surrogateescape")
        result = shell(f"{run} {line}", **options)
        assert result.returncode == 2
        assert rb"expected UTF-8 text, found '\udcff'" in result.stderr


def test_characters_that_the_terminal_does_not_have(nano_artifact: Path, tmp_path: Path) -> None:
    """In an answer as in a path, what it has is printed; the others are question marks."""
    odd = tmp_path / "\udcff\u2603.osc"
    shutil.copytree(nano_artifact, odd)
    reseal(odd, lambda manifest: manifest.update(model="sn\u2603w"))
    for encoding in ("ascii", "utf-8"):
        result = shell(f"osscompile inspect '{odd}'", PYTHONIOENCODING=encoding)
        assert result.returncode == 0 and result.stderr == b""
        expected = "sn?w" if encoding == "ascii" else "sn\u2603w"
        assert expected in result.stdout.decode(encoding)


@pytest.mark.parametrize("place", ["file", "file/below", "x" * 300, "/proc/none"])
def test_bundle_and_dump_to_places_that_cannot_be_written(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    assert cli.main(["bundle", place]) == 1
    message = "expected a folder that can be written, found: "
    assert message in capsys.readouterr().err
    assert cli.main(["compile", "synthetic:tiny", "--dump", place, "--target", "x86"]) == 1
    assert f"dump: {message}" in capsys.readouterr().err
    assert os.listdir() == ["file"]


def _total(text: str) -> float:
    line = next(line for line in text.splitlines() if line.strip().startswith("total"))
    return float(line.split()[1].replace(",", ""))


@pytest.mark.parametrize("size", ["1e300", "1e400", "281475", "0", "-1", "nan", "inf", "x"])
def test_memory_that_cannot_be(
    nano_artifact: Path, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["inspect", str(nano_artifact), f"--kv-memory={size}"])
    assert f"expected gigabytes, above 0 to 281474, found '{size}'" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--emit", "--work", "--output", "--measure", "--ingest"])
def test_tuning_in_places_that_are_not_utf8(
    tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before work begins: TVM, which writes some of the files, takes UTF-8 only."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["tune", option, "a\udcffb"]) == 1
    error = capsys.readouterr().err
    assert f"{option}: expected a path of UTF-8 characters, found 'a\\udcffb'; choose" in error
    assert os.listdir() == []


def test_artifact_whose_name_is_not_utf8(nano_artifact: Path, tmp_path: Path) -> None:
    """What only our own code reads may have any name."""
    odd = tmp_path / "\udcff.osc"
    shutil.copytree(nano_artifact, odd)
    result = shell(f"osscompile run '{odd}' 'What is 17 + 25?'")
    assert result.returncode == 0 and b"17 + 25 = 42" in result.stdout
    result = shell(f"osscompile bench '{odd}' --prefill 16 --decode 0 --json '{odd}.json'")
    assert result.returncode == 0 and Path(f"{odd}.json").exists()
    result = shell(f"osscompile measure-fidelity '{odd}' nano")
    assert result.returncode == 1 and b"artifact: expected a path of UTF-8" in result.stderr
