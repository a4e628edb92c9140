"""Servers, chats, sessions and commands of a model with experts from disk."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from shown import ASK, shape
from test_adapters import random_adapter

from qwen35_mlx import Chat
from qwen35_mlx.chat.sessions import model_identity
from qwen35_mlx.checkpoint.headers import read_headers
from qwen35_mlx.engine.prefix_store import PrefixStore
from qwen35_mlx.engine.reading import Admission
from qwen35_mlx.engine.requests import Done, Failed, Request, Token
from qwen35_mlx.engine.scheduler import Engine
from qwen35_mlx.engine.speculate import Drafter
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.evaluation import bench as measuring
from qwen35_mlx.memory import DEFAULT_CONTEXT, sweep_bytes
from qwen35_mlx.model.adapters import with_adapter
from qwen35_mlx.model.expert_pool import stack_bytes
from qwen35_mlx.model.feed_forward import SparseMoE
from qwen35_mlx.model.loading import load_model
from qwen35_mlx.sampling import SamplingParams
from qwen35_mlx.server.service import Settings


def test_nothing_is_drafted_where_a_pass_of_several_tokens_reads_more(
    pooled: Any, disk_layout: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = pooled(disk_layout, 4)
    assert model.mtp is None
    assert not Drafter(model, "auto").uses_lookup
    assert not Drafter(model, "lookup").uses_lookup
    assert "experts from disk" in caplog.text
    with pytest.raises(Qwen35Error, match="MTP layer cannot be used with experts from disk"):
        load_model(disk_layout, mtp=True, experts_memory=model.experts.nbytes)


def test_the_engine_of_a_server_answers_the_same_and_counts(
    pooled: Any, disk_layout: Path, demo: tuple[Any, Any]
) -> None:
    answers = []
    for model in (demo[0], pooled(disk_layout, 3)):
        engine = Engine(model, demo[1])
        engine.start()
        try:
            answers.append(text_of(engine, "What is the capital of France?"))
            figures = engine.stats()
        finally:
            engine.stop()
    assert answers[0] == answers[1]
    assert answers[0]
    hits, misses = (figures[f"expert_{kind}_total"] for kind in ("hits", "misses"))
    assert misses > 0
    assert figures["expert_hit_rate"] == hits / (hits + misses)
    assert str(model.experts).startswith("3 of 8 of each layer in ")


def test_a_request_that_is_cancelled_ends_between_two_layers(
    pooled: Any, disk_layout: Path, demo: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(pooled(disk_layout, 3), demo[1])
    layers, read = list[Any](), SparseMoE.read

    def spied(self: SparseMoE, *args: Any) -> Any:
        layers.append(self)
        ticket.cancel()
        return read(self, *args)

    monkeypatch.setattr(SparseMoE, "read", spied)
    engine.start()
    try:
        ticket = engine.submit(Request([{"role": "user", "content": "Hello"}], max_tokens=5))
        *_, end = ticket.events()
    finally:
        engine.stop()
    assert isinstance(end, Done) and end.finish_reason == "cancelled"
    assert len(layers) == 1


@pytest.mark.slow
def test_a_short_question_is_answered_between_the_layers_of_a_long_prompt(
    pooled: Any, disk_layout: Path, demo: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, read, alone = ("red green blue " * 75, "Who are you?"), SparseMoE.read, []
    for text in texts:
        engine = Engine(pooled(disk_layout, 3), demo[1])
        engine.start()
        alone.append(text_of(engine, text))
        engine.stop()
    engine, layers, said = Engine(pooled(disk_layout, 3), demo[1]), list[SparseMoE](), ["", ""]
    # Layers of the long prompt that had begun when a token came.
    begun = list[tuple[int, int]]()

    over = threading.Event()

    def ask(place: int) -> None:
        def take(event: Any) -> None:
            if isinstance(event, Token | Done):
                begun.append((place, len(layers)))
                said[place] += "".join(piece.text for piece in event.pieces)
            if place == 0 and isinstance(event, Done | Failed):
                over.set()

        engine.submit(asked(texts[place])).add_listener(take)

    def spied(self: SparseMoE, pieces: Any, norm: Any) -> Any:
        if sum(piece.shape[1] for piece in pieces) > 200:
            layers.append(self)
            if len(layers) == 1:
                ask(1)
        return read(self, pieces, norm)

    monkeypatch.setattr(SparseMoE, "read", spied)
    engine.start()
    ask(0)
    over.wait(60)
    engine.stop(finish=True)
    # The last one reads the last token alone.
    assert layers == [layer.mlp for layer in engine.model.layers[:-1]]
    # A token between each two layers at least.
    assert begun[0] == (1, 1)
    assert all(place == 1 and number <= n for n, (place, number) in enumerate(begun[:3], 1))
    assert said == alone


def test_an_adapter_of_experts_that_are_on_disk_is_refused(
    pooled: Any, disk_layout: Path, converted_demo: Path
) -> None:
    adapter = random_adapter(converted_demo)
    with pytest.raises(Qwen35Error, match="some are on disk only"):
        with_adapter(pooled(disk_layout, 3), adapter)


def test_what_a_prompt_holds_between_layers_is_not_lent_to_requests(
    pooled: Any, disk_layout: Path
) -> None:
    model = pooled(disk_layout, 3)
    left = Admission(model, PrefixStore(model))._left()
    context = min(model.config.context_length, DEFAULT_CONTEXT)
    held, model.experts = sweep_bytes(model.config, context), None
    assert held > 0
    assert Admission(model, PrefixStore(model))._left() - left == held


def test_clients_are_told_the_size_of_the_whole_model(
    pooled: Any, disk_layout: Path, resident: Any, demo: tuple[Any, Any]
) -> None:
    known = [
        Settings.of(model, demo[1], disk_layout, model_id="m").num_parameters
        for model in (resident, pooled(disk_layout, 3))
    ]
    assert known[0] == known[1] > 0


@pytest.mark.slow
def test_a_fault_of_the_disk_fails_one_request_of_a_server_and_no_later_one(
    pooled: Any, disk_layout: Path, demo: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    question, texts = "What is the capital of France?", []
    for fault in (None, fail):
        engine = Engine(pooled(disk_layout, 3), demo[1])
        engine.start()
        try:
            if fault:
                with monkeypatch.context() as patch:
                    patch.setattr(os, "preadv", fault)
                    request = Request([{"role": "user", "content": question}], max_tokens=5)
                    *_, end = engine.submit(request).events()
                    assert isinstance(end, Failed)
                    assert "cannot be read from model.safetensors" in str(end.error)
            texts.append(text_of(engine, question))
        finally:
            engine.stop()
    assert texts[0] == texts[1]
    assert texts[0]


def asked(text: str) -> Request:
    params = SamplingParams(temperature=0.0)
    return Request([{"role": "user", "content": text}], params=params, max_tokens=12)


def text_of(engine: Engine, text: str) -> str:
    events = engine.submit(asked(text)).events()
    pieces = [piece for e in events if isinstance(e, Token | Done) for piece in e.pieces]
    return "".join(piece.text for piece in pieces)


@pytest.mark.slow
def test_a_chat_about_a_picture_says_the_same_after_an_edit_and_from_a_session(
    demo: tuple[Any, Any],
    pooled: Any,
    disk_layout: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QWEN35_MLX_SESSIONS", str(tmp_path))
    settings: dict[str, Any] = dict(
        enable_thinking=False, max_tokens=8, sampling={"temperature": 0.0}
    )
    said = []
    for name, model in (("all", demo[0]), ("few", pooled(disk_layout, 3))):
        chat = Chat(model, demo[1], **settings)
        texts = [
            text_of_turn(chat.send(ASK, images=[shape("circle", "red")])),
            text_of_turn(chat.regenerate()),
            text_of_turn(chat.send("What colour is it?")),
        ]
        chat.save(name)
        # Other experts are in memory there.
        later = Chat(pooled(disk_layout, 5) if name == "few" else model, demo[1], **settings)
        later.load(name)
        texts.append(text_of_turn(later.send("Who are you?")))
        said.append((texts, later.stats.prefilled_tokens))
    assert said[0] == said[1]


def text_of_turn(turn: Any) -> str:
    return "".join(piece.text for piece in turn)


@pytest.mark.slow
def test_models_that_differ_in_an_expert_share_no_session(
    pooled: Any, disk_layout: Path, tmp_path: Path
) -> None:
    for file in disk_layout.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    place = read_headers(disk_layout)["language_model.model.layers.2.mlp.experts.5.up_proj.weight"]
    with (tmp_path / "model.safetensors").open("r+b") as stream:
        stream.seek(place.offset)
        stream.write(bytes(32))
    folders = (disk_layout, disk_layout, tmp_path)
    same, again, other = (
        model_identity(pooled(f, n)) for f, n in zip(folders, (3, 4, 3), strict=True)
    )
    assert same == again != other


@pytest.mark.slow
def test_a_command_keeps_to_the_memory_and_says_what_was_read(
    run_cli: Any, converted_demo: Path, resident: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "NEW_TOKENS", 4)
    memory = f"{5.01 * stack_bytes(resident) / 8 / 2**30:.12f}GB"
    options = ("--experts-memory", memory, "--max-context", 8, "--runs", 1)
    *table, last = run_cli("bench", converted_demo, *options).stdout.splitlines()
    experts = json.loads(last)["experts"]
    assert experts["expert_slots"] == 5
    assert f"5 of 8 of each layer in memory, {experts['expert_hit_rate']:.1%} hits" in table[-1]
    result = run_cli("generate", converted_demo, "-p", "a", "--experts-memory", "1KB")
    assert result.exit_code == 2 or "not a size of memory" in result.stderr
