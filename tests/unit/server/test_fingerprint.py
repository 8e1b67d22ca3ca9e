"""system_fingerprint: it changes with all that decides a token, and with nothing else."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from runtime import devices, kernels
from runtime.bundle import Bundle, File, SamplingDefaults, Variant
from runtime.devices import Device, Gpu
from runtime.messages import Generate
from runtime.text import Text
from server.engine_client import EngineClient, EngineUnavailableError
from server.fingerprint import fingerprint
from tests.unit.server.house import service_for, serving
from tests.unit.server.scripted import READY, Attached, ScriptedWorker
from tests.waiting import HANGS_SECONDS

KERNELS = "onnxruntime 1.32.0 on x86_64 avx2"
WEIGHTS, OTHER = File("cpu-int4/weights.bin", "aaaa", 5), File("cpu-int4/weights.bin", "bbbb", 5)


@pytest.fixture
def bundle(bundle: Bundle) -> Bundle:
    """The model, with weights of its own beside the graph."""
    return with_files(bundle, (*bundle.variants[0].files, WEIGHTS))


def with_files(bundle: Bundle, files: tuple[File, ...], **changes: Any) -> Bundle:
    variant = msgspec.structs.replace(bundle.variants[0], files=files, **changes)
    return msgspec.structs.replace(bundle, variants=(variant,))


def of(bundle: Bundle, computing: str = KERNELS, sampling: SamplingDefaults | None = None) -> str:
    return fingerprint(bundle, bundle.variants[0], computing, bundle.sampling if sampling is None else sampling)


def texts(bundle: Bundle, path: str) -> Bundle:
    files = tuple(msgspec.structs.replace(file, sha256="ffff") if file.path == path else file for file in bundle.files)
    assert files != bundle.files
    return msgspec.structs.replace(bundle, files=files)


@pytest.mark.parametrize(
    "change",
    [
        lambda bundle: with_files(bundle, (bundle.variants[0].files[0], OTHER)),
        lambda bundle: with_files(bundle, (File("cpu-int4/model.onnx", "cccc", 1), WEIGHTS)),
        lambda bundle: with_files(bundle, bundle.variants[0].files, name="cpu-int8"),
        lambda bundle: texts(bundle, "tokenizer.json"),
        lambda bundle: texts(bundle, "chat_template.jinja"),
        lambda bundle: msgspec.structs.replace(
            bundle, files=(*bundle.files, File("additional_chat_templates/tool_use.jinja", "dddd", 1))
        ),
        lambda bundle: msgspec.structs.replace(bundle, special_tokens={"bos_token": "<s>"}),
        lambda bundle: msgspec.structs.replace(bundle, stop_ids=(7,)),
        lambda bundle: msgspec.structs.replace(bundle, tools="hermes"),
        lambda bundle: msgspec.structs.replace(bundle, sampling=SamplingDefaults(temperature=0.5)),
    ],
    ids=["weights", "graph", "variant", "tokenizer", "template", "another template", "tokens", "ends", "tools", "sampling"],
)
def test_it_changes_with_what_decides_a_token(bundle: Bundle, change: Callable[[Bundle], Bundle]) -> None:
    assert of(change(bundle)) != of(bundle)


@pytest.mark.parametrize(
    "computing", ["onnxruntime 1.33.0 on x86_64 avx2", "onnxruntime 1.32.0 on x86_64 avx2 avx512f", "tensorrt 11 on H200 9.0"]
)
def test_it_changes_with_what_computes(bundle: Bundle, computing: str) -> None:
    assert of(bundle, computing) != of(bundle)


def test_it_stays_where_no_token_changes(bundle: Bundle) -> None:
    moved = msgspec.structs.replace(bundle, created=1, name="other")
    again = with_files(moved, tuple(reversed(bundle.variants[0].files)), builder="other 2.0", step_bytes=7)
    assert of(again) == of(bundle)


def test_one_variant_has_nothing_to_do_with_another(bundle: Bundle) -> None:
    beside: Variant = msgspec.structs.replace(bundle.variants[0], name="cpu-fp32", files=(File("cpu-fp32/model.onnx", "e", 1),))
    assert of(msgspec.structs.replace(bundle, variants=(*bundle.variants, beside))) == of(bundle)


async def told(http: aiohttp.ClientSession, **fields: Any) -> set[str]:
    """What an answer to a short prompt has, in all of its events where it is a stream."""
    async with http.post("/v1/completions", json={"prompt": "hi", **fields}) as response:
        assert response.status == 200, await response.text()
        return set(re.findall(r'"system_fingerprint":"(\w+)"', await response.text()))


async def serve(worker: ScriptedWorker, answers: int = 1) -> None:
    for request in [await worker.next(Generate) for _ in range(answers)]:
        await worker.say(request, "yes", "stop")


@asynccontextmanager
async def unlike(
    folder: Path, bundle: Bundle, text: Text, count: int
) -> AsyncIterator[tuple[aiohttp.ClientSession, list[ScriptedWorker], list[Attached]]]:
    """A server over so many engines with other kernels each, K0, K1, ..., none of which has been asked for anything."""
    async with AsyncExitStack() as stack:
        workers, replicas = [], []
        for number in range(count):
            ready = msgspec.structs.replace(READY, kernels=f"K{number}")
            workers.append(await stack.enter_async_context(ScriptedWorker(f"ipc://{folder}/{number}", text, ready)))
            client = EngineClient(workers[-1].address)
            stack.callback(client.close, EngineUnavailableError("the test is over"))
            await client.attach()
            replicas.append(Attached(client, device=f"cuda:{number}"))
        yield await stack.enter_async_context(serving(service_for(bundle, text, *replicas))), workers, replicas


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
async def test_the_first_answer_of_all_has_that_of_its_engine(
    tmp_path: Path, bundle: Bundle, text: Text, n: int, stream: bool
) -> None:
    async with unlike(tmp_path, bundle, text, 1) as (http, (worker,), _):
        for _ in range(2):
            asking = asyncio.create_task(told(http, n=n, stream=stream))
            await serve(worker, n)
            assert await asking == {of(bundle, "K0")}


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_at_the_same_time_each_have_that_of_their_own_engine(
    tmp_path: Path, bundle: Bundle, text: Text, stream: bool
) -> None:
    async with unlike(tmp_path, bundle, text, 2) as (http, workers, _):
        asking = []
        for worker in workers:
            asking.append(asyncio.create_task(told(http, stream=stream)))
            await until_asked(worker)
        for worker in workers:
            await serve(worker)
        assert await asyncio.gather(*asking) == [{of(bundle, "K0")}, {of(bundle, "K1")}]


async def until_asked(worker: ScriptedWorker) -> None:
    """Return once the worker has something to answer."""
    async with asyncio.timeout(HANGS_SECONDS):
        while worker.received.empty():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_another_engine_gives_after_all_has_that_ones(
    tmp_path: Path, bundle: Bundle, text: Text, stream: bool
) -> None:
    async with unlike(tmp_path, bundle, text, 2) as (http, workers, (first, _)):
        asking = asyncio.create_task(told(http, stream=stream))
        await until_asked(workers[0])
        assert first.client is not None
        lost, first.client = first.client, None
        lost.close(EngineUnavailableError("it died"))
        await serve(workers[1])
        assert await asking == {of(bundle, "K1")}


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_of_unlike_engines_have_one_together_that_is_neithers(
    tmp_path: Path, bundle: Bundle, text: Text, stream: bool
) -> None:
    async with unlike(tmp_path, bundle, text, 2) as (http, workers, _):
        asking = asyncio.create_task(told(http, n=2, stream=stream))
        for worker in workers:
            await serve(worker)
        (found,) = await asking
        assert found not in (of(bundle, "K0"), of(bundle, "K1"))


def test_a_cpu_is_told_by_what_its_kernels_are_chosen_by(tmp_path: Path, bundle: Bundle) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nflags\t\t: fpu avx2 sse4_2 avx512f\nprocessor : 1\nflags : amx_int8\n")
    described = kernels.describe(bundle.variants[0], Device("cpu", 0), cpuinfo=cpuinfo)
    assert described.startswith("onnxruntime ")
    assert described.endswith(" avx2 avx512f")
    silent = kernels.describe(bundle.variants[0], Device("cpu", 0), cpuinfo=tmp_path / "none")
    assert silent == described.removesuffix(" avx2 avx512f")


@pytest.mark.parametrize(
    ("target", "provider", "described"),
    [
        ("cuda", "cuda", r"onnxruntime [0-9.]+ cuda on H100 9\.0"),
        ("cuda", "tensorrt-rtx", r"onnxruntime [0-9.]+ tensorrt-rtx on H100 9\.0"),
        ("tensorrt-rtx", "cuda", r"tensorrt_rtx( [0-9.]+)? on H100 9\.0"),
    ],
)
def test_a_gpu_is_told_by_its_name_and_what_runs_on_it(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, target: str, provider: str, described: str
) -> None:
    """A GPU that is not here."""
    gpu = Gpu(0, "GPU-0", "H100", "9.0", 80 << 30, 80 << 30, "580.95.05", "13.0")
    monkeypatch.setattr(devices, "gpu", lambda device: gpu)
    variant: Variant = msgspec.structs.replace(bundle.variants[0], target=target)
    assert re.fullmatch(described, kernels.describe(variant, Device("cuda", 0), provider))
