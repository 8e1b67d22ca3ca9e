"""The fleet as an HTTP process goes by it: which models there are, which take requests, and who waits for which.

A request leases a deployment from before its prompt is tokenized to after its last token: a deployment that is to end waits
for that, so none loses its tokenizer or its engine half-way.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from runtime import bundle as bundles
from runtime.bundle import SamplingDefaults
from runtime.text import Text
from server import fleet
from server.embedder import Embedder
from server.engine_client import EngineClient, EngineUnavailableError
from server.errors import ApiError, unavailable
from server.fleet import Demand, Fleet, Offer
from server.metrics import Metrics
from server.served import Served

SOON_SECONDS = 0.02
"""After which the supervisor is told of leases that began or ended: many do in one go."""

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Attachment:
    """The connection to one of a deployment's workers."""

    device: str
    variant: str
    client: EngineClient | None = None
    """Once it has answered."""
    address: str | None = None
    attaching: asyncio.Task[None] | None = None

    def follow(self, address: str | None, changed: Callable[[], None]) -> None:
        """Connect to the process at `address`, which replaces the one before; None has none."""
        if address == self.address:
            return
        self.close()
        self.address = address
        if address is not None:
            self.attaching = asyncio.create_task(self._attach(address, changed))

    def close(self) -> None:
        """Let the process go; requests that it has end with an error."""
        if self.attaching is not None:
            self.attaching.cancel()
        client, self.client, self.address = self.client, None, None
        if client is not None:
            client.close(EngineUnavailableError("The engine stopped before the answer was complete. Try again in a moment."))

    async def _attach(self, address: str, changed: Callable[[], None]) -> None:
        client = EngineClient(address)
        try:
            await client.attach()
        except asyncio.CancelledError:
            client.close(EngineUnavailableError("The engine stopped."))
            raise
        self.client = client
        changed()


@dataclass(eq=False)
class _Deployed:
    """A deployment, and the requests that lease it."""

    state: fleet.Deployment
    attachments: dict[str, Attachment] = field(default_factory=dict)
    served: Served | None = None
    """Once its tokenizer is loaded."""
    opening: asyncio.Task[None] | None = None
    leases: int = 0
    broken: str = ""
    """Why it cannot be used."""

    @property
    def ready(self) -> bool:
        return self.served is not None and self.served.connected and not self.state.draining


