"""Compiles for machines that are not here, checked as far as that goes without them: instructions,
file formats, and a new target in a file."""

from __future__ import annotations

import platform
import re
import struct
from pathlib import Path

import pytest
from artifacts import TINY_OPTIONS
from kernel_cases import LIMIT
from test_variants import KERNELS, assembly, innermost_loops

import osscompile
from osscompile import cli, targets
from osscompile.importer.graph import EXPERT_ROWS, TOKENS
from osscompile.kernels import attention, kv_cache, matmul
from osscompile.runtime.artifact import read_manifest
from osscompile.targets import Target

AARCH64 = [
    target
    for name in targets.names()
    for target in targets.load_variants(name)
    if target.architecture in ("aarch64", "arm64") and target.family == "cpu"
]
on_aarch64 = pytest.mark.parametrize("target", AARCH64, ids=lambda t: f"{t.name}-{t.variant}")

# --- Instructions of AArch64 ------------------------------------------------------------------

PRODUCTS = {"sdot": ("sdot", "sdot"), "smmla": ("sdot", "smmla"), None: (None, None)}
SWIGLU_PREFILL = matmul.moe_mxfp4_swiglu("q8", EXPERT_ROWS, 32, 2880, 2880, LIMIT)
ALL_KERNELS = KERNELS | {"moe_mxfp4_swiglu_q8_prefill": SWIGLU_PREFILL}


@on_aarch64
@pytest.mark.parametrize("name", ALL_KERNELS)
def test_byte_products(target: Target, name: str) -> None:
    """The hot loop keeps sums in registers, looks fp4 up in a table, and calls nothing."""
    text = assembly(ALL_KERNELS[name], target)
    product = PRODUCTS[target.int8_dot]["prefill" in name]
    assert set(re.findall(r"\t(sdot|smmla)", text)) == ({product} if product else set())
    if product is None:
        return
    hot = [loop for loop in innermost_loops(text) if f"\t{product}" in loop]
    assert hot
    for loop in hot:
        assert not re.search(r"\tblr?\t", loop)  # a call
        assert not re.search(r"\[sp\b", loop)  # a spill
    if "mxfp4" in name:
        by_table = [loop for loop in innermost_loops(text) if "\ttbl" in loop]
        assert by_table and ("decode" not in name or set(hot) <= set(by_table))


@on_aarch64
@pytest.mark.parametrize("tokens", [1, TOKENS], ids=["decode", "prefill"])
def test_float16_of_the_cache_is_converted_by_instructions(target: Target, tokens: object) -> None:
    sizes = (8, 2, 64)
    attend = attention.attention(tokens, *sizes, None, "float16")
    append = kv_cache.append_kv(tokens, *sizes, 4096, "float16")
    for kernel, conversion in ((attend, "fcvtl"), (append, "fcvt")):
        text = assembly(kernel, target)
        assert re.search(rf"\t{conversion}", text)
        assert not re.search(r"\tbl?\t_*(extendhfsf2|truncsfhf2)", text)


# --- Libraries for macOS ----------------------------------------------------------------------

MACH_O_64, ARM64, DYLIB = 0xFEEDFACF, 0x0100000C, 6
ID_DYLIB, LOAD_DYLIB, CODE_SIGNATURE = 0xD, 0xC, 0x1D


def load_commands(library: bytes) -> dict[int, bytes]:
    """Return the load commands by kind, the last of each."""
    count, start, commands = struct.unpack_from("<I", library, 16)[0], 32, {}
    for _ in range(count):
        kind, size = struct.unpack_from("<II", library, start)
        commands[kind] = library[start : start + size]
        start += size
    return commands


def test_apple_library_is_a_signed_dylib_for_arm64(tmp_path: Path) -> None:
    """macOS refuses code without a signature, and libraries without libSystem or a name."""
    options = TINY_OPTIONS | {"variants": None, "profile": "fast"}
    with pytest.warns(UserWarning, match=r"no tokenizer.json"):
        path = osscompile.compile("synthetic:tiny", "apple-cpu", tmp_path / "tiny.osc", **options)
    manifest = read_manifest(path)
    assert (manifest.system, manifest.architecture) == ("Darwin", "arm64")
    assert [variant.library for variant in manifest.variants] == ["lib.dylib"]
    library = (path / "lib.dylib").read_bytes()
    assert struct.unpack_from("<IIxxxxI", library) == (MACH_O_64, ARM64, DYLIB)
    commands = load_commands(library)
    assert b"@rpath/lib.dylib\0" in commands[ID_DYLIB]
    assert b"libSystem" in commands[LOAD_DYLIB]
    assert CODE_SIGNATURE in commands
    assert str(tmp_path).encode() not in library


# --- Targets ----------------------------------------------------------------------------------

OLD_CPU = """
description = "any x86-64 CPU"
checked = "run by this test"
family = "cpu"

[tvm]
kind = "llvm"
mtriple = "x86_64-linux-gnu"
mcpu = "x86-64"

[machine]
system = "Linux"
architecture = "x86_64"
cpu_features = ["sse2"]

[capabilities]
vector_bits = 128
register_bits = 128
num_registers = 16
dtypes = ["float32", "float16", "int8", "int32", "uint8", "uint16", "uint32"]
exp = false

[link]
triple = "x86_64-linux-gnu.2.17"
flags = ["-Wl,--build-id=none", "-Wl,-Bsymbolic"]
library = "lib.so"
"""


def test_nano_for_a_target_that_is_but_a_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target has vectors half as wide as any that ships, and no product of bytes."""
    (tmp_path / "old-cpu.toml").write_text(OLD_CPU)
    monkeypatch.setattr(targets, "_shipped", lambda: tmp_path)
    path = osscompile.compile("nano", "old-cpu", tmp_path / "nano.osc", context=256)
    if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
        message = {"role": "user", "content": "What is 17 + 25?"}
        pieces = osscompile.load(path).chat([message], reasoning="low", current_date="2026-01-01")
        assert "".join(p.text for p in pieces if p.channel == "final") == "17 + 25 = 42."


def test_targets_says_what_was_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["targets"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for name in targets.names():
        variants = targets.load_variants(name)
        start = lines.index(f"{name} {variants[0].description}") + 1
        found = lines[start : start + len(variants)]
        assert found == [f"{v.variant} {v.checked}" for v in variants]
