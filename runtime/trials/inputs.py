"""Make the arguments of a measured kernel: random, and the same on every machine."""

import math
from collections.abc import Sequence

import numpy as np

from ..devices.tvm_cpu import aligned_copy, aligned_empty
from .files import Argument, Plan

COLD_BYTES = 512 << 20  # read between two calls with the same weights: more than any cache
MAX_COPIED_BYTES = 1200 << 20  # in all copies of the arguments, unless one alone is larger
MAX_TURNS = 1024
RANDOM_ELEMENTS = (1 << 20) - 3  # after which they repeat; odd, so that rows differ

Arrays = list[np.ndarray]


def timed_inputs(plan: Plan) -> list[Arrays]:
    """Make the arguments of consecutive calls, whose weights are in no cache when their turn comes.

    A model reads other weights between two calls of the same kernel. So do these calls: they read
    copies of the weights and, where a kernel picks experts, other experts. All calls share the
    arguments that a kernel writes.
    """
    turns, share = count_turns(plan.arguments)
    copies = [[make_array(a, a.shape) for a in plan.arguments]]
    _set_dependent(plan.arguments, copies[0])
    for _ in range(1, math.ceil(turns * share)):
        pairs = zip(plan.arguments, copies[0], strict=True)
        copies.append([array if a.written else aligned_copy(array) for a, array in pairs])
    calls = []
    for turn in range(turns):
        arrays = list(copies[int(turn * share)])
        for i, argument in enumerate(plan.arguments):
            if argument.fill == "experts":
                arrays[i] = _experts(argument, argument.shape, turn)
        calls.append(arrays)
    return calls


def count_turns(arguments: Sequence[Argument]) -> tuple[int, float]:
    """Return the number of calls until the first weights are read again, and the share of one copy
    that a call reads: 1, or its experts among all experts."""
    num_bytes = max(1, sum(a.num_bytes(a.shape) for a in arguments if not a.written))
    shares = [math.prod(a.shape) / a.high for a in arguments if a.fill == "experts"]
    share = min([1.0, *shares])
    wanted = math.ceil(COLD_BYTES / (num_bytes * share))
    copies = max(1, MAX_COPIED_BYTES // num_bytes)
    return min(wanted, int(copies / share), MAX_TURNS), share


def moved_bytes(arguments: Sequence[Argument]) -> int | None:
    """Count the bytes that a timed call reads and writes, with only its own experts' weights; None
    where indices decide that."""
    if any(a.fill in ("indices", "permutation", "rows") for a in arguments):
        return None
    _, share = count_turns(arguments)
    num_experts = next((a.high for a in arguments if a.fill == "experts"), None)

    def of(argument: Argument) -> float:
        of_experts = argument.shape[0] == num_experts and not argument.written
        return argument.num_bytes(argument.shape) * (share if of_experts else 1)

    return round(sum(map(of, arguments)))


def checked_inputs(
    arguments: Sequence[Argument], timed: Sequence[np.ndarray] | None = None
) -> Arrays:
    """Make the arguments of the comparison. From `timed`, those of a timed call, it takes weights,
    which have the same shape, instead of making them again."""
    arrays = []
    for i, argument in enumerate(arguments):
        if argument.fill == "experts":
            array = _experts(argument, argument.check_shape, 0, repeated=True)
        elif timed is None or argument.written or argument.check_shape != argument.shape:
            array = make_array(argument, argument.check_shape)
        else:
            array = timed[i]
        arrays.append(array)
    _set_dependent(arguments, arrays)
    return arrays


def _set_dependent(arguments: Sequence[Argument], arrays: Arrays) -> None:
    """Set what depends on other arguments.

    Offsets are `high` x the sum of each row's and block's whole numbers in the int8 argument.
    Numbers have one digit, or their digits to the base `low` on its last axis but one. Tiles are
    the (first row, number of rows) of `low` rows each; the last ends with the rows.
    """
    by_fill = {a.fill: array for a, array in zip(arguments, arrays, strict=True)}
    for argument, array in zip(arguments, arrays, strict=True):
        if argument.fill == "offsets":
            numbers = whole_numbers(next(a for a in arrays if a.dtype == np.int8), argument.low)
            array[...] = argument.high * numbers.sum(axis=-1)
        elif argument.fill == "tiles":
            array[:, 0] = np.arange(len(array)) * argument.low
            array[:, 1] = np.minimum(argument.low, len(by_fill["rows"]) - array[:, 0])


def whole_numbers(array: np.ndarray, base: int) -> np.ndarray:
    """Return int8 [rows, blocks, 32], or digits [rows, blocks, digits, 32], as int32 numbers."""
    numbers = array.astype(np.int32)
    if numbers.ndim == 4:
        places = base ** np.arange(numbers.shape[-2])[::-1, None]
        numbers = np.sum(numbers * places, axis=-2)
    return numbers


def make_array(argument: Argument, shape: tuple[int, ...]) -> np.ndarray:
    """Make an aligned array with an argument's fill; outputs hold what no kernel may leave."""
    array = aligned_empty(shape, np.dtype(argument.dtype))
    if argument.fill == "output":
        array.fill(np.nan if array.dtype.kind == "f" else np.iinfo(array.dtype).min)
        return array
    if argument.fill == "zeros":
        array.fill(0)
        return array
    if argument.fill in ("offsets", "tiles"):
        return array  # for `_set_dependent`, which knows the others
    if argument.fill == "rows":  # consecutive tokens of a sequence: which, where, and its table
        array[:, 0] = np.random.default_rng(0).integers(argument.high, size=len(array))
        array[:, 1] = argument.low + np.arange(len(array))
        array[:, 2] = 0
        return array
    if argument.fill == "permutation":
        array[...] = np.random.default_rng(0).permutation(array.size).reshape(shape)
        return array
    if argument.fill == "experts":
        return _experts(argument, shape, 0)
    seed = list(argument.name.encode())
    flat, random = array.reshape(-1), _random(argument, min(array.size, RANDOM_ELEMENTS), seed)
    for start in range(0, flat.size, random.size):
        flat[start : start + random.size] = random[: flat.size - start]
    return array


def _random(argument: Argument, count: int, seed: list[int]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    dtype = np.dtype(argument.dtype)
    if argument.fill == "bits":
        return rng.integers(0, 256, (count, dtype.itemsize), dtype=np.uint8).view(dtype)[:, 0]
    if argument.fill in ("indices", "integers"):
        return rng.integers(argument.low, argument.high, count).astype(dtype)
    normal = rng.standard_normal(count, dtype=np.float32) * np.float32(2.0**argument.low)
    if argument.fill == "bfloat16":
        return (normal.view(np.uint32) >> np.uint32(16)).astype(dtype)
    return normal.astype(dtype)


def _experts(
    argument: Argument, shape: tuple[int, ...], turn: int, repeated: bool = False
) -> np.ndarray:
    """Return the experts of the rows in order. They are as many different ones as fit, or
    `repeated`, each for some neighbours; every turn takes the next ones."""
    count = math.prod(shape)
    different = min(argument.high, max(2, count // 2) if repeated else count)
    array = aligned_empty(shape, np.dtype(argument.dtype))
    experts = (turn * different + np.arange(count) * different // count) % argument.high
    array[...] = np.sort(experts).reshape(shape)
    return array
