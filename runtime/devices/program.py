"""A program: what a function of an artifact launches, in order, and on which memory.

This file defines the format, JSON (`osscompile/codegen/programs.py` writes it), and checks all of
it when it is read. Sizes that depend on the number of tokens are expressions: a whole number,
"tokens", or [operator, expression, expression].
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from ..artifact import Artifact
from ..errors import ArtifactError
from ..manifest import Manifest

Expression: TypeAlias = Any  # int | "tokens" | [operator, Expression, Expression]
TOKENS = "tokens"
OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "min": min,
    "max": max,
}
MEMORY = (
    "input",
    "bound",
    "storage",
)  # of a call; caches and weights; the function's own
MAX_NUMBER = 1 << 48  # of what an expression and its parts come to
MAX_GROUPS = 1 << 31  # along an axis, and of the threads of a group
SCALARS = {"int32": 1 << 31, "int64": MAX_NUMBER}  # and the end of what they hold
# How many numbers each input of a function has, see `importer/graph.py`; `choose` takes the result
# of the others on.
INPUTS = {"prefill": (TOKENS, 1, 1), "decode": (1, 1), "score": (TOKENS, 1), "choose": (3,)}
MAX_DEPTH = 8  # of an expression
ITEM_BYTES = 4  # of an input's int32 and the result's float32


@dataclass(frozen=True)
class Launch:
    """A kernel over groups x threads, along one to three axes.

    `arguments`, in the kernel's order: (one of MEMORY, number of it), or (dtype, expression).
    """

    kernel: str
    arguments: tuple[tuple[str, Expression], ...]
    groups: tuple[Expression, ...]
    threads: tuple[int, ...]  # of a work-group


@dataclass(frozen=True)
class Launches:
    """What is launched one after the other, and the memory that it needs beside what it is bound
    to."""

    storages: tuple[int, ...]  # bytes
    launches: tuple[Launch, ...]


@dataclass(frozen=True)
class Program(Launches):
    """Inputs are int32 and come with every call, the first has one for each token, where a call can
    have several; the result is float32."""

    max_tokens: int  # of a call
    inputs: tuple[Expression, ...]  # how many numbers each has
    result: int  # the storage that holds it
    result_shape: tuple[Expression, ...]


def evaluate(expression: Expression, tokens: int) -> int:
    """The value of an expression that was checked."""
    if isinstance(expression, int):
        return expression
    if expression == TOKENS:
        return tokens
    operator, a, b = expression
    return OPERATORS[operator](evaluate(a, tokens), evaluate(b, tokens))


def write_programs(programs: dict[str, Program]) -> str:
    """JSON of the programs by function."""
    functions = {name: asdict(program) for name, program in sorted(programs.items())}
    return json.dumps(functions, separators=(",", ":")) + "\n"


def read_programs(artifact: Artifact) -> dict[str, Program]:
    """The program of every function; ArtifactError if they cannot be programs of this artifact."""
    file, manifest = artifact.programs, artifact.manifest
    try:
        functions = json.loads(file.read_text(encoding="utf-8"))
        return {name: _program(name, functions[name], manifest) for name in INPUTS}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"{file}: expected programs, found a problem with {error}; the artifact is damaged: "
            "copy it again, or compile the model again"
        ) from error


def parse_launches(
    name: str, fields: dict[str, Any], num_bound: int, inputs: int = 0, most: int = 1
) -> Launches:
    """Of JSON; ValueError, KeyError or TypeError for what can be none. `num_bound`: arrays that the
    launches are bound to; `inputs`: those that come with every call; `most`: tokens of a call."""
    sizes = [_number(size, 1, f"{name}, a storage's size") for size in fields["storages"]]
    counts = {"input": inputs, "bound": num_bound, "storage": len(sizes)}
    launches = tuple(_launch(launch, counts, most) for launch in fields["launches"])
    return Launches(tuple(sizes), launches)


def _program(name: str, fields: dict[str, Any], manifest: Manifest) -> Program:
    num_bound = 2 if name == "choose" else len(manifest.caches) + len(manifest.weights)
    most = {"prefill": manifest.chunk, "score": manifest.score_chunk}.get(name, 1)
    parsed = parse_launches(name, fields, num_bound, len(INPUTS[name]), most)
    sizes = parsed.storages
    max_tokens = _number(fields["max_tokens"], 1, f"{name}, the number of tokens")
    result = _number(fields["result"], 0, f"{name}, the result's storage", len(sizes))
    inputs, shape = tuple(fields["inputs"]), tuple(fields["result_shape"])
    if (max_tokens, inputs) != (most, INPUTS[name]):
        raise ValueError(
            f"{name}: expected inputs of {INPUTS[name]} numbers and up to {most} tokens, found "
            f"{inputs} and {max_tokens}"
        )
    rows, columns = TOKENS if name == "score" else 1, 2 if name == "choose" else manifest.vocab_size
    needed = evaluate(rows, most) * columns * ITEM_BYTES
    if shape != (rows, columns) or needed > sizes[result]:
        raise ValueError(f"{name}: a result of shape {shape} in {sizes[result]} bytes")
    return Program(sizes, parsed.launches, most, INPUTS[name], result, (rows, columns))


def _launch(fields: dict[str, Any], counts: dict[str, int], most: int) -> Launch:
    kernel = fields["kernel"]
    if not (isinstance(kernel, str) and re.fullmatch(r"[A-Za-z_]\w*", kernel, re.ASCII)):
        raise ValueError(f"{kernel!r} as the name of a kernel")
    threads = tuple(_number(n, 1, f"{kernel}, threads of a group") for n in fields["threads"])
    _number(math.prod(threads), 1, f"{kernel}, threads of a group", MAX_GROUPS)
    groups = tuple(
        _expression(count, most, 1, f"{kernel}, groups", MAX_GROUPS) for count in fields["groups"]
    )
    if not 1 <= len(threads) == len(groups) <= 3:
        raise ValueError(f"{kernel}: groups along {len(groups)} axes, threads along {len(threads)}")
    arguments: list[tuple[str, Expression]] = []
    for kind, value in fields["arguments"]:
        if kind in MEMORY:
            arguments.append((kind, _number(value, 0, f"{kernel}, the {kind}", counts[kind])))
        elif kind in SCALARS:
            end = SCALARS[kind]
            number = _expression(value, most, 1 - end, f"{kernel}, the {kind}", end)
            arguments.append((kind, number))
        else:
            raise ValueError(f"{kernel}, an argument of kind {kind!r}")
    return Launch(kernel, tuple(arguments), groups, threads)


def _number(value: Any, low: int, what: str, end: int = MAX_NUMBER) -> int:
    """A whole number from `low` to below `end`."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value < end:
        raise ValueError(f"{what}: expected a number from {low} to {end - 1}, found {value!r}")
    return value


