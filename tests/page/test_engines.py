"""The engines tab moves with the engines."""

import json
import re
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Page, expect

from tests.default_model import MODEL
from tests.e2e.conftest import Server
from tests.e2e.test_server import RUNNING
from tests.page.conftest import Visit, eventually
from tests.waiting import HANGS_SECONDS


def chart(page: Page, title: str) -> str:
    """What a chart draws."""
    drawn = page.locator("figure", has_text=title).locator("path.line-0").get_attribute("d")
    return drawn or ""


def figure(page: Page, title: str) -> float:
    """The newest value of a chart's first line; -1 for none."""
    found = re.match(r"[\d.,]+", page.locator("figure", has_text=title).locator("b").first.inner_text())
    return float(found[0].replace(",", "")) if found else -1


@contextmanager
def busy(server: Server) -> Iterator[None]:
    """While somebody else is answered, one request after another; the last one is broken off at the end."""
    over = threading.Event()
    body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "stream": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(body).encode(), headers)

    def ask() -> None:
        while not over.is_set():
            with urllib.request.urlopen(request, timeout=HANGS_SECONDS) as events:
                while not over.is_set() and events.readline():
                    pass

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        over.set()
        asking.join()


def test_the_charts_move_while_a_request_runs(visit: Visit, server: Server) -> None:
    page = visit.page
    visit.open("/#engines")
    engine = page.locator("#engines-table tbody tr")
    with busy(server):
        expect(engine).to_contain_text(MODEL)
        expect(engine).to_contain_text("1 of 2")
        expect(engine.locator("i.full")).to_have_count(1)
        for title in ("Tokens a second", "Requests", "KV tokens in use", "Between tokens"):
            eventually(lambda title=title: figure(page, title) > 0)  # type: ignore[misc]
        before = chart(page, "KV tokens in use")
        eventually(lambda: chart(page, "KV tokens in use") != before)
        assert figure(page, "KV tokens in use") <= server.metric("engineshed_kv_tokens") + 1000
    server.wait(RUNNING, 0)
    expect(engine).to_contain_text("0 of 2")
    expect(page.locator("figure", has_text="Requests").locator("b").first).to_have_text("0")


def test_it_tells_models_processes_and_memory(visit: Visit) -> None:
    visit.open("/#engines")
    page = visit.page
    expect(page.get_by_role("tabpanel", name="Engines")).to_be_visible()
    expect(page.get_by_role("table", name="Models")).to_contain_text("ready")
    processes = page.get_by_role("table", name="Processes")
    for name in ("supervisor", "http-0", f"{MODEL}@cpu"):
        expect(processes).to_contain_text(name)
    expect(processes).to_contain_text("MiB")
    expect(page.get_by_role("table", name="Memory for engines")).to_contain_text("GiB")


def test_it_says_when_the_server_is_gone_and_goes_on_when_it_is_back(visit: Visit) -> None:
    visit.open("/#engines")
    page = visit.page
    expect(page.locator("#engines-table")).to_contain_text(MODEL)
    page.context.set_offline(True)
    expect(page.locator("#engines-fault")).to_contain_text("does not answer")
    page.context.set_offline(False)
    expect(page.locator("#engines-fault")).to_be_hidden()
    visit.errors = [error for error in visit.errors if "ERR_INTERNET_DISCONNECTED" not in error]
