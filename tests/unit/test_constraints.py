"""What clients want their answers to keep to, checked by the process that compiles it."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from runtime import bundle
from runtime.grammar import compiled, vocabulary
from runtime.messages import Constraint
from server import compiling, constraints
from server.compiling import Vocabulary
from server.endless import endless
from server.errors import ApiError
from tests import schemas

OF = "response_format.json_schema.schema"


@pytest.fixture
async def tokens(tiny_bundle: Path) -> AsyncIterator[Vocabulary]:
    yield constraints.vocabulary(tiny_bundle, bundle.read(tiny_bundle))
    await constraints.close()


async def complaint(constraint: Constraint, tokens: Vocabulary) -> str:
    """What the client is told; empty where the constraint is taken."""
    try:
        await constraints.check(constraint, tokens, of=OF)
    except ApiError as error:
        told = error
    else:
        return ""
    assert (told.status, told.param) == (400, OF)
    assert repr(OF) in str(told)
    return str(told)


def schema(value: Any) -> Constraint:
    return constraints.json_schema(value, of=OF)


async def test_what_can_be_met_is_taken(tokens: Vocabulary) -> None:
    for constraint in [
        constraints.json_object(),
        schema(True),
        schema({"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}}),
        constraints.regex("[a-z]+", of=OF),
        constraints.choice(["yes", "no"], of=OF),
        constraints.lark('start: "a" | %json {"type": "null"}', of=OF),
        *[schema(schemas.schema(seed)) for seed in range(30)],
    ]:
        assert await complaint(constraint, tokens) == ""


@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "use anyOf"),
        (schema({"type": "integer", "minimum": 2, "maximum": 1}), "Unsatisfiable"),
        (schema({"$ref": "#/$defs/none"}), "none"),
        (schema({"$ref": "http://example.com/schema"}), "does not fetch"),
        (schema({"$ref": "#"}), "no text can meet it"),
        (schema({"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]}), "without an end"),
        (schema({"type": "strin"}), "strin"),
        (constraints.regex("(", of=OF), "unclosed group"),
        (constraints.regex("a(?!b)", of=OF), "look-around"),
        (constraints.lark("begin: /a/", of=OF), "start"),
        (constraints.choice(["<|im_end|>"], of=OF), "special tokens"),
    ],
)
async def test_what_cannot_be_met_is_refused_with_the_reason(constraint: Constraint, reason: str, tokens: Vocabulary) -> None:
    assert reason in await complaint(constraint, tokens)


BOMBS: dict[str, Callable[[], Constraint]] = {
    "powers of repetition": lambda: constraints.regex("(a{1,1000}){1,1000}", of=OF),
    "lengths of which all are multiples": lambda: constraints.lark(
        "start: T\nT: " + " & ".join(f"/(.{{{prime}}})*/" for prime in (2, 3, 5, 7, 11, 13, 17, 19, 23)), of=OF
    ),
    "a chain of rules deeper than the stack": lambda: constraints.lark(
        "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(15_000)) + '\na15000: "x"', of=OF
    ),
    "a chain of terminals": lambda: constraints.lark(
        "start: A0\n" + "\n".join(f"A{i}: A{i + 1}" for i in range(15_000)) + '\nA15000: "x"', of=OF
    ),
    "a chain of references": lambda: schema(
        {"$ref": "#/$defs/0", "$defs": {f"{i}": {"$ref": f"#/$defs/{i + 1}"} for i in range(7000)} | {"7000": {}}}
    ),
    "doubling terminals": lambda: constraints.lark(
        "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(60)) + '\nA60: "x"', of=OF
    ),
    "doubling references": lambda: schema(
        {"allOf": [{"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in range(4)]} for i in range(20)]}
    ),
    "many multiples": lambda: schema({"type": "integer", "multipleOf": 999_983}),
    "thousands of optional properties": lambda: schema({"properties": {f"p{i}": {"type": "string"} for i in range(5000)}}),
    "a large enumeration": lambda: schema({"enum": [f"the value {i}" for i in range(13_000)]}),
    "nested brackets": lambda: constraints.lark("start: " + "(" * 100_000 + '"a"' + ")" * 100_000, of=OF),
    "nested groups": lambda: constraints.regex("(" * 100_000 + "a" + ")" * 100_000, of=OF),
    "an ambiguous grammar": lambda: constraints.lark('start: a\na: a a | a a a | "x" | "xx" |', of=OF),
}


@pytest.mark.parametrize("name", BOMBS)
async def test_a_bomb_goes_off_within_limits(name: str, tokens: Vocabulary) -> None:
    """What compiles in time is harmless; what does not is refused in time. Either way others are served meanwhile."""
    await constraints.check(constraints.json_object(), tokens, of=OF)  # the process runs
    helper, most = _helper(), 0
    bomb = asyncio.create_task(complaint(BOMBS[name](), tokens))
    started = time.monotonic()
    assert await complaint(constraints.regex("[ab]", of=OF), tokens) == ""
    while not bomb.done():
        for process in [helper, *helper.children()]:
            try:
                most = max(most, process.memory_info().rss)
            except psutil.NoSuchProcess:
                continue
        await asyncio.sleep(0.01)
    told = await bomb
    assert time.monotonic() - started < compiling.WALL_SECONDS + 0.5, told
    assert most - helper.memory_info().rss < 300 << 20
    assert _helper().pid == helper.pid
    if not told:
        words = vocabulary(Path(tokens.path), tokens.vocab_size, tokens.stop_ids)
        started = time.thread_time()
        compiled(words, BOMBS[name]())
        assert time.thread_time() - started < compiling.CPU_SECONDS


def _helper() -> psutil.Process:
    children = psutil.Process().children()
    return next(process for process in children if "server.compiling" in process.cmdline())


@pytest.mark.parametrize("make", [constraints.regex, constraints.lark, lambda text, of: schema({"const": text})])
def test_what_is_too_long_is_refused_before_it_goes_anywhere(make: Callable[..., Constraint]) -> None:
    with pytest.raises(ApiError, match="at most 262144 are taken"):
        make("a" * (constraints.LONGEST + 1), of=OF)


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


async def test_many_options(tokens: Vocabulary) -> None:
    assert await complaint(constraints.choice([f"the option {i}" for i in range(5000)], of=OF), tokens) == ""


async def test_verdicts_are_remembered_and_shared(tokens: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Constraint] = []
    real = constraints.Checker._ask

    async def counting(self: constraints.Checker, constraint: Constraint, words: Vocabulary) -> str:
        asked.append(constraint)
        return await real(self, constraint, words)

    monkeypatch.setattr(constraints.Checker, "_ask", counting)
    good, bad = constraints.regex("[a-z]", of=OF), constraints.regex("(", of=OF)
    told = await asyncio.gather(*[complaint(constraint, tokens) for constraint in [good, bad] * 10])
    assert len(set(told)) == 2
    assert len(asked) == 2
    monkeypatch.setattr(constraints, "REMEMBERED", 1)
    await complaint(constraints.regex("[0-9]", of=OF), tokens)
    await complaint(good, tokens)
    assert len(asked) == 4


async def test_a_process_that_is_killed_is_replaced(tokens: Vocabulary) -> None:
    assert await complaint(constraints.regex("a", of=OF), tokens) == ""
    first = _helper()
    slow = asyncio.create_task(constraints.check(BOMBS["lengths of which all are multiples"](), tokens, of=OF))
    await asyncio.sleep(0.2)
    first.kill()
    with pytest.raises(ApiError) as told:
        await slow
    assert told.value.status == 503
    assert await complaint(constraints.regex("b", of=OF), tokens) == ""
    assert _helper().pid != first.pid


async def test_too_many_at_once_are_told_to_come_again(tokens: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints, "MOST_WAITING", 3)
    told = await asyncio.gather(
        *[constraints.check(constraints.regex(f"a{{{i}}}", of=OF), tokens, of=OF) for i in range(1, 9)], return_exceptions=True
    )
    refused = [error for error in told if isinstance(error, ApiError)]
    assert {error.status for error in refused} == {503}
    assert 1 <= len(refused) <= 5


async def test_nothing_is_left_when_it_is_closed(tokens: Vocabulary) -> None:
    await constraints.check(constraints.json_object(), tokens, of=OF)
    bomb = asyncio.create_task(constraints.check(BOMBS["lengths of which all are multiples"](), tokens, of=OF))
    await asyncio.sleep(0.3)
    helper = _helper()
    forks = helper.children()
    assert forks
    await constraints.close()
    with pytest.raises(ApiError, match="Try again"):
        await bomb
    assert psutil.wait_procs([helper, *forks], timeout=2)[1] == []


async def test_a_tokenizer_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    try:
        told = await complaint(constraints.regex("a", of=OF), Vocabulary(os.fspath(path), "", 512, (2,)))
    finally:
        await constraints.close()
    assert "cannot be constrained" in told


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
