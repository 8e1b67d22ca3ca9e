"""What a request is answered does not depend on who shares the engine with it: in float32, whatever it asks for."""

import asyncio
import random
from pathlib import Path
from typing import Any

from tests.service.conftest import Running, serve

REGEX = "(a|bc|[0-9]{2}){3,12}"


def wishes(chance: random.Random) -> dict[str, Any]:
    """A request's body, of any of the fields that steer the choice of its tokens."""
    body: dict[str, Any] = {
        "prompt": [chance.randrange(3, 250) for _ in range(chance.randrange(1, 60))],
        "max_tokens": chance.randrange(1, 24),
        "seed": chance.randrange(1000),
        "temperature": chance.choice([0, 0.3, 0.7, 1, 2]),
        "ignore_eos": chance.random() < 0.5,
    }
    might: list[dict[str, Any]] = [
        {"top_p": 0.8},
        {"top_k": 20},
        {"min_p": 0.05},
        {"frequency_penalty": 1.5},
        {"presence_penalty": -1},
        {"repetition_penalty": 1.3},
        {"logit_bias": {str(chance.randrange(250)): chance.choice([-100, 5]) for _ in range(3)}},
        {"min_tokens": body["max_tokens"] // 2},
        {"stop_token_ids": [chance.randrange(250) for _ in range(5)]},
        {"logprobs": 3},
        {"guided_regex": REGEX},
        {"echo": True},
        {"n": 2},
        {"speculation": False},
    ]
    for wish in chance.sample(might, chance.randrange(4)):
        body |= wish
    return body


async def answer(server: Running, body: dict[str, Any]) -> list[Any]:
    async with server.http.post("/v1/completions", json={"model": "alpha", **body}) as response:
        told = await response.json()
        assert response.status == 200, (body, told)
    return [
        (choice["text"], choice["finish_reason"], choice["logprobs"] and choice["logprobs"]["tokens"])
        for choice in told["choices"]
    ]


async def test_everybody_gets_in_company_what_he_gets_alone(engines: Path) -> None:
    chance = random.Random(6)
    bodies = [wishes(chance) for _ in range(96)]
    async with serve(engines, "--model=alpha", "--slots=6", "--context=256", "--queue=200") as server:
        alone = [await answer(server, body) for body in bodies]
        order = list(range(len(bodies)))
        chance.shuffle(order)
        together = dict(zip(order, await asyncio.gather(*(answer(server, bodies[index]) for index in order)), strict=True))
        assert await server.metric("engineshed_requests_running") == 0
    wrong = [(bodies[index], alone[index], together[index]) for index in order if alone[index] != together[index]]
    assert not wrong, (len(wrong), wrong[0])
    assert len({str(each) for each in alone}) > 60
