"""The tokenizer: the ids and texts of transformers, on every text and from every kind of folder."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO
from everyday import everyday
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from transformers import AutoTokenizer

from qwen35_mlx.errors import CheckpointError
from qwen35_mlx.text.detokenizer import token_bytes
from qwen35_mlx.text.tokenizer import NAMED, Tokenizer, _add, read_tokenizer

WORDS = """the quick don't I'LL 1234 x):\n    return\n\n\n\t\t漢字 кириллица नमस्ते สวัสดี 👩‍👩‍👧 🇩🇪
e\u0301 \u212a \u0338 <think </think >< <|im_ _end|>""".split(" ")
ODD = "\0\x01\x1b\x7f\x85\ufeff\u200b\u200d\u2028\ufffd\uffff\ufdd0 \t\n\r\u00a0\u3000"
PLANES = [(0, 0x17F), (0x300, 0x36F), (0x80, 0xD7FF), (0xE000, 0x1FFFF), (0x20000, 0x10FFFF)]


def random_text(chance: random.Random, added: list[str]) -> str:
    """Words, odd characters of every plane, white space, and added tokens, whole and cut."""
    parts: list[str] = []
    for _ in range(chance.randint(0, 12)):
        kind = chance.randrange(5)
        if kind == 0:
            parts.append(chance.choice(WORDS))
        elif kind == 1:
            parts.append(chance.choice(ODD) * chance.randint(1, 4))
        elif kind == 2:
            parts.append(chance.choice(added)[: chance.choice([None, None, chance.randint(1, 9)])])
        else:
            parts += [chr(chance.randint(*chance.choice(PLANES))) for _ in range(3)]
    return "".join(parts)


def read(folder: Path) -> Tokenizer:
    return read_tokenizer(folder, json.loads((folder / "config.json").read_text()))


def assert_equal_to_transformers(folder: Path, num_texts: int = 60) -> Tokenizer:
    ours, theirs = read(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.vocab_size, len(ours)) == (theirs.vocab_size, len(theirs))
    for name in [*NAMED, *(f"{name}_id" for name in NAMED), "all_special_ids"]:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert sorted(ours.all_special_tokens) == sorted(theirs.all_special_tokens)
    assert ours.special_tokens_map == theirs.special_tokens_map
    names = ["<think>", "a", "no such token"]
    assert ours.convert_tokens_to_ids(names) == theirs.convert_tokens_to_ids(names)
    chance = random.Random(0)
    added = [token.content for token in theirs.added_tokens_decoder.values()]
    for _ in range(num_texts):
        text = random_text(chance, added)
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == ids, text
        others = [chance.randrange(len(ours) + 9) for _ in range(chance.randrange(9))]
        for some in (ids, others):
            for skip in (True, False):
                decoded = theirs.decode(some, skip_special_tokens=skip)
                assert ours.decode(some, skip_special_tokens=skip) == decoded
            assert ours.convert_ids_to_tokens(some) == theirs.convert_ids_to_tokens(some)
    return ours


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The demo's tokenizer, without its weights."""
    for file in (*DEMO.glob("*.json"), *DEMO.glob("*.jinja")):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / name
    parsed = json.loads(file.read_text()) if file.exists() else {}
    change(parsed)
    file.write_text(json.dumps(parsed))


def test_the_demo_has_the_ids_and_texts_of_transformers(folder: Path) -> None:
    assert_equal_to_transformers(folder, num_texts=400)


def test_golden_ids_of_the_demo(folder: Path) -> None:
    tokenizer = read(folder)
    for text, tokens in {
        "<|im_start|>user\nHi<|im_end|>": "<|im_start|> user Ċ Hi <|im_end|>",
        " a  b": "Ġa Ġ Ġb",
        "e\u0301": "Ã ©",
        "a\0b": "a Ā b",
        "x<think>y</think>": "x <think> y </think>",
    }.items():
        ids = tokenizer.encode(text)
        assert tokenizer.convert_ids_to_tokens(ids) == tokens.split(" ")
        assert tokenizer.decode(ids) == ("é" if text == "e\u0301" else text)


TOKEN = {"content": "<new>", "lstrip": False, "normalized": False, "rstrip": False,
         "single_word": False, "special": True}  # fmt: skip


def listed(**flags: Any) -> Callable[[dict[str, Any]], None]:
    """tokenizer_config.json lists the added tokens: those of the demo, and more, out of order."""

    def change(config: dict[str, Any]) -> None:
        tokens = json.loads((DEMO / "tokenizer.json").read_text())["added_tokens"]
        added = {str(t.pop("id")): t for t in tokens}
        config["added_tokens_decoder"] = {
            "3000": TOKEN | {"content": "<late>", "special": False} | flags,
            "2900": TOKEN | {"content": "ord"} | flags,
            **added,
        }

    return change


CONFIGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "add_prefix_space": lambda c: c.update(add_prefix_space=True),
    "clean_up": lambda c: c.update(clean_up_tokenization_spaces=True),
    "split_special_tokens": lambda c: c.update(split_special_tokens=True),
    "nothing": lambda c: c.clear(),
    "no names": lambda c: [c.pop(k) for k in list(c) if k.endswith("_token")],
    "more special": lambda c: c.update(additional_special_tokens=["<a>", "<think>", "b c"]),
    "extra by name": lambda c: c.update(extra_special_tokens={"image_token": "<|image_pad|>"}),
    "own names": lambda c: c.update(image_token="<|image_pad|>", odd_token="<odd>", x_token=None),
    "end with flags": lambda c: c.update(
        eos_token=TOKEN | {"__type": "AddedToken", "content": "<|im_end|>"}
    ),
    "ends wanted": lambda c: c.update(add_bos_token=True, add_eos_token=True, bos_token="<s>"),
    "new end": lambda c: c.update(eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"),
    "listed": listed(),
    "listed lstrip": listed(lstrip=True),
    "listed rstrip": listed(rstrip=True),
    "listed single_word": listed(single_word=True),
    "listed normalized": listed(normalized=True),
}


@pytest.mark.parametrize("name", everyday(CONFIGS, *range(0, len(CONFIGS), 2)))
@pytest.mark.parametrize("model_type", everyday(["qwen3_5_moe", "qwen3_next"], 0))
def test_what_tokenizer_config_says_counts_as_in_transformers(
    folder: Path, name: str, model_type: str
) -> None:
    edit(folder, "tokenizer_config.json", CONFIGS[name])
    edit(folder, "config.json", lambda c: (c.clear(), c.update(model_type=model_type)))
    assert_equal_to_transformers(folder)


@pytest.mark.parametrize("model_type", everyday(["qwen3_5", "qwen3_5_text", "qwen3_next"], 0))
@pytest.mark.parametrize(
    "declared",
    [
        "Qwen2TokenizerFast",
        "Qwen3_5Tokenizer",
        "PreTrainedTokenizerFast",
        "TokenizersBackend",
        None,
    ],
)
def test_the_class_is_that_of_transformers(
    folder: Path, model_type: str, declared: str | None
) -> None:
    """The classes differ in how they cut words; a file of their own way shows which one it was."""

    def own(parsed: dict[str, Any]) -> None:
        parsed["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+|\S"
        parsed["normalizer"] = None

    edit(folder, "tokenizer.json", own)
    edit(folder, "tokenizer_config.json", lambda c: c.update(tokenizer_class=declared))
    edit(folder, "config.json", lambda c: (c.clear(), c.update(model_type=model_type)))
    assert_equal_to_transformers(folder)


def test_files_of_older_programs_count_where_added_tokens_are_not_listed(folder: Path) -> None:
    names = {
        "eos_token": TOKEN | {"content": "<|endoftext|>"},
        "additional_special_tokens": ["<m>"],
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    (folder / "added_tokens.json").write_text(json.dumps({"<think>": 2557, "<x>": 2600, "<m>": 9}))
    assert assert_equal_to_transformers(folder).eos_token == "<|endoftext|>"


def test_a_file_may_ask_for_tokens_around_a_text(folder: Path) -> None:
    template = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}},
                   {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|im_end|>": {"id": "<|im_end|>", "ids": [2549],
                                          "tokens": ["<|im_end|>"]}},
    }  # fmt: skip
    edit(folder, "tokenizer.json", lambda t: t.update(post_processor=template))
    assert assert_equal_to_transformers(folder).encode("a")[-1] == 2549


def test_truncation_and_padding_of_a_file_cut_no_prompt(folder: Path) -> None:
    limits = {
        "truncation": {
            "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0,
        },
        "padding": {
            "strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
        },
    }  # fmt: skip
    edit(folder, "tokenizer.json", lambda t: t.update(limits))
    assert len(read(folder).encode("one two three four")) > 3
    assert_equal_to_transformers(folder)


@pytest.mark.parametrize("ends", [{}, {"add_bos_token": True, "bos_token": "<|im_start|>"},
                                  {"add_eos_token": True}])  # fmt: skip
