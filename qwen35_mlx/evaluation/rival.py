"""mlx-lm on the same folder, for comparison; it is not a dependency."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import Qwen35Error
from ..kernels.matrix import arrays_of
from ..model.language import Model
from .bench import Conversation


def mlx_lm_program(folder: Path, model: Model) -> Callable[[], Conversation]:
    """Greedy conversations with mlx-lm's own model and generator.

    It shares the arrays of `model`, so no second copy takes memory, unless it needs other ones.
    """
    try:
        from mlx_lm.utils import load_model
    except ImportError:
        raise Qwen35Error(
            "mlx-lm is not installed",
            expected="the program to compare with",
            hint="pip install mlx-lm",
        ) from None
    theirs, _ = load_model(folder, lazy=True)
    with suppress(ValueError):
        arrays = arrays_of({"language_model": model.language_model.parameters()})
        theirs.load_weights(list(arrays.items()), strict=True)
    mx.eval(theirs.parameters())
    return lambda: mlx_lm_conversation(theirs)


def mlx_lm_conversation(model: Any) -> Conversation:
    """A conversation with an empty cache of mlx-lm."""
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)

    def turn(ids: list[int], num_tokens: int) -> Iterator[int]:
        steps = generate_step(mx.array(ids), model, max_tokens=num_tokens, prompt_cache=cache)
        yield from (int(token) for token, _ in steps)
        # It still evaluates the last token; wait, so that this is not measured with the next turn.
        mx.eval([entry.state for entry in cache])

    return turn
