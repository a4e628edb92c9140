"""Texts for calibration and comparison: read, encoded into rows, and checked for overlap."""

# B texts, T tokens.

import base64
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from qwen35_mlx import files
from qwen35_mlx.config import read_config
from qwen35_mlx.errors import CheckpointError, PromptError, Qwen35Error
from qwen35_mlx.model.loading import load_tokenizer, read_generation_config
from qwen35_mlx.training.examples import encode_example, read_examples

from .source import check_folder

# What models are calibrated with, and what they are compared on; neither has text of the other.
TEXT_FILE = Path(__file__).parent / "calibration.txt"
HELD_OUT_FILE = Path(__file__).parent / "held_out.txt"
TEXT_TOKENS = 512
# Ends the name of a file with conversations.
CONVERSATIONS = ".jsonl"
# Tokens in a row that two texts rarely share by chance.
NGRAM_TOKENS = 13
# n-grams of a calibration text that a model's config.json keeps: 5 kB.
NUM_KEPT = 1024
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def read_text(file: Path) -> str:
    """The text of a file, in UTF-8 or with a byte order mark."""
    try:
        return files.read_text(file, files.MAX_CORPUS_BYTES)
    except OSError as error:
        raise Qwen35Error(f"{file} cannot be read", got=error, expected="text in UTF-8") from None


def encode(
    folder: Path, text: str | Path, length: int = TEXT_TOKENS, most: int | None = None
) -> mx.array:
    """Token ids `[B, T]` of at most `most` tokens of a text or a file, by a folder's tokenizer.

    A file whose name ends in .jsonl has conversations, as those for training. In other text lines
    of `---` separate passages; a passage `Q: … A: …` or `{"messages": […], "tools": […]}` goes
    through the chat template, if there is one. An incomplete last row is left out.
    """
    folder = Path(folder).expanduser()
    check_folder(folder)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder, config, read_generation_config(folder))
    if isinstance(text, Path) and text.suffix == CONVERSATIONS:
        ids = conversation_ids(tokenizer, text)
    else:
        text = read_text(text) if isinstance(text, Path) else text
        ids = []
        for number, passage in enumerate(text.split("\n---\n"), 1):
            try:
                ids += _passage(tokenizer, passage)
            except PromptError as error:
                got = f"passage {number}: {error}"
                raise Qwen35Error("the text has no usable conversation", got=got) from None
    ids = ids[:most]
    if len(ids) < 2:
        got = f"{len(ids)} tokens"
        raise Qwen35Error("the text is too short", got=got, expected="2 tokens or more")
    vocab = (config.get("text_config") or config)["vocab_size"]
    if max(ids) >= vocab:
        raise Qwen35Error(
            "the tokenizer produces ids that the model does not have",
            got=max(ids),
            expected=f"below {vocab}",
        )
    length = min(length, len(ids))
    num_rows = len(ids) // length
    return mx.array(ids[: num_rows * length]).reshape(num_rows, length)


def conversation_ids(tokenizer: Any, file: Path) -> list[int]:
    """Token ids of all conversations of a .jsonl file, one after the other."""
    examples = read_examples(file, tokenizer, max_tokens=sys.maxsize).examples
    return [i for example in examples for i in example.ids.tolist()]


def _passage(tokenizer: Any, passage: str) -> list[int]:
    """Ids of a passage of a plain text."""
    record: Any = None
    question, found, answer = passage.removeprefix("Q: ").partition("\nA: ")
    if found and passage.startswith("Q: "):
        record = {"prompt": question.strip(), "completion": answer.strip()}
    elif passage.startswith('{"messages":'):
        try:
            record = json.loads(passage)
        except ValueError:
            # Text about such a file.
            record = None
    if record and getattr(tokenizer, "chat_template", None):
        return [int(i) for i in encode_example(tokenizer, record).ids]
    return list(tokenizer.encode(passage, add_special_tokens=False))


def sketch(ids: mx.array) -> str:
    """The n-grams of a text with the lowest hashes, in base64: a sample that `overlap` knows."""
    return base64.b64encode(_hashes(ids)[:NUM_KEPT].astype("<u4").tobytes()).decode()


def overlap(folder: Path, ids: mx.array) -> float | None:
    """The share of the text's n-grams that a folder's calibration or distillation has read.

    None if the folder does not say. An n-gram that is there several times counts once: what the
    chat template writes around each message is no overlap.
    """
    facts = read_config(folder).get("qwen35_mlx") or {}
    read = {name: (facts.get(name) or {}).get("ngrams") for name in ("calibration", "distillation")}
    shares = []
    for name, ngrams in read.items():
        if not ngrams:
            continue
        try:
            known = np.frombuffer(base64.b64decode(ngrams), "<u4")
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"{folder} does not tell its text of {name}",
                got=error,
                expected=f"base64 in qwen35_mlx.{name}.ngrams of config.json",
            ) from None
        found = _hashes(ids)
        # Of a longer text only hashes up to the highest that was kept are known.
        found = found[found <= known.max()] if len(known) == NUM_KEPT else found
        shares.append(float(np.isin(found, known).mean()) if len(found) else 0.0)
    return max(shares, default=None)


def _hashes(ids: mx.array) -> np.ndarray:
    """Hashes in 32 bits of all n-grams of a text, each once, in their order."""
    tokens = np.array(ids).astype(np.uint64).flatten()
    hashes = np.zeros(max(len(tokens) - NGRAM_TOKENS + 1, 0), np.uint64)
    for place in range(NGRAM_TOKENS):
        hashes = (hashes ^ tokens[place : place + len(hashes)]) * _MULTIPLIER
        # The high bits of a product depend on all of its factors' bits: mix them down.
        hashes ^= hashes >> np.uint64(32)
    return np.unique(hashes & np.uint64(0xFFFFFFFF))
