"""A conversation: messages, thoughts apart from answers, and a cache that is not read twice."""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationResponse

from .cache import Snapshot, restore, snapshot
from .generate import LONG_ANSWER_TOKENS, Progress, prefill, stream_generate
from .model import Model
from .prompt import Piece, ThoughtSplitter, check_ids, check_length, encode_messages


@dataclass
class TurnStats:
    """What the last turn cost; `prefilled_tokens` leaves out what the cache already held."""

    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    prefill_tps: float = 0.0
    generation_tokens: int = 0
    decode_tps: float = 0.0
    peak_memory_gb: float = 0.0
    finish_reason: str | None = None


@dataclass
class Chat:
    """Turns with one model; an answer has at most `max_tokens` (32,768 if None).

    `sampling` overrides the model's defaults, as in stream_generate.
    """

    model: Model
    tokenizer: Any
    system: str | None = None
    enable_thinking: bool | None = None
    max_tokens: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)
    stats: TurnStats = field(default_factory=TurnStats)

    def __post_init__(self) -> None:
        if self.system:
            self.messages.insert(0, {"role": "system", "content": self.system})
        self._cache: list[Any] = self.model.make_cache()
        self._boundary_ids: list[int] = []
        self._boundary: Snapshot | None = None

    def send(self, text: str, progress: Progress | None = None) -> Generator[Piece, None, None]:
        """Say `text` and yield thought and answer as they come.

        Closing the iterator early, or an interrupt, keeps what was said so far; if the prompt
        is refused, or stopped while it is read, the message is taken back.
        """
        self.messages.append({"role": "user", "content": text})
        started = time.perf_counter()
        try:
            history, prompt = self._encode(False), self._encode(True)
            check_ids(prompt, self.model.config.vocab_size)
            check_length(len(prompt), self.model.config.context_length)
            num_read = self._read_history(history, prompt, progress)
            responses = stream_generate(
                self.model,
                self.tokenizer,
                prompt[num_read:],
                max_tokens=self.max_tokens or LONG_ANSWER_TOKENS,
                cache=self._cache,
                cached_ids=prompt[:num_read],
                **self.sampling,
            )
        except BaseException:
            self.messages.pop()
            raise
        splitter = ThoughtSplitter(self._opens_thought(prompt))
        said: dict[str, list[str]] = {"thought": [], "answer": []}
        try:
            for response in responses:
                self._count(response, started)
                yield from self._keep(splitter.feed(response.text), said)
            yield from self._keep(splitter.finish(), said)
        finally:
            message = {"role": "assistant", "content": "".join(said["answer"]).strip()}
            if said["thought"]:
                message["reasoning_content"] = "".join(said["thought"]).strip()
            self.messages.append(message)

    def _encode(self, add_generation_prompt: bool) -> list[int]:
        return encode_messages(
            self.tokenizer,
            self.messages,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=self.enable_thinking,
        )

    def _opens_thought(self, prompt: list[int]) -> bool:
        return self.tokenizer.decode(prompt[-4:]).rstrip().endswith("<think>")

    def _keep(self, pieces: list[Piece], said: dict[str, list[str]]) -> Iterator[Piece]:
        for piece in pieces:
            said[piece.kind].append(piece.text)
            yield piece

    def _read_history(
        self, history: list[int], prompt: list[int], progress: Progress | None
    ) -> int:
        """Bring the cache to the end of the last user turn; returns how many ids it holds.

        The template drops earlier thoughts, so the next prompt changes right behind this
        point: it is where the cache can be taken up again.
        """
        boundary = _common_prefix(history, prompt)
        kept = 0
        if self._boundary is not None:
            known = len(self._boundary_ids)
            if known < boundary and history[:known] == self._boundary_ids:
                restore(self._cache, self._boundary)
                kept = known
        if kept == 0:
            self._cache = self.model.make_cache()
        self._boundary = None
        self.stats = TurnStats(prompt_tokens=len(prompt), prefilled_tokens=len(prompt) - kept)
        if boundary == len(prompt):
            return kept
        if boundary > kept:
            unread = mx.array(prompt[kept:boundary])
            prefill(self.model, unread, self._cache, progress=progress)
            self._boundary_ids = prompt[:boundary]
            self._boundary = snapshot(self._cache, boundary)
        return boundary

    def _count(self, response: GenerationResponse, started: float) -> None:
        if response.generation_tokens == 1:
            seconds = time.perf_counter() - started
            self.stats.prefill_tps = self.stats.prefilled_tokens / max(seconds, 1e-9)
        self.stats.generation_tokens = response.generation_tokens
        self.stats.decode_tps = response.generation_tps
        self.stats.peak_memory_gb = response.peak_memory
        self.stats.finish_reason = response.finish_reason


def _common_prefix(a: list[int], b: list[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
