"""Prompts to token ids: text, ids, or messages through the chat template."""

import operator
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import ContextFull, PromptError
from .media.tokens import MediaToken, Span
from .text.control_tokens import ControlTokens, control_tokens
from .text.media_parts import media_of, opened, source_parts
from .text.messages import for_template

if TYPE_CHECKING:
    from .media.settings import VisionSettings
    from .text.media_parts import Media

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
VISION_TOKENS = (VISION_START, VISION_END, "<|vision_pad|>", IMAGE_PAD, VIDEO_PAD)
PLACEHOLDER = re.compile("|".join(map(re.escape, (IMAGE_PAD, VIDEO_PAD))))
WRAPPED_VIDEO = re.compile(
    f"({re.escape(VISION_START)})?{re.escape(VIDEO_PAD)}({re.escape(VISION_END)})?"
)
# A thought in front of an answer, from servers that do not separate the two; the prompt may have
# opened it.
INLINE_THOUGHT = re.compile(
    r"\s*<think>(.*?)</think>|((?:(?!<think>).)*?)\n</think>\n\n", re.DOTALL
)


class PromptText(str):
    """A rendered prompt; `spans` are the pictures of its placeholders, in order."""

    spans: tuple[Span, ...] = ()

    @classmethod
    def of(cls, text: str, spans: Sequence[Span]) -> "PromptText":
        """A text and the pictures of its placeholders."""
        prompt = cls(text)
        prompt.spans = tuple(spans)
        return prompt

    def part(self, start: int, stop: int | None = None) -> "PromptText":
        """A slice of the text with its pictures."""
        text = str(self)[start:stop]
        if not self.spans:
            return PromptText(text)
        first = len(PLACEHOLDER.findall(self[:start]))
        return PromptText.of(text, self.spans[first : first + len(PLACEHOLDER.findall(text))])


def encode_prompt(
    tokenizer: Any,
    prompt: Prompt,
    *,
    enable_thinking: bool | None = None,
    images: Sequence[Any] | None = None,
    videos: Sequence[Any] | None = None,
    allow_url: bool = False,
) -> list[int]:
    """Token ids of a raw text, of ids, or of messages through the chat template.

    With pictures or videos, a text becomes a message. They come before the last message's text.
    """
    if parts := source_parts(images, videos):
        prompt = _with_parts(prompt, parts)
    if isinstance(prompt, str):
        ids = _encoded(_unwrapped(tokenizer), prompt)
    elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        ids = encode_messages(
            tokenizer,
            prompt,
            add_generation_prompt=True,
            enable_thinking=enable_thinking,
            allow_url=allow_url,
        )
    else:
        ids = _token_ids(prompt)
    if not ids:
        raise PromptError("the prompt is empty", got=repr(prompt), expected="at least one token")
    return ids


