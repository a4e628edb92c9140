"""The page in a real Chromium, against scripted answers."""

import base64
import json
import re
import shutil
import sys
import warnings
from pathlib import Path

import pytest
from server.page_server import MARKDOWN, serving

import qwen35_mlx

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`")

MAC_CHROME = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", MAC_CHROME))),
    None,
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium"),
]
PICTURE = Path(qwen35_mlx.__file__).parent / "demo" / "picture.png"


@pytest.fixture(scope="module")
def browser():
    with warnings.catch_warnings(), playwright.sync_playwright() as started:
        # Root has no sandbox of Chromium.
        arguments = ["--no-sandbox"] if sys.platform == "linux" else []
        with started.chromium.launch(executable_path=CHROMIUM, args=arguments) as browser:
            yield browser


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture
def page(browser, server):
    """The open page; whatever it asked for lies in `page.asked`."""
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    page = open_page(context, server)
    yield page
    context.close()
    assert page.mistakes == []


def open_page(context, server):
    context.set_default_timeout(15_000)
    page = context.new_page()
    page.asked, page.mistakes = [], []
    page.on("request", lambda request: page.asked.append(request))
    page.on("pageerror", lambda error: page.mistakes.append(str(error)))
    page.goto(server.url)
    page.locator("#model-name", has_text="Qwen3.5-tiny").wait_for()
    return page


def say(page, text, *, wait=True):
    page.fill("#text", text)
    page.press("#text", "Enter")
    if wait:
        wait_for_end(page)


def wait_for_end(page):
    page.locator("#stop").wait_for(state="hidden")


def last_answer(page):
    return page.locator(".assistant").last


def hash_id(page):
    return page.evaluate("location.hash")


def test_an_answer_streams_and_ends_as_markdown(page, server):
    server.piece_s = 0.02
    say(page, "markdown", wait=False)
    answer = last_answer(page)
    answer.locator("strong", has_text="recurrent").wait_for()
    assert page.locator("#stop").is_visible()
    assert "whole idea" not in answer.inner_text()
    server.piece_s = 0
    wait_for_end(page)
    assert answer.locator("li").count() == 3
    assert answer.locator("pre .k", has_text="def").count() == 1
    assert answer.locator("td").count() == 6
    assert answer.locator(".fresh").inner_text() == ""
    for mark in ("```", "##", "**", "|"):
        assert mark not in answer.inner_text()
    assert re.search(
        r"212 tokens · [\d,.]+ tokens/s · prompt 1,204 \(1,100 cached\)", answer.inner_text()
    )
    assert "1,416 of 32,768" in page.locator("#context").inner_text()


def test_a_thought_is_folded_and_says_how_long_it_took(page):
    say(page, "markdown")
    thought = last_answer(page).locator("details")
    assert re.match(r"Thought for [\d.]+ s", thought.locator("summary").inner_text())
    assert not thought.locator("div").is_visible()
    thought.locator("summary").click()
    assert thought.locator("div").inner_text().startswith("The user asks")


def test_finished_blocks_are_not_rendered_again(page, server):
    """Each piece is rendered before the next one comes, so that no clock decides what is sent."""
    pieces = re.findall("(?s).{1,40}", MARKDOWN)
    shown = page.evaluate(
        """async (pieces) => {
            const { MarkdownView } = await import("/page/markdown.js");
            const root = document.createElement("div");
            const view = new MarkdownView(root);
            for (const piece of pieces) { view.push(piece); await view.finish(); }
            return root.textContent;
        }""",
        pieces,
    )
    assert "That is the whole idea." in shown
    texts = [json.loads(r.post_data)["text"] for r in page.asked if "/page/render" in r.url]
    assert len(texts) == len(pieces)
    starts = [MARKDOWN.index(text[:20]) for text in texts if len(text) >= 20]
    assert starts == sorted(starts)
    assert starts[-1] > 500
    assert all(len(text) < len(MARKDOWN) / 2 for text in texts)


def test_an_answer_reads_the_same_after_a_reload(page, server):
    say(page, "markdown")
    before = last_answer(page).locator(".markdown").inner_html()
    page.reload()
    page.locator(".markdown", has_text="whole idea").wait_for()
    page.wait_for_function("() => !document.querySelector('.fresh').textContent")
    assert last_answer(page).locator(".markdown").inner_html() == before
    assert page.locator(".user .text").inner_text() == "markdown"


