"""The model as one Relax module, without a target: `step`, which computes rows of any sequences,
and `step_1`, `step_2` and so on, which compute so many.

Both take (rows, [tiles, wanted,] tables.., caches.., weights..) and return logits; the caches are
updated in place. `rows` [tokens, 3] int32 says of each row which token it is, at which position,
and where its sequence's table begins; `tiles` [tiles, 2] which rows attention may compute together
(see `kernels/attention.py`); `wanted` which rows' logits are returned. Activations are float32
[tokens, ...]. A cache is an array of pages, whose number is symbolic; the tables say which pages a
sequence has, one for the layers that see everything and one for the sliding layers. Where the host
does not share the device's memory, `choice.py` takes the logits on to the next token.
"""

from dataclasses import dataclass

from tvm import ir, relax, tirx
from tvm.relax import BlockBuilder, TensorType
from tvm.tirx import PrimFunc

from ..kernels import attention, experts, kv_cache, matmul, quantize, rows
from ..runtime.step import FEW
from ..schedules.formats import (
    BLOCK,
    DIGITS,
    FACTS,
    FEW_EXPERT_ROWS,
    FEW_TOKENS,
    FP4_PER_WORD,
    INT8_PER_WORD,
    Index,
)
from .config import ModelConfig

MOST_WANTED = 64  # of one step: logits take 800 kB a row
TOKENS = tirx.Var("tokens", "int64")  # number of tokens within a kernel
WANTED = tirx.Var("wanted_rows", "int64")  # number of those whose logits are wanted
EXPERT_ROWS = tirx.Var("expert_rows", "int64")  # of rows of the experts' kernels: top_k a token
TABLES = ("full_tables", "window_tables")  # which pages hold a sequence
PROFILES = ("fast", "exact")


