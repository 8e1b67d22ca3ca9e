"""OpenAI's models: `GET /v1/models`."""

from aiohttp import web

from server import fleet
from server.api.answers import Model, ModelList
from server.api.events import json
from server.service import SERVICE, Service


async def models(request: web.Request) -> web.Response:
    """List the models."""
    service = request.app[SERVICE]
    return json(ModelList(data=[_model(service, model) for model in service.roster.models]))


async def model(request: web.Request) -> web.Response:
    """Describe one model."""
    service = request.app[SERVICE]
    return json(_model(service, service.model(request.match_info["id"])))


def _model(service: Service, model: fleet.Offer) -> Model:
    served = service.roster.loaded(model.name)
    context = model.context if served is None else served.context
    return Model(
        id=model.name,
        created=model.created,
        max_model_len=context,
        state=model.state,
        reason=model.reason or None,
        task=model.task,
    )
