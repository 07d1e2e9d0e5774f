"""A JSON schema in words that llguidance takes as they are meant; what it would take for something
else, or for too much work, is refused."""

import re
from decimal import ROUND_DOWN, Decimal
from typing import Any, TypeGuard

from .errors import InputError

# Keywords by what stands there: schemas by name, limits of numbers, values, and remarks.
SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
VALUES = ("const", "enum", "multipleOf", *LIMITS)
SIMPLE = ("number", "integer", "string", "boolean", "null")  # types, whose choices cost little
REMARKS = ("default", "examples")
# Control characters that JSON has no letter for, and the parts of a regular expression that ask for
# one; classes of characters have others as well.
CONTROL = r"[\x00-\x07\x0b\x0e-\x1f\x7f]"
_CODE = r"(?:0[0-7bBeEfF]|1[0-9a-fA-F]|7[fF])"
_ESCAPE = rf"\\(?:[av]|x{_CODE}|u00{_CODE}|U000000{_CODE}|[xuU]\{{0*{_CODE}\}})"
_PARTS = re.compile(rf"\[(?:\\.|[^\\\]])*\]|(?P<control>{CONTROL}|{_ESCAPE})|\\.", re.DOTALL)
MOST_OPTIONAL = 240  # properties of an object; llguidance looks at all of those that may come next
DIGITS_AT_LIMIT = 9
MOST_STEP = 100_000  # of multipleOf, each remainder of which is a state


def exact_schema(where: str, schema: Any) -> Any:
    """What llguidance is to be told. Raises InputError, which `where` begins."""
    if isinstance(schema, list):
        return [exact_schema(where, below) for below in schema]
    if not isinstance(schema, dict):
        return schema
    _check_properties(where, schema)
    _check_patterns(where, schema)
    _check_multiples(where, schema)
    exact: dict[str, Any] = {}
    for key, below in schema.items():
        if key in SCHEMAS_BY_NAME and isinstance(below, dict):
            exact[key] = {name: exact_schema(where, value) for name, value in below.items()}
        elif key in VALUES:
            _check_values(where, below)
            exact[key] = below
        elif key in REMARKS:
            exact[key] = below
        elif key != "uniqueItems" or below is not False:  # False says nothing, and it knows none
            exact[key] = exact_schema(where, below)
    return _with_inclusive_limits(exact)


def patterns_of(schema: dict[str, Any]) -> list[str]:
    """The regular expressions of a schema, without those of schemas in it."""
    by_pattern = schema.get("patternProperties")
    found = [schema.get("pattern"), *(by_pattern if isinstance(by_pattern, dict) else ())]
    return [pattern for pattern in found if isinstance(pattern, str)]


def check_regex(where: str, pattern: str) -> None:
    """llguidance checks all but the last backslash, which it leaves out."""
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
        raise InputError(
            f"{where}: expected a regular expression, found one that ends within an escape: "
            f"{pattern[-40:]!r}; write \\\\ for a backslash"
        )


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
    needed = set(map(str, required)) if isinstance(required, list) else set()
    num_optional = len(properties.keys() - needed) if isinstance(properties, dict) else 0
    if num_optional > MOST_OPTIONAL:
        raise InputError(
            f"{where}: expected at most {MOST_OPTIONAL} properties that are not required, found "
            f"{num_optional}"
        )


def _check_patterns(where: str, schema: dict[str, Any]) -> None:
    for pattern in patterns_of(schema):
        check_regex(where, pattern)
        for part in _PARTS.finditer(pattern):
            _check_control(where, part["control"])


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


def _with_inclusive_limits(schema: dict[str, Any]) -> dict[str, Any]:
    """A number of many digits that is within an exclusive limit may be read as the limit itself:
    the nearest one of fewer digits becomes an inclusive limit instead."""
    if "multipleOf" in schema or schema.get("type") == "integer":  # none comes so near
        return schema
    exact, cut = dict(schema), dict[str, Decimal]()
    for limit, exclusive, sign, tighter in (
        ("minimum", "exclusiveMinimum", 1, max),
        ("maximum", "exclusiveMaximum", -1, min),
    ):
        value = exact.get(exclusive)
        if value is True:  # in draft 4 it tells what the other limit is
            value = exact.get(limit)
        if not _is_number(value):
            continue
        nearest, other = _next_number(value, sign), exact.get(limit)
        del exact[exclusive]
        exact[limit] = tighter(nearest, other) if _is_number(other) else nearest
        if nearest * sign < 0 and not _is_whole(nearest):
            cut[limit] = Decimal(repr(nearest))
    above, kinds = exact.get("allOf", []), schema.get("type", [{}])
    are_simple = all(kind in SIMPLE for kind in (kinds if isinstance(kinds, list) else [kinds]))
    if cut and are_simple and isinstance(above, list):
        # llguidance would have 0.9 go on, because the limit 0.99 does.
        most = max(map(_num_places, cut.values()))
        shorter = [
            {limit: _cut(value, places) for limit, value in cut.items()}
            for places in range(most + 1)
        ]
        exact["allOf"] = [*above, {"anyOf": shorter}]
    return exact


def _cut(number: Decimal, places: int) -> float:
    """Without what is beyond so many places after the point."""
    places = min(places, _num_places(number))
    return float(number.quantize(Decimal(10) ** -places, ROUND_DOWN))


def _num_places(number: Decimal) -> int:
    return -int(number.as_tuple().exponent)


def _next_number(number: int | float, sign: int) -> int | float:
    """The next one of so many digits as llguidance reads exactly, and as it can afford."""
    exact = Decimal(repr(number))
    step = Decimal(10) ** max(-22, min(0, exact.adjusted() + 1 - DIGITS_AT_LIMIT))
    following = exact + sign * step
    return int(following) if following == int(following) else float(following)


def _check_values(where: str, value: Any) -> None:
    """llguidance reads numbers as floating point, and would write others."""
    if isinstance(value, dict | list):
        for below in value.values() if isinstance(value, dict) else value:
            _check_values(where, below)
    if isinstance(value, str) and (control := re.search(CONTROL, value)):
        _check_control(where, control.group())
    if _is_number(value) and not _is_exact(value):
        raise InputError(
            f"{where}: expected whole numbers up to 2**53, and others of at most 15 digits, of "
            f"which none is beyond the 22nd after the point, found {value!r:.100}"
        )


def _check_control(where: str, found: str | None) -> None:
    """Where `\\u` may not be written, llguidance would leave it out."""
    if found:
        raise InputError(
            f"{where}: expected text without control characters that JSON has no letter for, found "
            f"{found!r}"
        )


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
