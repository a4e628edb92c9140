"""Chat templates: where they are found, what they may use, and messages in OpenAI's form."""

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from conftest import DEMO
from transformers import AutoTokenizer

from qwen35_mlx.convert import convert
from qwen35_mlx.convert.job import verify
from qwen35_mlx.errors import PromptError
from qwen35_mlx.prompt import encode_messages, render_messages
from qwen35_mlx.text.chat_template import read_templates, render
from qwen35_mlx.text.tokenizer import Tokenizer, read_tokenizer

NAMED = [{"name": "default", "template": "listed"}, {"name": "tool_use", "template": "tools"}]
USER = {"role": "user", "content": "Hi"}
JSON, JINJA, FOLDER = "chat_template.json", "chat_template.jinja", "additional_chat_templates"


def write(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("files", "config", "expected"),
    [
        ({}, None, {}),
        ({JINJA: "file"}, "config", {"default": "file"}),
        ({}, "config", {"default": "config"}),
        ({}, NAMED, {"default": "listed", "tool_use": "tools"}),
        ({JSON: {"chat_template": "old"}}, None, {"default": "old"}),
        ({JSON: {"chat_template": NAMED}}, None, {"default": "listed", "tool_use": "tools"}),
        ({JSON: {"chat_template": "old"}}, "config", {"default": "config"}),
        ({JSON: {"chat_template": "old"}, JINJA: "file"}, None, {"default": "file"}),
        ({JSON: {"chat_template": "old"}}, "", {"default": "old"}),
        ({"processor_config.json": {"chat_template": "old"}}, None, {"default": "old"}),
        ({JSON: {"chat_template": "old"}, "processor_config.json": {}}, None, {"default": "old"}),
        ({}, [{"name": "chat", "template": "one"}], {"default": "one"}),
        ({f"{FOLDER}/chat.jinja": "one"}, None, {"default": "one"}),
        ({f"{FOLDER}/default.jinja": "more"}, NAMED, {"default": "more"}),
        ({f"{FOLDER}/tool_use.jinja": "t"}, "config", {"default": "config", "tool_use": "t"}),
        ({f"{FOLDER}/tool_use.jinja": "t", JINJA: "f"}, "c", {"default": "f", "tool_use": "t"}),
    ],
    ids=repr,
)
def test_where_templates_are_found(
    tmp_path: Path, files: dict[str, Any], config: Any, expected: dict[str, str]
) -> None:
    write(tmp_path, files)
    assert read_templates(tmp_path, {"chat_template": config}) == expected


@pytest.mark.parametrize("name", [JSON, JINJA, f"{FOLDER}/default.jinja"])
def test_a_byte_order_mark_is_no_part_of_a_template(tmp_path: Path, name: str) -> None:
    text = json.dumps({"chat_template": "x"}) if name == JSON else "x"
    write(tmp_path, {name: "\ufeff" + text})
    assert read_templates(tmp_path, {}) == {"default": "x"}


@pytest.mark.parametrize("config", [None, "config", NAMED], ids=repr)
@pytest.mark.parametrize(
    "files",
    [{JINJA: "file"}, {}, {f"{FOLDER}/default.jinja": "more"},
     {f"{FOLDER}/tool_use.jinja": "more tools", JINJA: "file"}],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("tools", [None, [{"name": "f"}]], ids=["no tools", "tools"])
def test_the_template_is_the_one_that_transformers_takes(
    tmp_path: Path, files: dict[str, Any], config: Any, tools: Any
) -> None:
    write(tmp_path, files | {"config.json": {"model_type": "qwen3_5"},
                             "tokenizer.json": (DEMO / "tokenizer.json").read_text(),
                             "tokenizer_config.json": {"chat_template": config}})  # fmt: skip
    tokenizer = read_tokenizer(tmp_path, {"model_type": "qwen3_5"})
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    if theirs.chat_template is None:
        assert tokenizer.chat_template is None
        return
    expected = theirs.apply_chat_template([USER], tools=tools, tokenize=False)
    assert tokenizer.apply_chat_template([USER], tools, tokenize=False) == expected
    if tools:
        options: dict[str, Any] = {"add_generation_prompt": False, "tools": tools}
        assert render_messages(tokenizer, [USER], **options) == expected


def test_templates_come_along_with_a_conversion(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "src", tokenizer=True)
    more = {f"{FOLDER}/default.jinja": "d", f"{FOLDER}/tool_use.jinja": "t"}
    write(tmp_path / "src", more | {f"{FOLDER}/README.md": "no", JSON: {"chat_template": "old"}})
    (tmp_path / "src" / JINJA).unlink()
    out = convert(tmp_path / "src", tmp_path / "out", dtype="float32")
    assert read_templates(out, {}) == {"default": "d", "tool_use": "t"}
    assert not (out / FOLDER / "README.md").exists()
    verify(out)
    (out / FOLDER / "tool_use.jinja").write_text("changed")
    with pytest.raises(ValueError, match=r"tool_use\.jinja has another checksum"):
        verify(out)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "é <b>"}]'),
        ("{{ messages[0].content | tojson(ensure_ascii=true) }}", '"\\u00e9 <b>"'),
        ("{{ {'b': 1, 'a': none} | tojson(indent=1, sort_keys=true) }}",
         '{\n "a": null,\n "b": 1\n}'),
        ("{% generation %}{% for m in messages %}x{% endfor %}{% endgeneration %}y", "xy"),
        ("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ eos_token }}{{ bos_token is defined }}", "<e>False"),
        ("{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}", "2"),
    ],
)  # fmt: skip
def test_what_templates_are_written_for(template: str, text: str) -> None:
    messages = [{"role": "user", "content": "é <b>"}]
    assert render(template, messages, eos_token="<e>") == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ messages",
        "{{ nothing | tojson }}",
    ],
)
def test_a_template_that_fails_is_a_prompt_error(template: str) -> None:
    tokenizer = read_tokenizer(DEMO, {})
    tokenizer.chat_template = template
    with pytest.raises(PromptError, match="template refuses"):
        encode_messages(tokenizer, [USER], add_generation_prompt=True)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return read_tokenizer(DEMO, {})


