"""Turn the graph's functions into programs, after memory is planned and kernels are split.

A function is a straight line: storages, tensors at their beginning, calls of kernels. Every launch
of a called kernel becomes a launch of the program, with the kernel's symbols in terms of the call's
number of tokens.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tvm import ir, relax, tirx
from tvm.ir import Expr
from tvm.sym import Analyzer
from tvm.tirx import PrimFunc
from tvm_ffi import structural_map

from ..runtime.devices.program import (
    ITEM_BYTES,
    SYMBOLS,
    Expression,
    Input,
    Launch,
    Launches,
    Program,
    evaluate,
)
from .dependence import mark_dependent

INPUT_DTYPE = "int32"
_OPERATORS = {
    tirx.Add: "+",
    tirx.Sub: "-",
    tirx.Mul: "*",
    tirx.FloorDiv: "//",
    tirx.Min: "min",
    tirx.Max: "max",
}
_TAGS = [f"{index}.{axis}" for index in ("blockIdx", "threadIdx") for axis in "xyz"]
_SHARED = "tirx.use_dyn_shared_memory"  # the tag of the bytes that a launch adds

Place = tuple[str, int]  # a memory, as in an argument of `Launch`


def build_programs(module: ir.IRModule) -> dict[str, Program]:
    """Return the program of every function of a module from `split_launches`."""
    return {
        name.name_hint: _Extraction(module, function).program()
        for name, function in sorted(module.functions_items(), key=lambda item: item[0].name_hint)
        if isinstance(function, relax.Function)
    }


class _Extraction:
    """Goes through one function, and notes where its variables are."""

    def __init__(self, module: ir.IRModule, function: relax.Function) -> None:
        self.module, self.function = module, function
        bounds = function.attrs.get("tir_var_upper_bound") or {}
        self.symbols = {str(symbol): int(most) for symbol, most in bounds.items()}
        num_inputs = int(function.attrs["num_input"])
        self.inputs, bound = function.params[:num_inputs], function.params[num_inputs:]
        assert {str(p.ty.dtype) for p in self.inputs} == {INPUT_DTYPE}
        self.places: dict[relax.Var, Any] = {p: ("input", i) for i, p in enumerate(self.inputs)}
        self.places |= {p: ("bound", i) for i, p in enumerate(bound)}
        self.storages: list[int] = []
        self.launches: list[Launch] = []

    def program(self) -> Program:
        for block in self.function.body.blocks:
            for binding in block.bindings:
                self.places[binding.var] = self._value(binding.value)
        result = self.function.body.body
        kind, number = self.places[result]
        assert kind == "storage" and str(result.ty.dtype) == "float32", result
        return Program(
            symbols=self.symbols,
            inputs=tuple(Input(p.name, tuple(map(_expression, p.ty.shape))) for p in self.inputs),
            storages=tuple(self.storages),
            launches=tuple(mark_dependent(self.launches, self.module, self.symbols)),
            result=number,
            result_shape=tuple(_expression(extent) for extent in result.ty.shape),
        )

    def _value(self, value: Expr) -> Any:
        """Return where a value is: a place, several for a tuple, None for a kernel's call."""
        if isinstance(value, relax.Var):
            return self.places[value]
        if isinstance(value, relax.Tuple):
            return [self.places[variable] for variable in value.fields]
        if isinstance(value, relax.TupleGetItem):
            return self.places[value.tuple_value][value.index]
        if isinstance(value.op, ir.GlobalVar):
            return self._call(self.module[value.op], value.args)
        if value.op == ir.Op.get("relax.memory.alloc_storage"):
            return self._storage(int(value.args[0].values[0]))
        if value.op == ir.Op.get("relax.memory.alloc_tensor"):
            assert int(value.args[1].value) == 0, "a tensor begins where its storage does"
            return self.places[value.args[0]]
        assert value.op == ir.Op.get("relax.builtin.alloc_tensor"), value  # the result
        size = evaluate(_product(value.args[0].values), self.symbols)
        return self._storage(size * ITEM_BYTES)

    def _storage(self, num_bytes: int) -> Place:
        self.storages.append(num_bytes)
        return "storage", len(self.storages) - 1

    def _call(self, kernel: PrimFunc, arguments: Sequence[relax.Var]) -> None:
        symbols: dict[tirx.Var, Expr] = {}
        for parameter, argument in zip(kernel.params, arguments, strict=True):
            for extent, actual in zip(parameter.shape, argument.ty.shape, strict=True):
                if isinstance(extent, tirx.Var):
                    symbols[extent] = actual
        places = [self.places[argument] for argument in arguments]
        self.launches += launches_of(kernel, places, symbols, self._storage, self.symbols)


