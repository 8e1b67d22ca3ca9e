"""What Prometheus is told."""

import asyncio

from prometheus_client.parser import text_string_to_metric_families

from runtime.messages import Generate
from tests.unit.server.house import House
from tests.waiting import HANGS_SECONDS


async def numbers(house: House) -> dict[str, float]:
    """Every sample by its name and labels."""
    async with house.http.get("/metrics") as response:
        assert response.status == 200
        families = text_string_to_metric_families(await response.text())
    where = {("model", "tiny"), ("device", "cpu")}
    return {
        " ".join([sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items() - where))]): sample.value
        for family in families
        for sample in family.samples
    }


async def test_the_engines_numbers_are_those_of_its_last_heartbeat(house: House) -> None:
    await house.worker.beat(
        running=2, waiting=3, kv_tokens=40, steps=50, prompt_tokens=60, generated_tokens=70, step_seconds=1.5
    )
    async with asyncio.timeout(HANGS_SECONDS):
        while (told := await numbers(house))["engineshed_requests_running"] != 2:
            pass
    assert told["engineshed_requests_waiting"] == 3
    assert told["engineshed_kv_tokens"] == 40
    assert told["engineshed_engine_steps_total"] == 50
    assert told["engineshed_engine_prompt_tokens_total"] == 60
    assert told["engineshed_engine_generated_tokens_total"] == 70
    assert told["engineshed_engine_seconds_total"] == 1.5
    assert (told["engineshed_slots"], told["engineshed_queue_limit"], told["engineshed_ready"]) == (2, 4, 1)


async def test_an_answer_is_counted_by_route_status_tokens_and_latency(house: House) -> None:
    response, request = await house.open("/v1/generate", {"prompt": "hello"}, "a")
    await house.worker.say(request, "b")
    await house.worker.say(request, "cd", "stop")
    assert await response.text() == "abcd"
    told = await numbers(house)
    assert told["engineshed_requests_total route=/v1/generate status=200"] == 1
    assert told["engineshed_prompt_tokens_total"] == 5
    assert told["engineshed_generated_tokens_total"] == 4
    assert told["engineshed_time_to_first_token_seconds_count"] == 1
    assert told["engineshed_inter_token_seconds_count"] == 3


async def test_refusals_are_counted_by_status_and_unknown_paths_under_one_name(house: House) -> None:
    for path in ("/a", "/b"):
        await house.http.get(path)
    await house.http.post("/v1/completions", data=b"{")
    told = await numbers(house)
    assert told["engineshed_requests_total route=unknown status=404"] == 2
    assert told["engineshed_requests_total route=/v1/completions status=400"] == 1


async def test_without_an_engine_the_numbers_say_so(house: House) -> None:
    house.engine.client = None
    told = await numbers(house)
    assert (told["engineshed_ready"], told["engineshed_requests_running"]) == (0, 0)


async def test_models_are_listed_and_described(house: House) -> None:
    expected = {
        "id": "tiny",
        "created": 1_700_000_000,
        "max_model_len": 64,
        "state": "ready",
        "reason": None,
        "object": "model",
        "owned_by": "engineshed",
        "task": "text-generation",
        "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
    }
    async with house.http.get("/v1/models") as response:
        assert await response.json() == {"object": "list", "data": [expected]}
    async with house.http.get("/v1/models/tiny") as response:
        assert await response.json() == expected
    async with house.http.get("/v1/models/other") as response:
        assert response.status == 404
    assert house.worker.received.empty()


async def test_a_heartbeat_does_not_disturb_an_answer(house: House) -> None:
    asking = asyncio.ensure_future(house.http.post("/v1/completions", json={"prompt": "hi"}))
    request = await house.worker.next(Generate)
    await house.worker.beat(running=1)
    await house.worker.say(request, "yes", "stop")
    assert (await (await asking).json())["choices"][0]["text"] == "yes"
