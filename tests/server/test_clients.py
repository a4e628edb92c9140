"""Client libraries of others, as their users use them, against the demo."""

import json
from typing import Literal

import pytest

pytestmark = pytest.mark.slow
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
WEATHER = {"name": "get_weather", "description": "The weather of a city."}
TOOL = {"type": "function", "function": WEATHER | {"parameters": PARAMETERS}}
ASKED = [{"role": "user", "content": "What is the weather in Oslo?"}]


@pytest.fixture
def openai_client(live_server):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{live_server.url}/v1", api_key="x", max_retries=0) as client:
        yield client


@pytest.fixture
def anthropic_client(live_server):
    anthropic = pytest.importorskip("anthropic")
    with anthropic.Anthropic(base_url=live_server.url, api_key="x", max_retries=0) as client:
        yield client


@pytest.fixture
def ollama_client(live_server):
    ollama = pytest.importorskip("ollama")
    client = ollama.Client(host=live_server.url)
    yield client
    client._client.close()


def test_openai_chat(openai_client):
    answer = openai_client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
    assert "Paris" in answer.choices[0].message.content
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0
    with openai_client.chat.completions.stream(
        model="demo", messages=QUESTION, temperature=0
    ) as stream:
        for _ in stream:
            pass
        assert "Paris" in stream.get_final_completion().choices[0].message.content


def test_openai_tools_in_two_turns(openai_client):
    messages = list(ASKED)
    with openai_client.chat.completions.stream(
        model="demo", messages=messages, tools=[TOOL], tool_choice="required", temperature=0
    ) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    call = message.tool_calls[0]
    assert call.function.name == "get_weather" and "city" in json.loads(call.function.arguments)
    messages += [
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    answer = openai_client.chat.completions.create(
        model="demo", messages=messages, tools=[TOOL], temperature=0
    )
    assert answer.choices[0].message.content
    assert answer.usage.prompt_tokens_details.cached_tokens > 0


def test_openai_parse_and_completions_and_models(openai_client):
    pydantic = pytest.importorskip("pydantic")

    class Capital(pydantic.BaseModel):
        city: Literal["Paris", "Rome"]

    parsed = openai_client.chat.completions.parse(
        model="demo",
        messages=QUESTION,
        response_format=Capital,
        temperature=0,
        reasoning_effort="none",
        max_tokens=100,
    )
    assert isinstance(parsed.choices[0].message.parsed, Capital)
    texts = openai_client.completions.create(model="demo", prompt=["a", "b"], max_tokens=3)
    assert [c.index for c in texts.choices] == [0, 1]
    assert [m.id for m in openai_client.models.list()] == ["demo"]
    import openai

    with pytest.raises(openai.NotFoundError):
        openai_client.chat.completions.create(model="none", messages=QUESTION)
    with pytest.raises(openai.BadRequestError) as error:
        openai_client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "word " * 9000}]
        )
    assert error.value.code == "context_length_exceeded"


def test_openai_responses(openai_client):
    response = openai_client.responses.create(
        model="demo", input="What is the capital of France?", temperature=0
    )
    assert "Paris" in response.output_text and response.output[0].type == "reasoning"
    with openai_client.responses.stream(
        model="demo", input="What is the capital of France?", temperature=0
    ) as stream:
        kinds = [event.type for event in stream]
        assert "Paris" in stream.get_final_response().output_text
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    again = openai_client.responses.create(
        model="demo", input="And of Italy?", previous_response_id=response.id, temperature=0
    )
    assert again.previous_response_id == response.id
    assert openai_client.responses.retrieve(response.id).id == response.id


def test_anthropic_messages(anthropic_client):
    message = anthropic_client.messages.create(
        model="demo", max_tokens=200, messages=QUESTION, extra_body={"temperature": 0}
    )
    assert "Paris" in message.content[0].text and message.stop_reason == "end_turn"
    tool = WEATHER | {"input_schema": PARAMETERS}
    with anthropic_client.messages.stream(
        model="demo",
        max_tokens=2048,
        messages=ASKED,
        tools=[tool],
        tool_choice={"type": "any"},
        thinking={"type": "enabled", "budget_tokens": 1024},
    ) as stream:
        final = stream.get_final_message()
    use = final.content[-1]
    assert final.stop_reason == "tool_use" and use.name == "get_weather"
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}
    answer = anthropic_client.messages.create(
        model="demo",
        max_tokens=200,
        messages=[
            *ASKED,
            {"role": "assistant", "content": final.content},
            {"role": "user", "content": [result]},
        ],
        tools=[tool],
        extra_body={"temperature": 0},
    )
    assert answer.content[0].text
    counted = anthropic_client.messages.count_tokens(model="demo", messages=QUESTION)
    assert counted.input_tokens > 5
    assert [m.id for m in anthropic_client.models.list()] == ["demo"]


def test_ollama(ollama_client):
    answer = ollama_client.chat(model="demo", messages=QUESTION, options={"temperature": 0})
    assert "Paris" in answer.message.content and answer.message.thinking
    parts = list(ollama_client.chat(model="demo", messages=QUESTION, stream=True, think=False))
    assert parts[-1].done and "".join(p.message.content for p in parts)
    text = ollama_client.generate(model="demo", prompt="What is 2 + 2?", options={"num_predict": 5})
    assert text.done_reason == "length"
    assert ollama_client.list().models[0].model == "demo"
    assert "completion" in ollama_client.show("demo").capabilities
    assert ollama_client.ps().models[0].model == "demo"
    import ollama

    with pytest.raises(ollama.ResponseError) as error:
        ollama_client.chat(model="none", messages=QUESTION)
    assert error.value.status_code == 404
