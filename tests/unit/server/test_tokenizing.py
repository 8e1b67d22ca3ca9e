"""Texts as tokens and back, by vLLM's routes."""

from typing import Any

import msgspec
import pytest

from tests.unit.server.house import House

TURN = {"role": "user", "content": "hi"}


async def ask(house: House, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    async with house.http.post(path, json=body) as response:
        return response.status, await response.json()


async def test_a_prompt_is_told_in_tokens(house: House) -> None:
    status, answer = await ask(house, "/tokenize", {"prompt": "hé", "return_token_strs": True})
    assert status == 200
    assert answer == {
        "count": 3,
        "max_model_len": 64,
        "tokens": house.text.encode("hé"),
        "token_strs": ["h", "�", "�"],
    }
    assert house.worker.received.empty()


async def test_a_chat_is_told_in_tokens(house: House) -> None:
    status, answer = await ask(house, "/tokenize", {"model": "tiny", "messages": [TURN], "add_special_tokens": False})
    assert status == 200
    assert answer["tokens"] == house.text.encode("u:hi\na:")
    assert answer["token_strs"] is None


async def test_tokens_are_told_as_text(house: House) -> None:
    text = "hé " * 10_000
    status, answer = await ask(house, "/detokenize", {"tokens": house.text.encode(text)})
    assert (status, answer) == (200, {"prompt": text})


async def test_no_tokens_are_no_text(house: House) -> None:
    assert await ask(house, "/detokenize", {"tokens": []}) == (200, {"prompt": ""})
    status, answer = await ask(house, "/tokenize", {"prompt": ""})
    assert (status, answer["count"]) == (200, 0)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "hi", "messages": [TURN]}, "prompt"),
        ("/tokenize", {"prompt": 7}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "king", "content": "hi"}]}, "messages[0].role"),
        ("/tokenize", {"messages": [TURN], "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"prompt": "hi", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"prompt": "hi", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        (
            "/tokenize",
            {"messages": [TURN], "add_generation_prompt": True, "continue_final_message": True},
            "add_generation_prompt",
        ),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "hi"}, "tokens"),
        ("/detokenize", {"tokens": [256]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [0] * (2**17 + 1)}, "tokens"),
    ],
)
async def test_an_impossible_value_is_refused_by_name(house: House, path: str, body: Any, param: str) -> None:
    status, answer = await ask(house, path, body)
    assert (status, answer["error"]["param"]) == (400, param)


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "hi"}), ("/detokenize", {"tokens": []})])
async def test_an_unknown_model_is_not_found(house: House, path: str, body: Any) -> None:
    status, answer = await ask(house, path, {**body, "model": "other"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


async def test_the_models_for_embeddings_have_tokens_as_well(house: House) -> None:
    (offer,) = house.service.roster.models
    house.service.roster._models["tiny"] = msgspec.structs.replace(offer, task="feature-extraction")
    status, answer = await ask(house, "/tokenize", {"model": "tiny", "prompt": "hi"})
    assert (status, answer["tokens"]) == (200, house.text.encode("hi"))
    async with house.http.get("/v1beta/models/tiny") as response:
        assert (await response.json())["supportedGenerationMethods"] == []