class Roster:
    """What `Fleet`s say, as far as it matters for requests; `demand` tells the supervisor what is needed."""

    def __init__(self, metrics: Metrics, tell: Callable[[Demand], None], *, waiting: int = 1000) -> None:
        """`waiting` requests may wait for a model to be loaded."""
        self._metrics = metrics
        self._tell = tell
        self._limit = waiting
        self._models: dict[str, Offer] = {}
        self._deployed: dict[str, _Deployed] = {}
        self._waiting: Counter[str] = Counter()
        self._used: dict[str, float] = {}
        self._version = 0
        self._changed = asyncio.Event()
        self._telling: asyncio.TimerHandle | None = None
        self.known = asyncio.Event()
        """Set once there has been a Fleet."""
        self.draining = asyncio.Event()
        """Set when the server is to stop."""

    # What the supervisor says -------------------------------------------------------------------------------------

    def apply(self, state: Fleet) -> None:
        """Go by `state` from now on."""
        self._version = state.version
        self._models = {model.name: model for model in state.models}
        self._used = {name: when for name, when in self._used.items() if name in self._models}
        for deployment in state.deployments:
            self._follow(deployment)
        for id_ in self._deployed.keys() - {deployment.id for deployment in state.deployments}:
            self._forget(self._deployed.pop(id_))
        self.known.set()
        if state.draining:
            self.draining.set()
        self._wake()
        self.demand()

    def demand(self) -> None:
        """Tell the supervisor how things stand here."""
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        leases = {id_: deployed.leases for id_, deployed in self._deployed.items() if deployed.leases}
        self._tell(Demand(self._version, dict(+self._waiting), leases, dict(self._used)))

    def close(self) -> None:
        """Let every engine go."""
        for deployed in self._deployed.values():
            self._forget(deployed)
        self._deployed.clear()

    def _follow(self, state: fleet.Deployment) -> None:
        deployed = self._deployed.get(state.id)
        if deployed is None:
            deployed = self._deployed[state.id] = _Deployed(state)
            deployed.attachments = {worker.device: Attachment(worker.device, worker.variant) for worker in state.workers}
            deployed.opening = asyncio.create_task(self._open(deployed))
        deployed.state = state
        for worker in state.workers:
            deployed.attachments[worker.device].follow(worker.address, self._wake)
        if deployed.served is not None:
            deployed.served.over = all(worker.state == "given up" for worker in state.workers)

    async def _open(self, deployed: _Deployed) -> None:
        """Load the tokenizer, which no stream waits for."""
        state = deployed.state
        folder = Path(state.folder)
        try:
            bundle = await asyncio.to_thread(bundles.read, folder)
            text = await asyncio.to_thread(Text.load, folder, bundle)
        except Exception as error:
            log.exception("the tokenizer of %s cannot be loaded", state.model)
            deployed.broken = f"The tokenizer of {state.model!r} cannot be loaded: {error}"
        else:
            variant = bundle.variant(state.workers[0].variant)
            attachments = list(deployed.attachments.values())
            kind = Embedder if bundle.task == "feature-extraction" else Served
            deployed.served = kind(state.model, bundle, variant, text, attachments, self._metrics, sampling=state.sampling)
        self._wake()

    def _forget(self, deployed: _Deployed) -> None:
        if deployed.opening is not None:
            deployed.opening.cancel()
        if deployed.served is not None:
            deployed.served.over = True
        for attached in deployed.attachments.values():
            attached.close()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    # What requests need -------------------------------------------------------------------------------------------

    @property
    def models(self) -> Iterable[Offer]:
        """All that can be asked for, the one that is meant where none is named first."""
        return self._models.values()

    def model(self, name: str) -> Offer | None:
        """The model of that name."""
        return self._models.get(name)

    def adopt(self, id_: str, served: Served) -> None:
        """Go by a model whose engines somebody else keeps, as a bench does."""
        bundle = served.bundle
        model = Offer(
            served.name,
            "ready",
            bundle.created,
            bundle.max_length,
            preloaded=True,
            task=bundle.task,
            sampling=served.sampling,
        )
        self._models[served.name] = model
        deployed = self._deployed[id_] = _Deployed(fleet.Deployment(id_, served.name, "", "", False, ()))
        deployed.served = served

    def loaded(self, name: str) -> Served | None:
        """The newest deployment of the model that takes requests."""
        deployed = self._newest(name)
        return None if deployed is None else deployed.served

    def holding(self, offer: Offer) -> tuple[int, SamplingDefaults]:
        """The context and the sampling that hold for a model: where it is loaded its engine's, else those that are offered."""
        served = self.loaded(offer.name)
        return (offer.context, offer.sampling) if served is None else (served.context, served.sampling)

    @asynccontextmanager
    async def lease(self, name: str, seconds: float) -> AsyncIterator[Served]:
        """The model while a request uses it, waited for as long as it is loaded, `seconds` at most.

        Raises ApiError: 404 for a model that there is not, 429 where too many wait, 503 where it cannot be had.
        """
        deployed = self._ready(name) or await self._wait(name, seconds)
        deployed.leases += 1
        self._tell_soon()
        try:
            assert deployed.served is not None
            yield deployed.served
        finally:
            deployed.leases -= 1
            self._used[name] = time.monotonic()
            self._tell_soon()

    def _ready(self, name: str) -> _Deployed | None:
        """The newest deployment of the model that takes requests. Raises ApiError where there is none to wait for."""
        model = self._models.get(name)
        if self.draining.is_set():
            raise unavailable("The server is shutting down.")
        if model is None:
            raise ApiError(404, f"The model {name!r} does not exist; see /v1/models.", param="model", code="model_not_found")
        if model.state == "quarantined":
            raise ApiError(503, f"The model {name!r} is quarantined: {model.reason}.", code="model_quarantined")
        if model.state == "refused":
            raise ApiError(503, f"The model {name!r} cannot be loaded: {model.reason}.", code="model_refused")
        deployed = self._newest(name)
        if deployed is None:
            broken = [other.broken for other in self._deployed.values() if other.state.model == name and other.broken]
            if broken:
                raise ApiError(503, broken[-1], code="model_refused")
        return deployed

    def _newest(self, name: str) -> _Deployed | None:
        ready = [deployed for deployed in self._deployed.values() if deployed.state.model == name and deployed.ready]
        return ready[-1] if ready else None

    async def _wait(self, name: str, seconds: float) -> _Deployed:
        if self._waiting.total() >= self._limit:
            message = f"{self._limit} requests wait already for models to be loaded"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
        self._used[name] = time.monotonic()
        self._waiting[name] += 1
        if self._waiting[name] == 1:
            self.demand()
        try:
            async with asyncio.timeout(seconds):
                while True:
                    await self._changed.wait()
                    deployed = self._ready(name)
                    if deployed is not None:
                        return deployed
        except TimeoutError:
            model = self._models.get(name)
            what = f"it is {model.state}" if model is not None else "it is gone"
            message = f"The model {name!r} was not ready within {seconds:g} s ({what}). Try again later."
            raise ApiError(503, message, code="model_not_ready", headers={"Retry-After": "1"}) from None
        finally:
            self._waiting[name] -= 1
            self._tell_soon()  # after the request that no longer waits has taken its lease

    def _tell_soon(self) -> None:
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(SOON_SECONDS, self.demand)
