"""Calls of tools: written, tokenized, decoded and read again; what the grammars accept is what the parsers read."""

import json
import random
import shutil
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from export.recipe import Build, of, read
from export.tokenizer import TextSide
from export.tools import detect, named
from runtime import bundle
from runtime.bundle import ToolFormat
from runtime.template import ChatTemplate, Shape
from runtime.text import Text
from server.tools import (
    Arguments,
    Call,
    CallEnded,
    CallStarted,
    Content,
    ConversationError,
    Event,
    Format,
    Tool,
    format_of,
    prepare,
)
from server.tools.format import MOST_CALLS
from tests.pace import LINEAR, growth

EOS = "</s>"
SPECIAL: dict[str, list[str]] = {
    "hermes": [],
    "hermes, special": ["<tool_call>", "</tool_call>"],
    "llama3": ["<|python_tag|>"],
    "mistral": ["[TOOL_CALLS]"],
    "mistral, newer": ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
    "phi": ["<|tool_call|>", "<|/tool_call|>"],
    "phi, without an end": ["<|tool_call|>"],
    "phi, as text": [],
}
"""The models that are stood in for, by their special tokens."""
CORPUS = ['{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}} <tool_call> [TOOL_CALLS] the answer é 你'] * 3


@cache
def text_side(model: str) -> tuple[Text, LLTokenizer]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, show_progress=False, initial_alphabet=alphabet, special_tokens=[EOS])
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL[model]])
    return Text(tokenizer), LLTokenizer(tokenizer.to_str(), eos_token=tokenizer.token_to_id(EOS))


def made(model: str) -> Format:
    """The format, bound to the model's tokenizer."""
    name: Any = model.partition(",")[0]
    return format_of(name, text_side(model)[0].special_id)


def read_events(format: Format, pieces: Sequence[str], names: Sequence[str] | None = None) -> list[Event]:
    """All events of an answer; neighbours of a kind as one, for where they are cut is not what is asked."""
    parser = format.parser(names)
    events: list[Event] = []
    for event in [*(event for piece in pieces for event in parser.feed(piece)), *parser.finish()]:
        last = events[-1] if events else None
        if isinstance(event, Content) and isinstance(last, Content):
            events[-1] = Content(last.text + event.text)
        elif isinstance(event, Arguments) and isinstance(last, Arguments) and event.index == last.index:
            events[-1] = Arguments(last.index, last.text + event.text)
        else:
            events.append(event)
    return events


def events_of(calls: Sequence[Call]) -> list[Event]:
    """What whole calls are read as."""
    return [
        event
        for index, call in enumerate(calls)
        for event in (CallStarted(index, call.name), Arguments(index, call.arguments), CallEnded(index))
    ]


def content_of(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Content))


