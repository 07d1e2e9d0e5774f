"""JSON -> dataclasses: each field is read as its type says."""

import dataclasses
import reprlib
from pathlib import Path
from typing import Any, get_args, get_origin

MAX_NUMBER = 1 << 48  # far above any size in bytes; sums and products of such are no trouble


class FieldError(Exception):
    """A value is not what its type says."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(f"expected {expected}, found {found}")
        self.expected, self.found = expected, found


def read_small(file: Path, most: int) -> bytes:
    """All of a file. Raises OSError, or ValueError for one of more than so many bytes."""
    with file.open("rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise ValueError(f"more than {most} bytes")
    return content


def parse_fields(kind: Any, value: Any, where: str) -> Any:
    """A value out of JSON as what a dataclass declares: numbers are not negative, texts can be
    printed, and JSON's lists become tuples. Raises FieldError, which calls the value `where`."""

    def expect(holds: bool, expected: str) -> None:
        if not holds:
            raise FieldError(f"{where} to be {expected}", reprlib.repr(value))

    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        types = {field.name: field.type for field in dataclasses.fields(kind)}
        expect(isinstance(value, dict), f"an object with {', '.join(types)}")
        if differing := sorted(types.keys() ^ value.keys()):
            known = "no" if differing[0] in types else "also"
            expected = f"{where} to be an object with {', '.join(types)}"
            raise FieldError(expected, f"{known} {reprlib.repr(differing[0])}")
        return kind(**{n: parse_fields(t, value[n], f"{n} of {where}") for n, t in types.items()})
    if get_origin(kind) is tuple:
        expect(isinstance(value, list), "a list")
        return tuple(parse_fields(get_args(kind)[0], v, f"an item of {where}") for v in value)
    if get_origin(kind) is dict:
        expect(isinstance(value, dict), "an object")
        names = [parse_fields(str, name, f"a name in {where}") for name in value]
        return {n: parse_fields(get_args(kind)[1], value[n], f"{n} in {where}") for n in names}
    if kind is int:
        number = type(value) is int and 0 <= value < MAX_NUMBER
        expect(number, f"a whole number from 0 to {MAX_NUMBER - 1}")
    elif kind is float:
        number = type(value) in (int, float) and 0 <= value < MAX_NUMBER
        expect(number, f"a number from 0 to {MAX_NUMBER}")
        return float(value)
    elif kind is bool:
        expect(isinstance(value, bool), "true or false")
    else:
        assert kind is str, kind
        expect(isinstance(value, str) and value.isprintable(), "a text that can be printed")
    return value
