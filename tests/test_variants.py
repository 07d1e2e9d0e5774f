"""Variants of a target: the library of an artifact that runs, and the instructions in it.

`test_kernels_*.py` test kernels of the best variant for this machine; this file tests the others
that it can run. For variants that it cannot run, it reads the assembly, and runs their kernels with
the missing instruction written out.
"""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from artifacts import (
    TINY_OPTIONS,
    VARIANTS_HERE,
    copy_artifact,
    leave_libraries_empty,
    reseal,
    run_python,
)
from kernel_cases import (
    DECODE,
    FORMS,
    HERE,
    LIMIT,
    OTHERS,
    PREFILL,
    ROW_CASES,
    RUNNABLE,
    Case,
    Form,
    check_quantize,
    dense_q8,
    every_matmul,
    moe_mxfp4_sum_digits,
    moe_mxfp4_sum_q8,
    moe_mxfp4_swiglu_q8,
    numbers,
    rotate_queries,
)
from tvm import ir
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

import osscompile
from osscompile import cli, targets
from osscompile.importer.graph import EXPERT_ROWS, TOKENS
from osscompile.kernels import matmul
from osscompile.passes.pack_weights import pack_kernel, packable
from osscompile.runtime.artifact import open_artifact, read_manifest
from osscompile.runtime.errors import ArtifactError, InputError
from osscompile.runtime.machine import Machine
from osscompile.schedules.cpu import dpbusd
from osscompile.schedules.rule import schedule
from osscompile.targets import Target, TargetError

ALL = targets.load_variants(HERE.name)
WITH_DPBUSD = [t for t in ALL if t.int8_dot == "dpbusd"]

every_runnable = pytest.mark.parametrize("variant", [t.variant for t in RUNNABLE])
on_others = pytest.mark.parametrize("target", OTHERS, ids=lambda t: t.variant)


# --- The variant that runs --------------------------------------------------------------------


@pytest.fixture(scope="module")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of all variants with empty libraries: it opens, but does not load."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="ignore"):
        leave_libraries_empty(patch)
        output = tmp_path_factory.mktemp("hollow") / "tiny.osc"
        options = TINY_OPTIONS | {"variants": None}
        osscompile.compile("synthetic:tiny", HERE.name, output, **options)
    assert all((output / t.library).stat().st_size == 0 for t in ALL)
    return output


