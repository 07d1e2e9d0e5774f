"""Python functions as tools: what the model is told of them, and how its arguments reach them."""

from __future__ import annotations

import datetime
import enum
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NewType, NotRequired, Optional, TypedDict, Union

import pytest

from osscompile.runtime import Call, InputError
from osscompile.runtime.harmony.tools import functions_text, read_tools
from osscompile.runtime.tools.docstring import read_docstring
from osscompile.runtime.tools.functions import PythonTool, definitions, result_text
from osscompile.runtime.tools.kind import Misfit

UserId = NewType("UserId", int)


class Unit(enum.Enum):
    CELSIUS = "c"
    KELVIN = "k"


class Place(TypedDict):
    city: str
    country: NotRequired[str]


@dataclass
class Range:
    low: Annotated[float, "the least"]
    high: float = 1.0
    marks: list[int] = field(default_factory=list)


def get_weather(
    city: str,
    days: int = 3,
    unit: Literal["celsius", "kelvin"] = "celsius",
    note: str | None = None,
) -> str:
    """Gets the weather.

    It may be wrong.

    Args:
        city: Where to look,
            in English.
        days (int): How many.

    Returns:
        A sentence.
    """
    return f"{city}, {days}, {unit}, {note}"


def parameters_of(function: Callable[..., Any]) -> dict[str, Any]:
    described: Any = PythonTool("tools[0]", function).definition["function"]
    return dict(described["parameters"])


def schema_of(annotation: Any) -> dict[str, Any]:
    def f(x): ...  # type: ignore[no-untyped-def]

    f.__annotations__ = {"x": annotation}
    return dict(parameters_of(f)["properties"]["x"])


def call(function: Callable[..., Any], **arguments: Any) -> str:
    return PythonTool("tools[0]", function).call(Call("call_0", "f", json.dumps(arguments)))


def test_model_is_told_of_a_function_as_it_was_trained_to_read() -> None:
    text = functions_text(read_tools(definitions([get_weather])))
    assert text == (
        "# Tools\n\n## functions\n\nnamespace functions {\n\n// Gets the weather.\n// \n"
        "// It may be wrong.\ntype get_weather = (_: {\n// Where to look, in English.\n"
        "city: string,\n// How many.\ndays?: number, // default: 3\n"
        'unit?: "celsius" | "kelvin", // default: celsius\nnote?: string | null,\n}) => any;\n\n'
        "} // namespace functions"
    )


@pytest.mark.parametrize(
    "text",
    [
        "Sums.\n\nArgs:\n    a: first\n      one\n    b (int, optional): second\n\n"
        "Returns:\n    a: x",
        "Sums.\n\na: first one\nb: second",
        "Sums.\n\nParameters\n----------\na : int\n    first\n\n    one\nb\n    second\n\n"
        "Returns\n-------\nc : int\n    x",
        "Sums.\n\n:param a: first one\n:param int b: second\n:type b: int\n:returns: c\n"
        ":raises ValueError: x",
        "Sums.\n\nArguments:\n\n* `a`: first one\n* `b`: second\n",
    ],
)
def test_docstrings_of_several_styles(text: str) -> None:
    told = {"a": "first one", "b": "second"}
    assert read_docstring(text, ["a", "b"]) == ("Sums.", told)


def test_docstring_without_parameters_keeps_its_lines() -> None:
    text = "Looks: everywhere.\n\nNote that a: is no parameter here,\nnor is this: one."
    assert read_docstring(text, ["x"]) == (text, {})
    assert read_docstring(None, ["x"]) == ("", {})


