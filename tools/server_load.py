"""Mixed load on a server: valid requests, clients that disconnect, and invalid requests.

A valid request must be answered. An invalid one must get a status below 500, or its connection must
be closed, within the time limit. The server must keep running, and its memory and number of open
files must not grow.
"""

import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from server_process import ServerProcess

ANSWER_SECONDS = 300.0
NUM_WORKERS = 6
WARM_SHARE = 0.4
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES, OLLAMA = "/v1/messages", "/v1/responses", "/api/chat"
EMBEDDINGS = "/v1/embeddings"
QUESTIONS = (
    "What is the capital of France?",
    "What is 47 + 85?",
    "What is the opposite of hot?",
    "Tell me about rivers. " * 40,
)
STRANGE = (
    None, True, False, 0, -1, 1.5, 10**30, "", "x", "\ud83d", "\0", [], [None], {}, {"a": {}},
    [[[[]]]], "9" * 50, -(10**18), 1e308, {"type": "function"}, [{"role": "user"}],
)  # fmt: skip
FIELDS = (
    "model messages prompt input temperature top_p top_k min_p n stop stream stream_options tools "
    "tool_choice max_tokens max_completion_tokens max_output_tokens seed logprobs top_logprobs "
    "logit_bias response_format text system thinking options format think images instructions "
    "previous_response_id reasoning reasoning_effort echo best_of suffix stop_sequences store "
    "metadata user functions function_call chat_template_kwargs output_config keep_alive include "
    "adapters dimensions encoding_format"
).split()
RAW = (
    b"\r\n\r\n\r\n",
    b"GET\r\n\r\n",
    b"\x00" * 100,
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nfffff\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
    b"GET /health HTTP/1.1\r\nConnection: close\r\n" + b"A: b\r\n" * 5000 + b"\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
)


@dataclass
class Tally:
    """Counts of events, and the failures."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, failure: str = "") -> None:
        """Count one event; keep a failure."""
        with self.lock:
            self.counts[kind] += 1
            if failure:
                self.failures.append(f"{kind}: {failure}")


def sound_request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A valid request: path and body."""
    text = rng.choice(QUESTIONS)
    messages = [{"role": "user", "content": text}]
    most = rng.choice((1, 8, 40))
    stream = {"stream": rng.random() < 0.5}
    return rng.choice(
        (
            (
                CHAT,
                {"messages": messages, "max_tokens": most, "n": rng.choice((1, 1, 2)), **stream},
            ),
            (COMPLETIONS, {"prompt": text, "max_tokens": most, "logprobs": 1, **stream}),
            (MESSAGES, {"messages": messages, "max_tokens": most, **stream}),
            (RESPONSES, {"input": text, "max_output_tokens": most, **stream}),
            (OLLAMA, {"messages": messages, "options": {"num_predict": most}, **stream}),
            (EMBEDDINGS, {"input": [text, "Paris"], "encoding_format": "base64"}),
            (
                CHAT,
                {
                    "messages": messages,
                    "max_tokens": most,
                    "response_format": {"type": "json_object"},
                    **stream,
                },
            ),
        )
    )


def broken_request(rng: random.Random) -> bytes:
    """The bytes of an invalid request."""
    # These are rare, because the server waits ten seconds for the rest of some of them.
    if rng.random() < 0.04:
        return rng.choice(RAW)
    path, body = sound_request(rng)
    for _ in range(rng.choice((1, 1, 2, 4))):
        body[rng.choice(FIELDS)] = rng.choice(STRANGE)
    if "messages" in body and isinstance(body["messages"], list) and rng.random() < 0.3:
        message = rng.choice(STRANGE)
        body["messages"] = [
            message,
            {"role": rng.choice(("user", "tool", "x")), "content": message},
        ]
    # A request that is not refused must end soon.
    for name in ("max_tokens", "max_output_tokens"):
        if not isinstance(body.get(name), str | list | dict) and (body.get(name) or 0) > 8:
            body[name] = 4
    data = json.dumps(body).encode()
    if rng.random() < 0.3:
        at = rng.randrange(len(data) + 1)
        data = (
            data[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(4))) + data[at + 2 :]
        )
    return request_bytes(path, data)


def request_bytes(path: str, data: bytes) -> bytes:
    """A whole HTTP request."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def answer_to(port: int, request: bytes, seconds: float = ANSWER_SECONDS) -> bytes:
    """Send a request and return all bytes of the answer; raises TimeoutError."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as sock:
        parts = []
        try:
            sock.sendall(request)
            if request.endswith(b"{"):
                sock.shutdown(socket.SHUT_WR)
            while part := sock.recv(65536):
                parts.append(part)
        except (ConnectionError, BrokenPipeError):
            pass
        return b"".join(parts)


