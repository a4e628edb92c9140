"""Experts from disk: the numbers of the model that holds all of them, and what is read for that."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from everyday import everyday
from metal.emulator import emulated
from mlx.utils import tree_flatten
from shown import ASK, shape

from qwen35_mlx import Chat, memory
from qwen35_mlx.chat.sessions import model_identity
from qwen35_mlx.checkpoint.headers import read_headers
from qwen35_mlx.checkpoint.resolver import resolve
from qwen35_mlx.config import read_config
from qwen35_mlx.convert import convert
from qwen35_mlx.engine.prompt_cache import PromptCache
from qwen35_mlx.engine.requests import Done, Failed, Request, Token
from qwen35_mlx.engine.scheduler import Engine
from qwen35_mlx.engine.speculate import Drafter
from qwen35_mlx.errors import CheckpointError, MemoryRefused, Qwen35Error
from qwen35_mlx.evaluation import bench as measuring
from qwen35_mlx.kernels import expert_step, metal
from qwen35_mlx.kernels.grouped_expert_matmul import expert_mlp
from qwen35_mlx.kernels.switch import SORT_FROM
from qwen35_mlx.kernels.tiers import Tiers, use, with_kernels
from qwen35_mlx.machine import describe
from qwen35_mlx.model import expert_pool, feed_forward
from qwen35_mlx.model.expert_files import Slots
from qwen35_mlx.model.expert_pool import stack_bytes
from qwen35_mlx.model.loading import load_model
from qwen35_mlx.model.sweep import piece_ends, sweep_ends
from qwen35_mlx.sampling import SamplingParams

IDS = [(7 * i + 3) % 2500 for i in range(200)]
EXPERTS, PER_TOKEN, LAYERS = 8, 2, 4


@pytest.fixture(scope="module")
def resident(converted_demo: Path) -> Any:
    return load_model(converted_demo, mtp=False)[0]


@pytest.fixture(scope="module")
def disk_layout(converted_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(converted_demo, tmp_path_factory.mktemp("disk") / "demo", experts_layout="disk")


@pytest.fixture(scope="module")
def pooled(resident: Any) -> Callable[[Path, int], Any]:
    """The model of a folder with so many slots a layer."""

    def load(folder: Path, num_slots: int) -> Any:
        return load_model(folder, experts_memory=num_slots * stack_bytes(resident) // EXPERTS)[0]

    return load


def conversation(model: Any) -> mx.array:
    """Logits of prompts with points to go back to, of single tokens, and behind a rewind."""
    cache = PromptCache(model)
    hidden = [cache.read(IDS[:150], marks=[30, 100], step_size=64)]
    for token in IDS[150:160]:
        hidden.append(cache.step(mx.array([token])))
        cache.commit(token)
    assert cache.rewind(120) == 100
    hidden.append(cache.read(IDS[160:175]))
    assert cache.rewind(99) == 30
    hidden.append(cache.read(IDS[175:180]))
    logits = model.head(mx.concatenate(hidden, axis=1))
    mx.eval(logits)
    return logits


@pytest.fixture(scope="module")
def expected(resident: Any) -> mx.array:
    return conversation(resident)


@pytest.mark.parametrize(
    "layout, num_slots",
    everyday([(layout, n) for layout in ("stacked", "disk") for n in range(2, 8)], 0, 9),
)
def test_logits_have_the_bits_of_the_model_that_holds_all_experts(
    layout: str,
    num_slots: int,
    expected: mx.array,
    pooled: Any,
    converted_demo: Path,
    disk_layout: Path,
) -> None:
    model = pooled(converted_demo if layout == "stacked" else disk_layout, num_slots)
    assert mx.array_equal(conversation(model), expected).item()
    assert model.experts.num_slots == num_slots
    assert model.experts.stats.misses > 0


def test_few_rows_in_kernels_have_the_same_bits_with_fewer_slots_than_experts(
    resident: Any, pooled: Any, disk_layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernels' place is taken by what they are compared with.
    monkeypatch.setattr(expert_step, "matrices", lambda projections: None)
    steps = Tiers("ops", {"expert_gate_up": 8, "expert_down": 8})
    model = pooled(disk_layout, 2)
    try:
        for each in (model, resident):
            use(each, steps)
        for ids in (IDS[:1], IDS[1:7]):
            expected, found = (each(mx.array([ids])) for each in (resident, model))
            assert mx.array_equal(found, expected).item()
    finally:
        use(resident, Tiers())


def test_a_result_that_is_computed_late_has_the_experts_it_was_made_for(
    resident: Any, pooled: Any, disk_layout: Path
) -> None:
    model = pooled(disk_layout, 2)
    late = [model(mx.array([[token]])) for token in IDS[:6]]
    mx.eval(model(mx.array([IDS[6:9]])))
    for token, logits in zip(IDS, late, strict=False):
        assert mx.array_equal(logits, resident(mx.array([[token]]))).item()


class Reads:
    """Bytes and calls of `os.preadv`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.num_bytes = self.num_calls = 0
        self._read = os.preadv
        monkeypatch.setattr(os, "preadv", self)

    def __call__(self, descriptor: int, buffers: Any, offset: int) -> int:
        count = self._read(descriptor, buffers, offset)
        self.num_bytes += count
        self.num_calls += 1
        return count


