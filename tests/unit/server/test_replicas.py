"""One engine on several devices: who gets a request, watched with scripted workers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from runtime.bundle import Bundle
from runtime.messages import Generate
from runtime.text import Text
from server.engine_client import EngineClient
from server.replicas import Prompts, choose, least_busy
from tests.unit.server.house import service_for, serving
from tests.unit.server.scripted import READY, Attached, ScriptedWorker
from tests.waiting import HANGS_SECONDS


@asynccontextmanager
async def attached(folder: Path, text: Text, *slots: int) -> AsyncIterator[list[Attached]]:
    """Connections to scripted workers with so many slots each, on cuda:0, cuda:1, ..."""
    async with AsyncExitStack() as stack:
        replicas = []
        for number, count in enumerate(slots):
            ready = msgspec.structs.replace(READY, slots=count)
            worker = await stack.enter_async_context(ScriptedWorker(f"ipc://{folder}/{number}", text, ready))
            client = EngineClient(worker.address)
            stack.callback(client.close, ConnectionError("the test is over"))
            await client.attach()
            replicas.append(Attached(client, device=f"cuda:{number}"))
        yield replicas


def in_flight(replicas: list[Attached]) -> int:
    return sum(replica.client.in_flight for replica in replicas if replica.client is not None)


def place(requests: ExitStack, replicas: list[Attached]) -> str:
    """Start one more request; gives the device that takes it."""
    connection = least_busy(replicas)
    assert connection is not None
    client, _ = connection
    requests.enter_context(client.generate(Generate("", [1], max_tokens=9)))
    return next(replica.device for replica in replicas if replica.client is client)


async def test_a_request_goes_where_the_fewest_are_and_to_the_first_of_equals(tmp_path: Path, text: Text) -> None:
    async with attached(tmp_path, text, 2, 2, 2) as replicas:
        with ExitStack() as early, ExitStack() as late:
            assert [place(early, replicas) for _ in range(2)] == ["cuda:0", "cuda:1"]
            assert [place(late, replicas) for _ in range(4)] == ["cuda:2", "cuda:0", "cuda:1", "cuda:2"]
            early.close()
            assert [place(late, replicas) for _ in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
            assert in_flight(replicas) == 7
        assert in_flight(replicas) == 0


async def test_none_waits_for_a_slot_while_another_device_has_a_free_one(tmp_path: Path, text: Text) -> None:
    async with attached(tmp_path, text, 1, 4) as replicas:
        with ExitStack() as requests:
            assert [place(requests, replicas) for _ in range(5)] == ["cuda:0", *["cuda:1"] * 4]
            assert [place(requests, replicas) for _ in range(4)] == ["cuda:0", "cuda:1"] * 2, "from here on they wait"


async def test_a_prompt_follows_the_one_that_began_alike_while_there_is_a_slot(tmp_path: Path, text: Text) -> None:
    prompts, story = Prompts(), list(range(100))

    def sent(prompt: list[int], requests: ExitStack) -> str:
        connection = choose(replicas, prompts, prompt)
        assert connection is not None
        requests.enter_context(connection[0].generate(Generate("", prompt, max_tokens=9)))
        return next(replica.device for replica in replicas if replica.client is connection[0])

    async with attached(tmp_path, text, 2, 3) as replicas:
        with ExitStack() as requests:
            assert sent([7] * 50, requests) == "cuda:0"
            with ExitStack() as first:
                assert sent(story, first) == "cuda:1"
            assert sent([9, *story], requests) == "cuda:1", "a prompt of its own goes where the fewest are"
            assert sent([*story[:70], 5], requests) == "cuda:1", "though cuda:0 has no more to do"
            assert sent([*story[:20], 5], requests) == "cuda:0", "too little in common"
            assert sent(story, requests) == "cuda:1"
            assert sent(story, requests) == "cuda:0", "rather than waiting for a slot"


def test_only_so_many_beginnings_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.replicas._REMEMBERED", 3)
    prompts = Prompts()
    for number in range(5):
        prompts.send([number] * 40, f"cuda:{number}")
    assert [prompts.holder([number] * 40) for number in range(5)] == [None, None, "cuda:2", "cuda:3", "cuda:4"]
    assert prompts.holder([4] * 32) is None, "a prompt's last token is always computed"


async def test_one_that_is_not_ready_gets_nothing(tmp_path: Path, text: Text) -> None:
    async with attached(tmp_path, text, 2, 2) as replicas:
        replicas[0].client = None
        with ExitStack() as requests:
            assert {place(requests, replicas) for _ in range(3)} == {"cuda:1"}
        assert replicas[1].client is not None
        replicas[1].client.close(ConnectionError("gone"))
        assert least_busy(replicas) is None


async def test_what_others_have_a_worker_do_counts_as_well(tmp_path: Path, text: Text) -> None:
    ready = msgspec.structs.replace(READY, slots=4)
    async with ScriptedWorker(f"ipc://{tmp_path}/busy", text, ready) as busy, attached(tmp_path, text, 4) as replicas:
        client = EngineClient(busy.address)
        await client.attach()
        await busy.beat(running=2, waiting=1)
        async with asyncio.timeout(HANGS_SECONDS):
            while client.heartbeat is None:
                await asyncio.sleep(0.01)
        both = [Attached(client, device="busy"), *replicas]
        with ExitStack() as requests:
            assert [place(requests, both) for _ in range(4)] == ["cuda:0", "cuda:0", "cuda:0", "busy"]
        client.close(ConnectionError("the test is over"))


async def test_each_workers_numbers_have_its_device_as_label(tmp_path: Path, bundle: Bundle, text: Text) -> None:
    async with attached(tmp_path, text, 2, 4) as replicas:
        lost = Attached(None, device="cuda:2")
        async with serving(service_for(bundle, text, *replicas, lost)) as http, http.get("/metrics") as response:
            told = (await response.text()).splitlines()
    for line in (
        'engineshed_slots{device="cuda:0",model="tiny"} 2.0',
        'engineshed_slots{device="cuda:1",model="tiny"} 4.0',
        'engineshed_ready{device="cuda:1",model="tiny"} 1.0',
        'engineshed_ready{device="cuda:2",model="tiny"} 0.0',
    ):
        assert line in told
    assert sum(line.startswith("# TYPE engineshed_slots ") for line in told) == 1
