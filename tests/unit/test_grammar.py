"""Constrained answers through the real loop and engine: whatever a model of random weights says, it keeps to the form."""

import itertools
import json
import random
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer

from runtime import bundle, grammar, ort
from runtime.engine import Batch, Draw, Float32, Int64
from runtime.grammar import GrammarError, Grammars, Masks, Matcher, compiled
from runtime.loop import Loop
from runtime.messages import Constraint, Generate, Progress, Row, Sampling
from runtime.ort import OrtEngine
from tests import schemas
from tests.unit.test_loop import FRONT, drain, prompt, run, tokens
from tests.unit.test_worker import Front, worker
from tests.waiting import HANGS_SECONDS

SLOTS = 4
CONTEXT = 512
TEMPERATURES = (0.0, 0.5, 1.0, 1.5, 2.0)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> Iterator[OrtEngine]:
    engine = ort.load(tiny_bundle, "cpu-fp32", slots=SLOTS, context=CONTEXT, threads=1)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def grammars(tiny_bundle: Path) -> Iterator[Grammars]:
    made = _grammars(tiny_bundle)
    yield made
    made.close()


@pytest.fixture
def loop(engine: OrtEngine, grammars: Grammars) -> Loop:
    return Loop(engine, queue=1000, queue_tokens=10**9, grammars=grammars)


@pytest.fixture(scope="module")
def text(tiny_bundle: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_bundle / bundle.TOKENIZER))


def wait_until_idle(grammars: Grammars, constraint: Constraint) -> None:
    """The mask of its beginning is found in a thread."""
    deadline = time.monotonic() + HANGS_SECONDS
    while not any(matcher.constraint == constraint for matcher in grammars._idle):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def _grammars(folder: Path) -> Grammars:
    manifest = bundle.read(folder)
    return Grammars(folder / bundle.TOKENIZER, manifest.vocab_size, manifest.stop_ids)


def json_schema(schema: Any) -> Constraint:
    return Constraint("json_schema", json.dumps(schema))


def asking(name: str, constraint: Constraint | None, temperature: float = 0.0, **others: Any) -> Generate:
    seed = random.Random(name).randrange(10**6)
    wanted: dict[str, Any] = {"max_tokens": 300, "stop_ids": [0, 2]} | others
    sampling = Sampling(temperature=temperature, seed=seed)
    return Generate(name, prompt(3 + seed % 20, seed), sampling=sampling, constraint=constraint, **wanted)


def answer(text: Tokenizer, rows: list[Row]) -> str:
    said: str = text.decode(tokens(rows), skip_special_tokens=False)
    return said


def test_finished_answers_fit_their_schemas(loop: Loop, text: Tokenizer) -> None:
    """200 random schemas, more requests than slots, at temperatures up to 2."""
    requests = [asking(f"{i}", json_schema(schemas.schema(i)), TEMPERATURES[i % 5]) for i in range(200)]
    rows = run(loop, *requests)
    ended = {name: its[-1].finish for name, its in rows.items()}
    assert set(ended.values()) <= {"stop", "length"}, {name: its[-1].message for name, its in rows.items() if its[-1].message}
    done = [name for name, finish in ended.items() if finish == "stop"]
    assert len(done) > 150, f"only {len(done)} of 200 answers came to an end"
    for name in done:
        value = json.loads(answer(text, rows[name]))
        jsonschema.Draft202012Validator(schemas.schema(int(name)), format_checker=jsonschema.FormatChecker()).validate(value)
    assert loop.counters.accepted_tokens == loop.counters.guessed_tokens > 0  # what is forced is what is drawn


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        (Constraint("regex", r"[a-z]{3,8}(-[0-9]{2}){1,3}"), r"[a-z]{3,8}(-[0-9]{2}){1,3}"),
        (Constraint("regex", r"(?i)yes|no"), r"(?i)yes|no"),
        (Constraint("regex", r"ж{2}[^a-z\n]{4}/\"ü"), r"ж{2}[^a-z\n]{4}/\"ü"),
        (Constraint("lark", 'start: "red" | "dark red" | "redder"'), r"red|dark red|redder"),
        (
            Constraint("lark", 'start: sum\nsum: N ("+" N){1,4}\nN: /[1-9][0-9]{0,2}/'),
            r"[1-9][0-9]{0,2}(\+[1-9][0-9]{0,2}){1,4}",
        ),
        (Constraint("lark", 'start: "<" %json {"type": "integer", "minimum": 0, "maximum": 99} ">"'), r"<\d{1,2}>"),
    ],
)
def test_regular_expressions_choices_and_grammars(loop: Loop, text: Tokenizer, constraint: Constraint, pattern: str) -> None:
    rows = run(loop, *[asking(f"{temperature}", constraint, temperature) for temperature in TEMPERATURES])
    for name, its in rows.items():
        assert its[-1].finish == "stop", name
        assert re.fullmatch(pattern, answer(text, its)), answer(text, its)


