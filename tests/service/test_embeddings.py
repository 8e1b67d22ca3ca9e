"""`POST /v1/embeddings` for real: the server, its processes, tiny models, OpenAI's client, and transformers beside it."""

import asyncio
import base64
import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openai
import pytest
from tokenizers import Tokenizer

from export.recipe import Build
from runtime import bundle as bundles
from runtime.footprint import encoder_footprint
from tests import embedders, tiny
from tests.service.conftest import Running, gone, serve

Floats = npt.NDArray[np.float32]

TEXTS = ["Gold", "The quick brown fox jumps over the lazy dog.", "Grüße, 世界! " * 6, " "]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, published: Path) -> Path:
    """A folder with the bundles `chat`, `bert` and `qwen3`; not to be written to."""
    root = tmp_path_factory.mktemp("embeddings")
    engines = root / "engines"
    for kind in ("bert", "qwen3"):
        model = embedders.write_model(root / kind, kind)
        tiny.exporting(engines).run(embedders.recipe(model, Build("cpu", "fp32"), name=kind))
    shutil.copytree(published / "alpha", engines / "alpha", copy_function=os.link)
    return engines


@pytest.fixture
def embedding_engines(built: Path, tmp_path: Path) -> Path:
    """The same, for a test of its own."""
    return Path(shutil.copytree(built, tmp_path / "engines", copy_function=os.link))


@pytest.fixture
async def running(embedding_engines: Path) -> AsyncIterator[Running]:
    async with serve(embedding_engines, "--model=bert,alpha") as running:
        yield running


def expected(engines: Path, kind: str, texts: list[str]) -> Floats:
    """What transformers gives for the tokens that the bundle's tokenizer makes of `texts`."""
    tokenizer = Tokenizer.from_file(str(engines / kind / "tokenizer.json"))
    model, pooling = embedders.random_model(kind), embedders.TYPES[kind][1]
    return np.stack([embedders.by_hand(model, pooling, tokenizer.encode(text).ids) for text in texts])


async def ask(running: Running, **body: Any) -> tuple[int, Any]:
    """An embeddings request's status, and its body or what went wrong."""
    async with running.http.post("/v1/embeddings", json=body) as response:
        said = await response.json()
        return response.status, said if response.status == 200 else said["error"]


async def vectors(running: Running, **body: Any) -> Floats:
    status, said = await ask(running, **body)
    assert status == 200, said
    assert [each["index"] for each in said["data"]] == list(range(len(said["data"])))
    return np.array([each["embedding"] for each in said["data"]], np.float32)


async def test_openais_client_gets_transformers_embeddings_in_both_formats(running: Running, built: Path) -> None:
    async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="unused", max_retries=0) as client:
        for kind in ("bert", "qwen3"):
            wanted = expected(built, kind, TEXTS)
            plain = await client.embeddings.create(model=kind, input=TEXTS)  # the client asks for base64 and decodes it
            numbers = await client.embeddings.create(model=kind, input=TEXTS, encoding_format="float", user="somebody")
            for answer in (plain, numbers):
                assert np.abs(np.array([each.embedding for each in answer.data]) - wanted).max() < 1e-5
            assert (plain.model, plain.object, plain.data[1].index, plain.data[1].object) == (kind, "list", 1, "embedding")
            tokenizer = Tokenizer.from_file(str(built / kind / "tokenizer.json"))
            count = sum(len(tokenizer.encode(text).ids) for text in TEXTS)
            assert (plain.usage.prompt_tokens, plain.usage.total_tokens) == (count, count)
            short = await client.embeddings.create(model=kind, input=TEXTS, dimensions=10)
            cut = wanted[:, :10] / np.linalg.norm(wanted[:, :10], axis=1, keepdims=True)
            assert np.abs(np.array([each.embedding for each in short.data]) - cut).max() < 1e-5
        with pytest.raises(openai.BadRequestError, match="has 64 numbers"):
            await client.embeddings.create(model="bert", input="a", dimensions=65)
        with pytest.raises(openai.BadRequestError, match="generates text"):
            await client.embeddings.create(model="alpha", input="a")
        with pytest.raises(openai.NotFoundError):
            await client.embeddings.create(model="nobody", input="a")


