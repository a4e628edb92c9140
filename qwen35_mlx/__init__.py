"""Run Qwen3.5 on Apple silicon: convert, load, generate, chat."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chat.conversation import Chat
    from .engine.batch import batch_generate, embed
    from .engine.generate import generate, stream_generate
    from .model.loading import load

__version__ = "0.1.0"
__all__ = ["Chat", "batch_generate", "embed", "generate", "load", "stream_generate"]

_HOMES = {
    "Chat": ".chat.conversation",
    "batch_generate": ".engine.batch",
    "embed": ".engine.batch",
    "generate": ".engine.generate",
    "load": ".model.loading",
    "stream_generate": ".engine.generate",
}


def __getattr__(name: str) -> Any:
    # Lazy: the command line must answer --help without importing MLX.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
