"""Information about the model in all APIs, also Ollama's; the server's health, and its counters."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from .. import __version__
from .faults import ApiError
from .ollama import check_model
from .service import Service, service_of

OWNER = "qwen35-mlx"
# Current values; all other numbers of the engine are counters, which only grow.
GAUGES = (
    *("running", "queued", "rows", "cached_points", "cache_bytes"),
    *("experts", "expert_slots", "expert_hit_rate", "expert_gb_per_s"),
)
# Open WebUI and others disable thinking and tools for older versions.
COMPATIBLE_VERSION = "0.12.0"
STAYS = timedelta(days=365)


def model_object(service: Service, name: str = "") -> dict[str, Any]:
    """The model, in one object for clients of OpenAI, Anthropic, vLLM, LM Studio and llama.cpp."""
    settings = service.settings
    length = settings.context_length
    name = name if name in service.model_names else settings.model_id
    return {
        "id": name,
        "object": "model",
        "created": settings.created_s,
        "owned_by": OWNER,
        "type": "model",
        "display_name": name,
        "created_at": rfc3339(settings.created_s),
        "max_model_len": length,
        "context_length": length,
        "max_context_length": length,
        "loaded_context_length": length,
        "max_input_tokens": length,
        "max_tokens": length,
        "meta": {"n_ctx": length, "n_ctx_train": length, "size": settings.num_bytes},
        "capabilities": settings.capabilities,
        "state": "loaded",
    }


def rfc3339(seconds: float) -> str:
    """A time in Anthropic's and Ollama's format."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


async def list_models(http: HttpRequest) -> Response:
    """/v1/models: the model, and the model with each adapter."""
    service = service_of(http)
    models = [model_object(service, name) for name in service.model_names]
    return JSONResponse(list_object(models))


def list_object(items: list[dict[str, Any]]) -> dict[str, Any]:
    """All items as one page of a list, for OpenAI and Anthropic."""
    first_id, last_id = (items[place]["id"] if items else None for place in (0, -1))
    page = {"object": "list", "data": items, "has_more": False}
    return page | {"first_id": first_id, "last_id": last_id}


async def get_model(http: HttpRequest) -> Response:
    """/v1/models/ID; the id may contain slashes."""
    service = service_of(http)
    name = service.known_model(http.path_params["name"])
    return JSONResponse(model_object(service, name))


async def health(http: HttpRequest) -> Response:
    """Whether the engine runs; the event loop answers this while the engine works."""
    service = service_of(http)
    if not service.engine.is_alive:
        return JSONResponse({"status": "error", "error": "the engine does not run"}, 503)
    return JSONResponse({"status": "ok", "model": service.settings.model_id})


async def metrics(http: HttpRequest) -> Response:
    """Counters in the text format of Prometheus."""
    service = service_of(http)
    values = {**service.engine.stats(), "http_requests_total": service.num_requests}
    lines = []
    for name, value in values.items():
        is_gauge = name in GAUGES
        full = f"qwen35_mlx_{name.removesuffix('_total')}" + ("" if is_gauge else "_total")
        lines += [f"# TYPE {full} {'gauge' if is_gauge else 'counter'}", f"{full} {value}"]
    return PlainTextResponse(
        "\n".join(lines) + "\n", media_type="text/plain; version=0.0.4; charset=utf-8"
    )


async def watch_engine(service: Service, every_s: float = 1.0) -> None:
    """Restart the engine if it has died."""
    while True:
        await asyncio.sleep(every_s)
        if not service.engine.is_alive and not service.is_stopping:
            await service.in_worker(service.engine.start)


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
