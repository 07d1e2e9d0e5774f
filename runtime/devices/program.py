"""A program: what a function of an artifact launches, in order, and on which memory.

This file defines the format, JSON (`osscompile/codegen/programs.py` writes it), and checks all of
it when it is read. Sizes that depend on a call are expressions: a whole number, a symbol, which
stands for an extent of an input, or (operator, expression, expression).
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np

from ..artifact import Artifact
from ..chooser import MOST_CHANGES, OPTIONS, REPORTED
from ..errors import ArtifactError
from ..manifest import Manifest
from ..step import ANY, FEW

Expression: TypeAlias = Any  # int | symbol | (operator, Expression, Expression)
TOKENS, TILES, WANTED_ROWS, CHANGES = SYMBOLS = ("tokens", "tiles", "wanted_rows", "changes")
OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "min": min,
    "max": max,
}
# The arrays of a call; tables, caches and weights; the function's own.
MEMORY = ("input", "bound", "storage")
MAX_NUMBER = 1 << 48  # of what an expression and its parts come to
MAX_GROUPS = 1 << 31  # along an axis, and of the threads of a group
MAX_SHARED_BYTES = 1 << 20
SCALARS = {"int32": 1 << 31, "int64": MAX_NUMBER}  # and the end of what they hold
NUM_TABLES = 2
MAX_DEPTH = 8  # of an expression
ITEM_BYTES = 4  # of an input's int32 and the result's float32


@dataclass(frozen=True)
class Launch:
    """A kernel over groups x threads, along one to three axes; without groups nothing is launched.

    `arguments`, in the kernel's order: (one of MEMORY, number of it), or (dtype, expression).
    """

    kernel: str
    arguments: tuple[tuple[str, Expression], ...]
    groups: tuple[Expression, ...]
    threads: tuple[int, ...]  # of a work-group
    shared_bytes: int = 0  # of memory that a work-group has beside what its kernel declares
    dependent: bool = False  # it may begin early, and waits itself for the launch before


@dataclass(frozen=True)
class Launches:
    """What is launched one after the other, and the memory that it needs beside what it is bound
    to."""

    storages: tuple[int, ...]  # bytes
    launches: tuple[Launch, ...]


@dataclass(frozen=True)
class Input:
    """Whole numbers, int32, that come with every call. A symbol in the shape stands for what the
    call has there."""

    name: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Program(Launches):
    """A function: its result is float32."""

    symbols: dict[str, int]  # the most that each stands for; the least is 1
    inputs: tuple[Input, ...]
    result: int  # the storage that holds it
    result_shape: tuple[Expression, ...]

    def bind(self, inputs: Sequence[np.ndarray]) -> dict[str, int]:
        """What the symbols stand for in a call with these inputs."""
        pairs = zip(self.inputs, inputs, strict=True)
        extents = ((e, n) for i, array in pairs for e, n in zip(i.shape, array.shape, strict=True))
        values = {extent: size for extent, size in extents if isinstance(extent, str)}
        assert all(values[symbol] <= most for symbol, most in self.symbols.items()), values
        return values


@dataclass(frozen=True)
class OfLogits:
    """A function that takes the logits of a step on, see `chooser.py`: its inputs, to how many
    arrays it is bound, and the shape of its result; rows None: the most that a step has."""

    inputs: tuple[Input, ...]
    num_bound: int
    rows: str | None
    columns: int


_OPTIONS, _MASK_ROWS = Input("options", (WANTED_ROWS, OPTIONS)), Input("mask_rows", (WANTED_ROWS,))
OF_LOGITS = {
    "choose": OfLogits((_OPTIONS, _MASK_ROWS), 3, WANTED_ROWS, 2),
    "limit": OfLogits((_OPTIONS, _MASK_ROWS), 3, None, 2),
    "report": OfLogits((_MASK_ROWS,), 2, WANTED_ROWS, 2 + 2 * REPORTED),
    "change": OfLogits((Input("places", (CHANGES,)), Input("amounts", (CHANGES,))), 1, CHANGES, 1),
}
# The inputs of each function, see `step.py`.
INPUTS = {
    ANY: (
        Input("rows", (TOKENS, 3)),
        Input("tiles", (TILES, 2)),
        Input("wanted", (WANTED_ROWS,)),
    ),
    **{name: (Input("rows", (count, 3)),) for count, name in FEW.items()},
    **{name: function.inputs for name, function in OF_LOGITS.items()},
}


def evaluate(expression: Expression, values: Mapping[str, int]) -> int:
    """The value of an expression that was checked."""
    if isinstance(expression, int):
        return expression
    if isinstance(expression, str):
        return values[expression]
    operator, a, b = expression
    return OPERATORS[operator](evaluate(a, values), evaluate(b, values))


def write_programs(programs: dict[str, Program]) -> str:
    """JSON of the programs by function."""
    functions = {name: asdict(program) for name, program in sorted(programs.items())}
    return json.dumps(functions, separators=(",", ":")) + "\n"


def read_programs(artifact: Artifact) -> dict[str, Program]:
    """The program of every function; ArtifactError if they cannot be programs of this artifact."""
    file, manifest = artifact.programs, artifact.manifest
    try:
        functions = json.loads(artifact.contents[file.name].decode())
        return {name: _program(name, functions[name], manifest) for name in INPUTS}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"{file}: expected programs, found a problem with {error}; the artifact is damaged: "
            "copy it again, or compile the model again"
        ) from error


def parse_launches(
    name: str,
    fields: dict[str, Any],
    num_bound: int,
    inputs: int = 0,
    symbols: Mapping[str, int] | None = None,
) -> Launches:
    """Launches out of JSON; ValueError, KeyError or TypeError for what can be none. `num_bound`:
    arrays that the launches are bound to; `inputs`: those that come with every call; `symbols`: the
    most that each stands for."""
    sizes = [_number(size, 1, f"{name}, a storage's size") for size in fields["storages"]]
    counts = {"input": inputs, "bound": num_bound, "storage": len(sizes)}
    launches = tuple(_launch(launch, counts, symbols or {}) for launch in fields["launches"])
    return Launches(tuple(sizes), launches)


def _program(name: str, fields: dict[str, Any], manifest: Manifest) -> Program:
    most = (manifest.chunk, manifest.chunk, manifest.most_wanted, MOST_CHANGES)
    extents = {extent for i in INPUTS[name] for extent in i.shape}
    symbols = {s: n for s, n in zip(SYMBOLS, most, strict=True) if s in extents}
    inputs = tuple(Input(i["name"], tuple(i["shape"])) for i in fields["inputs"])
    if (fields["symbols"], inputs) != (symbols, INPUTS[name]):
        raise ValueError(
            f"{name}: expected the inputs {INPUTS[name]} with {symbols} at most, found {inputs} "
            f"with {fields['symbols']}"
        )
    rows: int | str = WANTED_ROWS if name == ANY else INPUTS[name][0].shape[0]
    num_bound = NUM_TABLES + len(manifest.caches) + len(manifest.weights)
    columns = manifest.vocab_size
    if name in OF_LOGITS:
        function = OF_LOGITS[name]
        num_bound, columns = function.num_bound, function.columns
        rows = manifest.most_wanted if function.rows is None else function.rows
    parsed = parse_launches(name, fields, num_bound, len(inputs), symbols)
    sizes, shape = parsed.storages, tuple(fields["result_shape"])
    result = _number(fields["result"], 0, f"{name}, the result's storage", len(sizes))
    needed = evaluate(rows, symbols) * columns * ITEM_BYTES
    if shape != (rows, columns) or needed > sizes[result]:
        raise ValueError(f"{name}: a result of shape {shape} in {sizes[result]} bytes")
    return Program(sizes, parsed.launches, symbols, INPUTS[name], result, (rows, columns))


def _launch(fields: dict[str, Any], counts: dict[str, int], symbols: Mapping[str, int]) -> Launch:
    kernel = fields["kernel"]
    if not (isinstance(kernel, str) and re.fullmatch(r"[A-Za-z_]\w*", kernel, re.ASCII)):
        raise ValueError(f"{kernel!r} as the name of a kernel")
    threads = tuple(_number(n, 1, f"{kernel}, threads of a group") for n in fields["threads"])
    _number(math.prod(threads), 1, f"{kernel}, threads of a group", MAX_GROUPS)
    groups = tuple(
        _expression(count, symbols, 0, f"{kernel}, groups", MAX_GROUPS)
        for count in fields["groups"]
    )
    if not 1 <= len(threads) == len(groups) <= 3:
        raise ValueError(f"{kernel}: groups along {len(groups)} axes, threads along {len(threads)}")
    arguments: list[tuple[str, Expression]] = []
    for kind, value in fields["arguments"]:
        if kind in MEMORY:
            arguments.append((kind, _number(value, 0, f"{kernel}, the {kind}", counts[kind])))
        elif kind in SCALARS:
            end = SCALARS[kind]
            number = _expression(value, symbols, 1 - end, f"{kernel}, the {kind}", end)
            arguments.append((kind, number))
        else:
            raise ValueError(f"{kernel}, an argument of kind {kind!r}")
    shared_bytes = _number(fields["shared_bytes"], 0, f"{kernel}, shared memory", MAX_SHARED_BYTES)
    dependent = fields["dependent"]
    if not isinstance(dependent, bool):
        raise ValueError(f"{kernel}: {dependent!r} as whether it is dependent")
    return Launch(kernel, tuple(arguments), groups, threads, shared_bytes, dependent)


def _number(value: Any, low: int, what: str, end: int = MAX_NUMBER) -> int:
    """A whole number from `low` to below `end`."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value < end:
        raise ValueError(f"{what}: expected a number from {low} to {end - 1}, found {value!r}")
    return value