def pieces_of(text: str, chooser: random.Random) -> list[str]:
    """`text`, cut anywhere."""
    cuts = sorted(chooser.choices(range(len(text) + 1), k=chooser.randrange(len(text) + 2)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


WORDS = st.text('abc éß你🙂"\\{}[]<>/_;:,\n', max_size=12) | st.sampled_from(
    ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|tool_call|>", "<|/tool_call|>", "functools[", "<|python_tag|>"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.builds(
    lambda value, indent, ascii_: json.dumps(value, indent=indent, ensure_ascii=ascii_),
    st.dictionaries(WORDS, JSON, max_size=4),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
)
MODELS = st.sampled_from(list(SPECIAL))
CALLS = st.lists(st.builds(Call, st.from_regex("[a-zA-Z0-9_-]{1,12}", fullmatch=True), ARGUMENTS), min_size=1, max_size=3)


@given(model=MODELS, calls=CALLS, chooser=st.randoms())
def test_calls_are_read_as_they_were_written(model: str, calls: list[Call], chooser: random.Random) -> None:
    format = made(model)
    assert read_events(format, pieces_of(format.render(calls), chooser)) == events_of(calls)


@given(model=MODELS, calls=CALLS)
def test_calls_are_read_from_their_tokens(model: str, calls: list[Call]) -> None:
    format, (text, _) = made(model), text_side(model)
    stream = text.stream(keep=format.special)
    tokens = text.encode(format.render(calls), special=False)
    pieces = [*(stream.push([token]) for token in tokens), stream.finish()]
    assert read_events(format, pieces) == events_of(calls)


@given(model=MODELS, calls=CALLS, chooser=st.randoms())
def test_an_answer_that_breaks_off_gives_what_there_was(model: str, calls: list[Call], chooser: random.Random) -> None:
    format = made(model)
    whole = format.render(calls)
    text = whole[: chooser.randrange(len(whole))]
    events = read_events(format, pieces_of(text, chooser))
    assert text.endswith(content_of(events))
    for call, event in zip(calls, [event for event in events if isinstance(event, CallStarted)], strict=False):
        assert event.name == call.name
        given = "".join(more.text for more in events if isinstance(more, Arguments) and more.index == event.index)
        assert call.arguments.startswith(given)
        assert CallEnded(event.index, complete=given == call.arguments) in events


@given(model=MODELS, words=st.lists(WORDS), chooser=st.randoms())
def test_text_that_calls_nothing_stays_as_it_is(model: str, words: list[str], chooser: random.Random) -> None:
    text = "".join(words)
    assert read_events(made(model), pieces_of(text, chooser)) == ([Content(text)] if text else [])


@given(model=MODELS, calls=CALLS, chooser=st.randoms())
def test_damage_is_read_the_same_however_the_text_is_cut(model: str, calls: list[Call], chooser: random.Random) -> None:
    format = made(model)
    text = list("Well. " + format.render(calls) + " Done.")
    for _ in range(3):
        text[chooser.randrange(len(text))] = chooser.choice(["", '"', "{", "}", "x", ",", "<tool_call>", "\\"])
    answer = "".join(text)
    assert read_events(format, pieces_of(answer, chooser)) == read_events(format, [answer])


A, B = Call("a", '{"x": 1}'), Call("b", "{}")
CALL_A = format_of("hermes").render([A])


@pytest.mark.parametrize(
    ("name", "answer", "expected"),
    [
        ("hermes", f"Look:\n{CALL_A}\nDone.\n", [Content("Look:"), *events_of([A]), Content("\nDone.\n")]),
        ("hermes", f" \n{CALL_A}\n", events_of([A])),
        ("hermes", '<tool_call>{"arguments": {"x": 1}, "name": "a"}</tool_call>', events_of([A])),
        ("hermes", '<tool_call>{"name": "a", "arguments": "{\\"x\\": 1}"}</tool_call>', events_of([A])),
        ("hermes", '<tool_call>{"name": "b"}</tool_call>', events_of([B])),
        ("hermes", '<tool_call>{"name": "a", "arguments": {"x": 1}}', events_of([A])),
        ("hermes", '<tool_call>{"name": "a", "arguments": {"x": 1}</tool_call>', events_of([A])),
        ("hermes", '<tool_call>{"name": "b", "arguments": null}</tool_call>', events_of([B])),
        ("hermes", '<tool_call>{"name": "a", "arguments": [1]}</tool_call>', None),
        ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>', None),
        ("hermes", "<tool_call>\nnothing\n</tool_call>", None),
        ("hermes", "I write <tool_call> around calls.", None),
        ("llama3", '{"name": "a", "parameters": {"x": 1}}', events_of([A])),
        ("llama3", '<|python_tag|>{"type": "function", "name": "a", "parameters": {"x": 1}}', events_of([A])),
        ("llama3", '{"name": "a", "parameters": {"x": 1}}\n{"name": "b", "parameters": {}};', events_of([A, B])),
        ("llama3", '{"name": "a", "parameters": {"x": 1}}; that is it', [*events_of([A]), Content("; that is it")]),
        ("llama3", '{"name": "someone", "parameters": {"x": 1}}', None),
        ("llama3", '{"answer": "{}", "name": "a", "parameters": {}}', None),
        ("llama3", 'As JSON: {"name": "a", "parameters": {"x": 1}}', None),
        ("llama3", "<|python_tag|>brave_search.call(query=1)", None),
        ("mistral", '[TOOL_CALLS] [{"name": "a", "arguments": {"x": 1}, "id": "012345678"}]', events_of([A])),
        ("mistral", '[TOOL_CALLS]a{"x": 1}[TOOL_CALLS]b[CALL_ID]012345678[ARGS]{}', events_of([A, B])),
        ("mistral", '[TOOL_CALLS][{"name": "a", "arguments": {"x": 1}}, no]', [*events_of([A]), Content(", no]")]),
        ("mistral", "[TOOL_CALLS][]", None),
        ("mistral", "[TOOL_CALLS]a[ARGS]x", None),
        ("phi", 'functools[{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": {}}]', events_of([A, B])),
        ("phi", '<|tool_call|>{"name": "a", "arguments": {"x": 1}}<|/tool_call|>', events_of([A])),
        ("phi", "import functools\nfunctools[0]", None),
    ],
)
def test_what_models_also_write(name: ToolFormat, answer: str, expected: list[Event] | None) -> None:
    """None: it is text."""
    for pieces in ([answer], list(answer)):
        assert read_events(format_of(name), pieces, ["a", "b"]) == ([Content(answer)] if expected is None else expected)


def test_a_call_is_told_as_it_comes() -> None:
    parser = format_of("hermes").parser()
    assert parser.feed('Hm. <tool_call>\n{"name": "a", "argu') == [Content("Hm.")]
    assert parser.feed('ments": {"x": "1') == [CallStarted(0, "a"), Arguments(0, '{"x": "1')]
    assert parser.feed('2", "y') == [Arguments(0, '2", "y')]
    assert parser.calls == 1
    assert parser.feed('": tr') == [Arguments(0, '": ')]
    assert parser.feed("ue}") == [Arguments(0, "true}"), CallEnded(0)]
    assert parser.feed("}\n</tool_call>") == []
    assert parser.finish() == []


def test_arguments_that_are_no_json_end_the_call() -> None:
    assert read_events(format_of("hermes"), ['<tool_call>{"name": "a", "arguments": {"x": oh}}']) == [
        CallStarted(0, "a"),
        Arguments(0, '{"x": '),
        CallEnded(0, complete=False),
        Content("oh}}"),
    ]


# Grammars --------------------------------------------------------------------------------------------------------------

TREE = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/Tree"}, {"type": "null"}]}},
}
TOOLS = [
    Tool("get", "Gets.", {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}),
    Tool(
        "get_all", None, {"type": "object", "properties": {"n": {"type": "integer", "minimum": 3, "maximum": 14}}}, strict=True
    ),
    Tool("plant", None, {"$ref": "#/$defs/Tree", "$defs": {"Tree": TREE | {"required": ["v"], "additionalProperties": False}}}),
    Tool("nest", None, {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}}}),
    Tool("pick-1", None, {"type": "object", "properties": {"of": {"enum": ["a", 1, None, "}}\n</tool"]}}, "required": ["of"]}),
    Tool("either", None, {"anyOf": [{"required": [key], "properties": {key: {"type": "boolean"}}} for key in ("a", "b")]}),
    Tool("free", None, {"type": "object"}),
    Tool("any", None, {}),
    Tool("now"),
]
SCHEMAS = {tool.name: tool.parameters if tool.parameters is not None else {"maxProperties": 0} for tool in TOOLS}
VALID = [
    Call("get", '{"city": "Pa\\"ris"}'),
    Call("get_all", '{"n": 14}'),
    Call("plant", '{"v": 1, "next": {"v": -2, "next": null}}'),
    Call("nest", '{"kids": [{"kids": []}, {}]}'),
    Call("pick-1", '{"of": "}}\\n</tool"}'),
    Call("either", '{"b": true}'),
    Call("free", '{"x": [1.5, {"y": null}]}'),
    Call("any", "{}"),
    Call("now", "{}"),
]
INVALID = [
    Call("get", "{}"),
    Call("get", '{"city": 1}'),
    Call("get", '{"city": "x", "country": "y"}'),
    Call("get_all", '{"n": 15}'),
    Call("plant", '{"v": 1, "next": {}}'),
    Call("pick-1", '{"of": 2}'),
    Call("now", '{"x": 1}'),
    Call("ge", '{"city": "x"}'),
    Call("any", "[]"),
]


