"""Ollama's API about models: lists, details, and operations that are not supported."""

from datetime import UTC, datetime, timedelta
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from .. import __version__
from .faults import ApiError
from .models import rfc3339
from .ollama import check_model
from .service import Service, service_of

# Open WebUI and others disable thinking and tools for older versions.
COMPATIBLE_VERSION = "0.12.0"
STAYS = timedelta(days=365)


async def root(http: HttpRequest) -> Response:
    """The text by which programs recognize Ollama."""
    return PlainTextResponse("Ollama is running")


async def version(http: HttpRequest) -> Response:
    """The version of the API, and ours."""
    return JSONResponse({"version": COMPATIBLE_VERSION, "qwen35_mlx": __version__})


def _details(service: Service) -> dict[str, Any]:
    settings = service.settings
    return {
        "parent_model": "",
        "format": "mlx",
        "family": settings.architecture,
        "families": [settings.architecture],
        "parameter_size": settings.parameter_size,
        "quantization_level": settings.quantization,
    }


def _card(service: Service, name: str) -> dict[str, Any]:
    settings = service.settings
    return {
        "name": name,
        "model": name,
        "size": settings.num_bytes,
        "digest": settings.digest,
        "details": _details(service),
    }


async def tags(http: HttpRequest) -> Response:
    """The available models."""
    service = service_of(http)
    modified = rfc3339(service.settings.created_s)
    more = {"modified_at": modified}
    return JSONResponse({"models": [_card(service, name) | more for name in service.model_names]})


async def ps(http: HttpRequest) -> Response:
    """The loaded models."""
    service = service_of(http)
    more = {
        "expires_at": (datetime.now(UTC) + STAYS).isoformat(),
        "size_vram": service.settings.num_bytes,
        "context_length": service.settings.context_length,
    }
    return JSONResponse({"models": [_card(service, name) | more for name in service.model_names]})


async def show(http: HttpRequest) -> Response:
    """Details of the model."""
    service = service_of(http)
    name = check_model(service, await service.fields(http))
    settings = service.settings
    defaults = vars(settings.defaults)
    architecture = settings.architecture
    return JSONResponse(
        {
            "modelfile": f"FROM {name}\n",
            "parameters": "\n".join(f"{key} {value}" for key, value in defaults.items()),
            "template": settings.template,
            "license": "",
            "details": _details(service),
            "model_info": {
                "general.architecture": architecture,
                "general.basename": settings.model_id,
                "general.parameter_count": settings.num_parameters,
                f"{architecture}.context_length": settings.context_length,
                f"{architecture}.vocab_size": settings.vocab_size,
            },
            "capabilities": settings.capabilities,
            "modified_at": rfc3339(settings.created_s),
        }
    )


async def unsupported(http: HttpRequest) -> Response:
    """Refuse operations that change models."""
    action = http.url.path.rpartition("/")[2]
    raise ApiError(501, f"this server serves one model and does not {action}")
