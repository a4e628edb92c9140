"""Values of parameters: text to the JSON type of a schema, or text if it does not fit."""

import ast
import json
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any]
# Python's constants: chat templates print them, and the model copies the form.
CONSTANTS = {"True": True, "False": False, "None": None}
MAX_LITERAL_CHARS = 100_000
MAX_DEPTH = 64
# JSON's constants outside of quotes.
JSON_WORD = re.compile(
    r""""[^"\\]*(?:\\.[^"\\]*)*"|'[^'\\]*(?:\\.[^'\\]*)*'|\b(true|false|null)\b""", re.DOTALL
)
# Python's names of the types, which many schemas hold in place of JSON's.
PYTHON_TYPES = {
    "str": "string", "int": "integer", "float": "number", "bool": "boolean", "list": "array",
    "dict": "object", "NoneType": "null",
}  # fmt: skip
PYTHON_WORDS = {"true": "True", "false": "False", "null": "None"}


def coerce(raw: str, schema: Schema, root: Schema) -> Any:
    """Convert a parameter's text to the type of its JSON schema; text if it does not fit."""
    kinds = kinds_of(schema, root)
    text = raw.strip()
    try:
        if kinds and text in CONSTANTS:
            value = CONSTANTS[text]
        elif kinds & {"array", "object"} and text[:1] in ("[", "{", "("):
            value = read_literal(text)
        else:
            value = read_json(raw)
    except ValueError:
        return raw
    if "integer" in kinds and isinstance(value, float) and value.is_integer():
        return value if "number" in kinds else int(value)
    fits = {
        "integer": isinstance(value, int) and not isinstance(value, bool),
        "number": isinstance(value, int | float) and not isinstance(value, bool),
        "boolean": isinstance(value, bool),
        "null": value is None,
        "array": isinstance(value, list),
        "object": isinstance(value, dict),
    }
    # Without a type: an array, an object, or text.
    return value if any(fits.get(kind, False) for kind in kinds or ("array", "object")) else raw


def read_literal(text: str) -> Any:
    """Parse JSON, Python's spelling of it, or a mix; raises ValueError."""
    try:
        return read_json(text)
    except ValueError:
        if len(text) > MAX_LITERAL_CHARS:
            raise
    python = JSON_WORD.sub(lambda m: PYTHON_WORDS[m[1]] if m[1] else m[0], text)
    try:
        with warnings.catch_warnings():
            # Warnings about unknown escapes in strings.
            warnings.simplefilter("ignore")
            value = ast.literal_eval(python.strip())
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"neither JSON nor a literal: {type(error).__name__}") from None
    return _json_value(value)


def read_json(text: str) -> Any:
    """Parse JSON, also with line breaks in strings; raises ValueError."""
    try:
        return _json_value(json.loads(text, strict=False))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _json_value(value: Any, depth: int = 0) -> Any:
    """The value in JSON's types, with tuples as lists; raises ValueError."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, list | tuple):
        return [_json_value(item, depth + 1) for item in value]
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("keys of objects are text")
        return {_json_value(k): _json_value(v, depth + 1) for k, v in value.items()}
    if isinstance(value, str):
        # Lone surrogates could not be encoded.
        value.encode()
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("not a finite number")
    elif not isinstance(value, bool | int | float | None):
        raise ValueError(f"{type(value).__name__} is not of JSON")
    return value


def kinds_of(schema: Any, root: Schema, depth: int = 0) -> set[str]:
    """The JSON types that a schema allows; empty if it has no type."""
    if depth > 8 or not isinstance(schema, Mapping):
        return set()
    if match := re.fullmatch(r"#/(\$defs|definitions)/([^/]+)", str(schema.get("$ref", ""))):
        return kinds_of(_mapping(root.get(match[1])).get(match[2]), root, depth + 1)
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    found = {PYTHON_TYPES.get(kind, kind) for kind in kinds if isinstance(kind, str)}
    for key in ("anyOf", "oneOf", "allOf"):
        for part in schema.get(key) or ():
            found |= kinds_of(part, root, depth + 1)
    if not found and ("enum" in schema or "const" in schema):
        choices = schema["enum"] or () if "enum" in schema else [schema["const"]]
        found = {PYTHON_TYPES.get(type(choice).__name__, "string") for choice in choices}
    return found | {"null"} if found and schema.get("nullable") is True else found


def _mapping(value: Any) -> Schema:
    return value if isinstance(value, Mapping) else {}
