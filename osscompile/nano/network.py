"""nano's network in torch: the gpt-oss architecture with quantisation-aware experts."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MXFP4_BLOCK = 32  # weights along the input that share a scale
MXFP4_MAX = 6.0  # largest magnitude of an E2M1 value


@dataclass(frozen=True)
class NanoConfig:
    """Shapes of nano; everything else is as in gpt-oss-20b."""

    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    num_experts: int = 8
    num_active_experts: int = 2
    sliding_window: int = 32
    rope_theta: float = 150000.0
    rope_factor: float = 32.0
    original_context: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702
    rms_norm_eps: float = 1e-5


@dataclass
class LayerCache:
    """The keys and values that a layer has seen, [batch, kv_head, token, head_dim]."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens and return all of them."""
        if self.keys is not None and self.values is not None:
            keys = torch.cat((self.keys, keys), 2)
            values = torch.cat((self.values, values), 2)
        self.keys, self.values = keys, values
        return keys, values


@dataclass(frozen=True)
class Rotation:
    """cos and sin of the rotary embedding at each token, [batch, 1, token, head_dim / 2]."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate [batch, head, token, head_dim] in the half-split (NeoX) layout."""
        a, b = x.chunk(2, -1)
        return torch.cat((a * self.cos - b * self.sin, b * self.cos + a * self.sin), -1)


class Nano(nn.Module):  # type: ignore[misc]
    """The whole model, float32 parameters; `quantise` rounds expert weights to MXFP4 on the fly."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.config, self.quantise = config, False
        self.embed_tokens = nn.Parameter(torch.randn(config.vocab_size, config.hidden_size) * 0.5)
        self.lm_head = _normal(config.vocab_size, config.hidden_size)
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        visible: Tensor,
        key_positions: Tensor | None = None,
        caches: list[LayerCache] | None = None,
        selected: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (logits, load-balance loss).

        ids, positions: [batch, token]; visible: bool [batch, token, key], the keys that a token may
        see before the window is applied; key_positions: [batch, key], if keys come from caches;
        selected: flat indices of the tokens whose logits are wanted, all by default.
        """
        config = self.config
        if key_positions is None:
            key_positions = positions
        near = positions[:, :, None] - key_positions[:, None, :] < config.sliding_window
        rotation = yarn_rotation(config, positions)
        masks = [_with_sink(visible & near), _with_sink(visible)]
        x = F.embedding(ids, self.embed_tokens)
        balance = x.new_zeros(())
        for index, layer in enumerate(self.layers):
            cache = caches[index] if caches else None
            x, layer_balance = layer(x, rotation, masks[index % 2], cache, self.quantise)
            balance = balance + layer_balance
        x = x.flatten(0, 1)
        if selected is not None:
            x = x.index_select(0, selected)
        x = F.rms_norm(x, (config.hidden_size,), self.norm, config.rms_norm_eps)
        return F.linear(x, self.lm_head), balance / config.num_layers