def _expression(
    value: Any, symbols: Mapping[str, int], low: int, what: str, end: int
) -> Expression:
    """An expression that gives a number from `low` to below `end`, whatever the symbols stand
    for."""
    expression = _parse_expression(value, symbols)
    for bound in bounds(expression, symbols):
        _number(bound, low, f"{what}, {expression} of up to {dict(symbols)}", end)
    return expression


def _parse_expression(value: Any, symbols: Mapping[str, int], depth: int = 0) -> Expression:
    if isinstance(value, str) and value in symbols:
        return value
    if not isinstance(value, list):
        return _number(value, -MAX_NUMBER, "an expression")
    if depth == MAX_DEPTH:
        raise ValueError("an expression that is too deep")
    operator, a, b = value
    if operator not in OPERATORS:
        raise ValueError(f"{operator!r} as the operator of an expression")
    parsed = operator, *(_parse_expression(part, symbols, depth + 1) for part in (a, b))
    if operator == "//":
        _number(bounds(parsed[2], symbols)[0], 1, "a divisor")
    return parsed


def bounds(expression: Expression, symbols: Mapping[str, int]) -> tuple[int, int]:
    """What an expression is at least and at most, or less and more: every operator has its extremes
    at the ends of its arguments."""
    if isinstance(expression, int):
        return expression, expression
    if isinstance(expression, str):
        return 1, symbols[expression]
    operator, a, b = expression
    pairs = ((x, y) for x in bounds(a, symbols) for y in bounds(b, symbols))
    ends = [OPERATORS[operator](x, y) for x, y in pairs]
    for end in ends:
        _number(end, 1 - MAX_NUMBER, f"{expression} of up to {dict(symbols)}")
    return min(ends), max(ends)
