"""Training data of an adapter: lines of JSON to token ids, and batches of them.

B batch, T tokens.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import PromptError, Qwen35Error, first_line
from ..files import MAX_CORPUS_BYTES, read_text
from ..prompt import encode_messages, encode_prompt

TRAIN_FILE, VALID_FILE = "train.jsonl", "valid.jsonl"
# Batch lengths are multiples of this: fewer lengths need fewer compilations.
LENGTH_MULTIPLE = 32
# Fields of a message, their types, and the types in words.
FIELDS: dict[str, tuple[Any, str]] = {
    "role": (str, "text"),
    "content": (str | list | None, "text, a list of parts, or null"),
    "reasoning_content": (str | None, "text or null"),
    "tool_calls": (list | None, "a list of calls, or null"),
}
FORMS = '{"messages": […]}, {"prompt": …, "completion": …} or {"text": …}'


@dataclass(frozen=True)
class Example:
    """Token ids, and the index of the first one to learn."""

    ids: np.ndarray
    first_target: int


@dataclass(frozen=True)
class Examples:
    """The examples of a file, and how many were cut or dropped."""

    examples: Sequence[Example]
    # SHA-256 of the file's text.
    digest: str = ""
    # Examples that were too long; dropped are those that have no token to learn after the cut.
    num_cut: int = 0
    num_dropped: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples."""
        return sum(len(example.ids) for example in self.examples)

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max((len(example.ids) for example in self.examples), default=0)


def read_examples(
    file: Path, tokenizer: Any, *, max_tokens: int, mask_prompt: bool = False
) -> Examples:
    """Read a file of JSON lines, each a conversation, a prompt with its completion, or a text.

    `mask_prompt`: only the last answer is learned; otherwise every token except the first.
    """
    text = read_text(file, MAX_CORPUS_BYTES)
    found, num_cut, num_dropped = [], 0, 0
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            example = encode_example(tokenizer, json.loads(line), mask_prompt)
        except (ValueError, RecursionError) as error:
            # Our own errors have several lines; of others, the first line is enough.
            reason = str(error) if isinstance(error, Qwen35Error) else first_line(error)
            raise Qwen35Error(
                f"line {number} of {file} is no example", got=reason, expected=FORMS
            ) from None
        num_cut += len(example.ids) > max_tokens
        example = Example(example.ids[:max_tokens], example.first_target)
        if example.first_target < len(example.ids):
            found.append(example)
        else:
            num_dropped += 1
    if not found:
        raise Qwen35Error(
            f"{file} has no example to train on",
            got=f"{num_dropped} examples whose answer begins after {max_tokens:,} tokens",
            expected=FORMS,
        )
    return Examples(found, hashlib.sha256(text.encode()).hexdigest(), num_cut, num_dropped)


def encode_example(tokenizer: Any, record: Any, mask_prompt: bool = False) -> Example:
    """One example; raises PromptError if `record` is not usable."""
    if not isinstance(record, Mapping):
        raise PromptError("not a JSON object", got=type(record).__name__)
    if "text" in record and "messages" not in record:
        if mask_prompt:
            raise PromptError("a text has no prompt to mask", expected="messages or a completion")
        ids = encode_prompt(tokenizer, _string(record, "text"))
        ends = tokenizer.eos_token_ids
        return _example(ids if ids[-1] in ends else [*ids, tokenizer.eos_token_id], 1)
    messages = record.get("messages")
    if messages is None:
        messages = [
            {"role": "user", "content": _string(record, "prompt")},
            {"role": "assistant", "content": _string(record, "completion")},
        ]
    _check_fields(messages, record.get("tools"))
    template = {"tools": record["tools"]} if record.get("tools") else {}
    ids = encode_messages(tokenizer, messages, add_generation_prompt=False, **template)
    if not mask_prompt:
        return _example(ids, 1)
    last = messages[-1]
    if not isinstance(last, Mapping) or last.get("role") != "assistant" or len(messages) < 2:
        raise PromptError("no answer to train on", expected="a last message by the assistant")
    prompt = encode_messages(tokenizer, messages[:-1], add_generation_prompt=True, **template)
    # The prompt may open a thought that the answer does not have.
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(ids, prompt, strict=False))
    return _example(ids, max(sum(1 for _ in shared), 1))


def _check_fields(messages: Any, tools: Any) -> None:
    """Raise PromptError with the name of the first field that templates cannot take."""
    if not isinstance(messages, list) or not messages:
        raise PromptError("messages are no list", got=repr(messages)[:60])
    _check("tools", tools, list | None, "a list of tools, or null")
    for i, tool in enumerate(tools or ()):
        _check(f"tools[{i}]", tool, Mapping, "an object")
    for i, message in enumerate(messages):
        _check(f"messages[{i}]", message, Mapping, "an object")
        for name, (kind, words) in FIELDS.items():
            _check(f"messages[{i}].{name}", message.get(name), kind, words)


def _check(field: str, value: Any, kind: Any, words: str) -> None:
    if not isinstance(value, kind):
        raise PromptError(f"{field} is not usable", got=repr(value)[:60], expected=words)


def _string(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value:
        raise PromptError(f"no {key}", got=repr(value)[:60])
    return value


def _example(ids: Sequence[int], first_target: int) -> Example:
    if min(ids) < 0:
        raise PromptError("an example has a picture", expected="text: the tower is not trained")
    return Example(np.array(ids, dtype=np.int32), first_target)


def batches(
    examples: Sequence[Example], batch_size: int, seed: int | None = None, start: int = 0
) -> Iterator[tuple[mx.array, mx.array]]:
    """Yield ids `[B, T]` and spans `[B, 2]`: the first token to learn, and the length of each row.

    Examples of similar length share a batch. With a seed the batches never end, start at batch
    `start`, and every epoch has its own order; without a seed, each batch comes once.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    position = start
    while seed is not None or position < len(groups):
        epoch, index = divmod(position, len(groups))
        if seed is not None:
            index = np.random.default_rng([seed, epoch]).permutation(len(groups))[index]
        yield _batch([examples[i] for i in groups[index]])
        position += 1


def padded_length(num_tokens: int) -> int:
    """Length of a batch whose longest example has `num_tokens`; the last token is no input."""
    return 1 + LENGTH_MULTIPLE * -(-(num_tokens - 1) // LENGTH_MULTIPLE)


def _batch(examples: Sequence[Example]) -> tuple[mx.array, mx.array]:
    longest = max(len(example.ids) for example in examples)
    ids = np.zeros((len(examples), padded_length(longest)), np.int32)
    for row, example in zip(ids, examples, strict=True):
        row[: len(example.ids)] = example.ids
    return mx.array(ids), mx.array([[e.first_target, len(e.ids)] for e in examples])
