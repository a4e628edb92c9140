"""Prompts to token ids: text, ids, or messages through the chat template."""

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import PromptError
from .text.control_tokens import ControlTokens, control_tokens
from .text.messages import for_template

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
# Kinds of content in a message, by its type or its key, that only the vision tower could read.
PICTURES = {"image", "image_url", "video", "video_url"}
# A thought in front of an answer, as servers give it that do not take them apart; the prompt may
# have opened it.
INLINE_THOUGHT = re.compile(
    r"\s*<think>(.*?)</think>|((?:(?!<think>).)*?)\n</think>\n\n", re.DOTALL
)


def encode_prompt(
    tokenizer: Any, prompt: Prompt, *, enable_thinking: bool | None = None
) -> list[int]:
    """Token ids of a raw text, of ids as they are, or of messages through the chat template."""
    if isinstance(prompt, str):
        ids = _encoded(_unwrapped(tokenizer), prompt)
    elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        ids = encode_messages(
            tokenizer, prompt, add_generation_prompt=True, enable_thinking=enable_thinking
        )
    else:
        ids = _token_ids(prompt)
    if not ids:
        raise PromptError("the prompt is empty", got=repr(prompt), expected="at least one token")
    return ids


def _token_ids(prompt: Any) -> list[int]:
    """Whole numbers out of a list or an array."""
    try:
        if isinstance(prompt, bytes | bytearray):
            raise TypeError
        return [operator.index(i) for i in getattr(prompt, "tolist", lambda: prompt)()]
    except TypeError:
        raise PromptError(
            "the prompt is not usable",
            got=repr(prompt)[:80],
            expected="text, a list of token ids, or a list of messages",
        ) from None


def encode_messages(tokenizer: Any, messages: Sequence[Any], **options: Any) -> list[int]:
    """The chat template's rendering of `messages` as token ids; options as in `render_messages`."""
    return encode_text(tokenizer, render_messages(tokenizer, messages, **options))


def render_messages(
    tokenizer: Any,
    messages: Sequence[Any],
    *,
    add_generation_prompt: bool,
    enable_thinking: bool | None = None,
    **template: Any,
) -> str:
    """The chat template's rendering of `messages` as text, for `encode_text`.

    enable_thinking None leaves it to the template, which differs between the models. Names of
    control tokens in messages and tools are marked, so that they stay text.
    """
    if enable_thinking is not None:
        template["enable_thinking"] = enable_thinking
    tokenizer = _unwrapped(tokenizer)
    chat_template = getattr(tokenizer, "chat_template", None)
    if chat_template is None and not getattr(tokenizer, "chat_templates", None):
        raise PromptError(
            "this model has no chat template",
            got="no chat_template.jinja, no chat_template.json, none in tokenizer_config.json",
            hint="give the prompt as plain text, or copy the template into the model's folder",
        )
    _refuse_pictures(messages)
    has_thoughts = "reasoning_content" in str(chat_template)
    conversation = [_message(message, has_thoughts) for message in for_template(messages)]
    template = _plain(template)
    if controls := _controls(tokenizer):
        conversation, template = controls.protect(conversation), controls.protect(template)
    try:
        return str(
            tokenizer.apply_chat_template(
                conversation,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **template,
            )
        )
    # A template is a program and fails in its own ways.
    except Exception as error:
        raise PromptError("the chat template refuses these messages", got=error) from None


def _refuse_pictures(messages: Sequence[Any]) -> None:
    """The template would leave a placeholder, which the text model reads as if it were a word."""
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        for item in content if isinstance(content, list | tuple) else ():
            if isinstance(item, Mapping) and PICTURES & {*item, str(item.get("type"))}:
                raise PromptError(
                    "this program reads no pictures and no videos",
                    got=f"{item.get('type') or 'a picture'} in a message",
                    expected="text",
                )


def _plain(value: Any) -> Any:
    """What a template may see: JSON's types and nothing with methods of its own."""
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
    """A message of JSON's types; its thought is apart if the template takes it so."""
    plain = _plain(message)
    if not isinstance(message, Mapping) or plain.get("role") != "assistant" or not has_thoughts:
        return plain
    names = ("reasoning_content", "reasoning", "thinking")
    given = next((plain[name] for name in names if plain.get(name) is not None), None)
    content = plain.get("content")
    if given is not None:
        plain["reasoning_content"] = given
    elif isinstance(content, str) and THINK_CLOSE in content:
        # Here, not in the template: that looks for tags, and those in a text are marked.
        if not (thought := INLINE_THOUGHT.match(content)):
            return plain
        plain["reasoning_content"] = (thought[1] or thought[2] or "").strip("\n")
        plain["content"] = content[thought.end() :].lstrip("\n")
    return plain


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text from `render_messages`, or of a part of it."""
    tokenizer = _unwrapped(tokenizer)
    return _encoded(_controls(tokenizer) or tokenizer, text)


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
    """The control tokens of our tokenizer or of transformers'; None of what has no such core."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else control_tokens(backend)


def _unwrapped(tokenizer: Any) -> Any:
    """Without mlx-lm's wrapper, which would decide on thinking for the template."""
    inner = getattr(tokenizer, "_tokenizer", None)
    return inner if hasattr(inner, "apply_chat_template") else tokenizer


def check_length(
    num_prompt: int,
    context_length: int,
    refusal: type[PromptError] = PromptError,
    hint: str = "shorten it, or convert with YaRN rope_parameters in the source's config.json",
) -> None:
    """A prompt must leave room for at least one token of an answer."""
    if num_prompt >= context_length:
        raise refusal(
            "the prompt is longer than the model's context",
            got=f"{num_prompt:,} tokens",
            expected=f"fewer than {context_length:,}",
            hint=hint,
        )


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Ids outside the embedding would read memory that is not there."""
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise PromptError(
            "the prompt has a token id that the model does not know",
            got=wrong,
            expected=f"0 to {vocab_size - 1}",
            hint="is this tokenizer that of the model?",
        )
