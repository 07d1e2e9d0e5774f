"""Check the IR between phases: an error of ours, not of the user, stops the compile here."""

from tvm import ir, relax, s_tir, tirx
from tvm.tirx import PrimFunc
from tvm.tirx.analysis import undefined_vars
from tvm_ffi import structural_walk

from ..targets import Target


def verify(module: ir.IRModule, target: Target, done: tuple[str, ...]) -> None:
    """Check what must hold after the passes named in `done`; raises if it does not."""
    for name, function in module.functions_items():
        if isinstance(function, PrimFunc):
            _verify_kernel(name.name_hint, function, target, done)
    if "lower_graph" not in done:
        relax.analysis.well_formed(module)  # raises, also if a call does not fit its kernel


def _verify_kernel(name: str, kernel: PrimFunc, target: Target, done: tuple[str, ...]) -> None:
    if "lower_graph" in done and "op" not in kernel.attrs:
        return  # TVM's own functions, which compute shapes on the host
    if "split_launches" in done and "calling_conv" in kernel.attrs:
        return  # TVM made it from kernels that were checked before
    assert "op" in kernel.attrs, f"{name}: no `op` for schedules to match"
    if "schedule_kernels" in done:
        assert "scheduled_by" in kernel.attrs, f"{name}: not scheduled"
    unbound = _unbound_symbols(kernel)
    assert not unbound, f"{name}: {', '.join(unbound)} used, but no parameter defines them"
    for parameter in kernel.params:
        assert str(parameter.dtype) in target.dtypes, (
            f"{name}: {parameter.name} is {parameter.dtype}, which {target.name} cannot hold"
        )


def _unbound_symbols(kernel: PrimFunc) -> list[str]:
    """Return variables that no parameter, no parameter's extent and no block defines."""
    defined = list(kernel.params)
    for parameter in kernel.params:
        defined += [e for e in getattr(parameter, "shape", ()) if isinstance(e, tirx.Var)]
    structural_walk(
        kernel.body, (s_tir.SBlock, lambda block: defined.extend(i.var for i in block.iter_vars))
    )
    return [v.name for v in undefined_vars(kernel.body, defined) if v not in set(defined)]
