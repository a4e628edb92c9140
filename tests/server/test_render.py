"""Markdown from an untrusted model becomes HTML that cannot act, in time that is bounded."""

import time
from html.parser import HTMLParser

import pytest
from everyday import everyday
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from qwen35_mlx.server.app import _fault
from qwen35_mlx.server.faults import ApiError
from qwen35_mlx.server.page import MAX_BODY_BYTES, page_routes
from qwen35_mlx.server.render import (
    LANGUAGES,
    MAX_CHARS,
    MAX_CODE_LINE_CHARS,
    highlight,
    render,
)

TAGS = set(
    "p h1 h2 h3 h4 h5 h6 ul ol li pre code span div table thead tbody tr th td a em strong s "
    "blockquote br hr".split()
)
ATTRIBUTES = set("class data-language href title rel target start tabindex".split())


class Reader(HTMLParser):
    """Tags, attributes and text as a browser sees them."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = set(), [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in ("br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(text: str) -> Reader:
    rendered = render(text)
    reader = Reader()
    reader.feed(rendered.html + rendered.tail)
    reader.close()
    assert reader.open == []
    return reader


HOSTILE = [
    "<script>alert(1)</script>",
    "a <img src=x onerror=alert(1)> b",
    "<svg/onload=alert(1)>",
    "<!-- --><![CDATA[<script>]]><?php ?>",
    "[a](javascript:alert(1))",
    "[a](JaVaScRiPt:alert(1))",
    "[a](java\nscript:alert(1))",
    "[a](&#106;avascript:alert(1))",
    "[a](\x01javascript:alert(1))",
    "[a](data:text/html,<script>alert(1)</script>)",
    "[a](vbscript:x) [b](file:///etc/passwd) [c](//evil.example) [d](/v1/models)",
    "<javascript:alert(1)>",
    "[a]\n\n[a]: javascript:alert(1)",
    '[a](https://x "onclick=\\"alert(1)")',
    "[a](https://x/'\"><script>alert(1)</script>)",
    "![a](javascript:alert(1)) ![b](http://evil.example/x.png)",
    '![<script>](http://x/"onerror=alert(1)) [![x](http://x/y)](http://z)',
    '```"><script>alert(1)</script>\ncode\n```',
    "```python onload=alert(1)\n</code></pre><script>alert(1)</script>\n```",
    "```html\n<script>alert('</code></pre>')</script>\n```",
    "`<b>` $<b>$ \\(<script>\\) $$<img src=x>$$",
    "| <script> | [a](javascript:1) |\n|:--|--:|\n| <b> | ![x](http://x) |",
    "&lt;script&gt; &#60;script&#62; \ud83d \x00 \u202e",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_output_of_the_model_stays_text(text):
    reader = read(text)
    assert reader.tags <= TAGS
    for name, value in reader.attributes:
        assert name in ATTRIBUTES
        if name == "href":
            assert value.startswith(("http://", "https://", "mailto:"))


@pytest.mark.parametrize("url", ["https://a.example/b?c=1&d=2", "HTTP://a.example", "mailto:a@b"])
def test_a_link_tells_its_target_nothing(url):
    attributes = dict(read(f"[name]({url})").attributes)
    assert attributes["href"].lower() == url.lower()
    assert attributes["rel"].split() == ["noopener", "noreferrer", "nofollow"]
    assert attributes["target"] == "_blank"


def test_a_picture_is_named_and_never_fetched():
    reader = read("![a cat](https://a.example/cat.png)")
    assert "img" not in reader.tags
    assert (reader.text.strip(), dict(reader.attributes)["title"]) == (
        "a cat",
        "https://a.example/cat.png",
    )


def test_alignment_of_a_table_is_a_class_because_the_page_forbids_styles():
    reader = read("| a | b | c |\n|:--|--:|:-:|\n| 1 | 2 | 3 |")
    assert [v for n, v in reader.attributes if n == "class"] == [
        "table",
        *["left", "right", "center"] * 2,
    ]


def test_code_has_classes_and_keeps_every_character():
    code = 'def f(x):\n    """<b>&amp;"""\n\treturn x  # é'
    reader = read(f"```python\n{code}\n```")
    assert ("class", "k") in reader.attributes
    assert ("data-language", "python") in reader.attributes
    assert reader.text.strip("\n") == code


def test_unfinished_code_ends_where_the_text_ends():
    """Or the rest of the line, which comes next, would start a line of its own."""
    assert render("```python\nx = 1").tail.endswith('">1</span></code></pre>\n')


def test_an_unknown_language_is_plain():
    assert highlight("<a>", "no-such-language") == "&lt;a&gt;"
    assert highlight("x" * (MAX_CODE_LINE_CHARS + 1), "python").startswith("xxx")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("is $a_1 * b_1$ so", "$a_1 * b_1$"),
        (r"is \(a_1 * b_1\) so", r"\(a_1 * b_1\)"),
        ("\\[\nx_1 * y_1\n\\]", "\\[\nx_1 * y_1\n\\]"),
        ("$$x_1 * y_1$$", "$$x_1 * y_1$$"),
    ],
)
def test_a_formula_is_not_read_as_emphasis(text, kept):
    reader = read(text)
    assert ("class", "math") in reader.attributes
    assert kept in reader.text
    assert "em" not in reader.tags


def test_prices_are_no_formula():
    assert ("class", "math") not in read("from $5 *to* $6, or $ 7 $").attributes


@pytest.mark.parametrize(
    "text",
    [
        "one\n\ntwo\n\nthree",
        "# a\nb\n\n- c\n- d\n\n  e\n",
        "a\r\n\r\n```\r\nb\r\n\r\nc\r\n```\r\nd",
        "| a |\n|---|\n| b |\n\n> c\n\n    d\n",
        "a\n\n[a]: https://x\n",
        "\n\n\n  a",
        "---\n***\n---",
    ],
)
def test_rendering_goes_on_at_the_last_block(text):
    """What is rendered piece by piece, as the page does, equals the whole."""
    whole = render(text)
    lines, done = "", ""
    for end in range(1, len(text) + 1):
        piece = render(lines + text[end - 1])
        lines += text[end - 1]
        if text[end - 1] == "\r":
            continue
        done += piece.html
        lines = "\n".join(lines.replace("\r\n", "\n").split("\n")[piece.tail_line :])
    assert done + render(lines).tail == whole.html + whole.tail


@pytest.mark.parametrize(
    "unit",
    everyday(
        ["[", "![[", "[a](", "*a_", "> ", "- ", "`a``b", "\\(", "$a", "<a ", "&#", "_", "\n", "|a"],
        3,
        7,
    ),
)
def test_chosen_text_takes_no_unbounded_time(unit):
    text = (unit * MAX_CHARS)[:MAX_CHARS]
    started = time.process_time()
    render(text[:4000])
    short_s = time.process_time() - started
    started = time.process_time()
    render(text)
    # Eight times the text: 64 times the time if it is quadratic, and no more.
    assert time.process_time() - started < max(1.0, 100 * short_s)


@pytest.mark.parametrize("language", everyday([*sorted(LANGUAGES)], 0))
@pytest.mark.parametrize("unit", ["(", '"$a{', "`${", "<script ", "$ a", "\\begin{", "s{"])
def test_chosen_code_takes_no_unbounded_time(language, unit):
    line = (unit * 1000)[:MAX_CODE_LINE_CHARS]
    started = time.process_time()
    highlight("\n".join([line] * 20), language)
    assert time.process_time() - started < 2


# ---- over HTTP


@pytest.fixture(scope="module")
def client():
    return TestClient(Starlette(routes=page_routes(), exception_handlers={ApiError: _fault}))


def test_render_answers_blocks_and_the_tail(client):
    answer = client.post("/page/render", json={"text": "a\n\nb"})
    assert answer.json() == {"html": "<p>a</p>\n", "tail": "<p>b</p>\n", "tail_line": 2}


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b'{"text": "a"}', {"Content-Type": "text/plain"}, 415),
        (b'{"text": "a"}', {}, 415),
        (b"", JSON, 400),
        (b"[" * 100_000, JSON, 400),
        (b"[]", JSON, 400),
        (b"7", JSON, 400),
        (b'{"text": 7}', JSON, 400),
        (b'{"txt": ""}', JSON, 400),
        (b'{"text": "\xff"}', JSON, 400),
        (b'{"text": "%s"}' % (b"a" * (MAX_CHARS + 1)), JSON, 413),
        (b" " * (MAX_BODY_BYTES + 1), JSON, 413),
    ],
)
def test_a_bad_request_is_refused_with_an_error_object(client, body, headers, status):
    answer = client.post("/page/render", content=body, headers=headers)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_the_longest_text_fits_in_the_longest_body(client):
    text = "\U0001f600" * MAX_CHARS
    assert client.post("/page/render", json={"text": text}).status_code == 200


def test_files_have_types_a_policy_and_a_tag(client):
    for path, media_type in {
        "/": "text/html; charset=utf-8",
        "/page/app.js": "text/javascript; charset=utf-8",
        "/page/style.css": "text/css; charset=utf-8",
    }.items():
        answer = client.get(path)
        assert answer.headers["content-type"] == media_type
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        again = client.get(path, headers={"If-None-Match": f'"x", W/{answer.headers["etag"]}'})
        assert (again.status_code, again.content) == (304, b"")


def test_programs_get_their_own_answer_at_the_root():
    async def program_root(request):
        return PlainTextResponse("Ollama is running")

    client = TestClient(Starlette(routes=page_routes(program_root)))
    assert client.get("/", headers={"Accept": "*/*"}).text == "Ollama is running"
    browser = client.get("/", headers={"Accept": "text/html,*/*;q=0.8"})
    assert browser.text.startswith("<!doctype html>")
    assert browser.headers["vary"] == "Accept"


@pytest.mark.parametrize(
    "path",
    ["/page/", "/page/index.html", "/page/../page.py", "/page/%2e%2e/page.py", "/page//etc/passwd"],
)
def test_only_the_files_of_the_page_are_served(client, path):
    assert client.get(path).status_code == 404


def test_the_page_names_nothing_outside_its_server(client):
    html = client.get("/").text
    assert "//" not in html.replace("http://www.w3.org/2000/svg", "")
    assert " style=" not in html
    assert "onclick" not in html
