"""A small server with scripted answers, for the tests of the page in a browser."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from qwen35_mlx.server.page import page_routes

HOSTILE = (
    "<script>window.hacked = 1</script>\n\n<img src=x onerror='window.hacked = 2'>\n\n"
    "[click](javascript:window.hacked=3) ![p](http://127.0.0.1:9/leak.png)\n\n"
    '```"><script>window.hacked=4</script>\n</code></pre><script>window.hacked = 5</script>\n```\n'
)
MARKDOWN = '''\
A **recurrent** state keeps its size: the cost of a token does not grow with the text. \
Three things follow:

1. Memory is *constant*: the state has shape `[B, Hv, Dv, Dk]`.
2. A long prompt is read in pieces, each after the other.
3. To go back, you need a copy of the state, $S_t$, from before.

## In code

```python
def step(state, k, v, beta, g):
    """Decay, then correct what the key already holds."""
    state = state * math.exp(g)  # g is the log decay
    error = v - state @ k
    return state + beta * torch.outer(error, k)
```

| layer | state | grows with the text |
|:------|------:|:-------------------:|
| attention | 2 × T × H × D | yes |
| gated delta rule | Hv × Dv × Dk | no |

> The order of the two axes differs between libraries. See the
> [paper](https://arxiv.org/abs/2412.06464) for the derivation.

That is the whole idea.
'''
THOUGHT = "The user asks how a recurrent layer works.\nI will start with memory, then show code."


class ScriptedServer:
    """What a test sets before, and what it looks at after."""

    def __init__(self) -> None:
        self.requests: list[dict] = []
        self.key = ""
        self.piece_s = 0.005
        self.left = threading.Event()  # A client left its answer.
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        self.app = Starlette(routes=[*routes, *page_routes()])
        self.url = ""

    def refusal(self, request):
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            error = {"message": "Incorrect API key provided", "code": "invalid_api_key"}
            return JSONResponse({"error": error}, 401)
        return None

    async def models(self, request):
        data = [{"id": "demo/Qwen3.5-tiny", "object": "model", "max_model_len": 32768}]
        return self.refusal(request) or JSONResponse({"object": "list", "data": data})

    async def chat(self, request):
        if refusal := self.refusal(request):
            return refusal
        body = await request.json()
        self.requests.append(body)
        content = body["messages"][-1]["content"]
        if isinstance(content, list):
            content = "picture"
        if content == "refuse":
            message = "This model's maximum context length is 32768 tokens."
            return JSONResponse({"error": {"message": message}}, 400)
        return StreamingResponse(self.stream(content), media_type="text/event-stream")

    async def stream(self, content: str):
        def event(value) -> str:
            return f"data: {json.dumps(value)}\n\n"

        def delta(**fields) -> str:
            return event({"choices": [{"index": 0, "delta": fields, "finish_reason": None}]})

        def pieces(text: str) -> list[str]:
            return [text[i : i + 4] for i in range(0, len(text), 4)]

        answers = {
            "markdown": MARKDOWN,
            "hostile": HOSTILE,
            "picture": "I see a **red** picture.",
            "break": "Half an ans",
            "cut": "Half an ans",
            "slow": "word " * 2000,
        }
        try:
            yield ": keepalive\n\n"
            yield delta(role="assistant", content="")
            if content == "progress":
                for done in range(0, 12001, 1000):
                    progress = {"total": 12000, "cache": 0, "processed": done, "time_ms": done}
                    yield event({"choices": [], "prompt_progress": progress})
                    await asyncio.sleep(self.piece_s * 10)
            if content in ("markdown", "slow"):
                for piece in pieces(THOUGHT):
                    yield delta(reasoning_content=piece, reasoning=piece)
                    await asyncio.sleep(self.piece_s)
            for piece in pieces(answers.get(content, f"You said: {content}")):
                yield delta(content=piece)
                await asyncio.sleep(self.piece_s)
            if content == "cut":
                return
            if content == "break":
                yield event({"error": {"message": "the engine was restarted", "code": 500}})
                return
            yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            usage = {"prompt_tokens": 1204, "completion_tokens": 212}
            usage["prompt_tokens_details"] = {"cached_tokens": 1100}
            yield event({"choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.left.set()
            raise


@contextlib.contextmanager
def serving() -> Iterator[ScriptedServer]:
    """A ScriptedServer on a free port of this machine."""
    scripted = ScriptedServer()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        scripted.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(scripted.app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield scripted
        finally:
            server.should_exit = server.force_exit = True
            thread.join()
