"""The supervisor: which models are loaded where, and every process of the server from its start to its end.

It never sees a prompt or a token. HTTP processes say what they need and what they hold (`server.fleet.Demand`); the supervisor
starts and ends engines so that it can be had within the devices' memory, and tells everybody how things stand.
"""

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import psutil
import zmq
import zmq.asyncio

from runtime.bundle import BundleError
from runtime.devices import DeviceError
from server import counts, fleet, status
from server.catalog import Catalog, Entry
from server.deployment import Deployment
from server.fleet import Ask, Command, Counts, Demand, Fleet, Join, ModelState, Offer, Outcome, Status
from server.fronts import Front
from server.launch import Common, Launch, launches
from server.placement import DoesNotFitError, Seat, crowded, place
from server.process import ServeError, SocketFolder

TICK_SECONDS = 1.0
"""How often it looks at what nobody tells it: the clock, and the engines' folder."""
PATIENCE_SECONDS = 5.0
"""How long a model waits for idle ones to make room. Then the one that has been loaded for longest takes no new requests and
leaves once it has answered those that it has, so that no model is kept out by others that are never idle."""
MARGIN_SECONDS = 3.0
"""What an HTTP process gets to end beyond the answers' own limit."""

log = logging.getLogger("engineshed")


@dataclass(frozen=True)
class Plan:
    """What a supervisor keeps."""

    catalog: Catalog
    seats: Sequence[Seat]
    common: Common
    preload: Sequence[str]
    """Models to load at the start."""
    fronts: int
    """HTTP processes."""
    front: Callable[[str, str], list[str]]
    """The command line of an HTTP process, by its name and the supervisor's address."""
    url: str
    """Where they listen."""
    drain_seconds: float
    """What running answers get to finish when an engine or the server is to end."""
    silence: float
    """Seconds after which an engine from which nothing comes is taken for dead."""


@dataclass
class _Wish:
    """A model that somebody waits for."""

    since: float
    reload: bool = False
    commanded: bool = False
    """A command waits for what becomes of it, and takes it back."""
    refused: str = ""
    """Why it cannot be had."""


@dataclass(frozen=True)
class _Fault:
    """Why a build is not loaded any more."""

    build: str
    reason: str


@dataclass
class _Joined:
    """What is known of an HTTP process that has joined."""

    name: str
    demand: Demand | None = None


