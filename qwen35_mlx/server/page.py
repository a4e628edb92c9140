"""The routes of the chat page at `/`: its files, and the rendering of Markdown."""

import functools
import hashlib
from collections.abc import Awaitable, Callable
from importlib import resources

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .faults import ApiError
from .fields import parse_object, read_body
from .render import MAX_CHARS, render

# A character has at most two UTF-16 units, of six bytes each in JSON.
MAX_BODY_BYTES = 12 * MAX_CHARS + 1024
MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    # The browser checks each time whether its copy is current.
    "Cache-Control": "no-cache",
}


Endpoint = Callable[[Request], Awaitable[Response]]


def page_routes(program_root: Endpoint | None = None) -> list[Route]:
    """Routes of the files by their exact names, so no path comes from a client.

    `program_root` answers `/` for programs, which do not accept HTML.
    """
    folder = resources.files(__package__) / "page"
    names = sorted(file.name for file in folder.iterdir() if _suffix(file.name) in MEDIA_TYPES)
    routes = [Route("/page/render", _render, methods=["POST"])]
    for name in names:
        content = (folder / name).read_bytes()
        answer: Endpoint = functools.partial(_send_file, content, MEDIA_TYPES[_suffix(name)])
        if name != "index.html":
            routes.append(Route(f"/page/{name}", answer, methods=["GET"]))
        else:
            root = functools.partial(_send_root, answer, program_root or answer)
            routes.append(Route("/", root, methods=["GET"]))
    return routes


def _suffix(name: str) -> str:
    return name.rpartition(".")[2]


async def _send_file(content: bytes, media_type: str, request: Request) -> Response:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": tag}
    known = request.headers.get("if-none-match", "").replace("W/", "")
    if tag in (one.strip() for one in known.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=media_type)


async def _send_root(page: Endpoint, program_root: Endpoint, request: Request) -> Response:
    wants_page = "text/html" in request.headers.get("accept", "")
    response = await (page if wants_page else program_root)(request)
    response.headers["Vary"] = "Accept"
    return response


async def _render(request: Request) -> Response:
    """`{text}` -> `{html, tail, tail_line}`; see `render.Rendered`."""
    # JSON only: a page of another origin cannot send it without a preflight.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise ApiError(415, "expected Content-Type: application/json")
    text = parse_object(await read_body(request, MAX_BODY_BYTES)).get("text")
    if not isinstance(text, str):
        raise ApiError(400, 'expected an object {"text": "..."}')
    if len(text) > MAX_CHARS:
        raise ApiError(413, f"text has {len(text)} characters; at most {MAX_CHARS} are rendered")
    rendered = await run_in_threadpool(render, text)
    return JSONResponse(rendered._asdict(), headers=HEADERS)
