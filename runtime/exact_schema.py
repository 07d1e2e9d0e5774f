"""What llguidance accepts of a JSON schema and takes for something else, or for too much work."""

from decimal import Decimal
from typing import Any

from .errors import InputError

# Keywords by what stands there: schemas by name, limits of numbers, values, and remarks.
SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
VALUES = ("const", "enum", "multipleOf", *LIMITS)
REMARKS = ("default", "examples")
MOST_PROPERTIES = 1000  # of an object; llguidance looks at all of those that may come next
MOST_STEP = 100_000  # of multipleOf, each remainder of which is a state


def check_exact(where: str, schema: Any) -> None:
    """Raises InputError, which `where` begins."""
    if isinstance(schema, list):
        for below in schema:
            check_exact(where, below)
    if not isinstance(schema, dict):
        return
    _check_properties(where, schema)
    _check_multiples(where, schema)
    for key, below in schema.items():
        if key in SCHEMAS_BY_NAME and isinstance(below, dict):
            check_exact(where, [*below.values()])
        elif key in VALUES:
            _check_numbers(where, below)
        elif key not in REMARKS:
            check_exact(where, below)


def _check_properties(where: str, schema: dict[str, Any]) -> None:
    least, required = schema.get("minProperties"), schema.get("required")
    num_required = len(required) if isinstance(required, list) else 0
    if isinstance(least, int | float) and least > max(1, num_required):
        # It counts a property as often as it is written, and readers once.
        raise InputError(
            f"{where}: expected minProperties of at most 1, or as many required properties, found "
            f"{least}; name those that are required"
        )
    properties = schema.get("properties")
    if isinstance(properties, dict) and len(properties) > MOST_PROPERTIES:
        raise InputError(
            f"{where}: expected at most {MOST_PROPERTIES} properties, found {len(properties)}"
        )


def _check_multiples(where: str, schema: dict[str, Any]) -> None:
    step = schema.get("multipleOf")
    if not isinstance(step, int | float) or not _is_exact(step):
        return
    if step > MOST_STEP or (not _is_whole(step) and len(_digits(step)) > 3):
        raise InputError(
            f"{where}: expected multipleOf up to {MOST_STEP}, or a fraction of at most 3 digits, "
            f"found {step}"
        )
    limits = {key: schema[key] for key in LIMITS if key in schema}
    if not _is_whole(step) and not all(map(_is_whole, limits.values())):
        # It finds no number within such limits.
        raise InputError(
            f"{where}: expected whole numbers as limits beside multipleOf {step}, found {limits}"
        )


def _check_numbers(where: str, value: Any) -> None:
    """llguidance reads numbers as floating point, and would write others."""
    if isinstance(value, dict | list):
        for below in value.values() if isinstance(value, dict) else value:
            _check_numbers(where, below)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and not _is_exact(value):
        raise InputError(
            f"{where}: expected whole numbers up to 2**53, and others of at most 15 digits, of "
            f"which none is beyond the 22nd after the point, found {value!r:.100}"
        )


def _is_exact(number: int | float) -> bool:
    """Whether it is read and written without being rounded."""
    if isinstance(number, int):
        return abs(number) <= 1 << 53
    last = Decimal(repr(number)).normalize().as_tuple().exponent
    return abs(number) <= 1 << 53 and len(_digits(number)) <= 15 and int(last) >= -22


def _is_whole(value: object) -> bool:
    return not isinstance(value, float) or value.is_integer()


def _digits(number: float) -> tuple[int, ...]:
    return Decimal(repr(number)).normalize().as_tuple().digits
