"""Constrained decoding on llguidance: JSON schemas, regular expressions, Lark, tool calls.

A matcher gives the mask of allowed next tokens. Everything here is numpy and runs in any thread.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any

import numpy as np

from ..errors import Qwen35Error, extra
from ..text.detokenizer import token_bytes
from .call_grammar import JSON_OPTIONS, call_grammar
from .requests import Grammar, Request, ToolName
from .tool_calls import tool_names

MAX_SOURCE_CHARACTERS = 256 * 1024
# Maximum number of places in a schema that are tried to find an error.
MAX_TRIED_PLACES = 500
CHILDREN = ("properties", "patternProperties", "$defs", "definitions")
CHILD_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
CHILD = ("items", "additionalProperties", "not", "if", "then", "else", "contains")
# Keywords that combine schemas, so that the keys of one object may be in several places.
JOINS = {"allOf", "not", "if", "dependentSchemas", "patternProperties", "minProperties"}
JOINS_OF_PROPERTIES = {"anyOf", "oneOf", "$ref"}


class GrammarError(Qwen35Error):
    """A grammar or schema cannot be used; `path` is the place in the schema."""

    path = ""


class Matcher:
    """The state of a grammar in one answer; every answer gets a copy of a fresh one."""

    def __init__(self, matcher: Any, vocab_size: int, banned: np.ndarray | None = None):
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._banned = np.zeros(vocab_size, dtype=bool) if banned is None else banned

    def copy(self, banned: np.ndarray | None = None) -> "Matcher":
        """A copy with the same state, which never allows the tokens in the mask `banned` `[V]`."""
        return Matcher(self._matcher.deep_copy(), self._vocab_size, banned)

    def forbidden(self) -> np.ndarray:
        """The mask `[V]` of tokens that must not come next, end tokens included."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
        return (allowed == 0) | self._banned

    def forbidden_behind(self, tokens: Sequence[int]) -> np.ndarray:
        """Masks `[T, V]` after each of T possible next tokens; the state does not change.

        After an invalid token, or the last one of the grammar, the mask is empty.
        """
        masks = np.zeros((len(tokens), self._vocab_size), dtype=bool)
        num_accepted = 0
        for mask, token in zip(masks, tokens, strict=True):
            if self.is_finished or self._matcher.validate_tokens([token]) == 0:
                break
            self.accept(token)
            num_accepted += 1
            if not self.is_finished:
                mask[:] = self.forbidden()
        self._matcher.rollback(num_accepted)
        return masks

    def accept(self, token: int) -> None:
        """Advance by the next token."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def is_finished(self) -> bool:
        """Whether the grammar allows no further token."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(
                "the grammar cannot be followed any further",
                got=self._matcher.get_error()[:500],
                hint="a simpler schema or grammar may work",
            )


