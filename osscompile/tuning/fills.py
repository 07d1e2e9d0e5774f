"""Choose by name what the arguments of kernels hold when they are checked and measured."""

from dataclasses import dataclass
from typing import TypeAlias

from tvm import tirx

from ..importer.config import ModelConfig
from ..runtime.step import TILE_ROWS
from ..schedules.formats import DIGIT, FP4_OFFSET

Fill: TypeAlias = tuple[str, int, int]  # (one of `FILLS` in `runtime/trials/files.py`, low, high)
OUTPUT: Fill = ("output", DIGIT, 0)
# Powers of two that bring the results of products, and the scores of attention, near 1.
EXPONENTS = {"scales": -12, "xs": -5, "keys": -3}
# Whole numbers where schedules may round to float16: it has them, and the rounded weights of values
# that are near each other give what exact weights give.
WHOLE = {"queries": (-2, 3), "values": (64, 80)}
EXPONENT_OF_DIGITS = -18  # of xs where whole numbers are in digits


@dataclass(frozen=True)
class Setting:
    """The facts that a fill depends on beside its argument: the shapes of all by name, when the
    kernel is timed; the number of rows when its result is compared, where that is symbolic; the
    position of the first token; and the model's config."""

    sizes: dict[str, tuple[int, ...]]
    rows: int
    position: int
    config: ModelConfig


def fill_in_place(setting: Setting) -> Fill:
    """Return the fill of an argument that is written in place: zeros, which cost an answer nothing,
    unless the kernel attends to what is there."""
    return ("normal", 0, 0) if "sinks" in setting.sizes else ("zeros", 0, 0)


def fill_of(parameter: tirx.Buffer, setting: Setting) -> Fill:
    """Return the fill of an argument that is only read. The result depends on every argument: none
    is lost beside others, few sums are clamped, and indices name what exists."""
    name, dtype = parameter.name, str(parameter.dtype)
    if dtype == "int32":
        return _whole_numbers(name, setting)
    if dtype == "uint8":
        return "integers", 116, 122  # e8m0: 2^-11 to 2^-6
    if dtype == "int8":
        if len(setting.sizes[name]) == 4:  # digits
            return "integers", 1 - DIGIT // 2, DIGIT // 2
        return "integers", -127, 128  # -128 never occurs: our int8 is symmetric
    if dtype == "uint32":
        return "bits", 0, 0
    if dtype == "uint16":
        return "bfloat16", -5, 0  # so that the router's logits are near 1 too
    if name == "sinks":
        return "integers", 3, 10  # scores: each counts like several of a window or the context
    if name in WHOLE:
        return "integers", *WHOLE[name]
    if name == "xs" and len(setting.sizes["xq"]) == 4:
        return "normal", EXPONENT_OF_DIGITS, 0
    return "normal", EXPONENTS.get(name, 0), 0


def _whole_numbers(name: str, setting: Setting) -> Fill:
    sizes, config = setting.sizes, setting.config

    def row_of(other: str) -> int:
        """Return a number of rows that also exist when the result is compared."""
        return min(setting.rows, sizes[other][0])

    match name:
        case "rows":
            return "rows", setting.position, config.vocab_size
        case "tiles":
            return "tiles", TILE_ROWS, 0
        case "tables":
            return "permutation", 0, sizes["tables"][0]
        case "wanted":
            return "indices", 0, row_of("x")
        case "row_token":
            return "indices", 0, row_of("xq" if "xq" in sizes else "xb")
        case "slots":
            return "integers", 0, row_of("row_expert")
        case "row_expert":
            return "experts", 0, config.num_experts
        case "xoffset":
            return "offsets", DIGIT, FP4_OFFSET
        case "options" | "amounts":
            return "integers", 0x3F000000, 0x3F800000  # bits of 0.5 to 1: 1 / temperature
        case "mask_rows":
            return "indices", 0, sizes["masks"][0]
        case "places":
            return "permutation", 0, sizes["places"][0]
        case "state":
            return "integers", 0, 1  # no digit is known
        case "scores":
            return "integers", -4, 4  # many are equal
        case "ids" if "logits" in sizes:  # in `choice`: small, because they come out beside a logit
            return "indices", 1, 4
        case "ids" if "scores" in sizes:  # in `narrow`
            return "integers", 0, config.vocab_size
        case "ids":  # in `sort_by_expert`
            return "integers", 0, config.num_experts
    raise AssertionError(f"{name}: say here which int32 values it may hold")