@pytest.mark.parametrize("how", ["escape", "button"])
def test_stop_ends_the_request_and_keeps_what_came(page, server, how):
    say(page, "slow", wait=False)
    last_answer(page).locator(".markdown", has_text="word word").wait_for()
    page.press("body", "Escape") if how == "escape" else page.click("#stop")
    wait_for_end(page)
    assert server.left.wait(30)
    assert "stopped" in last_answer(page).locator(".stats").inner_text()
    page.reload()
    last_answer(page).locator(".markdown", has_text="word word").wait_for()


def test_a_reload_in_an_answer_keeps_what_came(page, server):
    say(page, "slow", wait=False)
    page.wait_for_timeout(2500)
    last_answer(page).locator(".markdown", has_text="word word").wait_for()
    page.reload()
    last_answer(page).locator(".stats", has_text="stopped").wait_for()
    assert "word word" in last_answer(page).inner_text()


def test_the_output_of_the_model_cannot_act(page, server):
    say(page, "hostile")
    answer = last_answer(page)
    assert "<script>window.hacked = 1</script>" in answer.inner_text()
    assert "<img src=x onerror='window.hacked = 2'>" in answer.inner_text()
    assert answer.locator("script, img, iframe, a").count() == 0
    page.reload()
    last_answer(page).locator("pre").wait_for()
    assert page.evaluate("window.hacked") is None
    assert all(request.url.startswith((server.url, "data:")) for request in page.asked)


def test_the_policy_stops_what_a_mistake_of_rendering_would_let_through(page, server):
    page.route(
        "**/page/render",
        lambda route: route.fulfill(
            json={
                "html": "",
                "tail_line": 0,
                "tail": "<img src=x onerror='window.hacked=1'>"
                "<a id=bad href='javascript:window.hacked=2'>bad</a>"
                "<img src='http://127.0.0.2:9/leak.png'><p style='color:red' id=red>x</p>"
                "<iframe srcdoc='<script>parent.hacked=3</script>'></iframe>",
            }
        ),
    )
    say(page, "hello")
    page.evaluate("""() => {
        const script = document.createElement('script');
        script.textContent = 'window.hacked = 4';
        document.body.append(script);
        return fetch('http://127.0.0.2:9/').catch(() => {});
    }""")
    page.click("#bad")
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
    assert (
        page.evaluate("getComputedStyle(document.querySelector('#red')).color") != "rgb(255, 0, 0)"
    )
    assert (
        page.evaluate(
            "performance.getEntriesByType('resource')"
            ".filter((e) => e.name.includes('127.0.0.2') && e.responseStatus).length"
        )
        == 0
    )


@pytest.mark.parametrize("how", ["button", "paste", "drop"])
def test_a_picture_is_sent_as_it_is(page, server, how):
    if how == "button":
        page.set_input_files("#picture-file", PICTURE)
    else:
        page.evaluate(
            """([how, data]) => {
                const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
                const transfer = new DataTransfer();
                transfer.items.add(new File([bytes], "p.png", { type: "image/png" }));
                const common = { bubbles: true, cancelable: true };
                document.querySelector("#text").dispatchEvent(how === "paste"
                    ? new ClipboardEvent("paste", { ...common, clipboardData: transfer })
                    : new DragEvent("drop", { ...common, dataTransfer: transfer }));
            }""",
            [how, base64.b64encode(PICTURE.read_bytes()).decode()],
        )
    page.locator("#pictures img").wait_for()
    say(page, "What do you see?")
    parts = server.requests[-1]["messages"][-1]["content"]
    url = "data:image/png;base64," + base64.b64encode(PICTURE.read_bytes()).decode()
    assert parts == [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What do you see?"},
    ]
    assert page.locator("#pictures img").count() == 0
    assert last_answer(page).locator("strong").inner_text() == "red"
    page.reload()
    page.locator(".user img").wait_for()
    assert page.evaluate("document.querySelector('.user img').naturalWidth") > 0


def test_a_large_picture_is_made_smaller(page, server):
    page.evaluate("""async () => {
        const canvas = new OffscreenCanvas(4000, 2000);
        canvas.getContext('2d').fillRect(0, 0, 10, 10);
        const file = new File([await canvas.convertToBlob()], "large.png", { type: "image/png" });
        const transfer = new DataTransfer();
        transfer.items.add(file);
        document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: transfer }));
    }""")
    page.locator("#pictures img").wait_for()
    assert page.evaluate("document.querySelector('#pictures img').naturalWidth") == 2560


