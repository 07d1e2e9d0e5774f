"""What a bench says of an artifact without running it, and what it runs it with."""

from fractions import Fraction
from typing import Any

import numpy as np

from ..manifest import Manifest, Tensor
from .machine import source_commit, versions

WORD_BITS = 32  # of weights whose name ends in ".words"
FP4_BITS, INT8_BITS = 4, 8


def artifact_facts(manifest: Manifest, variant: str) -> dict[str, Any]:
    """The fields of a `Report` that tell what was measured, whatever the machine."""
    full_kv_bytes, sliding_kv_bytes = kv_bytes(manifest)
    return {
        "model": manifest.model,
        "profile": manifest.profile,
        "target": manifest.target,
        "variant": variant,
        "manifest_sha256": manifest.sha256,
        "versions": versions(),
        "commit": source_commit(),
        "weight_bytes": manifest.decode_bytes,
        "token_macs": token_macs(manifest),
        "full_kv_bytes": full_kv_bytes,
        "sliding_kv_bytes": sliding_kv_bytes,
        "window": manifest.window,
    }


def kv_bytes(manifest: Manifest) -> tuple[int, int]:
    """Keys and values of one position: in all full layers, and in all sliding layers."""
    total = {False: 0, True: 0}
    pairs = zip(manifest.caches[0::2], manifest.caches[1::2], manifest.sliding, strict=True)
    for keys, values, sliding in pairs:
        total[sliding] += (keys.num_bytes + values.num_bytes) // manifest.page_tokens
    return total[False], total[True]


def token_macs(manifest: Manifest) -> int:
    """Multiply-adds of one token with the weights that it uses, those of its experts among them.

    Without lm_head, which a prefill needs for its last token only, and without attention.
    """
    total = Fraction(0)
    for weight in manifest.weights:
        if weight.name in manifest.gathered or weight.name.startswith("lm_head."):
            continue
        size = int(np.prod(weight.shape, dtype=np.int64))
        if weight.name.endswith(".words"):
            size *= WORD_BITS // (FP4_BITS if _of_experts(weight) else INT8_BITS)
        elif weight.dtype != "uint16":  # bfloat16; all other vectors are no factors of a product
            continue
        total += size * (_share_of_experts(manifest) if _of_experts(weight) else 1)
    return int(total)


def step_bytes(manifest: Manifest, sequences: int, depth: int) -> int:
    """Bytes that a step must read which tells a token of each of so many sequences, after `depth`
    tokens each. Of the experts as many as differ, if all are as likely: of n, k a token, those that
    some of the tokens choose are n (1 - (1 - k/n)^tokens)."""
    share = float(_share_of_experts(manifest))
    experts = sum(w.num_bytes for w in manifest.weights if _of_experts(w))
    others = manifest.decode_bytes - experts * share
    full, sliding = kv_bytes(manifest)
    kept = (depth + 1) * full + min(depth + 1, manifest.window) * sliding
    return round(others + experts * (1 - (1 - share) ** sequences) + sequences * kept)


def random_ids(manifest: Manifest) -> list[int]:
    """As many tokens as the context has positions."""
    ids: list[int] = (
        np.random.default_rng(0).integers(manifest.vocab_size, size=manifest.context).tolist()
    )
    return ids


def _share_of_experts(manifest: Manifest) -> Fraction:
    """The share of its experts that a token uses, which the bytes of a decode step imply."""
    experts = [weight for weight in manifest.weights if _of_experts(weight)]
    others = sum(
        weight.num_bytes
        for weight in manifest.weights
        if weight.name not in manifest.gathered and not _of_experts(weight)
    )
    read = (manifest.decode_bytes - others) / sum(weight.num_bytes for weight in experts)
    num_experts = experts[0].shape[0]
    return Fraction(round(read * num_experts), num_experts)


def _of_experts(weight: Tensor) -> bool:
    return ".gate_up." in weight.name or ".down." in weight.name
