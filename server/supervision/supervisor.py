"""The supervisor: every process of the server from its start to its end, and what each is told.

It never sees a prompt or a token. HTTP processes say what they need and what they hold (`server.fleet.Demand`);
`server.supervision.models` decides which engines run so that it can be had; the supervisor tells everybody how things stand.
"""

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.asyncio

from server import fleet
from server.fleet import Ask, Command, Counts, Demand, Fleet, Join, Outcome, Status
from server.supervision import counts, status
from server.supervision.commands import Commands
from server.supervision.fronts import Front
from server.supervision.models import Models, Rules
from server.supervision.process import ServeError, SocketFolder
from server.supervision.recount import Recount

TICK_SECONDS = 1.0
"""How often it looks at what nobody tells it: the clock, and the engines' folder."""
MARGIN_SECONDS = 3.0
"""What an HTTP process gets to end beyond the answers' own limit."""

log = logging.getLogger("engineshed")


@dataclass(frozen=True)
class Plan:
    """What a supervisor keeps."""

    rules: Rules
    fronts: int
    """HTTP processes."""
    front: Callable[[str, str], list[str]]
    """The command line of an HTTP process, by its name and the supervisor's address."""
    url: str
    """Where they listen."""


@dataclass
class _Joined:
    """What is known of an HTTP process that has joined."""

    name: str
    heard: float
    """time.monotonic() at its last message; it sends one a second."""
    demand: Demand | None = None
    listening: bool = False
    """It takes connections: what it counts then, it tells."""


