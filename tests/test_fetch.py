"""Fetching: what is not on the open internet is never reached; everything has a limit."""

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from qwen35_mlx.errors import MediaError
from qwen35_mlx.media import fetch as module
from qwen35_mlx.media.fetch import fetch, is_public

PRIVATE = """0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 127.0.0.1 127.1.2.3 169.254.169.254 172.16.0.1
172.31.255.255 192.0.0.1 192.0.2.1 192.168.1.1 198.18.0.1 198.51.100.1 203.0.113.9 224.0.0.1
239.255.255.250 240.0.0.1 255.255.255.255 :: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1
::ffff:169.254.169.254 64:ff9b::127.0.0.1 64:ff9b::a9fe:a9fe 64:ff9b:1::10.0.0.1 100::1
2001::1 2001:db8::1 2002:7f00:1::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 fec0::1 ff02::1"""
PUBLIC = "1.1.1.1 8.8.8.8 93.184.216.34 2606:4700:4700::1111 ::ffff:8.8.8.8 64:ff9b::808:808"


def test_addresses_that_are_public():
    addresses = [ipaddress.ip_address(a) for a in (PRIVATE + " " + PUBLIC).split()]
    assert [str(a) for a in addresses if is_public(a)] == [
        str(ipaddress.ip_address(a)) for a in PUBLIC.split()
    ]


