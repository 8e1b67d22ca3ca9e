"""Light and dark, narrow and wide, and what axe-core finds (https://github.com/dequelabs/axe-core)."""

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.e2e.conftest import Server
from tests.page.conftest import Visit

VIEWS = ("/", "/#engines", "/docs")


def luminance(page: Page) -> float:
    """Of the page's ground, from 0 to 1."""
    red, green, blue = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
    return float(0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255


def settle(page: Page) -> None:
    """Wait until what the page asks for first is there."""
    expect(page.locator("main[aria-busy=true], main [aria-busy=true]:visible")).to_have_count(0)
    if page.locator("#model").count():
        expect(page.locator("#model option").first).to_be_attached()


def unfold(page: Page) -> None:
    """Open all that can be opened of one operation."""
    closed = page.locator("#op-chat_completions details:not([open]) > summary").filter(visible=True)
    while closed.count():
        closed.first.click()


@pytest.mark.parametrize("view", VIEWS)
def test_the_page_is_dark_where_the_system_is_and_otherwise_on_request(visit: Visit, view: str) -> None:
    page = visit.page
    page.emulate_media(color_scheme="dark")
    page.goto(visit.url + view)
    assert luminance(page) < 0.1
    page.emulate_media(color_scheme="light")
    assert luminance(page) > 0.9
    page.get_by_role("button", name="Dark theme").click()
    assert luminance(page) < 0.1
    page.reload()
    assert luminance(page) < 0.1, "it is remembered"
    page.get_by_role("button", name="Light theme").click()
    assert luminance(page) > 0.9


@pytest.mark.parametrize("view", VIEWS)
def test_a_phone_need_not_scroll_sideways(browser: Browser, server: Server, view: str) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 780}, has_touch=True, is_mobile=True)
    visit = Visit(context.new_page(), server.url)
    visit.page.goto(server.url + view)
    settle(visit.page)
    assert visit.overflow() == 0
    if view == "/":
        visit.page.get_by_role("button", name="Settings", exact=True).click()
        expect(visit.page.get_by_label("System prompt")).to_be_visible()
        assert visit.overflow() == 0
        visit.set(max_tokens=40)
        visit.page.get_by_role("button", name="Close the settings").click()
        visit.ask(f"Repeat this: {'a' * 300}")
        assert visit.overflow() == 0
        visit.page.locator(".token").nth(1).tap()
        box = visit.page.get_by_role("tooltip").bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
    if view == "/docs":
        visit.page.get_by_text("Operations", exact=True).click()
        unfold(visit.page)
        assert visit.overflow() == 0
    visit.close()
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", [*VIEWS, "conversation"])
def test_axe_finds_nothing(browser: Browser, server: Server, view: str, scheme: str) -> None:
    context: BrowserContext = browser.new_context(color_scheme=scheme, bypass_csp=True)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(server.url + ("/" if view == "conversation" else view))
    settle(page)
    if view == "conversation":
        visit = Visit(page, server.url)
        visit.set(max_tokens=40)
        visit.ask("Why is the sky blue?")
        page.get_by_role("button", name="Show probabilities").click()
        page.locator(".token").nth(2).hover()
    if view == "/docs":
        unfold(page)
    found = Axe().run(page)
    context.close()
    assert found.violations_count == 0, found.generate_report()