class Supervisor:
    """Keeps the processes of `plan` until it is told to stop."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._started = time.time()
        self._joined: dict[bytes, _Joined] = {}
        self._totals = counts.Totals()
        self._recount = Recount(self._send)
        self._poked = asyncio.Event()
        self._changed = asyncio.Condition()
        """Notified after each round."""
        self._models = Models(plan.rules, lambda: [joined.demand for joined in self._joined.values()], self._poke)
        self._commands = Commands(self._models, plan.rules.catalog, self._changed)
        self._answering: set[asyncio.Task[None]] = set()
        self._looked = time.monotonic()
        self._version = 0
        self._told: Fleet | None = None
        self._draining = False
        self._announced = False

    async def run(self, stops: Sequence[int]) -> None:
        """Serve until SIGINT or SIGTERM, the first of which may be in `stops` by now. Raises ServeError."""
        folder = SocketFolder()
        self._socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.bind(folder.address)
        self._fronts = [self._front(f"http-{number}", folder.address) for number in range(self._plan.fronts)]
        tasks = {
            asyncio.create_task(self._listen()),
            asyncio.create_task(self._rounds()),
            *(asyncio.create_task(front.keep(), name=front.name) for front in self._fronts),
        }
        stop = asyncio.create_task(self._stop_asked(stops))
        try:
            done, _ = await asyncio.wait({*tasks, stop}, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stop}:
                task.result()  # raises: none of them ends by itself
            await self._drain()
        finally:
            for task in (*tasks, stop, *self._answering):
                task.cancel()
            await asyncio.gather(*tasks, stop, *self._answering, return_exceptions=True)
            await asyncio.gather(*(deployment.stop() for deployment in self._models.deployments.values()))
            self._socket.close()
            folder.cleanup()

    # What comes in ------------------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        while True:
            owner, frame = await self._socket.recv_multipart()
            try:
                message = fleet.decode_up(frame)
            except ValueError as error:
                log.warning("ignored a message that is none of the protocol: %s", error)
                continue
            await self._take(owner, message)

    async def _take(self, owner: bytes, message: fleet.Up) -> None:
        if owner in self._joined:
            self._joined[owner].heard = time.monotonic()
        match message:
            case Join(name):
                for old in [old for old, joined in self._joined.items() if joined.name == name]:
                    self._leave(old)
                self._joined[owner] = _Joined(name, time.monotonic())
                if self._told is not None:
                    await self._send(owner, self._told)
                self._poke()
            case Demand():
                joined = self._joined.get(owner)
                if joined is not None:
                    joined.demand = message
                    self._models.note_use(message)
                    self._poke()
            case Counts(samples, id_):
                joined = self._joined.get(owner)
                if joined is not None:
                    self._totals.take(owner, samples)
                    self._recount.take(owner, id_)
                    if not joined.listening:
                        joined.listening = True
                        self._poke()
            case Command():
                self._begin(self._obey(owner, message))
            case Ask(id_):
                self._begin(self._tell_status(owner, id_))

    def _begin(self, answering: Coroutine[Any, Any, None]) -> None:
        """Go on with what takes longer than other messages should wait."""
        task = asyncio.create_task(answering)
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    def _leave(self, owner: bytes) -> None:
        """An HTTP process is gone: what it held is free, and what it counted stays counted."""
        del self._joined[owner]
        self._totals.retire(owner)
        self._recount.leave(owner)
        self._poke()

    async def _send(self, owner: bytes, message: fleet.Down) -> None:
        await self._socket.send_multipart([owner, fleet.encode(message)])

    def _poke(self) -> None:
        self._poked.set()

    # What is told -------------------------------------------------------------------------------------------------

    async def _rounds(self) -> None:
        """Bring about what is wanted, as far as it can be now, and tell everybody; again whenever something has changed."""
        while True:
            self._poked.clear()
            self._watch()
            if not self._draining:
                self._models.round()
            await self._publish()
            self._announce()
            async with self._changed:
                self._changed.notify_all()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS):
                    await self._poked.wait()

    def _watch(self) -> None:
        """End an HTTP process that hangs, so that another takes its place."""
        now = time.monotonic()
        held_up, self._looked = now - self._looked > 5 * TICK_SECONDS, now
        for joined in self._joined.values():
            if held_up:  # What came while this process itself did not run has not been read.
                joined.heard = now
            elif now - joined.heard > self._plan.rules.silence:
                log.error("%s has been silent for %.0f s and is taken for dead", joined.name, now - joined.heard)
                joined.heard = now
                next(front for front in self._fronts if front.name == joined.name).signal(signal.SIGKILL)

    def _announce(self) -> None:
        """Say that the server works, once it does. Raises ServeError where it never will: whoever started it is there still."""
        if self._announced or self._draining:
            return
        ready = next((each for each in self._models.serving if each.ready), None)
        if ready is not None and sum(joined.listening for joined in self._joined.values()) == self._plan.fronts:
            self._announced = True
            log.info("ready at %s with %s", self._plan.url, ready)
            log.info(
                'try: curl -N %s/v1/generate -d \'{"prompt": "The capital of France is", "max_tokens": 32}\'', self._plan.url
            )
        first = [self._models.describe(name) for name in self._plan.rules.preload]
        if first and all(model.state in ("quarantined", "refused") for model in first):
            raise ServeError(first[0].reason)

    async def _publish(self) -> None:
        now = self._fleet()
        if self._told is not None and now.version == self._told.version:
            return
        self._told = now
        for owner in list(self._joined):
            await self._send(owner, now)

    def _fleet(self) -> Fleet:
        """How things stand, with a version of its own for each state."""
        live = [deployment for deployment in self._models.deployments.values() if not deployment.ended]
        described = tuple(deployment.describe() for deployment in live)
        state = Fleet(self._version, self._models.offers, described, self._draining)
        if self._told is None or fleet.encode(state) != fleet.encode(self._told):
            self._version += 1
            for deployment in live:
                if deployment.draining and not deployment.drained_in:
                    deployment.drained_in = self._version
            state = Fleet(self._version, state.models, state.deployments, state.draining)
        return state

    async def _tell_status(self, owner: bytes, id_: int) -> None:
        """Tell `owner`, whose own numbers have just come, everybody's as they stand now."""
        workers = [worker for deployment in self._models.deployments.values() for worker in deployment.workers]
        engines = [worker.client for worker in workers if worker.client is not None]
        await self._recount.everybody(self._joined.keys() - {owner}, engines)
        await self._send(owner, self._status(id_))

    def _status(self, id_: int) -> Status:
        deployments = list(self._models.deployments.values())
        return Status(
            id_,
            self._started,
            self._models.offers,
            tuple(status.engines(deployments)),
            tuple(status.processes(self._fronts, deployments)),
            tuple(status.memory(self._plan.rules.seats, deployments)),
            self._totals.sum(),
        )

    async def _obey(self, owner: bytes, command: Command) -> None:
        try:
            if self._draining:
                raise ServeError("the server is shutting down")
            await self._commands.obey(command)
        except ServeError as error:
            await self._send(owner, Outcome(command.id, str(error)))
        else:
            await self._send(owner, Outcome(command.id))

    # The end ------------------------------------------------------------------------------------------------------

    def _front(self, name: str, address: str) -> Front:
        def ended() -> bool:
            mine = {owner: joined for owner, joined in self._joined.items() if joined.name == name}
            for owner in mine:
                self._leave(owner)
            return any(joined.listening for joined in mine.values())

        return Front(name, self._plan.front(name, address), ended)

    async def _stop_asked(self, stops: Sequence[int]) -> None:
        """Wait for the first signal to stop; a second one then ends the waiting for answers. SIGHUP is passed on."""
        loop, asked = asyncio.get_running_loop(), asyncio.Event()

        def take() -> None:
            if asked.is_set():
                for front in self._fronts:
                    front.signal(signal.SIGTERM)
            asked.set()

        def pass_on() -> None:
            for front in self._fronts:
                front.signal(signal.SIGHUP)

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, take)
        loop.add_signal_handler(signal.SIGHUP, pass_on)
        for _ in stops:
            take()
        await asked.wait()

    async def _drain(self) -> None:
        """Take nothing new, and let what runs finish within the limit."""
        self._draining = True
        for front in self._fronts:
            front.stopping = True
        self._poke()
        for front in self._fronts:
            if not any(joined.name == front.name for joined in self._joined.values()):
                front.signal(signal.SIGTERM)  # It has not got as far as to listen to what is told.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._plan.rules.drain_seconds + MARGIN_SECONDS), self._changed:
                await self._changed.wait_for(lambda: all(front.pid is None for front in self._fronts))
