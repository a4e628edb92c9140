"""Ollama's API: lines, options, the model's card."""

import json
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest
from server.conftest import DEMO
from server.fake_engine import call, thought
from server.running import MODEL

from qwen35_mlx.engine.requests import Grammar
from qwen35_mlx.server.service import Settings, _parameters

TOOL = {"type": "function", "function": {"name": "run", "parameters": {"type": "object"}}}


def ask(server, **fields):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields}
    return server.post("/api/chat", body)


def lines(answer):
    return [json.loads(line) for line in answer.text.splitlines()]


def test_a_chat_streams_lines_unless_it_is_told_otherwise(server):
    server.engine.say = [thought("Hm."), "A", "B", call("run", a=1)]
    server.engine.finish = "tool_calls"
    answer = ask(server, tools=[TOOL])
    assert answer.headers["content-type"] == "application/x-ndjson"
    *parts, last = lines(answer)
    assert all(part["done"] is False for part in parts)
    assert parts[0]["message"]["thinking"] == "Hm."
    assert [p["message"]["content"] for p in parts[1:3]] == ["A", "B"]
    function = parts[3]["message"]["tool_calls"][0]["function"]
    assert function == {"index": 0, "name": "run", "arguments": {"a": 1}}
    assert last["done"] is True and last["done_reason"] == "stop"
    for name in ("total_duration", "prompt_eval_count", "eval_count", "eval_duration"):
        assert isinstance(last[name], int)
    whole = ask(server, stream=False).json
    assert whole["message"]["content"] == "AB" and whole["message"]["thinking"] == "Hm."


def test_options_reach_the_engine(server):
    ask(
        server,
        options={
            "temperature": 0.1,
            "num_predict": 5,
            "seed": 3,
            "stop": ["x"],
            "repeat_penalty": 1.1,
            "num_ctx": 99,
            "mirostat": 1,
        },
        format={"type": "object"},
        think=False,
        tools=[],
    )
    request = server.engine.last
    assert (request.max_tokens, request.seed, request.stop) == (5, 3, ["x"])
    assert request.params.temperature == 0.1 and request.params.repetition_penalty == 1.1
    assert request.grammar == Grammar("json_schema", {"type": "object"})
    assert request.enable_thinking is False
    ask(server, format="json", think="low", options={"num_predict": -1})
    request = server.engine.last
    assert request.grammar == Grammar("json_object") and request.think_budget == 2048
    assert request.max_tokens is None


def test_generate_takes_a_message_or_raw_text(server):
    answer = server.post("/api/generate", {"model": MODEL, "prompt": "2 + 2", "system": "S"})
    assert "".join(line["response"] for line in lines(answer)) == "Paris."
    assert [m["role"] for m in server.engine.last.messages] == ["system", "user"]
    raw = {"model": MODEL, "prompt": "2 + 2", "raw": True, "stream": False}
    assert server.post("/api/generate", raw).json["response"] == "Paris."
    assert server.engine.last.prompt == "2 + 2" and server.engine.last.messages is None


def test_the_context_of_an_answer_continues_its_conversation(server):
    first = {"model": MODEL, "prompt": "Où?", "system": "S", "think": True}
    server.engine.say = [thought("Hm."), "À Paris"]
    *_, last = lines(server.post("/api/generate", first))
    assert all(isinstance(number, int) for number in last["context"])
    again = {"model": MODEL, "prompt": "And then?", "context": last["context"], "stream": False}
    assert len(server.post("/api/generate", again).json["context"]) > len(last["context"])
    read = [(m["role"], m["content"]) for m in server.engine.last.messages]
    assert read[:3] == [("system", "S"), ("user", "Où?"), ("assistant", "À Paris")]
    assert read[3:] == [("user", "And then?")]


@pytest.mark.parametrize("context", [[5], ["a"], [123, 256], [1.5], "a", list(b'{"messages":5}')])
def test_a_context_of_others_is_refused(server, context):
    answer = server.post("/api/generate", {"model": MODEL, "prompt": "a", "context": context})
    assert answer.status == 400 and answer.json["error"].startswith("context: got")


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_an_empty_request_loads_the_model(server, path):
    answer = server.post(path, {"model": MODEL})
    assert answer.json["done"] is True and answer.json["done_reason"] == "load"
    assert not server.engine.tickets