@pytest.fixture(scope="module")
def runnable(nano_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """nano, compiled for each variant that runs here."""
    output = tmp_path_factory.mktemp("others") / "nano.osc"
    others = [t.variant for t in OTHERS]
    if others:
        osscompile.compile("nano", HERE.name, output, variants=others, context=4096)
    return {HERE.variant: nano_artifact} | dict.fromkeys(others, output)


def with_features(monkeypatch: pytest.MonkeyPatch, *features: str) -> None:
    """Let this machine's CPU have these features."""
    machine = dataclasses.replace(Machine.here(), cpu_features=features)
    monkeypatch.setattr(Machine, "here", lambda: machine)


@pytest.mark.parametrize("best", ALL, ids=lambda t: t.variant)
def test_the_best_that_the_cpu_can_run_is_taken(
    hollow: Path, monkeypatch: pytest.MonkeyPatch, best: Target
) -> None:
    with_features(monkeypatch, *best.cpu_features)
    assert targets.of_this_machine() == best
    opened = open_artifact(hollow)
    assert opened.variant.name == best.variant
    assert opened.library == hollow / best.library


def test_every_feature_of_a_variant_is_needed(
    hollow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *better, least = ALL
    for target in better:
        for feature in set(target.cpu_features) - set(least.cpu_features):
            with_features(monkeypatch, *(f for f in target.cpu_features if f != feature))
            assert open_artifact(hollow).variant.name != target.variant, feature


def test_variant_by_name(hollow: Path) -> None:
    assert open_artifact(hollow).variant.name == HERE.variant
    for target in RUNNABLE:
        assert open_artifact(hollow, variant=target.variant).library == hollow / target.library


def test_variant_by_name_that_this_cpu_cannot_run(
    hollow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first instruction would end the process."""
    with_features(monkeypatch, *ALL[-1].cpu_features)
    with pytest.raises(ArtifactError) as caught:
        osscompile.load(hollow, variant=ALL[0].variant)
    assert f"{ALL[0].variant} needs {', '.join(ALL[0].cpu_features)}" in str(caught.value)
    assert ALL[-1].variant not in str(caught.value)


def test_variant_that_the_artifact_lacks(hollow: Path) -> None:
    known = ", ".join(t.variant for t in ALL)
    with pytest.raises(InputError, match=f"expected one of {known}, found 'z80'"):
        osscompile.load(hollow, variant="z80")


@pytest.mark.parametrize("names", [["z80"], [HERE.variant, "z80"], []])
def test_compile_for_variants_that_the_target_lacks(tmp_path: Path, names: list[str]) -> None:
    found = "z80" if names else "none"
    with pytest.raises(TargetError, match=rf"expected some of .*{HERE.variant}.*, found {found}$"):
        osscompile.compile("nano", HERE.name, tmp_path / "out", variants=names)


def test_artifact_of_some_variants_has_no_other_library(tiny_artifact: Path) -> None:
    assert [v.name for v in read_manifest(tiny_artifact).variants] == VARIANTS_HERE
    assert [path.name for path in tiny_artifact.glob("lib*")] == [HERE.library]


def test_inspect_says_which_variant_runs_here(
    hollow: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["inspect", str(hollow)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    for target in ALL:
        assert ", ".join(target.cpu_features) in lines[target.variant]
        assert lines[target.variant].endswith("(runs here)") == (target == HERE)
    with_features(monkeypatch)
    assert cli.main(["inspect", str(hollow)]) == 0
    assert "none runs here" in capsys.readouterr().out


def test_feature_that_no_cpu_has_is_one_that_this_cpu_lacks(hollow: Path, tmp_path: Path) -> None:
    copy = copy_artifact(hollow, tmp_path)

    def change(fields: dict[str, Any]) -> None:
        new = {"name": "new", "cpu_features": ["avx1024"], "library": HERE.library}
        fields["variants"].insert(0, new)

    reseal(copy, change)
    assert open_artifact(copy).variant.name == HERE.variant


# --- Equal results ----------------------------------------------------------------------------


@on_others
@every_matmul
@pytest.mark.parametrize("form", [DECODE, PREFILL], ids=repr)
def test_matmul(target: Target, case: Callable[..., Case], form: Form) -> None:
    case(form).check(target)


@on_others
@pytest.mark.parametrize("case", [*ROW_CASES, rotate_queries], ids=lambda case: case.__name__)
def test_row_kernel(target: Target, case: Callable[[Form], Case]) -> None:
    case(PREFILL).check(target)


@on_others
def test_quantize_q8(target: Target) -> None:
    check_quantize(PREFILL, numbers(43, 21, 96), target)


ASK = """
import json, sys
import osscompile
path, variant = sys.argv[1:]
results = []
for threads in (4, 2, 1):  # TVM starts as many as the first asks for
    model = osscompile.load(path, variant=variant, threads=threads)
    message = {"role": "user", "content": "What is 17 + 25?"}
    pieces = model.chat([message], reasoning="low", current_date="2026-01-01")
    answer = "".join(piece.text for piece in pieces if piece.channel == "final")
    results.append((answer, model.logits(range(300)).tolist()))
print(json.dumps(results))
"""


@every_runnable
def test_nano_with_one_to_four_threads(
    nano_artifact: Path, runnable: dict[str, Path], tmp_path: Path, variant: str
) -> None:
    """300 ids reach beyond the window, and make several tasks of attention."""
    output = run_python(ASK, runnable[variant], variant, cwd=tmp_path).stdout
    answers, logits = zip(*json.loads(output), strict=True)
    assert answers == ("17 + 25 = 42.",) * 3
    expected = osscompile.load(nano_artifact).logits(range(300))
    for found in map(np.array, logits):
        assert np.abs(found - np.array(logits[0])).max() < 1e-4
        # Without FMA sums round differently, and so do activations to int8. int8 itself takes
        # logits 7e-2 away from the exact ones.
        assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < 4e-2


# --- Instructions -----------------------------------------------------------------------------

# The kernels of gpt-oss-20b that multiply bytes; in smaller ones LLVM would unroll the loops.
KERNELS = {
    "dense_q8_decode": matmul.dense_q8(1, 2880, 5120, True, False),
    "dense_q8_prefill": matmul.dense_q8(TOKENS, 2880, 5120, True, False),
    "moe_mxfp4_sum_q8_decode": matmul.moe_mxfp4_sum("q8", 1, 4, 32, 2880, 2880, 4),
    "moe_mxfp4_sum_q8_prefill": matmul.moe_mxfp4_sum("q8", TOKENS, EXPERT_ROWS, 32, 2880, 2880, 4),
    "moe_mxfp4_swiglu_q8_decode": matmul.moe_mxfp4_swiglu("q8", 4, 32, 2880, 2880, LIMIT),
}


def assembly(kernel: PrimFunc, target: Target) -> str:
    lanes = target.vector_lanes
    packed = pack_kernel(kernel, packable(kernel, lanes), lanes)
    # defaults, without a record: a record's choice was measured, with its spills
    function = schedule(packed, target, lambda name, candidates, default: default)
    module = ir.IRModule({"main": function.with_attr("global_symbol", "main")})
    return str(tvm.compile(module, tvm.target.Target(target.tvm)).mod.inspect_source("asm"))


def innermost_loops(text: str) -> Iterator[str]:
    """Yield loops: from a label to the last jump back to it, with no loop inside; x86, AArch64."""
    lines = text.splitlines()
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if re.match(r"\.?L\w+:", line)}
    spans = []
    for end, line in enumerate(lines):
        jump = re.match(r"\t(?:j\w+|b|b\.\w+|[ct]bn?z)\t(?:.*, )?(\.?L\w+)$", line)
        if jump and labels[jump[1]] <= end:
            spans.append((labels[jump[1]], end))
    for begin, end in spans:
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in spans):
            yield "\n".join(lines[begin : end + 1])


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("target", ALL, ids=lambda t: t.variant)
def test_instructions(target: Target, name: str) -> None:
    text = assembly(KERNELS[name], target)
    dot = {"maddubs": "vpmaddubsw", "dpbusd": "vpdpbusd"}
    for capability, instruction in dot.items():
        assert (instruction in text) == (target.int8_dot == capability)
    has_avx, has_evex = (f in target.cpu_features for f in ("avx2", "avx512vl"))
    assert bool(re.search(r"\tv[a-z]", text)) == has_avx  # AVX mnemonics begin with v
    if target.register_bits < 512:
        assert "%zmm" not in text
    if target.int8_dot == "dpbusd":
        vex = [line.startswith("\t{vex}") for line in text.splitlines() if "vpdpbusd" in line]
        assert not any(vex) if has_evex else all(vex)
    # panels by maddubs use all 16 registers and a few words of memory; their speed is measured
    if target.int8_dot == "dpbusd" or (has_avx and "decode" in name):
        hot = [loop for loop in innermost_loops(text) if dot[str(target.int8_dot)] in loop]
        assert hot
        assert not [loop for loop in hot if "(%rsp)" in loop]  # no frame has another pointer


# --- dpbusd on a CPU without it ---------------------------------------------------------------


written_out_calls: list[Expr] = []


def written_out(sums: Expr, unsigned: Expr, signed: Expr) -> Expr:
    """Compute VPDPBUSD as Intel's manual defines it, by shifts and products of int32 lanes."""
    written_out_calls.append(sums)
    dtype = str(sums.ty)
    u, s = (T.reinterpret(operand, dtype=dtype) for operand in (unsigned, signed))

    def splat(value: int) -> Expr:
        return T.broadcast(T.int32(value), tvm.DataType(dtype).lanes)

    for byte in range(4):
        zero_extended = T.bitwise_and(T.shift_right(u, splat(8 * byte)), splat(255))
        sign_extended = T.shift_right(T.shift_left(s, splat(24 - 8 * byte)), splat(24))
        sums = sums + zero_extended * sign_extended
    return sums


@pytest.fixture(scope="module")
def target_with_dpbusd_written_out() -> Iterator[Target]:
    """A target for this CPU, with the kernels of `dpbusd` but that instruction written out."""
    if "avx2" not in HERE.cpu_features:
        pytest.skip("needs AVX2, for the instructions around dpbusd")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpbusd, "_dpbusd", written_out)
        yield dataclasses.replace(WITH_DPBUSD[0], variant="written out", tvm=HERE.tvm)


@pytest.mark.parametrize("form", FORMS, ids=repr)
@pytest.mark.parametrize(
    "case",
    [dense_q8, moe_mxfp4_sum_q8, moe_mxfp4_swiglu_q8, moe_mxfp4_sum_digits],
    ids=lambda case: case.__name__,
)
def test_dpbusd_written_out(
    target_with_dpbusd_written_out: Target, case: Callable[[Form], Case], form: Form
) -> None:
    case(form).check(target_with_dpbusd_written_out)
    assert written_out_calls
