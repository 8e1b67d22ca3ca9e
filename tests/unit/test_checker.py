"""Constraints, checked by the process that compiles them."""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

import server.checker
from runtime import bundle
from runtime.grammar import compiled, vocabulary
from runtime.messages import Constraint
from server import compiling, constraints
from server.checker import COMMAND, MOST_OF_A_CLIENT, Checker
from server.compiling import Question, Vocabulary
from server.doors import Limits
from server.errors import ApiError
from server.tools import Tool, format_of
from tests import schemas
from tests.waiting import HANGS_SECONDS

OF = "response_format.json_schema.schema"
NONE = Limits()


@dataclass
class Asking:
    """A checker, and the model whose answers it is asked about."""

    checker: Checker
    tokens: Vocabulary

    async def check(self, constraint: Constraint, client: str = "", limits: Limits = NONE) -> None:
        await self.checker.check(constraint, self.tokens, of=OF, client=client, limits=limits)

    async def complaint(self, constraint: Constraint) -> str:
        """What the client is told; empty where the constraint is taken."""
        try:
            await self.check(constraint)
        except ApiError as error:
            told = error
        else:
            return ""
        assert (told.status, told.param) == (400, OF)
        assert repr(OF) in str(told)
        return str(told)

    async def refusal(self, constraint: Constraint, **asked: Any) -> ApiError:
        """Why nothing could be found out."""
        with pytest.raises(ApiError) as told:
            await self.check(constraint, **asked)
        return told.value


PATIENT = f"from server import compiling; compiling.WALL_SECONDS, compiling.NICE = {HANGS_SECONDS}, 0; compiling.main()"
"""The process, on a machine that may have much else to do: it gives way to nobody, and the seconds that count are its own."""


@pytest.fixture
async def asking(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Asking]:
    monkeypatch.setattr(server.checker, "COMMAND", ("-P", "-c", PATIENT, "server.compiling"))
    checker = Checker()
    yield Asking(checker, constraints.vocabulary(tiny_bundle, bundle.read(tiny_bundle)))
    await checker.close()


def schema(value: Any) -> Constraint:
    return constraints.json_schema(value, of=OF)


