"""Who may ask: the API key that a request bears, and what it opens."""

import re
import socket
from dataclasses import dataclass

from aiohttp import hdrs, web

from server.errors import forbidden, unauthorized
from server.keys import Keys
from server.page.site import PATHS

OPEN = ("/healthz", "/readyz", *PATHS)
"""Routes that need no key: they say nothing but whether the server works, or are the page, which is the same everywhere."""
METRICS = "/metrics"
_GEMINI = re.compile(r"(?s)/v1beta/|/v1/models/.*:(generateContent|streamGenerateContent|countTokens)\Z")


@dataclass(frozen=True)
class Access:
    """What is open to whom; by default everything but `/admin` to everybody, and nothing to web pages of other origins."""

    keys: Keys | None = None
    """Those that are taken; None needs none."""
    origins: frozenset[str] = frozenset()
    """Web pages that may read answers, as `cors.parse` gives them."""
    protect_metrics: bool = False
    """Whether `/metrics` needs a key as well."""

    def is_open(self, request: web.Request) -> bool:
        """Whether the request's route needs no key."""
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else None
        return route in OPEN or (route == METRICS and not self.protect_metrics)


@dataclass(frozen=True)
class Client:
    """Who asks."""

    name: str = ""
    """Its key's; empty without one."""
    priority: int = 0
    """Its key's; a smaller one is served sooner."""
    admin: bool = False
    """Whether `/admin` is open to it."""


ACCESS = web.AppKey("access", Access)
CLIENT = web.RequestKey("client", Client)
"""Who asks, in every request that reaches a route."""


def identify(request: web.Request, access: Access) -> Client:
    """Who asks. Raises ApiError 401 where a key is needed and there is none, or one that is not known."""
    local = _over_unix_socket(request)
    if access.keys is None or access.is_open(request):
        return Client(admin=local)
    presented = _presented(request)
    if presented is None:
        if local:
            return Client(admin=True)
        raise unauthorized("This server needs an API key; send it in the header as Authorization: Bearer KEY.")
    key = access.keys.find(presented)
    if key is None:
        raise unauthorized("The API key is not one of this server's.", wrong=True)
    return Client(key.name, key.priority, key.admin or local)


def require_admin(request: web.Request) -> None:
    """Raise ApiError 403 unless the request bears an admin key or came over a unix socket."""
    client = request[CLIENT]
    if client.admin:
        return
    if request.app[ACCESS].keys is None:
        raise forbidden("This route is open to admin keys and over the admin socket only, and the server runs without keys.")
    raise forbidden(f"The key {client.name!r} is no admin key, which this route needs.")


def _presented(request: web.Request) -> str | None:
    """The key in the header of OpenAI's, Anthropic's or Google's clients, the first of these that is there; for Google's API
    also that in the address.
    """
    scheme, _, bearer = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    if scheme.lower() == "bearer":
        return bearer.strip()
    key = request.headers.get("x-api-key", request.headers.get("x-goog-api-key"))
    return request.query.get("key") if key is None and in_gemini(request.path) else key


def in_gemini(path: str) -> bool:
    """Whether `path` is of Google's API, whose clients may put their key into the address."""
    return _GEMINI.match(path) is not None


def of_gemini(request: web.Request) -> bool:
    """Whether a client of Google's API asks; `/v1/models`, which OpenAI's and Google's have in common, does not tell."""
    return in_gemini(request.path) or (request.path.startswith("/v1/models") and "x-goog-api-client" in request.headers)


def _over_unix_socket(request: web.Request) -> bool:
    """Whether its sender passed the permissions of a socket's file."""
    connection = request.get_extra_info("socket")
    return connection is not None and connection.family == socket.AF_UNIX
