"""Chat templates: read from a model's folder, compiled in a sandbox, rendered."""

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import read_object

if TYPE_CHECKING:
    from jinja2 import Template

DEFAULT, TOOL_USE = "default", "tool_use"
TEMPLATE_FILE = "chat_template.jinja"
LEGACY_FILES = ("chat_template.json", "processor_config.json")
TEMPLATE_FOLDER = "additional_chat_templates"


def read_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a folder by name; empty where it has none.

    As in transformers, files come before tokenizer_config.json. What older processors wrote comes
    last. A template that is the only one is the default, whatever its name.
    """
    files = {}
    if (folder / TEMPLATE_FILE).exists():
        files[DEFAULT] = (folder / TEMPLATE_FILE).read_text(encoding="utf-8-sig")
    for file in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja")):
        files[file.stem] = file.read_text(encoding="utf-8-sig")
    if DEFAULT in files:
        return files
    templates = _named(tokenizer_config.get("chat_template"))
    for file in (folder / name for name in LEGACY_FILES):
        if not templates and file.exists():
            templates = _named(read_object(file).get("chat_template"))
    templates |= files
    if len(templates) == 1:
        templates = {DEFAULT: next(iter(templates.values()))}
    return templates


def _named(value: Any) -> dict[str, str]:
    """Templates by name from a text, a mapping, or a list of `{"name", "template"}`."""
    if not value:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list):
        value = {item["name"]: item["template"] for item in value}
    if not all(isinstance(template, str) for template in value.values()):
        raise ValueError("chat_template has values that are no texts")
    return dict(value)


def render(template: str, messages: list[Any], **variables: Any) -> str:
    """Render the messages; raises whatever the template raises.

    Keys with null are left out: OpenAI's API sends them, and templates print them or fail.
    """
    given = [
        {key: value for key, value in message.items() if value is not None}
        if isinstance(message, Mapping)
        else message
        for message in messages
    ]
    return _compiled(template).render(messages=given, **variables)


@lru_cache(maxsize=16)
def _compiled(template: str) -> "Template":
    # Imported here: programs that render nothing start faster.
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the text that a model is trained on; it is ignored here."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    # The settings and names that templates expect.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment.from_string(template)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`: without jinja's escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