class Grammars:
    """Compiles the grammars of requests; the tokenizer's tables are made when first needed."""

    def __init__(self, tokenizer: Any, vocab_size: int):
        """vocab_size: the width of the logits, which may exceed the tokenizer's vocabulary."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._tables: Any = None
        self._lock = Lock()

    def of(self, request: Request, writes_json_calls: Callable[[], bool]) -> Matcher | None:
        """The grammar of the answer after its thought; None if the request has none.

        `writes_json_calls()`: whether the model writes calls as JSON.
        """
        choice = request.tool_choice
        must_call = isinstance(choice, ToolName) or choice == "required"
        if not must_call and choice not in ("auto", "none"):
            raise GrammarError(
                "unknown tool_choice", got=repr(choice)[:80], expected="auto, none, required"
            )
        names = tool_names(request.tools)
        may_call = bool(names) and choice == "auto"
        is_strict = may_call and any(name in names for name in request.strict_tools)
        if request.grammar is None and not must_call and not is_strict:
            return None
        parts = []
        if request.grammar is not None and not must_call:
            parts.append(self._of_answer(request.grammar))
        if must_call or may_call:
            tools = _chosen(request.tools, choice)
            # If any text is allowed, calls of tools that are not strict are free too.
            is_talk = not must_call and request.grammar is None
            lark = call_grammar(
                tools,
                self._tokenizer.get_added_vocab(),
                as_json=writes_json_calls(),
                parallel=request.parallel_tool_calls,
                strict=request.strict_tools if is_talk else names,
                is_talk=is_talk,
            )
            parts.append({"lark_grammar": lark})
        if len(parts) > 1:
            named = [{**part, "name": f"part{i}"} for i, part in enumerate(parts)]
            one_of = " | ".join(f"@{part['name']}" for part in named)
            parts = [{"lark_grammar": f"start: {one_of}"}, *named]
        text = json.dumps({"grammars": parts})
        ll, tables = self._ll()
        if message := _fault(text, tables):
            raise GrammarError("the grammar is not usable", got=message[:500])
        return Matcher(ll.LLMatcher(tables, text, log_level=0), self._vocab_size)

    def _of_answer(self, grammar: Grammar) -> dict[str, Any]:
        kind, source = grammar.kind, grammar.source
        if kind in ("json_object", "json_schema"):
            return schema_part({"type": "object"} if kind == "json_object" else source)
        if not isinstance(source, str):
            raise GrammarError(f"the {kind} is not usable", got=repr(source)[:80], expected="text")
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise _too_long(len(source))
        if kind not in ("regex", "lark"):
            raise GrammarError(
                "unknown kind of grammar",
                got=repr(kind)[:80],
                expected="json_object, json_schema, regex, lark",
            )
        ll, tables = self._ll()
        if kind == "regex":
            part = json.loads(ll.LLMatcher.grammar_from_regex(source))["grammars"][0]
        else:
            part = {"lark_grammar": source}
        if message := _fault(json.dumps({"grammars": [part]}), tables):
            raise GrammarError(f"the {kind} is not usable", got=message[:500])
        return part

    def _ll(self) -> tuple[Any, Any]:
        """The library, and its tables for the tokenizer."""
        llguidance = _llguidance()
        with self._lock:
            if self._tables is None:
                words = llguidance.TokenizerWrapper(_Words(self._tokenizer, self._vocab_size))
                self._tables = llguidance.LLTokenizer(
                    words, n_vocab=self._vocab_size, eos_token=sorted(self._tokenizer.eos_token_ids)
                )
        return llguidance, self._tables


class _Words:
    """A tokenizer for llguidance. Added tokens are special: text cannot spell them."""

    bos_token_id = None

    def __init__(self, tokenizer: Any, vocab_size: int):
        # mlx-lm's wrapper knows all end tokens, the tokenizer inside it does not.
        self.eos_token_id = min(tokenizer.eos_token_ids)
        tokenizer = getattr(tokenizer, "_tokenizer", tokenizer)
        added = {i: text for text, i in tokenizer.get_added_vocab().items()}
        names = tokenizer.convert_ids_to_tokens(range(vocab_size))
        self.special_token_ids = sorted(i for i in added if i < vocab_size)
        self.tokens = [
            added[i].encode() if i in added else token_bytes(name) for i, name in enumerate(names)
        ]
        self._backend = tokenizer.backend_tokenizer

    def __call__(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)


def schema_part(schema: Any) -> dict[str, Any]:
    """A JSON schema as a part of a grammar; raises GrammarError if it is not usable."""
    if not isinstance(schema, Mapping | bool):
        raise GrammarError(
            "the JSON schema is not usable", got=repr(schema)[:80], expected="an object"
        )
    part = _json_part(schema)
    if message := _fault(json.dumps({"grammars": [part]})):
        path = _path_of_fault(schema)
        error = GrammarError(
            f"the JSON schema is not usable at {path}",
            got=message[:500],
            hint="https://github.com/guidance-ai/llguidance lists what schemas may use",
        )
        error.path = path
        raise error
    return part


def _llguidance() -> Any:
    needs = "schemas, grammars and required tools need llguidance"
    with extra("server", needs, GrammarError):
        import llguidance
    return llguidance


def _fault(text: str, tables: Any = None) -> str:
    """The error of a grammar; empty if it is valid. A schema needs no tables of a tokenizer."""
    return str(_llguidance().LLMatcher.validate_grammar(text, tables))


def _path_of_fault(schema: Any) -> str:
    """The innermost place of a schema that is invalid by itself."""
    shared = {k: schema[k] for k in ("$defs", "definitions") if k in schema}
    path, left = "$", MAX_TRIED_PLACES
    while True:
        for name, child in _children(schema):
            left -= 1
            alone = {**shared, **child} if isinstance(child, Mapping) else child
            if left < 0:
                return path
            if _fault(json.dumps({"grammars": [_json_part(alone)]})):
                path, schema = f"{path}.{name}", child
                break
        else:
            return path


def _json_part(schema: Any) -> dict[str, Any]:
    """A schema as a part of a grammar, with our own whitespace options."""
    try:
        size = len(json.dumps(schema, allow_nan=False))
    except (ValueError, TypeError, RecursionError) as error:
        raise GrammarError("the JSON schema is not usable", got=error) from None
    if size > MAX_SOURCE_CHARACTERS:
        raise _too_long(size)
    schema = schema if _is_joined(schema) else _closed(schema)
    if isinstance(schema, Mapping):
        schema = {**schema, "x-guidance": JSON_OPTIONS}
    return {"json_schema": schema}


def _is_joined(schema: Any) -> bool:
    """Whether the keys of one object may be in several places of the schema."""
    if not isinstance(schema, Mapping):
        return False
    joins = JOINS | JOINS_OF_PROPERTIES if "properties" in schema else JOINS
    return not joins.isdisjoint(schema) or any(_is_joined(c) for _, c in _children(schema))


def _closed(schema: Any) -> Any:
    """The schema with additional keys forbidden, because models add keys without end."""
    if not isinstance(schema, Mapping):
        return schema
    closed = dict(schema)
    for key, value in schema.items():
        if key in CHILDREN and isinstance(value, Mapping):
            closed[key] = {name: _closed(child) for name, child in value.items()}
        elif key in CHILD_LISTS and isinstance(value, list):
            closed[key] = [_closed(child) for child in value]
        elif key in CHILD:
            closed[key] = _closed(value)
    names, required = schema.get("properties"), schema.get("required", [])
    are_objects = isinstance(names, Mapping) and isinstance(required, list)
    if names and are_objects and all(name in list(names) for name in required):
        closed.setdefault("additionalProperties", False)
    return closed


def _too_long(num_characters: int) -> GrammarError:
    return GrammarError(
        "the grammar is too long",
        got=f"{num_characters:,} characters",
        expected=f"at most {MAX_SOURCE_CHARACTERS:,}",
    )


def _children(schema: Any) -> list[tuple[str, Any]]:
    """The sub-schemas of a schema, with their places."""
    if not isinstance(schema, Mapping):
        return []
    found: list[tuple[str, Any]] = []
    for key in CHILDREN:
        if isinstance(schema.get(key), Mapping):
            found += [(f"{key}.{name}", child) for name, child in schema[key].items()]
    for key in CHILD_LISTS:
        if isinstance(schema.get(key), list):
            found += [(f"{key}[{i}]", child) for i, child in enumerate(schema[key])]
    return found + [(key, schema[key]) for key in CHILD if isinstance(schema.get(key), Mapping)]


def _chosen(tools: Sequence[Any], choice: Any) -> Sequence[Any]:
    """The tools that may be called for a `tool_choice`."""
    if not tools:
        raise GrammarError("a tool must be called, and there are no tools")
    if not isinstance(choice, ToolName):
        return tools
    chosen = [tool for tool in tools if tool_names([tool]) == [choice.name]]
    if not chosen:
        raise GrammarError(
            "tool_choice names an unknown tool",
            got=repr(choice.name)[:80],
            expected=", ".join(tool_names(tools))[:200],
        )
    return chosen
