"""The real server over the real engine, asked by real clients."""

import asyncio
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import aiohttp
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.default_model import ENGINES, MANY_TOKENS, MODEL, STANDS_IN, says
from tests.e2e.conftest import ROOT, Server, serving
from tests.waiting import HANGS_SECONDS

FRANCE: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Complete the sentence: The capital of France is"}]
"""Of a question that the model answers with a wide margin; a near tie would be decided by the rounding of a kernel."""
RUNNING = "engineshed_requests_running"
FINISHED = "engineshed_engine_finished_total"
"""Answers that the engine gave to their end: none that was cancelled."""


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def post(server: Server, path: str, body: Any) -> Any:
    async def ask() -> Any:
        content = {"data": body} if isinstance(body, bytes) else {"json": body}
        async with aiohttp.ClientSession() as http, http.post(server.url + path, **content) as response:
            return response.status, await response.json()

    return asyncio.run(ask())


def test_the_openai_client_streams_a_chat(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, max_tokens=40)
    assert says(whole.choices[0].message.content, "Paris")
    stream = client.chat.completions.create(
        model=MODEL, messages=FRANCE, temperature=0, max_tokens=40, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert sum(map(bool, texts)) > 1  # of a quick engine, several tokens a chunk
    assert "".join(texts) == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert STANDS_IN or whole.choices[0].finish_reason == "stop"


async def test_the_async_openai_client_streams_several_chats_at_once(server: Server) -> None:
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    async def chat() -> str:
        stream = await client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, max_tokens=20, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    answers = await asyncio.gather(*(chat() for _ in range(4)))
    assert len(set(answers)) == 1
    assert says(answers[0], "Paris")


def test_the_openai_client_completes_with_stop_strings_logprobs_and_exact_usage(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=8, logprobs=0)
    assert says(answer.choices[0].text, "Paris")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.token_logprobs is not None
    assert len(answer.choices[0].logprobs.token_logprobs) == 8
    assert all(logprob <= 0 for logprob in answer.choices[0].logprobs.token_logprobs)
    word = answer.choices[0].text.split()[2]
    stopped = client.completions.create(
        model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=8, stop=word[1:]
    )
    assert stopped.choices[0].text == answer.choices[0].text.split(word[1:])[0]
    assert stopped.choices[0].finish_reason == "stop"


def test_a_seed_repeats_its_answer_and_another_gives_another(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        return client.completions.create(model=MODEL, prompt="Once", max_tokens=24, seed=seed).choices[0].text

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_the_openai_client_understands_the_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=FRANCE)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=9)
    assert wrong.value.param == "temperature"
    assert [model.id for model in client.models.list()] == [MODEL]


def curl(server: Server, **body: Any) -> "subprocess.Popen[bytes]":
    """`curl` as the documentation has it."""
    command = ["curl", "-sN", f"{server.url}/v1/generate", "-d", json.dumps({"prompt": "Once upon a time", "seed": 1, **body})]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def test_curl_gets_the_text(server: Server) -> None:
    with curl(server, max_tokens=48) as process:
        assert process.stdout is not None
        assert process.stdout.read().decode().strip()
    assert process.returncode == 0


