"""Random JSON schemas of bounded answers, and a check whether a value is valid."""

import json
import random
import re
from typing import Any

WORDS = ("name", "city", "über", "a b", 'quote"d', "x_1", "näme\n", "count")
PATTERNS = ("[a-z]{2,5}", "[0-9]{3}-[A-F]{2}", "(yes|no|perhaps)")
FORMATS = {
    "date": r"\d{4}-\d\d-\d\d",
    "uuid": r"[0-9a-fA-F]{8}-([0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}",
}


def random_schema(draw: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema whose values all have a bounded length."""
    kinds = ["integer", "number", "string", "boolean", "null", "enum", "const"]
    if depth < 3:
        kinds += ["object", "object", "array", "anyOf"] * 2
    if depth == 0:
        kinds = ["object"]
    return _MAKERS[draw.choice(kinds)](draw, depth)


def _integer(draw: random.Random, depth: int) -> dict[str, Any]:
    low = draw.randrange(-1000, 1000)
    return {"type": "integer", "minimum": low, "maximum": low + draw.randrange(0, 2000)}


def _number(draw: random.Random, depth: int) -> dict[str, Any]:
    low = draw.randrange(-50, 50)
    return {"type": "number", "minimum": low, "exclusiveMaximum": low + draw.randrange(1, 90)}


def _string(draw: random.Random, depth: int) -> dict[str, Any]:
    kind = draw.randrange(3)
    if kind == 0:
        return {"type": "string", "pattern": f"^{draw.choice(PATTERNS)}$"}
    if kind == 1:
        return {"type": "string", "format": draw.choice(list(FORMATS))}
    low = draw.randrange(0, 4)
    return {"type": "string", "minLength": low, "maxLength": low + draw.randrange(0, 12)}


def _enum(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": draw.sample([1, "one", None, True, "zwei ✓", 3.5, [1, 2], {"a": 1}], 3)}


def _object(draw: random.Random, depth: int) -> dict[str, Any]:
    names = draw.sample(WORDS, draw.randrange(1, 5))
    return {
        "type": "object",
        "properties": {name: random_schema(draw, depth + 1) for name in names},
        "required": draw.sample(names, draw.randrange(0, len(names) + 1)),
        "additionalProperties": False,
    }


def _array(draw: random.Random, depth: int) -> dict[str, Any]:
    low = draw.randrange(0, 3)
    return {
        "type": "array",
        "items": random_schema(draw, depth + 1),
        "minItems": low,
        "maxItems": low + draw.randrange(0, 4),
    }


def _any_of(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(draw, depth + 1) for _ in range(2)]}


_MAKERS = {
    "integer": _integer,
    "number": _number,
    "string": _string,
    "boolean": lambda draw, depth: {"type": "boolean"},
    "null": lambda draw, depth: {"type": "null"},
    "enum": _enum,
    "const": lambda draw, depth: {"const": draw.choice([7, "seven", None, [7]])},
    "object": _object,
    "array": _array,
    "anyOf": _any_of,
}


def is_valid(value: Any, schema: dict[str, Any]) -> bool:
    """Whether the value is valid by a schema of `random_schema`."""
    if "anyOf" in schema:
        return any(is_valid(value, one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        # Compared as text, because True == 1.
        choices = schema["enum"] if "enum" in schema else [schema["const"]]
        return json.dumps(value) in map(json.dumps, choices)
    kind = schema["type"]
    if kind == "object":
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= set(value) <= set(schema["properties"])
            and all(is_valid(item, schema["properties"][key]) for key, item in value.items())
        )
    if kind == "array":
        few, many = schema.get("minItems", 0), schema["maxItems"]
        is_list = isinstance(value, list) and few <= len(value) <= many
        return is_list and all(is_valid(item, schema["items"]) for item in value)
    if kind == "string":
        return isinstance(value, str) and _is_valid_text(value, schema)
    if kind == "boolean":
        return isinstance(value, bool)
    if kind == "null":
        return value is None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "integer":
        whole = is_number and value == int(value)
        return whole and schema["minimum"] <= value <= schema["maximum"]
    return is_number and schema["minimum"] <= value < schema["exclusiveMaximum"]


def _is_valid_text(value: str, schema: dict[str, Any]) -> bool:
    pattern = schema.get("pattern") or FORMATS.get(schema.get("format", ""))
    if pattern:
        return re.fullmatch(pattern.strip("^$"), value) is not None
    return bool(schema["minLength"] <= len(value) <= schema["maxLength"])
