"""Requests to the engine, the events that answer them, and the sender's handle; without MLX."""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Condition
from typing import Any, Literal

import numpy as np

from ..errors import Qwen35Error
from ..sampling import SamplingParams
from .output import Piece
from .tool_calls import Schema

FinishReason = Literal["stop", "length", "tool_calls", "cancelled", "loop"]
# Token ids and log probabilities at one position, the likeliest first.
Top = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class ToolName:
    """A `tool_choice` that names a tool, which must be called."""

    name: str


@dataclass(frozen=True)
class Grammar:
    """A constraint on the answer. `source`: the schema, the regular expression or the Lark text."""

    kind: Literal["json_object", "json_schema", "regex", "lark"]
    source: Any = None


@dataclass
class Request:
    """One prompt and its options; `messages` go through the chat template, `prompt` does not.

    Messages are OpenAI's; pictures are data: URLs or opened pictures. `params` None: the
    checkpoint's defaults. `max_tokens` None: the rest of the context.
    """

    messages: Sequence[Mapping[str, Any]] | None = None
    prompt: str | Sequence[int] | None = None
    tools: Sequence[Schema] = ()
    # "auto", "none", "required", or a ToolName.
    tool_choice: str | ToolName = "auto"
    parallel_tool_calls: bool = True
    # Tools whose arguments must be valid for their schemas.
    strict_tools: Collection[str] = ()
    enable_thinking: bool | None = None
    # Tokens after which a thought is closed.
    think_budget: int | None = None
    # Further variables of the chat template.
    template: Mapping[str, Any] = field(default_factory=dict)
    # Whether the answer continues the last message, which is the assistant's.
    continue_final: bool = False
    params: SamplingParams | None = None
    # Added to the logits of tokens.
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    # Number of answers to the prompt, sampled with `seed`, `seed + 1`, ...
    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: Sequence[str] = ()
    # Whether to end an answer that repeats itself without end.
    stop_loops: bool = True
    grammar: Grammar | None = None
    # Number of likeliest tokens to return with each token's log probability; None: return none.
    logprobs: int | None = None
    # The same for the tokens of the prompt, in one event `PromptLogprobs`.
    prompt_logprobs: int | None = None
    # Source of drafts while no other request runs, as in stream_generate.
    draft: str = "auto"
    # Name of one of the engine's adapters; empty: none.
    adapter: str = ""
    # Whether `Progress` events are wanted.
    wants_progress: bool = False
    # Whether the answer is an `Embedding` of the prompt instead of tokens.
    embeds: bool = False


@dataclass
class Usage:
    """Token counts and times of a request, with all its answers."""

    prompt_tokens: int = 0
    # Tokens of the prompt that were in the cache.
    cached_tokens: int = 0
    generated_tokens: int = 0
    thought_tokens: int = 0
    # Generated tokens that were accepted drafts.
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
    """Prefilled tokens of the prompt, with those from the cache, and all of them."""

    num_read: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log probabilities of the prompt's tokens; None for the first one."""

    tokens: list[int]
    logprobs: list[float | None]
    top: list[Top]


@dataclass(frozen=True, slots=True)
class Embedding:
    """The embedding of the prompt, `[H]` with length 1, in float32."""

    values: np.ndarray


@dataclass(frozen=True, slots=True)
class Token:
    """A token and the text that became final with it; `index` is that of the answer."""

    pieces: Sequence[Piece]
    token: int
    logprob: float | None = None
    top: Top = ()
    from_draft: bool = False
    index: int = 0


@dataclass(frozen=True, slots=True)
class Done:
    """The end of an answer, with text that was held back; the last one has the final `usage`."""

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


class Ticket:
    """Events of one request, for one iterator or for listeners; thread-safe."""

    def __init__(self, num_answers: int, wake: Callable[[], None]):
        """`wake`: makes the engine check its tickets."""
        self.cancelled = False
        self._wake = wake
        self._left = num_answers
        self._events: deque[Event] = deque()
        self._listeners: list[Callable[[Event], None]] = []
        self._changed = Condition()

    @property
    def is_over(self) -> bool:
        """Whether the last event was sent."""
        return self._left == 0

    def events(self) -> Iterator[Event]:
        """The events until the last `Done`, or `Failed`; waits for them."""
        while True:
            with self._changed:
                while not self._events:
                    if self.is_over:
                        return
                    self._changed.wait()
                event = self._events.popleft()
            yield event

    def add_listener(self, listener: Callable[[Event], None]) -> None:
        """Call `listener` for each event, earlier ones first, from the engine's thread.

        An exception in it cancels the request.
        """
        with self._changed:
            self._listeners.append(listener)
            while self._events:
                listener(self._events.popleft())

    def cancel(self) -> None:
        """End the request after the current piece or token; the event `Done` still comes."""
        self.cancelled = True
        self._wake()

    def send(self, event: Event) -> None:
        """Send an event to the receivers; events after the last one are dropped."""
        with self._changed:
            if self.is_over:
                return
            if isinstance(event, Failed):
                self._left = 0
            elif isinstance(event, Done):
                self._left -= 1
            if not self._listeners:
                self._events.append(event)
            for listener in self._listeners:
                try:
                    listener(event)
                except Exception:
                    # Its event loop is closed.
                    self.cancelled = True
            self._changed.notify_all()
