"""A server in a thread of its own, and what tests ask it."""

import asyncio
import faulthandler
import json
import socket
import threading
import time
from http.client import HTTPConnection
from types import SimpleNamespace
from typing import Any

from server.fake_engine import CONTEXT

from qwen35_mlx.server.app import make_app
from qwen35_mlx.server.run import Server, bind
from qwen35_mlx.server.service import Settings

MODEL = "demo"


class Running:
    """A server in a thread of its own."""

    def __init__(
        self,
        engine: Any,
        tokenizer: Any,
        loads: threading.Event | None = None,
        **settings: Any,
    ):
        """`loads`: until when the model loads."""
        given = {"model_id": MODEL, "context_length": CONTEXT, "vocab_size": 2560, **settings}
        self.settings = Settings(**given)
        self.engine = engine
        self.app = make_app(engine, self.settings, tokenizer)
        self.server = Server(lambda: (loads is None or loads.wait()) and self.app)
        self.socket = bind("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        while not self.server.started:
            time.sleep(0.002)
        if loads is None:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        while self.server.app is None:
            time.sleep(0.002)

    def _run(self) -> None:
        asyncio.run(self.server.serve(sockets=[self.socket]))

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(60)
        if self._thread.is_alive():
            faulthandler.dump_traceback()
            raise AssertionError("the server does not stop")
        self.socket.close()

    def send(self, sock: socket.socket, path: str, body: Any) -> None:
        """A request whose answer is not read."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        sock.sendall(head.encode() + data)

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> SimpleNamespace:
        """One request: status, headers, text, and the JSON if it is some."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, headers or {})
            answer = connection.getresponse()
            text = answer.read().decode()
            is_json = "json" in (answer.headers.get("content-type") or "")
            value = (
                json.loads(text)
                if text and is_json and "ndjson" not in str(answer.headers)
                else None
            )
            return SimpleNamespace(
                status=answer.status, headers=answer.headers, text=text, json=value
            )
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> SimpleNamespace:
        return self.request(
            "GET", path, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )

    def post(self, path: str, body: Any, **headers: str) -> SimpleNamespace:
        return self.request(
            "POST", path, body, {k.replace("_", "-"): v for k, v in headers.items()}
        )

    def chat(self, text: str = "What is the capital of France?", **fields: Any) -> SimpleNamespace:
        messages = fields.pop("messages", [{"role": "user", "content": text}])
        return self.post("/v1/chat/completions", {"model": MODEL, "messages": messages, **fields})


def data_lines(text: str) -> list[Any]:
    """The data of server-sent events; [DONE] as it is."""
    lines = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
