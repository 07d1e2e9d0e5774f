"""Run a chat template, which comes with a checkpoint and may be anything, in jinja's sandbox."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import InputError
from .marks import Marks

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from jinja2.runtime import Context

MAX_TEXT = 16 << 20  # characters that a template may write: more than any context holds
MAX_STEPS = 1_000_000  # of all loops together, and of all calls of `range`
STEPS = "counted_steps"  # a template's name for what its loops go through
MAX_EXPONENT = 64


def run_template(template: str, marks: Marks, variables: Mapping[str, Any]) -> str:
    """What the template writes. Raises InputError for whatever it fails at.

    It reaches nothing but its variables. What it writes, its loops and what it multiplies are
    limited, so that common mistakes end; other ways to waste time and memory are
    not, so that a template still must come from somebody who does not mean to.
    """
    written: list[str] = []
    size = 0
    try:
        compiled = _compile(template, marks)
        limits = {"range": _limited_range(), STEPS: _limited_steps()}
        for part in compiled.generate({**variables, **limits}):
            written.append(part)
            size += len(part)
            if size > MAX_TEXT:
                raise InputError(f"template: expected at most {MAX_TEXT} characters, found more")
    except InputError:
        raise
    except Exception as error:  # whatever the template's statements can raise
        # a template that does not parse renders no chat
        advice = "" if type(error).__name__ == "TemplateSyntaxError" else "change the messages, or "
        raise InputError(
            f"template: expected the checkpoint's template to render this chat, found "
            f"{type(error).__name__}: {marks.take(str(error)).rstrip('.')}; {advice}chat without it"
        ) from error
    return "".join(written)


@lru_cache(maxsize=4)  # it takes longer than to run it
def _compile(template: str, marks: Marks) -> "Template":
    """As transformers does, so that templates find what they were written for."""
    try:
        from jinja2.exceptions import SecurityError, TemplateError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.nodes import Call, For, Name
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise InputError(
            "template: expected jinja2, which renders a checkpoint's own, found none; "
            "pip install 'jinja2>=3.1'"
        ) from None

    class Generation(Extension):
        """`{% generation %}` tells a trainer what the model said; what it surrounds is kept."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: "Parser") -> "list[Node]":
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: "Context", operator: str, left: Any, right: Any) -> Any:
            long, times = (left, right) if hasattr(left, "__len__") else (right, left)
            too_much = operator == "**" and abs(right) > MAX_EXPONENT
            if operator == "*" and hasattr(long, "__len__"):
                too_much = len(long) * times > MAX_TEXT
            if too_much:
                raise SecurityError(f"{operator} makes more than a chat can have")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = marks.to_json
    environment.globals["raise_exception"] = raise_exception
    tree = environment.parse(template)
    for loop in list(tree.find_all(For)):
        loop.iter = Call(Name(STEPS, "load"), [loop.iter], [], None, None)
    tree.set_environment(environment)
    return environment.from_string(tree)


def _limited_steps() -> Callable[[Iterable[object]], Iterator[object]]:
    left = MAX_STEPS

    def limited(values: Iterable[object]) -> Iterator[object]:
        nonlocal left
        for value in values:
            left -= 1
            if left < 0:
                raise InputError(_too_many_steps())
            yield value

    return limited


def _limited_range() -> Callable[..., range]:
    left = MAX_STEPS

    def limited(*arguments: int) -> range:
        nonlocal left
        numbers = range(*arguments)
        left -= len(numbers)
        if left < 0:
            raise InputError(_too_many_steps())
        return numbers

    return limited


def _too_many_steps() -> str:
    return f"template: expected loops of {MAX_STEPS} steps at most, found more"
