"""Compiles that cannot start, cannot finish, or are cut off raise our errors and leave nothing."""

import contextlib
import dataclasses
import errno
import importlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifacts import TINY_OPTIONS, leave_libraries_empty, run_python
from checkpoints import write_checkpoint

import osscompile
from osscompile import CheckpointError, CompileError, TargetError, targets
from osscompile.importer.synthetic import TINY
from osscompile.passes.plan_memory import plan_memory
from osscompile.runtime.artifact import read_manifest
from osscompile.runtime.manifest import MANIFEST, WEIGHTS
from osscompile.targets import Target

compile_module = importlib.import_module("osscompile.compiler")
pytestmark = pytest.mark.filterwarnings("ignore:.*has no tokenizer.json")


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_libraries_empty(monkeypatch)


@pytest.fixture
def target(this_machine: Target) -> str:
    return this_machine.name


def compile_tiny(output: Path, target: str, **options: Any) -> Path:
    return osscompile.compile("synthetic:tiny", target, output, **TINY_OPTIONS | options)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Cannot start


@pytest.mark.parametrize("context", [0, -1, 10**9])
def test_context_out_of_range(tmp_path: Path, target: str, context: int) -> None:
    with pytest.raises(
        CompileError, match=rf"context: expected 1 to {TINY.max_context}.*{context}"
    ):
        compile_tiny(tmp_path / "out", target, context=context)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("chunk", [0, -8, 10**30])
def test_prefill_chunk_out_of_range(tmp_path: Path, target: str, chunk: int) -> None:
    with pytest.raises(CompileError, match=f"prefill_chunk: expected .*found {chunk}"):
        compile_tiny(tmp_path / "out", target, prefill_chunk=chunk)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("option", ["context", "prefill_chunk"])
@pytest.mark.parametrize("number", [64.0, np.float32(64), True, "64", [64]])
def test_number_that_is_none(tmp_path: Path, target: str, option: str, number: Any) -> None:
    with pytest.raises(CompileError, match=f"{option}: expected a whole number, found "):
        compile_tiny(tmp_path / "out", target, **{option: number})
    assert listing(tmp_path) == []


@pytest.mark.usefixtures("without_kernels")
def test_what_stands_for_a_number_or_a_list_of_names(tmp_path: Path, this_machine: Target) -> None:
    name = this_machine.variant
    for variants in (name, (name,), {name}, iter([name])):
        options = {"context": np.int64(64), "prefill_chunk": np.uint8(64), "variants": variants}
        output = compile_tiny(tmp_path / "out", this_machine.name, **options)
        manifest = read_manifest(output)
        assert (manifest.context, manifest.chunk) == (64, 64)
        assert [variant.name for variant in manifest.variants] == [name]


@pytest.mark.parametrize("variants", [5, [5], b"generic", [None]])
def test_variants_that_are_no_names(tmp_path: Path, target: str, variants: Any) -> None:
    with pytest.raises(CompileError, match="variants: expected names, found"):
        compile_tiny(tmp_path / "out", target, variants=variants)


@pytest.mark.parametrize("option", ["output", "dump", "records"])
@pytest.mark.parametrize(
    ("path", "found"),
    [
        (5, "found 5"),
        (b"bytes", "found b'bytes'"),
        ("", "found an empty one"),
        ("not\udcffutf-8", "of UTF-8 characters"),
        ("zero\0byte", "of UTF-8 characters"),
    ],
)
def test_path_that_is_none(target: str, option: str, path: Any, found: str) -> None:
    with pytest.raises(CompileError, match=f"{option}: expected a path.*{found}"):
        osscompile.compile("synthetic:tiny", target, **{option: path})


@pytest.mark.parametrize("model", [None, 5, b"nano", []])
def test_model_that_is_no_name(tmp_path: Path, target: str, model: Any) -> None:
    with pytest.raises(CheckpointError, match="model: expected a name or a directory, found"):
        osscompile.compile(model, target, tmp_path / "out")


