"""What is refused, with which status, and which field is named."""

import asyncio
import gzip
from typing import Any

import pytest

from runtime.messages import Generate
from server.api.bodies import MAX_BODY
from tests.unit.server.house import House
from tests.waiting import HANGS_SECONDS

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
GENERATE = "/v1/generate"
TURN = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f"}}


def _named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


async def refused(house: House, path: str, body: Any, method: str = "POST") -> tuple[int, dict[str, Any], Any]:
    """Status, error and headers of the answer to `body`, which is sent as it is if it is bytes."""
    content = {"data": body} if isinstance(body, bytes) else {"json": body}
    async with house.http.request(method, path, **content) as response:
        answer = await response.json()
        assert set(answer) == {"error"}
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        return response.status, answer["error"], response.headers


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "hi"}, "messages"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "king", "content": "hi"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        (CHAT, {"messages": [{"role": "user", "content": [{"text": "hi"}]}]}, "messages[0].content[0].type"),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": []}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls[0].function"),
        (CHAT, {"messages": [TURN], "top_logprobs": 3}, "top_logprobs"),
        (CHAT, {"messages": [TURN], "top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        (CHAT, {"messages": [TURN], "max_completion_tokens": 0}, "max_completion_tokens"),
        (CHAT, {"messages": [TURN], "max_completion_tokens": 1000}, "max_completion_tokens"),
        (CHAT, {"messages": [TURN], "tools": [{"type": "function"}]}, "tools[0].function"),
        (CHAT, {"messages": [TURN], "tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools[0].type"),
        (CHAT, {"messages": [TURN], "tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        (CHAT, {"messages": [TURN], "tools": [TOOL, TOOL]}, "tools"),
        (CHAT, {"messages": [TURN], "tools": [TOOL] * 129}, "tools"),
        (CHAT, {"messages": [TURN], "tool_choice": "required"}, "tool_choice"),
        (CHAT, {"messages": [TURN], "tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
        (CHAT, {"messages": [TURN], "tools": [TOOL], "tool_choice": _named("g")}, "tool_choice"),
        (CHAT, {"messages": [TURN], "tools": [TOOL], "tool_choice": _named("f"), "guided_regex": "a"}, "guided_regex"),
        (CHAT, {"messages": [TURN], "functions": [{"name": "f"}]}, "functions"),
        (CHAT, {"messages": [TURN], "function_call": "auto"}, "function_call"),
        (CHAT, {"messages": [TURN], "modalities": ["text", "audio"]}, "modalities"),
        (CHAT, {"messages": [TURN], "audio": {"voice": "ash"}}, "audio"),
        (CHAT, {"messages": [TURN], "web_search_options": {"a": 1}}, "web_search_options"),
        (CHAT, {"messages": [TURN], "response_format": {"type": "xml"}}, "response_format.type"),
        (CHAT, {"messages": [TURN], "response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (CHAT, {"messages": [TURN], "response_format": {"type": "json_object"}, "guided_json": {}}, "response_format"),
        (CHAT, {"messages": [TURN], "continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
        (CHAT, {"messages": [TURN], "service_tier": "first class"}, "service_tier"),
        (COMPLETIONS, {}, "prompt"),
        (COMPLETIONS, {"prompt": ""}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", 1]}, "prompt"),
        (COMPLETIONS, {"prompt": [[1], 1]}, "prompt"),
        (COMPLETIONS, {"prompt": [[1, "a"]]}, "prompt[0][1]"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt"),
        (COMPLETIONS, {"prompt": [[256]]}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", ""]}, "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 129}, "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 2, "n": 65}, "prompt"),
        (COMPLETIONS, {"prompt": [256]}, "prompt"),
        (COMPLETIONS, {"prompt": [-1]}, "prompt"),
        (COMPLETIONS, {"prompt": "x" * 64}, "prompt"),
        (COMPLETIONS, {"prompt": "hi", "stop": "x" * 1001}, "stop"),
        (COMPLETIONS, {"prompt": "hi", "max_tokens": 0}, "max_tokens"),
        (COMPLETIONS, {"prompt": "hi", "max_tokens": -1}, "max_tokens"),
        (COMPLETIONS, {"prompt": "hi", "max_tokens": 63}, "max_tokens"),
        (COMPLETIONS, {"prompt": "hi", "max_tokens": 10**30}, "max_tokens"),
        (COMPLETIONS, {"prompt": "hi", "max_tokens": "9"}, "max_tokens"),
        (COMPLETIONS, {"prompt": "hi", "max_tokens": 1.5}, "max_tokens"),
        (COMPLETIONS, {"prompt": "hi", "max_tokens": True}, "max_tokens"),
        (COMPLETIONS, {"prompt": "hi", "temperature": -0.1}, "temperature"),
        (COMPLETIONS, {"prompt": "hi", "temperature": 2.1}, "temperature"),
        (COMPLETIONS, {"prompt": "hi", "temperature": "warm"}, "temperature"),
        (COMPLETIONS, {"prompt": "hi", "top_p": 0}, "top_p"),
        (COMPLETIONS, {"prompt": "hi", "top_p": 1.1}, "top_p"),
        (COMPLETIONS, {"prompt": "hi", "top_k": -2}, "top_k"),
        (COMPLETIONS, {"prompt": "hi", "min_p": 2}, "min_p"),
        (COMPLETIONS, {"prompt": "hi", "seed": 2**63}, "seed"),
        (COMPLETIONS, {"prompt": "hi", "stop": ""}, "stop"),
        (COMPLETIONS, {"prompt": "hi", "stop": ["a", ""]}, "stop[1]"),
        (COMPLETIONS, {"prompt": "hi", "stop": ["a"] * 17}, "stop"),
        (COMPLETIONS, {"prompt": "hi", "stream": "yes"}, "stream"),
        (COMPLETIONS, {"prompt": "hi", "stream_options": {"include_usage": True}}, "stream_options"),
        (COMPLETIONS, {"prompt": "hi", "n": 129}, "n"),
        (COMPLETIONS, {"prompt": "hi", "n": 0}, "n"),
        (COMPLETIONS, {"prompt": "hi", "best_of": 2}, "best_of"),
        (COMPLETIONS, {"prompt": "hi", "n": 2, "best_of": 1}, "best_of"),
        (COMPLETIONS, {"prompt": "hi", "logprobs": 21}, "logprobs"),
        (COMPLETIONS, {"prompt": "hi", "logprobs": True}, "logprobs"),
        (COMPLETIONS, {"prompt": "hi", "echo": "yes"}, "echo"),
        (COMPLETIONS, {"prompt": "hi", "suffix": "!"}, "suffix"),
        (COMPLETIONS, {"prompt": "hi", "frequency_penalty": 2.5}, "frequency_penalty"),
        (COMPLETIONS, {"prompt": "hi", "presence_penalty": -2.5}, "presence_penalty"),
        (COMPLETIONS, {"prompt": "hi", "repetition_penalty": 0}, "repetition_penalty"),
        (COMPLETIONS, {"prompt": "hi", "logit_bias": {"1": 101}}, "logit_bias[...]"),
        (COMPLETIONS, {"prompt": "hi", "logit_bias": {"a": 1}}, "logit_bias"),
        (COMPLETIONS, {"prompt": "hi", "logit_bias": {"256": 1}}, "logit_bias"),
        (COMPLETIONS, {"prompt": "hi", "stop_token_ids": [256]}, "stop_token_ids"),
        (COMPLETIONS, {"prompt": "hi", "logit_bias": {str(id): 1 for id in range(1025)}}, "logit_bias"),
        (COMPLETIONS, {"prompt": "hi", "min_tokens": -1}, "min_tokens"),
        (COMPLETIONS, {"prompt": "hi", "min_tokens": 4, "max_tokens": 3}, "min_tokens"),
        (COMPLETIONS, {"prompt": "hi", "stop_token_ids": [-1]}, "stop_token_ids[0]"),
        (COMPLETIONS, {"prompt": "hi", "stop_token_ids": [1] * 17}, "stop_token_ids"),
        (COMPLETIONS, {"prompt": "hi", "guided_json": "{"}, "guided_json"),
        (COMPLETIONS, {"prompt": "hi", "guided_json": 7}, "guided_json"),
        (COMPLETIONS, {"prompt": "hi", "guided_choice": "a"}, "guided_choice"),
        (COMPLETIONS, {"prompt": "hi", "guided_regex": "a", "structured_outputs": {"json": {}}}, "structured_outputs.json"),
        (COMPLETIONS, {"prompt": "hi", "model": 7}, "model"),
        (GENERATE, {}, "prompt"),
        (GENERATE, {"prompt": ["hi"]}, "prompt"),
        (GENERATE, {"prompt": ""}, "prompt"),
        (GENERATE, {"prompt": "hi", "max_tokens": 0}, "max_tokens"),
    ],
)
async def test_an_impossible_value_is_refused_by_name(house: House, path: str, body: Any, param: str) -> None:
    status, error, _ = await refused(house, path, body)
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert param in error["message"] or "prompt" in error["message"]


@pytest.mark.parametrize(
    "field",
    [
        {"n": 1},
        {"frequency_penalty": 0},
        {"best_of": 1},
        {"echo": False},
        {"logit_bias": {}},
        {"user": "me"},
        {"stop": []},
        {"top_k": -1},
        {"service_tier": "auto"},
        {"structured_outputs": {}},
        {"suffix": ""},
    ],
)
async def test_a_value_that_changes_nothing_is_taken(house: House, field: dict[str, Any]) -> None:
    asking = asyncio.ensure_future(house.http.post(COMPLETIONS, json={"prompt": "hi", **field}))
    await house.worker.say(await house.worker.next(Generate), "!", "stop")
    assert (await asking).status == 200


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not valid JSON"),
        (b'{"prompt": "hi"', "not valid JSON"),
        (b'{"prompt": "hi"} and more', "not valid JSON"),
        (b'{"prompt": "hi", "temperature": NaN}', "not valid JSON"),
        (b"[]", "Expected `object`"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (rb'{"prompt": "\ud800"}', "lone surrogate"),
        (rb'{"prompt": "\ud800 and more text"}', "lone surrogate"),
        (rb'{"prompt": "\udc00 and more text"}', "lone surrogate"),
        (b'{"prompt": "hi", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ],
)
async def test_a_body_that_is_no_json_object_is_refused_with_the_reason(house: House, body: bytes, says: str) -> None:
    status, error, _ = await refused(house, COMPLETIONS, body)
    assert status == 400
    assert says in error["message"]


async def test_a_body_that_is_not_encoded_as_it_says_is_refused(house: House) -> None:
    async with house.http.post(COMPLETIONS, data=b"no gzip", headers={"Content-Encoding": "gzip"}) as response:
        assert response.status == 400
        assert "error" in await response.json()


async def test_a_compressed_body_counts_as_large_as_it_is(house: House) -> None:
    body = gzip.compress(b" " * (MAX_BODY + 1))
    async with house.http.post(COMPLETIONS, data=body, headers={"Content-Encoding": "gzip"}) as response:
        assert response.status == 413


async def test_a_prompt_that_leaves_no_room_is_told_with_the_arithmetic(house: House) -> None:
    _, error, _ = await refused(house, COMPLETIONS, {"prompt": "hello", "max_tokens": 60})
    assert error["code"] == "context_length_exceeded"
    assert "5 tokens" in error["message"]
    assert "together 65" in error["message"]
    assert "at most 59" in error["message"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, GENERATE])
async def test_an_unknown_model_is_not_found(house: House, path: str) -> None:
    body = {"prompt": "hi", "messages": [TURN], "model": "gpt-9"}
    status, error, _ = await refused(house, path, body)
    assert (status, error["param"], error["code"]) == (404, "model", "model_not_found")
    assert "'tiny'" in error["message"]


async def test_a_body_over_the_limit_is_refused_with_413(house: House) -> None:
    status, error, _ = await refused(house, COMPLETIONS, b'{"prompt": "' + b"x" * MAX_BODY + b'"}')
    assert (status, error["code"]) == (413, "body_too_large")


async def test_a_large_body_under_the_limit_is_read_and_its_prompt_refused(house: House) -> None:
    status, error, _ = await refused(house, COMPLETIONS, {"prompt": "x" * 1_000_000})
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert "1000000 tokens" in error["message"]


async def test_a_full_queue_is_429_with_the_time_to_retry(house: House) -> None:
    asking = asyncio.create_task(refused(house, CHAT, {"messages": [TURN], "stream": True}))
    await house.worker.refuse(await house.worker.next(Generate))
    status, error, headers = await asking
    assert (status, error["type"], error["code"]) == (429, "rate_limit_error", "queue_full")
    assert int(headers["Retry-After"]) >= 1


async def test_without_an_engine_requests_and_readiness_are_503(house: House) -> None:
    house.engine.client = None
    house.service.patience = 0.1
    for path, method, code in [(CHAT, "POST", "model_not_ready"), ("/readyz", "GET", "engine_unavailable")]:
        status, error, headers = await refused(house, path, {"messages": [TURN]}, method)
        assert (status, error["type"], error["code"]) == (503, "server_error", code)
        assert "Retry-After" in headers
    async with house.http.get("/healthz") as response:
        assert response.status == 200


async def test_a_server_that_stops_takes_nothing_new(house: House) -> None:
    house.service.draining = True
    status, error, _ = await refused(house, CHAT, {"messages": [TURN]})
    assert status == 503
    assert "shutting down" in error["message"]


async def test_an_unknown_route_is_404_and_a_wrong_method_405(house: House) -> None:
    status, error, _ = await refused(house, "/v1/nothing", {})
    assert (status, error["code"]) == (404, "unknown_url")
    status, error, headers = await refused(house, CHAT, {}, "DELETE")
    assert (status, error["code"], headers["Allow"]) == (405, "method_not_allowed", "POST")


async def test_a_fault_of_the_server_itself_is_500_and_tells_nothing(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(text: str) -> list[int]:
        raise RuntimeError("secret")

    monkeypatch.setattr(house.text, "encode", broken)
    status, error, _ = await refused(house, COMPLETIONS, {"prompt": "hi"})
    assert (status, error["code"]) == (500, "internal_error")
    assert "secret" not in error["message"]


async def test_a_message_quotes_only_so_much_of_what_was_sent(house: House) -> None:
    for body in ({"messages": [{"role": "x" * 100_000, "content": "hi"}]}, {"messages": [TURN], "model": "x" * 100_000}):
        status, error, _ = await refused(house, CHAT, body)
        assert status in (400, 404)
        assert error["message"].endswith("xxx...")
        assert len(error["message"]) < 2000


@pytest.mark.parametrize(
    "request_", [b"POST /v1/generate HTTP/1.1\r\nContent-Type: \x01\r\n\r\n", b"\x16\x03\x01\x02\x00\r\n\r\n"]
)
async def test_what_is_no_http_is_refused_and_does_not_fill_the_log(
    house: House, caplog: pytest.LogCaptureFixture, request_: bytes
) -> None:
    async with house.http.get("/healthz") as response:
        host, port = response.url.host, response.url.port
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(request_)
    assert b" 400 " in await asyncio.wait_for(reader.readline(), HANGS_SECONDS)
    writer.close()
    assert not [record for record in caplog.records if record.name.startswith(("server", "aiohttp"))]