def test_results_calls_and_pictures_of_a_history(server):
    messages = [
        {"role": "user", "content": "q", "images": ["AAAA"]},
        {
            "role": "assistant",
            "content": "",
            "thinking": "t",
            "tool_calls": [{"function": {"name": "run", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "tool_name": "run", "content": "7"},
    ]
    assert ask(server, messages=messages).status == 200
    read = server.engine.last.messages
    assert read[0]["content"][0]["image_url"]["url"].endswith("AAAA")
    assert read[1]["reasoning_content"] == "t"
    assert read[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert read[2] == {"role": "tool", "content": "7"}


def test_the_card_of_the_model(start):
    server = start(architecture="qwen3_5", sees=True, template="T", num_bytes=9)
    assert server.get("/api/version").json["version"].count(".") == 2
    tag = server.get("/api/tags").json["models"][0]
    assert tag["name"] == tag["model"] == MODEL and tag["details"]["family"] == "qwen3_5"
    assert server.get("/api/ps").json["models"][0]["context_length"] == 4096
    shown = server.post("/api/show", {"model": f"{MODEL}:latest"}).json
    assert shown["capabilities"] == ["completion", "tools", "thinking", "vision"]
    assert shown["model_info"]["qwen3_5.context_length"] == 4096 and shown["template"] == "T"
    assert server.get("/").text == "Ollama is running"
    assert server.request("HEAD", "/").status == 200


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/api/chat", {"model": "other", "messages": []}, 404),
        ("/api/chat", {}, 400),
        ("/api/show", {"model": "other"}, 404),
        ("/api/chat", {"model": MODEL, "messages": [{"role": "x"}]}, 400),
        ("/api/chat", {"model": MODEL, "messages": [{"role": "user"}], "format": 5}, 400),
        ("/api/generate", {"model": MODEL, "prompt": "a", "suffix": "b"}, 400),
        ("/api/pull", {"model": "other"}, 501),
        ("/api/embed", {"model": MODEL, "input": ""}, 400),
        ("/api/nothing", {}, 404),
    ],
)
def test_errors_are_a_text(server, path, body, status):
    answer = server.post(path, body)
    assert answer.status == status and isinstance(answer.json["error"], str)


def test_a_failure_in_a_stream_is_a_line(server):
    server.engine.say = ["A", RuntimeError("gone")]
    assert "error" in lines(ask(server))[-1]


def test_parameters_are_counted_as_they_were_before_packing(demo, converted_demo):
    model, tokenizer = demo
    settings = Settings.of(model, tokenizer, converted_demo, model_id="demo")
    source = mx.load(str(DEMO / "model.safetensors"))
    num_parameters = sum(array.size for array in source.values())
    assert settings.num_parameters == num_parameters
    assert settings.parameter_size == f"{num_parameters / 1e6:.1f}M"
    assert settings.quantization == "4-bit" and len(settings.digest) == 64
    files = converted_demo.glob("*.safetensors")
    assert settings.num_bytes == sum(file.stat().st_size for file in files) > 10**6
    # The demo sees, and its template writes calls in XML.
    assert settings.sees and not settings.json_calls
    assert settings.template == tokenizer.chat_template


def test_bits_are_those_of_most_weights_and_none_without_packed_ones():
    """Of shapes that say nothing: packed words hold several numbers."""
    parts = {bits: nn.Linear(64, 2 * bits, bias=False) for bits in (4, 8)}
    packed = {bits: nn.QuantizedLinear.from_linear(p, 32, bits) for bits, p in parts.items()}
    assert _parameters(nn.Linear(3, 4)) == (16, 0)
    model = nn.Sequential(nn.Linear(64, 100), *packed.values())
    assert _parameters(model) == (64 * 100 + 100 + 64 * (8 + 16), 8)
    # Of 8 experts 2 are in memory.
    model.switch_mlp = nn.Sequential(nn.Linear(3, 2), packed[8])
    model.experts = SimpleNamespace(num_experts=8, num_slots=2)
    assert _parameters(model) == (64 * 100 + 100 + 64 * (8 + 16) + 4 * (8 + 64 * 16), 8)
