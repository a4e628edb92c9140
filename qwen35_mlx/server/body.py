"""The body of a request: read within limits, and parsed as checked JSON."""

import asyncio
import json
import math
from concurrent.futures import Executor
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from .faults import ApiError

MAX_DEPTH = 96
MAX_VALUES = 2_000_000
# Larger bodies are parsed in a worker, so that other requests do not wait.
WORKER_BYTES = 64_000
NO_LENGTH = -1


async def read_json(request: Request, max_bytes: int, workers: Executor) -> dict[str, Any]:
    """The JSON object of the body; everything else is an `ApiError`."""
    data = await read_body(request, max_bytes)
    if len(data) < WORKER_BYTES:
        return parse_object(data)
    return await asyncio.get_running_loop().run_in_executor(workers, parse_object, data)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The bytes of the body; a too large Content-Length is refused before reading."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(415, f"content-encoding: got {encoding[:40]}, expected none")
    if stated_length(request.headers.get("content-length")) > max_bytes:
        raise too_large(max_bytes)
    data = bytearray()
    try:
        async for part in request.stream():
            data += part
            if len(data) > max_bytes:
                raise too_large(max_bytes)
    except ClientDisconnect:
        raise ApiError(400, "the body of the request ended early") from None
    return bytes(data)


def stated_length(header: str | None) -> int:
    """The value of Content-Length; NO_LENGTH without a valid one."""
    if header is None or not header.isascii() or not header.isdigit():
        return NO_LENGTH
    # 20 digits are enough for the comparison.
    return int(header[:20])


def too_large(max_bytes: int) -> ApiError:
    """The error for a body that is too long."""
    return ApiError(
        413,
        f"the body of the request is larger than {max_bytes:,} bytes",
        code="request_too_large",
        # Close: the rest of the body is not read.
        headers={"connection": "close"},
    )


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object, with finite numbers, no lone surrogates, at most `MAX_DEPTH` deep."""
    if not data.strip():
        raise ApiError(400, "the body of the request is empty; expected a JSON object")
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise ApiError(400, "the body of the request is not UTF-8") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        # For numbers with more than 4300 digits, Python's own message is of no help.
        what = str(error) if isinstance(error, json.JSONDecodeError | _Constant) else "a number"
        raise ApiError(
            400, f"the body of the request is not JSON: {what[:200]}", code="invalid_json"
        ) from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body of the request is JSON, but not an object")
    return _without_surrogates(value) if _check(value) else value


class _Constant(ValueError):
    """NaN or Infinity, which Python's json accepts."""


def _refuse_constant(name: str) -> NoReturn:
    raise _Constant(f"{name} is no number of JSON")


def _too_deep() -> ApiError:
    return ApiError(400, f"the JSON is nested deeper than {MAX_DEPTH} levels")


def _check(top: dict[str, Any]) -> bool:
    """Refuse deep nesting and infinite numbers; returns whether a text has lone surrogates."""
    level: list[Any] = [top]
    num_values = 0
    halves = False
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, str):
                halves = halves or _has_half(value)
            elif isinstance(value, dict):
                below.extend(value.values())
                halves = halves or any(map(_has_half, value))
            elif isinstance(value, list):
                below.extend(value)
            elif isinstance(value, float) and not math.isfinite(value):
                raise ApiError(400, "the JSON has a number beyond the range of a double")
        num_values += len(below)
        if num_values > MAX_VALUES:
            raise ApiError(400, f"the JSON has more than {MAX_VALUES:,} values")
        if not below:
            return halves
        level = below
    raise _too_deep()


def _has_half(text: str) -> bool:
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _without_surrogates(value: dict[str, Any]) -> dict[str, Any]:
    """Replace lone surrogates: some clients cut texts in the middle of an emoji."""
    text = json.dumps(value, ensure_ascii=False)
    whole: dict[str, Any] = json.loads(
        text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    )
    return whole
