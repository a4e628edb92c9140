"""Embeddings: OpenAI's /v1/embeddings, Ollama's /api/embed and its older /api/embeddings."""

import base64
from typing import Any

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..engine.requests import Embedding, Request, Started
from .completions import read_prompts
from .events import Answer, WholeAnswer
from .fields import Fields
from .ollama import check_model
from .service import Service, begun


async def embeddings(http: HttpRequest) -> Response:
    """OpenAI's form: embeddings as lists of numbers, or as base64."""
    service, body = await begun(http)
    model = service.check_model(body)
    is_base64 = body.choice("encoding_format", ("float", "base64")) == "base64"
    embedder = _Embedder(service, body, "input")
    answer = await service.answer(*embedder.requests)

    async def whole() -> dict[str, Any]:
        vectors, num_tokens = await embedder.collect(answer)
        shown = [_as_base64(vector) if is_base64 else vector.tolist() for vector in vectors]
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": i, "embedding": vector}
                for i, vector in enumerate(shown)
            ],
            "model": model,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }

    return WholeAnswer(answer, whole(), "openai")


async def embed(http: HttpRequest) -> Response:
    """Ollama's form, for one text or several; the older path takes one text as `prompt`."""
    service, body = await begun(http)
    model, is_old = check_model(service, body), http.url.path.endswith("/embeddings")
    embedder = _Embedder(service, body, "prompt" if is_old else "input")
    answer = await service.answer(*embedder.requests)

    async def whole() -> dict[str, Any]:
        vectors, num_tokens = await embedder.collect(answer)
        shown = [vector.tolist() for vector in vectors]
        if is_old:
            return {"embedding": shown[0]}
        return {"model": model, "embeddings": shown, "prompt_eval_count": num_tokens}

    return WholeAnswer(answer, whole(), "ollama")


class _Embedder:
    """The requests for the texts of a field, and their embeddings."""

    def __init__(self, service: Service, body: Fields, field: str):
        prompts = read_prompts(body, field)
        if not all(prompts):
            raise body.refuse(field, "texts that are not empty")
        self._body, self._num_values = body, body.integer("dimensions", 1)
        adapter = service.adapter(body)
        self.requests = [
            Request(prompt=prompt, embeds=True, adapter=adapter, max_tokens=0) for prompt in prompts
        ]

    async def collect(self, answer: Answer) -> tuple[list[np.ndarray], int]:
        """The embedding of each text, and the number of tokens of all texts."""
        found, num_tokens = dict[int, np.ndarray](), 0
        async for place, event in answer.events():
            if isinstance(event, Started):
                num_tokens += event.prompt_tokens
            if isinstance(event, Embedding):
                found[place] = self._cut(event.values)
        return [found[place] for place in sorted(found)], num_tokens

    def _cut(self, values: np.ndarray) -> np.ndarray:
        """The first `dimensions` values, scaled to length 1 again."""
        number = self._num_values
        if number is None:
            return values
        if number > len(values):
            raise self._body.refuse("dimensions", f"at most {len(values)}")
        return values[:number] / np.linalg.norm(values[:number])


def _as_base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
