"""JSON that comes in, bounded before anything goes down into it."""

import gc
import json
import math
import re
from collections.abc import Iterable
from typing import Any

from ..exact_schema import patterns_of
from .errors import ApiError

MAX_DEPTH = 64  # of lists and objects within each other; the deepest of them are schemas
MAX_KEYS = 8192  # of an object: pydantic checks all of them before it says that one is wrong
MAX_PATTERN = 1000  # characters of a regular expression in a schema or a grammar
MAX_BITS = 1024  # of a whole number: float64, as which others read it, has no larger one
# In Lark; without its end too, so that an end is not looked for again and again.
PATTERN_IN_LARK = re.compile(r"(?<!/)/(?:\\.|[^/\\\n])++/?")


def read_json(body: bytes) -> Any:
    """What a body says. Raises ApiError for what is no JSON, and beyond the limits above."""
    is_collecting = gc.isenabled()
    gc.disable()  # else it looks through a million new lists again and again
    try:
        value = json.loads(body)
    except json.JSONDecodeError as error:
        raise _error(f"JSON, found none: {error}") from None
    except UnicodeDecodeError:
        raise _error("JSON in UTF-8, found other bytes") from None
    except ValueError:  # more digits than Python reads
        raise _no_number() from None
    except RecursionError:
        raise _too_deep() from None
    finally:
        if is_collecting:
            gc.enable()
    _check(value)
    return value


def _check(value: Any) -> None:
    """Whatever reads a schema goes down into it, and Python does so a thousand times only."""
    level, depth = [value], 0
    while level := [value for container in level for value in _values(container)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise _too_deep()


def _values(value: Any) -> Iterable[Any]:
    """What is in a list or an object."""
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        if len(value) > MAX_KEYS:
            raise _error(f"at most {MAX_KEYS} keys in an object, found {len(value)}")
        if any(len(pattern) > MAX_PATTERN for pattern in _patterns(value)):
            raise _error(f"patterns of at most {MAX_PATTERN} characters, found more")
        return value.values()
    if isinstance(value, float) and not math.isfinite(value):
        raise _no_number()
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise _no_number()
    return ()


def _patterns(found: dict[str, Any]) -> Iterable[str]:
    """The regular expressions of a schema or a grammar."""
    yield from patterns_of(found)
    if isinstance(definition := found.get("definition"), str):
        is_regex = found.get("syntax") == "regex"
        yield from [definition] if is_regex else PATTERN_IN_LARK.findall(definition)


def _too_deep() -> ApiError:
    return _error(f"at most {MAX_DEPTH} levels of nesting, found more")


def _no_number() -> ApiError:
    return _error("numbers that JSON has and float64 holds, found NaN, Infinity or a larger one")


def _error(expected_and_found: str) -> ApiError:
    return ApiError(400, f"body: expected {expected_and_found}")
