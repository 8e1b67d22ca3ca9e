"""What operators have done with models: load, unload, reload; each waits until it is done, or cannot be."""

import asyncio
from collections.abc import Callable, Sequence

from server.fleet import Command
from server.supervision.catalog import Catalog, Entry
from server.supervision.deployment import Deployment
from server.supervision.models import Models
from server.supervision.process import ServeError


class Commands:
    """Carries out commands by what it wishes of `models`; looks again whenever `changed` is notified."""

    def __init__(self, models: Models, catalog: Catalog, changed: asyncio.Condition) -> None:
        self._models = models
        self._catalog = catalog
        self._changed = changed

    async def obey(self, command: Command) -> None:
        """Do it, however long it takes. Raises ServeError with the reason where it cannot be done."""
        match command.action:
            case "load":
                await self._load(command.model)
            case "unload":
                await self._unload(command.model)
            case "reload":
                await self._reload(command.model)

    async def _load(self, name: str) -> None:
        """Wait until the model takes requests; one that was quarantined gets another chance."""
        if not self._models.of(name):
            self._models.faults.pop(name, None)
            self._models.wish(name, commanded=True)
        await self._until_ready(name)

    async def _unload(self, name: str) -> None:
        """Have the model's answers finish, end its processes, and wait for that."""
        leaving = [deployment for deployment in self._models.deployments.values() if deployment.name == name]
        if not leaving and not isinstance(self._catalog.entries.get(name), Entry):
            raise ServeError(f"there is no model {name!r}")
        self._models.wishes.pop(name, None)
        for deployment in leaving:
            deployment.drain()
        await self._until(lambda: all(deployment.ended for deployment in leaving))

    async def _reload(self, name: str) -> None:
        """Load the bundle as it is now beside what serves it, and wait until it has taken its place."""
        self._catalog.refresh()
        before = self._models.of(name)
        self._models.faults.pop(name, None)
        self._models.wish(name, commanded=True, reload=bool(before))
        await self._until_ready(name, before)
        await self._until(lambda: all(deployment.ended for deployment in before))

    async def _until_ready(self, name: str, before: Sequence[Deployment] = ()) -> None:
        """Wait for a deployment that is none of `before`. Raises ServeError where there will be none."""

        def ready() -> bool:
            new = [deployment for deployment in self._models.of(name) if deployment not in before]
            wish, fault = self._models.wishes.get(name), self._models.faults.get(name)
            if wish is not None and wish.refused:
                del self._models.wishes[name]
                raise ServeError(wish.refused)
            if not new and fault is not None:
                raise ServeError(fault.reason)
            if not new and wish is None:
                raise ServeError(f"{name} was unloaded before it was ready")
            return any(deployment.settled and deployment.ready for deployment in new)

        await self._until(ready)

    async def _until(self, true: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait()  # for the round that takes the command up
            await self._changed.wait_for(true)
