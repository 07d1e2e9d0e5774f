"""gpt-oss in numpy float64, written from its published maths: the judge of every kernel and model.

It takes a Hugging Face `config.json` and its tensors by name, and gives logits [T, vocab] of a
sequence. It has no cache, no batching, no speed: each function is one formula. Shapes: T tokens, H
hidden, D head size, E experts, I intermediate, G blocks of 32 inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]
Tensor = NDArray[Any]  # bfloat16 (ml_dtypes), its bits as uint16, a float type, or packed uint8

BLOCK = 32  # inputs that share one scale, in MXFP4 and in q8
SWIGLU_ALPHA = 1.702
MXFP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
QUERY_ROWS = 512  # queries that attention takes at a time, which bounds memory


@dataclass(frozen=True)
class Ablation:
    """Deliberate mistakes: with each, a test shows that its inputs would reveal the mistake."""

    no_sinks: bool = False
    no_attention_bias: bool = False  # in the q, k, v and o projections
    no_router_bias: bool = False
    no_expert_bias: bool = False  # in gate_up and down
    no_clamp: bool = False
    swapped_gate_up: bool = False  # even rows read as up, odd rows as gate
    softmax_before_top_k: bool = False  # expert weights that do not sum to 1
    yarn_truncate: bool = False  # correction range rounded outwards to whole dimensions
    no_yarn: bool = False  # plain RoPE, concentration 1
    window_offset: int = 0  # added to the window of sliding layers


class Model:
    """`config` is the parsed config.json, `tensors` maps Hugging Face names to arrays.

    Experts are MXFP4 (`..._proj_blocks` and `..._proj_scales`) or dense [E, in, out] (`..._proj`).
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        ablation: Ablation | None = None,
    ) -> None:
        self.config = config
        self.tensors = tensors
        self.ablation = ablation or Ablation()

    def logits(self, token_ids: ArrayLike, *, trace: dict[str, Tensor] | None = None) -> F64:
        """ids [T] -> logits [T, vocab]. `trace` gets the activations in the order of computation:

        `embed` [T, H]; per layer `layers.{i}.`: `attention_norm` [T, H], `q` [T, heads, D] and
        `k` [T, kv_heads, D] (both after RoPE), `v`, `attention` [T, heads, D] (before o_proj),
        `after_attention` [T, H] (residual stream), `moe_norm` [T, H], `router_logits` [T, E],
        `expert_ids` and `expert_weights` [T, k], `moe` [T, H], `output` [T, H] (residual stream);
        `norm` [T, H]; `logits` [T, vocab].
        """
        seen: dict[str, Tensor] = {} if trace is None else trace
        ids = np.asarray(token_ids, np.int64)
        x = seen["embed"] = to_float64(self.tensors["model.embed_tokens.weight"][ids])
        for layer in range(self.config["num_hidden_layers"]):
            x = x + self._attention(layer, x, seen)
            seen[f"layers.{layer}.after_attention"] = x
            x = x + self._moe(layer, x, seen)
            seen[f"layers.{layer}.output"] = x
        x = seen["norm"] = self._norm("model.norm", x)
        logits = seen["logits"] = x @ self._weight("lm_head.weight").T
        return logits

    def window(self, layer: int) -> int | None:
        """Return how many keys a query in this layer sees, with its own; None: all up to it."""
        kinds = self.config.get("layer_types")
        sliding = layer % 2 == 0 if kinds is None else kinds[layer] == "sliding_attention"
        return self.config["sliding_window"] + self.ablation.window_offset if sliding else None

    def rope(self) -> tuple[F64, float]:
        """Return `yarn_inv_freq` of this model's config, with ablations."""
        c = self.config
        scaling = c.get("rope_parameters") or c["rope_scaling"]  # transformers 5 renamed the key
        theta = scaling.get("rope_theta", c.get("rope_theta"))
        if self.ablation.no_yarn:
            scaling = None
        elif self.ablation.yarn_truncate:
            scaling = {**scaling, "truncate": True}
        return yarn_inv_freq(c["head_dim"], theta, scaling)

    def _attention(self, layer: int, x: F64, seen: dict[str, Tensor]) -> F64:
        c, name = self.config, f"layers.{layer}."
        positions = np.arange(len(x))
        h = self._norm(f"model.{name}input_layernorm", x)
        q, k, v = (
            self._linear(f"model.{name}self_attn.{part}_proj", h).reshape(len(x), -1, c["head_dim"])
            for part in "qkv"
        )
        q = apply_rope(q, positions, *self.rope())
        k = apply_rope(k, positions, *self.rope())
        sinks = self._weight(f"model.{name}self_attn.sinks")
        if self.ablation.no_sinks:
            sinks = np.full_like(sinks, -np.inf)
        out = attention(q, k, v, sinks, self.window(layer))
        seen |= {name + "attention_norm": h, name + "q": q, name + "k": k, name + "v": v}
        seen[name + "attention"] = out
        return self._linear(f"model.{name}self_attn.o_proj", out.reshape(len(x), -1))

    def _moe(self, layer: int, x: F64, seen: dict[str, Tensor]) -> F64:
        c, name = self.config, f"layers.{layer}."
        h = self._norm(f"model.{name}post_attention_layernorm", x)
        logits = self._linear(f"model.{name}mlp.router", h)
        ids, weights = route(logits, c["num_experts_per_tok"])
        if self.ablation.softmax_before_top_k:
            weights = np.take_along_axis(np.exp(log_softmax(logits)), ids, axis=1)
        out = moe(
            h,
            ids,
            weights,
            self._experts(f"model.{name}mlp.experts.gate_up_proj"),
            self._bias(f"model.{name}mlp.experts.gate_up_proj_bias"),
            self._experts(f"model.{name}mlp.experts.down_proj"),
            self._bias(f"model.{name}mlp.experts.down_proj_bias"),
            math.inf if self.ablation.no_clamp else c["swiglu_limit"],
            swapped_gate_up=self.ablation.swapped_gate_up,
        )
        seen |= {name + "moe_norm": h, name + "router_logits": logits}
        seen |= {name + "expert_ids": ids, name + "expert_weights": weights, name + "moe": out}
        return out

    def _norm(self, name: str, x: F64) -> F64:
        return rms_norm(x, self._weight(name + ".weight"), self.config["rms_norm_eps"])

    def _linear(self, name: str, x: F64) -> F64:
        y: F64 = x @ self._weight(name + ".weight").T + self._bias(name + ".bias")
        return y

    def _weight(self, name: str) -> F64:
        return to_float64(self.tensors[name])

    def _bias(self, name: str) -> F64:
        a = self.ablation
        dropped = (
            (a.no_attention_bias and ".self_attn." in name)
            or (a.no_router_bias and ".router." in name)
            or (a.no_expert_bias and ".experts." in name)
        )
        return np.zeros(self.tensors[name].shape) if dropped else self._weight(name)

    def _experts(self, name: str) -> Experts:
        """Return the weights, which give [out, in] for an expert's index."""
        if name in self.tensors:
            return DenseExperts(self.tensors[name])
        return Mxfp4Experts(self.tensors[name + "_blocks"], self.tensors[name + "_scales"])