class Layer(nn.Module):  # type: ignore[misc]
    """Attention with sinks, then a mixture of experts; gate and up are halves, not interleaved."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.config = config
        hidden, experts, inner = config.hidden_size, config.num_experts, config.intermediate_size
        query = config.num_heads * config.head_dim
        qkv = query + 2 * config.num_kv_heads * config.head_dim
        residual = 1 / math.sqrt(2 * config.num_layers)
        self.attention_norm = nn.Parameter(torch.ones(hidden))
        self.qkv, self.qkv_bias = _normal(qkv, hidden), nn.Parameter(torch.zeros(qkv))
        self.out, self.out_bias = _normal(hidden, query, residual), _zeros(hidden)
        self.sinks = _zeros(config.num_heads)
        self.expert_norm = nn.Parameter(torch.ones(hidden))
        self.router, self.router_bias = _normal(experts, hidden), _zeros(experts)
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * inner, hidden) / math.sqrt(hidden))
        self.gate_up_bias = _zeros(experts, 2 * inner)
        down = torch.randn(experts, hidden, inner) * residual / math.sqrt(inner)
        self.down, self.down_bias = nn.Parameter(down), _zeros(experts, hidden)

    def forward(
        self, x: Tensor, rotation: Rotation, mask: Tensor, cache: LayerCache | None, quantise: bool
    ) -> tuple[Tensor, Tensor]:
        """x: [batch, token, hidden] -> the same, and the load-balance loss of the router."""
        size, eps = (x.shape[-1],), self.config.rms_norm_eps
        normed = F.rms_norm(x, size, self.attention_norm, eps)
        x = x + self._attend(normed, rotation, mask, cache)
        normed = F.rms_norm(x, size, self.expert_norm, eps).flatten(0, 1)
        mixed, balance = self._mix_experts(normed, quantise)
        return x + mixed.view_as(x), balance

    def _attend(
        self, x: Tensor, rotation: Rotation, mask: Tensor, cache: LayerCache | None
    ) -> Tensor:
        config = self.config
        heads, kv_heads = config.num_heads, config.num_kv_heads
        qkv = F.linear(x, self.qkv, self.qkv_bias).unflatten(-1, (-1, config.head_dim))
        q, k, v = qkv.transpose(1, 2).split((heads, kv_heads, kv_heads), 1)
        q, k = rotation(q) / math.sqrt(config.head_dim), rotation(k)
        if cache is not None:
            k, v = cache.extend(k, v)
        # The sink is a first key whose score is the learned logit and whose value is zero. An extra
        # input gives that score: it is the logit in queries, and one in the sink's key only.
        sinks = self.sinks.view(1, heads, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
        q = torch.cat((q, sinks), -1)
        k, v = F.pad(k, (0, 1, 1, 0)), F.pad(v, (0, 1, 1, 0))
        one = k.new_zeros(k.shape[-2:])
        one[0, -1] = 1.0
        k = (k + one).repeat_interleave(heads // kv_heads, 1)
        v = v.repeat_interleave(heads // kv_heads, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return F.linear(y[..., :-1].transpose(1, 2).flatten(2), self.out, self.out_bias)

    def _mix_experts(self, x: Tensor, quantise: bool) -> tuple[Tensor, Tensor]:
        config = self.config
        logits = F.linear(x, self.router, self.router_bias)
        top, chosen = logits.topk(config.num_active_experts, -1)
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=config.num_experts)
        token = order // config.num_active_experts
        weight = top.softmax(-1).flatten().index_select(0, order).unsqueeze(1)
        gate_up_weight = fake_quantise(self.gate_up) if quantise else self.gate_up
        down_weight = fake_quantise(self.down) if quantise else self.down
        sizes = counts.tolist()
        parts = x.index_select(0, token).split(sizes)
        gate_up = torch.cat(
            [
                F.linear(part, gate_up_weight[e], self.gate_up_bias[e])
                for e, part in enumerate(parts)
            ]
        )
        gate, up = gate_up.chunk(2, -1)
        gate = gate.clamp(max=config.swiglu_limit)
        up = up.clamp(-config.swiglu_limit, config.swiglu_limit)
        inner = gate * torch.sigmoid(config.swiglu_alpha * gate) * (up + 1)
        parts = inner.split(sizes)
        outputs = [
            F.linear(part, down_weight[e], self.down_bias[e]) for e, part in enumerate(parts)
        ]
        mixed = torch.zeros_like(x).index_add(0, token, torch.cat(outputs) * weight)
        share = counts / chosen.numel()
        balance = config.num_experts * (share * logits.softmax(-1).mean(0)).sum()
        return mixed, balance


def yarn_rotation(config: NanoConfig, positions: Tensor) -> Rotation:
    """Return YaRN's rotation at [batch, token], with its range not truncated, as in gpt-oss."""
    half = config.head_dim // 2
    dim = torch.arange(half, dtype=torch.float64)
    period = config.rope_theta ** (dim / half)

    def turning_point(turns: float) -> float:
        length = config.original_context / (turns * 2 * math.pi)
        return half * math.log(length) / math.log(config.rope_theta)

    low, high = turning_point(config.beta_fast), turning_point(config.beta_slow)
    ramp = ((dim - low) / (high - low)).clamp(0, 1)
    frequency = ramp / (config.rope_factor * period) + (1 - ramp) / period
    concentration = 0.1 * math.log(config.rope_factor) + 1
    angle = positions[:, None, :, None] * frequency
    return Rotation(
        (angle.cos() * concentration).float(),
        (angle.sin() * concentration).float(),
    )


def round_to_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[..., in] -> (values on the MXFP4 grid, exponent per block of 32 inputs [..., in / 32]).

    The scale 2^ceil(log2(amax / 6)) never clips.
    """
    blocks = weight.unflatten(-1, (-1, MXFP4_BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True).clamp_min(2.0**-100)
    exponent = torch.ceil(torch.log2(largest / MXFP4_MAX)).clamp(-127, 127)
    scale = torch.exp2(exponent)
    scaled = blocks / scale
    # E2M1 has steps of 0.5 below 2, 1 below 4, 2 up to 6.
    magnitude = scaled.abs()
    step = 0.5 + 0.5 * (magnitude >= 2) + (magnitude >= 4)
    rounded = (torch.round(scaled / step) * step).clamp(-MXFP4_MAX, MXFP4_MAX)
    return (rounded * scale).view_as(weight), exponent.squeeze(-1)


def fake_quantise(weight: Tensor) -> Tensor:
    """Return the weight as MXFP4 stores it; gradients pass straight through."""
    return weight + (round_to_mxfp4(weight.detach())[0] - weight.detach())


def _with_sink(mask: Tensor) -> Tensor:
    """bool [batch, token, key] -> [batch, 1, token, 1 + key]; the sink is always visible."""
    return F.pad(mask, (1, 0), value=True).unsqueeze(1)


def _normal(rows: int, columns: int, gain: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) * gain / math.sqrt(columns))


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))