def matcher(model: str, **options: Any) -> LLMatcher:
    made_of = made(model).grammar(TOOLS, **options)
    matcher = LLMatcher(text_side(model)[1], made_of)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def accepted(model: str, answer: str, **options: Any) -> bool:
    """Whether the whole answer, and nothing that begins with it only, is of the grammar."""
    constraint, tokens = matcher(model, **options), text_side(model)[0].encode(answer, special=False)
    return constraint.try_consume_tokens(tokens) == len(tokens) and constraint.is_accepting()


@pytest.mark.parametrize("model", SPECIAL)
def test_a_grammar_takes_calls_and_nothing_else(model: str) -> None:
    format = made(model)
    for call in VALID:
        assert accepted(model, format.render([call])), call
        assert accepted(model, format.render([call]), name=call.name), call
    assert accepted(model, format.render(VALID))
    assert not accepted(model, format.render(VALID[:2]), parallel=False)
    assert not accepted(model, format.render([VALID[0]]), name="now")
    assert not accepted(model, format.render(VALID[:1] * 2), name="get")
    for call in INVALID:
        assert not accepted(model, format.render([call])), call
    for text in (
        "",
        "Hello",
        " " + format.render(VALID[:1]),
        format.render(VALID[:1]) + " and so on",
        format.render(VALID[:1])[:-1],
    ):
        assert not accepted(model, text), text


