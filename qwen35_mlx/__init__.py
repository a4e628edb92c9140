"""Run Qwen3.5 on Apple silicon: convert, load, generate, chat."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chat import Chat
    from .generate import generate, stream_generate
    from .weights import load

__version__ = "0.1.0"
__all__ = ["Chat", "generate", "load", "stream_generate"]

_HOMES = {"Chat": "chat", "generate": "generate", "load": "weights", "stream_generate": "generate"}


def __getattr__(name: str) -> Any:
    # Lazy: the command line must answer --help without importing MLX.
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(ModuleType):
    """Keeps `qwen35_mlx.generate` the function when the module of that name is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
