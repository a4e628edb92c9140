"""What comes over a socket that no client library would send, and clients that leave."""

import json
import socket
import time

import pytest
from server.running import MODEL

from qwen35_mlx.server import events, protocol

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
PATH = "/v1/chat/completions"


def connect(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=60)


def post(body, path=PATH, **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Host": "127.0.0.1", "Content_Length": str(len(data)), **headers}
    if "Transfer_Encoding" in given:
        del given["Content_Length"]
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in given.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + data


def read_all(sock):
    data = b""
    while part := sock.recv(65536):
        data += part
    return data


def answer_to(server, data, *, half_close=False):
    """Status and body of what comes back until the server closes."""
    with connect(server) as sock:
        sock.sendall(data)
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        return parsed(read_all(sock))


def parsed(data):
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


BAD_BODIES = {
    "no JSON": b"{",
    "nothing": b"",
    "a list": b"[1]",
    "a text": b'"hi"',
    "bad UTF-8": b'{"model": "\xff\xfe"}',
    "deep": b'{"a":' * 100_000,
    "deep and closed": b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "digits": b'{"seed": ' + b"9" * 5000 + b"}",
    "infinity": b'{"temperature": 1e400, "messages": []}',
    "NaN": b'{"temperature": NaN}',
    "-Infinity": b'{"temperature": -Infinity}',
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_body_that_is_no_request_is_400(server, name):
    for path in (PATH, "/v1/messages", "/api/chat", "/v1/responses", "/v1/completions"):
        status, body = answer_to(server, post(BAD_BODIES[name], path, Connection="close"))
        assert status == 400 and json.loads(body)["error"], (path, body)


def test_half_of_a_surrogate_pair_is_replaced(server):
    body = b'{"messages":[{"role":"user","content":"a\\ud83d b \\ud83d\\ude00"}]}'
    assert answer_to(server, post(body, Connection="close"))[0] == 200
    assert server.engine.last.messages[0]["content"] == "a\ufffd b \U0001f600"


@pytest.mark.parametrize(
    "data",
    [
        b"HELLO\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nBad Header: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX: "
        + b"a" * 100_000
        + b"\r\n\r\n",
    ],
)
def test_what_is_no_http_gets_an_answer_and_an_end(server, data):
    status, body = answer_to(server, data)
    assert 400 <= status < 500 and json.loads(body)["error"]["message"]


def test_a_body_of_ten_gigabytes_is_refused_before_it_comes(server):
    status, body = answer_to(server, post(b"", Content_Length=str(10 * 2**30)))
    assert status == 413 and json.loads(body)["error"]["code"] == "request_too_large"
    assert answer_to(server, post(b"", Content_Length="9" * 400))[0] in (400, 413)


@pytest.mark.parametrize("chunked", [False, True])
def test_the_refusal_of_a_large_body_reaches_a_client_that_still_sends(start, chunked):
    server = start(max_body_bytes=1000)
    piece = b"x" * 50_000
    with connect(server) as sock:
        if chunked:
            sock.sendall(post(b"", Transfer_Encoding="chunked"))
            for _ in range(20):
                sock.sendall(b"c350\r\n" + piece + b"\r\n")
        else:
            sock.sendall(post(b"", Content_Length="1000000"))
            for _ in range(20):
                sock.sendall(piece)
        assert parsed(read_all(sock))[0] == 413


def test_chunked_bodies_are_read(server):
    body = json.dumps(CHAT).encode()
    chunks = b"".join(f"{1:x}\r\n".encode() + body[i : i + 1] + b"\r\n" for i in range(len(body)))
    head = post(b"", Transfer_Encoding="chunked", Connection="close")
    assert answer_to(server, head + chunks + b"0\r\n\r\n")[0] == 200


def test_a_body_that_stays_away_ends_with_408(server, monkeypatch):
    monkeypatch.setattr(protocol, "BODY_PIECE_SECONDS", 0.1)
    assert answer_to(server, post(b"{", Content_Length="100"))[0] == 408


def test_a_head_that_drips_ends_with_408(server, monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.1)
    with connect(server) as sock:
        sock.sendall(b"GET /health HT")
        assert parsed(read_all(sock))[0] == 408


def test_the_next_head_of_a_connection_has_its_time_too(server, monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.1)
    with connect(server) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        first = b""
        while not first.endswith(b"}"):
            first += sock.recv(65536)
        assert parsed(first)[0] == 200
        sock.sendall(b"GET /health HT")
        assert parsed(read_all(sock))[0] == 408


def test_a_client_that_says_no_more_gets_its_answer(server):
    """`printf … | nc`: the client's side is closed while it waits."""
    server.engine.say = [0.3, "Paris."]
    status, body = answer_to(server, post(CHAT), half_close=True)
    assert status == 200 and b"Paris." in body
    status, body = answer_to(server, post(CHAT | {"stream": True}), half_close=True)
    assert status == 200 and b"Paris." in body and b"[DONE]" in body


def test_half_of_a_request_and_no_more_is_400(server):
    status, _ = answer_to(server, post(b"{", Content_Length="100"), half_close=True)
    assert status == 400


def test_pipelined_requests_are_answered_in_turn(server):
    last = post(CHAT, Connection="close")
    with connect(server) as sock:
        sock.sendall(
            post(CHAT) + post(b"[") + b"GET /health HTTP/1.1\r\nHost: [::1]\r\n\r\n" + last
        )
        data = read_all(sock)
    statuses = [int(part[:3]) for part in data.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [200, 400, 200, 200]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_leaves_ends_its_work(server, stream, how):
    server.engine.say = [20.0, "Paris."]
    sock = connect(server)
    sock.sendall(post(CHAT | {"stream": stream}))
    wait_for(lambda: len(server.engine.tickets) == 1)
    if how == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()
    ticket = server.engine.tickets[0]
    assert ticket.is_cancelled.wait(15)
    wait_for(lambda: not server.server.server_state.tasks)
    server.engine.say = ["Paris."]
    assert server.chat().status == 200


def test_the_head_of_a_stream_comes_before_any_sign_of_life(server, monkeypatch):
    monkeypatch.setattr(events, "KEEPALIVE_SECONDS", 60)
    server.engine.say = [60.0, "Paris."]
    with connect(server) as sock:
        sock.settimeout(5)
        sock.sendall(post(CHAT | {"stream": True}, PATH, Connection="close"))
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")


def test_the_head_of_a_stream_comes_at_once_and_something_all_the_time(server, monkeypatch):
    monkeypatch.setattr(events, "KEEPALIVE_SECONDS", 0.05)
    # Longer than all of the test.
    server.engine.say = [60.0, "Paris."]
    bodies = {
        PATH: (CHAT, b": keepalive"),
        "/v1/messages": (CHAT | {"max_tokens": 9}, b'"type":"ping"'),
        "/v1/responses": ({"model": MODEL, "input": "hi"}, b": keepalive"),
        "/api/chat": (CHAT, b'"content":""'),
        "/v1/completions": ({"model": MODEL, "prompt": "a"}, b": keepalive"),
    }
    for path, (body, sign) in bodies.items():
        with connect(server) as sock:
            sock.sendall(post(body | {"stream": True}, path, Connection="close"))
            data = sock.recv(65536)
            assert data.startswith(b"HTTP/1.1 200")
            while data.count(sign) < 3:
                data += sock.recv(65536)
            assert b"Paris" not in data


@pytest.mark.parametrize(
    ("path", "body", "event"),
    [
        (PATH, CHAT, b'"delta":{}'),
        ("/v1/responses", {"model": MODEL, "input": "hi"}, b"event: response.in_progress\n"),
    ],
)
def test_every_fifth_sign_of_life_is_an_event(server, monkeypatch, path, body, event):
    monkeypatch.setattr(events, "KEEPALIVE_SECONDS", 0.01)
    server.engine.say = [60.0, "Paris."]
    with connect(server) as sock:
        sock.sendall(post(body | {"stream": True}, path, Connection="close"))
        data = b""
        while data.count(b": keepalive") < 13:
            data += sock.recv(65536)
    # What follows each comment.
    signs = [event in part for part in data.split(b": keepalive")[1:12]]
    assert signs == [i % 4 == 3 for i in range(11)]


def test_the_forms_of_proxies_and_of_http_1_0_are_taken(server):
    lines = b"Host: localhost\r\nConnection: close\r\n\r\n"
    assert answer_to(server, b"GET http://localhost/health HTTP/1.1\r\n" + lines)[0] == 200
    assert answer_to(server, b"GET /health HTTP/1.0\r\n\r\n")[0] == 200
    assert answer_to(server, b"OPTIONS * HTTP/1.1\r\n" + lines)[0] == 204


def test_a_client_that_waits_for_100_gets_it(server):
    with connect(server) as sock:
        request = post(CHAT, Expect="100-continue", Connection="close")
        head, _, body = request.partition(b"\r\n\r\n")
        sock.sendall(head + b"\r\n\r\n")
        assert sock.recv(1000).startswith(b"HTTP/1.1 100")
        sock.sendall(body)
        assert parsed(read_all(sock))[0] == 200


def test_many_idle_connections_keep_nobody_out(server):
    idle = [connect(server) for _ in range(100)]
    assert server.chat().status == 200
    for sock in idle:
        sock.close()
    wait_for(lambda: len(server.server.server_state.connections) <= 1)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", PATH, 405),
        ("PUT", PATH, 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/models/none", 404),
        ("POST", "/../etc/passwd", 404),
        ("GET", "/%2e%2e/%00", 404),
        ("BREW", "/", 405),
        ("HEAD", "/health", 200),
        ("HEAD", "/v1/models", 200),
        ("OPTIONS", PATH, 204),
        ("GET", "/" + "a" * 5000, 414),
        ("GET", "/v1/models?x=" + "a" * 5000, 200),
    ],
)
def test_paths_and_methods(server, method, path, status):
    answer = server.request(method, path)
    assert answer.status == status
    if status == 405:
        assert answer.headers["allow"]
    if status in (404, 405) and method != "HEAD":
        assert answer.json["error"]


def test_other_dialects_say_no_in_their_own_way(server):
    assert server.get("/v1/messages").json["type"] == "error"
    assert isinstance(server.get("/api/chat").json["error"], str)
    compressed = server.post(PATH, b"x", content_encoding="gzip")
    assert compressed.status == 415


def test_small_pieces_of_a_stream_wait_for_no_acknowledgement(server, monkeypatch):
    """Nagle's algorithm and a delayed acknowledgement together hold each one for 40 ms."""
    options = []
    made = protocol.Protocol.connection_made

    def connection_made(self, transport):
        sock = transport.get_extra_info("socket")
        options.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        made(self, transport)

    monkeypatch.setattr(protocol.Protocol, "connection_made", connection_made)
    assert server.get("/health").status == 200
    assert options and all(options)
