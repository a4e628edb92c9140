"""Errors a user can act on: what is wrong, what was found, what was expected, and a hint."""

from collections.abc import Iterator
from contextlib import contextmanager


class Qwen35Error(ValueError):
    """A mistake in the input; the CLI prints it without a traceback."""

    def __init__(self, what: str, *, got: object = None, expected: object = None, hint: str = ""):
        lines = [what]
        if got is not None:
            lines.append(f"  got: {got}")
        if expected is not None:
            lines.append(f"  expected: {expected}")
        if hint:
            lines.append(f"  hint: {hint}")
        super().__init__("\n".join(lines))


class ConfigError(Qwen35Error):
    """The config.json describes something this project does not run."""


class CheckpointError(Qwen35Error):
    """Weights are damaged, missing, unknown or of the wrong shape."""


class MemoryRefused(Qwen35Error):
    """The model does not fit this machine; nothing of it was read."""


class PromptError(Qwen35Error):
    """The prompt cannot be run: empty, or longer than the context."""


class ContextFull(PromptError):
    """The conversation has no room for another answer; nothing of it is lost."""

    def __init__(self, num_tokens: int, context_length: int, hint: str = ""):
        super().__init__(
            "the prompt is longer than the model's context",
            got=f"{num_tokens:,} tokens",
            expected=f"fewer than {context_length:,}",
            hint=hint,
        )
        self.num_tokens, self.context_length = num_tokens, context_length


class SessionError(Qwen35Error):
    """A saved conversation is missing, damaged, in use, or cannot be written."""


class MediaError(Qwen35Error):
    """A picture, a video or a document cannot be used: unknown, damaged, too large."""


@contextmanager
def extra(name: str, needs: str, refusal: type[Qwen35Error] = Qwen35Error) -> Iterator[None]:
    """For imports of an extra's packages; if one is missing, raise how to install it."""
    try:
        yield
    except ImportError as error:
        hint = f"pip install 'qwen35-mlx[{name}]'"
        raise refusal(needs, got=error, expected=f"the extra `{name}`", hint=hint) from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).strip().partition("\n")[0]
