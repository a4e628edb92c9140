"""PDF files through pypdfium2: pages as pictures, or their text."""

import io
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from ..errors import MediaError, extra, first_line
from ..files import read_bytes
from .pictures import MAX_FILE_BYTES, Picture, checked_path, kind, picture_of
from .settings import VisionSettings

Source: TypeAlias = "str | os.PathLike[str] | bytes"

# A page of A4 at 144 dots an inch has 1191x1684 pixels, about 1,900 tokens; text stays readable.
DOTS_PER_INCH = 144
POINTS_PER_INCH = 72
MAX_PAGES = 64


def open_pdf(
    source: Source,
    settings: VisionSettings,
    pages: Iterable[int] | None = None,
    name: str = "document",
) -> list[Picture]:
    """The pages with these numbers, counted from 1; default: all, at most MAX_PAGES."""
    with _opened(source, name) as (document, name):
        # Also draws the content of form fields.
        document.init_forms()
        return [_render(document, n, settings, name) for n in _chosen(len(document), pages, name)]


def pdf_text(source: Source, name: str = "document") -> str:
    """The text of all pages, separated by empty lines; raises MediaError if there is none."""
    with _opened(source, name) as (document, name):
        pages = [page.get_textpage().get_text_bounded().strip() for page in document]
    text = "\n\n".join(page for page in pages if page).replace("\r\n", "\n")
    if not text:
        raise MediaError(
            f"{name} has no text",
            got=f"{len(pages)} pages of pictures, as a scanner makes them",
            expected="pages with text",
            hint="/pdf in a chat, and generate --pdf, send pages as pictures",
        )
    # PDFium gives U+FFFE for a hyphen at the end of a line.
    return text.replace("\ufffe", "-").replace("\0", "")


@contextmanager
def _opened(source: Source, name: str) -> Iterator[tuple[Any, str]]:
    """The document at a path or in bytes, and its name."""
    with extra("pdf", "reading a PDF takes one more package", MediaError):
        import pypdfium2
    if isinstance(source, str | os.PathLike):
        path = checked_path(source)
        name, source = path.name, read_bytes(path, MAX_FILE_BYTES)
    try:
        document = pypdfium2.PdfDocument(io.BytesIO(source))
    except pypdfium2.PdfiumError as error:
        is_pdf = source.lstrip().startswith(b"%PDF")
        raise MediaError(
            f"{name} cannot be opened",
            got=first_line(error) if is_pdf else kind(source[:64]),
            expected="a PDF without a password",
        ) from None
    try:
        yield document, name
    except pypdfium2.PdfiumError as error:
        raise MediaError(f"{name} is damaged", got=first_line(error)) from None
    finally:
        document.close()


def _chosen(num_pages: int, pages: Iterable[int] | None, name: str) -> list[int]:
    chosen = list(range(1, num_pages + 1)) if pages is None else list(pages)
    if not chosen:
        raise MediaError(f"{name} has no pages to read")
    for number in chosen:
        if not 1 <= number <= num_pages:
            raise MediaError(
                f"{name} has no page {number}", expected=f"pages from 1 to {num_pages}"
            )
    if len(chosen) > MAX_PAGES:
        raise MediaError(
            f"{name} has too many pages to read at once",
            got=len(chosen),
            expected=f"at most {MAX_PAGES}",
            hint="choose some of them",
        )
    return chosen


def _render(document: Any, number: int, settings: VisionSettings, name: str) -> Picture:
    page = document[number - 1]
    width, height = page.get_size()
    if not (width > 0 and height > 0):
        raise MediaError(f"page {number} of {name} is empty", got=f"{width}x{height} points")
    # More pixels than the model's maximum would be scaled down again.
    most = math.sqrt(settings.max_pixels / (width * height))
    image = page.render(scale=min(DOTS_PER_INCH / POINTS_PER_INCH, most)).to_pil()
    page.close()
    return picture_of(image, f"{name} page {number}", settings)
