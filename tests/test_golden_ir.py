"""The IR of a whole model as text, which shows what a change did to the IR.

`pytest --update-golden` writes the text anew.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from smallest_graph import AVX2, PROFILES, imported, kernels
from tvm import ir, tirx
from tvm_ffi import structural_equal

from osscompile.importer.graph import EXPERT_ROWS, TOKENS
from osscompile.passes import run_passes
from osscompile.passes.pack_weights import PACKED_ROWS, pack_weights
from osscompile.passes.schedule_kernels import schedule_kernels

GOLDEN = Path(__file__).parent / "golden" / "ir"


@pytest.mark.parametrize("profile", PROFILES)
def test_golden_imported(profile: str, update_golden: bool) -> None:
    module = imported(profile)
    shown = _shown_kernels(module, profile)
    dropped = [name for name in kernels(module) if name not in shown]
    _compare(_without(module, dropped), f"{profile}_imported.txt", update_golden)


@pytest.mark.parametrize("profile", PROFILES)
def test_golden_scheduled_for_x86(profile: str, update_golden: bool) -> None:
    """The text has only kernels and names of packed weights; the graph differs by their shapes."""
    module = run_passes(imported(profile), AVX2, (pack_weights, schedule_kernels))
    shown = _shown_kernels(module, profile)
    dropped = [name for name in module.get_global_vars() if name not in shown]
    _compare(_without(module, dropped), f"{profile}_scheduled_x86.txt", update_golden)


def _shown_kernels(module: ir.IRModule, profile: str) -> set[ir.GlobalVar]:
    """Return a kernel for decode and one for prefill of every operation; for `exact` only those
    that differ from `fast`."""
    other = imported("fast") if profile == "exact" else ir.IRModule()
    if PACKED_ROWS in (module.attrs or {}):
        other = run_passes(other, AVX2, (pack_weights, schedule_kernels))
    shown: dict[tuple[str, bool], ir.GlobalVar] = {}
    for name, kernel in sorted(kernels(module).items(), key=lambda item: item[0].name_hint):
        if not any(structural_equal(kernel, known) for known in kernels(other).values()):
            symbols = {e for p in kernel.params for e in p.shape if isinstance(e, tirx.Var)}
            any_number = bool(symbols & {TOKENS, EXPERT_ROWS})
            shown.setdefault((str(kernel.attrs["op"]), any_number), name)
    return set(shown.values())


def _without(module: ir.IRModule, dropped: list[ir.GlobalVar]) -> ir.IRModule:
    functions = {name: f for name, f in module.functions_items() if name not in dropped}
    return ir.IRModule(functions, attrs=module.attrs)


def _compare(module: ir.IRModule, name: str, update: bool) -> None:
    text = module.script(int_dtype="int64") + "\n"
    path = GOLDEN / name
    if update:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"{path}: not there; `pytest --update-golden` writes it"
    golden = path.read_text(encoding="utf-8").splitlines()
    lines = text.splitlines()
    first = next((i for i, (a, b) in enumerate(zip(golden, lines, strict=False)) if a != b), None)
    if first is None and len(golden) != len(lines):
        first = min(len(golden), len(lines))
    assert first is None, (
        f"{path}:{first + 1}: the IR changed; if it should, run `pytest --update-golden` and read "
        f"the diff\nexpected {golden[first : first + 1]}\nfound    {lines[first : first + 1]}"
    )