@pytest.mark.parametrize("model", SPECIAL)
def test_where_no_call_is_required_those_that_are_made_are_valid(model: str) -> None:
    format = made(model)
    for parallel in (True, False):
        for answer in ("", "Hello.", 'As JSON: {"x": [1]}', "a <tool and [TOOL"):
            assert accepted(model, answer, required=False, parallel=parallel), answer
        for call in VALID:
            assert accepted(model, format.render([call]), required=False, parallel=parallel), call
        for call in INVALID:
            assert not accepted(model, format.render([call]), required=False, parallel=parallel), call
        assert accepted(model, format.render(VALID[:2]), required=False, parallel=parallel) == parallel
    if model != "llama3":  # which has no mark in front of a call, so that behind a text it is text
        assert accepted(model, "Well.\n" + format.render(VALID[:1]), required=False)
        assert not accepted(model, "Well.\n" + format.render(INVALID[:1]), required=False)


def test_there_is_an_end_to_the_calls_of_an_answer() -> None:
    format = made("hermes")
    assert accepted("hermes", format.render(VALID[:1] * MOST_CALLS))
    assert not accepted("hermes", format.render(VALID[:1] * (MOST_CALLS + 1)))


def walk(constraint: LLMatcher, text: Text, end: int, chooser: random.Random) -> list[int]:
    """An answer that is drawn from the grammar's masks; from a certain length on it takes the way out."""
    tokens: list[int] = []
    while not constraint.is_stopped():
        mask = int.from_bytes(constraint.compute_bitmask(), "little")
        allowed = [id for id in range(mask.bit_length()) if mask >> id & 1]
        if end in allowed and (len(allowed) == 1 or len(tokens) > 60 or chooser.random() < 0.3):
            break
        chosen = chooser.choice(allowed)
        if len(tokens) > 60:
            ways_out = [id for id in allowed if text.token_text(id) in ("}", "]", '"', "null", "n")]
            chosen = chooser.choice(ways_out or allowed)
        tokens.append(chosen)
        assert constraint.consume_token(chosen)
        assert len(tokens) < 2000
    return tokens


@pytest.mark.parametrize("model", SPECIAL)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), parallel=st.booleans(), name=st.none() | st.sampled_from(list(SCHEMAS)))
def test_whatever_a_grammar_lets_through_is_read_as_valid_calls(
    model: str, seed: int, parallel: bool, name: str | None
) -> None:
    format, (text, _) = made(model), text_side(model)
    end = text.special_id(EOS)
    assert end is not None
    tokens = walk(matcher(model, parallel=parallel, name=name), text, end, random.Random(seed))
    stream = text.stream(keep=format.special)
    events = read_events(format, [stream.push(tokens), stream.finish()])
    calls = [event for event in events if isinstance(event, CallStarted)]
    assert 1 <= len(calls) <= (99 if parallel and name is None else 1)
    assert not content_of(events)
    for call in calls:
        assert name in (None, call.name)
        assert CallEnded(call.index) in events
        (arguments,) = [event.text for event in events if isinstance(event, Arguments) and event.index == call.index]
        jsonschema.validate(json.loads(arguments), SCHEMAS[call.name])