class Supervisor:
    """Keeps the processes of `plan` until it is told to stop."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._started = time.time()
        self._deployments: dict[str, Deployment] = {}
        self._wishes: dict[str, _Wish] = {}
        self._faults: dict[str, _Fault] = {}
        self._joined: dict[bytes, _Joined] = {}
        self._commands: set[asyncio.Task[None]] = set()
        self._totals = counts.Totals()
        self._poked = asyncio.Event()
        self._changed = asyncio.Condition()
        """Notified after each round of reconciliation."""
        self._version = 0
        self._told: Fleet | None = None
        self._draining = False
        self._served_once = False

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
            asyncio.create_task(self._reconcile()),
            *(asyncio.create_task(front.keep(), name=front.name) for front in self._fronts),
        }
        stop = asyncio.create_task(self._stop_asked(stops))
        try:
            for name in self._plan.preload:
                self._wish(name)
            done, _ = await asyncio.wait({*tasks, stop}, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stop}:
                task.result()  # raises: none of them ends by itself
            await self._drain()
        finally:
            for task in (*tasks, stop, *self._commands):
                task.cancel()
            await asyncio.gather(*tasks, stop, *self._commands, return_exceptions=True)
            await asyncio.gather(*(deployment.stop() for deployment in self._deployments.values()))
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
        match message:
            case Join(name):
                for old in [old for old, joined in self._joined.items() if joined.name == name]:
                    self._leave(old)
                self._joined[owner] = _Joined(name)
                if self._told is not None:
                    await self._send(owner, self._told)
                self._poke()
            case Demand():
                joined = self._joined.get(owner)
                if joined is not None:
                    joined.demand = message
                    self._note_use(message)
                    self._poke()
            case Counts(samples):
                if owner in self._joined:
                    self._totals.take(owner, samples)
            case Command():
                task = asyncio.create_task(self._obey(owner, message))
                self._commands.add(task)
                task.add_done_callback(self._commands.discard)
            case Ask(id_):
                await self._send(owner, self._status(id_))

    def _note_use(self, demand: Demand) -> None:
        for deployment in self._deployments.values():
            deployment.used = max(deployment.used, demand.used.get(deployment.name, 0.0))

    def _leave(self, owner: bytes) -> None:
        """An HTTP process is gone: what it held is free, and what it counted stays counted."""
        del self._joined[owner]
        self._totals.retire(owner)
        self._poke()

    async def _send(self, owner: bytes, message: fleet.Down) -> None:
        await self._socket.send_multipart([owner, fleet.encode(message)])

    def _poke(self) -> None:
        self._poked.set()

    # How things should stand --------------------------------------------------------------------------------------

    async def _reconcile(self) -> None:
        """Bring about what is wanted, as far as it can be now; again whenever something has changed."""
        while True:
            self._poked.clear()
            if self._plan.catalog.refresh():
                log.debug("the bundles are %s", ", ".join(self._plan.catalog.entries) or "gone")
            self._retire()
            self._turn_over()
            self._grant()
            await self._publish()
            self._check_hope()
            async with self._changed:
                self._changed.notify_all()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS):
                    await self._poked.wait()

    def _retire(self) -> None:
        """Forget what has ended, end what is drained, quarantine what nothing can be expected of."""
        now = time.monotonic()
        for deployment in list(self._deployments.values()):
            if deployment.ended:
                del self._deployments[deployment.id]
                log.info("unloaded %s", deployment.name)
            elif deployment.draining and not deployment.ending and self._drained(deployment, now):
                deployment.end()
            elif deployment.given_up and not deployment.draining:
                reason = "; ".join(deployment.reasons)
                log.error("%s is quarantined: %s", deployment.name, reason)
                self._faults[deployment.name] = _Fault(deployment.entry.build, reason)
                self._wishes.pop(deployment.name, None)
                deployment.drain()
            elif deployment.ready and not self._served_once:
                self._announce(deployment)

    def _drained(self, deployment: Deployment, now: float) -> bool:
        """Whether nobody needs the deployment any more, or its time is up."""
        since = deployment.draining_since or now
        if now - since > self._plan.drain_seconds:
            log.warning("ending %s with answers that did not finish in time", deployment.name)
            return True
        demands = [joined.demand for joined in self._joined.values()]
        return bool(deployment.drained_in) and all(
            demand is not None and demand.seen >= deployment.drained_in and not demand.leases.get(deployment.id)
            for demand in demands
        )

    def _turn_over(self) -> None:
        """Where a model's new deployment is ready, have the old one leave."""
        for new in self._serving():
            if new.settled and new.ready:
                for old in self._serving():
                    if old.name == new.name and old is not new and self._age(old) < self._age(new):
                        old.drain()

    def _age(self, deployment: Deployment) -> int:
        return list(self._deployments).index(deployment.id)

    def _grant(self) -> None:
        """Load what is waited for, the longest-waiting first."""
        for name in {name for joined in self._joined.values() if joined.demand for name in joined.demand.waiting}:
            if not self._is_serving(name):
                self._wish(name)
        for name, wish in sorted(self._wishes.items(), key=lambda item: item[1].since):
            self._load(name, wish)
        for name, wish in list(self._wishes.items()):
            granted = not wish.reload and self._is_serving(name)
            if granted or (wish.refused and not wish.commanded and not self._waited_for(name)):
                del self._wishes[name]

    def _load(self, name: str, wish: _Wish) -> None:
        if self._draining or (not wish.reload and self._is_serving(name)):
            return
        try:
            entry = self._plan.catalog.find(name)
            fault = self._faults.get(name)
            if fault is not None and fault.build == entry.build:
                raise DoesNotFitError(fault.reason)
            self._faults.pop(name, None)
            options = launches(entry, self._plan.common, self._plan.seats, self._plan.catalog)
            chosen = self._choose(name, options, wish)
        except (BundleError, DeviceError, DoesNotFitError, ServeError) as error:
            if str(error) != wish.refused:
                log.error("%s cannot be loaded: %s", name, error)
            wish.refused = str(error)
            return
        wish.refused = ""
        if chosen:
            self._start(entry, chosen)
            del self._wishes[name]

    def _choose(self, name: str, options: Sequence[Launch], wish: _Wish) -> list[Launch]:
        """The launches for which there is room now; where there is none, see to it that there will be.

        Raises DoesNotFitError where there never will.
        """
        seats = [launch.seat for launch in options]
        needs = {launch.seat.name: launch.need for launch in options}
        why = {launch.seat.name: launch.why for launch in options}
        replicas = self._plan.common.of(name).replicas or len(seats)
        serving = self._serving()
        staying = [deployment.occupant for deployment in serving]
        chosen = place(seats, needs, replicas, staying, self._removable(name, wish), why)
        if chosen is None:
            others = [d.id for d in serving if d.name != name and not self._plan.common.of(d.name).pinned]
            if place(seats, needs, 1, staying, others, why) is None:
                raise DoesNotFitError(crowded(seats, needs, staying, {d.id: d.name for d in serving if d.id not in others}))
            return []
        for id_ in chosen.evicted:
            log.info("%s makes room for %s", self._deployments[id_].name, name)
            self._deployments[id_].drain()
        everybody = [deployment.occupant for deployment in self._deployments.values()]
        now = place(chosen.seats, needs, len(chosen.seats), everybody, (), why)
        return [] if now is None else [launch for launch in options if launch.seat in now.seats]

    def _removable(self, name: str, wish: _Wish) -> list[str]:
        """Deployments that may make room for `name`: idle ones, asked for least recently first; then, if it has waited for long
        enough, busy ones, loaded for longest first.
        """
        others = [d for d in self._serving() if d.name != name and d.settled and not self._plan.common.of(d.name).pinned]
        busy = [deployment for deployment in others if self._needed(deployment)]
        idle = sorted((deployment for deployment in others if deployment not in busy), key=lambda deployment: deployment.used)
        patient = time.monotonic() - wish.since < PATIENCE_SECONDS
        return [deployment.id for deployment in (idle if patient else [*idle, *busy])]

    def _needed(self, deployment: Deployment) -> bool:
        """Whether a request runs on it, or waits for it."""
        demands = [joined.demand for joined in self._joined.values() if joined.demand is not None]
        return any(demand.leases.get(deployment.id) or demand.waiting.get(deployment.name) for demand in demands)

    def _start(self, entry: Entry, chosen: Sequence[Launch]) -> None:
        log.info("loading %s (%s) on %s", entry.name, chosen[0].variant, ", ".join(launch.seat.name for launch in chosen))
        deployment = Deployment(entry, chosen, self._plan.silence, self._poke)
        self._deployments[deployment.id] = deployment

    def _wish(self, name: str, *, commanded: bool = False, reload: bool = False) -> None:
        wish = self._wishes.get(name)
        if wish is None:
            wish = self._wishes[name] = _Wish(time.monotonic())
            self._poke()
        wish.reload = wish.reload or reload
        wish.commanded = wish.commanded or commanded

    def _waited_for(self, name: str) -> bool:
        demands = [joined.demand for joined in self._joined.values() if joined.demand is not None]
        return any(demand.waiting.get(name) for demand in demands) or (not self._served_once and name in self._plan.preload)

    def _serving(self) -> list[Deployment]:
        """Those that take requests or will, the oldest first."""
        return [deployment for deployment in self._deployments.values() if not (deployment.draining or deployment.ended)]

    def _is_serving(self, name: str) -> bool:
        return any(deployment.name == name for deployment in self._serving())

    def _check_hope(self) -> None:
        """Raise ServeError where nothing can be loaded that was to be: whoever started the server is there still."""
        if self._served_once or self._draining or not self._plan.preload:
            return
        first = [self._describe(name) for name in self._plan.preload]
        if all(model.state in ("quarantined", "refused") for model in first):
            raise ServeError(first[0].reason)

    def _announce(self, deployment: Deployment) -> None:
        """Say that the server works, once it does."""
        ready = next(worker.client.ready for worker in deployment.workers if worker.client is not None)
        if ready is None or not self._joined:
            return
        self._served_once = True
        url, what = self._plan.url, (deployment.name, ready.variant, ready.slots, ready.context)
        log.info("ready at %s with %s (%s): %d slots of %d tokens", url, *what)
        log.info('try: curl -N %s/v1/generate -d \'{"prompt": "The capital of France is", "max_tokens": 32}\'', url)

    # What is told -------------------------------------------------------------------------------------------------

    async def _publish(self) -> None:
        now = self._fleet()
        if self._told is not None and now.version == self._told.version:
            return
        self._told = now
        for owner in list(self._joined):
            await self._send(owner, now)

    def _fleet(self) -> Fleet:
        """How things stand, with a version of its own for each state."""
        live = [deployment for deployment in self._deployments.values() if not deployment.ended]
        state = Fleet(
            self._version, tuple(map(self._describe, self._names())), tuple(d.describe() for d in live), self._draining
        )
        if self._told is None or fleet.encode(state) != fleet.encode(self._told):
            self._version += 1
            for deployment in live:
                if deployment.draining and not deployment.drained_in:
                    deployment.drained_in = self._version
            state = Fleet(self._version, state.models, state.deployments, state.draining)
        return state

    def _names(self) -> list[str]:
        """Every model's, the one that is meant where none is named first."""
        names = [*self._plan.preload, *self._plan.catalog.entries, *(d.name for d in self._deployments.values())]
        return list(dict.fromkeys(names))

    def _state(self, name: str) -> ModelState:
        mine = [deployment for deployment in self._serving() if deployment.name == name]
        wish = self._wishes.get(name)
        if any(deployment.ready for deployment in mine):
            return "ready"
        if mine:
            return "loading"
        entry = self._plan.catalog.entries.get(name)
        fault = self._faults.get(name)
        if fault is not None and isinstance(entry, Entry) and fault.build == entry.build:
            return "quarantined"
        if not isinstance(entry, Entry) or (wish is not None and wish.refused):
            return "refused"
        return "cold" if wish is None else "waiting"

    def _describe(self, name: str) -> Offer:
        state, entry, wish = self._state(name), self._plan.catalog.entries.get(name), self._wishes.get(name)
        reason = ""
        if state == "quarantined":
            reason = f"{self._faults[name].reason}. Export it again, or reload it: POST /admin/models/{name}/reload"
        elif state == "refused":
            reason = str(entry) if isinstance(entry, BundleError) else wish.refused if wish else "the bundle is gone"
        elif state == "waiting":
            reason = "it waits for other models to make room"
        context = self._plan.common.of(name).context
        if not isinstance(entry, Entry):
            return Offer(name, state, preloaded=name in self._plan.preload, reason=reason)
        longest = entry.bundle.max_length
        return Offer(name, state, entry.bundle.created, min(context or longest, longest), name in self._plan.preload, reason)

    def _status(self, id_: int) -> Status:
        everybody = [deployment.occupant for deployment in self._deployments.values()]
        return Status(
            id_,
            self._started,
            tuple(map(self._describe, self._names())),
            tuple(self._engines()),
            tuple(self._processes()),
            tuple(
                fleet.Memory(seat.name, seat.budget, sum(occupant.held.get(seat.name, 0) for occupant in everybody))
                for seat in self._plan.seats
            ),
            self._totals.sum(),
        )

    def _engines(self) -> Iterable[fleet.Engine]:
        for deployment in self._deployments.values():
            for worker, launch in zip(deployment.workers, deployment.launches, strict=True):
                yield status.engine(
                    deployment.name,
                    worker.device,
                    launch.variant,
                    worker.client,
                    state=worker.state,
                    draining=deployment.draining,
                    restarts=worker.restarts,
                )

    def _processes(self) -> Iterable[fleet.Process]:
        workers = [
            (f"{deployment.name}@{worker.device}", worker.pid, worker.restarts)
            for deployment in self._deployments.values()
            for worker in deployment.workers
        ]
        fronts = [(front.name, front.pid, front.restarts) for front in self._fronts]
        for name, pid, restarts in [("supervisor", psutil.Process().pid, 0), *fronts, *workers]:
            if pid is not None:
                with contextlib.suppress(psutil.Error):  # it has just ended
                    yield fleet.Process(name, pid, psutil.Process(pid).memory_info().rss, restarts)

    # Commands -----------------------------------------------------------------------------------------------------

    async def _obey(self, owner: bytes, command: Command) -> None:
        try:
            if self._draining:
                raise ServeError("the server is shutting down")
            match command.action:
                case "load":
                    await self._obey_load(command.model)
                case "unload":
                    await self._obey_unload(command.model)
                case "reload":
                    await self._obey_reload(command.model)
        except ServeError as error:
            await self._send(owner, Outcome(command.id, str(error)))
        else:
            await self._send(owner, Outcome(command.id))

    async def _obey_load(self, name: str) -> None:
        """Wait until the model takes requests; one that was quarantined gets another chance."""
        if not self._is_serving(name):
            self._faults.pop(name, None)
            self._wish(name, commanded=True)
        await self._until_ready(name)

    async def _obey_unload(self, name: str) -> None:
        """Have the model's answers finish, end its processes, and wait for that."""
        leaving = [deployment for deployment in self._deployments.values() if deployment.name == name]
        if not leaving and not isinstance(self._plan.catalog.entries.get(name), Entry):
            raise ServeError(f"there is no model {name!r}")
        self._wishes.pop(name, None)
        for deployment in leaving:
            deployment.drain()
        await self._until(lambda: all(deployment.ended for deployment in leaving))

    async def _obey_reload(self, name: str) -> None:
        """Load the bundle as it is now beside the one that serves, and wait until it has taken its place."""
        self._plan.catalog.refresh()
        before = [deployment for deployment in self._serving() if deployment.name == name]
        self._faults.pop(name, None)
        self._wish(name, commanded=True, reload=bool(before))
        await self._until_ready(name, before)
        await self._until(lambda: all(deployment.ended for deployment in before))

    async def _until_ready(self, name: str, before: Sequence[Deployment] = ()) -> None:
        """Wait for a deployment that is none of `before`. Raises ServeError where there will be none."""
        while True:
            async with self._changed:
                await self._changed.wait()
            new = [d for d in self._deployments.values() if d.name == name and d not in before and not d.draining]
            if any(deployment.settled and deployment.ready for deployment in new):
                return
            wish, fault = self._wishes.get(name), self._faults.get(name)
            if wish is not None and wish.refused:
                reason = wish.refused
                del self._wishes[name]
                raise ServeError(reason)
            if not new and fault is not None:
                raise ServeError(fault.reason)
            if not new and wish is None:
                raise ServeError(f"{name} was unloaded before it was ready")

    async def _until(self, true: Callable[[], bool]) -> None:
        """Wait until `true` is, which is looked at again whenever something has changed."""
        while not true():
            async with self._changed:
                await self._changed.wait()

    # The end ------------------------------------------------------------------------------------------------------

    def _front(self, name: str, address: str) -> Front:
        def ended() -> bool:
            owners = [owner for owner, joined in self._joined.items() if joined.name == name]
            for owner in owners:
                self._leave(owner)
            return bool(owners)

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
        gone = self._until(lambda: all(front.pid is None for front in self._fronts))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(gone, self._plan.drain_seconds + MARGIN_SECONDS)