# --- The parts --------------------------------------------------------------------------------


def rms_norm(x: F64, weight: F64, eps: float) -> F64:
    """x [..., H], weight [H] -> [..., H]."""
    rms: F64 = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)
    return x / rms * weight


def yarn_inv_freq(
    head_dim: int, theta: float, scaling: Mapping[str, Any] | None
) -> tuple[F64, float]:
    """(inverse frequencies [D/2], concentration) of RoPE with YaRN (arXiv 2309.00071).

    `scaling` is the `rope_scaling` of config.json; None is plain RoPE. A missing `truncate` means
    true, as in transformers; gpt-oss says false.
    """
    d = np.arange(head_dim // 2)
    freq = theta ** (2 * d / head_dim)
    if scaling is None:
        return 1 / freq, 1.0
    lo, hi = yarn_range(head_dim, theta, scaling)
    width = hi - lo if hi != lo else 0.001  # the bounds can meet; transformers adds as much
    ramp = np.clip((d - lo) / width, 0, 1)  # 0: as trained; 1: positions divided by the factor
    factor = scaling["factor"]
    return ramp / (factor * freq) + (1 - ramp) / freq, 0.1 * math.log(factor) + 1


def yarn_range(head_dim: int, theta: float, scaling: Mapping[str, Any]) -> tuple[float, float]:
    """(lo, hi): the dimensions that turn `beta_fast` and `beta_slow` times in the old context.

    Like transformers, lo is kept at 0 or more, and hi at head_dim - 1 or less.
    """
    context = scaling["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        return head_dim / 2 * math.log(context / (turns * 2 * math.pi)) / math.log(theta)

    lo, hi = dimension(scaling["beta_fast"]), dimension(scaling["beta_slow"])
    if scaling.get("truncate", True):
        lo, hi = math.floor(lo), math.ceil(hi)
    return max(lo, 0), min(hi, head_dim - 1)


def apply_rope(x: F64, positions: ArrayLike, inv_freq: F64, concentration: float) -> F64:
    """x [T, heads, D], positions [T] -> [T, heads, D]; rotates the pairs (d, d + D/2)."""
    angle = np.asarray(positions, np.float64)[:, None, None] * inv_freq  # [T, 1, D/2]
    cos, sin = np.cos(angle) * concentration, np.sin(angle) * concentration
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(
    q: F64,
    k: F64,
    v: F64,
    sinks: F64,
    window: int | None,
    query_positions: ArrayLike | None = None,
    key_positions: ArrayLike | None = None,
) -> F64:
    """q [T, heads, D], k and v [S, kv_heads, D], sinks [heads] -> [T, heads, D].

    A query sees a key if the key is not after it and fewer than `window` positions before it. The
    sink is one more score that has no value. Positions default to 0..S-1 for the keys and the last
    T of these for the queries.
    """
    num_queries, num_heads, head_dim = q.shape
    num_keys, num_kv_heads, _ = k.shape
    key_at = np.arange(num_keys) if key_positions is None else np.asarray(key_positions)
    query_at = key_at[-num_queries:] if query_positions is None else np.asarray(query_positions)
    out = np.empty(q.shape)
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv_heads)
        for start in range(0, num_queries, QUERY_ROWS):
            rows = slice(start, start + QUERY_ROWS)
            distance = query_at[rows, None] - key_at[None, :]
            allowed = distance >= 0
            if window is not None:
                allowed &= distance < window
            scores = q[rows, head] @ k[:, kv_head].T / math.sqrt(head_dim)
            scores = np.where(allowed, scores, -np.inf)
            top = np.maximum(scores.max(axis=1, keepdims=True), sinks[head])
            mass = np.exp(scores - top)
            total = mass.sum(axis=1, keepdims=True) + np.exp(sinks[head] - top)
            out[rows, head] = mass @ v[:, kv_head] / total
    return out


def route(logits: F64, k: int) -> tuple[NDArray[np.int64], F64]:
    """logits [T, E] -> ids [T, k] by falling logit (ties: lowest id first), weights [T, k].

    The softmax is over the chosen k only, so that the weights of a token sum to 1.
    """
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return ids, np.exp(log_softmax(np.take_along_axis(logits, ids, axis=1)))


def swiglu(gate: F64, up: F64, limit: float) -> F64:
    """gate and up [..., I] -> [..., I]; gate is clamped from above only, up on both sides."""
    gate = np.minimum(gate, limit)
    up = np.clip(up, -limit, limit)
    return gate * sigmoid(SWIGLU_ALPHA * gate) * (up + 1)


class Experts(Protocol):
    """One matrix [out, in] per expert: an array [E, out, in], a list, or packed weights."""

    def __getitem__(self, expert: int, /) -> Any: ...


def moe(
    h: F64,
    ids: NDArray[np.int64],
    weights: F64,
    gate_up: Experts,
    gate_up_bias: F64,
    down: Experts,
    down_bias: F64,
    limit: float,
    *,
    swapped_gate_up: bool = False,
) -> F64:
    """h [T, H], ids and weights [T, k] from `route` -> [T, H], without the residual.

    In gate_up[e] [2I, H] and gate_up_bias [E, 2I] even rows are gate, odd rows are up. down_bias
    [E, H] is added after down[e] [H, I], before the expert's weight is applied.
    """
    out = np.zeros(h.shape)
    for expert in np.unique(ids):
        token, slot = np.nonzero(ids == expert)
        both = h[token] @ gate_up[expert].T + gate_up_bias[expert]
        gate, up = both[:, 0::2], both[:, 1::2]
        if swapped_gate_up:
            gate, up = up, gate
        y = swiglu(gate, up, limit) @ down[expert].T + down_bias[expert]
        out[token] += weights[token, slot, None] * y  # an expert occurs once per token
    return out


@dataclass(frozen=True)
class Mxfp4Experts:
    """blocks [E, out, G, 16] and scales [E, out, G], unpacked one expert at a time."""

    blocks: Tensor
    scales: Tensor

    def __getitem__(self, expert: int) -> F64:
        return dequantize_mxfp4(self.blocks[expert], self.scales[expert])


@dataclass(frozen=True)
class DenseExperts:
    """[E, in, out], the orientation in which transformers stores unpacked experts."""

    weight: Tensor

    def __getitem__(self, expert: int) -> F64:
        return to_float64(self.weight[expert]).T


# --- Number formats ---------------------------------------------------------------------------


def to_float64(tensor: Tensor) -> F64:
    """Convert a checkpoint's tensor of any float type; uint16 holds the bits of bfloat16."""
    if tensor.dtype == np.uint16:
        return (tensor.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if tensor.dtype == np.uint8:
        raise TypeError("packed MXFP4 needs its scales: use dequantize_mxfp4")
    return tensor.astype(np.float64)


def dequantize_mxfp4(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> F64:
    """blocks [..., G, 16] and scales [..., G] -> [..., 32 * G].

    Byte b of a block holds input 2b in its low nibble and 2b + 1 in its high one; a block is
    multiplied by 2^(scale - 127) (OCP Microscaling Formats 1.0, E2M1 with E8M0 scales).
    """
    nibbles = np.stack([blocks & 15, blocks >> 4], axis=-1)  # [..., G, 16, 2]
    values = MXFP4_VALUES[nibbles].reshape(*scales.shape, BLOCK)
    scaled: F64 = np.ldexp(values, scales.astype(np.int32)[..., None] - 127)
    return scaled.reshape(*scales.shape[:-1], scales.shape[-1] * BLOCK)


def quantize_q8(x: ArrayLike) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """x [..., K] -> (q [..., K], scale [..., K/32]): the int8 format of the profile `fast`.

    It is defined in float32 arithmetic throughout: scale = max|x| / 127 over 32 inputs in a row;
    q = x / scale rounded to nearest, ties to even. A block of zeros, or of values so small that the
    scale is 0, has scale 0 and q 0. (q is limited to 127, which only subnormal scales exceed.)
    """
    x = np.asarray(x, np.float32)
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    scale = np.abs(blocks).max(axis=-1) / np.float32(127)
    divisor = np.where(scale == 0, np.float32(np.inf), scale)[..., None]
    q = np.clip(np.rint(blocks / divisor), -127, 127).astype(np.int8)
    return q.reshape(x.shape), scale


def dequantize_q8(q: NDArray[np.int8], scale: NDArray[np.float32]) -> F64:
    """q [..., K] and scale [..., K/32] -> [..., K], exact."""
    blocks = q.reshape(*scale.shape, BLOCK).astype(np.float64)
    return (blocks * scale.astype(np.float64)[..., None]).reshape(q.shape)


# --- Elementary functions and measures --------------------------------------------------------


def sigmoid(x: F64) -> F64:
    """1 / (1 + exp(-x)), computed by tanh so that no exponential overflows."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def log_softmax(logits: F64) -> F64:
    """Return log(softmax) over the last axis."""
    shifted: F64 = logits - logits.max(axis=-1, keepdims=True)
    log_total: F64 = np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted - log_total


def relative_rms(actual: ArrayLike, expected: ArrayLike) -> float:
    """rms(actual - expected) / rms(expected), over all elements."""
    actual, expected = _pair(actual, expected)
    return float(np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2)))


def kl_divergence(expected_logits: ArrayLike, actual_logits: ArrayLike) -> float:
    """KL(expected || actual) in nats, mean over the rows of [T, vocab]."""
    expected, actual = map(log_softmax, _pair(expected_logits, actual_logits))
    return float(np.mean(np.sum(np.exp(expected) * (expected - actual), axis=-1)))


def top1_agreement(expected_logits: ArrayLike, actual_logits: ArrayLike) -> float:
    """Return the share of rows of [T, vocab] that have the same highest logit."""
    expected, actual = _pair(expected_logits, actual_logits)
    return float(np.mean(expected.argmax(axis=-1) == actual.argmax(axis=-1)))


def _pair(a: ArrayLike, b: ArrayLike) -> Sequence[F64]:
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert first.shape == second.shape, (first.shape, second.shape)  # no broadcasting by accident
    return first, second