def test_curl_gets_each_part_of_the_text_as_soon_as_it_is_there(server: Server) -> None:
    with server.held() as advance, curl(server, max_tokens=3000, ignore_eos=True) as process:
        assert process.stdout is not None
        for _ in range(3):
            while not select.select([process.stdout], [], [], 0.1)[0]:
                advance()
            assert os.read(process.stdout.fileno(), 65536), "a part of the text, and not its end"
        process.kill()
    server.wait(RUNNING, 0)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_frees_its_slot(server: Server, stream: bool) -> None:
    server.wait(RUNNING, 0)
    finished = server.metric(FINISHED)
    body = {"model": MODEL, "prompt": "Count to a million: 1, 2, 3,", "max_tokens": 3000, "stream": stream, "ignore_eos": True}
    async with aiohttp.ClientSession() as http:
        with server.held() as advance:
            asking = asyncio.ensure_future(http.post(f"{server.url}/v1/completions", json=body))
            await asyncio.to_thread(advance)
            if stream:
                (await asking).close()
            else:
                asking.cancel()
        await asyncio.to_thread(server.wait, RUNNING, 0)
    assert server.metric(FINISHED) == finished, "it was answered to its end"


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/completions", b"{", 400, None),
        ("/v1/completions", rb'{"prompt": "\ud800"}', 400, None),
        ("/v1/completions", b"[" * 100_000, 400, None),
        ("/v1/completions", b'"' + b"x" * 5_000_000 + b'"', 413, None),
        ("/v1/completions", {"prompt": ""}, 400, "prompt"),
        ("/v1/completions", {"prompt": "hello " * 10_000}, 400, "prompt"),
        ("/v1/completions", {"prompt": [10**9]}, 400, "prompt"),
        ("/v1/completions", {"prompt": "hi", "max_tokens": 0}, 400, "max_tokens"),
        ("/v1/completions", {"prompt": "hi", "max_tokens": 10**12}, 400, "max_tokens"),
        ("/v1/completions", {"prompt": "hi", "stop": [""]}, 400, "stop[0]"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": FRANCE, "model": "other"}, 404, "model"),
        ("/v1/completions", {"prompt": "\0", "max_tokens": 1}, 200, None),
        (
            "/v1/completions",
            {"prompt": "hi", "max_tokens": 1, "temperature": 2, "top_k": 2**31 - 1, "seed": -(2**63)},
            200,
            None,
        ),
    ],
)
def test_whatever_is_sent_gets_an_answer_and_the_server_lives(
    server: Server, path: str, body: Any, status: int, param: str | None
) -> None:
    got, answer = post(server, path, body)
    assert got == status, answer
    assert status == 200 or answer["error"]["param"] == param
    assert post(server, "/v1/completions", {"prompt": "The sky is", "max_tokens": 2})[0] == 200


async def test_a_long_prompt_that_is_tokenized_does_not_freeze_a_running_stream(server: Server) -> None:
    prompt = json.dumps({"prompt": "many words " * 100_000}).encode()
    pieces, sent = 0, asyncio.Event()

    async def upload() -> AsyncIterator[bytes]:
        yield prompt[:-1]
        await sent.wait()
        yield prompt[-1:]

    async with aiohttp.ClientSession(server.url) as http:
        body = {"prompt": "Once upon a time", "max_tokens": 4000, "ignore_eos": True, "seed": 1}
        async with http.post("/v1/generate", json=body) as response:
            assert response.status == 200
            asking = asyncio.ensure_future(http.post("/v1/generate", data=upload()))
            for _ in range(10):  # while the rest of the upload comes to lie at the server
                await response.content.readany()
            sent.set()
            while not asking.done():
                assert await response.content.readany(), "the stream is over before the prompt is tokenized"
                pieces += not asking.done()
            assert (await asking).status == 400
    assert pieces > 2, "the stream stood still while the prompt was tokenized"


class Terminal:
    """`engineshed chat` at a terminal of its own."""

    def __init__(self, *options: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "engineshed.py", "chat", *options],
            cwd=ROOT,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_own_terminal,
            env={**os.environ, "TERM": "dumb", "COLUMNS": "200"},
        )
        os.close(slave)
        os.set_blocking(self.master, False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, pattern: str, seconds: float = HANGS_SECONDS) -> str:
        """What appears, up to and with the pattern."""
        shown, deadline = "", time.monotonic() + seconds
        while not re.search(pattern, shown):
            assert time.monotonic() < deadline, f"no {pattern!r} in {shown!r}"
            try:
                shown += os.read(self.master, 4096).decode(errors="replace")
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                raise AssertionError(f"the chat ended without {pattern!r}: {shown!r}") from None
        return shown


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_chat_streams_an_answer_and_leaves_when_told(server: Server) -> None:
    with Terminal(f"--url={server.url}", "--temperature=0", "--max-tokens=40") as terminal:
        terminal.until("> ")
        terminal.type("What is the capital of France?\n")
        assert says(terminal.until(r"\d+ tokens in .*\n"), "Paris")
        terminal.type("/clear\n")
        terminal.until("forgotten")
        terminal.type("/exit\n")
        assert terminal.process.wait(HANGS_SECONDS) == 0


