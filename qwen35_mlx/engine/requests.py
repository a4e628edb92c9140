"""What a server asks of the engine, and the events that answer it; plain data without MLX."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..errors import Qwen35Error
from ..sampling import SamplingParams
from .output import Piece
from .tool_values import Schema

FinishReason = Literal["stop", "length", "tool_calls", "cancelled", "loop"]
# Log probabilities of one place: token ids, the likeliest first.
Top = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class ToolName:
    """A `tool_choice` that names the tool to call."""

    name: str


@dataclass(frozen=True)
class Grammar:
    """What an answer has to be. `source`: the schema, the regular expression or the Lark text."""

    kind: Literal["json_object", "json_schema", "regex", "lark"]
    source: Any = None


@dataclass
class Request:
    """One prompt and how to answer it; `messages` go through the chat template, `prompt` does not.

    Messages are OpenAI's, pictures data: URLs or opened pictures. None of `params` and `max_tokens`
    is what the checkpoint recommends, and the rest of the context.
    """

    messages: Sequence[Mapping[str, Any]] | None = None
    prompt: str | Sequence[int] | None = None
    tools: Sequence[Schema] = ()
    # "auto", "none", "required", or a tool's name.
    tool_choice: str | ToolName = "auto"
    parallel_tool_calls: bool = True
    # Tools whose calls keep their schemas, whether the model has to call or may.
    strict_tools: Collection[str] = ()
    enable_thinking: bool | None = None
    # Tokens after which a thought is closed.
    think_budget: int | None = None
    # Further variables of the chat template.
    template: Mapping[str, Any] = field(default_factory=dict)
    # Whether the answer goes on with the last message, which is the assistant's.
    continue_final: bool = False
    params: SamplingParams | None = None
    # Added to the logits of tokens.
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    # Answers to the same prompt, drawn with `seed`, `seed + 1`, ...
    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: Sequence[str] = ()
    # Whether a text that repeats itself without end is ended.
    stop_loops: bool = True
    grammar: Grammar | None = None
    # How many of the likeliest tokens come with each token's log probability; None: no such.
    logprobs: int | None = None
    # The same for the tokens of the prompt, in one event `PromptLogprobs`.
    prompt_logprobs: int | None = None
    # Where drafts come from while no other request runs, as in stream_generate.
    draft: str = "auto"
    # By which of the engine's adapters; none if empty.
    adapter: str = ""
    # Whether `Progress` events are wanted.
    wants_progress: bool = False
    # Whether the answer is an `Embedding` of the prompt instead of tokens.
    embeds: bool = False


@dataclass
class Usage:
    """What a request took; tokens of all its answers."""

    prompt_tokens: int = 0
    # Of the prompt, what was read for an earlier request.
    cached_tokens: int = 0
    generated_tokens: int = 0
    thought_tokens: int = 0
    # Of the generated ones, those that cost no pass of their own.
    draft_tokens: int = 0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Started:
    """The request left the queue."""

    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Tokens of the prompt read so far, those of the cache included, and all of them."""

    num_read: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Of each token of the prompt; nothing is known of the first one."""

    tokens: list[int]
    logprobs: list[float | None]
    top: list[Top]


@dataclass(frozen=True, slots=True)
class Embedding:
    """That of the prompt, `[H]` of length 1, in float32."""

    values: np.ndarray


@dataclass(frozen=True, slots=True)
class Token:
    """A token and the text that became final with it; `index` counts the n answers."""

    pieces: Sequence[Piece]
    token: int
    logprob: float | None = None
    top: Top = ()
    from_draft: bool = False
    index: int = 0


@dataclass(frozen=True, slots=True)
class Done:
    """The end of an answer; `pieces` are what was held back. `usage` is final with the last one."""

    finish_reason: FinishReason
    # The stop string that ended it.
    stop_text: str | None
    usage: Usage
    pieces: Sequence[Piece] = ()
    index: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """The request could not be answered; nothing follows."""

    error: Exception


Event = Started | Progress | PromptLogprobs | Embedding | Token | Done | Failed


class EngineBusy(Qwen35Error):
    """The queue is full; a later try may succeed."""


class EngineStopped(Qwen35Error):
    """The engine does not run, or ended while the request waited."""
