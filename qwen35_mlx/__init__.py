"""Run Qwen3.5 on Apple silicon: convert, load, generate, chat."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chat.conversation import Chat
    from .engine.generate import batch_generate, embed, generate, stream_generate
    from .model.loading import load

__version__ = "0.1.0"
__all__ = ["Chat", "batch_generate", "embed", "generate", "load", "stream_generate"]

_HOMES = dict.fromkeys(__all__, ".engine.generate") | {
    "Chat": ".chat.conversation",
    "load": ".model.loading",
}


def __getattr__(name: str) -> Any:
    # Lazy: the command line must answer --help without importing MLX.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