def rendered(tokenizer: Tokenizer, *messages: dict[str, Any]) -> str:
    return render_messages(tokenizer, [USER, *messages], add_generation_prompt=False)


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": function}]}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ('{"a": 3, "b": [1, {"c": null}]}', {"a": 3, "b": [1, {"c": None}]}),
        ({"a": True, "b": "x"}, {"a": True, "b": "x"}),
        ("", {}),
        (None, {}),
        ("null", {}),
    ],
    ids=repr,
)
def test_arguments_may_be_json_text_or_typed_values(
    tokenizer: Tokenizer, arguments: Any, value: dict[str, Any]
) -> None:
    expected = tokenizer.apply_chat_template(
        [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": value}]},
        ],
        tokenize=False,
    )
    assert rendered(tokenizer, call(arguments)) == expected
    changed = read_tokenizer(DEMO, {})
    changed.chat_template = "{{ messages[1].tool_calls[0].function.arguments | tojson }}"
    assert json.loads(rendered(changed, call(arguments))) == value


@pytest.mark.parametrize("arguments", ["{a: 1}", "[1]", '"x"', 7, ["x"], "[" * 100_000])
def test_arguments_that_are_no_object_are_refused(tokenizer: Tokenizer, arguments: Any) -> None:
    with pytest.raises(PromptError, match="arguments of a call"):
        rendered(tokenizer, call(arguments))


@pytest.mark.parametrize("calls", [["x"], [{"function": "f"}], [{"name": 7}], [None]], ids=repr)
def test_tool_calls_of_another_shape_are_refused(tokenizer: Tokenizer, calls: Any) -> None:
    with pytest.raises(PromptError, match="a tool call"):
        rendered(tokenizer, {"role": "assistant", "content": None, "tool_calls": calls})


def test_messages_of_the_caller_are_left_as_they_are(tokenizer: Tokenizer) -> None:
    messages = [USER, call('{"a": "<think>"}')]
    before = json.dumps(messages)
    render_messages(tokenizer, messages, add_generation_prompt=False)
    assert json.dumps(messages) == before


# Behind the last question a template shows the thought.
@pytest.mark.parametrize(
    ("content", "thought", "answer"),
    [
        ("<think>\nhm\n</think>\n\nYes", "hm", "Yes"),
        ("\n<think>hm</think>Yes", "hm", "Yes"),
        ("hm\n\nmore\n</think>\n\nYes", "hm\n\nmore", "Yes"),
        ("<think>\n\n</think>\n\nYes", "", "Yes"),
        ("a < b, </think> and <think>", "", "a < b, </think> and <think>"),
        ("Write <think>\nhm\n</think>\n\nso.", "", "Write <think>\nhm\n</think>\n\nso."),
    ],
)
def test_a_thought_in_front_of_an_answer_is_one_and_a_tag_in_its_text_is_text(
    tokenizer: Tokenizer, content: str, thought: str, answer: str
) -> None:
    message = {"role": "assistant", "content": content}
    apart = {"role": "assistant", "content": answer, "reasoning_content": thought}
    assert rendered(tokenizer, message) == rendered(tokenizer, apart)
    ids = encode_messages(tokenizer, [USER, message], add_generation_prompt=False)
    tags = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert [i for i in ids if i in tags] == tags
    assert tokenizer.decode(ids).endswith(f"<think>\n{thought}\n</think>\n\n{answer}<|im_end|>\n")


@pytest.mark.parametrize("name", ["reasoning", "thinking"])
def test_other_names_of_a_thought(tokenizer: Tokenizer, name: str) -> None:
    apart = {"role": "assistant", "content": "Yes", "reasoning_content": "hm"}
    other = {"role": "assistant", "content": "Yes", name: "hm", "reasoning_content": None}
    assert rendered(tokenizer, other) == rendered(tokenizer, apart)