def _with_parts(prompt: Any, parts: list[Any]) -> list[Any]:
    """The messages, with `parts` at the beginning of the user's last one."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    for i in range(len(messages) - 1, -1, -1):
        if isinstance(messages[i], Mapping) and messages[i].get("role") == "user":
            content = messages[i].get("content")
            if not isinstance(content, list | tuple):
                content = [{"type": "text", "text": content or ""}]
            messages[i] = {**messages[i], "content": [*parts, *content]}
            return messages
    raise PromptError(
        "there is no message of the user for the pictures",
        got=repr(prompt)[:80],
        expected="text, or messages with at least one of the user",
    )


def _token_ids(prompt: Any) -> list[int]:
    """Integers from a list or an array; placeholders of pictures stay MediaTokens."""
    try:
        if isinstance(prompt, bytes | bytearray):
            raise TypeError
        ids = getattr(prompt, "tolist", lambda: prompt)()
        return [i if isinstance(i, MediaToken) else operator.index(i) for i in ids]
    except TypeError:
        raise PromptError(
            "the prompt is not usable",
            got=repr(prompt)[:80],
            expected="text, a list of token ids, or a list of messages",
        ) from None


def encode_messages(tokenizer: Any, messages: Sequence[Any], **options: Any) -> list[int]:
    """The chat template's rendering of `messages` as token ids; options as in `render_messages`.

    The ids of a picture or video are `MediaToken`s, which refer to it.
    """
    return encode_text(tokenizer, render_messages(tokenizer, messages, **options))


def render_messages(
    tokenizer: Any,
    messages: Sequence[Any],
    *,
    add_generation_prompt: bool,
    enable_thinking: bool | None = None,
    allow_url: bool = False,
    **template: Any,
) -> PromptText:
    """The chat template's rendering of `messages` as text, for `encode_text`.

    enable_thinking: None leaves it to the template; the models differ. Names of control tokens in
    messages and tools are marked, so that they stay text. `allow_url`: fetch pictures from the web.
    """
    if enable_thinking is not None:
        template["enable_thinking"] = enable_thinking
    tokenizer = _unwrapped(tokenizer)
    chat_template = getattr(tokenizer, "chat_template", None)
    if chat_template is None and not getattr(tokenizer, "chat_templates", None):
        raise PromptError(
            "this model has no chat template",
            got="no chat_template.jinja, no chat_template.json, none in tokenizer_config.json",
            hint="`qwen35-mlx generate --raw` continues a plain text, as generate and "
            "stream_generate of Python do; or copy the template into the model's folder",
        )
    messages = open_messages(tokenizer, messages, allow_url=allow_url)
    media = media_of(messages)
    has_thoughts = "reasoning_content" in str(chat_template)
    conversation = [_message(message, has_thoughts) for message in for_template(messages)]
    template = _plain(template)
    if controls := _controls(tokenizer):
        conversation, template = controls.protect(conversation), controls.protect(template)
    try:
        text = str(
            tokenizer.apply_chat_template(
                conversation,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **template,
            )
        )
    # A template is a program and may raise anything.
    except Exception as error:
        raise PromptError("the chat template refuses these messages", got=error) from None
    return _with_media(tokenizer, text, media) if media else PromptText(text)


def open_messages(
    tokenizer: Any, messages: Sequence[Any], *, allow_url: bool = False
) -> Sequence[Any]:
    """The messages with their pictures and videos opened, prepared for this model.

    Sources are paths and data: URLs, and web addresses with `allow_url`.
    """
    settings, why_none = vision_settings(tokenizer)
    return opened(messages, settings, why_none=why_none, allow_url=allow_url)


def vision_settings(tokenizer: Any) -> "tuple[VisionSettings | None, str]":
    """The model's picture settings, or the reason why it reads no pictures; `load` sets both."""
    tokenizer = _unwrapped(tokenizer)
    return getattr(tokenizer, "vision", None), getattr(tokenizer, "no_vision", "")


def _with_media(tokenizer: Any, text: str, media: "Sequence[Media]") -> PromptText:
    """A rendered text with its pictures; a video becomes one placeholder for each frame group."""
    from .media.settings import KEEPS_OUTER_PAIR
    from .media.video import Video

    videos = [m for m in media if isinstance(m, Video)]
    expected = [VIDEO_PAD if isinstance(m, Video) else IMAGE_PAD for m in media]
    found = PLACEHOLDER.findall(text)
    if not media_ids(tokenizer).keys() >= set(expected) or found != expected:
        raise PromptError(
            "the chat template does not show all pictures and videos",
            got=", ".join(found)[:200] or "no placeholder",
            expected=", ".join(expected)[:200],
            hint="use the chat template and the tokenizer of the model's authors",
        )
    remaining = iter(videos)

    def groups(wrapped: re.Match[str]) -> str:
        before, behind = wrapped[1] or "", wrapped[2] or ""
        text = "".join(
            f"<{seconds:.1f} seconds>{VISION_START}{VIDEO_PAD}{VISION_END}"
            for seconds in next(remaining).timestamps
        )
        return text if before and behind and not KEEPS_OUTER_PAIR else before + text + behind

    if videos:
        text = WRAPPED_VIDEO.sub(groups, text)
    return PromptText.of(text, [span for m in media for span in m.spans])


