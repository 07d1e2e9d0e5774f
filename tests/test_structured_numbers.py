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
        {"properties": {f"p{i}": {} for i in range(1001)}},
    ],
)
def test_schemas_that_would_take_too_long_are_refused(walks: Walks, schema: Any) -> None:
    with pytest.raises(InputError, match=r"expected (multipleOf up to|at most 1000 properties)"):
        walks.constraint(of_schema({"$defs": {"x": {"anyOf": [schema]}}, "$ref": "#/$defs/x"}))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {f"property{i}": {} for i in range(1000)}},
        {"multipleOf": 65536, "type": "integer"},
        {"type": "array", "items": {"type": "array", "maxItems": 10**5}, "maxItems": 10**6},
        {"type": "string", "maxLength": 10**6},
    ],
)
def test_large_schemas(walks: Walks, schema: Any) -> None:
    text = walks.walk(walks.constraint(of_schema(schema)), Random(0), 1000)
    assert text is not None
    jsonschema.validate(json.loads(text), schema)