@pytest.mark.parametrize(
    ("annotation", "schema"),
    [
        (str, {"type": "string"}),
        (int, {"type": "integer"}),
        (float, {"type": "number"}),
        (bool, {"type": "boolean"}),
        (Any, {}),
        (UserId, {"type": "integer"}),
        (list, {"type": "array", "items": {}}),
        (list[int], {"type": "array", "items": {"type": "integer"}}),
        (tuple[str, ...], {"type": "array", "items": {"type": "string"}}),
        (Sequence[str], {"type": "array", "items": {"type": "string"}}),
        (dict[str, float], {"type": "object", "additionalProperties": {"type": "number"}}),
        (Optional[int], {"type": ["integer", "null"]}),  # noqa: UP045
        (Union[int, str], {"type": ["integer", "string"]}),  # noqa: UP007
        (
            list[int] | None,
            {"type": "array", "items": {"type": "integer"}, "nullable": True},
        ),
        (
            list[int] | str,
            {"oneOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "string"}]},
        ),
        (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}),
        (Literal[1, "b"], {"enum": [1, "b"]}),
        (Unit, {"type": "string", "enum": ["c", "k"]}),
        (Unit | None, {"type": "string", "enum": ["c", "k"], "nullable": True}),
        (Annotated[int, 5, "how many"], {"type": "integer", "description": "how many"}),
        (
            Place,
            {
                "type": "object",
                "properties": {"city": {"type": "string"}, "country": {"type": "string"}},
                "required": ["city"],
            },
        ),
        (
            Range,
            {
                "type": "object",
                "properties": {
                    "low": {"type": "number", "description": "the least"},
                    "high": {"type": "number"},
                    "marks": {"type": "array", "items": {"type": "integer"}},
                },
                "required": ["low"],
            },
        ),
    ],
)
def test_schema_of_a_type(annotation: Any, schema: dict[str, Any]) -> None:
    assert schema_of(annotation) == schema


@pytest.mark.parametrize(
    "annotation",
    [datetime.date, tuple[int, str], dict[int, str], bytes, Literal[b"a"], "Unknown", [int]],
)
def test_types_that_json_cannot_say_are_refused_with_their_place(annotation: Any) -> None:
    with pytest.raises(InputError, match=r"tools\[0\] \(f\)"):
        schema_of(annotation)


def test_defaults_that_are_no_json_are_not_told() -> None:
    def f(most: float = float("inf"), least: float = float("nan"), step: float = 0.5) -> None: ...

    properties = parameters_of(f)["properties"]
    number = {"type": "number"}
    assert properties == {"most": number, "least": number, "step": {**number, "default": 0.5}}
    assert call(f) == "null"

    def g(text: str = "\ud800") -> None: ...

    with pytest.raises(InputError, match=r"tools\[0\] \(g\): parameter text: expected what JSON"):
        parameters_of(g)


def test_arguments_become_values_of_their_types() -> None:
    seen: dict[str, Any] = {}

    def f(
        n: int,
        x: float,
        unit: Unit,
        span: Range,
        place: Place,
        names: set[str],
        either: Union[int, str],  # noqa: UP007
        free,  # type: ignore[no-untyped-def]
        none: str | None = "unset",
    ) -> None:
        seen.update(locals())

    text = call(
        f,
        n=3.0,
        x=2,
        unit="k",
        span={"low": 0},
        place={"city": "Rome"},
        names=["a", "a"],
        either="5",
        free=[1, {}],
        none=None,
    )
    assert text == "null"
    del seen["seen"]
    assert seen == {
        "n": 3,
        "x": 2.0,
        "unit": Unit.KELVIN,
        "span": Range(0.0),
        "place": {"city": "Rome"},
        "names": {"a"},
        "either": "5",
        "free": [1, {}],
        "none": None,
    }
    assert isinstance(seen["n"], int) and isinstance(seen["span"].low, float)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "arguments: expected a value of n, found none"),
        ({"n": 1, "m": 2}, 'arguments: expected n, names, unit, x, level, span, found "m"'),
        ({"n": "1"}, 'arguments.n: expected a whole number, found "1"'),
        ({"n": 1.5}, "arguments.n: expected a whole number, found 1.5"),
        ({"n": True}, "arguments.n: expected a whole number, found true"),
        ({"n": None}, "arguments.n: expected a whole number, found null"),
        ({"n": 1, "names": ["a", 2]}, "arguments.names[1]: expected text, found 2"),
        ({"n": 1, "unit": "x"}, 'arguments.unit: expected one of "c", "k", found "x"'),
        ({"n": 1, "x": True}, "arguments.x: expected a number, found true"),
        ({"n": 1, "level": True}, "arguments.level: expected one of 1, 2, found true"),
        ({"n": 1, "span": {}}, "arguments.span: expected a value of low, found none"),
        ({"n": 1, "span": 5}, "arguments.span: expected an object, found 5"),
    ],
)
def test_arguments_that_do_not_fit_are_told_where(arguments: dict[str, Any], message: str) -> None:
    def f(
        n: int,
        names: Sequence[str] = (),
        unit: Unit = Unit.KELVIN,
        x: float = 0.0,
        level: Literal[1, 2] = 1,
        span: Range | None = None,
    ) -> None: ...

    if "span" in arguments:  # of a union it is told what may be there instead
        message = (
            f"arguments.span: expected an object or null, found {json.dumps(arguments['span'])}"
        )
    with pytest.raises(Misfit) as error:
        call(f, **arguments)
    assert str(error.value) == message


