"""Embeddings by both APIs: the numbers of `embed`, and what cannot be one."""

import base64
from typing import Any

import numpy as np
import pytest
from server.running import Running

from qwen35_mlx import embed

TEXTS = ["What is the capital of France?", "Paris"]


@pytest.fixture(scope="module")
def expected(demo: tuple[Any, Any]) -> np.ndarray:
    return np.array(embed(*demo, TEXTS))


def ask(server: Running, path: str, **body: Any) -> Any:
    return server.post(path, {"model": "demo", **body}).json


def test_openai_gets_the_numbers_of_each_text(live_server: Running, expected: np.ndarray) -> None:
    answer = ask(live_server, "/v1/embeddings", input=TEXTS)
    assert [item["index"] for item in answer["data"]] == [0, 1]
    given = np.array([item["embedding"] for item in answer["data"]], dtype=np.float32)
    assert np.array_equal(given, expected)
    one = ask(live_server, "/v1/embeddings", input=TEXTS[1], encoding_format="base64")
    data = base64.b64decode(one["data"][0]["embedding"])
    assert np.array_equal(np.frombuffer(data, "<f4"), expected[1])
    assert one["usage"]["prompt_tokens"] < answer["usage"]["prompt_tokens"]


def test_fewer_dimensions_are_the_first_ones_at_length_1(
    live_server: Running, expected: np.ndarray
) -> None:
    (item,) = ask(live_server, "/v1/embeddings", input=TEXTS[0], dimensions=8)["data"]
    first = expected[0][:8]
    assert item["embedding"] == pytest.approx(first / np.linalg.norm(first), abs=1e-6)


def test_ollama_gets_them_in_its_forms(live_server: Running, expected: np.ndarray) -> None:
    answer = ask(live_server, "/api/embed", input=TEXTS)
    assert np.array_equal(np.array(answer["embeddings"], dtype=np.float32), expected)
    old = ask(live_server, "/api/embeddings", prompt=TEXTS[1])
    assert np.array_equal(np.array(old["embedding"], dtype=np.float32), expected[1])


@pytest.mark.slow
def test_what_is_read_for_an_embedding_pushes_no_conversation_out(live_server: Running) -> None:
    store = live_server.engine.store
    before = store.num_snapshots, len(store.caches)
    ask(live_server, "/v1/embeddings", input=["word " * 200 + str(i) for i in range(3)])
    assert (store.num_snapshots, len(store.caches)) == before


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input": []},
        {"input": ""},
        {"input": ["a", ""]},
        {"input": {"text": "a"}},
        {"input": [10**8]},
        {"input": "a", "dimensions": 0},
        {"input": "a", "dimensions": 10**6},
        {"input": "a", "encoding_format": "int8"},
        {"input": "word " * 50_000},
    ],
)
def test_what_is_no_text_is_refused_by_name(live_server: Running, body: Any) -> None:
    answer = live_server.post("/v1/embeddings", body)
    assert answer.status == 400
    assert set(answer.json["error"]) == {"message", "type", "param", "code"}