@dataclass(frozen=True)
class Parameter:
    """A tensor argument of the graph's functions."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Graph:
    """A module and the tensors its functions take, in the order in which they take them; of the
    `caches` the shape is that of one page."""

    module: ir.IRModule
    caches: tuple[Parameter, ...]
    weights: tuple[Parameter, ...]


def build_graph(config: ModelConfig, profile: str, context: int, chunk: int) -> Graph:
    """The unscheduled module for at most `context` positions and `chunk` tokens a prefill.

    `profile`: "fast" (int8 dense weights and activations) or "exact" (bfloat16 and float32).
    """
    assert profile in PROFILES
    caches = cache_parameters(config, profile)
    weights = weight_parameters(config, profile, context)
    builder = BlockBuilder()
    # the function needs a symbol of its own; kernels share TOKENS and are built once
    _emit_step(
        builder, "step", config, profile, (caches, weights), tirx.Var("tokens", "int64"), chunk
    )
    for count, name in FEW.items():
        _emit_step(builder, name, config, profile, (caches, weights), count, chunk)
    return Graph(builder.get(), caches, weights)


def cache_parameters(config: ModelConfig, profile: str) -> tuple[Parameter, ...]:
    """A page of the keys and of the values of every layer."""
    dtype = "float16" if profile == "fast" else "float32"
    keys, values = kv_cache.page_shapes(config.num_kv_heads, config.head_dim)
    parameters = []
    for i in range(config.num_layers):
        parameters.append(Parameter(f"layers.{i}.keys", keys, dtype))
        parameters.append(Parameter(f"layers.{i}.values", values, dtype))
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

    parameters = [vector("rope", context, config.head_dim // 2, 2)]
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


def _emit_step(
    builder: BlockBuilder,
    name: str,
    config: ModelConfig,
    profile: str,
    tensors: tuple[tuple[Parameter, ...], tuple[Parameter, ...]],
    tokens: Index,
    chunk: int,
) -> None:
    arguments = [relax.Var("rows", TensorType((tokens, FACTS), "int32"))]
    few = isinstance(tokens, int)
    if not few:
        num_tiles, num_wanted = (tirx.Var(n, "int64") for n in ("tiles", "wanted_rows"))
        arguments.append(relax.Var("tiles", TensorType((num_tiles, 2), "int32")))
        arguments.append(relax.Var("wanted", TensorType((num_wanted,), "int32")))
    table_pages = tirx.Var("table_pages", "int64")
    variables = {t: relax.Var(t, TensorType((table_pages,), "int32")) for t in TABLES}
    caches, weights = tensors
    pages = [tirx.Var(f"{kind}_pages", "int64") for kind in ("full", "window")]
    for i, cache in enumerate(caches):
        shape = (pages[config.sliding[i // 2]], *cache.shape)
        variables[cache.name] = relax.Var(cache.name, TensorType(shape, cache.dtype))
    variables |= {w.name: relax.Var(w.name, TensorType(w.shape, w.dtype)) for w in weights}
    attributes: dict[str, object] = {"num_input": len(arguments)}
    if not few:
        most = {"tokens": chunk, "tiles": chunk, "wanted_rows": most_wanted(chunk)}
        attributes["tir_var_upper_bound"] = most
    parameters = [*arguments, *variables.values()]
    with builder.function(name, parameters, attrs=attributes, pure=False):
        layers = _Layers(builder, config, profile, variables, arguments, tokens)
        x = layers.embed()
        for i in range(config.num_layers):
            x = layers.attention(i, x)
            x = layers.experts(i, x)
        if not few:
            x = layers.take_rows(x, arguments[2])
        builder.emit_func_output(layers.head(x))


def most_wanted(chunk: int) -> int:
    """Rows of a step whose logits are wanted, at most."""
    return min(chunk, MOST_WANTED)


class _Layers:
    """Emits the parts of one function, for `tokens` tokens."""

    def __init__(
        self,
        builder: BlockBuilder,
        config: ModelConfig,
        profile: str,
        variables: dict[str, relax.Var],
        inputs: list[relax.Var],
        tokens: Index,
    ) -> None:
        self.builder, self.config, self.variables = builder, config, variables
        self.quantized = profile == "fast"
        self.expert_activation = "q8" if self.quantized else "digits"
        self.rows, self.tiles = inputs[0], inputs[1:2]  # a kernel for few rows needs no tiles
        self.tokens = tokens

    @property
    def kernel_tokens(self) -> Index:
        """Of kernels that read weights, keys and values: one, few, or any number."""
        if not isinstance(self.tokens, int):
            return TOKENS
        return self.tokens if self.tokens == 1 else FEW_TOKENS

    @property
    def row_tokens(self) -> Index:
        """Of kernels that go row by row: for one there are some of its own, for few none."""
        return self.tokens if isinstance(self.tokens, int) and self.tokens == 1 else TOKENS

    def embed(self) -> relax.Var:
        kernel = rows.embed_q8 if self.quantized else rows.embed_bf16
        size = (self.row_tokens, self.config.vocab_size, self.config.hidden_size)
        return self._call(
            kernel(*size), [self.rows, *self._dense_weights("embed")], [self._hidden()]
        )

    def attention(self, i: int, x: relax.Var) -> relax.Var:
        """x + attention(norm(x)) of layer i, whose caches are extended."""
        config, layer, tokens = self.config, f"layers.{i}", self.row_tokens
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        keys, values = self.variables[f"{layer}.keys"], self.variables[f"{layer}.values"]
        rope = self.variables["rope"]
        tables = self.variables[TABLES[config.sliding[i]]]
        context, dtype = int(rope.ty.shape[0]), str(values.ty.dtype)

        qkv = self._dense(f"{layer}.qkv", self._dense_activation(f"{layer}.attn_norm", x))
        queries = self._call(
            rows.rotate_queries(tokens, heads, kv_heads, dim, context),
            [qkv, rope, self.rows],
            [TensorType((self.tokens, heads, dim), "float32")],
        )
        append = kv_cache.append_kv(tokens, heads, kv_heads, dim, context, dtype)
        caches = self.builder.emit(
            relax.op.call_tir_inplace(
                self.builder.add_func(append, "append_kv"),
                [keys, values, qkv, rope, self.rows, tables],
                [0, 1],
                [keys.ty, values.ty],
            )
        )
        keys, values = (self.builder.emit(relax.TupleGetItem(caches, j)) for j in (0, 1))
        window = config.window if config.sliding[i] else None
        mixed = self._call(
            attention.attention(self.kernel_tokens, heads, kv_heads, dim, window, dtype),
            [
                queries,
                keys,
                values,
                self.variables[f"{layer}.sinks"],
                self.rows,
                tables,
                *self.tiles,
            ],
            [TensorType((self.tokens, config.q_size), "float32")],
        )
        activation = [mixed]
        if self.quantized:
            activation = self._call_many(
                quantize.quantize("q8", tokens, config.q_size),
                [mixed],
                self._quantized_types("q8", self.tokens, config.q_size),
            )
        return self._dense(f"{layer}.out", activation, residual=x)

    def experts(self, i: int, x: relax.Var) -> relax.Var:
        """x + the experts of norm(x) in layer i."""
        config, layer, tokens = self.config, f"layers.{i}", self.row_tokens
        hidden, inner = config.hidden_size, config.intermediate_size
        num_experts, top_k = config.num_experts, config.num_experts_per_token
        choices = (self.tokens, top_k)
        num_rows = self.tokens * top_k
        # Within the experts' kernels the number of rows is a symbol of its own.
        few = num_rows if self.tokens == 1 else FEW_EXPERT_ROWS
        symbol = few if isinstance(num_rows, int) else EXPERT_ROWS
        row_symbol = num_rows if isinstance(tokens, int) else EXPERT_ROWS

        normed, *activation = self._norm(f"{layer}.mlp_norm", x, self.expert_activation)
        _, _, ids, weights = self._call_many(
            matmul.route_bf16(self.kernel_tokens, hidden, num_experts, top_k),
            [normed, *(self.variables[f"{layer}.router.{part}"] for part in ("weight", "bias"))],
            [
                TensorType((self.tokens, num_experts), "float32"),
                TensorType((self.tokens, num_experts), "int32"),
                TensorType(choices, "int32"),
                TensorType(choices, "float32"),
            ],
        )
        row_expert, row_token, slots = self._call_many(
            experts.sort_by_expert(tokens, num_experts, top_k),
            [ids],
            [
                TensorType((num_rows,), "int32"),
                TensorType((num_rows,), "int32"),
                TensorType(choices, "int32"),
            ],
        )
        kind, limit = self.expert_activation, config.swiglu_limit
        gathered = self._call_many(
            rows.gather_rows(kind, tokens, hidden, row_symbol),
            [*activation, row_token],
            self._quantized_types(kind, num_rows, hidden),
        )
        _, *act = self._call_many(
            matmul.moe_mxfp4_swiglu(kind, symbol, num_experts, hidden, inner, limit),
            [*gathered, *self._expert_weights(f"{layer}.gate_up"), row_expert],
            [
                TensorType((num_rows, inner), "float32"),
                *self._quantized_types(kind, num_rows, inner),
            ],
        )
        _, out = self._call_many(
            matmul.moe_mxfp4_sum(
                kind, self.kernel_tokens, symbol, num_experts, inner, hidden, top_k
            ),
            [*act, *self._expert_weights(f"{layer}.down"), row_expert, slots, weights, x],
            [TensorType((num_rows, hidden), "float32"), self._hidden()],
        )
        return out

    def take_rows(self, x: relax.Var, wanted: relax.Var) -> relax.Var:
        """The wanted rows; what follows sees them alone."""
        kernel = rows.take_rows(TOKENS, WANTED, self.config.hidden_size)
        self.tokens = wanted.ty.shape[0]
        return self._call(kernel, [x, wanted], [self._hidden()])

    def head(self, x: relax.Var) -> relax.Var:
        return self._dense("lm_head", self._dense_activation("norm", x))

    def _norm(self, name: str, x: relax.Var, kind: str | None) -> list[relax.Var]:
        """The normed x, float32, and if there is a `kind`, what `quantized` makes of it."""
        size, weight = self.config.hidden_size, self.variables[f"{name}.weight"]
        shape = (self.row_tokens, size, self.config.norm_eps)
        if kind is None:
            return [self._call(rows.rms_norm(*shape), [x, weight], [self._hidden()])]
        types = [self._hidden(), *self._quantized_types(kind, self.tokens, size)]
        return self._call_many(rows.rms_norm_quantized(kind, *shape), [x, weight], types)

    def _dense_activation(self, name: str, x: relax.Var) -> list[relax.Var]:
        """The normed x as the profile's dense layers take it."""
        return self._norm(name, x, "q8")[1:] if self.quantized else self._norm(name, x, None)

    def _quantized_types(self, kind: str, num_rows: Index, inputs: int) -> list[TensorType]:
        shape = (num_rows, inputs // BLOCK)
        digits = (DIGITS,) if kind == "digits" else ()
        return [
            TensorType((*shape, *digits, BLOCK), "int8"),
            TensorType(shape, "float32"),
            TensorType(shape, "int32"),
        ]

    def _dense(
        self, name: str, activation: list[relax.Var], residual: relax.Var | None = None
    ) -> relax.Var:
        weights = self._dense_weights(name)
        num_rows = int(weights[0].ty.shape[0])
        bias = self.variables.get(f"{name}.bias")
        kernel = (matmul.dense_q8 if self.quantized else matmul.dense_bf16)(
            self.kernel_tokens,
            _inputs(activation),
            num_rows,
            bias is not None,
            residual is not None,
        )
        extra = [tensor for tensor in (bias, residual) if tensor is not None]
        out = TensorType((self.tokens, num_rows), "float32")
        return self._call(kernel, [*activation, *weights, *extra], [out])

    def _expert_weights(self, name: str) -> list[relax.Var]:
        return [self.variables[f"{name}.{part}"] for part in ("words", "scales", "bias")]

    def _dense_weights(self, name: str) -> list[relax.Var]:
        parts = ("words", "scales") if self.quantized else ("weight",)
        return [self.variables[f"{name}.{part}"] for part in parts]

    def _hidden(self) -> TensorType:
        return TensorType((self.tokens, self.config.hidden_size), "float32")

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
    """Inputs of a matrix product: [rows, inputs] float32, or [rows, blocks, 32] int8."""
    shape = [int(e) for e in list(activation[0].ty.shape)[1:]]
    return shape[0] if len(shape) == 1 else shape[0] * shape[1]
