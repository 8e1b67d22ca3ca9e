"""One engine on several devices: the workers' command lines, who gets a request, and what the death of one means.

Routing is watched with scripted workers, dying with processes that have no engine (scripted_process.py).
"""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
import pytest

from runtime import devices
from runtime.bundle import Bundle, BundleError, Plan, Variant
from runtime.messages import Generate, Ready
from runtime.text import Text
from server import serve, workers
from server.engine_client import EngineClient
from server.replicas import Prompts, Replicas, choose, in_flight, least_busy
from server.workers import Worker, WorkerHopelessError
from tests.unit.server.house import service_for, serving
from tests.unit.server.scripted import READY, Attached, ScriptedWorker

SCRIPT = [sys.executable, "-P", "-m", "tests.unit.server.scripted_process"]
HOPELESS = [sys.executable, "-c", "raise SystemExit(2)"]


def options(bundle: Bundle, variant: Variant, *arguments: str) -> dict[str, dict[str, str]]:
    """What each worker of `engineshed serve ARGUMENTS` is told, by its name."""
    parser = argparse.ArgumentParser()
    serve.configure(parser)
    lines = serve.commands(parser.parse_args(arguments), Path("bundle"), bundle, variant)
    return {name: dict(option.partition("=")[::2] for option in line if option[:2] == "--") for name, line in lines.items()}


@pytest.fixture
def plan(bundle: Bundle) -> Variant:
    """A variant for GPUs, as far as the command line looks at it."""
    made = Plan("tensorrt", "11.4", ("8.9",), capacity=33, profiles=(), stripped=False, source="a", sampler_source="b")
    return msgspec.structs.replace(bundle.variants[0], name="tensorrt-fp16", target="tensorrt", plan=made)


def test_one_worker_on_the_cpu_has_eight_slots_and_every_core(bundle: Bundle) -> None:
    told = options(bundle, bundle.variants[0])
    assert list(told) == ["cpu"]
    assert told["cpu"]["--device"] == "cpu"
    assert told["cpu"]["--slots"] == "8"
    assert not {"--threads", "--gpu-memory", "--build-on-load", "--provider"} & told["cpu"].keys()


@pytest.mark.parametrize(("cores", "threads"), [(7, "2"), (2, "1")])
def test_several_workers_on_the_cpu_share_its_cores(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, cores: int, threads: str
) -> None:
    monkeypatch.setattr(devices, "cpu", lambda: devices.Cpu(cores, total=1, available=1))
    told = options(bundle, bundle.variants[0], "--device=cpu,cpu,cpu")
    assert list(told) == ["cpu#1", "cpu#2", "cpu#3"]
    assert [(its["--device"], its["--threads"]) for its in told.values()] == [("cpu", threads)] * 3


def test_each_gpu_gets_a_worker_that_counts_its_own_slots(bundle: Bundle, plan: Variant) -> None:
    told = options(bundle, plan, "--device=cuda:0,cuda:1")
    assert [(name, its["--device"]) for name, its in told.items()] == [("cuda:0", "cuda:0"), ("cuda:1", "cuda:1")]
    assert not any({"--slots", "--threads"} & its.keys() for its in told.values())
    told = options(bundle, plan, "--device=cuda", "--slots=3", "--gpu-memory=0.5", "--build-on-load", "--provider=tensorrt")
    given = {"--slots": "3", "--gpu-memory": "0.5", "--build-on-load": "", "--provider": "tensorrt"}
    assert told["cuda:0"].items() >= given.items()


def test_the_context_is_no_longer_than_a_plans_slots(bundle: Bundle, plan: Variant) -> None:
    assert options(bundle, plan, "--device=cuda")["cuda:0"]["--context"] == "32"
    with pytest.raises(BundleError, match="made for 32 tokens"):
        options(bundle, plan, "--device=cuda", "--context=33")


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