@pytest.mark.parametrize("profile", ["", "exakt", "FAST", None])
def test_unknown_profile(tmp_path: Path, target: str, profile: Any) -> None:
    with pytest.raises(CompileError, match=rf"profile: expected one of .*fast.*found {profile!r}"):
        compile_tiny(tmp_path / "out", target, profile=profile)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("name", ["", "z80", "../targets/x86", "x86.toml"])
def test_unknown_target(tmp_path: Path, name: str) -> None:
    with pytest.raises(TargetError, match=rf"expected one of .*, found '{name}'") as caught:
        compile_tiny(tmp_path / "out", name)
    assert all(known in str(caught.value) for known in targets.names())
    assert listing(tmp_path) == []


def test_unknown_model(tmp_path: Path, target: str) -> None:
    with pytest.raises(CheckpointError, match="no such model; expected"):
        osscompile.compile(tmp_path / "nothing", target, tmp_path / "out")
    assert listing(tmp_path) == []


def test_output_is_a_file(tmp_path: Path, target: str) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CompileError, match=r"artifact to replace, found a file; choose another -o"):
        compile_tiny(tmp_path / "out", target)
    assert (tmp_path / "out").read_text() == "mine"
    assert listing(tmp_path) == ["out"]


@pytest.mark.parametrize("names", [["notes.txt"], [WEIGHTS], ["index.html", MANIFEST]])
def test_output_is_a_folder_of_something_else(
    tmp_path: Path, target: str, names: list[str]
) -> None:
    """A manifest.json alone makes no artifact: folders of web pages have one too."""
    (tmp_path / "out").mkdir()
    for name in names:
        (tmp_path / "out" / name).write_text("mine")
    before = listing(tmp_path)
    with pytest.raises(CompileError, match=f"found a folder with {names[0]}; choose another -o"):
        compile_tiny(tmp_path / "out", target)
    assert listing(tmp_path) == before


def test_output_has_a_folder_of_an_artifacts_file_name(tmp_path: Path, target: str) -> None:
    (tmp_path / "out" / MANIFEST).mkdir(parents=True)
    (tmp_path / "out" / MANIFEST / "mine").touch()
    with pytest.raises(CompileError, match="choose another -o"):
        compile_tiny(tmp_path / "out", target)
    assert (tmp_path / "out" / MANIFEST / "mine").exists()


@pytest.mark.usefixtures("without_kernels")
def test_output_below_a_file(tmp_path: Path, target: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CompileError, match=r"cannot be written.*choose another -o"):
        compile_tiny(tmp_path / "file" / "out", target)
    assert listing(tmp_path) == ["file"]


def test_output_name_too_long(tmp_path: Path, target: str) -> None:
    with pytest.raises(CompileError, match=r"cannot be written.*too long.*choose another -o"):
        compile_tiny(tmp_path / ("x" * 300), target)
    assert listing(tmp_path) == []


@pytest.mark.usefixtures("without_kernels")
def test_output_name_too_long_for_the_names_beside_it(tmp_path: Path, target: str) -> None:
    with pytest.raises(CompileError, match=r"cannot be written.*too long.*choose another -o"):
        compile_tiny(tmp_path / ("x" * 250), target)
    assert listing(tmp_path) == []


@pytest.mark.usefixtures("without_kernels")
def test_output_in_folders_that_do_not_exist(tmp_path: Path, target: str) -> None:
    compile_tiny(tmp_path / "new" / "folders" / "out", target)
    assert listing(tmp_path / "new") == ["folders", "folders/out"] + [
        f"folders/out/{name}" for name in sorted(os.listdir(tmp_path / "new" / "folders" / "out"))
    ]


