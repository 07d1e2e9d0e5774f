"""The smallest graph with every kind of kernel, shared by tests of passes."""

from __future__ import annotations

import dataclasses

from tvm import ir
from tvm.tirx import PrimFunc

from osscompile import targets
from osscompile.importer.graph import build_graph
from osscompile.importer.synthetic import TINY

(AVX2,) = (target for target in targets.load_variants("x86") if target.variant == "avx2")
PROFILES = ("fast", "exact")

# The smallest model with every kind of kernel: a sliding and a full layer, and a router whose 2
# rows do not fill a vector.
SMALLEST = dataclasses.replace(
    TINY,
    vocab_size=16,
    hidden_size=32,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    num_experts=2,
    num_experts_per_token=1,
    window=8,
    sliding=(True, False),
)


def imported(profile: str) -> ir.IRModule:
    return build_graph(SMALLEST, profile, context=32, chunk=16).module


def kernels(module: ir.IRModule) -> dict[ir.GlobalVar, PrimFunc]:
    return {name: f for name, f in module.functions_items() if isinstance(f, PrimFunc)}
