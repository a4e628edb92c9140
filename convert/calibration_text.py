"""Texts for calibration and comparison: read, encoded into rows, and checked for overlap."""

# B texts, T tokens.

import base64
import hashlib
import json
import sys
from contextlib import suppress
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

# The default texts for calibration and for comparison; they have no text in common.
TEXT_FILE = Path(__file__).parent / "calibration.txt"
HELD_OUT_FILE = Path(__file__).parent / "held_out.txt"
TEXT_TOKENS = 512
# Suffix of files with conversations.
CONVERSATIONS = ".jsonl"
# Two texts rarely have an n-gram of this length in common by chance.
NGRAM_TOKENS = 13
# Number of n-grams of the calibration text that config.json contains: 5 kB.
NUM_KEPT = 1024
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def read_text(file: Path) -> str:
    """The text of a file in UTF-8, or with a byte order mark. Raises Qwen35Error."""
    try:
        return files.read_text(file, files.MAX_CORPUS_BYTES)
    except OSError as error:
        raise Qwen35Error(f"{file} cannot be read", got=error, expected="text in UTF-8") from None


def encode(
    folder: Path, text: str | Path, length: int = TEXT_TOKENS, most: int | None = None
) -> mx.array:
    """Encode a text or a file with the tokenizer of `folder`: token ids `[B, T]`, T <= `length`.

    A file with the suffix .jsonl contains conversations in the format of training data. Other texts
    consist of passages, separated by lines of `---`; a passage `Q: … A: …` or
    `{"messages": […], "tools": […]}` is rendered with the chat template, if there is one. `most`
    limits the total number of tokens. An incomplete last row is dropped. Raises Qwen35Error for a
    text that is too short or has an unusable conversation, and if the model lacks an id.
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
            "the tokenizer produces ids that are not in the model's vocabulary",
            got=max(ids),
            expected=f"below {vocab}",
        )
    length = min(length, len(ids))
    num_rows = len(ids) // length
    return mx.array(ids[: num_rows * length]).reshape(num_rows, length)


def conversation_ids(tokenizer: Any, file: Path) -> list[int]:
    """The concatenated token ids of all conversations in a .jsonl file."""
    examples = read_examples(file, tokenizer, max_tokens=sys.maxsize).examples
    return [i for example in examples for i in example.ids.tolist()]


def _passage(tokenizer: Any, passage: str) -> list[int]:
    """The token ids of a passage; a conversation is rendered with the chat template."""
    record: Any = None
    question, found, answer = passage.removeprefix("Q: ").partition("\nA: ")
    if found and passage.startswith("Q: "):
        record = {"prompt": question.strip(), "completion": answer.strip()}
    elif passage.startswith('{"messages":'):
        # Otherwise it is a text about such a file.
        with suppress(ValueError):
            record = json.loads(passage)
    if record and getattr(tokenizer, "chat_template", None):
        return [int(i) for i in encode_example(tokenizer, record).ids]
    return list(tokenizer.encode(passage, add_special_tokens=False))


def digest(ids: mx.array) -> str:
    """A digest of token ids."""
    return hashlib.sha256(np.array(ids.astype(mx.int32)).tobytes()).hexdigest()[:32]


def sketch(ids: mx.array) -> str:
    """The lowest hashes of a text's n-grams in base64: a sample for `overlap`."""
    return base64.b64encode(_hashes(ids)[:NUM_KEPT].astype("<u4").tobytes()).decode()


def overlap(folder: Path, ids: mx.array) -> float | None:
    """The share of the text's n-grams that are in a folder's calibration or distillation text.

    None if the folder has no record of such a text. Repeated n-grams count once, because the chat
    template repeats some in all conversations. Raises CheckpointError for a damaged record.
    """
    facts = read_config(folder).get("qwen35_mlx") or {}
    shares = []
    for name in ("calibration", "distillation"):
        ngrams = (facts.get(name) or {}).get("ngrams")
        if not ngrams:
            continue
        try:
            known = np.frombuffer(base64.b64decode(ngrams), "<u4")
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"the record of the {name} text in {folder} is damaged",
                got=error,
                expected=f"base64 in qwen35_mlx.{name}.ngrams of config.json",
            ) from None
        found = _hashes(ids)
        # A longer text has a record only of its lowest hashes: compare only up to the highest one.
        found = found[found <= known.max()] if len(known) == NUM_KEPT else found
        shares.append(float(np.isin(found, known).mean()) if len(found) else 0.0)
    return max(shares, default=None)


def _hashes(ids: mx.array) -> np.ndarray:
    """The distinct 32-bit hashes of all n-grams of a text, sorted."""
    tokens = np.array(ids).astype(np.uint64).flatten()
    hashes = np.zeros(max(len(tokens) - NGRAM_TOKENS + 1, 0), np.uint64)
    for place in range(NGRAM_TOKENS):
        hashes = (hashes ^ tokens[place : place + len(hashes)]) * _MULTIPLIER
        # The high bits of a product depend on all bits of its factors: mix them into the low bits.
        hashes ^= hashes >> np.uint64(32)
    return np.unique(hashes & np.uint64(0xFFFFFFFF))