def test_shard_cut_off_before_the_compile(tmp_path: Path, target: str) -> None:
    write_checkpoint(tmp_path / "model", TINY)
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    before = listing(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{shard.name}.*cut off.*download"):
        osscompile.compile(tmp_path / "model", target, tmp_path / "new" / "out", **TINY_OPTIONS)
    assert listing(tmp_path) == before


def test_disk_with_too_little_room_from_the_start(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CompileError, match=r"needs 0.07 GB of disk, found 0.00 GB.*make room"):
        compile_tiny(tmp_path / "new" / "out", target)
    assert listing(tmp_path) == []


# Cannot finish


@pytest.mark.parametrize("problem", ["shard", "disk", "quota", "unreadable", "interrupt"])
@pytest.mark.parametrize("before", ["nothing", "artifact"])
def test_failure_in_the_middle_of_the_weights(
    tmp_path: Path,
    target: str,
    monkeypatch: pytest.MonkeyPatch,
    without_kernels: None,
    before: str,
    problem: str,
) -> None:
    """Nothing is left, and an artifact that had the name still has it."""
    write_checkpoint(tmp_path / "model", TINY)
    output = tmp_path / "out"
    if before == "artifact":
        osscompile.compile(tmp_path / "model", target, output, **TINY_OPTIONS)
    files = listing(tmp_path)
    content = {name: (tmp_path / name).read_bytes() for name in files if name.startswith("out/")}

    def fail() -> None:
        assert (tmp_path / "out.partial").exists()
        if problem == "shard":
            for shard in (tmp_path / "model").glob("*.safetensors"):
                os.truncate(shard, 1000)
        elif problem == "interrupt":
            raise KeyboardInterrupt
        else:
            number = {"disk": errno.ENOSPC, "quota": errno.EDQUOT, "unreadable": errno.EIO}[problem]
            raise OSError(number, os.strerror(number))

    in_the_middle(monkeypatch, fail)
    error, words = {
        "shard": (CheckpointError, "the file shrank while it was read: download it again"),
        "disk": (CompileError, "make room, or choose another -o"),
        "quota": (CompileError, "make room, or choose another -o"),
        "unreadable": (CompileError, "cannot be written.*error"),
        "interrupt": (KeyboardInterrupt, None),
    }[problem]
    with pytest.raises(error, match=words):
        osscompile.compile(tmp_path / "model", target, output, **TINY_OPTIONS)
    for thread in threading.enumerate():
        if "PoolExecutor" in thread.name:  # after an interrupt it ends by itself
            assert problem == "interrupt"
            thread.join(timeout=60)
            assert not thread.is_alive()
    assert listing(tmp_path) == files
    for name, expected in content.items():
        assert (tmp_path / name).read_bytes() == expected, name


def in_the_middle(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Act before the first weights of the third layer are made, on the thread that makes them."""
    pieces_of = compile_module.weight_pieces

    def pieces(parameter: Any, *arguments: Any) -> Iterable[Callable[[], Any]]:
        makers = pieces_of(parameter, *arguments)
        if parameter.name != "layers.2.attn_norm.weight":
            return makers
        return [partial(act_and_make, make) for make in makers]

    def act_and_make(make: Callable[[], Any]) -> Any:
        act()
        return make()

    monkeypatch.setattr(compile_module, "weight_pieces", pieces)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount a file system of so many bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(num_bytes: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "none", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"cannot mount a small file system here: {error}")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.usefixtures("without_kernels")
def test_disk_fills_up_while_weights_are_written(
    small_disk: Callable[[int], Path], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk(128 << 20)

    def fill() -> None:
        with (disk / "other").open("wb", buffering=0) as stream:
            for size in (1 << 20, 1 << 12):  # a concurrent writer takes some of it
                with contextlib.suppress(OSError):
                    while stream.write(bytes(size)):
                        pass

    in_the_middle(monkeypatch, fill)
    with pytest.raises(CompileError, match=r"found 0.00 GB free; make room, or choose another -o"):
        compile_tiny(disk / "out", target)
    assert listing(disk) == ["other"]


def test_disk_fills_up_while_kernels_are_compiled(
    small_disk: Callable[[int], Path], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLVM ends the process if it cannot write, so it must not get that far."""
    disk = small_disk(1 << 20)
    monkeypatch.setattr("osscompile.write._check_free_space", lambda folder, needed: None)
    with pytest.raises(CompileError, match="make room, or choose another -o"):
        compile_tiny(disk / "out", target)
    assert listing(disk) == []


def test_linker_fails(tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [
        dataclasses.replace(t, link_triple="z80-linux-gnu") for t in targets.load_variants(target)
    ]
    monkeypatch.setattr(targets, "load_variants", lambda name: broken)
    with pytest.raises(CompileError, match=r"(?s)linking .*expected ziglang to succeed.*z80"):
        compile_tiny(tmp_path / "out", target)
    assert listing(tmp_path) == []


# Cut off

COMPILE_SLOWLY = f"""
import importlib, sys, time
import numpy as np
from osscompile.passes.plan_memory import plan_memory
module = importlib.import_module("osscompile.compiler")
pieces_of = module.weight_pieces

def pieces(parameter, *arguments):
    if parameter.name.startswith("layers.2."):
        print("writing weights", flush=True)
        while True:
            yield make_nothing
    yield from pieces_of(parameter, *arguments)

def make_nothing():
    time.sleep(0.01)
    return np.empty(0, np.uint8)

module.weight_pieces = pieces
module.BUILDS["tvm"] = (plan_memory,), lambda module, target, output: output.touch()
module.compile("synthetic:tiny", sys.argv[1], "out", **{TINY_OPTIONS})
"""


@pytest.fixture
def slow_compile(tmp_path: Path, target: str) -> Iterator[subprocess.Popen[str]]:
    """A compile to tmp_path/out in its own process, stopped in the middle of the weights."""
    command = [sys.executable, "-W", "ignore", "-c", COMPILE_SLOWLY, target]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing weights\n"
        yield process
        process.kill()


def test_kill_in_the_middle_and_compile_again(
    tmp_path: Path, this_machine: Target, slow_compile: subprocess.Popen[str]
) -> None:
    assert "out" not in listing(tmp_path)
    with pytest.raises(CompileError, match=r"another compile .*wait for it, or choose another -o"):
        compile_tiny(tmp_path / "out", this_machine.name)
    assert slow_compile.poll() is None  # the refused compile did it no harm
    slow_compile.send_signal(signal.SIGKILL)
    slow_compile.wait()
    assert "out" not in listing(tmp_path)
    assert "out.partial" in listing(tmp_path)  # nobody was left to remove it
    compile_tiny(tmp_path / "out", this_machine.name)
    assert [name for name in listing(tmp_path) if "/" not in name] == ["out"]
    assert len(osscompile.load(tmp_path / "out").logits([1, 2])) == 2


def test_ctrl_c_in_the_middle(tmp_path: Path, slow_compile: subprocess.Popen[str]) -> None:
    slow_compile.send_signal(signal.SIGINT)
    slow_compile.wait(timeout=60)
    assert slow_compile.returncode != 0
    assert listing(tmp_path) == []


COMPILE_FOR_EVER = """
import importlib, sys, time
from osscompile import cli
from osscompile.codegen.tools import run_tool
from osscompile.passes.plan_memory import plan_memory
module = importlib.import_module("osscompile.compiler")

def build(lowered, target, output):
    if sys.argv[1] == "tool":
        run_tool(["sh", "-c", "sleep 600 & echo $! > ../../id; wait"], output.parent)
    print("building", flush=True)
    time.sleep(600)  # as LLVM, which nothing interrupts
    output.touch()

module.BUILDS["tvm"] = (plan_memory,), build
options = ["--target", sys.argv[2], "--variants", sys.argv[3], "-o", "out"]
status = cli.main(["compile", "synthetic:tiny", *options])
from osscompile.runtime.cli.main import end_process
end_process(status)
"""


@pytest.mark.parametrize("busy", ["thread", "tool"])
def test_ctrl_c_while_kernels_are_compiled(tmp_path: Path, target: str, busy: str) -> None:
    """The command ends though its threads do not, with one line, and takes its tools with it."""
    variant = targets.load_variants(target)[-1].variant
    command = [sys.executable, "-c", COMPILE_FOR_EVER, busy, target, variant]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            if busy == "thread":
                assert process.stdout.readline() == "building\n"
            identity = tmp_path / "id"
            while busy == "tool" and not (identity.exists() and identity.read_text()):
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 130
        finally:
            process.kill()
        *_, last = process.stderr.read().splitlines()
    assert last == "osscompile: interrupted"
    if busy == "tool":
        assert not is_running(int(identity.read_text()))
        identity.unlink()
    assert listing(tmp_path) == []


def is_running(process: int) -> bool:
    """One that ended and that nobody waited for does not run."""
    try:
        os.kill(process, 0)
        stat = Path(f"/proc/{process}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


AT_THE_END = """
import atexit, sys, threading, time
import osscompile

def compile_late():
    try:
        osscompile.compile("synthetic:tiny", sys.argv[2], "out")
    except osscompile.OsscompileError as error:
        print(error)

def wait_and_compile():
    while not thread._shutdown:
        time.sleep(0.01)
    compile_late()

if sys.argv[1] != "handler that imports it":
    from concurrent.futures import thread
if sys.argv[1] == "thread":
    threading.Thread(target=wait_and_compile).start()
else:
    atexit.register(compile_late)
"""


@pytest.mark.parametrize("caller", ["handler", "handler that imports it", "thread"])
def test_compile_while_the_process_ends(tmp_path: Path, target: str, caller: str) -> None:
    result = run_python(AT_THE_END, caller, target, cwd=tmp_path)
    assert result.stdout.startswith("compile: expected a process in which threads can begin, found")
    assert (result.stdout.count("\n"), result.stderr) == (1, "")
    assert listing(tmp_path) == []


@pytest.mark.usefixtures("without_kernels")
def test_progress_of_what_takes_long(
    tmp_path: Path, this_machine: Target, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each library's kernels are scheduled, then it is compiled, then the weights come."""
    compile_tiny(tmp_path / "out", this_machine.name, progress=True)
    bars = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert any(f"scheduling kernels for {this_machine.variant}" in bar for bar in bars)
    assert any(bar.startswith("compiling") and this_machine.library in bar for bar in bars)
    assert any("2/2" in bar for bar in bars) and bars[-1].startswith("repacking")


def test_interrupt_of_a_compile_leaves_the_next_one_alone(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process that goes on, threads of the interrupted one still work: not in its place."""
    release, started, done = threading.Event(), threading.Event(), threading.Event()

    def build_late(module: Any, target: Target, output: Path) -> None:
        started.set()
        release.wait(60)
        with contextlib.suppress(OSError):
            output.write_text("late")
        done.set()

    def interrupt(pool: Any, build: Any, *arguments: Any) -> None:
        list(map(partial(pool.submit, build), *arguments))
        started.wait(60)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("concurrent.futures.ThreadPoolExecutor.map", interrupt)
        patch.setitem(compile_module.BUILDS, "tvm", ((plan_memory,), build_late))
        with pytest.raises(KeyboardInterrupt):
            compile_tiny(tmp_path / "out", target)
    assert listing(tmp_path) == []

    def build(module: Any, target: Target, output: Path) -> None:
        output.write_text("new")
        release.set()
        done.wait(60)

    monkeypatch.setitem(compile_module.BUILDS, "tvm", ((plan_memory,), build))
    compile_tiny(tmp_path / "out", target)
    libraries = [*(tmp_path / "out").glob("lib*")]
    assert libraries and all(library.read_text() == "new" for library in libraries)


def test_a_whole_compile_leaves_only_the_artifact(
    tmp_path: Path, target: str, without_kernels: None
) -> None:
    """Otherwise the tests above would prove nothing."""
    compile_tiny(tmp_path / "out", target)
    assert [name for name in listing(tmp_path) if "/" not in name] == ["out"]
    files = read_manifest(tmp_path / "out").files
    assert sorted([*files, MANIFEST]) == sorted(os.listdir(tmp_path / "out"))
