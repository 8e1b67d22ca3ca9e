"""The playground, as a person uses it: keys and buttons, a real engine, a real browser."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import expect

from server import keys
from tests.default_model import real, says
from tests.e2e.conftest import ROOT, Server, serving
from tests.e2e.test_server import FINISHED, RUNNING
from tests.page.conftest import FRANCE, Visit, chat
from tests.waiting import HANGS_SECONDS

LONG = "Write a long essay on the history of railways."
"""What the model writes about, greedily, for as long as it may."""


def test_an_answer_is_shown_as_it_comes(visit: Visit, server: Server) -> None:
    server.wait(RUNNING, 0)
    visit.open()
    visit.set(temperature=0, max_tokens="")
    with server.held() as advance:
        turn = visit.begin(advance, LONG)
        shown = [turn.locator(".prose").inner_text()]
        while len(shown) < 4:
            advance()
            expect(turn.locator(".prose")).not_to_have_text(shown[-1])
            shown.append(turn.locator(".prose").inner_text())
        visit.wait(turn, "streaming")
        visit.page.keyboard.press("Escape")
    assert all(later.startswith(earlier.rstrip()) for earlier, later in itertools.pairwise(shown))
    server.wait(RUNNING, 0)


def test_what_the_page_of_old_kept_by_itself_is_forgotten(visit: Visit) -> None:
    visit.open()
    visit.page.evaluate("""localStorage.setItem("engineshed.settings", '{"temperature": "0.7", "max_tokens": "512"}')""")
    visit.page.reload()
    temperature = visit.page.get_by_label("Temperature", exact=True)
    expect(temperature).to_have_value("")
    assert visit.page.evaluate("localStorage.getItem('engineshed.settings')") is None
    visit.set(temperature=0.3)
    visit.page.reload()
    expect(temperature).to_have_value("0.3")


def test_an_answers_figures_are_the_servers(visit: Visit, server: Server) -> None:
    server.wait(RUNNING, 0)
    visit.open()
    visit.set(temperature=0, max_tokens=100)
    before = server.metric("engineshed_generated_tokens_total"), server.metric("engineshed_prompt_tokens_total")
    turn = visit.ask(LONG)
    stats = turn.locator(".stats").inner_text()
    tokens, prompt = re.search(r"(\d+) tokens", stats), re.search(r"prompt (\d+)", stats)
    assert tokens is not None
    assert prompt is not None
    after = server.metric("engineshed_generated_tokens_total"), server.metric("engineshed_prompt_tokens_total")
    assert (int(tokens[1]), int(prompt[1])) == (after[0] - before[0], after[1] - before[1])
    assert re.search(r"[\d.]+ tok/s", stats)
    assert re.search(r"first after [\d.]+ m?s", stats)


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_a_stopped_answer_frees_its_slot_and_stays(visit: Visit, server: Server, way: str) -> None:
    server.wait(RUNNING, 0)
    finished = server.metric(FINISHED)
    visit.open()
    visit.set(temperature=0, max_tokens="")
    with server.held() as advance:
        turn = visit.begin(advance, LONG)
        if way == "button":
            visit.page.get_by_role("button", name="Stop", exact=True).click()
        else:
            visit.page.keyboard.press("Escape")
        visit.wait(turn, "stopped")
    server.wait(RUNNING, 0)
    assert server.metric(FINISHED) == finished, "it was answered to its end"
    assert turn.locator(".prose").inner_text().strip()
    expect(turn.locator(".stats")).to_contain_text("stopped")
    expect(visit.page.get_by_role("button", name="Send")).to_be_visible()


def test_greedy_answers_are_the_same_and_seeded_ones_follow_their_seed(visit: Visit) -> None:
    visit.open()
    visit.set(temperature=0, max_tokens=24)
    first = visit.ask(FRANCE).locator(".prose").inner_text()
    assert says(first, "Paris")
    visit.page.get_by_role("button", name="Regenerate").click()
    again = visit.page.locator(".turn.assistant")
    visit.wait(again, "done")
    assert again.locator(".prose").inner_text() == first

    visit.set(temperature=2, seed=1)
    one = visit.ask("Say something.").locator(".prose").inner_text()
    visit.set(seed=2)
    visit.page.locator(".turn.assistant").last.get_by_role("button", name="Regenerate").click()
    visit.wait(visit.page.locator(".turn.assistant").last, "done")
    assert visit.page.locator(".turn.assistant").last.locator(".prose").inner_text() != one


def test_every_setting_reaches_the_server(visit: Visit) -> None:
    visit.open()
    visit.set(temperature=0.5, top_p=0.9, min_p=0.05, top_k=40, max_tokens=4, seed=7)
    visit.page.get_by_label("System prompt").fill("Answer in French.")
    visit.page.get_by_label("Stop strings").fill("END\n\\n\\n")
    with visit.page.expect_request("**/v1/chat/completions") as request:
        visit.ask("Hello")
    sent = json.loads(request.value.post_data or "")
    wanted = {"temperature": 0.5, "top_p": 0.9, "min_p": 0.05, "top_k": 40, "max_tokens": 4, "seed": 7}
    assert wanted.items() <= sent.items()
    assert sent["stop"] == ["END", "\n\n"]
    assert sent["messages"] == [{"role": "system", "content": "Answer in French."}, {"role": "user", "content": "Hello"}]
    assert "frequency_penalty" not in sent, "what is empty is the server's to choose"

    visit.page.reload()
    expect(visit.page.get_by_label("Top k", exact=True)).to_have_value("40")
    visit.page.get_by_role("button", name="Reset").click()
    expect(visit.page.get_by_label("Top k", exact=True)).to_have_value("")


def test_what_is_left_empty_is_the_models_own_and_not_the_pages(visit: Visit) -> None:
    visit.open()
    temperature, slider = (visit.page.get_by_label(f"Temperature{more}", exact=True) for more in ("", ", as a slider"))
    expect(temperature).to_have_value("")
    expect(temperature).to_have_attribute("placeholder", "0.2")
    expect(slider).to_have_value("0.2")
    expect(visit.page.get_by_label("Top p", exact=True)).to_have_attribute("placeholder", "0.9")
    expect(visit.page.get_by_label("Top k", exact=True)).to_have_attribute("placeholder", "all")
    visit.set(max_tokens=2)
    with visit.page.expect_request("**/v1/chat/completions") as request:
        visit.ask("Hello")
    assert not {"temperature", "top_p", "top_k"} & json.loads(request.value.post_data or "").keys()
    visit.set(temperature=0.5)
    expect(slider).to_have_value("0.5")
    visit.set(temperature="")
    expect(slider).to_have_value("0.2")


@real("its probabilities are looked up by a word")
def test_a_token_tells_its_probability_to_the_mouse_and_to_the_keyboard(visit: Visit, server: Server) -> None:
    visit.open()
    visit.set(temperature=0, max_tokens=12)
    turn = visit.ask(FRANCE)
    tokens = chat(server, max_tokens=12, logprobs=True, top_logprobs=5)["choices"][0]["logprobs"]["content"]
    place = next(place for place, token in enumerate(tokens) if "Paris" in token["token"])

    panel = visit.page.get_by_role("tooltip")
    turn.locator(".token", has_text="Paris").first.hover()
    expect(panel.locator(".chosen")).to_contain_text("Paris")
    assert float(panel.locator(".chosen td").last.inner_text()) == pytest.approx(tokens[place]["logprob"], abs=0.02)
    expect(panel.locator("tbody tr")).to_have_count(5)
    others = [other["token"] for other in tokens[place]["top_logprobs"]]
    assert [text.replace("·", " ") for text in panel.locator("td code").all_inner_texts()] == others
    visit.page.mouse.move(0, 0)
    expect(panel).to_be_hidden()

    turn.locator(".prose").focus()
    visit.page.keyboard.press("ArrowRight")
    expect(panel.locator(".chosen code")).to_have_text(tokens[0]["token"].replace(" ", "·"))
    visit.page.keyboard.press("ArrowRight")
    expect(panel.locator(".chosen code")).to_have_text(tokens[1]["token"].replace(" ", "·"))
    expect(visit.page.locator("#said")).to_contain_text("%")
    visit.page.keyboard.press("Escape")
    expect(panel).to_be_hidden()


def test_tokens_are_tinted_by_probability_where_that_is_wanted(visit: Visit) -> None:
    visit.open()
    visit.set(temperature=2, max_tokens=60, seed=3)
    turn = visit.ask("Say something.")
    shown = "element => getComputedStyle(element).backgroundColor"
    unlikely = turn.locator('.token[data-shade="0"]').first
    plain = unlikely.evaluate(shown)
    visit.page.get_by_role("button", name="Show probabilities").click()
    assert unlikely.evaluate(shown) != plain
    colours = {turn.locator(f'.token[data-shade="{shade}"]').first.evaluate(shown) for shade in shades(turn.page.content())}
    assert len(colours) == len(shades(turn.page.content())), "each tenth has a tint of its own"
    visit.page.reload()
    assert visit.page.locator('.token[data-shade="0"]').first.evaluate(shown) != plain, "it stays on, and so does the talk"


def shades(html: str) -> set[str]:
    """The tenths of probability that tokens of the page are in."""
    return set(re.findall(r'data-shade="(\d)"', html))


def test_the_request_runs_elsewhere_as_curl_and_as_python(visit: Visit) -> None:
    visit.open()
    visit.set(temperature=0, max_tokens=24, top_k=5)
    text = visit.ask(f'It\'s a "test" for $HOME: {FRANCE}').locator(".prose").inner_text()

    visit.page.get_by_role("button", name="Copy the request as curl").click()
    expect(visit.page.get_by_text("The request as curl copied")).to_be_visible()
    ran = subprocess.run(["bash", "-c", visit.clipboard()], capture_output=True, text=True, timeout=HANGS_SECONDS, check=True)
    events = [json.loads(line[6:]) for line in ran.stdout.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events).strip() == text.strip()

    visit.page.get_by_role("button", name="Copy the request as Python").click()
    expect(visit.page.get_by_text("The request as Python copied")).to_be_visible()
    ran = subprocess.run(
        [sys.executable, "-c", visit.clipboard()], capture_output=True, text=True, timeout=HANGS_SECONDS, check=True
    )
    assert ran.stdout.strip() == text.strip()


def test_turns_are_edited_deleted_brought_back_and_copied(visit: Visit) -> None:
    visit.open()
    visit.set(temperature=0, max_tokens=24)
    visit.ask("Say hello.")
    visit.page.locator(".turn.user").get_by_role("button", name="Edit").click()
    visit.page.get_by_label("Text of this turn").fill(FRANCE)
    visit.page.get_by_role("button", name="Save and ask again").click()
    answer = visit.page.locator(".turn.assistant").last
    expect(visit.page.locator(".turn.user")).to_contain_text(FRANCE)
    visit.wait(answer, "done")
    expect(visit.page.locator(".turn")).to_have_count(2)
    said = answer.locator(".prose").inner_text()
    assert says(said, "Paris")

    answer.get_by_role("button", name="Copy").click()
    expect(visit.page.get_by_text("The answer copied")).to_be_visible()
    assert visit.clipboard().split() == said.split()

    answer.get_by_role("button", name="Delete").click()
    expect(visit.page.locator(".turn")).to_have_count(1)
    visit.page.get_by_role("button", name="Undo").click()
    expect(visit.page.locator(".turn")).to_have_count(2)

    visit.page.reload()
    expect(visit.page.locator(".turn.assistant .prose")).to_have_text(said)
    visit.page.get_by_role("button", name="New chat").click()
    expect(visit.page.locator(".turn")).to_have_count(0)
    expect(visit.page.get_by_role("heading", name="Ask ")).to_be_visible()


def test_an_answer_may_be_written_by_hand_and_the_model_goes_on_from_it(visit: Visit) -> None:
    visit.open()
    visit.set(max_tokens=4)
    visit.ask("Say hello.")
    visit.page.locator(".turn.assistant").get_by_role("button", name="Edit").click()
    visit.page.get_by_label("Text of this turn").fill("My name is Zebedee.")
    visit.page.keyboard.press("Enter")
    with visit.page.expect_request("**/v1/chat/completions") as request:
        visit.ask("What is your name?")
    sent = json.loads(request.value.post_data or "")["messages"]
    assert [message["content"] for message in sent] == ["Say hello.", "My name is Zebedee.", "What is your name?"]


def test_an_error_is_told_where_it_happened(visit: Visit) -> None:
    visit.refused = [400]
    visit.open()
    visit.set(max_tokens=100_000)
    turn = visit.send("Hello")
    visit.wait(turn, "failed")
    expect(turn.get_by_role("alert")).to_contain_text("context")
    expect(turn.get_by_role("alert")).to_contain_text("status 400")
    field = visit.page.get_by_label("Max tokens", exact=True)
    expect(field).to_have_attribute("aria-invalid", "true")
    visit.set(max_tokens=4)
    expect(field).not_to_have_attribute("aria-invalid", "true")
    turn.get_by_role("button", name="Try again").click()
    visit.wait(visit.page.locator(".turn.assistant"), "done")


@real("it is to write HTML")
def test_what_looks_like_markup_is_text(visit: Visit) -> None:
    visit.open()
    visit.set(temperature=0, max_tokens=120)
    turn = visit.ask("Write a minimal HTML page.")
    assert re.search(r"<(html|h1|body|!DOCTYPE)", turn.locator(".prose").inner_text(), re.IGNORECASE)
    assert turn.locator(".prose :not(p, pre, code, span)").count() == 0

    harm = '<img src=/nowhere onerror="window.harmed = true"><b>bold</b> <script>window.harmed = true</script>'
    visit.send(harm)
    expect(visit.page.locator(".turn.user .prose").last).to_have_text(harm)
    assert visit.page.evaluate("window.harmed") is None
    assert f"{visit.url}/nowhere" not in visit.asked
    refused = visit.page.evaluate("() => { try { document.body.innerHTML = 'x'; } catch (error) { return error.name; } }")
    assert refused == "TypeError", "the browser keeps every script from making markup of text"
    assert "TrustedHTML" in visit.errors.pop()


def test_code_is_set_apart_and_may_be_long(visit: Visit) -> None:
    visit.open()
    visit.set(max_tokens=8)  # The code and what was said before must fit into the context.
    visit.send("Hello")
    turn = visit.page.locator(".turn.user")
    turn.get_by_role("button", name="Edit")
    visit.page.get_by_label("Message", exact=True).fill(f"Look:\n```python\n{'x' * 500} = 1\n\nprint()\n```\nafter it\n\nlast")
    visit.wait(visit.page.locator(".turn.assistant"), "done")
    visit.page.keyboard.press("Enter")
    prose = visit.page.locator(".turn.user .prose").last
    expect(prose.locator("pre")).to_have_attribute("data-language", "python")
    assert prose.locator("pre").inner_text().endswith("= 1\n\nprint()")
    assert prose.locator("p").all_inner_texts() == ["Look:", "after it", "last"]
    assert visit.overflow() == 0
    visit.wait(visit.page.locator(".turn.assistant").last, "done")


def test_the_keyboard_is_enough(visit: Visit) -> None:
    visit.open()
    expect(visit.page.get_by_label("Message", exact=True)).to_be_focused()
    visit.set(max_tokens=24)
    visit.page.get_by_label("Message", exact=True).focus()
    visit.page.keyboard.type("Say")
    visit.page.keyboard.press("Shift+Enter")
    visit.page.keyboard.type("hello?")
    expect(visit.page.get_by_label("Message", exact=True)).to_have_value("Say\nhello?")
    visit.page.keyboard.press("Enter")
    visit.wait(visit.page.locator(".turn.assistant"), "done")

    visit.page.locator("body").click(position={"x": 5, "y": 400})
    visit.page.keyboard.press("?")
    expect(visit.page.get_by_role("dialog", name="Keyboard")).to_be_visible()
    visit.page.keyboard.press("Escape")
    visit.page.keyboard.press("n")
    expect(visit.page.locator(".turn")).to_have_count(0)
    expect(visit.page.get_by_label("Message", exact=True)).to_be_focused()

    visit.page.get_by_role("tab", name="Chat").focus()
    visit.page.keyboard.press("ArrowRight")
    expect(visit.page.get_by_role("tab", name="Engines")).to_have_attribute("aria-selected", "true")
    expect(visit.page.get_by_role("tabpanel", name="Engines")).to_be_visible()
    visit.page.keyboard.press("ArrowRight")
    expect(visit.page.get_by_role("tabpanel", name="Chat")).to_be_visible()

    for _ in range(60):  # Every stop of the Tab key can be seen to have the focus.
        visit.page.keyboard.press("Tab")
        seen = visit.page.evaluate(
            "() => { const at = document.activeElement; if (at === document.body) return true;"
            " return getComputedStyle(at).outlineStyle !== 'none' && at.getClientRects().length > 0; }"
        )
        assert seen, visit.page.evaluate("document.activeElement.outerHTML")


def test_a_server_with_keys_is_asked_with_one(visit: Visit, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    made = {}
    for name, admin in (("alice", False), ("root", True)):
        entry, made[name] = keys.new(name, admin=admin)
        keys.update(file, lambda others, entry=entry: [*others, entry])  # type: ignore[misc]
    with serving(f"--keys={file}", "--slots=1", "--context=512", "--log-level=warning") as server:
        visit.url = server.url
        visit.refused = [401, 403]
        page = visit.page
        page.goto(server.url)
        dialog = page.get_by_role("dialog", name="API key")
        expect(dialog).to_contain_text("needs an API key")
        dialog.get_by_label("Key").fill("es-wrong")
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("not one of this server's")
        dialog.get_by_label("Key").fill(made["alice"])
        dialog.get_by_role("button", name="Use this key").click()
        expect(page.locator("#model option").first).to_be_attached()
        expect(dialog).to_be_hidden()
        visit.set(temperature=0, max_tokens=12)
        text = visit.ask(FRANCE).locator(".prose").inner_text()

        page.get_by_role("button", name="Copy the request as curl").click()
        expect(page.get_by_text("The request as curl copied")).to_be_visible()
        command = visit.clipboard()
        assert made["alice"] not in command
        environment = {**os.environ, "ENGINESHED_API_KEY": made["alice"]}
        ran = subprocess.run(
            ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=HANGS_SECONDS, check=True
        )
        assert '"content":' in ran.stdout
        page.get_by_role("button", name="Copy the request as Python").click()
        expect(page.get_by_text("The request as Python copied")).to_be_visible()
        program = [sys.executable, "-c", visit.clipboard()]
        ran = subprocess.run(
            program, env=environment, capture_output=True, text=True, timeout=HANGS_SECONDS, check=True, cwd=ROOT
        )
        assert ran.stdout.strip() == text.strip()
        assert page.evaluate("Object.values(localStorage).join()").find(made["alice"]) < 0

        page.get_by_role("tab", name="Engines").click()
        expect(page.locator("#admin-note")).to_contain_text("no admin's")
        page.get_by_role("button", name="API key").click()
        dialog.get_by_label("Key").fill(made["root"])
        page.keyboard.press("Enter")
        expect(page.locator("#processes-table")).to_contain_text(str(server.engines()[0]))
        page.get_by_role("button", name="unload").click()
        expect(page.locator("#engines-table")).to_contain_text("No engine is loaded")
