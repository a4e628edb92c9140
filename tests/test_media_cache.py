"""Pictures in a sequence: cut anywhere, gone back to, forked; never taken for another one."""

import random
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from everyday import everyday
from shown import (
    ASK,
    DIRECT,
    fresh_logits,
    noise,
    png,
    shape,
    some_shapes,
    user,
    with_videos,
)

import qwen35_mlx
from qwen35_mlx.chat import conversation
from qwen35_mlx.engine import generate as generate_module
from qwen35_mlx.engine.features import FeatureStore
from qwen35_mlx.engine.prefix_store import PrefixStore
from qwen35_mlx.engine.prompt_cache import PromptCache, rope_delta
from qwen35_mlx.engine.sampler import Sampler
from qwen35_mlx.errors import PromptError
from qwen35_mlx.model.language import Model
from qwen35_mlx.model.vision import VisionTower
from qwen35_mlx.prompt import encode_messages, media_ids

MOST_DIFFERENT = 3e-4
RED, BLUE = shape("circle", "red"), shape("star", "blue")


def prompt(tokenizer: Any, *pixels: Any, text: str = ASK) -> list[int]:
    return encode_messages(
        tokenizer,
        [user(text, *pixels)],
        add_generation_prompt=True,
        enable_thinking=False,
    )


def logits(model: Model, hidden: mx.array | None) -> np.ndarray:
    assert hidden is not None
    return np.array(model.head(hidden)[0, -1].astype(mx.float32))


def assert_read(cache: PromptCache, hidden: mx.array | None, ids: list[int]) -> None:
    """What was read is what a reading from the start gives, and so is the next step."""
    model = cache.model
    assert list(cache.ids) == ids
    np.testing.assert_allclose(logits(model, hidden), fresh_logits(model, ids), atol=MOST_DIFFERENT)
    token = 300
    step = logits(model, cache.step(mx.array([token])))
    cache.commit(token)
    np.testing.assert_allclose(step, fresh_logits(model, [*ids, token]), atol=MOST_DIFFERENT)


@pytest.mark.parametrize("size", everyday([4, 1, 7, 37, 2048], 0))
def test_a_prompt_is_cut_anywhere_and_inside_pictures(demo: Any, size: int) -> None:
    model, tokenizer = demo
    ids = prompt(tokenizer, noise(tokenizer, 2, 5), RED, noise(tokenizer, 6, 1))
    cache = PromptCache(model)
    hidden = cache.read(ids, step_size=size)
    assert cache.features.num_encoded == 3
    assert rope_delta(ids) == -(10 - 5) - (9 - 3) - (6 - 6)
    assert_read(cache, hidden, ids)


@pytest.mark.slow
def test_a_video_is_read_group_by_group(demo: Any) -> None:
    model, tokenizer = demo
    tokenizer = with_videos(tokenizer)
    parts = [{"type": "video", "video": some_shapes(5), "fps": 1.0}, *user(ASK, RED)["content"]]
    ids = encode_messages(
        tokenizer, [{"role": "user", "content": parts}], add_generation_prompt=True
    )
    cache = PromptCache(model)
    hidden = cache.read(ids, step_size=13)
    assert cache.features.num_encoded == 2
    assert rope_delta(ids) == -4 * (9 - 3)
    assert_read(cache, hidden, ids)


@pytest.mark.slow
def test_back_to_a_point_inside_and_behind_a_picture(demo: Any) -> None:
    model, tokenizer = demo
    ids = prompt(tokenizer, RED, noise(tokenizer, 2, 5))
    other = prompt(tokenizer, RED, BLUE, text="Which shape?")
    start = next(i for i, token in enumerate(ids) if token < 0)
    inside, behind = start + 4, start + 9
    cache = PromptCache(model)
    cache.read(ids, marks=[inside, behind])
    fork = cache.fork(behind)
    assert fork.features is cache.features
    assert_read(fork, fork.read(other[behind:]), other)
    assert fork.rewind(inside + 1) == inside
    assert_read(fork, fork.read(ids[inside:]), ids)
    # The first one is where it was.
    assert_read(cache, cache.rewind(behind) and cache.read(ids[behind:]), ids)
    fork = cache.fork(len(ids) + 1)
    assert_read(fork, fork.read(other), [*ids, 300, *other])
    cache.rewind(0)
    assert_read(cache, cache.read(text := tokenizer.encode("Who are you?")), text)