def test_vocabulary_and_merges_are_a_tokenizer_too(folder: Path, ends: dict[str, Any]) -> None:
    parsed = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(parsed["model"]["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in parsed["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    edit(folder, "tokenizer_config.json", listed())
    edit(folder, "tokenizer_config.json", lambda c: c.update(ends))
    edit(folder, "config.json", lambda c: (c.clear(), c.update(model_type="qwen3_next")))
    tokenizer = assert_equal_to_transformers(folder)
    assert len(tokenizer.encode("a")) == 1 + len(ends) // 1 * bool(ends) - ("bos_token" in ends)


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no tokenizer in"):
        read(folder)


def test_a_tokenizer_that_is_not_byte_level_is_refused(folder: Path) -> None:
    edit(folder, "tokenizer.json", lambda t: t.update(decoder={"type": "WordPiece", "prefix": "#",
                                                               "cleanup": True}))  # fmt: skip
    edit(folder, "tokenizer_config.json", lambda c: c.update(tokenizer_class="TokenizersBackend"))
    edit(folder, "config.json", lambda c: c.update(model_type="qwen3_next"))
    with pytest.raises(CheckpointError, match="not supported"):
        read(folder)


def test_several_tokens_end_an_answer(folder: Path) -> None:
    tokenizer = read_tokenizer(folder, {}, [7])
    assert tokenizer.eos_token_ids == {7, tokenizer.eos_token_id}
    tokenizer.add_eos_token("<|endoftext|>")
    tokenizer.add_eos_token("8")
    assert tokenizer.eos_token_ids == {7, 8, 2547, 2549}
    with pytest.raises(ValueError, match="no such token"):
        tokenizer.add_eos_token("no such token")


def test_what_programs_for_mlx_lm_look_for_is_there(folder: Path) -> None:
    tokenizer = read(folder)
    assert tokenizer._tokenizer is tokenizer
    assert tokenizer.bos_token is tokenizer.bos_token_id is None
    assert copy.deepcopy(tokenizer).encode("a b") == copy.copy(tokenizer).encode("a b")
    assert not hasattr(tokenizer, "no_such_attribute")
    changed = copy.copy(tokenizer)
    changed.chat_template = "{{ messages[0].content }}"
    text = changed.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert (text, tokenizer.chat_template) == ("x", (DEMO / "chat_template.jinja").read_text())


# One character a token, so that every cut lies inside of something.
TEXTS = ["👩‍👩‍👧 漢字 🇩🇪 é", "  two spaces first", "\0", "a\ufffdb", "x<think>y</think>\n\n z", ""]


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_segments_are_whole_characters_and_together_the_text(folder: Path, text: str) -> None:
    tokenizer = read(folder)
    ids = tokenizer.encode(text)
    for end in range(len(ids) + 1):
        detokenizer, segments = tokenizer.detokenizer, []
        for token in ids[:end]:
            detokenizer.add_token(token)
            segments.append(detokenizer.last_segment)
        detokenizer.finalize()
        segments.append(detokenizer.last_segment)
        shown = "".join(segments)
        assert shown == detokenizer.text and text.startswith(shown)
        assert shown == tokenizer.decode(ids[:end]).rstrip("\ufffd") or "\ufffd" in text
        assert segments[-1] == ""
    assert shown == text


def test_bytes_that_are_no_character_are_left_out(folder: Path) -> None:
    tokenizer = read(folder)
    llama, end = tokenizer.encode("🦙"), tokenizer.encode("<|im_end|>ab")
    detokenizer = tokenizer.detokenizer
    for token in [*llama[:2], *end, *llama[:3], *llama, 10**6, *llama[1:]]:
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert detokenizer.text == "<|im_end|>ab🦙"
    detokenizer.add_token(end[-1])
    assert detokenizer.last_segment.endswith("b")


def test_random_ids_stream_as_they_are_decoded(folder: Path) -> None:
    tokenizer, chance = read(folder), random.Random(0)
    for _ in range(500):
        ids = [chance.randrange(len(tokenizer)) for _ in range(chance.randrange(12))]
        detokenizer = tokenizer.detokenizer
        for token in ids:
            detokenizer.add_token(token)
        decoded = tokenizer.decode(ids)
        # What is no character shows as this sign in decode, and not at all in a stream.
        assert detokenizer.text == decoded.replace("\ufffd", "")


def test_a_token_that_is_named_is_special_whatever_it_says_itself() -> None:
    backend = Backend(BPE())
    kinds = {3: AddedToken("<three>", special=False), 1: AddedToken("<one>", special=False)}
    _add(backend, kinds, ["<three>", "<named>"], ["<extra>", "<one>"])
    found = {i: (t.content, t.special) for i, t in backend.get_added_tokens_decoder().items()}
    assert found == {
        0: ("<one>", False), 1: ("<three>", True), 2: ("<named>", True), 3: ("<extra>", True)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("token", "expected"),
    [("Ġa", b" a"), ("Ã©", "é".encode()), ("two words", b"two words"), ("日本", "日本".encode()),
     ("<|im_end|>", b"<|im_end|>"), (None, b"")],
)  # fmt: skip
def test_the_bytes_of_a_token(token: str | None, expected: bytes) -> None:
    """An added token may have characters that stand for no byte."""
    assert token_bytes(token) == expected