def ask_soundly(server: ServerProcess, rng: random.Random, tally: Tally) -> None:
    """Send a valid request, whose answer must be complete."""
    path, body = sound_request(rng)
    data = json.dumps({"model": server.model, **body}).encode()
    answer = answer_to(server.port, request_bytes(path, data))
    ends = (b"}", b"[DONE]\n\n", b"\n\n", b"}\n", b"0\r\n\r\n")
    is_whole = answer.startswith(b"HTTP/1.1 200") and answer.endswith(ends)
    is_whole = is_whole and b'"error":{' not in answer
    is_busy = answer.startswith(b"HTTP/1.1 429")
    tally.add("sound", "" if is_whole or is_busy else f"{path} {body} {answer[:300]!r}")


def ask_brokenly(server: ServerProcess, rng: random.Random, tally: Tally) -> None:
    """Send an invalid request, which must be refused, or answered if it happens to be valid."""
    request = broken_request(rng)
    try:
        answer = answer_to(server.port, request)
    except TimeoutError:
        tally.add("broken", f"no answer to {request[:500]!r}")
        return
    is_fine = answer.startswith(b"HTTP/1.1 ") and answer[9:10] in b"24"
    tally.add("broken", "" if is_fine else f"{answer[:200]!r} to {request[:500]!r}")


def leave_early(server: ServerProcess, rng: random.Random, tally: Tally) -> None:
    """Send a request and disconnect before its answer ends."""
    path, body = sound_request(rng)
    body |= {"max_tokens": 2000, "stream": rng.random() < 0.5, "model": server.model}
    request = request_bytes(path, json.dumps(body).encode())
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
        sock.sendall(request)
        time.sleep(rng.random() * 0.5)
        if rng.random() < 0.5:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    tally.add("left")


def fuzz(server: ServerProcess, num_requests: int, seed: int = 0) -> Tally:
    """Send this number of invalid requests, several at a time."""
    tally = Tally()
    _in_threads(
        lambda rng: ask_brokenly(server, rng, tally),
        lambda: tally.counts["broken"] < num_requests and server.is_running,
        seed,
    )
    return tally


@dataclass
class SoakResult:
    """Result of a soak; growth compares its last third with the first third after warm-up."""

    minutes: float
    crashes: int
    memory_growth: float
    file_growth: float
    tally: Tally


def soak(server: ServerProcess, minutes: float, seed: int = 1) -> SoakResult:
    """Run mixed load for some minutes."""
    tally = Tally()
    began = time.monotonic()
    end = began + minutes * 60
    samples: list[tuple[float, int, int]] = []

    def one(rng: random.Random) -> None:
        kind = rng.choices((ask_soundly, ask_brokenly, leave_early), (6, 3, 2))[0]
        try:
            kind(server, rng, tally)
        except OSError as error:
            tally.add("connection", repr(error))
            time.sleep(0.2)

    def goes_on() -> bool:
        return time.monotonic() < end and server.is_running

    def sample() -> None:
        while goes_on():
            samples.append((time.monotonic() - began, server.memory_bytes(), server.num_files()))
            time.sleep(max(0.5, minutes * 60 / 200))

    sampler = threading.Thread(target=sample)
    sampler.start()
    _in_threads(one, goes_on, seed)
    sampler.join()
    crashes = 0 if server.is_running and server.request("GET", "/health")[0] == 200 else 1
    warm = [s for s in samples if s[0] > WARM_SHARE * minutes * 60]
    third = max(1, len(warm) // 3)
    return SoakResult(
        round(minutes, 2),
        crashes,
        _growth([s[1] for s in warm], third),
        _growth([s[2] for s in warm], third),
        tally,
    )


def _growth(values: list[int], third: int) -> float:
    """Growth from the median of the first third to that of the last; the load varies."""
    if not values or not values[0]:
        return 0.0
    first, last = sorted(values[:third])[third // 2], sorted(values[-third:])[third // 2]
    return round(last / first - 1, 4)


def _in_threads(
    work: Callable[[random.Random], None], goes_on: Callable[[], bool], seed: int
) -> None:
    """Repeat `work` in several threads."""

    def run(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        while goes_on():
            work(rng)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(NUM_WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
