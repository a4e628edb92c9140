"""PDF pages as pictures."""

import io
import sys

import numpy as np
import pytest
from media_files import SETTINGS, encoded, pattern_image
from PIL import Image

from qwen35_mlx.errors import MediaError
from qwen35_mlx.media import documents
from qwen35_mlx.media.documents import open_pdf, pdf_text
from qwen35_mlx.media.settings import VisionSettings


def pdf(colours: list[str], size: tuple[int, int] = (595, 842)) -> bytes:
    """A document of blank pages in colours; sizes in points."""
    pages = [Image.new("RGB", size, colour) for colour in colours]
    file = io.BytesIO()
    pages[0].save(file, "PDF", save_all=True, append_images=pages[1:], resolution=72)
    return file.getvalue()


def pdf_of(texts: list[str]) -> bytes:
    """A document with a line of text on each page."""
    kids = " ".join(f"{3 + 2 * i} 0 R" for i in range(len(texts)))
    font = "<</Font<</F<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>>>>>"
    objects = ["<</Type/Catalog/Pages 2 0 R>>", f"<</Type/Pages/Kids[{kids}]/Count {len(texts)}>>"]
    for i, text in enumerate(texts):
        page = f"/Parent 2 0 R/MediaBox[0 0 595 842]/Resources{font}/Contents {4 + 2 * i} 0 R"
        stream = f"BT /F 12 Tf 72 720 Td ({text}) Tj ET"
        objects.append(f"<</Type/Page{page}>>")
        objects.append(f"<</Length {len(stream)}>>stream\n{stream}\nendstream")
    body, places = b"%PDF-1.4\n", []
    for number, text in enumerate(objects, 1):
        places.append(b"%010d 00000 n \n" % len(body))
        body += f"{number} 0 obj\n{text}\nendobj\n".encode()
    size = len(objects) + 1
    table = b"xref\n0 %d\n0000000000 65535 f \n" % size + b"".join(places)
    end = b"trailer\n<</Root 1 0 R/Size %d>>\nstartxref\n%d\n%%%%EOF" % (size, len(body))
    return body + table + end


@pytest.fixture(autouse=True)
def pdfium() -> None:
    pytest.importorskip("pypdfium2")


def colours(pages) -> list[tuple[int, ...]]:
    # A page is stored as JPEG.
    return [tuple(np.round(page.pixels.mean(axis=(0, 1)) / 255).astype(int)) for page in pages]


@pytest.mark.slow
def test_each_page_is_a_picture(tmp_path):
    (file := tmp_path / "a.pdf").write_bytes(pdf(["red", "lime", "blue"]))
    pages = open_pdf(file, SETTINGS)
    assert colours(pages) == [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert pages[1].describe() == "a.pdf page 2, 1190x1684, 1,961 tokens"
    assert open_pdf(file.read_bytes(), SETTINGS, name="a.pdf") == pages


def test_pages_are_chosen_by_number_in_any_order():
    data = pdf(["red", "lime", "blue"])
    assert colours(open_pdf(data, SETTINGS, [3, 1])) == [(0, 0, 1), (1, 0, 0)]
    for number in (0, 4, -1):
        with pytest.raises(MediaError, match=f"no page {number}\n  expected: pages from 1 to 3"):
            open_pdf(data, SETTINGS, [number])


def test_the_number_of_pages_is_limited(monkeypatch):
    monkeypatch.setattr(documents, "MAX_PAGES", 2)
    data = pdf(["red", "lime", "blue"])
    assert len(open_pdf(data, SETTINGS, [1, 3])) == 2
    with pytest.raises(MediaError, match="too many pages"):
        open_pdf(data, SETTINGS)


def test_a_huge_page_is_drawn_no_larger_than_the_model_takes():
    half = (0.5, 0.5, 0.5)
    small = VisionSettings(16, 2, 2, half, half, 4096, 200_000)
    (page,) = open_pdf(pdf(["red"], (3000, 2000)), small)
    width, height = page.original_size
    assert 190_000 < width * height < 203_000


@pytest.mark.parametrize(
    ("data", "got"),
    [(b"%PDF-1.7 nothing", "Failed"), (encoded(pattern_image(9, 9)), "PNG"), (b"hi", "unknown")],
)
def test_what_is_no_pdf_is_refused(data, got):
    with pytest.raises(MediaError, match=rf"x\.pdf cannot be opened\n  got: .*{got}"):
        open_pdf(data, SETTINGS, name="x.pdf")


def test_a_truncated_pdf_is_read_or_refused():
    data = pdf(["red", "lime"])
    for end in range(0, len(data), len(data) // 20):
        try:
            pages = open_pdf(data[:end], SETTINGS)
        except MediaError:
            continue
        assert colours(pages) == [(1, 0, 0), (0, 1, 0)][: len(pages)]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(MediaError, match=r"pip install 'qwen35-mlx\[pdf\]'"):
        open_pdf(b"%PDF", SETTINGS)


def test_the_text_of_a_document_is_that_of_all_pages(tmp_path):
    (file := tmp_path / "a.pdf").write_bytes(pdf_of(["The first page.", "", "The last."]))
    assert pdf_text(file) == "The first page.\n\nThe last."


def test_a_scanned_document_says_how_to_send_its_pages():
    with pytest.raises(MediaError, match=r"a\.pdf has no text(.|\n)*/pdf"):
        pdf_text(pdf(["red", "lime"]), "a.pdf")
