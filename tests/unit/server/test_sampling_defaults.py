"""How tokens are drawn where a request does not say: as the model's authors recommend, or whoever serves it has it."""

import argparse
import asyncio
import io
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from yarl import URL

import engineshed
from bench.load import Request
from bench.served import Server
from runtime.bundle import Bundle, SamplingDefaults
from runtime.messages import Generate, Sampling
from server import serve
from server.supervision.catalog import Entry
from server.supervision.launch import sampling_of
from tests.unit.server.house import House
from tests.waiting import HANGS_SECONDS

AUTHORS = SamplingDefaults(temperature=0.2, top_p=0.9, top_k=7, min_p=0.05, repetition_penalty=1.1)
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
GOOGLE = "/v1beta/models/tiny:generateContent"
CONTENTS = {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}
MESSAGES = {**CHAT, "model": "tiny", "max_tokens": 4}
SILENT: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"input": "hi"},
    "/v1/messages": MESSAGES,
    "/v1/generate": {"prompt": "hi"},
    GOOGLE: CONTENTS,
}
"""By route: what must be said, and nothing of how tokens are drawn."""


@pytest.fixture
def bundle(bundle: Bundle) -> Bundle:
    """The model, whose authors recommend something."""
    return msgspec.structs.replace(bundle, sampling=AUTHORS)


async def drawn(house: House, path: str, body: dict[str, Any]) -> tuple[Sampling, bytes]:
    """How the engine is asked to draw tokens, without the seed, which is another each time; and the answer."""
    asking = asyncio.ensure_future(house.http.post(path, json=body))
    request = await house.worker.next(Generate)
    await house.worker.say(request, "yes", "stop")
    answer = await asyncio.wait_for(asking, HANGS_SECONDS)
    assert answer.status == 200
    return msgspec.structs.replace(request.sampling, seed=0), await answer.read()


async def test_a_bench_asks_for_greedy_answers_without_the_authors_penalty(house: House) -> None:
    body = Server("it", URL("http://it/v1/completions"), model="tiny").body(Request([1, 2, 3], 4))
    sampling, _ = await drawn(house, "/v1/completions", json.loads(body))
    assert (sampling.temperature, sampling.repetition_penalty) == (0, 1)


@pytest.mark.parametrize("path", SILENT)
async def test_a_silent_request_is_answered_as_the_authors_recommend(house: House, path: str) -> None:
    sampling, _ = await drawn(house, path, SILENT[path])
    assert sampling == Sampling(temperature=0.2, top_p=0.9, top_k=7, min_p=0.05, repetition_penalty=1.1)


@pytest.mark.parametrize("path", SILENT)
async def test_null_is_silence(house: House, path: str) -> None:
    if path == GOOGLE:
        body = CONTENTS | {"generationConfig": dict.fromkeys(("temperature", "topP", "topK"))}
    else:
        body = SILENT[path] | dict.fromkeys(("temperature", "top_p", "top_k"))
    sampling, _ = await drawn(house, path, body)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.2, 0.9, 7)


@pytest.mark.parametrize("path", SILENT)
async def test_what_a_request_says_counts(house: House, path: str) -> None:
    own: dict[str, Any] = {"temperature": 0, "top_k": 0}
    body = SILENT[path] | ({"generationConfig": {"temperature": 0, "topK": 0}} if path == GOOGLE else own)
    sampling, _ = await drawn(house, path, body)
    assert (sampling.temperature, sampling.top_k) == (0, 0)
    assert (sampling.top_p, sampling.min_p) == (0.9, 0.05), "the rest is still the authors'"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/generate"])
async def test_every_one_of_them_can_be_taken_back(house: House, path: str) -> None:
    off = {"temperature": 1, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1}
    sampling, _ = await drawn(house, path, SILENT[path] | off)
    assert sampling == Sampling(temperature=1)


