"""Options of an answer: sampling, length, thinking, grammars."""

import re
from dataclasses import dataclass
from typing import Any

from ..engine.requests import Grammar
from ..errors import Qwen35Error
from ..sampling import SamplingParams
from .faults import ApiError
from .fields import Fields

# Thinking budget in tokens by effort; None: no limit.
EFFORTS: dict[str, int | None] = {"none": 0, "minimal": 512, "low": 2048, "medium": 8192}
EFFORTS |= dict.fromkeys(("high", "xhigh", "max"))
# Variables of Qwen3.5's chat template that clients may set.
TEMPLATE_OPTIONS = ("preserve_thinking", "add_vision_id")
TINY_TOP_P = 1e-6


@dataclass
class Thinking:
    """Whether to think, and for how many tokens; None leaves it to the template."""

    enable_thinking: bool | None = None
    think_budget: int | None = None


def sampling(body: Fields, defaults: SamplingParams) -> SamplingParams:
    """The checkpoint's sampling parameters with the client's changes."""
    top_p = body.number("top_p", 0, 1)
    top_k = body.integer("top_k", -1, 2**31)
    given: dict[str, Any] = {
        "temperature": body.number("temperature", 0, 2),
        # 0 means only the likeliest token.
        "top_p": TINY_TOP_P if top_p == 0 else top_p,
        "top_k": 0 if top_k == -1 else top_k,
        "min_p": body.number("min_p", 0, 1),
        "presence_penalty": body.number("presence_penalty", -2, 2),
        "repetition_penalty": _repetition(body),
    }
    if frequency := body.number("frequency_penalty", -2, 2):
        given["frequency_penalty"] = frequency
    try:
        return defaults.updated(**given)
    except Qwen35Error as error:
        raise ApiError(400, "; ".join(str(error).split("\n  "))) from None


def _repetition(body: Fields) -> float | None:
    for name in ("repetition_penalty", "repeat_penalty"):
        if name in body:
            value = body.number(name, 0, 100)
            if not value:
                raise body.refuse(name, "a number above 0")
            return value
    return None


def seed(body: Fields) -> int | None:
    """A seed for the engine; negative ones wrap around."""
    value = body.integer("seed")
    return None if value is None else value % 2**63


def logit_bias(body: Fields, vocab_size: int) -> dict[int, float]:
    """Biases that are added to logits, by token id."""
    biases, given = {}, body.part("logit_bias")
    for key in given.values:
        if not re.fullmatch(r"[0-9]{1,9}", key) or int(key) >= vocab_size:
            raise ApiError(
                400,
                f"logit_bias: got the token {key[:40]!r}, expected an id below {vocab_size}",
                param="logit_bias",
                code="invalid_value",
            )
        bias = given.number(key, -100, 100)
        if bias is None:
            raise given.refuse(key, "a number from -100 to 100", "invalid_type")
        biases[int(key)] = bias
    return biases


def max_tokens(body: Fields, *names: str, low: int = 1) -> int | None:
    """The maximum length of the answer, from the first of the fields that is given."""
    values = [body.integer(name, low) for name in names]
    return next((value for value in values if value is not None), None)


def thinking(body: Fields) -> Thinking:
    """The thinking options, from all fields that clients of OpenAI's API use for them."""
    wanted = Thinking()
    effort = body.choice("reasoning_effort", EFFORTS)
    if effort is not None:
        wanted = of_effort(effort)
    for holder in (body.part("chat_template_kwargs"), body):
        if (enabled := holder.flag("enable_thinking")) is not None:
            wanted.enable_thinking = enabled
    for name in ("thinking_token_budget", "thinking_budget"):
        budget = body.integer(name, 0)
        if budget is not None:
            wanted = Thinking(budget > 0, budget or None)
    return wanted


def of_effort(effort: str) -> Thinking:
    """The thinking options for a level of effort."""
    budget = EFFORTS[effort]
    return Thinking(enable_thinking=budget != 0, think_budget=budget or None)


def template_options(body: Fields) -> dict[str, Any]:
    """Variables for the chat template."""
    given = body.part("chat_template_kwargs")
    values = {name: given.flag(name) for name in TEMPLATE_OPTIONS}
    return {name: value for name, value in values.items() if value is not None}


def response_format(body: Fields, field: str = "response_format") -> Grammar | None:
    """The grammar for OpenAI's `response_format`."""
    given = body.record(field)
    if given is None:
        return None
    kind = given.needed_choice("type", ("text", "json_object", "json_schema"))
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar("json_object")
    # In the responses API the schema is at this level, in chat completions one level below.
    holder = given.record("json_schema") or given
    schema = holder.mapping("schema")
    if schema is None:
        raise holder.missing("schema")
    return Grammar("json_schema", schema)


def structured_outputs(body: Fields) -> Grammar | None:
    """The grammar for vLLM's extensions."""
    given = body.record("structured_outputs")
    if given is not None:
        return _structured(given, "")
    return _structured(body, "guided_")


def _structured(given: Fields, prefix: str) -> Grammar | None:
    if f"{prefix}json" in given:
        return Grammar("json_schema", given.mapping(f"{prefix}json"))
    if prefix == "" and given.flag("json_object"):
        return Grammar("json_object")
    if regex := given.text(f"{prefix}regex"):
        return Grammar("regex", regex)
    if choices := given.texts(f"{prefix}choice", 1000):
        return Grammar("regex", "|".join(re.escape(choice) for choice in choices))
    if grammar := given.text(f"{prefix}grammar"):
        return Grammar("lark", grammar)
    return None


def includes_usage(body: Fields) -> bool:
    """Whether a stream should end with the usage."""
    return body.part("stream_options").flag("include_usage") is True
