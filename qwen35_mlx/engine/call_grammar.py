"""A Lark grammar for tool calls in Qwen's format, with arguments by their JSON schemas."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .tool_calls import Schema, function_of, kinds_of

# Only the spaces that models write: with flexible whitespace an endless run of it would be valid.
JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
VALUE_END = "\n</parameter>\n"


def call_grammar(
    tools: Sequence[Schema],
    added: Mapping[str, int],
    *,
    as_json: bool,
    parallel: bool,
    strict: Collection[str],
    is_talk: bool = False,
) -> str:
    """A Lark grammar for one call of these tools, or several if `parallel`.

    added: added tokens by text; tags that are tokens must be generated as such. as_json: arguments
    are a JSON object, else each has a tag. strict: names of tools whose arguments must be valid for
    their schemas. is_talk: whether text may come before calls, between them, and instead of them.
    """
    start, end = (
        f"<[{added[tag]}]>" if tag in added else _text(tag)
        for tag in ("<tool_call>", "</tool_call>")
    )
    rules = (_json_rules if as_json else _tag_rules)(tools, strict)
    again = f" ({_text(chr(10))} call)*" if parallel else ""
    start_rule = f"call{again}"
    if is_talk:
        start_rule = "talk (call talk)*" if parallel else "talk call?"
    names = " | ".join(f"tool_{i}" for i in range(len(tools)))
    newline = _text("\n")
    return "\n".join(
        [
            f"start: {start_rule}",
            "talk: /(.|\\n)*/",
            f"free[suffix={_text('</function>')}]: /(.|\\n)*/",
            f"call: {start} {newline} ({names}) {newline} {end}",
            f"text[suffix={_text(VALUE_END)}]: /(.|\\n)*/",
            *rules,
            "",
        ]
    )


def _json_rules(tools: Sequence[Schema], strict: Collection[str]) -> list[str]:
    rules = []
    for i, tool in enumerate(tools):
        name, parameters = function_of(tool)
        parameters = parameters if name in strict else {}
        call = {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": parameters or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
            **_definitions(parameters),
        }
        rules.append(f"tool_{i}: {_json(call)}")
    return rules


def _tag_rules(tools: Sequence[Schema], strict: Collection[str]) -> list[str]:
    rules = []
    for i, tool in enumerate(tools):
        name, parameters = function_of(tool)
        if name not in strict:
            rules.append(f"tool_{i}: {_text(f'<function={name}>')} free")
            continue
        properties = parameters.get("properties")
        required = parameters.get("required")
        body = [_text(f"<function={name}>\n")]
        for j, (key, schema) in enumerate((properties or {}).items()):
            rule = f"tool_{i}_{j}"
            value = _value(schema if isinstance(schema, Mapping) else {}, parameters)
            rules.append(f"{rule}: {_text(f'<parameter={key}>{chr(10)}')} {value}")
            is_required = isinstance(required, list) and key in required
            body.append(rule if is_required else f"{rule}?")
        body.append(_text("</function>"))
        rules.append(f"tool_{i}: {' '.join(body)}")
    return rules


def _value(schema: Mapping[str, Any], parameters: Mapping[str, Any]) -> str:
    """A value and its end tag: any text up to the tag for strings, JSON for other types."""
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(choices, list) and choices:
        texts = [c if isinstance(c, str) else json.dumps(c, ensure_ascii=False) for c in choices]
        return f"({' | '.join(map(_text, texts))}) {_text(VALUE_END)}"
    kinds = kinds_of(schema, parameters)
    if not kinds or "string" in kinds:
        return "text"
    return f"{_json({**schema, **_definitions(parameters)})} {_text(VALUE_END)}"


def _definitions(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': JSON_OPTIONS})}"


def _text(text: str) -> str:
    """A Lark literal."""
    return json.dumps(text, ensure_ascii=False)