async def test_each_workers_numbers_have_its_device_as_label(tmp_path: Path, bundle: Bundle, text: Text) -> None:
    async with attached(tmp_path, text, 2, 4) as replicas:
        replicas[1].restarts, lost = 3, Attached(None, device="cuda:2")
        async with serving(service_for(bundle, text, *replicas, lost)) as http, http.get("/metrics") as response:
            told = (await response.text()).splitlines()
    for line in (
        'engineshed_slots{device="cuda:0"} 2.0',
        'engineshed_slots{device="cuda:1"} 4.0',
        'engineshed_worker_restarts_total{device="cuda:0"} 0.0',
        'engineshed_worker_restarts_total{device="cuda:1"} 3.0',
        'engineshed_ready{device="cuda:1"} 1.0',
        'engineshed_ready{device="cuda:2"} 0.0',
    ):
        assert line in told
    assert sum(line.startswith("# TYPE engineshed_slots ") for line in told) == 1


async def ready(worker: Worker) -> Ready:
    """What a worker says of itself, as soon as it takes requests."""
    while True:
        if worker.client is not None and worker.client.ready is not None:
            return worker.client.ready
        await asyncio.sleep(0.01)


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def stream(http: aiohttp.ClientSession, tokens: int) -> aiohttp.ClientResponse:
    """An answer of so many tokens, of which the first is there."""
    response = await http.post("/v1/completions", json={"prompt": "hi", "stream": True, "max_tokens": tokens})
    await response.content.readline()
    return response


async def test_a_worker_that_dies_is_replaced_and_the_others_answers_go_on(
    bundle: Bundle, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "BACK_OFF_SECONDS", (0.5,))
    pair = [Worker(SCRIPT, device=device) for device in ("cpu#1", "cpu#2")]
    async with Replicas(pair), serving(service_for(bundle, text, *pair)) as http, asyncio.timeout(30):
        first, second = [(await ready(worker)).pid for worker in pair]
        broken, whole = await stream(http, 60), await stream(http, 60)
        os.kill(first, signal.SIGKILL)
        assert "engine_unavailable" in await broken.text()
        assert (await http.get("/readyz")).status == 200
        assert (await http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 3})).status == 200
        assert (await whole.text()).endswith("data: [DONE]\n\n")
        assert (await ready(pair[0])).pid != first
        assert (await ready(pair[1])).pid == second
        assert [worker.restarts for worker in pair] == [1, 0]


async def logged(caplog: pytest.LogCaptureFixture, sentence: str) -> None:
    while True:
        if sentence in caplog.text:
            return
        await asyncio.sleep(0.01)


async def test_a_hopeless_worker_is_left_out_and_reported_while_the_others_serve(
    bundle: Bundle, text: Text, caplog: pytest.LogCaptureFixture
) -> None:
    pair = [Worker(HOPELESS, device="cuda:0"), Worker(SCRIPT, device="cuda:1")]
    async with Replicas(pair) as replicas, serving(service_for(bundle, text, *pair)) as http, asyncio.timeout(15):
        await replicas.loaded()
        await logged(caplog, "cuda:0 is left out: the engine cannot be loaded")
        async with http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 3}) as response:
            assert (await response.json())["choices"][0]["text"] == "xxx"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(replicas.hopeless(), 0.2)


async def test_when_all_are_hopeless_the_server_has_no_reason_to_go_on() -> None:
    async with Replicas([Worker(HOPELESS, device=device) for device in ("cuda:0", "cuda:1")]) as replicas:
        with pytest.raises(WorkerHopelessError):
            await asyncio.wait_for(replicas.hopeless(), 15)


async def test_the_processes_end_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "STOP_SECONDS", 1.0)
    several = [Worker([*SCRIPT, "--deaf"], device=f"cpu#{number}") for number in range(4)]
    async with asyncio.timeout(30), Replicas(several):
        pids = [(await ready(worker)).pid for worker in several]
        begin = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - begin < 3, "one after another they would take four seconds"
    assert not any(map(exists, pids))


async def test_workers_take_no_thread_of_those_that_tokenize() -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(max_workers=1))
    async with Replicas([Worker(SCRIPT)]) as replicas, asyncio.timeout(15):
        await replicas.loaded()
        assert await asyncio.to_thread(int, "1") == 1
