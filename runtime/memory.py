"""The memory that a run uses, computed from the manifest before any of it is taken."""

from .errors import OsscompileError
from .kv_cache import page_counts
from .machine import available_memory_bytes
from .manifest import ROPE, Manifest

# Python, numpy, tokenizers and TVM's runtime, without a vocabulary.
PROCESS_BYTES = 60 << 20
# Reading a row of a mapped file brings so much of its surroundings into memory.
FAULT_BYTES = 64 << 10


def memory_bytes(
    manifest: Manifest, context: int, kv_memory: int | None = None, sequences: int = 1
) -> dict[str, int]:
    """Memory that a run uses when `context` positions are full, by what it is for; `kv_memory` and
    `sequences` as for `Engine`.

    A GPU holds all weights and caches from the beginning, and mostly in the memory of the machine;
    on a CPU, what a run does not use of them takes none.
    """
    weights = 0
    for weight in manifest.weights:
        row = weight.num_bytes // weight.shape[0]
        needed = weight.num_bytes
        if manifest.on_cpu and weight.name == ROPE:  # one row after the other
            needed = context * row + FAULT_BYTES
        elif manifest.on_cpu and weight.name in manifest.gathered:  # here and there
            needed = context * max(row, FAULT_BYTES)
        weights += min(weight.num_bytes, needed)
    return {
        "weights": weights,
        "KV cache": page_counts(manifest, context, kv_memory, None, sequences).num_bytes(manifest),
        "workspace": sum(manifest.workspace_bytes.values()),
        "process": PROCESS_BYTES,
    }


def check_memory(manifest: Manifest, context: int, needed: dict[str, int]) -> None:
    """Raises OsscompileError if what `memory_bytes` told is more than this machine has free."""
    if manifest.runtime == "cuda":  # in the GPU's memory, which tells when it is full
        return
    private = needed["KV cache"] + needed["workspace"]
    if not manifest.on_cpu:  # copied, not mapped
        private += needed["weights"]
    available = available_memory_bytes()
    if available is not None and private > available:
        raise OsscompileError(
            f"memory: {context} positions need {private / 1e9:.1f} GB that is not mapped, "
            f"found {available / 1e9:.1f} GB available; load with a smaller context or kv_memory"
        )