def test_ctrl_c_stops_the_answer_and_not_the_chat(server: Server) -> None:
    server.wait(RUNNING, 0)
    finished = server.metric(FINISHED)
    with Terminal(f"--url={server.url}", "--temperature=0", "--max-tokens=3000") as terminal:
        terminal.until("> ")
        with server.held() as advance:
            terminal.type("Write a very long story about a ship and its crew of a hundred people.\n")
            advance()
            terminal.type("\x03")
            terminal.until("stopped")
        server.wait(RUNNING, 0)
        assert server.metric(FINISHED) == finished, "it was answered to its end"
        terminal.type("Hello!\n")
        terminal.until(r"\d+ tokens in .*\n")
        terminal.type("\x04")
        assert terminal.process.wait(HANGS_SECONDS) == 0


def test_chat_without_a_server_says_how_to_start_one() -> None:
    with Terminal("--url=http://127.0.0.1:9") as terminal:
        terminal.until("engineshed serve")
        assert terminal.process.wait(HANGS_SECONDS) == 1


async def test_a_full_queue_refuses_and_a_stopping_server_lets_an_answer_finish() -> None:
    with serving("--slots=1", "--queue=0", f"--context={MANY_TOKENS + 100}", "--drain-seconds=100") as small:
        body = {"prompt": "Once upon a time", "max_tokens": MANY_TOKENS, "seed": 1, "ignore_eos": True}
        headers = {"Accept": "application/x-ndjson"}
        async with aiohttp.ClientSession(small.url) as http:
            with small.held() as advance:
                asking = asyncio.ensure_future(http.post("/v1/generate", json=body, headers=headers))
                await asyncio.to_thread(advance)
                running = await asking
                asking = asyncio.ensure_future(http.post("/v1/generate", json=body))
                await asyncio.to_thread(small.metric, RUNNING)  # which the HTTP process answers after it has passed that on
            refused = await asking
            assert refused.status == 429
            assert "Retry-After" in refused.headers
            with small.held():
                small.process.send_signal(signal.SIGTERM)
                await asyncio.to_thread(small.until, lambda: small.get("/readyz")[0] != 200)
            last = (await running.text()).splitlines()[-1]
            assert json.loads(last)["usage"]["completion_tokens"] == MANY_TOKENS
        assert small.process.wait(HANGS_SECONDS) == 0


def test_an_engine_process_that_is_killed_is_replaced() -> None:
    with serving("--slots=1", "--context=512") as small:
        (killed,) = small.engines()
        os.kill(killed, signal.SIGKILL)
        small.wait("engineshed_worker_restarts_total", 1)
        small.wait_ready()
        assert post(small, "/v1/completions", {"prompt": "The sky is", "max_tokens": 2})[0] == 200
        (replacement,) = small.engines()
        assert replacement != killed
    assert not Path(f"/proc/{replacement}").exists()


def test_a_server_without_its_bundle_or_its_port_says_so(server: Server) -> None:
    def serve(*options: str) -> tuple[int, str]:
        command = [sys.executable, "engineshed.py", "serve", f"--engines={ENGINES}", *options]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGS_SECONDS, check=False)
        return ended.returncode, ended.stderr

    code, said = serve("--model=nothing")
    assert code == 1
    assert "'nothing'" in said
    code, said = serve(f"--model={MODEL}", f"--port={server.url.rpartition(':')[2]}")
    assert code == 1
    assert "--port" in said
    assert "Traceback" not in said


def test_a_second_turn_starts_from_the_rows_of_the_first(server: Server) -> None:
    """The same long beginning twice: the usage says that most of it was not computed again, and the answer is the same."""
    question = {"role": "user", "content": "Repeat: " + "the quick brown fox jumps over the lazy dog. " * 30}
    body = {"messages": [question], "max_tokens": 8, "temperature": 0}
    (_, first), (_, second) = (post(server, "/v1/chat/completions", body) for _ in range(2))
    assert second["choices"][0]["message"] == first["choices"][0]["message"]
    prompt, cached = second["usage"]["prompt_tokens"], second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert prompt > 256
    assert prompt - 64 <= cached < prompt