async def test_every_form_of_input(running: Running, built: Path) -> None:
    tokenizer = Tokenizer.from_file(str(built / "bert" / "tokenizer.json"))
    ids = [tokenizer.encode(text).ids for text in TEXTS]
    assert (ids[0][0], ids[0][-1]) == (0, 2)
    wanted = expected(built, "bert", TEXTS)
    assert np.abs(await vectors(running, input=ids) - wanted).max() < 1e-5  # no model is named: the first for embeddings
    assert np.abs(await vectors(running, input=ids[1]) - wanted[1]).max() < 1e-5
    assert np.abs(await vectors(running, input=TEXTS[1]) - wanted[1]).max() < 1e-5
    _, said = await ask(running, input=TEXTS[2], encoding_format="base64")
    raw = np.frombuffer(base64.b64decode(said["data"][0]["embedding"]), "<f4")
    assert np.abs(raw - wanted[2]).max() < 1e-5
    many = await vectors(running, input=["a"] * 2048)
    assert many.shape == (2048, 64)
    assert np.abs(many - many[0]).max() < 1e-5


async def test_long_inputs_are_refused_or_cut(running: Running, built: Path) -> None:
    long = "one two three four " * 100
    status, error = await ask(running, input=["short", long])
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "input[1]")
    assert "takes up to 128" in error["message"]
    tokenizer = Tokenizer.from_file(str(built / "bert" / "tokenizer.json"))
    content = tokenizer.encode(long, add_special_tokens=False).ids
    model = embedders.random_model("bert")
    for given, most in ((-1, 128), (40, 40), (3, 3)):
        cut = embedders.by_hand(model, "cls", [0, *content[: most - 2], 2])
        assert np.abs(await vectors(running, input=long, truncate_prompt_tokens=given) - cut).max() < 1e-5
    ids = [5 + number % 400 for number in range(500)]
    cut = embedders.by_hand(model, "cls", ids[:128])
    assert np.abs(await vectors(running, input=ids, truncate_prompt_tokens=-1) - cut).max() < 1e-5
    assert (await ask(running, input="a b", truncate_prompt_tokens=128))[0] == 200


WRONG: list[tuple[dict[str, Any], str | None]] = [
    ({}, "input"),
    ({"input": None}, "input"),
    ({"input": 5}, "input"),
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": ["a", ""]}, "input[1]"),
    ({"input": [[5], []]}, "input[1]"),
    ({"input": [[]]}, "input[0]"),
    ({"input": ["a", 5]}, "input"),
    ({"input": [[5], 5]}, "input"),
    ({"input": [[5], "a"]}, "input"),
    ({"input": [5.5]}, "input[0]"),
    ({"input": [5, True]}, "input[1]"),
    ({"input": [[5], [5, "a"]]}, "input[1][1]"),
    ({"input": [-1]}, "input[0]"),
    ({"input": [[3], [512]]}, "input[1]"),
    ({"input": [2**70]}, None),
    ({"input": ["a"] * 2049}, "input"),
    ({"input": [[5] * 129]}, "input[0]"),
    ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ({"input": "a", "encoding_format": 5}, "encoding_format"),
    ({"input": "a", "dimensions": 0}, "dimensions"),
    ({"input": "a", "dimensions": 65}, "dimensions"),
    ({"input": "a", "dimensions": "10"}, "dimensions"),
    ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"input": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"input": "a", "truncate_prompt_tokens": 129}, "truncate_prompt_tokens"),
    ({"input": "a", "truncate_prompt_tokens": 2}, "truncate_prompt_tokens"),
    ({"input": "a", "user": 5}, "user"),
    ({"input": "a", "model": 5}, "model"),
    ({"input": "a", "model": "alpha"}, "model"),
]


async def test_what_is_wrong_is_named(running: Running) -> None:
    for body, param in WRONG:
        status, error = await ask(running, **body)
        assert (status, error["type"]) == (400, "invalid_request_error"), (body, error)
        assert param is None or error["param"] == param, (body, error)
    async with running.http.post("/v1/embeddings", data=b"{") as response:
        assert response.status == 400
    async with running.http.post("/v1/embeddings", data=b'{"input": "\\ud800"}') as response:
        assert response.status == 400
    assert (await ask(running, input="a"))[0] == 200


async def test_models_of_both_kinds_say_what_they_are_for(running: Running) -> None:
    async with running.http.get("/v1/models") as response:
        tasks = {each["id"]: (each["task"], each["max_model_len"]) for each in (await response.json())["data"]}
    assert tasks == {
        "bert": ("feature-extraction", 128),
        "alpha": ("text-generation", 256),
        "qwen3": ("feature-extraction", 128),
    }
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/generate", {"prompt": "a"}),
    ):
        async with running.http.post(path, json={"model": "bert", **body}) as response:
            error = (await response.json())["error"]
        assert (response.status, error["param"], error["code"]) == (400, "model", "model_not_supported")
        assert "/v1/embeddings" in error["message"]
    async with running.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}) as response:
        assert (await response.json())["model"] == "alpha", "no model is named: the first that generates text"
    assert (await running.answer("alpha", [5, 6, 7]))[0] == 200


