"""`/admin`: what operators see and do, open to admin keys and over the admin socket only."""

import msgspec
from aiohttp import web

from server import fleet
from server.access import require_admin
from server.errors import ApiError
from server.fleet import Action
from server.service import SERVICE

_encode = msgspec.json.Encoder().encode


class ServerStatus(msgspec.Struct, frozen=True):
    """What the server does and holds."""

    started: float
    """When it was, in seconds since the epoch."""
    models: tuple[fleet.Offer, ...]
    engines: tuple[fleet.Engine, ...]
    processes: tuple[fleet.Process, ...]
    memory: tuple[fleet.Memory, ...]


class ModelStatus(msgspec.Struct, frozen=True):
    """A model after something was done with it."""

    model: str
    state: fleet.ModelState


async def status(request: web.Request) -> web.Response:
    """Tell what all processes do and hold."""
    require_admin(request)
    now = await request.app[SERVICE].server_status()
    return _json(ServerStatus(now.started, now.models, now.engines, now.processes, now.memory))


async def load(request: web.Request) -> web.Response:
    """Load a model, or wait until it is; one that was quarantined gets another chance."""
    return await _act(request, "load")


async def unload(request: web.Request) -> web.Response:
    """Have a model's answers finish, and end its processes."""
    return await _act(request, "unload")


async def reload(request: web.Request) -> web.Response:
    """Load a model's bundle as it is now, and have it take the place of the one that is loaded; no request fails for it."""
    return await _act(request, "reload")


async def _act(request: web.Request, action: Action) -> web.Response:
    require_admin(request)
    service = request.app[SERVICE]
    model = service.model(request.match_info["name"])
    outcome = await service.command(action, model.name)
    if outcome.error:
        raise ApiError(409, f"The model {model.name!r} was not {action}ed: {outcome.error}", code=f"{action}_failed")
    now = service.roster.model(model.name)
    return _json(ModelStatus(model.name, "cold" if now is None or action == "unload" else "ready"))


def _json(body: msgspec.Struct) -> web.Response:
    return web.Response(body=_encode(body), content_type="application/json")
