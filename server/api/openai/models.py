"""OpenAI's models: `GET /v1/models`, where Google's client looks for its own."""

from aiohttp import web

from server import fleet
from server.access import of_gemini
from server.api.google import gemini
from server.api.openai.answers import Model, ModelList
from server.api.writing import json
from server.asked import SILENT
from server.service import SERVICE, Service


async def models(request: web.Request) -> web.Response:
    """List the models."""
    if of_gemini(request):
        return await gemini.models(request)
    service = request.app[SERVICE]
    return json(ModelList(data=[_model(service, model) for model in service.roster.models]))


async def model(request: web.Request) -> web.Response:
    """Describe one model."""
    if of_gemini(request):
        return await gemini.model(request)
    service = request.app[SERVICE]
    return json(_model(service, service.model(request.match_info["model"])))


def _model(service: Service, model: fleet.Offer) -> Model:
    context, sampling = service.roster.holding(model)
    return Model(
        id=model.name,
        created=model.created,
        max_model_len=context,
        state=model.state,
        reason=model.reason or None,
        task=model.task,
        sampling=sampling.over(SILENT) if model.task == "text-generation" else None,
    )