def test_forced_tokens_change_no_answer_and_spare_steps(engine: OrtEngine, grammars: Grammars) -> None:
    """Alone, where guesses pay."""
    long = {
        "type": "object",
        "properties": {"the name of the person": {"type": "boolean"}},
        "required": ["the name of the person"],
    }
    requests = [asking(f"{i}", json_schema(schemas.schema(i)), TEMPERATURES[i % 5]) for i in range(40)]
    requests.append(asking("long", json_schema(long)))
    special = 'start: "call" <[1]> %json {"const": "a name"} <[1]> ("yes" | "no") <[1]>'
    requests.append(asking("special tokens", Constraint("lark", special), 1.0))
    answers, steps = [], []
    for speculation in (True, False):
        loop = Loop(engine, queue=100, speculation=speculation, grammars=grammars)
        answers.append([[tokens(its) for its in run(loop, request).values()] for request in requests])
        steps.append(loop.counters.steps)
    assert answers[0] == answers[1]
    assert steps[0] < 0.8 * steps[1]


def test_the_unconstrained_answer_as_if_alone_beside_constrained_ones(engine: OrtEngine, grammars: Grammars) -> None:
    loop = Loop(engine, queue=100, speculation=False, grammars=grammars)
    free = [asking(f"free {i}", None, max_tokens=20 + 9 * i) for i in range(6)]
    alone = {request.id: run(loop, request)[request.id] for request in free}
    bound = [asking(f"bound {i}", json_schema(schemas.schema(i)), 1.0) for i in range(10)]
    together = run(loop, *[request for pair in zip(free, bound, strict=False) for request in pair], *bound[len(free) :])
    for name, rows in alone.items():
        assert tokens(together[name]) == tokens(rows)
        assert [row.logprobs for row in together[name]] == [row.logprobs for row in rows]


def test_an_answer_ends_with_its_grammar_without_another_step(loop: Loop) -> None:
    rows = run(loop, asking("a", Constraint("regex", "yes")))["a"]
    assert rows[-1].finish == "stop"
    assert rows[-1].tokens  # the last token and the end come together


def test_what_stops_an_answer_is_allowed_only_where_it_is_complete(loop: Loop, text: Tokenizer) -> None:
    """Whether the request names stop tokens or not, and however much it wants them."""
    for stop_ids in ([0, 2], []):
        sampling = Sampling(temperature=1.0, seed=3, logit_bias={0: 100.0, 2: 100.0})
        request = Generate("a", prompt(5), 60, sampling, stop_ids, constraint=Constraint("regex", "[ab]{5,50}"))
        rows = run(loop, request)["a"]
        assert re.fullmatch("[ab]{5,8}", answer(text, rows))
        assert rows[-1].finish == "stop"


def test_min_tokens_give_way_to_a_grammar(loop: Loop, text: Tokenizer) -> None:
    rows = run(loop, asking("a", Constraint("regex", "abc"), min_tokens=50, max_tokens=60))["a"]
    assert (answer(text, rows), rows[-1].finish) == ("abc", "stop")
    rows = run(loop, asking("b", Constraint("regex", "(ab)*"), min_tokens=50, max_tokens=60))["b"]
    assert len(tokens(rows)) >= 50
    assert re.fullmatch("(ab)*a?", answer(text, rows))