def test_a_file_that_is_no_picture_is_refused(page):
    page.set_input_files("#picture-file", __file__)
    page.locator("#toast", has_text="test_page.py is not a picture").wait_for()
    assert page.locator("#pictures img").count() == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("refuse", "This model's maximum context length is 32768 tokens."),
        ("break", "the engine was restarted"),
        ("cut", "The connection ended before the answer was complete."),
    ],
)
def test_an_error_of_the_server_is_shown_and_can_be_tried_again(page, server, text, message):
    say(page, text)
    assert last_answer(page).locator("[role=alert]").inner_text() == message
    last_answer(page).get_by_text("Retry").click()
    page.wait_for_function("() => !document.querySelector('#stop').checkVisibility()")
    assert len(server.requests) == 2
    assert server.requests[0]["messages"] == server.requests[1]["messages"]
    assert page.locator(".assistant").count() == 1


def test_a_key_is_asked_for_where_the_server_wants_one(browser, server):
    server.key = "secret"
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    page.locator("#key-wanted", has_text="Incorrect API key provided").wait_for()
    assert page.evaluate("document.activeElement.name") == "key"
    page.keyboard.type("secret")
    page.keyboard.press("Enter")
    page.locator("#model-name", has_text="Qwen3.5-tiny").wait_for()
    say(page, "hello")
    assert "You said: hello" in last_answer(page).inner_text()
    context.close()


def test_an_edit_replaces_what_follows(page, server):
    say(page, "first")
    say(page, "second")
    page.locator(".user").first.hover()
    page.locator(".user").first.get_by_text("Edit").click()
    assert page.input_value("#text") == "first"
    say(page, "better")
    assert [m["content"] for m in server.requests[-1]["messages"]] == ["better"]
    assert page.locator("#messages > li").count() == 2
    assert not page.locator("#editing").is_visible()


def test_settings_become_fields_of_the_request(page, server):
    page.select_option("#thinking", "off")
    page.click("#open-settings")
    page.fill("[name=temperature]", "0.3")
    page.fill("[name=top_k]", "20")
    page.fill("[name=max_tokens]", "100")
    page.fill("[name=system]", "Be brief.")
    page.select_option("[name=theme]", "dark")
    page.get_by_text("Done").click()
    page.wait_for_function("() => getComputedStyle(document.body).colorScheme === 'dark'")
    page.reload()
    say(page, "hello")
    sent = server.requests[-1]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (sent["temperature"], sent["top_k"], sent["max_tokens"]) == (0.3, 20, 100)
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}
    assert "top_p" not in sent
    assert (sent["stream"], sent["return_progress"]) == (True, True)


def test_the_reading_of_a_long_prompt_is_seen(page, server):
    server.piece_s = 0.03
    say(page, "progress", wait=False)
    wait = last_answer(page).locator(".wait")
    # Which of the twelve steps is drawn depends on the machine.
    wait.get_by_text(re.compile("prompt: [0-9]+,000 of 12,000 tokens, 1,000 tokens/s")).wait_for()
    assert page.evaluate("document.querySelector('progress').value") >= 1 / 12
    wait_for_end(page)
    assert not wait.is_visible()


def test_conversations_are_renamed_deleted_and_brought_back(page):
    say(page, "hello")
    page.fill("#title", "Greeting")
    page.press("#title", "Enter")
    row = page.locator("#conversations", has_text="Greeting")
    row.wait_for()
    page.click("#menu summary")
    page.click("#delete")
    row.wait_for(state="hidden")
    assert page.locator("#empty").is_visible()
    page.locator("#toast button", has_text="Undo").click()
    row.wait_for()
    page.reload()
    page.locator("#conversations button", has_text="Greeting").click()
    page.locator(".markdown", has_text="You said: hello").wait_for()


def test_a_deleted_conversation_is_not_brought_back_by_its_answer(page, server):
    say(page, "slow", wait=False)
    last_answer(page).locator(".markdown", has_text="word").wait_for()
    page.click("#menu summary")
    page.click("#delete")
    assert server.left.wait(30)
    page.wait_for_timeout(300)
    page.reload()
    page.locator("#model-name", has_text="Qwen3.5-tiny").wait_for()
    page.wait_for_timeout(200)
    assert page.locator("#conversations li").count() == 0


