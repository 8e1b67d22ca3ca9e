"""What is logged, in both formats, and the id that a request's lines and answers have."""

import asyncio
import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from runtime import logs
from runtime.messages import Cancel, Generate
from server import app, journal
from server.fleet import Offer
from server.generation import PromptDetails, Usage
from server.journal import ENTRY
from tests.unit.server.house import House
from tests.waiting import HANGS_SECONDS

FORGED = "sent\n2026-01-01 00:00:00,000 INFO engineshed: forged \x1b[2J"
FORMATS: list[logs.Format] = ["text", "json"]


class Written:
    """What logging wrote."""

    def __init__(self, stream: io.StringIO) -> None:
        self._stream = stream

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Of JSON."""
        return [json.loads(line) for line in self.text.splitlines()]

    @property
    def requests(self) -> list[dict[str, Any]]:
        """Those that tell of a request's end."""
        return [line for line in self.lines if line["message"] == "request"]


@pytest.fixture
def written(request: pytest.FixtureRequest) -> Iterator[Written]:
    """All that is logged from debug on, in the format that the test names or JSON."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    for handler in handlers:
        root.removeHandler(handler)  # or setup would close pytest's own
    stream = io.StringIO()
    with redirect_stderr(stream):
        logs.setup("debug", getattr(request, "param", "json"))
    yield Written(stream)
    root.handlers[:], root.level = handlers, level


def fail(message: str) -> None:
    """Log an error with its traceback."""
    try:
        raise ValueError(message)
    except ValueError:
        logging.getLogger("x").exception("it failed on %s", message)


def test_a_json_line_has_the_same_keys_every_time_and_an_exception_in_one(written: Written) -> None:
    logging.getLogger("x").info("said %d", 7)
    fail(FORGED)
    first, second = written.lines
    assert list(first) == ["time", "level", "logger", "process", "message"]
    assert (first["level"], first["logger"], first["message"]) == ("info", "x", "said 7")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert list(second) == [*first, "exception"]
    assert second["exception"].startswith("Traceback")
    assert second["exception"].endswith(FORGED)


@pytest.mark.parametrize("written", ["text"], indirect=True)
def test_nothing_that_was_sent_can_look_like_another_line_of_text(written: Written) -> None:
    fail(FORGED)
    logging.getLogger("x").info("told", extra=logs.fields({"model": FORGED, "client": None, "seconds": 0.5}))
    first, *trace, last = written.text.splitlines()
    assert r"it failed on sent\n2026" in first
    assert trace
    assert all(line.startswith("    ") for line in trace)
    assert last.endswith(f"INFO x: told model={json.dumps(FORGED)} seconds=0.5")
    assert "\x1b" not in written.text


@pytest.mark.parametrize("written", FORMATS, indirect=True)
def test_lines_have_the_requests_id_while_it_is_worked_on(written: Written) -> None:
    token = logs.request_id.set("r-1")
    logging.getLogger("x").info("within")
    logs.request_id.reset(token)
    logging.getLogger("x").info("after")
    within, after = written.text.splitlines()
    assert "r-1" in within
    assert "request_id" in within
    assert "request_id" not in after


@pytest.mark.usefixtures("written")
def test_what_is_below_the_level_is_left_out_and_a_lone_surrogate_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup("warning", "json")
    logging.getLogger("x").info("quiet")
    logging.getLogger("x").warning("loud \ud800")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"] == "loud \ud800"


def test_every_process_can_log_without_the_packages_of_the_server() -> None:
    script = "import sys, runtime.logs; print(*{name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names)"
    loaded = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"aiohttp", "msgspec", "numpy", "zmq"} & set(loaded)


async def test_a_request_leaves_one_line_with_what_is_known_of_it(house: House, written: Written) -> None:
    asking = asyncio.ensure_future(house.http.post("/v1/completions", json={"prompt": "hi"}, headers={"X-Request-Id": "r-1"}))
    await house.worker.say(await house.worker.next(Generate), "!", "stop")
    assert (await asking).status == 200
    (line,) = written.requests
    assert list(line)[5:] == [
        "request_id",
        "method",
        "route",
        "status",
        "client",
        "model",
        "prompt_tokens",
        "completion_tokens",
        "first_byte_seconds",
        "seconds",
    ]
    assert (line["request_id"], line["method"], line["route"], line["status"]) == ("r-1", "POST", "/v1/completions", 200)
    assert line["level"] == "info"
    assert line["client"] is None
    assert 0 < line["first_byte_seconds"] <= line["seconds"] < HANGS_SECONDS


async def test_what_a_route_learns_of_a_request_is_in_its_line(house: House, written: Written) -> None:
    class Told:
        usage = Usage(12, 34, 46, PromptDetails(0))

    async def answer(request: web.Request) -> web.Response:
        request[ENTRY].model, request[ENTRY].answer = "tiny", Told()
        return web.Response()

    application = app.build(house.service)
    application.router.add_get("/told", answer)
    runner = app.runner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    async with aiohttp.ClientSession() as http, http.get(f"http://{host}:{port}/told"):
        pass
    await runner.cleanup()
    (line,) = written.requests
    assert (line["model"], line["prompt_tokens"], line["completion_tokens"]) == ("tiny", 12, 34)


async def test_a_stream_that_is_left_is_told_as_499(house: House, written: Written) -> None:
    response, request = await house.open("/v1/generate", {"prompt": "hi"}, "Hello", {"X-Request-Id": "left"})
    assert response.headers["X-Request-Id"] == "left"
    response.close()
    assert (await house.worker.next(Cancel)).id == request.id
    (line,) = written.requests
    assert (line["request_id"], line["status"]) == ("left", 499)
    assert line["first_byte_seconds"] < line["seconds"]


async def test_a_probe_that_finds_all_well_is_for_debugging_alone(house: House, written: Written) -> None:
    await house.http.get("/readyz")
    house.engine.client = None
    await house.http.get("/readyz")
    assert [(line["status"], line["level"]) for line in written.requests] == [(200, "debug"), (503, "info")]


@pytest.mark.parametrize("given", ["a", "A-b_c.d:9", "x" * 128])
async def test_a_fit_id_goes_out_as_it_came_on_every_answer(house: House, given: str) -> None:
    for path, status in [("/healthz", 200), ("/v1/nothing", 404), ("/v1/completions", 405)]:
        async with house.http.get(path, headers={"X-Request-Id": given}) as response:
            assert (response.status, response.headers["X-Request-Id"]) == (status, given)


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "a\tb", "ä", '"', "a,b", None])
async def test_an_unfit_id_or_none_is_replaced_by_a_new_one(house: House, given: str | None) -> None:
    seen = set()
    for _ in range(2):
        async with house.http.get("/healthz", headers={} if given is None else {"X-Request-Id": given}) as response:
            seen.add(response.headers["X-Request-Id"])
    assert len(seen) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", id_) for id_ in seen)


async def test_an_expectation_that_nobody_meets_is_refused_with_an_id(house: House) -> None:
    async with house.http.get("/healthz", headers={"Expect": "miracles", "X-Request-Id": "r-1"}) as response:
        assert (response.status, response.headers["X-Request-Id"]) == (417, "r-1")


async def test_lines_of_requests_at_once_on_many_connections_keep_their_own_ids(
    house: House, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = house.service.model

    def telling(name: str) -> Offer:
        logging.getLogger("x").info("asked for %s", name)
        return find(name)

    monkeypatch.setattr(house.service, "model", telling)

    async def ask(number: int) -> None:
        await house.http.post(
            "/v1/completions", json={"prompt": "hi", "model": f"m{number}"}, headers={"X-Request-Id": f"r{number}"}
        )

    await asyncio.gather(*(ask(number) for number in range(20)))
    told = {line["message"]: line.get("request_id") for line in written.lines if line["logger"] == "x"}
    assert told == {f"asked for m{number}": f"r{number}" for number in range(20)}
    logging.getLogger("x").info("outside")
    assert "request_id" not in written.lines[-1]


async def test_a_fault_of_the_server_is_logged_with_the_requests_id_and_one_line_of_trace(
    house: House, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(text: str, **_: object) -> list[int]:
        raise RuntimeError("secret")

    monkeypatch.setattr(house.text, "encode", broken)
    async with house.http.post("/v1/completions", json={"prompt": "hi"}) as response:
        id_ = response.headers["X-Request-Id"]
    (error,) = (line for line in written.lines if line["level"] == "error")
    assert error["request_id"] == id_
    assert "RuntimeError: secret" in error["exception"]


def test_an_entry_without_an_answer_has_no_tokens(written: Written) -> None:
    journal.Entry("r").write("GET", "/v1/models", 200, "alice")
    (line,) = written.requests
    assert (line["client"], line["model"], line["prompt_tokens"], line["first_byte_seconds"]) == ("alice", None, None, None)