def _expression(value: Any, most: int, low: int, what: str, end: int) -> Expression:
    """An expression that gives a number from `low` to below `end` for 1 to `most` tokens."""
    expression = _parse_expression(value)
    for bound in _bounds(expression, most):
        _number(bound, low, f"{what}, {expression} of up to {most} tokens", end)
    return expression


def _parse_expression(value: Any, depth: int = 0) -> Expression:
    if value == TOKENS:
        return value
    if not isinstance(value, list):
        return _number(value, -MAX_NUMBER, "an expression")
    if depth == MAX_DEPTH:
        raise ValueError("an expression that is too deep")
    operator, a, b = value
    if operator not in OPERATORS:
        raise ValueError(f"{operator!r} as the operator of an expression")
    if operator == "//":
        _number(b, 1, "a divisor")
    return [operator, _parse_expression(a, depth + 1), _parse_expression(b, depth + 1)]


def _bounds(expression: Expression, most: int) -> tuple[int, int]:
    """What an expression is at least and at most for 1 to `most` tokens, or less and more: every
    operator has its extremes at the ends of its arguments."""
    if isinstance(expression, int):
        return expression, expression
    if expression == TOKENS:
        return 1, most
    operator, a, b = expression
    ends = [OPERATORS[operator](x, y) for x in _bounds(a, most) for y in _bounds(b, most)]
    for end in ends:
        _number(end, 1 - MAX_NUMBER, f"{expression} of up to {most} tokens")
    return min(ends), max(ends)
