"""The documentation is the description, whole, and its commands run."""

import json
import subprocess

from playwright.sync_api import expect

from tests.e2e.conftest import Server
from tests.page.conftest import Visit
from tests.waiting import HANGS_SECONDS

NEEDS_MORE = {"embeddings", "stored_response", "status", "load", "unload", "reload"}
"""What this server refuses: it has no model for embeddings, stores nothing and runs without keys."""


def test_every_operation_is_there_with_its_fields_and_answers(visit: Visit, server: Server) -> None:
    description = json.loads(server.get("/openapi.json")[1])
    operations = [operation for item in description["paths"].values() for operation in item.values()]
    page = visit.page
    page.goto(f"{visit.url}/docs")
    expect(page.locator(".operation")).to_have_count(len(operations))
    for operation in operations:
        section = page.locator(f"#op-{operation['operationId']}")
        expect(section).to_contain_text(operation["summary"])
        assert section.locator(".status").all_inner_texts() == sorted(operation["responses"])

    chat = page.locator("#op-chat_completions")
    names = chat.locator("h4:has-text('Body') + .fields > .of > .head .name").all_inner_texts()
    assert names == list(description["components"]["schemas"]["ChatBody"]["properties"])
    expect(chat.locator(".of", has_text="temperature").first).to_contain_text("0 to 2")
    expect(chat.locator(".of", has_text="max_tokens").first).to_contain_text("Absent takes what the prompt leaves")

    messages = chat.locator("details.of", has_text="messages").first
    messages.locator("summary").first.focus()
    page.keyboard.press("Enter")
    expect(messages.locator(".fields")).to_contain_text("role")
    chat.locator("details.answer", has_text="200").locator("summary").first.click()
    expect(chat.locator("details.answer").first).to_contain_text("ChatChunk")


def test_its_commands_run(visit: Visit) -> None:
    page = visit.page
    page.goto(f"{visit.url}/docs")
    expect(page.locator(".operation").first).to_be_visible()
    for operation in page.locator(".operation").all():
        name = (operation.get_attribute("id") or "").removeprefix("op-")
        if name in NEEDS_MORE:
            continue
        operation.get_by_role("button", name="Copy").click()
        command = operation.locator(".example code").inner_text()
        assert visit.clipboard() == command
        strict = command.replace("curl ", "curl --silent --show-error --fail ", 1)
        ran = subprocess.run(["bash", "-c", strict], capture_output=True, text=True, timeout=HANGS_SECONDS, check=False)
        assert ran.returncode == 0, f"{command}\n{ran.stderr}"
        assert ran.stdout.strip()