def test_what_a_grammar_cannot_say_is_left_out_unless_the_tool_is_strict() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}}}
    tokenizer = text_side("hermes")[1]
    lenient, strict = (format_of("hermes").grammar([Tool("f", None, schema, strict)]) for strict in (None, True))
    assert not LLMatcher.validate_grammar_with_warnings(lenient, tokenizer)[0]
    failed, (message,) = LLMatcher.validate_grammar_with_warnings(strict, tokenizer)
    assert failed
    assert "uniqueItems" in message


@pytest.mark.parametrize(
    ("schema", "closed"),
    [
        ({"properties": {"x": {}}}, True),
        ({"properties": {"x": {}}, "required": ["x"]}, True),
        ({"properties": {"x": {}}, "required": ["y"]}, False),
        ({"properties": {"x": {}}, "additionalProperties": {"type": "string"}}, False),
        ({"properties": {"x": {}}, "anyOf": [{"required": ["y"]}]}, False),
        ({"properties": {}}, False),
        ({"properties": [1], "required": 2}, False),
    ],
)
def test_a_tool_takes_no_arguments_that_it_does_not_have(schema: dict[str, Any], closed: bool) -> None:
    grammar = format_of("hermes").grammar([Tool("f", None, schema)])
    assert ('"additionalProperties": false' in grammar) == closed
    assert "x-guidance" not in schema


@pytest.mark.parametrize(("tools", "name"), [(TOOLS, "absent"), ([], None)])
def test_a_grammar_needs_a_tool(tools: list[Tool], name: str | None) -> None:
    with pytest.raises(ValueError, match="no tool"):
        format_of("hermes").grammar(tools, name=name)


# Conversations ---------------------------------------------------------------------------------------------------------

WEATHER = Tool("get_weather", "Tells the weather.", {"type": "object", "properties": {"city": {"type": "string"}}})
DESCRIBED = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Tells the weather.", "parameters": WEATHER.parameters},
}


def call_of(id: str, city: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "get_weather", "arguments": json.dumps({"city": city})}}


CHAT: list[dict[str, Any]] = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Paris?"}, {"type": "text", "text": "Rome?"}]},
    {"role": "assistant", "content": None, "tool_calls": [call_of("call_1", "Paris"), call_of("call_2", "Rome")]},
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    {"role": "tool", "tool_call_id": "call_2", "content": '{"rain": 3}'},
    {"role": "assistant", "content": "Go to Paris.", "tool_calls": None},
    {"role": "user", "content": "Thanks."},
]
KNOWS_TOOLS = Shape(tools="variable", calls=True, results=True)


def test_a_template_that_knows_tools_gets_them_as_they_are() -> None:
    messages, tools = prepare(CHAT, [WEATHER], format_of("hermes"), KNOWS_TOOLS)
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}, "id": "call_1"}
    assert tools == [DESCRIBED]
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert messages[1] == {"role": "user", "content": "Paris?\nRome?"}
    assert messages[2]["content"] == ""
    assert messages[2]["tool_calls"][0] == call
    assert messages[3] == {"role": "tool", "name": "get_weather", "tool_call_id": "call_1", "content": "sunny"}
    assert messages[5] == {"role": "assistant", "content": "Go to Paris."}
    assert prepare(CHAT[:2], [], format_of("hermes"), KNOWS_TOOLS)[1] is None


def test_a_chat_without_tools_stays_as_it_is() -> None:
    plain = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user", "user")]
    for format in (format_of(None), format_of("mistral")):
        assert prepare(plain, [], format, Shape()) == (plain, None)