def test_a_sequence_continues_where_an_interrupt_left_it(demo: Any) -> None:
    model, tokenizer = demo
    ids = prompt(tokenizer, RED, BLUE)
    cache = PromptCache(model)
    start = next(i for i, token in enumerate(ids) if token < 0)
    cache.read(ids[: start + 5], marks=[start + 5])
    with (
        mock.patch.object(VisionTower, "__call__", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        cache.read(ids[start + 5 :], step_size=3)
    kept = cache.rewind(cache.reusable_tokens(ids))
    # Up to the last piece before the second picture, whose tokens have other digests.
    second = next(i for i in range(len(ids) - 2, 0, -1) if ids[i] >= 0 > ids[i + 1])
    assert start + 5 < kept <= second + 1 < kept + 3
    assert_read(cache, cache.read(ids[kept:]), ids)


@pytest.mark.parametrize(("seed", "num_turns"), everyday([(0, 2), *((n, 8) for n in range(12))], 0))
def test_another_picture_is_never_answered_from_the_cache(
    demo: Any, seed: int, num_turns: int
) -> None:
    """Swaps, turned grids of the same number of tokens, and videos of the same pixels."""
    model, tokenizer = demo
    tokenizer = with_videos(tokenizer)
    rng = random.Random(seed)
    still = noise(tokenizer, 3, 3, seed=1)
    shown = [
        {"type": "image", "image": one}
        for one in (RED, BLUE, noise(tokenizer, 4, 6), noise(tokenizer, 6, 4), still)
    ]
    shown += [{"type": "video", "video": [still.pixels] * n, "fps": fps}
              for n, fps in ((2, 1.0), (2, 2.0), (4, 2.0))]  # fmt: skip
    store = PrefixStore(model)
    known = []
    current = None
    for _ in range(num_turns):
        parts = rng.sample(shown, rng.randint(1, 2))
        message = {"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}
        ids = encode_messages(tokenizer, [message], add_generation_prompt=True)
        known.append(ids)
        marks = {rng.randrange(1, len(ids)) for _ in range(3)}
        current = store.take(ids[:-1], current if rng.random() < 0.7 else None)
        kept = len(current.ids)
        hidden = current.read(ids[kept:], marks=marks, step_size=rng.choice([3, 17, 2048]))
        np.testing.assert_allclose(
            logits(model, hidden), fresh_logits(model, ids), atol=MOST_DIFFERENT
        )
    assert store.features.num_encoded <= len(shown)


@pytest.mark.slow
def test_a_file_that_is_overwritten_is_another_picture(demo: Any, tmp_path: Path) -> None:
    file = tmp_path / "shape.png"
    chat = qwen35_mlx.Chat(*demo, enable_thinking=False, sampling={"temperature": 0.0})
    for pixels, name in ((RED, "red circle"), (BLUE, "blue star"), (RED, "red circle")):
        file.write_bytes(png(pixels))
        said = "".join(piece.text for piece in chat.send(ASK, images=[file]))
        assert said == f"A {name}."
        assert qwen35_mlx.generate(*demo, ASK, images=[file], **DIRECT) == said
        chat.restart()
    assert chat.prefixes.features.num_encoded == 2


@pytest.mark.slow
def test_features_are_kept_within_their_bytes_and_encoded_once_a_read(demo: Any) -> None:
    model, tokenizer = demo
    ids = prompt(tokenizer, *some_shapes(4))
    one = 9 * model.config.hidden_size * 4
    for budget, again in ((4 * one, 0), (one - 1, 4)):
        features = FeatureStore(model, budget)
        for num_encoded in (4, 4 + again):
            cache = PromptCache(model, features=features)
            # Each picture is in several pieces.
            cache.read(ids, step_size=5)
            assert features.num_encoded == num_encoded
            assert features.nbytes <= budget
    # The one used last stays.
    features = FeatureStore(model, 2 * one)
    shown = [[i for i in prompt(tokenizer, pixels) if i < 0] for pixels in some_shapes(3)]
    for place in (0, 1, 0, 2, 0):
        features.rows(shown[place])
    assert features.num_encoded == 3


def test_features_that_do_not_fit_the_placeholders_are_refused(demo: Any) -> None:
    model, tokenizer = demo
    real = VisionTower.__call__
    with (
        mock.patch.object(VisionTower, "__call__", lambda *a: real(*a)[:-1]),
        pytest.raises(PromptError, match="do not match"),
    ):
        PromptCache(model).read(prompt(tokenizer, RED))


def test_text_is_read_as_if_there_were_no_pictures(demo: Any) -> None:
    """No tables, no embeddings apart, no delta; and behind pictures the delta alone."""
    model, tokenizer = demo
    calls: list[dict[str, Any]] = []
    real = Model.trunk

    def spied(self: Any, ids: Any, cache: Any, **options: Any) -> mx.array:
        calls.append({**options, "ids": ids})
        return real(self, ids, cache, **options)

    text, shown = tokenizer.encode("What is blue?"), prompt(tokenizer, RED)
    with mock.patch.object(Model, "trunk", spied):
        cache = PromptCache(model)
        cache.read(text)
        cache.step(mx.array([5]))
        cache.commit(5)
        cache.read(shown)
        cache.read(text)
        cache.step(mx.array([5]))
        cache.rewind(0)
        cache.read(text)
    assert [call.get("rope_delta", 0) for call in calls] == [0, 0, 0, -6, -6, 0]
    given = [
        {name for name in ("ids", "embeddings", "positions") if call.get(name) is not None}
        for call in calls
    ]
    assert given == [{"ids"}] * 2 + [{"embeddings", "positions"}] + [{"ids"}] * 3


def test_a_callers_cache_needs_the_ids_of_its_pictures(demo: Any) -> None:
    model, tokenizer = demo
    ids = prompt(tokenizer, RED)
    more = tokenizer.encode(
        "A red circle.<|im_end|>\n<|im_start|>user\nWhat colour is it?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    whole = qwen35_mlx.generate(model, tokenizer, [*ids, *more], temperature=0.0)
    assert whole == "It is red."
    cache = model.make_cache()
    PromptCache(model, entries=cache).read(ids)
    for cached in ([], ids[:-1]):
        with pytest.raises(PromptError, match="are needed with pictures"):
            qwen35_mlx.generate(model, tokenizer, prompt(tokenizer, BLUE), cache=cache,
                                cached_ids=cached)  # fmt: skip
    options: dict[str, Any] = {"cache": cache, "cached_ids": ids, "temperature": 0.0}
    assert qwen35_mlx.generate(model, tokenizer, more, **options) == whole
    # One that was empty, and then goes on without a word about its pictures.
    cache = model.make_cache()
    qwen35_mlx.generate(model, tokenizer, ids, cache=cache, max_tokens=1)
    with pytest.raises(PromptError, match="are needed with pictures"):
        qwen35_mlx.generate(model, tokenizer, more, cache=cache)


def test_penalties_count_the_placeholder(demo: Any) -> None:
    """An id below 0 would count some other token of the vocabulary."""
    _, tokenizer = demo
    counted = []

    class Spied(Sampler):
        def __init__(self, params: Any, prompt: mx.array, *others: Any):
            counted.append(prompt.tolist())
            super().__init__(params, prompt, *others)

    chat = qwen35_mlx.Chat(*demo, enable_thinking=False, max_tokens=2)
    with (
        mock.patch.object(generate_module, "Sampler", Spied),
        mock.patch.object(conversation, "Sampler", Spied),
    ):
        qwen35_mlx.generate(*demo, ASK, images=[RED], max_tokens=2, enable_thinking=False)
        list(chat.send(ASK, images=[RED]))
    ids = prompt(tokenizer, RED)
    pad = media_ids(tokenizer)["<|image_pad|>"]
    assert counted == [[pad if i < 0 else i for i in ids]] * 2