class Handler(BaseHTTPRequestHandler):
    """Answers by path; notes what it was asked."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        self.server.asked.append((self.headers["Host"], self.path))
        name, _, argument = self.path[1:].partition("/")
        with suppress(OSError):
            getattr(self, f"on_{name}")(argument)

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def on_ok(self, argument: str) -> None:
        self.answer(b"a picture")

    def on_missing(self, argument: str) -> None:
        self.answer(b"nothing here", 404)

    def on_to(self, argument: str) -> None:
        self.answer(b"", 302, Location=argument)

    def on_loop(self, argument: str) -> None:
        self.answer(b"", 307, Location="/loop")

    def on_claims(self, argument: str) -> None:
        self.answer(b"x", **{"Content-Length": argument})

    def on_endless(self, argument: str) -> None:
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(bytes(10_000))

    def on_drips(self, argument: str) -> None:
        self.send_response(200)
        self.end_headers()
        for _ in range(1000):
            self.wfile.write(b".")
            time.sleep(0.02)

    def on_drips_headers(self, argument: str) -> None:
        for _ in range(1000):
            self.wfile.write(b"H")
            time.sleep(0.02)

    def on_breaks(self, argument: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b"half")
        self.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A server on this machine, under names; `private.test` is not public."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.asked, server.resolved = [], []
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
    thread.start()

    def addresses(host: str, port: int, **_: object) -> list:
        server.resolved.append(host)
        address = "10.1.2.3" if host == "private.test" else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, server.server_port))]

    monkeypatch.setattr(socket, "getaddrinfo", addresses)
    monkeypatch.setattr(module, "is_public", lambda address: str(address) == "127.0.0.1")
    # A proxy would be handed the name, and would look up another address.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("all_proxy", "http://127.0.0.1:9")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_body_is_fetched_under_its_name(server):
    assert fetch("http://pictures.test/ok/ü b?size=1 2") == b"a picture"
    assert server.asked == [("pictures.test", "/ok/%C3%BC%20b?size=1%202")]
    assert fetch("http://pictures.test:8080/ok") == b"a picture"
    assert server.asked[-1][0] == "pictures.test:8080"
    assert server.resolved == ["pictures.test"] * 2


def test_a_redirect_is_checked_like_the_first_address(server):
    """It was the way to 169.254.169.254."""
    assert fetch("http://a.test/to/http://b.test/ok") == b"a picture"
    assert server.asked[-1] == ("b.test", "/ok")
    server.asked.clear()
    with pytest.raises(MediaError, match=r"private\.test is not on the open internet"):
        fetch("http://a.test/to/http://private.test/ok")
    assert [host for host, _ in server.asked] == ["a.test"]


def test_one_private_address_among_public_ones_refuses_the_host(server, monkeypatch):
    both = [(2, 1, 6, "", (a, server.server_port)) for a in ("127.0.0.1", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    with pytest.raises(MediaError, match="not on the open internet"):
        fetch("http://a.test/ok")
    assert server.asked == []


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "0x7f.1", "localhost", "[::1]"])
def test_this_machine_is_never_reached(host):
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        listening.setblocking(False)
        with pytest.raises(MediaError):
            fetch(f"http://{host}:{listening.getsockname()[1]}/")
        with pytest.raises(BlockingIOError):
            listening.accept()


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://a.test/ok", "gopher://a.test", "data:,x", "http://[::1"]
)
def test_redirects_to_other_schemes_are_refused(server, target):
    with pytest.raises(MediaError):
        fetch(f"http://a.test/to/{target}")
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://a.test/x",
        "http://",
        "http://user:secret@a.test/ok",
        "http://a.test:99999/",
        "http://[::1",
        "http://a.test\u2100b/",
        "http://a..test/",
        "http://" + "a" * 70 + ".test/",
    ],
)
def test_addresses_that_are_not_fetched(server, url):
    with pytest.raises(MediaError):
        fetch(url)
    assert server.asked == []


def test_redirects_end(server):
    with pytest.raises(MediaError, match="too many redirects"):
        fetch("http://a.test/loop")
    assert len(server.asked) == module.MAX_REDIRECTS + 1


def test_bytes_are_limited_by_what_is_said_and_by_what_comes(server):
    with pytest.raises(MediaError, match="too large"):
        fetch("http://a.test/claims/1000001", max_bytes=1_000_000)
    with pytest.raises(MediaError, match="too large"):
        fetch("http://a.test/endless", max_bytes=1_000_000)
    assert fetch("http://a.test/ok", max_bytes=9) == b"a picture"
    with pytest.raises(MediaError, match="too large"):
        fetch("http://a.test/ok", max_bytes=8)


@pytest.mark.parametrize("path", ["drips", "drips_headers"])
def test_a_slow_server_cannot_hold_on(server, path):
    """Each byte comes in time, and all of them would take twenty seconds."""
    begin = time.monotonic()
    with pytest.raises(MediaError, match=r"takes too long\n  expected: at most 0\.2 seconds"):
        fetch(f"http://a.test/{path}", max_seconds=0.2)
    assert time.monotonic() - begin < 10


def test_half_a_body_is_none(server):
    with pytest.raises(MediaError, match="ended after 4 of 100 bytes"):
        fetch("http://a.test/breaks")


def test_other_answers_are_refused(server):
    with pytest.raises(MediaError, match="got: 404"):
        fetch("http://a.test/missing")


def test_encryption_names_the_host_and_checks_the_certificate(server, monkeypatch):
    """The connection goes to an address; the certificate must be that of the name."""
    named = []

    class Context:
        def wrap_socket(self, plain: socket.socket, **options: object) -> socket.socket:
            named.append(options["server_hostname"])
            plain.do_handshake = lambda: None
            return plain

    class Plain(socket.socket):
        do_handshake: object

    monkeypatch.setattr(socket, "socket", Plain)
    with monkeypatch.context() as patch:
        patch.setattr(module, "tls_context", Context)
        assert fetch("https://pictures.test/ok") == b"a picture"
        with pytest.raises(MediaError, match="without encryption"):
            fetch("https://pictures.test/to/http://pictures.test/ok")
    assert named == ["pictures.test"] * 2
    context = module.tls_context()
    assert context.check_hostname and context.verify_mode == ssl.CERT_REQUIRED
    # The server speaks no TLS.
    with pytest.raises(MediaError, match="cannot be fetched"):
        fetch("https://pictures.test/ok", max_seconds=2)
