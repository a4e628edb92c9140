"""Markdown to safe HTML, because the model's output is untrusted."""

import re
import time
from collections.abc import Iterator, Sequence
from html import escape
from io import StringIO
from typing import Any, NamedTuple

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

MAX_CHARS = 32_000
# Slow regular expressions of lexers are slow within a line.
MAX_CODE_LINE_CHARS = 1_000
MAX_MATH_CHARS = 2_000
HIGHLIGHT_SECONDS = 0.25
LINK = re.compile(r"(?:https?://|mailto:)[^\s]", re.IGNORECASE)
NEWLINE = re.compile(r"\r\n?|\n")
# Pygments has hundreds of lexers; some are extremely slow on crafted text.
LANGUAGES = frozenset(
    "bash c c# c++ clojure cmake console cpp csharp css dart diff docker dockerfile elixir go "
    "graphql haskell html ini java javascript js json julia jsx kotlin latex lua make makefile "
    "objective-c perl php powershell py pycon python python3 r rb rs ruby rust scala scss sh "
    "shell sql swift tex toml ts tsx typescript xml yaml yml zig zsh".split()
)
Tokens = Sequence[Token]
MATH = {r"\(": r"\)", r"\[": r"\]", "$$": "$$", "$": "$"}


class Rendered(NamedTuple):
    """Rendered Markdown; the last block is separate, because it may still grow."""

    html: str
    """The blocks before the last one."""
    tail: str
    """The last block."""
    tail_line: int
    """The line of the text at which the last block starts."""


class _SlowLexer(Exception):
    """Highlighting takes too long."""


class _Markdown(MarkdownIt):
    def validateLink(self, url: str) -> bool:
        """Whether a link is allowed; a refused one stays text."""
        return LINK.match(url) is not None


def render(text: str) -> Rendered:
    """Render at most MAX_CHARS of Markdown; raises ValueError for a longer text."""
    if len(text) > MAX_CHARS:
        raise ValueError(f"text has {len(text)} characters; at most {MAX_CHARS} are rendered")
    # Lone surrogates have no UTF-8.
    text = NEWLINE.sub("\n", text.encode("utf-8", "replace").decode())
    env: dict[str, Any] = {}
    tokens = _MARKDOWN.parse(text, env)
    last = len(tokens)
    while last and not _starts_block(tokens[last - 1]):
        last -= 1
    last = max(0, last - 1)
    block = tokens[last].map if tokens else None
    return Rendered(
        _MARKDOWN.renderer.render(tokens[:last], _MARKDOWN.options, env),
        _MARKDOWN.renderer.render(tokens[last:], _MARKDOWN.options, env),
        block[0] if block else 0,
    )


def highlight(code: str, language: str) -> str:
    """Code as HTML, without its last line break, with Pygments' classes for known languages."""
    longest = max(map(len, code.split("\n")))
    if language.lower() not in LANGUAGES or longest > MAX_CODE_LINE_CHARS:
        return escape(code)
    lexer = get_lexer_by_name(language.lower(), stripnl=False, ensurenl=False)
    out = StringIO()
    try:
        HtmlFormatter(nowrap=True).format(_in_time(lexer.get_tokens(code)), out)
    except _SlowLexer:
        return escape(code)
    # The formatter adds a line break.
    return out.getvalue().removesuffix("\n")


def _in_time(tokens: Iterator) -> Iterator:
    deadline = time.monotonic() + HIGHLIGHT_SECONDS
    for token in tokens:
        if time.monotonic() > deadline:
            raise _SlowLexer
        yield token


def _starts_block(token: Token) -> bool:
    return token.level == 0 and token.nesting >= 0 and token.map is not None


def _math(state: StateInline, silent: bool) -> bool:
    """Keep formulas as written; otherwise underscores would become emphasis."""
    source, start = state.src, state.pos
    opening = next((o for o in MATH if source.startswith(o, start)), None)
    if opening is None:
        return False
    inside = start + len(opening)
    close = source.find(MATH[opening], inside, min(state.posMax, inside + MAX_MATH_CHARS))
    if close < 0 or not source[inside:close].strip():
        return False
    end = close + len(MATH[opening])
    # "$5 and $6" are prices.
    is_price = (
        source[inside].isspace() or source[close - 1].isspace() or source[end : end + 1].isdigit()
    )
    if opening == "$" and is_price:
        return False
    if not silent:
        state.push("math", "", 0).content = source[start:end]
    state.pos = end
    return True


class _Html(RendererHTML):
    """Renders tokens; each method is named after the type of its tokens."""

    def fence(self, tokens: Tokens, idx: int, options: OptionsDict, env: EnvType) -> str:
        words = tokens[idx].info.split(maxsplit=1)
        language = words[0][:40] if words else ""
        label = f' data-language="{escape(language)}"' if language else ""
        # The parser adds a line break to unfinished code, whose last line may still grow.
        code = highlight(tokens[idx].content.rstrip(), language)
        return f"<pre{label}><code>{code}</code></pre>\n"

    code_block = fence

    def math(self, tokens: Tokens, idx: int, options: OptionsDict, env: EnvType) -> str:
        return f'<span class="math">{escape(tokens[idx].content)}</span>'

    def image(self, tokens: Tokens, idx: int, options: OptionsDict, env: EnvType) -> str:
        """Only its name and address: loading it could send data to a foreign server."""
        address = escape(str(tokens[idx].attrGet("src")))
        name = escape(tokens[idx].content or "picture")
        return f'<span class="picture" title="{address}">{name}</span>'

    def link_open(self, tokens: Tokens, idx: int, options: OptionsDict, env: EnvType) -> str:
        tokens[idx].attrSet("rel", "noopener noreferrer nofollow")
        tokens[idx].attrSet("target", "_blank")
        return self.renderToken(tokens, idx, options, env)

    def table_open(self, tokens: Tokens, idx: int, options: OptionsDict, env: EnvType) -> str:
        """A frame that scrolls, also by keyboard."""
        return '<div class="table" tabindex="0"><table>\n'

    def table_close(self, tokens: Tokens, idx: int, options: OptionsDict, env: EnvType) -> str:
        return "</table></div>\n"

    def td_open(self, tokens: Tokens, idx: int, options: OptionsDict, env: EnvType) -> str:
        """Alignment as a class, because the page's policy forbids inline styles."""
        align = str(tokens[idx].attrs.pop("style", "")).removeprefix("text-align:")
        if align:
            tokens[idx].attrSet("class", align)
        return self.renderToken(tokens, idx, options, env)

    th_open = td_open


_MARKDOWN = _Markdown("commonmark", {"html": False, "xhtmlOut": False}, renderer_cls=_Html)
_MARKDOWN.enable(["table", "strikethrough"])
_MARKDOWN.inline.ruler.before("escape", "math", _math)