def kernel_launches(module: ir.IRModule, name: str, shapes: Sequence[Sequence[int]]) -> Launches:
    """Return the launches of one kernel of a module from `split_launches`, for arguments of these
    shapes."""
    kernel = module[name]
    symbols = {
        extent: tirx.const(size, "int64")
        for parameter, shape in zip(kernel.params, shapes, strict=True)
        for extent, size in zip(parameter.shape, shape, strict=True)
        if isinstance(extent, tirx.Var)
    }
    storages: list[int] = []

    def new_storage(num_bytes: int) -> Place:
        storages.append(num_bytes)
        return "storage", len(storages) - 1

    places = [("bound", i) for i in range(len(shapes))]
    launches = launches_of(kernel, places, symbols, new_storage)
    return Launches(tuple(storages), tuple(mark_dependent(launches, module)))


def launches_of(
    kernel: PrimFunc,
    places: Sequence[Place],
    symbols: dict[tirx.Var, Expr],
    new_storage: Callable[[int], Place],
    most: Mapping[str, int] | None = None,
) -> list[Launch]:
    """Return the launches of a kernel from `split_launches`, for arguments in these places.

    `symbols` gives its symbolic extents, as constants or in the number of tokens. `new_storage`
    makes a place of so many bytes for what one launch leaves for the next; `most` says what the
    number of tokens may be.
    """
    place_of = dict(zip(kernel.params, places, strict=True))

    known = (tirx.Var, lambda v: symbols.get(v, v))

    def in_tokens(value: Expr) -> Expression:
        return _expression(structural_map(value, known))

    launches = []
    statements = kernel.body.seq if isinstance(kernel.body, tirx.SeqStmt) else [kernel.body]
    for statement in statements:
        if isinstance(statement, tirx.AllocBuffer):
            buffer = statement.buffer
            extents = [structural_map(e, known) for e in buffer.shape]
            size = evaluate(_product(extents), most or {})
            place_of[buffer] = new_storage(size * np.dtype(str(buffer.dtype)).itemsize)
        elif isinstance(statement, tirx.DeclBuffer):  # the same memory in another shape
            place_of[statement.buffer] = place_of[statement.data.args[0]]
        else:
            assert isinstance(statement, tirx.Evaluate), f"no launch: {statement}"
            launches.append(_launch(statement.value, place_of, in_tokens))
    return launches


def _launch(
    call: ir.Call, place_of: dict[tirx.Var, Place], in_tokens: Callable[[Expr], Expression]
) -> Launch:
    assert call.op == ir.Op.get("tirx.call_ffi_kernel"), call
    tags = [str(tag) for tag in call.attrs.launch_params]
    name, *arguments = call.args
    sizes = dict(zip(tags, map(in_tokens, arguments[-len(tags) :]), strict=True))
    shared_bytes = sizes.pop(_SHARED, 0)
    assert set(sizes) <= set(_TAGS), tags
    axes = max(_TAGS.index(tag) % 3 for tag in sizes) + 1
    return Launch(
        kernel=str(name.value),
        arguments=tuple(
            place_of[a.args[0]] if isinstance(a, ir.Call) else (str(a.ty), in_tokens(a))
            for a in arguments[: -len(tags)]
        ),
        groups=tuple(sizes.get(tag, 1) for tag in _TAGS[:axes]),
        threads=tuple(sizes.get(tag, 1) for tag in _TAGS[3 : 3 + axes]),
        shared_bytes=shared_bytes,
    )


def _expression(value: Expr) -> Expression:
    """Write a value in terms of a step's numbers, the only variables that may be left."""
    value = Analyzer().simplify(value)
    if isinstance(value, tirx.IntImm):
        return int(value.value)
    if isinstance(value, tirx.Var):
        assert value.name in SYMBOLS, value
        return str(value.name)
    return _OPERATORS[type(value)], _expression(value.a), _expression(value.b)


def _product(extents: Sequence[Expr]) -> Expression:
    return _expression(math.prod(extents, start=tirx.const(1, "int64")))