@pytest.mark.parametrize("layout, num_reads", everyday([("stacked", 9), ("disk", 1)], 1))
def test_each_missing_expert_is_read_once_and_nothing_else(
    layout: str,
    num_reads: int,
    pooled: Any,
    converted_demo: Path,
    disk_layout: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = pooled(converted_demo if layout == "stacked" else disk_layout, 3)
    reads = Reads(monkeypatch)
    conversation(model)
    stats = model.experts.stats
    tensors = read_headers(disk_layout).values()
    expert = sum(t.nbytes for t in tensors if ".layers.0.mlp.experts.0." in t.name)
    assert reads.num_bytes == stats.num_bytes == stats.misses * expert > 0
    assert reads.num_calls == num_reads * stats.misses


def test_a_prompt_of_many_pieces_reads_an_expert_once_a_layer(
    resident: Any, pooled: Any, disk_layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[set[int]] = []
    route = feed_forward.route

    def spied(*args: Any) -> Any:
        routing = route(*args)
        chosen.append(set(np.array(routing.indices).ravel().tolist()))
        return routing

    ids = dict(ids=IDS[:20], marks=[5], step_size=8)
    monkeypatch.setattr(feed_forward, "route", spied)
    PromptCache(resident).read(**ids)
    monkeypatch.undo()
    # Of the last layer, the last token of the last piece alone.
    pieces = [chosen[i : i + LAYERS] for i in range(0, len(chosen), LAYERS)]
    distinct = [set().union(*(piece[i] for piece in pieces)) for i in range(LAYERS - 1)]
    expected = sum(map(len, distinct)) + len(pieces[-1][-1])
    model, shown = pooled(disk_layout, 2), []
    PromptCache(model).read(**ids, progress=lambda done, total: shown.append((done, total)))
    assert shown == [(done, 20) for done in (0, 5, 10, 15, 20, 20)]
    assert len(pieces) == 3
    assert model.experts.stats.misses == expected
    assert model.experts.stats.hits == 0


def test_few_rows_of_a_long_call_are_multiplied_as_many_are(
    pooled: Any, disk_layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def spied(x: Any, indices: mx.array, *rest: Any) -> mx.array:
        sizes.append(indices.size)
        return expert_mlp(x, indices, *rest)

    model = pooled(disk_layout, 2)
    monkeypatch.setattr(expert_pool, "expert_mlp", spied)
    model(mx.array([IDS[:SORT_FROM]]))
    assert len(sizes) > LAYERS
    assert min(sizes) >= SORT_FROM
    sizes.clear()
    model(mx.array([IDS[:3]]))
    assert max(sizes) <= 3 * PER_TOKEN


def test_pieces_end_at_cuts_and_sweeps_end_with_pieces() -> None:
    assert piece_ends(10, [40, 100], 25) == [35, 40, 65, 90, 100]
    assert piece_ends(7, [7], 25) == []
    assert sweep_ends(10, [35, 40, 65, 90, 100], 1000) == [100]
    assert sweep_ends(10, [35, 40, 65, 90, 100], 55) == [65, 100]
    assert sweep_ends(10, [35, 60, 65], 20) == [35, 60, 65]
    assert sweep_ends(7, [], 20) == []


@pytest.mark.slow
def test_a_prompt_longer_than_a_sweep_has_the_same_bits(
    expected: mx.array, pooled: Any, disk_layout: Path
) -> None:
    model = pooled(disk_layout, 3)
    model.experts.sweep_tokens = 70
    assert mx.array_equal(conversation(model), expected).item()


def end_early(descriptor: int, buffers: Any, offset: int) -> int:
    return 0


def fail(descriptor: int, buffers: Any, offset: int) -> int:
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize(
    "fault, said", everyday([(end_early, "the file ends"), (fail, "Input/output")], 1)
)
def test_a_fault_of_the_disk_is_said_and_changes_no_later_text(
    fault: Any,
    said: str,
    resident: Any,
    pooled: Any,
    converted_demo: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = pooled(converted_demo, 3)
    cache = PromptCache(model)
    cache.read(IDS[:20], marks=[20])
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fault)
        with pytest.raises(CheckpointError, match=said):
            for token in IDS[20:40]:
                cache.step(mx.array([token]))
                cache.commit(token)
    kept = cache.rewind(20)
    found = model.head(cache.read(IDS[20:40]))
    expected = PromptCache(resident)
    expected.read(IDS[:20], marks=[20])
    assert kept == 20
    assert mx.array_equal(found, resident.head(expected.read(IDS[20:40]))).item()


@pytest.mark.slow
def test_a_read_that_ends_in_the_middle_goes_on(
    expected: mx.array, pooled: Any, disk_layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = os.preadv

    def some(descriptor: int, buffers: Any, offset: int) -> int:
        whole = list(buffers)[:2]
        return read(descriptor, [whole[0], *(b[: len(b) // 2 + 1] for b in whole[1:])], offset)

    model = pooled(disk_layout, 3)
    monkeypatch.setattr(os, "preadv", some)
    assert mx.array_equal(conversation(model), expected).item()


def test_a_file_that_is_written_over_gives_no_text(
    pooled: Any, disk_layout: Path, tmp_path: Path
) -> None:
    for file in disk_layout.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = pooled(tmp_path, 3)
    weights = tmp_path / "model.safetensors"
    with weights.open("r+b") as stream:
        stream.seek(weights.stat().st_size - 4)
        stream.write(b"abcd")
    os.utime(weights, ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed while the model runs"):
        model(mx.array([[5]]))


def test_slots_show_what_is_read_into_them_in_the_type_of_the_file(disk_layout: Path) -> None:
    found = resolve(read_config(disk_layout), read_headers(disk_layout))
    match = next(m for m in found.text_matches if "layers.1.mlp.switch_mlp.up_proj" in m.name)
    stored = mx.load(str(disk_layout / "model.safetensors"))
    for part in match.parts:
        slots = Slots(part, 3, on_cpu=False)
        mx.eval(slots.array)
        name = part.name.replace("switch_mlp", "experts.6")
        ((file, offset, length),) = slots.ranges(6)
        with file.open("rb") as stream:
            stream.seek(offset)
            buffer = slots.buffer(2)
            buffer.reshape(-1).view(np.uint8)[:] = np.frombuffer(stream.read(length), np.uint8)
        slots.finish(2, buffer)
        assert slots.array.dtype == stored[name].dtype
        assert mx.array_equal(slots.array[2], stored[name]).item()


def test_too_little_memory_for_one_token_is_refused_with_the_numbers(
    resident: Any, converted_demo: Path
) -> None:
    each = stack_bytes(resident) // EXPERTS
    with pytest.raises(MemoryRefused) as error:
        load_model(converted_demo, experts_memory=2 * each - 1)
    assert "1 experts of each layer" in str(error.value)
    assert f"{2 * each / 1e9:.3g} GB for 2 of 8" in str(error.value)


def test_memory_for_experts_that_a_model_does_not_have_is_refused(
    converted_golden: Callable[[str], Path],
) -> None:
    with pytest.raises(Qwen35Error, match="a model without experts"):
        load_model(converted_golden("dense"), experts_memory=10**9)


def test_memory_for_all_experts_needs_no_pool(resident: Any, converted_demo: Path) -> None:
    model, _ = load_model(converted_demo, experts_memory=stack_bytes(resident))
    assert model.experts is None
    assert model.mtp is not None


def test_experts_that_do_not_fit_are_read_from_disk_without_being_asked(
    resident: Any,
    converted_demo: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    experts = stack_bytes(resident)
    others = sum(a.nbytes for _, a in tree_flatten(resident.parameters())) - experts
    counted = memory.count(resident.config, others, 16, None, 4)
    needed = counted.total - counted.features + memory.sweep_bytes(resident.config, 16, 4)
    # Features of pictures have a share of all.
    room = int((needed + 5.01 * experts / EXPERTS) / (1 - memory.FEATURES_SHARE))
    small = describe()._replace(gpu_limit_bytes=room)
    for module in (memory, expert_pool):
        monkeypatch.setattr(module, "describe", lambda: small)
    model, _ = load_model(converted_demo, context=16)
    assert model.experts.num_slots == 5
    assert "5 of 8 of each layer" in caplog.text
    with pytest.raises(MemoryRefused):
        load_model(converted_demo, context=16, mtp=True)
    assert load_model(converted_demo, context=16, force=True)[0].experts is None


def test_nothing_is_drafted_where_a_pass_of_several_tokens_reads_more(
    pooled: Any, disk_layout: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = pooled(disk_layout, 4)
    assert model.mtp is None
    assert not Drafter(model, "auto").uses_lookup
    assert not Drafter(model, "lookup").uses_lookup
    assert "experts from disk" in caplog.text
    with pytest.raises(Qwen35Error, match="MTP layer together with experts from disk"):
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


@pytest.mark.slow
def test_a_fault_of_the_disk_fails_one_request_of_a_server_and_no_later_one(
    pooled: Any, disk_layout: Path, demo: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
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


def text_of(engine: Engine, text: str) -> str:
    request = Request(
        [{"role": "user", "content": text}],
        params=SamplingParams(temperature=0.0),
        max_tokens=12,
    )
    events = engine.submit(request).events()
    pieces = [piece for e in events if isinstance(e, Token | Done) for piece in e.pieces]
    return "".join(piece.text for piece in pieces)


def test_a_thread_goes_on_where_another_left_a_step(
    resident: Any, pooled: Any, disk_layout: Path
) -> None:
    model, results = pooled(disk_layout, 2), []
    abandoned = model(mx.array([[5]]))

    def run() -> None:
        logits = model(mx.array([[9, 8, 7]]))
        mx.eval(logits)
        results.append(logits)
        mx.clear_streams()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert mx.array_equal(results[0], resident(mx.array([[9, 8, 7]]))).item()
    assert mx.array_equal(abandoned, resident(mx.array([[5]]))).item()


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [1, 6, 70])
def test_kernels_give_the_same_bits_with_few_slots(
    num_tokens: int, converted_golden: Callable[[str], Path]
) -> None:
    folder = converted_golden("moe")
    metal.clear()
    with emulated(metal_available=True) as log:
        resident = load_model(folder, mtp=False)[0]
        few = resident.config.num_experts_per_tok
        room = few * stack_bytes(resident) // resident.config.num_experts
        model = load_model(folder, experts_memory=room)[0]
        ids = mx.array([IDS[:num_tokens]]) % resident.config.vocab_size
        for each in (resident, model):
            use(each, with_kernels())
        expected, found = resident(ids), model(ids)
        assert mx.array_equal(found, expected).item()
    metal.clear()
    names = {launch.kernel for launch in log.launches}
    assert any("expert" in name for name in names)
    assert model.experts.num_slots == few


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
    memory = f"{5.01 * stack_bytes(resident) / EXPERTS / 2**30:.12f}GB"
    options = ("--experts-memory", memory, "--max-context", 8, "--runs", 1)
    *table, last = run_cli("bench", converted_demo, *options).stdout.splitlines()
    experts = json.loads(last)["experts"]
    assert experts["expert_slots"] == 5
    assert f"5 of 8 of each layer in memory, {experts['expert_hit_rate']:.1%} hits" in table[-1]
    result = run_cli("generate", converted_demo, "-p", "a", "--experts-memory", "1KB")
    assert result.exit_code == 2 or "not a size of memory" in result.stderr