def test_a_template_that_knows_no_tools_is_told_of_them_in_the_system_message() -> None:
    messages, tools = prepare(CHAT, [WEATHER], format_of(None), Shape())
    assert tools is None
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert messages[0]["content"].startswith("Be brief.\n\n")
    assert json.dumps(DESCRIBED) in messages[0]["content"]
    calls = [Call("get_weather", '{"city": "Paris"}'), Call("get_weather", '{"city": "Rome"}')]
    assert read_events(format_of(None), [messages[2]["content"]]) == events_of(calls)
    assert messages[3]["content"] == (
        '<tool_response>\n{"name": "get_weather", "content": "sunny"}\n</tool_response>\n'
        '<tool_response>\n{"name": "get_weather", "content": {"rain": 3}}\n</tool_response>'
    )
    assert all(set(message) == {"role", "content"} for message in messages)
    (told, asked), _ = prepare(CHAT[1:2], [WEATHER], format_of(None), Shape())
    assert told == {"role": "system", "content": format_of(None).describe([WEATHER])}
    assert asked["content"] == "Paris?\nRome?"


def test_a_template_without_a_system_message_is_told_in_the_first_turn() -> None:
    (asked,), _ = prepare(CHAT[1:2], [WEATHER], format_of(None), Shape(system=False))
    assert asked["role"] == "user"
    assert asked["content"].startswith("You may call functions")
    assert asked["content"].endswith("\n\nParis?\nRome?")


def test_a_question_right_behind_a_result_is_of_the_same_turn() -> None:
    messages, _ = prepare([*CHAT[1:5], {"role": "user", "content": "And?"}], [], format_of(None), Shape())
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[-1]["content"].endswith("</tool_response>\nAnd?")


def test_one_call_a_turn_where_templates_take_no_more() -> None:
    messages, _ = prepare(CHAT, [WEATHER], format_of("llama3"), KNOWS_TOOLS)
    assert [message["role"] for message in messages[2:6]] == ["assistant", "tool", "assistant", "tool"]
    assert [len(messages[at]["tool_calls"]) for at in (2, 4)] == [1, 1]
    assert [messages[at]["content"] for at in (3, 5)] == ["sunny", '{"rain": 3}']


@pytest.mark.parametrize("id", [{}, {"id": None}, {"id": "same"}])
def test_each_result_stands_behind_one_call_and_without_ids_in_their_order(id: dict[str, Any]) -> None:
    calls = [{"type": "function", "function": {"name": "get_weather", "arguments": "{}"}} | id] * 3
    of = {"tool_call_id": "same"} if id.get("id") else {}
    results = [{"role": "tool", "content": str(index)} | of for index in range(3)]
    chat: list[dict[str, Any]] = [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "nobody's", "content": "lost"},
        *results,
    ]
    messages, _ = prepare(chat, [], format_of("llama3"), KNOWS_TOOLS)
    assert [message["role"] for message in messages] == ["assistant", "tool"] * 3 + ["tool"]
    assert [message["content"] for message in messages if message["role"] == "tool"] == ["0", "1", "2", "lost"]


def many(count: int) -> list[dict[str, Any]]:
    """A turn of `count` calls, whose results come in the opposite order."""
    calls = [call_of(f"call_{index}", "Rome") for index in range(count)]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "x" * 100} for call in reversed(calls)]
    return [{"role": "assistant", "content": "", "tool_calls": calls}, *results]


@pytest.mark.parametrize(("name", "shape"), [("llama3", KNOWS_TOOLS), (None, Shape())])
def test_the_time_grows_as_the_turns_do(name: ToolFormat | None, shape: Shape) -> None:
    assert growth(lambda count: partial(prepare, many(count), [], format_of(name), shape), 2_000) < LINEAR


DEEP = "[" * 100_000


def test_what_is_nested_too_deeply_is_the_conversations_fault() -> None:
    call = {"id": "x", "function": {"name": "get_weather", "arguments": DEEP}}
    with pytest.raises(ConversationError, match="'get_weather'"):
        prepare([{"role": "assistant", "content": None, "tool_calls": [call]}], [], format_of("hermes"), KNOWS_TOOLS)
    (result,), _ = prepare([{"role": "tool", "tool_call_id": "x", "content": DEEP}], [], format_of(None), Shape())
    assert json.dumps({"content": DEEP}) in result["content"], "it is told as the text that it is"
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"items": schema}
    deep = Tool("get_weather", None, {"properties": {"a": schema}})
    for ask in (
        lambda: format_of("hermes").grammar([deep]),
        lambda: format_of("hermes").describe([deep]),
        lambda: prepare(CHAT, [deep], format_of(None), Shape())[0],
        lambda: prepare(CHAT, [deep], format_of("phi"), Shape(tools="system message", results=True))[0],
    ):
        with pytest.raises(ConversationError, match="nested too deeply"):
            ask()


