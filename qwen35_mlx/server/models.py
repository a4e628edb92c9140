"""Information about the model, the server's health, and its counters."""

import asyncio
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from .service import Service, service_of

OWNER = "qwen35-mlx"
# Current values; all other numbers of the engine are counters, which only grow.
GAUGES = (
    *("running", "queued", "rows", "cached_points", "cache_bytes"),
    *("experts", "expert_slots", "expert_hit_rate", "expert_gb_per_s"),
)


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
