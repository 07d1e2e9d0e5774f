"""The model as one Relax module: `prefill`, `decode` and `score`, without a target.

Every function takes (ids, position, [index,] caches.., weights..) and returns logits; the caches
are updated in place. Activations are float32 [tiles, tile, ...]: decode has one tile of one token,
the others a symbolic number of tiles of `PREFILL_TILE` tokens.
"""

from dataclasses import dataclass

from tvm import ir, relax, tirx
from tvm.relax import BlockBuilder, TensorType
from tvm.tirx import PrimFunc

from ..kernels import attention, experts, matmul, rows
from ..schedules.formats import BLOCK, FP4_PER_WORD, INT8_PER_WORD, Index
from .config import ModelConfig

PREFILL_TILE = 8  # tokens that share one pass over the weights in prefill
DEFAULT_CHUNK = 512  # tokens of one prefill call; longer prompts take several
SCORE_CHUNK = 64  # of one score call: it keeps 800 kB of logits a token
TILES = tirx.Var("tiles", "int64")  # number of tiles within a kernel
EXPERT_TILES = tirx.Var("expert_tiles", "int64")  # the same after sorting by expert
PROFILES = ("fast", "exact")


@dataclass(frozen=True)
class Parameter:
    """A tensor argument of the graph's functions."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Graph:
    """A module and the tensors its functions take, in the order in which they take them."""

    module: ir.IRModule
    caches: tuple[Parameter, ...]
    weights: tuple[Parameter, ...]


def build_graph(config: ModelConfig, profile: str, context: int, chunk: int) -> Graph:
    """The unscheduled module for at most `context` positions and `chunk` tokens a prefill.

    `profile`: "fast" (int8 dense weights and activations) or "exact" (bfloat16 and float32).
    """
    assert profile in PROFILES and chunk % PREFILL_TILE == 0
    caches = cache_parameters(config, profile, context, chunk)
    weights = weight_parameters(config, profile, context)
    builder = BlockBuilder()
    for name in ("prefill", "decode", "score"):
        # each function needs a symbol of its own; kernels share TILES and are built once
        shape = (1, 1) if name == "decode" else (tirx.Var("tiles", "int64"), PREFILL_TILE)
        _emit_function(builder, name, config, profile, (caches, weights), shape, chunk)
    return Graph(builder.get(), caches, weights)


def cache_parameters(
    config: ModelConfig, profile: str, context: int, chunk: int
) -> tuple[Parameter, ...]:
    """Keys and values of every layer; a prefill's last tile may reach past its last token."""
    dtype = "float16" if profile == "fast" else "float32"
    group = attention.KEYS_PER_TILE
    full = (context + PREFILL_TILE + group - 1) // group * group
    ring = (config.window + chunk + group - 1) // group * group
    heads, dim = config.num_kv_heads, config.head_dim
    parameters = []
    for i, sliding in enumerate(config.sliding):
        capacity = ring if sliding else full
        keys = (heads, capacity // group, dim, group)
        parameters.append(Parameter(f"layers.{i}.keys", keys, dtype))
        parameters.append(Parameter(f"layers.{i}.values", (heads, capacity, dim), dtype))
    return tuple(parameters)


def weight_parameters(config: ModelConfig, profile: str, context: int) -> tuple[Parameter, ...]:
    """The weights in the order in which data passes them; `weights.py` makes them."""
    hidden, heads, num_experts = config.hidden_size, config.num_heads, config.num_experts

    def vector(name: str, *shape: int) -> Parameter:
        return Parameter(name, shape, "float32")

    def bf16(name: str, rows: int, inputs: int) -> Parameter:
        return Parameter(f"{name}.weight", (rows, inputs), "uint16")

    def dense(name: str, rows: int, inputs: int) -> list[Parameter]:
        if profile == "exact":
            return [bf16(name, rows, inputs)]
        blocks = inputs // BLOCK
        words = (rows, blocks, BLOCK // INT8_PER_WORD)
        return [
            Parameter(f"{name}.words", words, "uint32"),
            Parameter(f"{name}.scales", (rows, blocks), "float16"),
        ]

    def expert(name: str, inputs: int, *rows: int) -> list[Parameter]:
        blocks = inputs // BLOCK
        words = (num_experts, *rows, blocks, BLOCK // FP4_PER_WORD)
        return [
            Parameter(f"{name}.words", words, "uint32"),
            Parameter(f"{name}.scales", (num_experts, *rows, blocks), "uint8"),
            vector(f"{name}.bias", num_experts, *rows),
        ]

    parameters = [vector("rope", context + PREFILL_TILE, config.head_dim // 2, 2)]
    parameters += dense("embed", config.vocab_size, hidden)
    for i in range(config.num_layers):
        layer = f"layers.{i}"
        parameters.append(vector(f"{layer}.attn_norm.weight", hidden))
        parameters += dense(f"{layer}.qkv", config.qkv_size, hidden)
        parameters.append(vector(f"{layer}.qkv.bias", config.qkv_size))
        parameters.append(vector(f"{layer}.sinks", heads))
        parameters += dense(f"{layer}.out", hidden, config.q_size)
        parameters.append(vector(f"{layer}.out.bias", hidden))
        parameters.append(vector(f"{layer}.mlp_norm.weight", hidden))
        parameters.append(bf16(f"{layer}.router", num_experts, hidden))
        parameters.append(vector(f"{layer}.router.bias", num_experts))
        parameters += expert(f"{layer}.gate_up", hidden, 2, config.intermediate_size)
        parameters += expert(f"{layer}.down", config.intermediate_size, hidden)
    parameters.append(vector("norm.weight", hidden))
    parameters += dense("lm_head", config.vocab_size, hidden)
    return tuple(parameters)


def _emit_function(
    builder: BlockBuilder,
    name: str,
    config: ModelConfig,
    profile: str,
    tensors: tuple[tuple[Parameter, ...], tuple[Parameter, ...]],
    shape: tuple[Index, int],
    chunk: int,
) -> None:
    tiles, tile = shape
    arguments = [
        relax.Var("ids", TensorType((tiles, tile), "int32")),
        relax.Var("position", TensorType((1,), "int32")),
    ]
    if name == "prefill":
        arguments.append(relax.Var("index", TensorType((1,), "int32")))
    variables = {
        p.name: relax.Var(p.name, TensorType(p.shape, p.dtype)) for part in tensors for p in part
    }
    limit = min(chunk, SCORE_CHUNK) if name == "score" else chunk
    bound = {} if tile == 1 else {"tir_var_upper_bound": {"tiles": limit // tile}}
    parameters = [*arguments, *variables.values()]
    with builder.function(name, parameters, attrs=bound, pure=False):
        layers = _Layers(builder, config, profile, variables, arguments[1], tiles, tile)
        x = layers.embed(arguments[0])
        for i in range(config.num_layers):
            x = layers.attention(i, x)
            x = layers.experts(i, x)
        if name == "prefill":
            x = layers.take_row(x, arguments[2])
        builder.emit_func_output(layers.head(x))


class _Layers:
    """Emits the parts of one function. `tiles` and `tile` are the shape of its activations."""

    def __init__(
        self,
        builder: BlockBuilder,
        config: ModelConfig,
        profile: str,
        variables: dict[str, relax.Var],
        position: relax.Var,
        tiles: Index,
        tile: int,
    ) -> None:
        self.builder, self.config, self.variables = builder, config, variables
        self.quantized = profile == "fast"
        self.position, self.tiles, self.tile = position, tiles, tile

    @property
    def kernel_shape(self) -> tuple[Index, int]:
        return (self.tiles if isinstance(self.tiles, int) else TILES, self.tile)

    def embed(self, ids: relax.Var) -> relax.Var:
        size = (*self.kernel_shape, self.config.vocab_size, self.config.hidden_size)
        kernel = rows.embed_q8(*size) if self.quantized else rows.embed_bf16(*size)
        return self._call(kernel, [ids, *self._dense_weights("embed")], [self._hidden()])

    def attention(self, i: int, x: relax.Var) -> relax.Var:
        """x + attention(norm(x)) of layer i, whose caches are extended."""
        config, layer, shape = self.config, f"layers.{i}", (self.tiles, self.tile)
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        keys, values = self.variables[f"{layer}.keys"], self.variables[f"{layer}.values"]
        rope = self.variables["rope"]
        context = int(rope.ty.shape[0])
        capacity, dtype = int(values.ty.shape[1]), str(values.ty.dtype)

        normed = self._norm(f"{layer}.attn_norm", x)
        qkv = self._dense(f"{layer}.qkv", self._activation(normed, config.hidden_size))
        queries = self._call(
            rows.rotate_queries(*self.kernel_shape, heads, kv_heads, dim, context),
            [qkv, rope, self.position],
            [TensorType((*shape, heads, dim), "float32")],
        )
        cache = (heads, kv_heads, dim, context, capacity, dtype)
        append = attention.append_kv(*self.kernel_shape, *cache)
        caches = self.builder.emit(
            relax.op.call_tir_inplace(
                self.builder.add_func(append, "append_kv"),
                [keys, values, qkv, rope, self.position],
                [0, 1],
                [keys.ty, values.ty],
            )
        )
        keys, values = (self.builder.emit(relax.TupleGetItem(caches, j)) for j in (0, 1))
        window = config.window if config.sliding[i] else None
        mixed = self._call(
            attention.attention(*self.kernel_shape, heads, kv_heads, dim, capacity, window, dtype),
            [queries, keys, values, self.variables[f"{layer}.sinks"], self.position],
            [TensorType((*shape, config.q_size), "float32")],
        )
        return self._dense(f"{layer}.out", self._activation(mixed, config.q_size), residual=x)

    def experts(self, i: int, x: relax.Var) -> relax.Var:
        """x + the experts of norm(x) in layer i."""
        config, layer, tile = self.config, f"layers.{i}", self.tile
        hidden, inner, top_k = (
            config.hidden_size,
            config.intermediate_size,
            config.num_experts_per_token,
        )
        sizes = (config.num_experts, top_k)
        choices = TensorType((self.tiles, tile, top_k), "int32")

        normed = self._norm(f"{layer}.mlp_norm", x)
        router = [self.variables[f"{layer}.router.{part}"] for part in ("weight", "bias")]
        logits = self._call(
            matmul.dense_bf16(*self.kernel_shape, hidden, config.num_experts, True, False),
            [normed, *router],
            [TensorType((self.tiles, tile, config.num_experts), "float32")],
        )
        ids, weights = self._call_many(
            experts.route(*self.kernel_shape, *sizes),
            [logits],
            [choices, TensorType(choices.shape, "float32")],
        )
        num_tiles = experts.num_expert_tiles(self.tiles, tile, *sizes)
        tile_expert, tile_token, slots, _ = self._call_many(
            experts.sort_by_expert(*self.kernel_shape, *sizes),
            [ids],
            [
                TensorType((num_tiles,), "int32"),
                TensorType((num_tiles, tile), "int32"),
                choices,
                TensorType((2, config.num_experts), "int32"),
            ],
        )
        # Within the expert kernels the number of tiles is a symbol of its own.
        symbol = num_tiles if isinstance(num_tiles, int) else EXPERT_TILES
        gathered = self._call(
            rows.gather_rows(*self.kernel_shape, hidden, symbol),
            [normed, tile_token],
            [TensorType((num_tiles, tile, hidden), "float32")],
        )
        act = self._expert(
            matmul.moe_mxfp4_swiglu(
                self.quantized, symbol, tile, config.num_experts, hidden, inner, config.swiglu_limit
            ),
            f"{layer}.gate_up",
            self._activation(gathered, hidden, symbol),
            tile_expert,
            TensorType((num_tiles, tile, inner), "float32"),
        )
        y = self._expert(
            matmul.moe_mxfp4(self.quantized, symbol, tile, config.num_experts, inner, hidden),
            f"{layer}.down",
            self._activation(act, inner, symbol),
            tile_expert,
            TensorType((num_tiles, tile, hidden), "float32"),
        )
        return self._call(
            experts.combine_experts(*self.kernel_shape, hidden, symbol, top_k),
            [y, slots, weights, x],
            [self._hidden()],
        )

    def take_row(self, x: relax.Var, index: relax.Var) -> relax.Var:
        """The row of one token; what follows sees a single tile of it."""
        kernel = rows.take_row(*self.kernel_shape, self.config.hidden_size)
        self.tiles, self.tile = 1, 1
        return self._call(kernel, [x, index], [self._hidden()])

    def head(self, x: relax.Var) -> relax.Var:
        normed = self._norm("norm", x)
        return self._dense("lm_head", self._activation(normed, self.config.hidden_size))

    def _norm(self, name: str, x: relax.Var) -> relax.Var:
        size = self.config.hidden_size
        kernel = rows.rms_norm(*self.kernel_shape, size, self.config.norm_eps)
        return self._call(kernel, [x, self.variables[f"{name}.weight"]], [self._hidden()])

    def _activation(
        self, x: relax.Var, inputs: int, symbol: Index | None = None
    ) -> list[relax.Var]:
        """x as the profile's matrix products take it: float32, or int8 with scales and sums."""
        if not self.quantized:
            return [x]
        shape = (x.ty.shape[0], x.ty.shape[1], inputs // BLOCK)
        kernel = rows.quantize_q8(
            self.kernel_shape[0] if symbol is None else symbol, self.tile, inputs
        )
        types = [
            TensorType((*shape, BLOCK), "int8"),
            TensorType(shape, "float32"),
            TensorType(shape, "int32"),
        ]
        return self._call_many(kernel, [x], types)

    def _dense(
        self, name: str, activation: list[relax.Var], residual: relax.Var | None = None
    ) -> relax.Var:
        weights = self._dense_weights(name)
        num_rows = int(weights[0].ty.shape[0])
        bias = self.variables.get(f"{name}.bias")
        kernel = (matmul.dense_q8 if self.quantized else matmul.dense_bf16)(
            *self.kernel_shape,
            _inputs(activation),
            num_rows,
            bias is not None,
            residual is not None,
        )
        extra = [tensor for tensor in (bias, residual) if tensor is not None]
        out = TensorType((self.tiles, self.tile, num_rows), "float32")
        return self._call(kernel, [*activation, *weights, *extra], [out])

    def _expert(
        self,
        kernel: PrimFunc,
        name: str,
        activation: list[relax.Var],
        tile_expert: relax.Var,
        out: TensorType,
    ) -> relax.Var:
        weights = [self.variables[f"{name}.{part}"] for part in ("words", "scales", "bias")]
        return self._call(kernel, [*activation, *weights, tile_expert], [out])

    def _dense_weights(self, name: str) -> list[relax.Var]:
        parts = ("words", "scales") if self.quantized else ("weight",)
        return [self.variables[f"{name}.{part}"] for part in parts]

    def _hidden(self) -> TensorType:
        return TensorType((self.tiles, self.tile, self.config.hidden_size), "float32")

    def _call(
        self, kernel: PrimFunc, args: list[relax.Var], outputs: list[TensorType]
    ) -> relax.Var:
        name = self.builder.add_func(kernel, str(kernel.attrs["op"]))
        types = outputs if len(outputs) > 1 else outputs[0]
        return self.builder.emit(relax.call_tir(name, args, types))

    def _call_many(
        self, kernel: PrimFunc, args: list[relax.Var], outputs: list[TensorType]
    ) -> list[relax.Var]:
        results = self._call(kernel, args, outputs)
        return [self.builder.emit(relax.TupleGetItem(results, i)) for i in range(len(outputs))]


def _inputs(activation: list[relax.Var]) -> int:
    """Inputs of a matrix product: [.., inputs] float32, or [.., blocks, 32] int8."""
    shape = [int(e) for e in list(activation[0].ty.shape)[2:]]
    return shape[0] if len(shape) == 1 else shape[0] * shape[1]
