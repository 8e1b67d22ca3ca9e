"""What clients want their answers to keep to, as constraints."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime import bundle
from runtime.grammar import compiled, vocabulary
from runtime.messages import Constraint
from server import constraints
from server.endless import documents, endless
from server.errors import ApiError
from tests import schemas

OF = "response_format.json_schema.schema"


def schema(value: Any) -> Constraint:
    return constraints.json_schema(value, of=OF)


@pytest.mark.parametrize("make", [constraints.regex, constraints.lark, lambda text, of: schema({"const": text})])
def test_what_is_too_long_is_refused_before_it_goes_anywhere(make: Callable[..., Constraint]) -> None:
    with pytest.raises(ApiError, match="at most 262144 are taken"):
        make("a" * (constraints.LONGEST + 1), of=OF)


def test_a_schema_that_is_too_long_is_not_gone_through() -> None:
    huge = {"properties": {f"p{i}": {"type": "object", "properties": {"a": {}}} for i in range(80_000)}}
    started = time.thread_time()
    json.dumps(huge)
    encoding = time.thread_time() - started
    started = time.thread_time()
    with pytest.raises(ApiError, match="at most 262144 are taken"):
        schema(huge)
    assert time.thread_time() - started < encoding


@pytest.mark.parametrize("value", [None, 3, "string", [], False])
def test_a_schema_is_an_object(value: Any) -> None:
    with pytest.raises(ApiError, match="must be a JSON schema"):
        schema(value)


@pytest.mark.parametrize("options", [[], [""], ["a", ""]])
def test_a_choice_needs_options(options: list[str]) -> None:
    with pytest.raises(ApiError, match="one option at least"):
        constraints.choice(options, of=OF)


def test_options_mean_themselves(tiny_bundle: Path) -> None:
    options = ["a", "ab", 'a"b', "a\\b", "/a/", "a|b", "näh", "🙂", "tab\tline\n", "<|im_end>", " a ", "$(x)", "\x01", "'a'"]
    manifest = bundle.read(tiny_bundle)
    words = vocabulary(tiny_bundle / bundle.TOKENIZER, manifest.vocab_size, manifest.stop_ids)

    for option in options:
        grammar = compiled(words, constraints.choice(options, of=OF))
        assert grammar.consume_tokens(words.tokenize_str(option)), option
        assert grammar.is_accepting(), option
        grammar = compiled(words, constraints.choice([option], of=OF))
        assert not grammar.consume_tokens(words.tokenize_str(option + "x"))


LOOP = {"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]}


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (LOOP, True),
        (LOOP | {"required": []}, False),
        (LOOP | {"type": ["object", "null"]}, False),
        ({"type": "array", "items": {"$ref": "#"}}, False),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, True),
        ({"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1}, True),
        ({"type": "array", "prefixItems": [{}], "items": {"$ref": "#"}, "minItems": 1}, False),
        ({"anyOf": [LOOP, {"type": "null"}]}, False),
        ({"allOf": [LOOP, {"type": "object"}]}, True),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"anyOf": [{"$ref": "#/$defs/c"}, LOOP]}, "c": {"type": "null"}}}, False),
        ({"$ref": "#/$defs/a", "$defs": {"a": LOOP | {"properties": {"x": {"$ref": "#/$defs/a"}}}}}, True),
        ({"$ref": "elsewhere"}, False),
        ({"properties": {"x": LOOP}}, False),
        (True, False),
    ],
)
def test_endless_schemas(document: Any, expected: bool) -> None:
    assert endless(json.loads(json.dumps(document))) is expected


def test_no_random_schema_is_endless() -> None:
    assert not any(endless(schemas.schema(seed)) for seed in range(300))


def test_the_schemas_in_a_grammar_are_found_and_nothing_else() -> None:
    source = r"""
start: a | "%json {\"x\": 1} \"" | B  // %json {"y": 2}
B: /[%]json {"z": 3}\//
a: "(" %json {"type": "object", "properties": {"%json": {"$ref": "#"}}} ")"  | "//" %json
  {"const": "}\""}
"""
    found = [{"type": "object", "properties": {"%json": {"$ref": "#"}}}, {"const": '}"'}]
    assert list(documents(Constraint("lark", source))) == found
    assert list(documents(Constraint("json_schema", '{"a": 1}'))) == [{"a": 1}]
    assert list(documents(Constraint("regex", '%json {"a": 1}'))) == []
