"""ApiError: errors in the form of each API."""

import logging
import secrets
from collections.abc import Mapping
from typing import Any, Literal

from starlette.responses import JSONResponse
from starlette.types import Scope

from ..engine.requests import EngineBusy, EngineStopped
from ..errors import ContextFull, Qwen35Error

Dialect = Literal["openai", "anthropic", "ollama"]
logger = logging.getLogger(__name__)

OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
ANTHROPIC_TYPES = OPENAI_TYPES | {413: "request_too_large", 503: "overloaded_error"}
RETRY_AFTER_S = 2


class ApiError(Exception):
    """An error response; `param` is the wrong field, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self, dialect: Dialect) -> dict[str, Any]:
        """The error object in an API's form."""
        if dialect == "ollama":
            return {"error": self.message}
        if dialect == "anthropic":
            kind = ANTHROPIC_TYPES.get(self.status)
            kind = kind or ("api_error" if self.status >= 500 else "invalid_request_error")
            return {
                "type": "error",
                "error": {"type": kind, "message": self.message},
                "request_id": f"req_{secrets.token_hex(12)}",
            }
        kind = OPENAI_TYPES.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        # As OpenAI's servers do for these two.
        if self.code in ("model_not_found", "invalid_api_key"):
            kind = "invalid_request_error"
        facts = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": facts}

    def response(self, dialect: Dialect) -> JSONResponse:
        """The HTTP response."""
        body = self.body(dialect)
        headers = dict(self.headers)
        if "request_id" in body:
            headers["request-id"] = body["request_id"]
        return JSONResponse(body, self.status, headers)


class TooLong(ApiError):
    """The prompt is too long; agents match this text and shorten their history."""

    def __init__(self, num_tokens: int, context_length: int):
        super().__init__(
            400,
            f"This model's maximum context length is {context_length} tokens. However, your "
            f"messages resulted in {num_tokens} tokens. Please reduce the length of the messages.",
            param="messages",
            code="context_length_exceeded",
        )
        self.num_tokens = num_tokens
        self.context_length = context_length

    def body(self, dialect: Dialect) -> dict[str, Any]:
        body = super().body(dialect)
        if dialect == "anthropic":
            # Claude Code recognizes only this text.
            text = f"prompt is too long: {self.num_tokens} tokens > {self.context_length} maximum"
            body["error"]["message"] = text
        return body


def dialect_of(scope: Scope) -> Dialect:
    """The API of a request, by its path and headers."""
    path = scope["path"]
    if path.startswith("/api/"):
        return "ollama"
    names = {name for name, _ in scope.get("headers", ())}
    is_anthropic = path.startswith("/v1/messages") or b"anthropic-version" in names
    return "anthropic" if is_anthropic else "openai"


def as_fault(error: BaseException) -> ApiError:
    """The ApiError for any error; a 5xx only if it is not the client's mistake."""
    if isinstance(error, ApiError):
        return error
    text = "; ".join(line.strip() for line in str(error).splitlines())
    if isinstance(error, EngineBusy | EngineStopped):
        is_busy, headers = isinstance(error, EngineBusy), {"retry-after": str(RETRY_AFTER_S)}
        status, code = (429, "rate_limit_exceeded") if is_busy else (503, None)
        return ApiError(status, text, code=code, headers=headers)
    if isinstance(error, ContextFull):
        return TooLong(error.num_tokens, error.context_length)
    if isinstance(error, Qwen35Error):
        return ApiError(400, text, code="invalid_value")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, f"the server failed at this request: {type(error).__name__}")
