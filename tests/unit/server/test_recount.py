"""A count of everybody's numbers: who is waited for, and for how long."""

import asyncio
from collections.abc import Collection
from pathlib import Path

import msgspec
import pytest

from runtime.text import Text
from server.engine_client import EngineClient, EngineUnavailableError
from server.fleet import CountsRequest
from server.supervision.recount import Recount
from tests.unit.server.scripted import ScriptedWorker
from tests.waiting import HANGS_SECONDS

FIRST, SECOND = b"http-0", b"http-1"


class Counting:
    """A recount, and the requests that it sends to HTTP processes."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, int]] = []
        self.recount = Recount(self._send)

    async def begin(self, fronts: Collection[bytes], engines: Collection[EngineClient] = ()) -> asyncio.Task[None]:
        """A count that has asked everybody."""
        before = len(self.sent)
        counting = asyncio.create_task(self.recount.everybody(fronts, engines))
        while len(self.sent) < before + len(fronts):
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        return counting

    async def _send(self, owner: bytes, request: CountsRequest) -> None:
        self.sent.append((owner, request.id))


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is too late."""
    monkeypatch.setattr("server.supervision.recount.HEARTBEAT_SECONDS", 10 * HANGS_SECONDS)


async def over(counting: asyncio.Task[None]) -> None:
    await asyncio.wait_for(counting, HANGS_SECONDS)


async def goes_on(counting: asyncio.Task[None]) -> bool:
    """Whether it still waits, once all that it could go by has been looked at."""
    for _ in range(10):
        await asyncio.sleep(0)
    return not counting.done()


async def hung(folder: Path, text: Text) -> EngineClient:
    """A connection to a worker that was ready and says nothing more."""
    async with ScriptedWorker(f"ipc://{folder}/worker", text) as worker:
        client = EngineClient(worker.address)
        await client.attach()
    return client


@pytest.mark.usefixtures("endless")
async def test_everybody_is_waited_for() -> None:
    counting = Counting()
    count = await counting.begin([FIRST, SECOND])
    for owner, id_ in counting.sent:
        assert await goes_on(count)
        counting.recount.take(owner, id_)
    await over(count)


@pytest.mark.usefixtures("endless")
async def test_an_engines_numbers_are_those_of_now(tmp_path: Path, text: Text) -> None:
    async with ScriptedWorker(f"ipc://{tmp_path}/worker", text) as worker:
        client = EngineClient(worker.address)
        await client.attach()
        worker.held = msgspec.structs.replace(worker.held, running=2)  # of which no heartbeat has told
        await over(await Counting().begin([], [client]))
        assert client.heartbeat == worker.held
        client.close(EngineUnavailableError("the test is over"))


async def test_who_hangs_is_waited_for_no_longer_than_a_heartbeat(
    tmp_path: Path, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.supervision.recount.HEARTBEAT_SECONDS", 0.05)
    counting = Counting()
    client = await hung(tmp_path, text)
    await over(await counting.begin([FIRST], [client]))
    for owner, id_ in counting.sent:
        counting.recount.take(owner, id_)  # too late, and no harm
    client.close(EngineUnavailableError("the test is over"))


@pytest.mark.usefixtures("endless")
async def test_a_process_that_ends_meanwhile_is_not_waited_for() -> None:
    counting = Counting()
    count = await counting.begin([FIRST, SECOND])
    counting.recount.leave(FIRST)
    assert await goes_on(count), "the other one has not answered"
    counting.recount.take(*counting.sent[1])
    await over(count)
    counting.recount.leave(SECOND)


@pytest.mark.usefixtures("endless")
async def test_an_engine_that_ends_meanwhile_is_not_waited_for(tmp_path: Path, text: Text) -> None:
    client = await hung(tmp_path, text)
    count = await Counting().begin([], [client])
    assert await goes_on(count)
    client.close(EngineUnavailableError("it died"))
    await over(count)


@pytest.mark.usefixtures("endless")
async def test_two_counts_at_once_each_wait_for_their_own_answers() -> None:
    counting = Counting()
    one = await counting.begin([FIRST])
    other = await counting.begin([FIRST])
    (_, earlier), (_, later) = counting.sent
    counting.recount.take(FIRST, later)
    await over(other)
    assert await goes_on(one)
    counting.recount.take(FIRST, earlier)
    await over(one)


@pytest.mark.usefixtures("endless")
async def test_a_process_that_ends_is_waited_for_by_none_of_two_counts() -> None:
    counting = Counting()
    counts = [await counting.begin([FIRST]) for _ in range(2)]
    counting.recount.leave(FIRST)
    for count in counts:
        await over(count)
