"""What the routes share: the models there are, and how long a request may wait for one."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

from runtime.bundle import Task
from server.doors import Limits
from server.errors import ApiError, bad_request, unavailable
from server.fleet import Action, Offer, Outcome, Status
from server.journal import ENTRY
from server.metrics import Metrics
from server.roster import Roster
from server.served import Served

PATIENCE_SECONDS = 60.0


@dataclass
class Service:
    """The models, as one HTTP process serves them."""

    roster: Roster
    metrics: Metrics
    status: Callable[[], Awaitable[Status]]
    """Asks the supervisor what all processes do and hold."""
    command: Callable[[Action, str], Awaitable[Outcome]]
    """Has it do something with a model."""
    limits: Limits = field(default_factory=Limits)
    patience: float = PATIENCE_SECONDS
    """How long a request waits for its model to be loaded where no limit of time is set."""
    draining: bool = False
    """Set when the server stops: what runs goes on, nothing new is taken."""
    requests: int = 0
    """HTTP requests that have not been answered to their end."""

    def check_ready(self) -> list[Offer]:
        """The models that cannot be served, although the server works. Raises ApiError 503 while it does not.

        It works once a model that was to be loaded at the start takes requests, and every other one of them is loaded or has
        failed for good; with none to be loaded, from the start.
        """
        if self.draining:
            raise unavailable("The server is shutting down.")
        first = [model for model in self.roster.models if model.preloaded]
        for model in first:
            if model.state in ("waiting", "loading") or (model.state == "ready" and self.roster.loaded(model.name) is None):
                raise unavailable(f"The model {model.name!r} is not ready: it is loading or being restarted.")
        failed = [model for model in self.roster.models if model.state in ("quarantined", "refused")]
        if first and all(model in failed for model in first):
            raise ApiError(
                503, f"The model {first[0].name!r} is {first[0].state}: {first[0].reason}.", code="model_unavailable"
            )
        return failed

    def default(self, task: Task = "text-generation") -> str:
        """The model of a request that names none: the first that is for `task`. Raises ApiError."""
        first = next((model for model in self.roster.models if model.task == task), None)
        if first is not None:
            return first.name
        if not self.roster.models:
            raise unavailable("No model can be served: there is no bundle. Build one with: engineshed export")
        raise ApiError(
            404,
            f"This server has no model for {task}. Build one with: engineshed export --task {task}",
            param="model",
            code="model_not_found",
        )

    def model(self, name: str) -> Offer:
        """The model of that name; raises ApiError 404."""
        model = self.roster.model(name)
        if model is None:
            there = ", ".join(repr(model.name) for model in self.roster.models) or "none"
            raise ApiError(
                404, f"The model {name!r} does not exist; this server has {there}.", param="model", code="model_not_found"
            )
        return model

    async def server_status(self) -> Status:
        """What all processes do and hold. Raises ApiError 503 where the supervisor does not say."""
        try:
            return await self.status()
        except TimeoutError:
            raise unavailable("The supervisor does not answer.") from None

    @asynccontextmanager
    async def lease(
        self, request: web.Request, name: str | None, task: Task = "text-generation"
    ) -> AsyncIterator[tuple[Served, Limits]]:
        """The model that a request names, which must be for `task`, loaded, and what is left of the request's time.

        Raises ApiError.
        """
        if self.draining:
            raise unavailable("The server is shutting down.")
        chosen = self.default(task) if name is None else _suited(self.model(name), task).name
        limits = [seconds for seconds in (self.limits.queue_seconds, self.limits.total_seconds) if seconds]
        async with self.roster.lease(chosen, min(limits, default=self.patience)) as served:
            yield served, self.limits.after(time.perf_counter() - request[ENTRY].arrived)


_ROUTES: dict[Task, str] = {
    "text-generation": "generates text, for /v1/chat/completions, /v1/completions and /v1/generate",
    "feature-extraction": "gives embeddings, for /v1/embeddings",
}


def _suited(model: Offer, task: Task) -> Offer:
    """`model` itself; raises ApiError 400 where it is not for `task`."""
    if model.task != task and model.state != "refused":  # what a damaged bundle is for, nobody knows
        raise mismatch(model.name, model.task)
    return model


def mismatch(name: str, task: Task) -> ApiError:
    """A request for something else than `task`, which the model `name` is for."""
    return bad_request(f"The model {name!r} {_ROUTES[task]}; this route is not for it.", "model", "model_not_supported")


SERVICE = web.AppKey("service", Service)
