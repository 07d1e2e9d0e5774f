"""Check what a caller gives, before any work: expected, found, what to do."""

import operator
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import CompileError
from .runtime.errors import shown as shown


def path_option(name: str, value: str | os.PathLike[str]) -> Path:
    """A path that every library can be told, which take UTF-8."""
    try:
        path = os.fspath(value)
        if not isinstance(path, str):
            raise TypeError
        absolute = os.path.realpath(path)
        absolute.encode()
    except TypeError:
        raise CompileError(f"{name}: expected a path, found {value!r:.200}") from None
    except ValueError:  # bytes that are no UTF-8, or a zero byte
        raise CompileError(
            f"{name}: expected a path of UTF-8 characters, found {path!a:.300}; choose another"
        ) from None
    except OSError as error:  # a loop of links
        raise CompileError(f"{name}: {shown(value)}: {error.strerror}; choose another") from error
    if not path:
        raise CompileError(f"{name}: expected a path, found an empty one")
    return Path(path)


def whole_number(name: str, value: object) -> int:
    """Also one of numpy's; True is none."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise CompileError(f"{name}: expected a whole number, found {value!r:.200}") from None


def names_option(name: str, value: str | Iterable[str]) -> list[str]:
    """One name, or several."""
    if isinstance(value, str):
        return [value]
    names = list(value) if isinstance(value, Iterable) else [value]
    if not all(isinstance(one, str) for one in names):
        raise CompileError(f"{name}: expected names, found {value!r:.200}")
    return names


def adapters_option(value: object) -> tuple[str | Path, ...]:
    """One adapter, several, or None."""
    if value is None or isinstance(value, str | os.PathLike):
        value = [] if value is None else [value]
    adapters: list[Any] = list(value) if isinstance(value, Iterable) else [value]
    if not all(isinstance(one, str | os.PathLike) for one in adapters):
        raise CompileError(
            "adapters: expected folders of PEFT's LoRA adapters, or their ids on Hugging Face, "
            f"found {value!r:.100}"
        )
    return tuple(one if isinstance(one, str) else Path(one) for one in adapters)
