"""OpenAI's older /v1/completions: raw prompts, several at a time, with log probabilities."""

from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..engine.requests import Done, PromptLogprobs, Request, Token, Top
from . import options
from .events import sse
from .fields import Fields
from .openai import DONE, FINISH, MAX_CHOICES, MAX_STOPS, usage_object
from .replies import Writer, timings
from .service import Service, begun, finite

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 1024
MAX_LOGPROBS = 5


async def completions(http: HttpRequest) -> Response:
    """Continue texts."""
    return await _Completion(*await begun(http)).respond()


def read_prompts(body: Fields, name: str = "prompt") -> list[str | list[int]]:
    """A text, ids, or a list of either."""
    prompt = body.raw(name)
    if prompt is None:
        raise body.missing(name)
    expected = "a string, a list of strings, token ids, or a list of those"
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise body.refuse(name, expected, "invalid_type")
    if not prompt:
        raise body.refuse(name, "at least one prompt")
    if _are_ids(prompt):
        return [prompt]
    if len(prompt) > MAX_PROMPTS:
        raise body.refuse(name, f"at most {MAX_PROMPTS} prompts")
    if not all(isinstance(p, str) or (p and _are_ids(p)) for p in prompt):
        raise body.refuse(name, expected, "invalid_type")
    return prompt


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(i) is int and 0 <= i < 2**31 for i in value)


class _Text:
    """One choice: its text and log probabilities so far, and how much of them was sent."""

    def __init__(self, service: Service, num_top: int | None):
        self._service, self._num_top = service, num_top
        self.text, self.is_new = "", True
        # Per token: its text, its log probability, the likeliest tokens, and its start in the text.
        self._scores: list[tuple[str, float | None, dict[str, float] | None, int]] = []
        self._num_chars_scored = self._num_sent = 0
        self.finish_reason: str | None = None

    def score(self, token: int, logprob: float | None, top: Top, is_first: bool = False) -> None:
        """Add the log probability of a token; the first token of a prompt has none."""
        if self._num_top is None:
            return
        text, place = self._service.text_of(token), self._num_chars_scored
        tops = {self._service.text_of(t): finite(p) for t, p in top}
        scores = (None, None) if is_first else (finite(logprob), tops if self._num_top else None)
        self._scores.append((text, *scores, place))
        self._num_chars_scored += len(text)

    def mean(self) -> float:
        """The mean log probability, which ranks the choices for `best_of`."""
        values = [logprob for _, logprob, _, _ in self._scores if logprob is not None]
        return sum(values) / len(values) if values else finite(None)

    def logprobs(self, since: int = 0) -> dict[str, Any] | None:
        """The log probabilities in the API's form."""
        if self._num_top is None:
            return None
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        columns = {name: [row[i] for row in self._scores[since:]] for i, name in enumerate(names)}
        return columns if self._num_top else columns | {"top_logprobs": None}

    def unsent(self) -> dict[str, Any] | None:
        """The log probabilities that were not sent yet."""
        since, self._num_sent = self._num_sent, len(self._scores)
        return self.logprobs(since)


class _Completion(Writer):
    """One request for completions, and its answer."""

    def __init__(self, service: Service, body: Fields):
        super().__init__(service, "cmpl-", service.check_model(body))
        if body.text("suffix"):
            raise body.refuse("suffix", "none: there is no fill-in-the-middle", "unsupported")
        prompts = read_prompts(body)
        self._n = body.integer("n", 1, MAX_CHOICES) or 1
        self._best_of = body.integer("best_of", 1, MAX_CHOICES) or self._n
        self.is_stream = body.flag("stream") or False
        if self._best_of < self._n:
            raise body.refuse("best_of", f"at least n, which is {self._n}")
        if self.is_stream and self._best_of > self._n:
            raise body.refuse("best_of", "no more than n in a stream")
        self._wants_usage = options.includes_usage(body)
        self._num_top = self._read_logprobs(body)
        self._echo = body.flag("echo") or False
        self.requests = [self._request(body, prompt) for prompt in prompts]
        # `best_of` needs log probabilities even if the client does not ask for them.
        num_top = 0 if self._num_top is None and self._best_of > self._n else self._num_top
        self._texts = [_Text(service, num_top) for _ in range(len(prompts) * self._best_of)]

    def _read_logprobs(self, body: Fields) -> int | None:
        """The number of likeliest tokens; true means 1, as in chat completions."""
        if isinstance(body.raw("logprobs"), bool):
            return 1 if body.flag("logprobs") else None
        return body.integer("logprobs", 0, MAX_LOGPROBS)

    def _request(self, body: Fields, prompt: str | list[int]) -> Request:
        max_tokens = options.max_tokens(body, "max_tokens", "max_completion_tokens", low=0)
        max_tokens = DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens
        if max_tokens == 0 and not self._echo:
            raise body.refuse("max_tokens", "1 or more, or echo: true")
        ranks = self._best_of > self._n
        return Request(
            prompt=prompt,
            params=options.sampling(body, self._service.settings.defaults),
            logit_bias=options.logit_bias(body, self._service.settings.vocab_size),
            seed=options.seed(body),
            n=self._best_of,
            max_tokens=max_tokens,
            min_tokens=body.integer("min_tokens", 0) or 0,
            ignore_eos=body.flag("ignore_eos") or False,
            stop=body.texts("stop", MAX_STOPS),
            grammar=options.response_format(body) or options.structured_outputs(body),
            logprobs=0 if ranks and self._num_top is None else self._num_top,
            prompt_logprobs=self._num_top if self._echo else None,
            adapter=self._service.adapter(body),
        )

    def _echoed(self, place: int) -> str:
        """The text of a prompt."""
        prompt = self.requests[place].prompt
        if isinstance(prompt, str):
            return prompt
        return b"".join(map(self._service.bytes_of, prompt or ())).decode(errors="replace")

    def _take(self, place: int, event: Any) -> bytes:
        if isinstance(event, PromptLogprobs):
            for text in self._texts[place * self._best_of : (place + 1) * self._best_of]:
                for i, token in enumerate(event.tokens):
                    text.score(token, event.logprobs[i], event.top[i], is_first=i == 0)
        if not isinstance(event, Token | Done):
            return b""
        index = place * self._best_of + event.index
        text = self._texts[index]
        if isinstance(event, Token) and event.token not in self._service.ends:
            text.score(event.token, event.logprob, event.top)
        new = "".join(piece.text for piece in event.pieces)
        if self._echo and text.is_new:
            new = self._echoed(place) + new
        text.is_new = False
        text.text += new
        if isinstance(event, Done):
            text.finish_reason = FINISH.get(event.finish_reason, event.finish_reason)
        elif not new:
            return b""
        choice = {"index": index, "text": new, "logprobs": text.unsent()}
        return self._chunk([choice | {"finish_reason": text.finish_reason}])

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return sse(self._completion("text_completion", choices, **more))

    def _end(self) -> bytes:
        usage = self._chunk([], usage=usage_object(self._usage)) if self._wants_usage else b""
        return usage + DONE

    def _object(self) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for place in range(len(self.requests)):
            texts = self._texts[place * self._best_of : (place + 1) * self._best_of]
            if self._best_of > self._n:
                texts = sorted(texts, key=_Text.mean, reverse=True)[: self._n]
            for text in texts:
                choices.append(
                    {
                        "index": len(choices),
                        "text": text.text,
                        "logprobs": None if self._num_top is None else text.logprobs(),
                        "finish_reason": text.finish_reason,
                    }
                )
        usage = self._usage
        more = {"usage": usage_object(usage), "timings": timings(usage)}
        return self._completion("text_completion", choices, **more)
