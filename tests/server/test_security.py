"""Who may use the server: hosts, origins, keys, and how many at a time."""

import asyncio
import time

import pytest
from server.fake_engine import FakeEngine
from server.running import MODEL

from qwen35_mlx.engine.requests import EngineBusy
from qwen35_mlx.server.security import Guard


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:8080", 200),
        ("LOCALHOST", 200),
        ("[::1]:8080", 200),
        ("192.168.1.9:8080", 200),
        ("host.docker.internal", 200),
        ("evil.example", 403),
        ("evil.example:8080", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
    ],
)
def test_a_name_that_points_here_is_no_name_of_ours(server, host, status):
    assert server.get("/v1/models", Host=host).status == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 200),
        ("http://127.0.0.1:5173", 200),
        ("http://[::1]:80", 200),
        ("tauri://localhost", 200),
        ("vscode-webview://abc", 200),
        ("https://evil.example", 403),
        ("http://localhost.evil.example", 403),
        ("null", 403),
        ("http://[", 403),
    ],
)
def test_foreign_pages_are_refused(server, origin, status):
    answer = server.get("/v1/models", Origin=origin)
    assert answer.status == status
    allowed = answer.headers.get("access-control-allow-origin")
    assert allowed == (origin if status == 200 else None)
    preflight = server.request(
        "OPTIONS",
        "/v1/chat/completions",
        headers={
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization",
        },
    )
    assert preflight.status == (204 if status == 200 else 403)
    if status == 200:
        assert "POST" in preflight.headers["access-control-allow-methods"]
        assert preflight.headers["access-control-allow-headers"] == "authorization"
        assert preflight.headers["access-control-max-age"] == "600"


def test_a_given_name_is_known(start):
    server = start(hosts=["My.Box"])
    assert server.get("/v1/models", Host="my.box:1").status == 200


def test_the_key_is_asked_for_in_both_ways(start):
    server = start(api_key="s3cret")
    assert server.get("/health").status == 200
    for path in ("/v1/models", "/metrics", "/api/tags"):
        assert server.get(path).status == 401
        assert server.get(path, Authorization="Bearer s3cret").status == 200
        assert server.get(path, Authorization="bearer s3cret").status == 200
        assert server.get(path, x_api_key="s3cret").status == 200
        assert server.get(path, x_api_key="s3cre").status == 401
        assert server.get(path, Authorization="Basic s3cret").status == 401
    refused = server.get("/v1/models")
    assert refused.json["error"]["code"] == "invalid_api_key"
    assert refused.headers["www-authenticate"] == "Bearer"
    refused = server.post("/v1/messages", {})
    assert refused.json["error"]["type"] == "authentication_error"


def test_a_busy_engine_is_429_with_a_time_to_wait(server):
    server.engine.refusal = EngineBusy("the queue is full")
    answer = server.chat()
    assert answer.status == 429 and answer.json["error"]["code"] == "rate_limit_exceeded"
    assert int(answer.headers["retry-after"]) > 0
    body = {"model": MODEL, "max_tokens": 5, "messages": [{"role": "user", "content": "a"}]}
    assert server.post("/v1/messages", body).json["error"]["type"] == "rate_limit_error"


def test_more_requests_than_allowed_are_429(start, tokenizer):
    server = start(max_requests=0)
    assert server.chat().status == 429
    assert server.get("/health").status == 200


def test_an_error_of_ours_is_500_and_tells_no_secret(server, caplog):
    server.engine.refusal = RuntimeError("the secret")
    answer = server.chat()
    assert answer.status == 500 and "secret" not in answer.text
    assert answer.json["error"]["type"] == "server_error"
    # The log of the server does.
    (record,) = (r for r in caplog.records if r.levelname == "ERROR")
    assert "a request failed" in record.message and record.exc_info[1] is server.engine.refusal


def test_an_application_that_fails_in_its_answer_begins_no_second_one():
    """The answer that has begun is cut, so that a client does not take it for whole."""
    sent = []

    async def app(scope, receive, send):
        if scope["path"] == "/begun":
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("gone")

    async def send(message):
        sent.append(message)

    guard = Guard(app, max_requests=1)
    scope = {"type": "http", "method": "GET", "headers": []}
    with pytest.raises(RuntimeError, match="gone"):
        asyncio.run(guard({**scope, "path": "/begun"}, None, send))
    assert [message["status"] for message in sent] == [200]
    # Nor does it count as one that still runs.
    asyncio.run(guard({**scope, "path": "/other"}, None, send))
    assert [message.get("status") for message in sent[1:]] == [500, None]


def test_health_is_red_while_the_engine_is_dead_and_it_is_started_again(start, tokenizer):
    engine = FakeEngine(tokenizer)
    server = start(engine)
    engine.is_alive = False
    answer = server.get("/health")
    assert answer.status == 503 or engine.num_restarts
    end = time.monotonic() + 30
    while not engine.num_restarts and time.monotonic() < end:
        time.sleep(0.01)
    assert engine.num_restarts == 1 and server.get("/health").json["status"] == "ok"


def test_metrics_are_prometheus(server):
    answer = server.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert "# TYPE qwen35_mlx_prompt_tokens_total counter" in answer.text
    assert "\nqwen35_mlx_running 1\n" in answer.text


def test_one_object_serves_clients_of_openai_and_anthropic(server):
    listed = server.get("/v1/models").json
    model = listed["data"][0]
    assert listed["object"] == "list" and listed["has_more"] is False
    assert listed["first_id"] == listed["last_id"] == model["id"] == MODEL
    assert (model["object"], model["type"]) == ("model", "model")
    assert model["context_length"] == model["max_model_len"] == 4096
    assert model["created_at"].endswith("Z") and isinstance(model["created"], int)
    assert server.get(f"/v1/models/{MODEL}").json == model


@pytest.mark.parametrize("fails", [False, True])
def test_every_answer_has_an_id_for_clients_of_both(server, fails):
    body = {"model": MODEL, "max_tokens": 5, "messages": [{"role": "user", "content": "a"}]}
    answer = server.post("/v1/messages", body if not fails else {})
    assert answer.headers["x-request-id"] == answer.headers["request-id"]
    assert answer.headers["request-id"].startswith("req_")
    assert not fails or answer.json["request_id"] == answer.headers["request-id"]
