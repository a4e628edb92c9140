"""Fetch a picture from the web: public addresses only, checked at every redirect, with limits.

Only the local user causes a fetch, never the content of a message. The host is resolved and its
addresses are checked here, and the connection uses a checked address: a second look-up could give
another one.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from contextlib import closing, suppress
from typing import TypeAlias
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from ..errors import MediaError, first_line

Address: TypeAlias = "ipaddress.IPv4Address | ipaddress.IPv6Address"
# (family, address for connect)
Target: TypeAlias = "tuple[socket.AddressFamily, tuple]"

MAX_BYTES, MAX_SECONDS, MAX_REDIRECTS = 2**27, 30.0, 5
CHUNK_BYTES = 2**16
PORTS = {"http": 80, "https": 443}
REDIRECTS = (301, 302, 303, 307, 308)
# IPv6-only networks map IPv4 addresses to the last four bytes of these addresses.
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# All other IPv6 addresses are local, reserved or multicast. The tunnels lead to IPv4 addresses.
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
TUNNELS = tuple(ipaddress.IPv6Network(n) for n in ("2002::/16", "2001::/32"))


def fetch(url: str, max_bytes: int = MAX_BYTES, max_seconds: float = MAX_SECONDS) -> bytes:
    """The body of an http or https address; ignores proxies of the environment."""
    deadline = time.monotonic() + max_seconds
    for _ in range(MAX_REDIRECTS + 1):
        parts = _split(url)
        try:
            body, location = _request(parts, url, max_bytes, deadline)
            target = urljoin(url, location or "")
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, MediaError):
                raise
            if time.monotonic() >= deadline:
                raise MediaError(
                    f"{url} takes too long", expected=f"at most {max_seconds:g} seconds"
                ) from None
            got = first_line(error) or type(error).__name__
            raise MediaError(f"{url} cannot be fetched", got=got) from None
        if location is None:
            return body
        if parts.scheme == "https" and urlsplit(target).scheme != "https":
            raise MediaError(f"{url} redirects to an address without encryption", got=target)
        url = target
    raise MediaError(f"{url}: too many redirects", expected=f"at most {MAX_REDIRECTS}")


def is_public(address: Address) -> bool:
    """Whether an address is on the public internet; also of mapped and translated ones."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address not in GLOBAL_UNICAST or any(address in network for network in TUNNELS):
            return False
    return address.is_global and not (
        address.is_multicast
        or address.is_reserved
        or address.is_private
        or address.is_loopback
        or address.is_link_local
        or address.is_unspecified
    )


def resolve(host: str, port: int) -> list[Target]:
    """The addresses of a host; raises if any of them is not public."""
    targets: list[Target] = []
    for family, _, _, _, where in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        address = ipaddress.ip_address(where[0])
        if not is_public(address):
            raise MediaError(
                f"{host} is not on the open internet",
                got=address,
                expected="a public address",
                hint="save the file and give its path",
            )
        targets.append((family, where))
    return targets


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise MediaError(f"{url} is no address", got=error) from None
    if parts.scheme not in PORTS or not parts.hostname:
        raise MediaError(f"{url} cannot be fetched", expected="http://… or https://…")
    if parts.username is not None or parts.password is not None:
        raise MediaError(f"{parts.hostname}: addresses with a password are not fetched")
    return parts


def _request(
    parts: SplitResult, url: str, max_bytes: int, deadline: float
) -> tuple[bytes, str | None]:
    """One request: the body, or the address of a redirect."""
    host = parts.hostname or ""
    port = parts.port or PORTS[parts.scheme]
    # A list, because the encrypted socket replaces the first one.
    sockets = [_connect(resolve(host, port), deadline)]
    # A timeout per read does not help: a server can send one byte at a time.
    watchdog = threading.Timer(max(0.0, deadline - time.monotonic()), _hang_up, [sockets])
    watchdog.daemon = True
    watchdog.start()
    connection = http.client.HTTPConnection(host, port)
    try:
        if parts.scheme == "https":
            secure = tls_context().wrap_socket(
                sockets[0], server_hostname=host, do_handshake_on_connect=False
            )
            sockets[0] = secure
            secure.do_handshake()
        connection.sock = sockets[0]
        path = quote(parts.path or "/", safe="%/:=&~+!$,;'@()*")
        query = quote(parts.query, safe="%/:=&?~+!$,;'@()*")
        headers = {"Accept-Encoding": "identity", "User-Agent": "qwen35-mlx"}
        # Host as in the URL: with a port only if the URL has one.
        headers["Host"] = parts.netloc.encode("idna").decode()
        connection.request("GET", path + (f"?{query}" if query else ""), headers=headers)
        with closing(connection.getresponse()) as response:
            if response.status in REDIRECTS and (location := response.getheader("Location")):
                return b"", location
            if response.status != 200:
                raise MediaError(
                    f"{url} cannot be fetched", got=f"{response.status} {response.reason}"
                )
            body = _body(response, url, max_bytes)
        if time.monotonic() >= deadline:
            # A connection that the watchdog ended looks like a complete body.
            raise TimeoutError
        return body, None
    finally:
        watchdog.cancel()
        connection.close()
        sockets[0].close()


def _connect(targets: list[Target], deadline: float) -> socket.socket:
    failure: OSError = OSError("no address")
    for family, where in targets:
        connected = socket.socket(family, socket.SOCK_STREAM)
        try:
            connected.settimeout(max(0.01, deadline - time.monotonic()))
            connected.connect(where)
            return connected
        except OSError as error:
            connected.close()
            failure = error
    raise failure


def _hang_up(sockets: list[socket.socket]) -> None:
    # OSError: the connection is closed already.
    with suppress(OSError):
        # The method of the plain class: SSLSocket's would first change the socket's state.
        socket.socket.shutdown(sockets[0], socket.SHUT_RDWR)


def tls_context() -> ssl.SSLContext:
    """A context that checks certificates against those of the system."""
    return ssl.create_default_context()


def _body(response: http.client.HTTPResponse, url: str, max_bytes: int) -> bytes:
    refusal = MediaError(
        f"{url} is too large", expected=f"at most {max_bytes / 1e6:,.0f} million bytes"
    )
    if response.length is not None and response.length > max_bytes:
        raise refusal
    expected, body = response.length, bytearray()
    while chunk := response.read1(CHUNK_BYTES):
        body += chunk
        if len(body) > max_bytes:
            raise refusal
    if expected is not None and len(body) < expected:
        raise OSError(f"the connection ended after {len(body)} of {expected} bytes")
    return bytes(body)
