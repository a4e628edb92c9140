"""The application: routes, middleware and error handlers."""

from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from . import anthropic, models, ollama, responses
from .completions import completions
from .embeddings import embed, embeddings
from .faults import ApiError, as_fault, dialect_of
from .openai import chat_completions
from .page import page_routes
from .security import Guard
from .service import Service, Settings

GET, POST, DELETE = ["GET"], ["POST"], ["DELETE"]
# Ollama's operations on models that are not supported.
NOT_DONE = ("pull", "push", "create", "copy")


def routes() -> list[BaseRoute]:
    """All routes except those of the page; GET routes answer HEAD too."""
    return [
        Route("/health", models.health, methods=GET),
        Route("/v1/health", models.health, methods=GET),
        Route("/metrics", models.metrics, methods=GET),
        *(
            Route(f"{prefix}{path}", handler, methods=methods)
            # Clients differ in whether the base URL ends in /v1.
            for prefix in ("/v1", "")
            for path, handler, methods in (
                ("/models", models.list_models, GET),
                ("/models/{name:path}", models.get_model, GET),
                ("/chat/completions", chat_completions, POST),
                ("/completions", completions, POST),
                ("/responses", responses.create_response, POST),
                ("/embeddings", embeddings, POST),
            )
        ),
        Route("/v1/responses/input_tokens", responses.input_tokens, methods=POST),
        Route("/v1/responses/{name}", responses.get_response, methods=GET),
        Route("/v1/responses/{name}", responses.delete_response, methods=DELETE),
        Route("/v1/responses/{name}/cancel", responses.cancel_response, methods=POST),
        Route("/v1/responses/{name}/input_items", responses.list_input_items, methods=GET),
        Route("/v1/messages", anthropic.messages, methods=POST),
        Route("/v1/messages/count_tokens", anthropic.count_tokens, methods=POST),
        Route("/api/chat", ollama.chat, methods=POST),
        Route("/api/generate", ollama.generate, methods=POST),
        Route("/api/embed", embed, methods=POST),
        Route("/api/embeddings", embed, methods=POST),
        Route("/api/tags", models.tags, methods=GET),
        Route("/api/ps", models.ps, methods=GET),
        Route("/api/show", models.show, methods=POST),
        Route("/api/version", models.version, methods=GET),
        *(Route(f"/api/{name}", models.unsupported, methods=POST) for name in NOT_DONE),
        Route("/api/delete", models.unsupported, methods=DELETE),
    ]


def make_app(engine: Any, settings: Settings, tokenizer: Any) -> Starlette:
    """The application for an engine; its handlers share `app.state.service`."""
    given = (settings.api_key, settings.hosts, settings.max_requests)
    guard = Middleware(Guard, *given)
    app = Starlette(
        routes=[*routes(), *page_routes(models.root)],
        middleware=[guard],
        exception_handlers={HTTPException: _no_route, ApiError: _fault},
    )
    app.router.redirect_slashes = False
    app.state.service = Service(engine, settings, tokenizer)
    return app


async def _fault(http: HttpRequest, error: Exception) -> Response:
    return as_fault(error).response(dialect_of(http.scope))


async def _no_route(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, method = http.url.path[:200], http.method[:40]
    known = {
        404: ("not_found", f"there is no {path} on this server"),
        405: ("method_not_allowed", f"{path} does not take {method}"),
    }
    code, message = known.get(error.status_code, (None, str(error.detail)))
    fault = ApiError(error.status_code, message, code=code, headers=error.headers)
    return fault.response(dialect_of(http.scope))
