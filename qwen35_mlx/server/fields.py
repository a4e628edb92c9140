"""The body of a request: read within limits, parsed, its fields checked; null counts as absent."""

import json
import math
from collections.abc import Collection, Mapping
from typing import Any, NoReturn, TypeVar

from starlette.requests import ClientDisconnect, Request

from .faults import ApiError

MAX_DEPTH = 96
MAX_VALUES = 2_000_000
# Larger bodies are parsed in a worker, so that other requests do not wait.
WORKER_BYTES = 64_000
MAX_INT = 2**63 - 1
T = TypeVar("T")


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The bytes of the body; a too large Content-Length is refused before reading."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(415, f"content-encoding: got {encoding[:40]}, expected none")
    too_large = ApiError(
        413,
        f"the body of the request is larger than {max_bytes:,} bytes",
        code="request_too_large",
        # Close: the rest of the body is not read.
        headers={"connection": "close"},
    )
    length = request.headers.get("content-length", "")
    # 20 digits are enough for the comparison.
    if length.isascii() and length.isdigit() and int(length[:20]) > max_bytes:
        raise too_large
    data = bytearray()
    try:
        async for part in request.stream():
            data += part
            if len(data) > max_bytes:
                raise too_large
    except ClientDisconnect:
        raise ApiError(400, "the body of the request ended early") from None
    return bytes(data)


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


class Fields:
    """Reads a JSON object; a wrong type or value is an `ApiError` that names the field."""

    def __init__(self, values: Mapping[str, Any], where: str = ""):
        self.values = values
        self._where = where

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def name(self, field: str) -> str:
        """The field with its path, for errors."""
        return f"{self._where}.{field}" if self._where else field

    def refuse(self, field: str, expected: str, code: str = "invalid_value") -> ApiError:
        """The error for a field with a wrong value."""
        got = _shown(self.values.get(field))
        name = self.name(field)
        return ApiError(400, f"{name}: got {got}, expected {expected}", param=name, code=code)

    def missing(self, field: str) -> ApiError:
        """The error for a missing field."""
        name = self.name(field)
        return ApiError(400, f"{name} is required", param=name, code="missing_required_parameter")

    def raw(self, field: str) -> Any:
        """The unchecked value; None if absent."""
        return self.values.get(field)

    def _of(self, field: str, kind: type[T], name: str) -> T | None:
        value = self.values.get(field)
        if value is not None and not isinstance(value, kind):
            raise self.refuse(field, name, "invalid_type")
        return value

    def text(self, field: str) -> str | None:
        """A string."""
        return self._of(field, str, "a string")

    def flag(self, field: str) -> bool | None:
        """true or false."""
        return self._of(field, bool, "true or false")

    def integer(self, field: str, low: int = -MAX_INT - 1, high: int = MAX_INT) -> int | None:
        """A whole number within inclusive bounds; 5.0 is accepted."""
        value = self.values.get(field)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(field, "a whole number", "invalid_type")
        if not low <= value <= high:
            is_open = high == MAX_INT and value < low
            raise self.refuse(field, f"{low} or more" if is_open else f"{low} to {high}")
        return value

    def number(self, field: str, low: float = -math.inf, high: float = math.inf) -> float | None:
        """A number within inclusive bounds."""
        value = self.values.get(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(field, "a number", "invalid_type")
        if not low <= value <= high or abs(value) > 1e300:
            raise self.refuse(field, f"{low:g} to {high:g}")
        return float(value)

    def choice(self, field: str, options: Collection[str]) -> str | None:
        """One of the given strings."""
        value = self.text(field)
        if value is not None and value not in options:
            raise self.refuse(field, " or ".join(options))
        return value

    def needed_text(self, field: str) -> str:
        """A required string that is not empty."""
        if not (value := self.text(field)):
            raise self.missing(field)
        return value

    def needed_choice(self, field: str, options: Collection[str]) -> str:
        """One of the given strings; required."""
        if (value := self.choice(field, options)) is None:
            raise self.missing(field)
        return value

    def needed_record(self, field: str) -> "Fields":
        """A required object."""
        if (value := self.record(field)) is None:
            raise self.missing(field)
        return value

    def items(self, field: str) -> list[Any] | None:
        """A list."""
        return self._of(field, list, "a list")

    def record(self, field: str) -> "Fields | None":
        """An object."""
        value = self.mapping(field)
        return None if value is None else Fields(value, self.name(field))

    def part(self, field: str) -> "Fields":
        """An object, or an empty one if it is absent."""
        return Fields(self.mapping(field) or {}, self.name(field))

    def mapping(self, field: str) -> dict[str, Any] | None:
        """An object, as a dict."""
        return self._of(field, dict, "an object")

    def records(self, field: str, values: list[Any] | None = None) -> list["Fields"] | None:
        """A list of objects; `values` replaces the field's own list."""
        values = self.items(field) if values is None else values
        if values is None:
            return None
        for i, value in enumerate(values):
            if not isinstance(value, dict):
                name = f"{self.name(field)}[{i}]"
                raise ApiError(
                    400,
                    f"{name}: got {_shown(value)}, expected an object",
                    param=name,
                    code="invalid_type",
                )
        return [Fields(value, f"{self.name(field)}[{i}]") for i, value in enumerate(values)]

    def texts(self, field: str, most: int) -> list[str]:
        """A string or a list of at most `most` strings; empty strings count as absent."""
        value = self.values.get(field)
        if value is None:
            return []
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise self.refuse(field, "a string or a list of strings", "invalid_type")
        if len(values) > most:
            raise self.refuse(field, f"at most {most} strings")
        return [v for v in values if v]


def _shown(value: Any) -> str:
    """A short form of a value, for errors."""
    kinds = {list: "a list", dict: "an object", type(None): "nothing"}
    if type(value) in kinds:
        return kinds[type(value)]
    if isinstance(value, int) and abs(value) > MAX_INT:
        return "a number of many digits"
    shown = repr(value) if isinstance(value, str) else str(value).lower()
    return shown if len(shown) <= 60 else f"{shown[:60]}…"
