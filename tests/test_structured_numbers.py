"""Structured answers: numbers of schemas, which llguidance reads as floating point."""

from __future__ import annotations

import json
from fractions import Fraction
from random import Random
from typing import Any

import jsonschema
import pytest
from talker import TOKENIZER
from walks import Walks, of_schema

from osscompile.runtime import InputError


@pytest.fixture(scope="module")
def walks() -> Walks:
    return Walks(TOKENIZER)


@pytest.mark.parametrize(
    "number",
    [2**53 + 1, 2**64, -(2**63) - 1, 10**30, 22.549442737217078, 1.66648960536522e-09, 1e308],
)
@pytest.mark.parametrize("place", [[0], {"a": 0}, 0])
def test_numbers_that_would_be_others_are_refused(walks: Walks, number: Any, place: Any) -> None:
    value = json.loads(json.dumps(place).replace("0", json.dumps(number)))
    schemas: list[dict[str, Any]] = [
        {"const": value},
        {"properties": {"default": {"enum": [value, 1]}}},
        {"$defs": {"x": {"anyOf": [{"const": value}]}}},
        *([{"maximum": number}, {"multipleOf": abs(number)}] if place == 0 else []),
    ]
    for schema in schemas:
        with pytest.raises(InputError, match="expected whole numbers up to"):
            walks.constraint(of_schema(schema))
    walks.constraint(of_schema({"type": "integer", "default": value, "examples": [value]}))


def test_numbers_stay_what_they_are(walks: Walks) -> None:
    random = Random(0)
    for digits in range(1, 16):
        for whole in (0, 1, 10, 10**6, 10**9):
            number = float(f"{random.uniform(-1, 1) * whole:.{digits}g}")
            for value in (number, int(number), random.randint(-(2**53), 2**53)):
                text = walks.walk(walks.constraint(of_schema({"const": value})), random, 100)
                assert text is not None and json.loads(text) == value, (text, value)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"exclusiveMaximum": 1}, "0.99999999999999999999"),
        ({"exclusiveMinimum": 1}, "1.00000000000000000001"),
        ({"exclusiveMinimum": -1}, "-0.99999999999999999999"),
        ({"exclusiveMinimum": 0}, f"0.{'0' * 330}1"),
        ({"exclusiveMaximum": 0.5, "minimum": 0}, "0.49999999999999999999"),
        ({"exclusiveMaximum": 1e15}, "999999999999999.99999"),
        ({"exclusiveMinimum": True, "minimum": 1}, "1.00000000000000000001"),  # as in draft 4
        ({"allOf": [{"exclusiveMaximum": 1}, {"maximum": 1}]}, "0.99999999999999999999"),
    ],
)
def test_numbers_that_are_read_as_an_exclusive_limit(
    walks: Walks, schema: dict[str, Any], text: str
) -> None:
    assert not walks.accepts(walks.constraint(of_schema({"type": "number", **schema})), text)


@pytest.mark.parametrize(
    ("schema", "texts"),
    [
        ({"exclusiveMinimum": 0, "exclusiveMaximum": 1}, ["0.00001", "0.9", "0.999999"]),
        ({"exclusiveMinimum": -1, "exclusiveMaximum": 12.5}, ["-0.9", "12.49", "12", "0", "0.0"]),
        ({"exclusiveMaximum": 1, "type": ["null", "number"], "anyOf": [{}]}, ["null", "0.99"]),
        ({"exclusiveMinimum": 5, "minimum": 3, "exclusiveMaximum": 6}, ["5.1", "5.999"]),
        ({"type": "integer", "exclusiveMinimum": 2**53 - 2}, [str(2**53 - 1)]),
        ({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 2}, ["1"]),
        ({"exclusiveMinimum": -12345678.5, "exclusiveMaximum": 1e-20}, ["-12345677.5", "0"]),
        ({"exclusiveMaximum": -1e-22}, ["-0.000000000000001"]),
        ({"properties": {"minimum": {"const": {"exclusiveMaximum": 1}}}}, []),
    ],
)
def test_numbers_near_an_exclusive_limit(walks: Walks, schema: Any, texts: list[str]) -> None:
    schema = {"type": "number", **schema}
    for text in texts:
        assert walks.accepts(walks.constraint(of_schema(schema)), text)
    for seed in range(20):
        text = walks.walk(walks.constraint(of_schema(schema)), Random(seed), 400) or "null"
        if text != "null":
            jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("step", [2, 7, 2.0, 0.5, 0.01, 1.5])
@pytest.mark.parametrize("limits", [{}, {"minimum": -3}, {"exclusiveMinimum": 0, "maximum": 50}])
def test_multiples_within_limits(walks: Walks, step: float, limits: dict[str, int]) -> None:
    schema = {"type": "number", "multipleOf": step, **limits}
    for seed in range(20):
        text = walks.walk(walks.constraint(of_schema(schema)), Random(seed), 100)
        assert text is not None
        jsonschema.validate(json.loads(text), {"type": "number", **limits})
        assert (Fraction(text) / Fraction(str(step))).denominator == 1


def test_multiples_that_llguidance_does_not_find_are_refused(walks: Walks) -> None:
    schema = {"type": "number", "multipleOf": 0.1, "minimum": 0.25, "maximum": 0.35}
    for nested in (schema, {"type": "array", "items": schema}):
        with pytest.raises(InputError, match=r"whole numbers as limits beside multipleOf 0\.1"):
            walks.constraint(of_schema(nested))


@pytest.mark.parametrize(
    "schema",
    [
        {"multipleOf": 99990000},
        {"multipleOf": 0.9999},
        {"properties": {f"p{i}": {} for i in range(241)}},
    ],
)
def test_schemas_that_would_take_too_long_are_refused(walks: Walks, schema: Any) -> None:
    with pytest.raises(
        InputError, match=r"expected (multipleOf up to|at most 240 properties that)"
    ):
        walks.constraint(of_schema({"$defs": {"x": {"anyOf": [schema]}}, "$ref": "#/$defs/x"}))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {f"property{i}": {} for i in range(240)}},
        {
            "type": "object",
            "properties": {f"p{i}": {"const": i} for i in range(300)},
            "required": [f"p{i}" for i in range(300)],
            "additionalProperties": False,
        },
        {"multipleOf": 65536, "type": "integer"},
        {"type": "array", "items": {"type": "array", "maxItems": 10**5}, "maxItems": 10**6},
        {"type": "string", "maxLength": 10**6},
    ],
)
def test_large_schemas(walks: Walks, schema: Any) -> None:
    text = walks.walk(walks.constraint(of_schema(schema)), Random(0), 5000)
    assert text is not None
    jsonschema.validate(json.loads(text), schema)