async def test_many_requests_at_once_get_what_each_gets_alone(running: Running) -> None:
    draw = np.random.default_rng(0)
    asked = [
        [draw.integers(3, tiny.VOCAB, draw.integers(1, 129)).tolist() for _ in range(draw.integers(1, 9))] for _ in range(60)
    ]
    alone = [await vectors(running, model="bert", input=inputs) for inputs in asked[:5]]
    together = await asyncio.gather(*(vectors(running, model="bert", input=inputs) for inputs in asked))
    for one, other in zip(alone, together, strict=False):
        assert np.abs(one - other).max() < 1e-5
    model = embedders.random_model("bert")
    for inputs, got in list(zip(asked, together, strict=True))[::7]:
        wanted = np.stack([embedders.by_hand(model, "cls", tokens) for tokens in inputs])
        assert np.abs(got - wanted).max() < 1e-5
    tokens = sum(len(tokens) for inputs in [*asked, *asked[:5]] for tokens in inputs)
    assert await running.metric("engineshed_prompt_tokens_total", model="bert") == tokens
    assert await running.metric("engineshed_requests_total", route="/v1/embeddings", status="200") == 65
    assert await running.metric("engineshed_engine_prompt_tokens_total", model="bert") == tokens
    assert await running.metric("engineshed_engine_finished_total", model="bert") == 65


async def test_a_full_queue_is_429_and_a_client_that_leaves_frees_the_engine(embedding_engines: Path) -> None:
    async with serve(embedding_engines, "--model=bert", "--queue=1") as running:
        (pid,) = await running.pids("bert@")
        os.kill(pid, signal.SIGSTOP)
        asking = [asyncio.create_task(ask(running, input=[[5] * 128] * 500)) for _ in range(4)]
        await running.passed_on()
        os.kill(pid, signal.SIGCONT)
        done, _ = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        status, error = done.pop().result()
        assert (status, error["code"]) == (429, "queue_full")
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await running.settled()
        assert (await ask(running, input="a"))[0] == 200


async def test_a_request_whose_engine_dies_is_asked_for_again(embedding_engines: Path) -> None:
    async with serve(embedding_engines, "--model=bert") as running:
        (pid,) = await running.pids("bert@")
        wanted = await vectors(running, input=TEXTS)
        os.kill(pid, signal.SIGSTOP)
        asking = asyncio.create_task(vectors(running, input=TEXTS))
        await running.passed_on()
        os.kill(pid, signal.SIGKILL)
        assert np.abs(await asking - wanted).max() < 1e-6
        assert gone([pid])
        assert await running.metric("engineshed_worker_restarts_total", model="bert") == 1


async def test_requests_that_lose_two_engines_get_503(embedding_engines: Path) -> None:
    async with serve(embedding_engines, "--model=bert", "--device=cpu,cpu") as running:
        await running.until(running.all_ready)
        pids = [pid for device in ("cpu#1", "cpu#2") for pid in await running.pids(f"bert@{device}")]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        asking = asyncio.create_task(ask(running, input="a"))
        await running.passed_on()
        os.kill(pids[0], signal.SIGKILL)
        await running.until(lambda: any("asked for again" in line for line in running.log))
        os.kill(pids[1], signal.SIGKILL)
        status, error = await asking
        assert (status, error["code"]) == (503, "engine_unavailable")


async def test_time_limits_are_kept(embedding_engines: Path) -> None:
    async with serve(embedding_engines, "--model=bert", "--total-seconds=0.5") as running:
        told = await asyncio.gather(*(ask(running, input=[[5] * 128] * 2048) for _ in range(12)))
        late = [answer for status, answer in told if status == 504]
        assert late, "no machine computes as many tokens as may wait in half a second"
        assert {status for status, _ in told} <= {200, 429, 504}
        assert {error["code"] for error in late} == {"timeout"}
        assert all("texts were computed" in error["message"] or "waited" in error["message"] for error in late)


async def test_a_model_for_embeddings_is_placed_by_what_it_takes(embedding_engines: Path) -> None:
    manifest = bundles.read(embedding_engines / "bert")
    assert manifest.encoder is not None
    need = encoder_footprint(manifest.variants[0], manifest.encoder, context=128).total
    async with serve(embedding_engines, "--model=bert", f"--memory={need + 1}") as running:
        assert (await running.status())["memory"] == [{"device": "cpu", "budget": need + 1, "reserved": need}]
        await vectors(running, input=[[5] * 128] * 1000)
        (process,) = [each for each in (await running.status())["processes"] if each["name"].startswith("bert@")]
        assert process["rss"] < need
        assert (await ask(running, model="qwen3", input="a"))[0] == 200, "bert makes room"
        assert (await running.state("bert"))[0] == "cold"