async def test_a_response_tells_what_was_used(house: House) -> None:
    _, silent = await drawn(house, "/v1/responses", {"input": "hi"})
    told = msgspec.json.decode(silent)
    assert (told["temperature"], told["top_p"]) == (0.2, 0.9)
    _, own = await drawn(house, "/v1/responses", {"input": "hi", "temperature": 0.7})
    told = msgspec.json.decode(own)
    assert (told["temperature"], told["top_p"]) == (0.7, 0.9)


async def test_several_answers_differ_in_their_seeds_and_in_nothing_else(house: House) -> None:
    asking = asyncio.ensure_future(house.http.post("/v1/completions", json={"prompt": "hi", "n": 2, "seed": 3}))
    first, second = [await house.worker.next(Generate) for _ in range(2)]
    for request in (first, second):
        await house.worker.say(request, "yes", "stop")
    assert (await asking).status == 200
    assert first.sampling.seed == 3 != second.sampling.seed
    assert msgspec.structs.replace(second.sampling, seed=3) == first.sampling
    assert first.sampling.temperature == 0.2


async def test_the_models_show_it(house: House) -> None:
    async with house.http.get("/v1/models") as response:
        (listed,) = (await response.json())["data"]
    async with house.http.get("/v1/models/tiny") as response:
        assert (await response.json()) == listed
    assert listed["sampling"] == {"temperature": 0.2, "top_p": 0.9, "top_k": 7, "min_p": 0.05, "repetition_penalty": 1.1}
    async with house.http.get("/v1beta/models/tiny") as response:
        google = await response.json()
    assert (google["temperature"], google["topP"], google["topK"]) == (0.2, 0.9, 7)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ([], ", temperature 0.2, top_p 0.9, top_k 7, min_p 0.05, repetition_penalty 1.1. "),
        (["--temperature=0.5", "--model=tiny"], ", temperature 0.5, top_p 0.9, "),
        (["--temperature=0"], ", always the likeliest token, repetition_penalty 1.1. "),
    ],
)
async def test_chat_says_how_its_answers_are_drawn(
    house: House, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], shown: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    async with house.http.get("/healthz") as response:
        url = response.url.origin()
    assert await asyncio.to_thread(engineshed.main, ["chat", f"--url={url}", *arguments]) == 0
    assert f"tiny at {url}{shown}" in capsys.readouterr().out


async def test_chat_with_a_model_that_is_not_there(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    async with house.http.get("/healthz") as response:
        url = response.url.origin()
    assert await asyncio.to_thread(engineshed.main, ["chat", f"--url={url}", "--model=other"]) == 1
    assert f"{url} has no model 'other'; it has tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "table", "expected"),
    [
        ([], "", AUTHORS),
        (["--generation-config=none"], "", SamplingDefaults()),
        (["--generation-config=none"], "generation_config = 'auto'", AUTHORS),
        ([], "generation_config = 'none'", SamplingDefaults()),
        ([], "sampling = { temperature = 0.5 }", SamplingDefaults(0.5, 0.9, 7, 0.05, 1.1)),
        (["--generation-config=none"], "sampling = { top_k = 3 }", SamplingDefaults(top_k=3)),
        (['--override-generation-config={"top_p": 0.5}'], "", SamplingDefaults(0.2, 0.5, 7, 0.05, 1.1)),
        (
            ['--override-generation-config={"top_p": 0.5, "min_p": 0}', "--generation-config=none"],
            "sampling = { top_p = 0.7 }",
            SamplingDefaults(top_p=0.7, min_p=0),
        ),
    ],
    ids=["none", "off", "off but for one", "off for one", "a table", "only a table", "an option", "both"],
)
def test_whoever_serves_a_model_has_the_last_word(
    tmp_path: Path, bundle: Bundle, arguments: list[str], table: str, expected: SamplingDefaults
) -> None:
    config = tmp_path / "serve.toml"
    config.write_text(f"[models.tiny]\n{table}")
    parser = argparse.ArgumentParser()
    serve.configure(parser)
    common = serve.common(parser.parse_args([f"--config={config}", *arguments]))
    assert sampling_of(Entry("tiny", tmp_path, bundle, "build"), common.of("tiny")) == expected