def test_a_call_without_an_id_is_no_fault_of_mistrals() -> None:
    call = {"id": None, "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    (turn,), _ = prepare([{"role": "assistant", "content": "", "tool_calls": [call]}], [], format_of("mistral"), KNOWS_TOOLS)
    assert "id" not in turn["tool_calls"][0]


def test_mistrals_templates_get_ids_of_nine_characters() -> None:
    messages, _ = prepare(CHAT, [WEATHER], format_of("mistral"), KNOWS_TOOLS)
    ids = [call["id"] for call in messages[2]["tool_calls"]]
    assert ids == [message["tool_call_id"] for message in messages[3:5]]
    assert len(set(ids)) == 2
    assert all(len(id) == 9 and id.isalnum() for id in ids)
    own, _ = prepare([{**CHAT[2], "tool_calls": [call_of("a1B2c3D4e", "Rome")]}], [], format_of("mistral"), KNOWS_TOOLS)
    assert own[0]["tool_calls"][0]["id"] == "a1B2c3D4e"


def test_phis_tools_are_in_the_system_message() -> None:
    shape = Shape(tools="system message", results=True)
    for chat in (CHAT, CHAT[1:]):
        messages, tools = prepare(chat, [WEATHER], format_of("phi"), shape)
        assert tools is None
        assert json.loads(messages[0]["tools"]) == [DESCRIBED["function"]]
    assert messages[2]["content"].startswith('<|tool_call|>[{"name": "get_weather"')
    assert messages[3]["role"] == "tool"


def test_arguments_come_as_the_template_wants_them() -> None:
    shape = Shape(tools="variable", calls=True, results=True, arguments="text", parts=True)
    messages, _ = prepare(CHAT, [WEATHER], format_of("hermes"), shape)
    assert messages[2]["tool_calls"][0]["function"]["arguments"] == '{"city": "Paris"}'
    assert messages[2]["content"] == []
    assert messages[1]["content"] == [{"type": "text", "text": "Paris?\nRome?"}]


@pytest.mark.parametrize("arguments", ["{", "[]", "1"])
def test_arguments_that_are_no_object_are_refused(arguments: str) -> None:
    call = {"id": "x", "function": {"name": "get_weather", "arguments": arguments}}
    chat = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    with pytest.raises(ConversationError, match="'get_weather'"):
        prepare(chat, [WEATHER], format_of("hermes"), KNOWS_TOOLS)


# Templates of each family, in short ------------------------------------------------------------------------------------

QWEN = """{%- if tools %}{{- '<|im_start|>system\n# Tools\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{{- '\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}{%- endif %}
{%- for message in messages %}{{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\n' }}
{%- if message.role == 'tool' %}{{- '<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- else %}{{- message.content }}{%- endif %}
{%- for tool_call in message.tool_calls %}{%- set tool_call = tool_call.function %}
{{- '\n<tool_call>\n{"name": "' + tool_call.name + '", "arguments": ' }}
{{- (tool_call.arguments | tojson) + '}\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
LLAMA = """{{- bos_token }}{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if tools is not none %}
{{- 'Environment: ipython\nRespond in the format {"name": function name, "parameters": ...}.\n' }}
{%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}{%- endif %}
{%- for message in messages %}
{%- if 'tool_calls' in message %}
    {%- if message.tool_calls | length != 1 %}{{- raise_exception('single tool-calls only') }}{%- endif %}
    {%- set call = message.tool_calls[0].function %}
    {{- 'assistant: {"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
{%- elif message.role == 'tool' or message.role == 'ipython' %}{{- 'ipython: ' + (message.content | tojson) + '<|eot_id|>' }}
{%- else %}{{- message.role + ': ' + message.content | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}"""
MISTRAL = """{{- bos_token }}{%- for message in messages %}
{%- if message.role == 'user' %}
    {%- if tools is not none and loop.last %}{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}
    {{- '[INST]' + message.content + '[/INST]' }}
{%- elif message.tool_calls is defined %}{{- '[TOOL_CALLS][' }}
    {%- for call in message.tool_calls %}
        {%- if call.id | length != 9 %}{{- raise_exception('ids have nine characters') }}{%- endif %}
        {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}{%- if not loop.last %}{{- ', ' }}{%- endif %}
    {%- endfor %}{{- ']' + eos_token }}
{%- elif message.role == 'tool' %}{{- '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}
{%- else %}{{- message.content + eos_token }}{%- endif %}{%- endfor %}"""
PHI = """{% for message in messages %}
{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}
{{ '<|system|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|><|end|>' }}{% else %}
{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
PLAIN = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
STRICT = """{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate') }}{% endif %}
{{ message['role'] + ': ' + message['content'] | trim + '\n' }}{% endfor %}"""
XML = QWEN.replace('{"name": <function-name>', "<function=name><parameter=")
FAMILIES: dict[str, tuple[str, str, ToolFormat | None]] = {
    "qwen": (QWEN, "hermes", "hermes"),
    "llama": (LLAMA, "llama3", "llama3"),
    "mistral": (MISTRAL, "mistral", "mistral"),
    "phi": (PHI, "phi", "phi"),
    "phi without its tokens": (PHI, "hermes", None),
    "plain": (PLAIN, "hermes", None),
    "strict": (STRICT, "hermes", None),
    "xml": (XML, "hermes", None),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chat_template_shows_how_its_model_writes_calls(family: str) -> None:
    source, model, expected = FAMILIES[family]
    tokenizer = Tokenizer(models.WordLevel({token: id for id, token in enumerate(["x", *SPECIAL[model]])}, "x"))
    assert detect(TextSide(tokenizer, {"default": source}, {}, ())) == expected
    assert detect(TextSide(tokenizer, {}, {}, ())) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_with_tools_works_with_any_template(family: str) -> None:
    source, _, name = FAMILIES[family]
    template = ChatTemplate(source, most=10_000, tokens={"bos_token": "<s>", "eos_token": "</s>"})
    chat = CHAT if template.shape.system and family != "mistral" else CHAT[1:]
    messages, tools = prepare(chat, [WEATHER], format_of(name), template.shape)
    prompt = template.render(messages, tools=tools)
    places = [prompt.find(words) for words in ("Rome?", '"Paris"', '{"city": "Rome"}', "rain", "Go to Paris.", "Thanks.")]
    assert -1 not in places
    assert places == sorted(places) or family == "llama"
    assert prompt.count("Tells the weather.") == 1
    assert prompt.count("sunny") == 1


def test_a_recipe_may_say_how_a_model_writes_calls(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\ntools = "phi"\n[model]\npath = "here"\n')
    assert read(path).tools == "phi"
    assert of("org/model", None, None, (Build(),), "none").tools == "none"
    assert (named("phi"), named("none")) == ("phi", None)


def test_a_bundle_says_how_its_model_writes_calls(tiny_model: Path, tmp_path: Path) -> None:
    from tests import tiny  # torch takes seconds to import, and the other tests do without

    model = tmp_path / "tiny-llama"
    shutil.copytree(tiny_model, model)
    (model / "chat_template.jinja").write_text(QWEN)
    recipe = tiny.recipe(model, Build(precision="fp32"))
    with tiny.tracing_once():
        for tools, expected in ((None, "hermes"), ("llama3", "llama3"), ("none", None)):
            named_so = msgspec.structs.replace(recipe, tools=tools)
            folder = tiny.exporting(tmp_path / "engines", verify=False).run(named_so)
            assert bundle.read(folder).tools == expected


def test_special_tokens_that_are_kept_are_text() -> None:
    text, _ = text_side("mistral, newer")
    answer = "Hi[TOOL_CALLS]f[ARGS]{}</s>"
    tokens = text.encode(answer, special=False)
    for keep, expected in (((), "Hif{}"), (format_of("mistral").special, "Hi[TOOL_CALLS]f[ARGS]{}")):
        stream = text.stream(keep=keep)
        assert "".join(stream.push([token]) for token in tokens) + stream.finish() == expected
    assert text.special_id("[ARGS]") is not None
    assert text.special_id("Hi") is None
    assert text.special_id("[NONE]") is None
