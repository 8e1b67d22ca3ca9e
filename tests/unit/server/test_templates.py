"""Which of a model's chat templates lays a chat out, and what a request may say of it."""

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from runtime.bundle import Bundle, File
from runtime.messages import Generate
from tests.unit.server.house import House

TEMPLATES = {
    "tool_use": "{% for t in tools %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<{{ c.function.name }}>{% endfor %}{% endfor %}",
    "rag": "{% for d in documents %}{{ d.title }}:{{ d.text }};{% endfor %}{{ messages[-1].content }}",
    "thoughts": "{% for m in messages %}{{ m.content }}({{ m.reasoning_content }}|{{ m.thinking }});{% endfor %}",
}
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
TOOLS = {"tools": [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]}
DOCUMENTS = {"documents": [{"title": "a", "text": "b"}]}
PLAIN = "u:hi\na:"


@pytest.fixture
def bundle(tmp_path: Path, bundle: Bundle) -> Bundle:
    """The model, with three templates, of a format whose calls are known."""
    (tmp_path / "additional_chat_templates").mkdir()
    for name, source in TEMPLATES.items():
        (tmp_path / f"additional_chat_templates/{name}.jinja").write_text(source)
    more = (File(f"additional_chat_templates/{name}.jinja", name, 1) for name in TEMPLATES)
    return msgspec.structs.replace(bundle, files=(*bundle.files, *more), max_length=1024, tools="hermes")


async def refusal(answer: aiohttp.ClientResponse) -> tuple[str, str | None]:
    assert answer.status == 400
    error = (await answer.json())["error"]
    return error["message"], error["param"]


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, PLAIN),
        (TOOLS, "[look]hi"),
        (TOOLS | {"tool_choice": "none"}, PLAIN),
        ({"chat_template": "rag"} | DOCUMENTS, "a:b;hi"),
        ({"chat_template": "default"} | DOCUMENTS, PLAIN),
        ({"chat_template": None, "documents": None}, PLAIN),
    ],
    ids=["a chat", "tools", "no tools", "documents", "named", "null"],
)
async def test_the_template_is_that_of_transformers_or_the_one_that_is_named(
    house: House, fields: dict[str, Any], prompt: str
) -> None:
    asking = asyncio.ensure_future(house.http.post("/v1/chat/completions", json=HI | fields))
    request = await house.worker.next(Generate)
    await house.worker.say(request, "yes", "stop")
    assert (await asking).status == 200
    assert house.text.decode(request.prompt) == prompt
    if "tool_choice" not in fields:  # which a prompt alone does not have
        async with house.http.post("/tokenize", json=HI | fields) as told:
            assert (await told.json())["tokens"] == request.prompt


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
async def test_the_template_gets_what_was_thought_by_the_names_that_templates_know(house: House, path: str, field: str) -> None:
    call = {"function": {"name": "look", "arguments": "{}"}, "id": "c"}
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes", field: "hm"},
        {"role": "assistant", "content": None, "tool_calls": [call], field: "look?"},
        {"role": "tool", "content": "a tree", "tool_call_id": "c"},
    ]
    asking = asyncio.ensure_future(house.http.post(path, json={"messages": turns, "chat_template": "thoughts"}))
    if path == "/v1/chat/completions":
        request = await house.worker.next(Generate)
        await house.worker.say(request, "yes", "stop")
    answer = await asking
    assert answer.status == 200, await answer.text()
    tokens = request.prompt if path == "/v1/chat/completions" else (await answer.json())["tokens"]
    prompt = house.text.decode(tokens)
    assert prompt.startswith("hi(|);yes(hm|hm);")
    assert "(look?|look?);" in prompt


async def test_a_template_that_is_not_the_models_is_refused(house: House) -> None:
    for path in ("/v1/chat/completions", "/tokenize"):
        async with house.http.post(path, json=HI | {"chat_template": "{{ messages }}"}) as answer:
            message, param = await refusal(answer)
        assert "no chat template called '{{ messages }}'; it has default, rag, thoughts, tool_use" in message
        assert param == "chat_template"


async def test_a_template_in_the_place_of_a_name_is_not_repeated_whole(house: House) -> None:
    async with house.http.post("/v1/chat/completions", json=HI | {"chat_template": "{{ messages }}" * 10_000}) as answer:
        message, param = await refusal(answer)
    assert message.startswith("this model has no chat template called '{{ messages }}{{ messages }}")
    assert "...'; it has default, " in message
    assert (len(message) < 300, param) == (True, "chat_template")


async def test_a_prompt_has_no_template(house: House) -> None:
    async with house.http.post("/tokenize", json={"prompt": "hi", "chat_template": "rag"}) as answer:
        message, param = await refusal(answer)
    assert (message, param) == ("'chat_template' is only allowed together with messages.", "chat_template")
