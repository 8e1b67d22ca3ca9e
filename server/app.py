"""The HTTP application: its routes, and how every request is counted and every error told."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from runtime import logs
from server import cors, journal
from server.access import ACCESS, CLIENT, Access, Client, identify
from server.api import admin, error_shapes, generate, openapi, tokenizing
from server.api.anthropic import messages
from server.api.bodies import MAX_BODY
from server.api.google import gemini
from server.api.openai import chat, completions, embeddings, models, responses
from server.api.streaming import CLIENT_GONE
from server.checker import checking
from server.errors import ApiError
from server.journal import STATUS
from server.metrics import CONTENT_TYPE
from server.page import site
from server.service import SERVICE, Service

log = logging.getLogger(__name__)
http_log = logging.getLogger(f"{__name__}.http")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build(service: Service, access: Access | None = None) -> web.Application:
    """The application that serves `service` to those that `access` lets in."""
    app = web.Application(middlewares=[_account, _answer_preflight, _tell_errors, _identify], client_max_size=MAX_BODY)
    app[SERVICE] = service
    app[ACCESS] = Access() if access is None else access
    app.on_response_prepare.append(_mark)
    app.cleanup_ctx.append(checking)
    app.add_routes(
        [
            web.post("/v1/chat/completions", chat.chat_completions),
            web.post("/v1/completions", completions.completions),
            web.post("/v1/generate", generate.generate),
            web.post("/v1/embeddings", embeddings.embeddings),
            web.post("/v1/responses", responses.responses),
            web.get("/v1/responses/{id}", responses.stored),
            web.post("/v1/messages", messages.messages),
            web.post("/v1/messages/count_tokens", messages.count_tokens),
            web.get("/v1beta/models", gemini.models),
            web.get("/v1beta/models/{model:[^:]+}", gemini.model),
            *(
                web.post(f"/{version}/models/{{model:(?s:.*)}}:{method}", handler)
                for version in gemini.VERSIONS
                for method, handler in gemini.METHODS.items()
            ),
            web.post("/tokenize", tokenizing.tokenizing),
            web.post("/detokenize", tokenizing.detokenizing),
            web.get("/v1/models", models.models),
            web.get("/v1/models/{model:.+}", models.model),
            web.get("/healthz", health),
            web.get("/readyz", readiness),
            web.get("/metrics", metrics),
            web.get("/openapi.json", openapi.openapi),
            web.get("/admin/status", admin.status),
            web.post("/admin/models/{name}/load", admin.load),
            web.post("/admin/models/{name}/unload", admin.unload),
            web.post("/admin/models/{name}/reload", admin.reload),
            *site.routes(),
        ]
    )
    return app


def runner(app: web.Application) -> web.AppRunner:
    """What runs the application: a client that goes away cancels its handler, and with it its place in the engine."""
    return web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0, logger=http_log)


async def health(request: web.Request) -> web.Response:
    """Say that this process lives."""
    return web.json_response({"status": "ok"})


async def readiness(request: web.Request) -> web.Response:
    """Say whether requests are taken."""
    failed = request.app[SERVICE].check_ready()
    models = {model.name: f"{model.state}: {model.reason}" for model in failed}
    return web.json_response({"status": "degraded" if failed else "ready", "models": models})


async def metrics(request: web.Request) -> web.Response:
    """Give Prometheus its numbers."""
    service = request.app[SERVICE]
    return web.Response(body=service.metrics.render(await service.server_status()), headers={"Content-Type": CONTENT_TYPE})


@web.middleware
async def _account(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Count the request and log it at its end, and let every line that is logged until then have its id."""
    entry = journal.open_entry(request)
    token = logs.request_id.set(entry.id)
    status = 500
    service = request.app[SERVICE]
    service.requests += 1
    try:
        response = await handler(request)
        entry.begin()  # A whole answer is sent once this has returned.
        status = request.get(STATUS, response.status)
        return response
    except (asyncio.CancelledError, ConnectionError):
        status = CLIENT_GONE
        raise
    finally:
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else "unknown"
        service.requests -= 1
        service.metrics.requests.labels(route, status).inc()
        entry.write(request.method, route, status, request.get(CLIENT, Client()).name)
        logs.request_id.reset(token)


@web.middleware
async def _answer_preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Before keys are looked at: a browser sends none with it."""
    answer = cors.preflight(request, request.app[ACCESS].origins)
    return await handler(request) if answer is None else answer


@web.middleware
async def _identify(request: web.Request, handler: Handler) -> web.StreamResponse:
    request[CLIENT] = identify(request, request.app[ACCESS])
    return await handler(request)


async def _mark(request: web.Request, response: web.StreamResponse) -> None:
    journal.mark(request, response)
    error_shapes.mark(request, response)
    cors.mark(request, response, request.app[ACCESS].origins)


@web.middleware
async def _tell_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as error:
        return error_shapes.answer(request, error)
    except web.HTTPException as error:
        return error_shapes.answer(request, _from_http(request, error))
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        return error_shapes.answer(request, ApiError(500, "The server failed on this request.", code="internal_error"))


class _FaultsOfThisServer(logging.Filter):
    """Drops requests that are no HTTP: they have had their 400, and anybody could fill the log with them."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, HttpProcessingError | web.RequestPayloadError)


http_log.addFilter(_FaultsOfThisServer())


def _from_http(request: web.Request, error: web.HTTPException) -> ApiError:
    match error:
        case web.HTTPNotFound():
            return ApiError(404, f"There is no {request.path} here; see /v1/models.", code="unknown_url")
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            message = f"{request.path} takes {allowed}, not {request.method}."
            return ApiError(405, message, code="method_not_allowed", headers={"Allow": allowed})
        case web.HTTPRequestEntityTooLarge():
            return ApiError(413, f"The body is larger than {MAX_BODY} bytes.", code="body_too_large")
        case _:
            return ApiError(error.status, error.reason)