def test_parameters_without_names_and_those_that_are_not_told() -> None:
    def f(a: int, /, b: int = 2, *more: int, c: int = 3, **others: int) -> list[Any]:
        return [a, b, more, c, others]

    assert list(parameters_of(f)["properties"]) == ["a", "b", "c"]
    assert json.loads(call(f, a=1, c=5)) == [1, 2, [], 5, {}]
    with pytest.raises(Misfit, match='found "more"'):
        call(f, a=1, more=1)


def test_methods_classes_and_callable_objects() -> None:
    class Shop:
        def buy(self, what: str) -> str:
            """Buys."""
            return f"bought {what}"

    assert call(Shop().buy, what="tea") == "bought tea"
    assert json.loads(call(Range, low=1)) == {"low": 1.0, "high": 1.0, "marks": []}
    for nameless in (lambda x: x, functools.partial(get_weather, "Rome")):
        with pytest.raises(InputError, match="a function with a name"):
            PythonTool("tools[0]", nameless)


def test_function_without_parameters_takes_nothing_or_an_empty_object() -> None:
    def now() -> str:
        return "noon"

    tool = PythonTool("tools[0]", now)
    assert tool.definition["function"] == {"name": "now", "description": ""}
    assert tool.call(Call("call_0", "now", "")) == tool.call(Call("call_0", "now", "{}")) == "noon"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is", "as it is"),
        (None, "null"),
        ({"temperature": 20, "sky": "\u2600"}, '{"temperature": 20, "sky": "\u2600"}'),
        ([Unit.KELVIN, Range(1.0)], '["k", {"low": 1.0, "high": 1.0, "marks": []}]'),
        ({"when": datetime.date(2026, 1, 2)}, '{"when": "2026-01-02"}'),
        ({(1, 2): 3}, "{(1, 2): 3}"),
    ],
)
def test_results_as_text(value: object, text: str) -> None:
    assert result_text(value) == text


def test_models_of_pydantic() -> None:
    pydantic = pytest.importorskip("pydantic")

    class Address(pydantic.BaseModel):  # type: ignore[name-defined,misc]
        city: str = pydantic.Field(description="in English")
        zip: str | None = None

    class Person(pydantic.BaseModel):  # type: ignore[name-defined,misc]
        name: str
        homes: list[Address] = pydantic.Field(default_factory=list)
        friend: Person | None = None

    Person.model_rebuild(_types_namespace={"Address": Address, "Person": Person})

    def greet(person, times=1):  # type: ignore[no-untyped-def]
        return f"{person.name} of {person.homes[0].city}" * times

    greet.__annotations__ = {
        "person": Person,
        "times": Annotated[int, pydantic.Field(description="how often")],
    }
    schema = parameters_of(greet)
    assert schema["properties"]["times"]["description"] == "how often"
    person = schema["properties"]["person"]
    assert person["required"] == ["name"]
    assert person["properties"]["homes"]["items"]["properties"] == {
        "city": {"type": "string", "description": "in English"},
        "zip": {"type": ["string", "null"], "default": None},
    }
    assert "$ref" not in json.dumps(person) and "anyOf" not in json.dumps(person)
    functions_text(read_tools(definitions([greet])))
    text = call(greet, person={"name": "Eva", "homes": [{"city": "Oslo"}]})
    assert text == "Eva of Oslo"
    with pytest.raises(Misfit, match=r"(?s)arguments.person: .*city"):
        call(greet, person={"name": "Eva", "homes": [{}]})


def test_definitions_pass_as_they_are() -> None:
    given = {"type": "function", "function": {"name": "f"}}
    first, second = definitions([given, get_weather])
    assert first is given and second["function"]["name"] == "get_weather"
