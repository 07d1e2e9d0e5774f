"""Split every kernel into device functions and the launches that the host makes of them."""

import tvm
from tvm import ir
from tvm.s_tir import transform as s_tir
from tvm.target import Target as TvmTarget
from tvm.tirx import PrimFunc
from tvm.tirx import transform as tirx

from ..targets import Target
from .select_vectors import select_vectors

# TVM's own pipeline for GPUs, without the passes for other GPUs, and without HoistIfThenElse and
# RemoveNoOp, which took half of the time and only wrote one condition in another way. It ends
# before the passes that prepare the host's part for a CPU.
_PASSES = (
    s_tir.CanonicalizeLoop(),
    s_tir.LowerCrossThreadReduction(),
    s_tir.LowerInitBlock(),
    s_tir.PlanAndUpdateBufferAllocationLocation(),
    s_tir.ConvertBlocksToOpaque(),
    s_tir.LiftThreadBinding(),
    s_tir.ManifestSharedMemoryLocalStage(),
    s_tir.CompactBufferAllocation(),
    s_tir.UnifyThreadBinding(),
    s_tir.LowerMatchBuffer(),
    s_tir.StmtSimplify(),
    s_tir.LowerOpaqueBlock(),
    tirx.FlattenBuffer(),
    tirx.NarrowDataType(32),
    s_tir.LoopPartition(),
    tirx.VectorizeLoop(),
    select_vectors,
    tirx.StorageRewrite(),
    tirx.UnrollLoop(),
    s_tir.RenormalizeSplitPattern(),
    tirx.StmtSimplify(),
    s_tir.RewriteUnsafeSelect(),
    tirx.VerifyMemory(),  # raises if no thread computes a stage
    tirx.AnnotateEntryFunc(),
    s_tir.ThreadSync("shared"),
    s_tir.LowerThreadAllreduce(),
    s_tir.MergeSharedMemoryAllocations(),
    tirx.SplitHostDevice(),
)


def split_launches(module: ir.IRModule, target: Target) -> ir.IRModule:
    """Turn the kernels of `module` into calls of `tirx.call_ffi_kernel`, and add the functions that
    these name, marked by the attribute `calling_conv`."""
    # without a host, TVM takes a kernel for device code
    device = TvmTarget(target.tvm, host={"kind": "llvm"})
    bound = ir.IRModule({}, attrs=module.attrs)
    for name, function in module.functions_items():
        is_kernel = isinstance(function, PrimFunc)
        bound[name] = function.with_attr("target", device) if is_kernel else function
    return tvm.transform.Sequential(list(_PASSES))(bound)
