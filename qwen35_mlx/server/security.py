"""Access control: Host, Origin and API key of a request, and the number of requests."""

import hmac
import ipaddress
import secrets
import socket
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .faults import ApiError, as_fault, dialect_of

# Origins of programs on this machine, which no page of the web has.
APP_SCHEMES = ("app", "file", "tauri", "vscode-webview", "vscode-file")
LOCAL_NAMES = ("localhost", "host.docker.internal")
# Paths that need no key, so that the page can ask for it.
OPEN_PATHS = ("/", "/health", "/favicon.ico")
OPEN_FOLDERS = ("/page/",)
ALLOWED_METHODS = "GET, HEAD, POST, DELETE, OPTIONS"
MAX_PATH_CHARS, MAX_HEADER_BYTES = 4096, 65_536


class Guard:
    """Refuses requests from foreign pages, for foreign host names, or without the key.

    A page of the web can reach a local server in two ways: by a request with its Origin, or by its
    own name that resolves to this machine (DNS rebinding), which is then in Host.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None = None,
        hosts: Collection[str] = (),
        max_requests: int = 256,
    ):
        self.app = app
        self._key = api_key.encode() if api_key else None
        self._hosts = {*LOCAL_NAMES, *(name.lower() for name in hosts), *_own_names()}
        self._max_requests = max_requests
        self._num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"].startswith("http://"):
            # The absolute form for proxies; HTTP requires servers to accept it.
            scope = {**scope, "path": "/" + scope["path"][7:].partition("/")[2]}
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        try:
            self._check(scope, headers, origin)
        except ApiError as fault:
            await fault.response(dialect_of(scope))(scope, receive, send)
            return

        has_begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                given = [*message.get("headers", ()), *([] if origin is None else _cors(origin))]
                # OpenAI's clients read x-request-id, Anthropic's request-id.
                identity = dict(given).get(b"request-id") or f"req_{secrets.token_hex(12)}".encode()
                given += [(b"x-request-id", identity), (b"request-id", identity)]
                message["headers"] = given
            await send(message)

        if scope["method"] == "OPTIONS":
            await _options(headers)(scope, receive, send_with_headers)
            return
        self._num_requests += 1
        try:
            await self.app(scope, receive, send_with_headers)
        except Exception as error:
            if has_begun:
                raise
            await as_fault(error).response(dialect_of(scope))(scope, receive, send_with_headers)
        finally:
            self._num_requests -= 1

    def _check(self, scope: Scope, headers: Headers, origin: str | None) -> None:
        close = {"connection": "close"}
        if len(scope.get("raw_path") or scope["path"]) > MAX_PATH_CHARS:
            raise ApiError(414, "the path is too long", headers=close)
        if sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            raise ApiError(
                431, f"the headers are longer than {MAX_HEADER_BYTES:,} bytes", headers=close
            )
        if scope.get("http_version", "1.1") not in ("1.0", "1.1"):
            raise ApiError(400, "expected HTTP/1.1", headers=close)
        if "transfer-encoding" in headers and "content-length" in headers:
            # Request smuggling: a proxy may use the other length.
            raise ApiError(400, "expected one length of the body, got two", headers=close)
        host = headers.get("host")
        if host is not None and not self._is_known(_host_name(host)):
            raise ApiError(
                403,
                f"the host {host[:80]!r} is not known here; expected localhost, an address, or a "
                "name given with --allow-host",
                code="unknown_host",
            )
        if origin is not None and not self._is_known_origin(origin, host):
            raise ApiError(
                403, f"pages of {origin[:80]!r} may not use this server", code="unknown_origin"
            )
        if scope["method"] == "OPTIONS":
            return
        if self._key is not None and not _is_open(scope) and not self._has_key(headers):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer or x-api-key",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        if self._num_requests >= self._max_requests and not _is_open(scope):
            raise ApiError(
                429,
                f"the server answers {self._num_requests} requests already",
                code="rate_limit_exceeded",
                headers={"retry-after": "2"},
            )

    def _has_key(self, headers: Headers) -> bool:
        """Whether a given key is right; compares in constant time."""
        assert self._key is not None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [token.strip()] if scheme.lower() == "bearer" else []
        given.append(headers.get("x-api-key", ""))
        is_right = [hmac.compare_digest(key.encode(), self._key) for key in given]
        return any(is_right)

    def _is_known(self, name: str) -> bool:
        """Whether a host is allowed: any address, but only our own names (DNS rebinding)."""
        is_own = name in self._hosts or name.endswith(".localhost")
        return is_own or _address(name) is not None

    def _is_known_origin(self, origin: str, host: str | None) -> bool:
        """Whether an origin is this server's, on this machine, or a program's."""
        try:
            parts = urlsplit(origin)
            name = (parts.hostname or "").lower()
        except ValueError:
            return False
        if parts.scheme in APP_SCHEMES:
            return True
        if parts.scheme not in ("http", "https"):
            return False
        if name in self._hosts or name.endswith(".localhost") or parts.netloc == host:
            return True
        address = _address(name)
        return address is not None and address.is_loopback


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _is_open(scope: Scope) -> bool:
    path = scope["path"]
    return path in OPEN_PATHS or (
        scope["method"] in ("GET", "HEAD") and path.startswith(OPEN_FOLDERS)
    )


def _host_name(host: str) -> str:
    """The name or address in a Host header, without its port."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _own_names() -> set[str]:
    name = socket.gethostname().lower()
    return {name, f"{name.partition('.')[0]}.local"} if name else set()


def _cors(origin: str) -> list[tuple[bytes, bytes]]:
    return [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-expose-headers", b"request-id, retry-after"),
        (b"vary", b"Origin"),
    ]


def _options(headers: Headers) -> Response:
    """The answer to OPTIONS, also for a CORS preflight."""
    answer = {"allow": ALLOWED_METHODS}
    if "access-control-request-method" in headers:
        asked = headers.get("access-control-request-headers", "authorization, content-type")
        answer |= {
            "access-control-allow-methods": ALLOWED_METHODS,
            "access-control-allow-headers": asked[:2000],
            "access-control-max-age": "600",
        }
    return Response(status_code=204, headers=answer)
