"""The contents of the checkout and the wheel, and which parts may import and name others."""

import ast
import dataclasses
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from artifacts import run_python

import osscompile
from osscompile import targets
from osscompile.targets import Target, TargetError
from osscompile.write import LIBRARY_SUFFIXES

ROOT = Path(__file__).parent.parent
FOLDERS = ("osscompile", "targets", "schedules", "runtime")
ENTRIES = {*FOLDERS, "tests", "pyproject.toml", "README.md"}
BESIDE = {".ci", ".gitignore", "LICENSE"}
# pyopencl is for OpenCL only, jinja2 for templates of checkpoints.
RUNTIME_NEEDS = {"jinja2", "llguidance", "numpy", "pyopencl", "tokenizers", "tvm_ffi"}
SERVER_NEEDS = {"fastapi", "h11", "prometheus_client", "pydantic", "ray", "starlette", "uvicorn"}


# The wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads: a build writes into its folder, and takes what lies there."""
    folder = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def site_packages(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with only the installed wheel."""
    folder = tmp_path_factory.mktemp("installed")
    build = ["wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder / "wheel"), str(source)]
    has_backend = int(metadata.version("setuptools").split(".")[0]) >= 77
    result = pip(*build, *(["--no-build-isolation"] if has_backend else []))
    if not has_backend and "No matching distribution found for setuptools" in result.stderr:
        pytest.skip("needs setuptools 77 or newer, installed or to be downloaded")
    assert result.returncode == 0, result.stderr
    (wheel,) = (folder / "wheel").iterdir()
    installed = folder / "site-packages"
    result = pip("install", "--quiet", "--no-deps", "--target", str(installed), str(wheel))
    assert result.returncode == 0, result.stderr
    return installed


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_one_name_at_the_top_level_of_site_packages(site_packages: Path) -> None:
    version = metadata.version("osscompile")
    assert {path.name for path in site_packages.iterdir()} == {
        "osscompile",
        f"osscompile-{version}.dist-info",
        "bin",  # pip puts scripts here with --target
    }
    assert [path.name for path in (site_packages / "bin").iterdir()] == ["osscompile"]


def test_version_of_the_wheel_is_that_of_the_code(site_packages: Path) -> None:
    assert metadata.version("osscompile") == osscompile.__version__
    assert (site_packages / f"osscompile-{osscompile.__version__}.dist-info").is_dir()


def test_types_of_the_wheel_are_seen(site_packages: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    code = "import osscompile\nreveal_type(osscompile.compile(model=1))\n"
    (tmp_path / "user.py").write_text(code)
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "user.py"]
    result = subprocess.run(
        [*command, "--python-executable", str(consumer(site_packages, tmp_path))],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": ""},  # there the package would be checked itself
        capture_output=True,
        text=True,
    )
    assert 'Revealed type is "pathlib.Path"' in result.stdout, result.stdout + result.stderr
    assert 'has incompatible type "int"; expected "str | Path"' in result.stdout


def consumer(site_packages: Path, folder: Path) -> Path:
    """The Python of an environment that has the wheel alone."""
    venv.create(folder / "venv", symlinks=True)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "osscompile").symlink_to(site_packages / "osscompile")
    return folder / "venv" / "bin" / "python"


def test_wheel_holds_every_file(site_packages: Path, source: Path) -> None:
    """A new sub-package or kind of data file must be named in pyproject.toml."""
    package = site_packages / "osscompile"
    expected = {
        str(file.relative_to(source / "osscompile" if folder == "osscompile" else source))
        for folder in FOLDERS
        for file in (source / folder).rglob("*")
        if file.is_file()
    }
    found = {str(file.relative_to(package)) for file in package.rglob("*") if file.is_file()}
    assert {name for name in found if "__pycache__" not in name} == expected


def test_wheel_compiles_and_runs_nano_from_another_folder(
    site_packages: Path, this_machine: Target, tmp_path: Path
) -> None:
    code = """if True:
        import importlib, sys, osscompile
        for name in ("", ".runtime", ".targets", ".schedules", ".importer", ".passes"):
            print(importlib.import_module("osscompile" + name).__file__)
        artifact = osscompile.compile("nano", variants=sys.argv[1:], context=512)
        model = osscompile.load(artifact)
        question = {"role": "user", "content": "What is 17 + 25?"}
        print("".join(p.text for p in model.chat([question]) if p.channel == "final"))
        """
    python_path = {"PYTHONPATH": str(site_packages)}
    result = run_python(code, this_machine.variant, cwd=tmp_path, env=python_path)
    *files, answer = result.stdout.splitlines()
    assert all(Path(file).is_relative_to(site_packages / "osscompile") for file in files), files
    assert answer == "17 + 25 = 42."
    assert [path.name for path in tmp_path.iterdir()] == [f"nano-{this_machine.name}.osc"]


def test_command_of_the_wheel(site_packages: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [str(site_packages / "bin" / "osscompile"), "targets"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site_packages)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout for name in targets.names())


def test_checkout_works_where_it_lies(source: Path) -> None:
    """It needs no installation: the folders beside osscompile/ belong to it."""
    code = """if True:
        import osscompile.compiler, osscompile.schedules, osscompile.targets, osscompile.runtime
        print(osscompile.runtime.__file__)
        """
    found = run_python(code, cwd=source, env={"PYTHONPATH": str(source)}).stdout.strip()
    assert found == str(source / "runtime" / "__init__.py")


def test_checkout_has_seven_entries() -> None:
    result = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        pytest.skip("needs a git checkout")
    found = {name.split("/")[0] for name in result.stdout.splitlines()}
    assert found - BESIDE == ENTRIES


# Public names


def test_every_public_name_resolves() -> None:
    for name in osscompile.__all__:
        assert getattr(osscompile, name).__name__ == name


def test_compile_is_the_function_also_after_its_module_was_imported(tmp_path: Path) -> None:
    """A module named like the function would take its place in the package when imported."""
    code = """if True:
        import osscompile
        first = osscompile.compile
        import osscompile.compiler
        from osscompile.compiler import compile
        assert osscompile.compile is first is compile and callable(first)
        """
    run_python(code, cwd=tmp_path)


@pytest.mark.parametrize("name", ["osscompile", "osscompile.runtime", "osscompile.targets"])
def test_import_is_free_of_the_compiler(name: str, tmp_path: Path) -> None:
    code = "import sys, importlib; importlib.import_module(sys.argv[1]); print(*sys.modules)"
    modules = {m.split(".")[0] for m in run_python(code, name, cwd=tmp_path).stdout.split()}
    assert not modules & {"tvm", "torch", "transformers", "huggingface_hub"}


# Imports between parts


def python_files(*folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def imports(file: Path) -> Iterator[str]:
    """Yield the names of imported modules as written, with leading dots if relative."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.Call) and "import_" in ast.unparse(node.func):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


@pytest.mark.parametrize(
    "file", python_files("runtime"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_runtime_imports_neither_the_compiler_nor_tvm(file: Path) -> None:
    """It imports what a bundle asks for, and itself, relatively: the folder may have any name."""
    depth = len(file.relative_to(ROOT).parts) - 1  # dots that reach the folder itself
    allowed = sys.stdlib_module_names | RUNTIME_NEEDS
    if file.is_relative_to(ROOT / "runtime" / "serve"):
        allowed |= SERVER_NEEDS
    for name in imports(file):
        dots = len(name) - len(name.lstrip("."))
        if dots:
            assert dots <= depth, f"{file}: {name} leads out of the folder"
        else:
            assert name.split(".")[0] in allowed, f"{file}: {name}"


@pytest.mark.parametrize("folder", ["targets", "schedules"])
def test_facts_and_decisions_do_not_import_the_compiler(folder: str) -> None:
    """They may import each other and the runtime, where errors and machines are defined."""
    for file in python_files(folder):
        depth = len(file.relative_to(ROOT).parts) - 1  # dots that reach the folder itself
        for name in imports(file):
            dots = len(name) - len(name.lstrip("."))
            assert not name.startswith("osscompile"), f"{file}: {name}"
            if dots > depth:
                outside = name.lstrip(".").split(".")[0]
                assert outside in ("targets", "schedules", "runtime"), f"{file}: {name}"


# Names in code


@pytest.mark.parametrize(
    "file",
    python_files("osscompile", "schedules", "runtime"),
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_no_target_is_named_in_code(file: Path) -> None:
    """Code branches on what a target has. Comments, docstrings and longer texts may name one."""
    tree = ast.parse(file.read_text())
    named = targets.names()
    for node in ast.walk(tree):
        for text in identifiers(node):
            words = re.split(r"[\W_]+", text)
            assert not set(words) & set(named), f"{file}:{node.lineno}: {text}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value not in named, f"{file}:{node.lineno}: {node.value!r}"


def identifiers(node: ast.AST) -> list[str]:
    fields = ("id", "attr", "name", "arg", "module", "asname")
    values = (getattr(node, field, None) for field in fields)
    return [value for value in values if isinstance(value, str) and hasattr(node, "lineno")]


# Facts about machines

WITH_VARIANTS = "x86"


@pytest.mark.parametrize("name", targets.names())
def test_target_has_what_it_needs(name: str) -> None:
    variants = targets.load_variants(name)
    for target in variants:
        assert target.description and target.checked
        assert target.vector_bits % 32 == 0
        assert set(target.dtypes) >= {"float32", "int32"}
        assert all(isinstance(feature, str) and feature for feature in target.cpu_features)
        assert (ROOT / "schedules" / target.family).is_dir()
        assert Path(target.library).name == target.library  # a file in the artifact
        assert Path(target.library).suffix in LIBRARY_SUFFIXES  # otherwise it could not be replaced
        assert target.link_triple.count("-") == (2 if target.runtime == "tvm" else 0)
        tvm_target = importlib.import_module("tvm.target").Target(target.tvm)
        assert str(tvm_target.kind.name) == target.tvm["kind"]
    assert len({target.variant for target in variants}) == len(variants)
    assert len({target.library for target in variants}) == len(variants)


def required_keys(name: str) -> list[str]:
    facts = tomllib.loads((ROOT / "targets" / f"{name}.toml").read_text())
    optional = {"device", "prefill_chunk", "runtime", "variants"}
    instructions = {"half", "int8_dot", "matrix", "bf16_matrix", "nearest_even", "selects_bytes"}
    others = {"load_bits", "textures", "shared_bytes", "shuffles", "dependent_launch"}
    optional |= {f"capabilities.{name}" for name in instructions | others}
    tables = [key for key, value in facts.items() if isinstance(value, dict) and key != "tvm"]
    keys = [*facts, *(f"{table}.{key}" for table in tables for key in facts[table])]
    return [key for key in keys if key not in optional]


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name in targets.names() for key in required_keys(name)]
)
def test_target_without_a_key(tmp_path: Path, name: str, key: str) -> None:
    lines, table = [], ""
    for line in (ROOT / "targets" / f"{name}.toml").read_text().splitlines():
        table = line.strip("[] ") if line.startswith("[") else table
        full = f"{table}.{line.split(' =')[0]}" if table and "=" in line else line.split(" =")[0]
        if full != key and table != key:
            lines.append(line)
    (tmp_path / "new.toml").write_text("\n".join(lines))
    with pytest.raises(TargetError, match=rf"new.toml: expected .*{key.split('.')[-1]}"):
        targets.load_variants("new", tmp_path)


@pytest.mark.parametrize("variants", ["variants = 7\n", "[[variants]]\nint8_dot = 'x'\n"])
def test_variants_that_are_none(tmp_path: Path, variants: str) -> None:
    before, *tables = base_facts(WITH_VARIANTS).partition("\n[")
    (tmp_path / "new.toml").write_text("\n".join([before, variants]) + "".join(tables))
    with pytest.raises(TargetError, match=r"new.toml: expected the fields"):
        targets.load_variants("new", tmp_path)


@pytest.mark.parametrize("text", ["", "family = ", "[machine"])
def test_target_that_does_not_parse(tmp_path: Path, text: str) -> None:
    (tmp_path / "new.toml").write_text(text)
    with pytest.raises(TargetError, match=r"new.toml: expected the fields"):
        targets.load_variants("new", tmp_path)


def test_a_new_file_is_a_new_target(tmp_path: Path) -> None:
    shipped = WITH_VARIANTS
    shutil.copyfile(ROOT / "targets" / f"{shipped}.toml", tmp_path / "new.toml")
    assert targets.names(tmp_path) == ["new"]
    assert [
        dataclasses.replace(t, name=shipped) for t in targets.load_variants("new", tmp_path)
    ] == [*targets.load_variants(shipped)]


def test_target_without_variants_is_its_only_one(tmp_path: Path) -> None:
    (tmp_path / "new.toml").write_text(base_facts(WITH_VARIANTS))
    (target,) = targets.load_variants("new", tmp_path)
    assert (target.name, target.variant, target.library) == ("new", "new", "lib.so")


def base_facts(name: str) -> str:
    """Return a target's file without its variants."""
    return (ROOT / "targets" / f"{name}.toml").read_text().partition("[[variants]]")[0]
