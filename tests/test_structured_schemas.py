"""Structured answers: schemas of others. What is said under them is valid, by jsonschema's word."""

from __future__ import annotations

import itertools
import json
from random import Random
from typing import Any

import jsonschema
import pytest
from talker import TOKENIZER
from walks import Walks, in_order, load_data, of_schema, property_names

from osscompile.runtime import InputError

SUITE = load_data("json_schema_test_suite.json")
STORE = load_data("schemastore.json")

INTEGER = {"type": "integer"}
OBJECT_OF_A = {"type": "object", "properties": {"a": INTEGER}}

# Valid instances of the suite that a grammar has no place for: it writes a whole number without a
# point, the properties of a constant in their order, and what a format says.
NOT_WRITTEN = (
    "float is valid",
    "float zero is valid",
    "float one is valid",
    "float -2.0 is valid",
    "[0.0] is valid",
    "[1.0] is valid",
    "a float with zero fractional part is an integer",
    "same object with different property order is valid",
    "string is only an annotation by default",
)


@pytest.fixture(scope="module")
def walks() -> Walks:
    return Walks(TOKENIZER)


def validator_of(schema: Any) -> Any:
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    return kind(schema)


def check_walks(walks: Walks, schema: Any, count: int) -> int:
    """How many texts of random tokens came to an end; all of them are valid."""
    texts = (
        walks.walk(walks.constraint(of_schema(schema)), Random(seed), 200) for seed in range(count)
    )
    whole = [text for text in texts if text is not None]
    for text in whole:
        validator_of(schema).validate(json.loads(text))
    return len(whole)


def test_the_suite(walks: Walks) -> None:
    """Walks are valid; valid instances are accepted token by token, and invalid ones are not."""
    num_schemas = num_walks = num_accepted = 0
    for group in itertools.chain.from_iterable(SUITE.values()):
        schema = group["schema"]
        try:
            walks.constraint(of_schema(schema))
        except InputError as error:
            assert "expected" in str(error)
            continue
        num_schemas += 1
        num_walks += check_walks(walks, schema, 3)
        names = list(dict.fromkeys(property_names(schema)))
        for case in group["tests"]:
            told = f"{group['description']}: {case['description']}"
            text = json.dumps(in_order(case["data"], names), ensure_ascii=False)
            accepted = walks.accepts(walks.constraint(of_schema(schema)), text)
            if not case["description"].endswith(NOT_WRITTEN):
                assert accepted == case["valid"], told
            num_accepted += accepted
    assert num_schemas >= 160 and num_walks >= 3 * num_schemas - 5 and num_accepted >= 320


def test_schemas_of_the_world(walks: Walks) -> None:
    num_schemas = num_walks = 0
    for schema in STORE.values():
        try:
            num_walks += check_walks(walks, schema, 1)
        except InputError as error:
            assert "expected" in str(error)
            continue
        num_schemas += 1
    assert len(STORE) == 200
    assert num_schemas >= 125 and num_walks >= 0.9 * num_schemas


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "string"}, '"\\n\\" é🙂"'),
        ({"type": "string", "maxLength": 2}, '"é🙂"'),
        ({"type": "number"}, "-0.5e-10"),
        ({"type": ["object", "null"]}, '{\n  "a": [\n    1,\r\n\t2\n  ]\n}'),
        ({"enum": ["a", 1, None, [1, {"b": 2}]]}, '[1, {"b": 2}]'),
        (
            {
                "$defs": {"t": {"items": {"$ref": "#/$defs/t"}, "type": "array"}},
                "$ref": "#/$defs/t",
            },
            "[[], [[]]]",
        ),
        ({"pattern": "^[0-9]{100}$", "type": "string"}, f'"{"1" * 100}"'),
        ({"x-guidance": {"lenient": True}, "type": "integer"}, "1"),
        ({"type": "array", "uniqueItems": False}, "[1, 1]"),
        ({"properties": {"a\x07b": {"const": 1}}, "required": ["a\x07b"]}, '{"a\\u0007b": 1}'),
        ({"type": "string", "pattern": "^[^\\x00-\\x1f]\\\\x07$"}, '"a\\\\x07"'),
    ],
)
def test_texts_that_are_allowed(walks: Walks, schema: Any, text: str) -> None:
    assert walks.accepts(walks.constraint(of_schema(schema)), text)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "string"}, '"\\ud83d"'),
        ({"type": "string", "maxLength": 1}, '"éé"'),
        ({"type": "integer"}, "1" * 100),
        ({"type": "integer"}, "01"),
        ({"type": "object"}, "{ \n}"),
        ({"type": "object"}, "{}\n"),
        ({"type": "object"}, "```json\n{}"),
        ({"type": "number"}, "NaN"),
        # A property is known by its name, however that may be written.
        ({"type": "object", "properties": {"größe": INTEGER}}, '{"gr\\u00f6\\u00dfe": "abc"}'),
        ({**OBJECT_OF_A, "required": ["a"]}, '{"a": 1, "\\u0061": "x"}'),
        ({**OBJECT_OF_A, "additionalProperties": {"type": "string"}}, '{"\\u0061": "str"}'),
        ({"type": "object", "properties": {"a\nb": INTEGER}}, '{"a\\u000Ab": "x"}'),
        ({"type": "object", "patternProperties": {"^a": INTEGER}}, '{"\\u0061b": "x"}'),
    ],
)
def test_texts_that_are_not_allowed(walks: Walks, schema: Any, text: str) -> None:
    assert not walks.accepts(walks.constraint(of_schema(schema)), text)


def test_a_vocabulary_of_whole_words_of_bits() -> None:
    """llguidance has a bit more than there are ids."""
    for size in (1024, 1056):
        walks = Walks(TOKENIZER, size)
        assert walks.accepts(walks.constraint(of_schema({"type": "integer"})), "1" * 60)
        assert not walks.accepts(walks.constraint(of_schema({"type": "integer"})), "1" * 70)