def _plain(value: Any) -> Any:
    """The value in JSON's types: a template must not call methods of other objects."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return f"<{type(value).__name__}>"


def _message(message: Any, has_thoughts: bool) -> Any:
    """A message in JSON's types, with a separate thought if the template supports that."""
    plain = _plain(message)
    if not isinstance(message, Mapping) or plain.get("role") != "assistant" or not has_thoughts:
        return plain
    names = ("reasoning_content", "reasoning", "thinking")
    given = next((plain[name] for name in names if plain.get(name) is not None), None)
    content = plain.get("content")
    if given is not None:
        plain["reasoning_content"] = given
    elif isinstance(content, str) and THINK_CLOSE in content:
        # The template cannot do this: it looks for tags, and tags in a text are marked.
        if not (thought := INLINE_THOUGHT.match(content)):
            return plain
        plain["reasoning_content"] = (thought[1] or thought[2] or "").strip("\n")
        plain["content"] = content[thought.end() :].lstrip("\n")
    return plain


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text from `render_messages`, or of a part of it."""
    tokenizer = _unwrapped(tokenizer)
    ids = _encoded(_controls(tokenizer) or tokenizer, text)
    spans = getattr(text, "spans", ())
    if not spans:
        return ids
    known = media_ids(tokenizer)
    placeholders = {known[name] for name in (IMAGE_PAD, VIDEO_PAD) if name in known}
    expanded: list[int] = []
    remaining = list(spans[::-1])
    for token in ids:
        if token not in placeholders:
            expanded.append(token)
        elif remaining:
            expanded += remaining.pop().tokens()
        else:
            raise _unmatched(ids, placeholders, spans)
    if remaining:
        raise _unmatched(ids, placeholders, spans)
    return expanded


def _unmatched(ids: Sequence[int], placeholders: set[int], spans: Sequence[Span]) -> PromptError:
    return PromptError(
        "placeholders and pictures do not match",
        got=f"{sum(i in placeholders for i in ids)} placeholders",
        expected=len(spans),
        hint="check that this is the tokenizer of the model",
    )


def media_ids(tokenizer: Any) -> dict[str, int]:
    """Ids of the tokens around pictures and of their placeholders, by name, if they exist."""
    backend = getattr(_unwrapped(tokenizer), "backend_tokenizer", None)
    found = {} if backend is None else {name: backend.token_to_id(name) for name in VISION_TOKENS}
    return {name: i for name, i in found.items() if i is not None}


def banned_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that a model with a vision tower must not generate: placeholders of pictures."""
    has_tower = getattr(model, "vision_tower", None) is not None
    return list(media_ids(tokenizer).values()) if has_tower else []


def without_media(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """The ids with each `MediaToken` replaced by the id of its placeholder token."""
    if min(ids, default=0) >= 0:
        return list(ids)
    from .media.video import Video

    pads = media_ids(tokenizer)
    return [
        pads[VIDEO_PAD if isinstance(i.span.media, Video) else IMAGE_PAD]
        if isinstance(i, MediaToken)
        else i
        for i in ids
    ]


def _encoded(encoder: Any, text: str) -> list[int]:
    try:
        if isinstance(encoder, ControlTokens):
            return encoder.encode(text)
        return list(encoder.encode(text, add_special_tokens=False))
    except (TypeError, UnicodeError):
        raise PromptError(
            "the prompt is not valid Unicode",
            got=ascii(text)[:80],
            expected="text without surrogates",
        ) from None


def _controls(tokenizer: Any) -> ControlTokens | None:
    """The control tokens of our tokenizer or transformers'; None without a `tokenizers` backend."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else control_tokens(backend)


def _unwrapped(tokenizer: Any) -> Any:
    """The tokenizer inside mlx-lm's wrapper, which would override enable_thinking."""
    inner = getattr(tokenizer, "_tokenizer", None)
    return inner if hasattr(inner, "apply_chat_template") else tokenizer


def check_length(
    num_prompt: int,
    context_length: int,
    hint: str = "shorten it, or convert with YaRN rope_parameters in the source's config.json",
) -> None:
    """A prompt must leave room for at least one token of an answer."""
    if num_prompt >= context_length:
        raise ContextFull(num_prompt, context_length, hint)


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Refuse ids outside of the embedding, which would read invalid memory."""
    if min(ids) < 0 or max(ids) >= vocab_size:
        known = range(vocab_size)
        wrong = [i for i in ids if i not in known and not isinstance(i, MediaToken)]
        if wrong:
            raise PromptError(
                "the prompt has a token id that the model does not know",
                got=wrong[0],
                expected=f"0 to {vocab_size - 1}",
                hint="check that this is the tokenizer of the model",
            )
