"""Tokens read and pictures encoded per turn of a chat with pictures, ours beside mlx-vlm.

Ten turns and six pictures on the bundled demo, greedy, without thoughts. Both programs get the same
messages and pictures, and continue with what they said themselves. Of mlx-vlm it is
`stream_generate` with its prompt cache and its cache of features, as its chat calls it, but with
all pictures of the conversation: its own chat forgets all but the newest one. Counted are tokens
that the language model is given before the first token of an answer, and pictures that the vision
tower is given. Then a session is saved and resumed, and every answer is compared with that to a
prompt which is read from its beginning. Ends with one JSON line.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
from label import label
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "demo"))
from pictures import COLOURS, SHAPES, paint

from qwen35_mlx import Chat, generate, load
from qwen35_mlx.cli.local_models import SOURCE
from qwen35_mlx.convert import convert
from qwen35_mlx.engine.prompt_cache import common_prefix
from qwen35_mlx.prompt import encode_messages

MAX_MORE_THAN_NEW = 8
MAX_TOKENS = 12
SHOWN_IN = (0, 1, 3, 5, 6, 8)
QUESTIONS = (
    "What is in the picture?",
    "What do you see?",
    "What colour is it?",
    "Describe the picture.",
    "What shape is it?",
    "What is in the picture?",
    "Which shape and colour do you see?",
    "What colour is it?",
    "What do you see?",
    "Name the shape.",
)
GREEDY = {"temperature": 0.0}


def pictures() -> list[Image.Image | None]:
    """What is shown in each turn, if anything."""
    kinds = zip(SHAPES + SHAPES[:1], COLOURS, strict=True)
    shown = {turn: paint(*kind, 24, 24, 14) for turn, kind in zip(SHOWN_IN, kinds, strict=True)}
    found = (shown.get(turn) for turn in range(len(QUESTIONS)))
    return [None if pixels is None else Image.fromarray(pixels) for pixels in found]


def ours(model: Any, tokenizer: Any, session: Path) -> dict[str, Any]:
    """Per turn: tokens read, new ones, pictures encoded; then the session from disk."""
    options: dict[str, Any] = {"enable_thinking": False, "max_tokens": MAX_TOKENS}
    chat = Chat(model, tokenizer, sampling=GREEDY, **options)
    rows, answers, known = [], [], []
    for question, picture in zip(QUESTIONS, pictures(), strict=True):
        # As in the terminal: the last answer is read while nobody waits.
        chat.read_ahead()
        if chat._cache is not None:
            known.append(list(chat._cache.ids))
        turn = chat.send(question, images=[] if picture is None else [picture])
        answers.append("".join(piece.text for piece in turn))
        prompt = encode_messages(
            tokenizer, chat.messages[:-1], add_generation_prompt=True, enable_thinking=False
        )
        new = len(prompt) - max((common_prefix(ids, prompt) for ids in known), default=0)
        rows.append((chat.stats.prefilled_tokens, new, chat.stats.pictures_encoded))
        # From the beginning, in a cache of its own.
        again = generate(model, tokenizer, chat.messages[:-1], **GREEDY, **options)
        assert again == answers[-1], (again, answers[-1])
    chat.read_ahead()
    chat.save(session)
    resumed = Chat(model, tokenizer, sampling=GREEDY, **options)
    warning = resumed.load(session)
    assert warning is None, warning
    resumed.read_ahead()
    return {
        "rows": rows,
        "answers": answers,
        "resumed_tokens": resumed._read_ahead_tokens,
        "resumed_encoded": resumed.prefixes.features.num_encoded,
        "encoded_twice": chat.prefixes.features.num_encoded - len(SHOWN_IN),
    }


@contextmanager
def counting(model: Any, counts: dict[str, int]) -> Iterator[None]:
    """Counts what mlx-vlm gives its language model and its tower."""
    language, tower = type(model.language_model), type(model.vision_tower)
    real_language, real_tower = language.__call__, tower.__call__

    def counted_language(self: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        embeddings = options.get("inputs_embeds")
        counts["tokens"] += inputs.size if embeddings is None else embeddings.shape[1]
        return real_language(self, inputs, *args, **options)

    def counted_tower(self: Any, pixels: Any, grid: Any, *args: Any, **options: Any) -> Any:
        counts["pictures"] += len(grid)
        return real_tower(self, pixels, grid, *args, **options)

    with (
        mock.patch.object(language, "__call__", counted_language),
        mock.patch.object(tower, "__call__", counted_tower),
    ):
        yield


def of_mlx_vlm(folder: Path) -> dict[str, Any]:
    """Per turn: tokens read before the first token of the answer, pictures encoded."""
    import mlx_vlm
    from mlx_vlm.vision_cache import VisionFeatureCache

    model, processor = mlx_vlm.load(str(folder))
    if mx.default_device() == mx.Device(mx.cpu):
        model.set_dtype(mx.float32)
    state, features = mlx_vlm.PromptCacheState(), VisionFeatureCache()
    messages: list[Any] = []
    shown: list[Any] = []
    rows, answers = [], []
    counts = {"tokens": 0, "pictures": 0}
    with counting(model, counts):
        for question, picture in zip(QUESTIONS, pictures(), strict=True):
            shown += [] if picture is None else [picture]
            parts = [] if picture is None else [{"type": "image"}]
            content = [*parts, {"type": "text", "text": question}]
            messages.append({"role": "user", "content": content})
            prompt = processor.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            counts.update(tokens=0, pictures=0)
            before, said = None, []
            for chunk in mlx_vlm.stream_generate(
                model,
                processor,
                prompt,
                image=list(shown),
                max_tokens=MAX_TOKENS,
                vision_cache=features,
                prompt_cache_state=state,
                **GREEDY,
            ):
                # One step is computed ahead of the first token.
                before = counts["tokens"] - 1 if before is None else before
                said.append(chunk.text)
            answers.append("".join(said).replace("<|im_end|>", "").strip())
            messages.append({"role": "assistant", "content": answers[-1]})
            rows.append((before, counts["pictures"]))
    return {"rows": rows, "answers": answers}


def measure(folder: Path) -> dict[str, Any]:
    """The keys of the JSON line; prints a table on the way. `folder` is a converted demo."""
    model, tokenizer = load(folder)
    with tempfile.TemporaryDirectory() as session:
        mine = ours(model, tokenizer, Path(session) / "chat.json")
    theirs: dict[str, Any] = {"rows": [(None, None)] * len(QUESTIONS), "answers": []}
    with suppress(ImportError):
        theirs = of_mlx_vlm(folder)
    print("turn  new  ours: read encoded  mlx-vlm: read encoded")
    for turn, (row, other) in enumerate(zip(mine["rows"], theirs["rows"], strict=True)):
        read, new, encoded = row
        print(f"{turn:4} {new:4} {read:10} {encoded:7} {other[0] or '-':>14} {other[1]!s:>7}")
    result = {
        "prefilled_over_new_max": max(read - new for read, new, _ in mine["rows"]),
        "encoded_twice": mine["encoded_twice"],
        "resumed_tokens": mine["resumed_tokens"],
        "resumed_encoded": mine["resumed_encoded"],
        "tokens_read": sum(row[0] for row in mine["rows"]),
        "pictures_encoded": sum(row[2] for row in mine["rows"]),
    }
    if theirs["answers"]:
        result["tokens_read_mlx_vlm"] = sum(row[0] for row in theirs["rows"])
        result["pictures_encoded_mlx_vlm"] = sum(row[1] for row in theirs["rows"])
        result["answers_equal"] = mine["answers"] == theirs["answers"]
    return result


def main() -> None:
    """Measure on the demo at 4 bits."""
    with tempfile.TemporaryDirectory() as work:
        result = measure(convert(SOURCE, Path(work) / "demo", bits=4))
    print(json.dumps(result | label()))
    is_fine = result["prefilled_over_new_max"] <= MAX_MORE_THAN_NEW
    zero = ("encoded_twice", "resumed_tokens", "resumed_encoded")
    sys.exit(not (is_fine and not any(result[key] for key in zero)))


if __name__ == "__main__":
    main()