def test_a_conversation_is_exported(page):
    say(page, "hello")
    files = {}
    for kind in ("markdown", "json"):
        page.click("#menu summary")
        with page.expect_download() as caught:
            page.click(f"#export-{kind}")
        files[caught.value.suggested_filename] = Path(caught.value.path()).read_text()
    assert files["hello.md"] == "# hello\n\n## You\n\nhello\n\n## Answer\n\nYou said: hello\n"
    messages = json.loads(files["hello.json"])["messages"]
    assert [m["content"] for m in messages] == ["hello", "You said: hello"]


def test_an_answer_goes_on_while_another_conversation_is_open(page, server):
    server.piece_s = 0.01
    say(page, "markdown", wait=False)
    last_answer(page).locator("strong").wait_for()
    page.keyboard.press("Control+k")
    assert page.locator("#empty").is_visible()
    say(page, "hello")
    assert "You said: hello" in last_answer(page).inner_text()
    page.locator("#conversations button", has_text="markdown").click()
    last_answer(page).locator("p", has_text="That is the whole idea.").wait_for()
    wait_for_end(page)
    assert not server.left.is_set()


def test_keys_send_break_lines_and_leave_composed_words_alone(page, server):
    page.fill("#text", "one")
    page.press("#text", "Shift+Enter")
    page.keyboard.type("two")
    page.evaluate("""() => document.querySelector('#text').dispatchEvent(
        new KeyboardEvent('keydown', { key: 'Enter', isComposing: true, bubbles: true }))""")
    assert server.requests == []
    assert page.evaluate("document.querySelector('#text').clientHeight") > 50
    page.keyboard.press("Enter")
    wait_for_end(page)
    assert server.requests[-1]["messages"][-1]["content"] == "one\ntwo"
    first = hash_id(page)
    page.keyboard.press("Control+k")
    assert (first != "", hash_id(page)) == (True, "")
    assert page.evaluate("document.activeElement.id") == "text"


def test_a_draft_survives_a_look_at_another_conversation(page):
    say(page, "hello")
    page.keyboard.press("Control+k")
    page.fill("#text", "a long draft")
    page.locator("#conversations button", has_text="hello").click()
    page.locator(".markdown", has_text="You said: hello").wait_for()
    assert page.input_value("#text") == "a long draft"


def test_scrolling_up_is_respected_while_text_comes(page, server):
    page.set_viewport_size({"width": 1100, "height": 420})
    server.piece_s = 0.02
    say(page, "markdown", wait=False)
    last_answer(page).locator("pre").wait_for()
    # A function: the page's policy lets no text be evaluated, which polling would do.
    at_end = """() => {
        const { scrollHeight, scrollTop, clientHeight } = document.querySelector('#scroller');
        return scrollHeight - scrollTop - clientHeight < 48;
    }"""
    page.wait_for_function(at_end)
    page.hover("#messages")
    page.mouse.wheel(0, -300)
    page.locator("#latest").wait_for()
    wait_for_end(page)
    assert not page.evaluate(at_end)
    page.click("#latest")
    assert page.evaluate(at_end)


def test_the_page_fits_a_phone(browser, server):
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
    page = open_page(context, server)
    say(page, "markdown")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("document.querySelector('#scroller').scrollWidth") <= 390
    assert not page.locator("#new").is_visible()
    page.tap("#toggle-sidebar")
    page.locator("#new").wait_for()
    page.tap("#new")
    page.locator("#new").wait_for(state="hidden")
    assert page.locator("#empty").is_visible()
    # Safari zooms in on smaller text.
    assert (
        page.evaluate("parseFloat(getComputedStyle(document.querySelector('#text')).fontSize)")
        >= 16
    )
    context.close()


def test_every_control_has_a_name_for_a_screen_reader(page):
    page.set_input_files("#picture-file", PICTURE)
    page.locator("#pictures img").wait_for()
    say(page, "markdown")
    page.click("#open-settings")
    unnamed = page.evaluate("""() =>
        [...document.querySelectorAll('button, input, select, textarea, summary, img, progress')]
            .filter((e) => e.checkVisibility() && !(e.ariaLabel || e.alt || e.labels?.length
                || e.textContent.trim()))
            .map((e) => e.outerHTML)""")
    assert unnamed == []
    assert page.locator("[role=status]").inner_text() == "The answer is complete."


def test_without_storage_the_page_still_answers(browser, server):
    context = browser.new_context()
    context.add_init_script("indexedDB.open = () => { throw new Error('no storage'); }")
    page = open_page(context, server)
    say(page, "hello")
    assert "You said: hello" in last_answer(page).inner_text()
    assert "does not keep" in page.locator("#toast").inner_text()
    context.close()
