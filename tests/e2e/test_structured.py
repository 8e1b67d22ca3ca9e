"""Constrained answers of the real model, by the real worker."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jsonschema
import pytest

from runtime import bundle
from runtime.messages import Constraint, Generate, Progress, Row, Sampling
from runtime.text import Text
from tests import schemas
from tests.e2e.conftest import MODEL, ROOT
from tests.unit.test_worker import Front, worker

TEMPERATURES = (0.0, 0.5, 1.0, 1.5, 2.0)
SCHEMAS = 50


@dataclass(frozen=True)
class Model:
    """A worker that runs it, and its text."""

    front: Front
    text: Text
    stop_ids: list[int]

    def ask(self, name: str, question: str, constraint: Constraint | None, temperature: float = 0.0, most: int = 256) -> None:
        sampling = Sampling(temperature=temperature, seed=7)
        prompt = self.text.chat([{"role": "user", "content": question}])
        self.front.send(Generate(name, prompt, most, sampling, self.stop_ids, constraint=constraint, speculation=True))

    def answers(self, names: list[str]) -> dict[str, tuple[str, Row]]:
        """Each request's text and last row."""
        texts, last = {name: self.text.stream() for name in names}, dict[str, Row]()
        said = dict.fromkeys(names, "")
        while len(last) < len(names):
            reply = self.front.receive(120)
            for row in reply.rows if isinstance(reply, Progress) else []:
                said[row.id] += texts[row.id].push(row.tokens)
                if row.finish is not None:
                    last[row.id] = row
        return {name: (said[name] + texts[name].finish(), last[name]) for name in names}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = ROOT / "engines" / MODEL
    if not (folder / bundle.MANIFEST).exists():
        pytest.fail(f"engines/{MODEL} is missing: run make export")
    manifest = bundle.read(folder)
    address = f"ipc://{tmp_path_factory.mktemp('structured')}/worker.sock"
    options = "--variant=cpu-int4", "--slots=8", "--context=1024", f"--queue={SCHEMAS}", "--threads=0"
    with worker(folder, address, *options):
        front = Front(address)
        front.wait_ready()
        yield Model(front, Text.load(folder, manifest), list(manifest.stop_ids))


@pytest.mark.timeout(900)
def test_finished_answers_fit_their_schemas(model: Model) -> None:
    documents = [schemas.schema(seed) for seed in range(SCHEMAS)]
    names = [f"{seed}" for seed in range(SCHEMAS)]
    for name, document in zip(names, documents, strict=True):
        question = f"Make up a JSON document that fits this schema: {json.dumps(document)[:600]}"
        model.ask(name, question, Constraint("json_schema", json.dumps(document)), TEMPERATURES[int(name) % 5])
    told = model.answers(names)
    assert {row.finish for _, row in told.values()} <= {"stop", "length"}, [row.message for _, row in told.values()]
    done = [name for name, (_, row) in told.items() if row.finish == "stop"]
    for name in done:
        check = jsonschema.Draft202012Validator(documents[int(name)], format_checker=jsonschema.FormatChecker())
        check.validate(json.loads(told[name][0]))
    assert len(done) > 0.75 * SCHEMAS  # at a temperature of 2, numbers can have any number of digits


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_choices_expressions_and_grammars(model: Model, temperature: float) -> None:
    asked: dict[str, tuple[str, Constraint, str]] = {
        "choice": ("Is the sky blue?", Constraint("lark", 'start: W\nW: "yes" | "no" | "perhaps"'), "yes|no|perhaps"),
        "expression": ("A phone number?", Constraint("regex", r"\+49 [0-9]{3} [0-9]{6}"), r"\+49 \d{3} \d{6}"),
        "grammar": ("A sum?", Constraint("lark", 'start: N ("+" N){1,3}\nN: /[1-9][0-9]{0,2}/'), r"\d+(\+\d+){1,3}"),
        "object": ("Any JSON?", Constraint("json_schema", '{"type":"object"}'), r"\{.*"),
    }
    for name, (question, constraint, _) in asked.items():
        model.ask(name, question, constraint, temperature, most=64)
    for name, (text, row) in model.answers(list(asked)).items():
        assert re.fullmatch(asked[name][2], text), text
        assert row.finish == "stop" or name == "object"


def test_the_worker_goes_on_after_constraints_that_cannot_be_met(model: Model) -> None:
    flaws: dict[str, Any] = {"schema": {"type": "array", "contains": {}}, "reference": {"$ref": "#/nowhere"}}
    for name, document in flaws.items():
        model.ask(name, "Well?", Constraint("json_schema", json.dumps(document)))
    model.ask("free", "Well?", None, most=5)
    told = model.answers([*flaws, "free"])
    assert {told[name][1].finish for name in flaws} == {"error"}
    assert all("constraint" in told[name][1].message for name in flaws)
    assert told["free"][1].finish in ("stop", "length")
