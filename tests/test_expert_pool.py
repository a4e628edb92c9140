"""Experts from disk: the numbers of the model that holds all of them, and what is read for that."""

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

from qwen35_mlx import memory
from qwen35_mlx.checkpoint.headers import read_headers
from qwen35_mlx.checkpoint.resolver import resolve
from qwen35_mlx.config import read_config
from qwen35_mlx.engine.prompt_cache import PromptCache
from qwen35_mlx.errors import CheckpointError, MemoryRefused, Qwen35Error
from qwen35_mlx.kernels import expert_step, metal
from qwen35_mlx.kernels.grouped_expert_matmul import expert_mlp
from qwen35_mlx.kernels.switch import SORT_FROM
from qwen35_mlx.kernels.tiers import Tiers, use, with_kernels
from qwen35_mlx.machine import describe
from qwen35_mlx.model import expert_pool, feed_forward, loading
from qwen35_mlx.model.expert_files import SAMPLED_BYTES, Slots
from qwen35_mlx.model.expert_pool import stack_bytes
from qwen35_mlx.model.loading import load_model
from qwen35_mlx.model.sweep import piece_ends, sweep_ends

IDS = [(7 * i + 3) % 2500 for i in range(200)]
EXPERTS, PER_TOKEN, LAYERS = 8, 2, 4


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
    everyday([(layout, n) for layout in ("stacked", "disk") for n in range(2, 8)], 9),
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


def test_the_expert_that_was_not_used_for_the_longest_time_gives_its_slot(
    pooled: Any, disk_layout: Path
) -> None:
    pool = pooled(disk_layout, 3).layers[0].mlp.pool
    for experts in ([0, 1], [2, 0], [3, 3]):
        pool.place(mx.array([experts]))
    # The first of all has been used again.
    assert list(pool._slots) == [0, 2, 3]


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


def test_a_long_call_adds_up_its_experts_some_tokens_at_a_time(
    pooled: Any, disk_layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they gave to the tokens before is computed by then, and takes no memory."""
    model, sizes, evaluate = pooled(disk_layout, 2), [], mx.eval

    def spied(*arrays: Any) -> None:
        sizes.extend(a.shape for a in arrays if isinstance(a, mx.array))
        evaluate(*arrays)

    whole = model(mx.array([IDS[:20]]))
    evaluate(whole)
    monkeypatch.setattr(expert_pool, "PREFILL_STEP_SIZE", 8)
    monkeypatch.setattr(mx, "eval", spied)
    in_steps = model(mx.array([IDS[:20]]))
    rows = [n for n, *width in sizes if width == [model.config.hidden_size]]
    assert [rows[i : i + 3] for i in range(len(rows))].count([8, 8, 4]) == LAYERS
    assert mx.array_equal(in_steps, whole).item()


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


@pytest.mark.slow
def test_a_point_of_a_sweep_that_was_interrupted_is_forgotten(
    pooled: Any, disk_layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = PromptCache(pooled(disk_layout, 3))
    cache.read(IDS[:20])

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PromptCache, "mark_used", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.read(IDS[20:150], marks=[60])
    assert cache.ids == IDS[:20]
    # Other ids at the place of that point.
    cache.read(IDS[30:90])
    assert cache.rewind(70) == 0


@pytest.mark.slow
def test_reading_that_is_stopped_ends_between_two_layers(
    pooled: Any, disk_layout: Path, resident: Any
) -> None:
    model, shares = pooled(disk_layout, 3), list[int]()
    cache = PromptCache(model)
    cache.read(IDS[:20])
    assert (
        cache.read(
            IDS[20:120],
            marks=[60],
            progress=lambda read, total: shares.append(read),
            should_stop=lambda: len(shares) > 1,
        )
        is None
    )
    # One layer of four.
    assert shares == [0, 25]
    assert cache.ids == IDS[:20] and not cache.snapshots
    expected = PromptCache(resident)
    expected.read(IDS[:20])
    hidden = [each.read(IDS[20:120]) for each in (cache, expected)]
    assert mx.array_equal(*hidden).item()


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


def test_a_sample_of_an_expert_is_the_first_bytes_of_its_matrices(
    pooled: Any, disk_layout: Path
) -> None:
    weights = disk_layout / "model.safetensors"
    prefix = "language_model.model.layers.1.mlp.experts.6."
    content, found = weights.read_bytes(), []
    for name, tensor in read_headers(disk_layout).items():
        if name.startswith(prefix):
            found.append(content[tensor.offset : tensor.offset + SAMPLED_BYTES])
    sample = pooled(disk_layout, 3).experts._readers[1].sample(6)
    parts = [sample[i : i + SAMPLED_BYTES] for i in range(0, len(sample), SAMPLED_BYTES)]
    assert len(found) == 9 and sorted(parts) == sorted(found)


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


def become_small(resident: Any, config: Any, context: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has room for five experts of each layer."""
    experts = stack_bytes(resident)
    others = sum(a.nbytes for _, a in tree_flatten(resident.parameters())) - experts
    counted = memory.count(config, others, context, None, 4)
    needed = counted.total - counted.features + memory.sweep_bytes(config, context, 4)
    # Features of pictures have a share of all.
    room = int((needed + 5.01 * experts / EXPERTS) / (1 - memory.FEATURES_SHARE))
    small = describe()._replace(gpu_limit_bytes=room)
    for module in (memory, expert_pool):
        monkeypatch.setattr(module, "describe", lambda: small)


def test_experts_that_do_not_fit_are_read_from_disk_without_being_asked(
    resident: Any,
    converted_demo: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    become_small(resident, resident.config, 16, monkeypatch)
    model, _ = load_model(converted_demo, context=16)
    assert model.experts.num_slots == 5
    assert "5 of 8 of each layer" in caplog.text
    with pytest.raises(MemoryRefused):
        load_model(converted_demo, context=16, mtp=True)
    assert load_model(converted_demo, context=16, force=True)[0].experts is None


@pytest.mark.parametrize("kv_bits", ["8", "auto"])
def test_experts_have_the_room_that_keys_and_values_in_few_bits_leave(
    resident: Any,
    converted_demo: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kv_bits: str,
) -> None:
    context = resident.config.max_position_embeddings + 1000
    config = memory.kv_choices(resident.config, "8")[0].stretched_to(context)
    # The demo's experts take less than a prompt on its way through them.
    for module in (memory, loading):
        monkeypatch.setattr(module, "sweep_bytes", lambda *_: 0)
    become_small(resident, config, context, monkeypatch)
    model, _ = load_model(converted_demo, context=context, kv_bits=kv_bits)
    assert model.config.kv_bits == (8, 8)
    assert model.experts.num_slots == 5
    assert caplog.text.count("YaRN") == 1
    with pytest.raises(MemoryRefused, match="with experts from disk: too little memory"):
        load_model(converted_demo, context=context, kv_bits="16")


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