def test_max_tokens_cut_an_answer(loop: Loop, text: Tokenizer) -> None:
    rows = run(loop, asking("a", Constraint("regex", "[0-9]{200}"), max_tokens=7))["a"]
    assert rows[-1].finish == "length"
    assert len(tokens(rows)) == 7
    assert answer(text, rows).isdigit()


def test_a_recursive_schema(loop: Loop, text: Tokenizer) -> None:
    tree = {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}},
                "required": ["children"],
                "additionalProperties": False,
            }
        },
    }
    rows = run(loop, *[asking(f"{i}", json_schema(tree), 1.0) for i in range(10)])
    done = [its for its in rows.values() if its[-1].finish == "stop"]
    assert done
    for its in done:
        jsonschema.validate(json.loads(answer(text, its)), tree)


@pytest.mark.parametrize(
    ("constraint", "complaint"),
    [
        (Constraint("regex", "(a"), "unclosed group"),
        (Constraint("regex", "(?=a)b"), "look-around"),
        (Constraint("regex", r"[^\s\S]"), "no text can meet it"),
        (Constraint("lark", "start: nope"), "unknown name"),
        (Constraint("lark", '{"grammars": []}'), "begins with a brace"),
        (Constraint("lark", "start: a\na[max_tokens=3]: /.*/"), "max_tokens"),
        (Constraint("json_schema", '{"type": "strin'), "EOF"),
        (json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (json_schema({"type": "array", "minItems": 1, "items": {"$ref": "#"}}), "Too many items"),
        (json_schema({"type": "integer", "minimum": 5, "maximum": 4}), "Unsatisfiable"),
        (json_schema({"type": "string", "format": "no such"}), "Unknown format"),
        (json_schema({"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True}), "uniqueItems"),
    ],
)
def test_a_constraint_that_cannot_be_met_ends_its_request_alone(loop: Loop, constraint: Constraint, complaint: str) -> None:
    rows = run(loop, asking("bad", constraint), asking("good", json_schema(PERSON)), asking("free", None, max_tokens=5))
    assert rows["bad"][-1].finish == "unmet"
    assert complaint in rows["bad"][-1].message
    assert "\n" not in rows["bad"][-1].message
    assert {rows[name][-1].finish for name in ("good", "free")} <= {"stop", "length"}


def test_a_grammar_that_grows_too_large_half_way_ends_its_request_alone(
    engine: OrtEngine, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "_LEXER_STATES", 400)
    loop = Loop(engine, queue=100, grammars=_grammars(tiny_bundle))
    growing = Constraint("regex", r"(\w{1,100} ){1,100}")
    rows = run(loop, asking("large", growing, 1.0), asking("small", Constraint("regex", "[ab]{9}")))
    assert rows["large"][-1].finish == "unmet"
    assert "too many states" in rows["large"][-1].message
    assert tokens(rows["large"])
    assert rows["small"][-1].finish == "stop"
    assert run(loop, asking("small", Constraint("regex", "[ab]{9}")))["small"][-1].finish == "stop"


class Slow(Grammars):
    """Compiles when it is told to."""

    def __init__(self, of: Grammars) -> None:
        self.__dict__ = of.__dict__
        self.go = threading.Event()

    def _compile(self, constraint: Constraint) -> Matcher:
        assert self.go.wait(HANGS_SECONDS)
        return super()._compile(constraint)


def test_others_go_on_while_a_constraint_is_compiled(engine: OrtEngine, tiny_bundle: Path) -> None:
    """Those who came later among them; and what ends meanwhile does so at once."""
    clock = [0.0]
    slow = Slow(_grammars(tiny_bundle))
    loop = Loop(engine, queue=100, grammars=slow, clock=lambda: clock[0])
    unlike = [Constraint("regex", f"[a-c]{{{i}}}") for i in range(3, 6)]
    for name, constraint in zip(("waits", "cancelled", "hasty"), unlike, strict=True):
        assert loop.submit(FRONT, asking(name, constraint, queue_seconds=1.0 if name == "hasty" else 0.0)) is None
    assert loop.submit(FRONT, asking("free", None, max_tokens=30)) is None
    assert loop.waiting == 4
    rows: dict[str, list[Row]] = {}

    def step() -> None:
        for news in loop.step():
            rows.setdefault(news.row.id, []).append(news.row)

    while "free" not in rows or rows["free"][-1].finish is None:
        step()
    news = loop.cancel(FRONT, "cancelled")
    assert news is not None
    assert news.row.finish == "cancelled"
    clock[0] = 2.0
    step()
    assert rows["hasty"][-1].finish == "timeout"
    assert "waited 2.00 s for a slot" in rows["hasty"][-1].message
    assert (loop.waiting, loop.running) == (1, 0)
    slow.go.set()
    rows |= drain(loop)
    assert rows["waits"][-1].finish == "stop"
    assert loop.waiting == 0


def test_what_waits_to_be_compiled_counts_as_waiting(engine: OrtEngine, tiny_bundle: Path) -> None:
    slow = Slow(_grammars(tiny_bundle))
    loop = Loop(engine, queue=1, grammars=slow)
    refused = [loop.submit(FRONT, asking(f"{i}", Constraint("regex", f"a{{{i}}}"))) for i in range(SLOTS + 2)]
    assert [refusal and refusal.reason for refusal in refused] == [None] * (SLOTS + 1) + ["queue full"]
    slow.go.set()
    assert {rows[-1].finish for rows in drain(loop).values()} == {"stop"}


def test_a_mask_that_is_late_holds_up_nobody_else(
    engine: OrtEngine, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row sits steps out, and its answer is what it would have been."""
    loop = Loop(engine, queue=100, speculation=False, grammars=grammars)
    bound = asking("bound", Constraint("regex", "[a-f]{30}"), 1.0)
    expected = tokens(run(loop, bound)["bound"])
    assert bound.constraint is not None
    wait_until_idle(grammars, bound.constraint)
    real, times = Masks.fill, itertools.count()
    order: list[str] = []
    rows: dict[str, list[Row]] = {}
    came = threading.Condition()

    def late(self: Masks, matcher: Any, row: int = 0) -> None:
        if next(times) < 3:
            with came:
                wanted = order.count("free") + 7
                assert came.wait_for(lambda: order.count("free") >= wanted or rows["free"][-1].finish, HANGS_SECONDS)
        real(self, matcher, row)

    def step() -> None:
        for news in loop.step():
            with came:
                order.append(news.row.id)
                rows.setdefault(news.row.id, []).append(news.row)
                came.notify_all()

    monkeypatch.setattr(Masks, "fill", late)
    loop.submit(FRONT, asking("free", None, max_tokens=400, stop_ids=[]))
    while "free" not in rows:  # before which a mask that is late would be waited for
        step()
    loop.submit(FRONT, bound)
    while loop.busy:
        step()
    assert tokens(rows["bound"]) == expected
    between = [i for i, name in enumerate(order) if name == "bound"]
    assert max(b - a for a, b in itertools.pairwise(between)) > 5


def test_cancelled_answers_leave_their_slots_and_grammars(loop: Loop, grammars: Grammars) -> None:
    chance = random.Random(5)
    requests = [asking(f"{i}", json_schema(schemas.schema(i % 7)), 1.0) for i in range(60)]
    waiting, ended = list(requests), set()
    while waiting or loop.busy:
        if waiting and chance.random() < 0.5:
            assert loop.submit(FRONT, waiting.pop()) is None
        if chance.random() < 0.2:
            loop.cancel(FRONT, chance.choice(requests).id)
        ended |= {news.row.id for news in loop.step() if news.row.finish == "stop"}
        loop.slots.check()
    assert loop.slots.free == SLOTS
    assert len(ended) > 5
    for matcher in grammars._idle:
        assert not matcher.failure
    assert len(grammars._idle) <= grammar.IDLE


def test_an_engine_without_grammars_refuses(engine: OrtEngine) -> None:
    refused = Loop(engine, queue=1).submit(FRONT, asking("a", json_schema(PERSON)))
    assert refused is not None
    assert refused.reason == "bad request"


class Ahead:
    """An engine that would begin steps ahead, and notes for what it is asked to."""

    def __init__(self, engine: OrtEngine) -> None:
        self._engine = engine
        self.runs_ahead, self.aheads = True, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self, batch: Batch, ahead: Draw | None = None) -> tuple[Int64, Float32]:
        self.aheads += ahead is not None
        return self._engine.step(batch)


def test_no_step_is_begun_before_the_tokens_that_its_masks_depend_on(engine: OrtEngine, grammars: Grammars) -> None:
    ahead = Ahead(engine)
    loop = Loop(ahead, queue=9, speculation=False, grammars=grammars)
    run(loop, asking("bound", Constraint("regex", "[a-f]{30}")))
    assert ahead.aheads == 0
    run(loop, asking("free", None, max_tokens=30))
    assert ahead.aheads > 0


def test_a_used_grammar_allows_what_a_new_one_does(tiny_bundle: Path) -> None:
    """Every mask along random answers, some of which are left half-way."""
    manifest = bundle.read(tiny_bundle)
    words = grammar.vocabulary(tiny_bundle / bundle.TOKENIZER, manifest.vocab_size, manifest.stop_ids)
    masks, chance = Masks(manifest.vocab_size, 2), random.Random(1)
    for seed in range(30):
        constraint = json_schema(schemas.schema(seed))
        used = compiled(words, constraint)
        for _ in range(4):
            new = compiled(words, constraint)
            for _ in range(chance.randrange(80)):
                masks.fill(used, 0)
                masks.fill(new, 1)
                assert np.array_equal(masks.rows[0], masks.rows[1])
                if new.is_stopped():
                    break
                token = chance.choice(masks.tokens())
                assert used.consume_token(token)
                assert new.consume_token(token)
            assert used.reset()


def test_grammars_are_kept_for_the_next_answer_up_to_a_number(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "IDLE", 2)
    made = _grammars(tiny_bundle)
    constraints = [Constraint("regex", f"a{{{i}}}") for i in range(1, 5)]
    first = [made.matcher(constraint).result(30) for constraint in constraints]
    for matcher in first:
        assert matcher.ready(0)
        made.give_back(matcher)
        wait_until_idle(made, matcher.constraint)
    assert made.matcher(constraints[3]).result(0) is first[3]
    assert made.matcher(constraints[3]).result(30) is not first[3]  # which somebody has
    assert made.matcher(constraints[0]).result(30) is not first[0]


def test_the_worker_takes_constraints(tiny_bundle: Path, tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/worker.sock"
    with worker(tiny_bundle, address, "--queue=9"):
        front = Front(address)
        front.wait_ready()
        wanted = {"good": Constraint("regex", "yes|no"), "bad": Constraint("regex", "("), "free": None}
        for name, constraint in wanted.items():
            front.send(asking(name, constraint, max_tokens=9))
        ended: dict[str, Row] = {}
        while len(ended) < 3:
            reply = front.receive()
            if isinstance(reply, Progress):
                ended |= {row.id: row for row in reply.rows if row.finish is not None}
    assert ended["good"].finish == "stop"
    assert (ended["bad"].finish, "unclosed group" in ended["bad"].message) == ("unmet", True)
    assert ended["free"].finish in ("stop", "length")


def test_a_tokenizer_that_llguidance_cannot_read_is_said_to_be_that(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    future: Future[Matcher] = Grammars(tmp_path / "tokenizer.json", 512, [2]).matcher(Constraint("regex", "a"))
    with pytest.raises(GrammarError, match="cannot be constrained"):
        future.result(30)