async def test_what_can_be_met_is_taken(asking: Asking) -> None:
    for constraint in [
        constraints.json_object(),
        schema(True),
        schema({"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}}),
        constraints.regex("[a-z]+", of=OF),
        constraints.choice(["yes", "no"], of=OF),
        constraints.lark('start: "a" | %json {"type": "null"}', of=OF),
        *[schema(schemas.schema(seed)) for seed in range(30)],
    ]:
        assert await asking.complaint(constraint) == ""


@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "use anyOf"),
        (schema({"type": "integer", "minimum": 2, "maximum": 1}), "Unsatisfiable"),
        (schema({"$ref": "#/$defs/none"}), "none"),
        (schema({"$ref": "http://example.com/schema"}), "does not fetch"),
        (schema({"$ref": "#"}), "no text can meet it"),
        (schema({"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]}), "without an end"),
        (schema({"type": "strin"}), "strin"),
        (constraints.regex("(", of=OF), "unclosed group"),
        (constraints.regex("a(?!b)", of=OF), "look-around"),
        (constraints.lark("begin: /a/", of=OF), "start"),
        (constraints.choice(["<|im_end|>"], of=OF), "special tokens"),
    ],
)
async def test_what_cannot_be_met_is_refused_with_the_reason(constraint: Constraint, reason: str, asking: Asking) -> None:
    assert reason in await asking.complaint(constraint)


def bombs(count: int) -> list[Constraint]:
    """All different, and each takes all of its time."""
    return [Constraint(SLOW.kind, f"{SLOW.source} // {index}") for index in range(count)]


BOMBS: dict[str, Callable[[], Constraint]] = {
    "powers of repetition": lambda: constraints.regex("(a{1,1000}){1,1000}", of=OF),
    "lengths of which all are multiples": lambda: constraints.lark(
        "start: T\nT: " + " & ".join(f"/(.{{{prime}}})*/" for prime in (2, 3, 5, 7, 11, 13, 17, 19, 23)), of=OF
    ),
    "a chain of rules deeper than the stack": lambda: constraints.lark(
        "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(15_000)) + '\na15000: "x"', of=OF
    ),
    "a chain of terminals": lambda: constraints.lark(
        "start: A0\n" + "\n".join(f"A{i}: A{i + 1}" for i in range(15_000)) + '\nA15000: "x"', of=OF
    ),
    "a chain of references": lambda: schema(
        {"$ref": "#/$defs/0", "$defs": {f"{i}": {"$ref": f"#/$defs/{i + 1}"} for i in range(7000)} | {"7000": {}}}
    ),
    "doubling terminals": lambda: constraints.lark(
        "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(60)) + '\nA60: "x"', of=OF
    ),
    "doubling references": lambda: schema(
        {"allOf": [{"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in range(4)]} for i in range(20)]}
    ),
    "many multiples": lambda: schema({"type": "integer", "multipleOf": 999_983}),
    "thousands of optional properties": lambda: schema({"properties": {f"p{i}": {"type": "string"} for i in range(5000)}}),
    "a large enumeration": lambda: schema({"enum": [f"the value {i}" for i in range(13_000)]}),
    "nested brackets": lambda: constraints.lark("start: " + "(" * 100_000 + '"a"' + ")" * 100_000, of=OF),
    "nested groups": lambda: constraints.regex("(" * 100_000 + "a" + ")" * 100_000, of=OF),
    "an ambiguous grammar": lambda: constraints.lark('start: a\na: a a | a a a | "x" | "xx" |', of=OF),
}


SLOW = BOMBS["lengths of which all are multiples"]()
"""It takes all of its time."""


@pytest.mark.parametrize("name", BOMBS)
async def test_a_bomb_goes_off_within_limits(name: str, asking: Asking) -> None:
    """What compiles in time is harmless; what does not is refused in time. Either way others are served meanwhile."""
    await asking.check(constraints.json_object())  # the process runs
    helper, most = _helper(), 0
    bomb = asyncio.create_task(asking.complaint(BOMBS[name]()))
    assert await asking.complaint(constraints.regex("[ab]", of=OF)) == ""
    while not bomb.done():
        for process in [helper, *helper.children()]:
            try:
                most = max(most, process.memory_info().rss)
            except psutil.NoSuchProcess:
                continue
        await asyncio.sleep(0.01)
    told = await bomb
    assert most - helper.memory_info().rss < 300 << 20
    assert _helper().pid == helper.pid
    if not told:
        words = vocabulary(Path(asking.tokens.path), asking.tokens.vocab_size, asking.tokens.stop_ids)
        started = time.thread_time()
        compiled(words, BOMBS[name]())
        assert time.thread_time() - started < compiling.CPU_SECONDS


def _helper() -> psutil.Process:
    children = psutil.Process().children()
    return next(process for process in children if "server.compiling" in process.cmdline())


async def test_many_options(asking: Asking) -> None:
    assert await asking.complaint(constraints.choice([f"the option {i}" for i in range(5000)], of=OF)) == ""


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Question]:
    """What the process is asked, in its order."""
    asked: list[Question] = []

    def noting(*question: Any) -> Question:
        asked.append(Question(*question))
        return asked[-1]

    monkeypatch.setattr(server.checker, "Question", noting)
    return asked


async def test_verdicts_are_remembered_and_shared(
    asking: Asking, sent: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = constraints.regex("[a-z]", of=OF), constraints.regex("(", of=OF)
    told = await asyncio.gather(*[asking.complaint(constraint) for constraint in [good, bad] * 10])
    assert len(set(told)) == 2
    assert len(sent) == 2
    monkeypatch.setattr(server.checker, "REMEMBERED", 1)
    await asking.complaint(constraints.regex("[0-9]", of=OF))
    await asking.complaint(good)
    assert len(sent) == 4


async def test_a_process_that_is_killed_is_replaced(asking: Asking, caplog: pytest.LogCaptureFixture) -> None:
    assert await asking.complaint(constraints.regex("a", of=OF)) == ""
    first = _helper()
    slow = asyncio.create_task(asking.refusal(SLOW))
    while not first.children():
        await asyncio.sleep(0.01)
    first.kill()
    assert (await slow).status == 503
    assert await asking.complaint(constraints.regex("b", of=OF)) == ""
    assert _helper().pid != first.pid
    assert "status -9" in caplog.text


async def test_a_process_that_talks_nonsense_is_replaced(asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its verdict is on what it was not asked. Whoever asks afterwards is answered."""
    assert await asking.complaint(constraints.regex("a", of=OF)) == ""
    first = _helper()
    with monkeypatch.context() as patched:
        patched.setattr(server.checker, "Question", lambda id, *asked: Question(id + 1000, *asked))
        told = await asyncio.wait_for(asking.refusal(constraints.regex("b", of=OF)), HANGS_SECONDS)
    assert told.status == 503
    assert await asyncio.wait_for(asking.complaint(constraints.regex("b", of=OF)), HANGS_SECONDS) == ""
    assert psutil.wait_procs([first], timeout=HANGS_SECONDS)[1] == []


async def test_a_process_that_cannot_be_started(asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", "/nowhere/python")
        assert (await asking.refusal(constraints.regex("a", of=OF))).status == 503
    assert await asking.complaint(constraints.regex("a", of=OF)) == ""


async def test_what_the_machine_is_at_fault_for_is_not_remembered(asking: Asking) -> None:
    """Killed as the kernel does where all memory is out, while it would have taken its time."""
    assert await asking.complaint(constraints.regex("a", of=OF)) == ""
    slow = asyncio.create_task(asking.refusal(SLOW))
    while not (forks := _helper().children()):
        await asyncio.sleep(0.01)
    forks[0].kill()
    told = await slow
    assert (told.status, told.headers) == (503, {"Retry-After": "1"})
    assert compiling.TOO_LONG in await asking.complaint(SLOW)


async def test_what_is_late_by_the_clock_alone_may_be_asked_again(asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork that does not run because it is stopped."""
    monkeypatch.setattr(server.checker, "COMMAND", COMMAND)
    assert await asking.complaint(constraints.regex("a", of=OF)) == ""
    slow = asyncio.create_task(asking.refusal(SLOW))
    least = min(19, os.nice(0) + compiling.NICE)
    while not (forks := _helper().children()) or forks[0].nice() != least:
        await asyncio.sleep(0.01)
    forks[0].suspend()
    told = await asyncio.wait_for(slow, HANGS_SECONDS)
    assert told.status == 503
    assert compiling.TOO_BUSY in str(told)
    assert not forks[0].is_running()


async def test_too_many_at_once_are_told_to_come_again(asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.checker, "MOST_OPEN", 3)
    told = await asyncio.gather(
        *[asking.check(constraints.regex(f"a{{{i}}}", of=OF)) for i in range(1, 9)], return_exceptions=True
    )
    refused = [error for error in told if isinstance(error, ApiError)]
    assert {error.status for error in refused} == {503}
    assert len(refused) == 5


async def test_a_client_with_many_bombs_holds_up_itself(asking: Asking, sent: list[Question]) -> None:
    assert await asking.complaint(constraints.regex("a", of=OF)) == ""
    crowd = [asyncio.create_task(asking.check(bomb, "crowd")) for bomb in bombs(MOST_OF_A_CLIENT)]
    while len(sent) < 1 + compiling.AT_ONCE:  # All of them have been taken in by then, and the first have their turns.
        await asyncio.sleep(0.01)
    told = await asking.refusal(constraints.regex("b", of=OF), client="crowd")
    assert (told.status, told.headers) == (429, {"Retry-After": "1"})
    await asking.check(constraints.regex("b", of=OF), "another")  # which does not wait for all of those
    assert len(sent) <= 2 * compiling.AT_ONCE + 2
    for task in crowd:
        task.cancel()
    await asyncio.wait(crowd)
    await asking.check(constraints.regex("c", of=OF), "crowd")


async def test_what_nobody_waits_for_any_more_has_no_turn(asking: Asking, sent: list[Question]) -> None:
    assert await asking.complaint(constraints.regex("a", of=OF)) == ""
    row = bombs(20)
    gone = [asyncio.create_task(asking.check(bomb)) for bomb in row]
    shared = asyncio.create_task(asking.complaint(row[-1]))
    while len(sent) < 1 + compiling.AT_ONCE:
        await asyncio.sleep(0.01)
    for task in gone:
        task.cancel()
    await asyncio.wait(gone)
    assert compiling.TOO_LONG in await shared
    assert len(sent) == 1 + compiling.AT_ONCE + 1


async def test_the_requests_limits_of_time_hold_while_it_waits(asking: Asking) -> None:
    assert await asking.complaint(constraints.regex("a", of=OF)) == ""
    for limits in (Limits(queue_seconds=0.2), Limits(total_seconds=0.2), Limits(queue_seconds=9, total_seconds=0.2)):
        told = await asking.refusal(SLOW, limits=limits)
        assert (told.status, told.code) == (504, "timeout")
    await asking.check(constraints.regex("b", of=OF), limits=Limits(queue_seconds=HANGS_SECONDS))


async def test_nothing_is_left_when_it_is_closed(asking: Asking) -> None:
    await asking.check(constraints.json_object())
    waiting = [asyncio.create_task(asking.refusal(bomb)) for bomb in bombs(5)]
    helper = _helper()
    while not (forks := helper.children()):
        await asyncio.sleep(0.01)
    await asking.checker.close()
    assert {told.status for told in await asyncio.gather(*waiting)} == {503}
    assert psutil.wait_procs([helper, *forks], timeout=HANGS_SECONDS)[1] == []


async def test_a_tokenizer_that_cannot_be_read(asking: Asking, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    asking.tokens = Vocabulary(os.fspath(path), "", 512, (2,))
    assert "cannot be constrained" in await asking.complaint(constraints.regex("a", of=OF))


@pytest.mark.parametrize("parallel", [True, False])
async def test_a_tool_whose_arguments_never_end_is_refused(asking: Asking, parallel: bool) -> None:
    formats = format_of("hermes", lambda token: None)
    endless = {"properties": {"x": {"$ref": "#"}}, "required": ["x"]}
    tools = [Tool("fine", parameters={"properties": {"x": {"type": "string"}}}), Tool("endless", parameters=endless)]
    for called, flaw in (("fine", ""), ("endless", "without an end")):
        grammar = constraints.lark(formats.grammar(tools, name=called, parallel=parallel), of=OF)
        assert flaw in await asking.complaint(grammar)
        assert bool(flaw) == bool(await asking.complaint(grammar))
