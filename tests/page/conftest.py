"""A real Chromium on the page of a real server, and what both must never do."""

import json
import os
import re
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from tests.e2e.conftest import Server, serving
from tests.waiting import HANGS_SECONDS

FRANCE = "Complete the sentence: The capital of France is"
"""What the model answers with a wide margin, so that no rounding decides a word."""
HANGS_MS = 1000 * HANGS_SECONDS

expect.set_options(timeout=HANGS_MS)  # Whatever is expected comes when it comes: the machine may be busy.


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--slots=2", "--context=1024", "--log-level=warning") as running:
        yield running


@pytest.fixture(scope="module")  # A longer life would leave its event loop running under the tests of other folders.
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.fail("there is no Chromium: run apt-get install chromium, or set CHROMIUM to one's path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])  # which root cannot have
        yield browser
        browser.close()


@dataclass
class Visit:
    """A browser tab, and what a person does in it."""

    page: Page
    url: str
    refused: list[int] = field(default_factory=list)
    """Statuses of answers that the test expects; the browser calls each one an error."""
    asked: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self._note(message.type, message.text))

    def open(self, path: str = "/") -> None:
        """Go there, and wait until the models are known."""
        self.page.goto(self.url + path)
        expect(self.page.locator("#model option").first).to_be_attached()

    def begin(self, advance: Callable[[], None], text: str) -> Locator:
        """Send a message to engines that are held, and have them `advance` until some of the answer is to be seen."""
        turn = self.send(text)
        prose = turn.locator(".prose")
        while not (prose.count() and prose.inner_text().strip()):
            advance()
        self.wait(turn, "streaming")
        return turn

    def send(self, text: str) -> Locator:
        """Write a message and press Enter; gives the answer's turn."""
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.keyboard.press("Enter")
        return self.page.locator(".turn.assistant").last

    def ask(self, text: str) -> Locator:
        """The same, and wait until the answer is complete."""
        turn = self.send(text)
        self.wait(turn, "done")
        return turn

    def wait(self, turn: Locator, state: str) -> None:
        """Return once the turn is in that state."""
        expect(turn).to_have_attribute("data-state", state)

    def set(self, **values: float | str) -> None:
        """Type into the settings, by their labels' first words: `max_tokens=5`."""
        for name, value in values.items():
            label = name.replace("_", " ").capitalize()
            self.page.get_by_label(label, exact=True).fill(str(value))

    def clipboard(self) -> str:
        """What was copied."""
        text = self.page.evaluate("navigator.clipboard.readText()")
        assert isinstance(text, str)
        return text

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        wider = self.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert isinstance(wider, int)
        return wider

    def close(self) -> None:
        """Nothing was asked of anybody else, and nothing failed that was not meant to."""
        elsewhere = [url for url in self.asked if not url.startswith((f"{self.url}/", "data:"))]
        assert elsewhere == []
        assert self.errors == []

    def _note(self, type_: str, text: str) -> None:
        status = re.search(r"the server responded with a status of (\d+)", text)
        if type_ in ("error", "warning") and not (status and int(status[1]) in self.refused):
            self.errors.append(text)


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, permissions=["clipboard-read", "clipboard-write"])
    yield context
    context.close()


@pytest.fixture
def visit(context: BrowserContext, server: Server) -> Iterator[Visit]:
    """A visit to the page, which must not fail and must not ask anybody else for anything."""
    context.set_default_timeout(HANGS_MS)
    visit = Visit(context.new_page(), server.url)
    yield visit
    visit.close()


def chat(server: Server, **fields: Any) -> Any:
    """The whole answer to FRANCE, without a browser."""
    body = {"messages": [{"role": "user", "content": FRANCE}], "temperature": 0, **fields}
    request = urllib.request.Request(f"{server.url}/v1/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=HANGS_SECONDS) as response:
        return json.load(response)


def eventually(check: Callable[[], bool], seconds: float = HANGS_SECONDS) -> None:
    """Return once `check` gives True. The page's policy forbids what Playwright's own wait_for_function does."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)
