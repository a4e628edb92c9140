"""Drafts change no text and no cache, bit by bit: however many, from wherever, cut wherever."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from checkpoints import write_checkpoint
from everyday import everyday
from shown import shape

import qwen35_mlx
from qwen35_mlx import Chat
from qwen35_mlx.convert import convert
from qwen35_mlx.engine import exact_rows, prompt_cache
from qwen35_mlx.engine.decode import decode
from qwen35_mlx.engine.prompt_cache import PromptCache
from qwen35_mlx.engine.sampler import Sampler
from qwen35_mlx.engine.speculate import LOOKUP, MTP, NOT_EXACT, Drafter
from qwen35_mlx.kernels.tiers import OPERATIONS, with_kernels
from qwen35_mlx.model.language import Model
from qwen35_mlx.model.loading import load_model
from qwen35_mlx.prompt import encode_messages
from qwen35_mlx.sampling import SamplingParams

GREEDY = SamplingParams()
SAMPLED = SamplingParams(0.8, top_k=20, top_p=0.95, presence_penalty=1.0, repetition_penalty=1.1)
QUESTIONS = ("What is the capital of France?", "Repeat: the quick brown fox and the lazy dog")


def states(cache: PromptCache) -> list[mx.array]:
    """What all layers hold of the ids that were read."""
    arrays: list[mx.array] = []
    for entry in cache.entries:
        held = (entry.keys, entry.values) if hasattr(entry, "keys") else entry.cache
        end = getattr(entry, "offset", None)
        arrays += [a[..., :end, :] if hasattr(entry, "keys") else a for a in held]
    return arrays


def read(
    model: Model,
    ids: list[int],
    drafter: Drafter | None,
    params: SamplingParams = GREEDY,
    num_tokens: int = 24,
    stop_after: int | None = None,
    change: Callable[[int, Sampler], None] = lambda count, sampler: None,
) -> tuple[list[int], PromptCache]:
    """Decode behind `ids`; what was said, and the cache that it leaves."""
    cache = PromptCache(model)
    cache.feeds_mtp = drafter is not None and drafter.uses_mtp
    hidden = cache.read(ids)
    sampler = Sampler(params, mx.array(ids), seed=7)
    said: list[int] = []
    assert hidden is not None
    with closing(decode(cache, hidden, sampler, num_tokens, drafter)) as steps:
        for step in steps:
            said.append(step.token)
            change(len(said), sampler)
            if len(said) == stop_after:
                break
    return said, cache


def assert_equal(ours: tuple[list[int], PromptCache], plain: tuple[list[int], PromptCache]) -> None:
    assert ours[0] == plain[0]
    assert list(ours[1].ids) == list(plain[1].ids)
    for a, b in zip(states(ours[1]), states(plain[1]), strict=True):
        assert mx.array_equal(a, b).item()


class Wrong(Drafter):
    """Drafts of which every third one is not what comes."""

    def __init__(self, model: Model, said: list[int], start: int, number: int):
        super().__init__(model, LOOKUP)
        self._said, self._start, self._number = said, start, number

    def propose(self, cache: Any, token: Any, sampler: Any, most: int) -> mx.array | None:
        self._kind = LOOKUP
        first = len(cache.ids) - self._start + 1
        drafts = self._said[first : first + min(self._number, most)]
        wrong = [d if (first + i) % 3 else (d + 1) % 50 for i, d in enumerate(drafts)]
        return mx.array(wrong, dtype=token.dtype) if wrong else None


@pytest.fixture(scope="module", params=everyday(["dense", "moe-4-bit"], 1))
def random_model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Model:
    home = tmp_path_factory.mktemp("random")
    write_checkpoint(home / "src", moe=request.param != "dense", mtp=True)
    settings = {"bits": 4, "group_size": 32} if request.param != "dense" else {"dtype": "float32"}
    model, _ = load_model(convert(home / "src", home / "out", **settings), mtp=True)
    return model


@pytest.fixture
def prompts(demo: Any) -> list[list[int]]:
    return [
        encode_messages(demo[1], [{"role": "user", "content": q}], add_generation_prompt=True)
        for q in QUESTIONS
    ]


@pytest.mark.parametrize("params", everyday([GREEDY, SAMPLED], 1), ids=["greedy", "sampled"])
@pytest.mark.parametrize("number", everyday([1, 2, 3, 4, 5, 6, 7], 2))
def test_drafts_of_the_mtp_layer_change_no_text(
    demo: Any, prompts: list[list[int]], number: int, params: SamplingParams
) -> None:
    drafter = Drafter(demo[0], MTP, number)
    for ids in prompts:
        assert_equal(read(demo[0], ids, drafter, params), read(demo[0], ids, None, params))
    assert drafter.stats.tokens_per_pass > 1.5
    assert drafter.stats.acceptance(MTP)[0] > 0.5


@pytest.mark.parametrize("params", everyday([GREEDY, SAMPLED], 1), ids=["greedy", "sampled"])
@pytest.mark.parametrize("number", everyday([1, 2, 4, 7], 2))
def test_wrong_drafts_change_no_text(
    random_model: Model, number: int, params: SamplingParams
) -> None:
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    plain = read(random_model, ids, None, params)
    drafter = Wrong(random_model, plain[0], len(ids), number)
    assert_equal(read(random_model, ids, drafter, params), plain)
    assert 1.0 < drafter.stats.tokens_per_pass < 1 + number
    # The layer of a random model is hardly ever right.
    assert_equal(read(random_model, ids, Drafter(random_model, MTP, number), params), plain)


@pytest.mark.parametrize("cut", everyday(range(1, 25), 4, 23))
def test_a_round_that_is_cut_leaves_the_state_of_the_shorter_text(
    random_model: Model, cut: int
) -> None:
    ids = [3, 1, 4, 1, 5]
    plain = read(random_model, ids, None)
    drafter = Wrong(random_model, plain[0], len(ids), 5)
    said, cache = read(random_model, ids, drafter, stop_after=cut)
    assert said == plain[0][:cut]
    fresh = PromptCache(random_model)
    fresh.read(ids)
    for token in said[: len(cache.ids) - len(ids)]:
        fresh.step(mx.array([token]))
        fresh.commit(token)
    assert_equal((said, cache), (said, fresh))
    # The last of all that were wanted is not read, any other is.
    assert len(cache.ids) == len(ids) + cut - (cut == 24)


def test_a_penalty_that_changes_in_a_round_counts_from_the_same_token(random_model: Model) -> None:
    def change(count: int, sampler: Sampler) -> None:
        if count == 4:
            sampler.penalise_repeats(9.0, [])

    ids = [3, 1, 4, 1, 5]
    plain = read(random_model, ids, None, change=change)
    assert plain[0] != read(random_model, ids, None)[0]
    drafter = Wrong(random_model, plain[0], len(ids), 6)
    assert_equal(read(random_model, ids, drafter, change=change), plain)


@pytest.mark.slow
def test_lookup_changes_no_text_and_says_which_tokens_were_drafted(demo: Any) -> None:
    # The demo says the same again and again.
    messages = [{"role": "user", "content": "Spell: garden"}]
    settings: dict[str, Any] = {"max_tokens": 40, "temperature": 0.0, "enable_thinking": False}
    plain = list(qwen35_mlx.stream_generate(*demo, messages, draft="off", **settings))
    settings |= {"draft": "lookup", "num_draft_tokens": 5}
    ours = list(qwen35_mlx.stream_generate(*demo, messages, **settings))
    assert [r.token for r in ours] == [r.token for r in plain]
    assert [r.finish_reason for r in ours] == [r.finish_reason for r in plain]
    assert any(r.from_draft for r in ours) and not any(r.from_draft for r in plain)
    for a, b in zip(ours, plain, strict=True):
        assert mx.array_equal(a.logprobs, b.logprobs).item()


@pytest.mark.slow
def test_a_callers_cache_of_mlx_lm_is_read_without_drafts(demo: Any) -> None:
    from mlx_lm.models.cache import make_prompt_cache

    model, tokenizer = demo
    text = "a b c d a b c d a b c"
    settings: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0}
    ours = qwen35_mlx.generate(
        model, tokenizer, text, cache=make_prompt_cache(model), draft="lookup", **settings
    )
    assert ours == qwen35_mlx.generate(model, tokenizer, text, draft="off", **settings)


def conversation(demo: Any, draft: str, **options: Any) -> Iterator[tuple[Any, ...]]:
    """What a chat says and holds after each of some turns, with ends of every kind."""
    chat = Chat(*demo, draft=draft, max_tokens=30, **options)
    turns: list[Callable[[], Any]] = [
        lambda: chat.send(QUESTIONS[1]),
        lambda: chat.send("What colour?", images=[shape("circle", "red")]),
        chat.regenerate,
        lambda: chat.edit(QUESTIONS[0]),
    ]
    for turn in turns:
        said = [(piece.kind, piece.text) for piece in turn()]
        texts = {kind: "".join(t for k, t in said if k == kind) for kind in ("thought", "answer")}
        assert chat._cache is not None
        yield (
            texts, chat.stats.finish_reason, chat.stats.generation_tokens,
            list(chat._cache.ids), states(chat._cache),
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    everyday(
        [
            {"think_budget": 5},
            {},
            {"stop": ["is", "."]},
            {"sampling": {"temperature": 1.0, "seed": 3}},
            {"on_loop": "penalize", "sampling": {"temperature": 0.0}},
            {"enable_thinking": False, "preset": "instruct", "sampling": {"seed": 1}},
        ],
        0,
    ),
    ids=str,
)
def test_a_conversation_is_the_same_with_drafts(demo: Any, options: dict[str, Any]) -> None:
    options = {"sampling": {"temperature": 0.0}, **options}
    plain = conversation(demo, "off", **options)
    for mode in ("mtp", "auto"):
        drafted = conversation(demo, mode, num_draft_tokens=4, **options)
        plain = conversation(demo, "off", **options)
        for ours, theirs in zip(drafted, plain, strict=True):
            assert ours[:4] == theirs[:4]
            assert all(mx.array_equal(a, b).item() for a, b in zip(ours[4], theirs[4], strict=True))


@pytest.mark.slow
def test_a_session_keeps_what_the_mtp_layer_has_read(demo: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"draft": "mtp", "num_draft_tokens": 3, "enable_thinking": False}
    options |= {"max_tokens": 30, "sampling": {"temperature": 0.0}}
    chat = Chat(*demo, **options)
    list(chat.send(QUESTIONS[1]))
    chat.read_ahead()
    chat.save(tmp_path / "kept.json")
    cache = chat._cache
    assert cache is not None and cache.mtp is not None and cache.mtp.cache.offset > 20
    resumed = Chat(*demo, **options)
    assert resumed.load(tmp_path / "kept.json") is None
    loaded = resumed._cache
    assert loaded is not None and loaded.mtp is not None and loaded.mtp.hidden is not None
    assert loaded.mtp.cache.offset == cache.mtp.cache.offset
    for ours, theirs in zip(loaded.mtp.cache.state[:2], cache.mtp.cache.state[:2], strict=True):
        end = cache.mtp.cache.offset
        assert mx.array_equal(ours[..., :end, :], theirs[..., :end, :]).item()
    said, again = ([(p.kind, p.text) for p in c.send(QUESTIONS[1])] for c in (chat, resumed))
    assert said == again
    assert resumed.drafter.stats.acceptance(MTP)[0] > 0.6


def interrupted(model: Model, where: str) -> PromptCache:
    """A cache after Ctrl-C inside of the second round of a text."""
    cache = PromptCache(model)
    prompt = [3, 1, 4, 1, 5]
    hidden = cache.read(prompt, marks=[len(prompt)])
    said = read(model, prompt, None, num_tokens=20)[0]
    drafter = Wrong(model, said, len(prompt), 6)
    assert hidden is not None
    sampler = Sampler(GREEDY, mx.array(prompt), seed=7)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for count, _ in enumerate(decode(cache, hidden, sampler, 20, drafter), 1):
            if count == 2:
                interrupt(patch, cache, where)
    return cache


def interrupt(patch: pytest.MonkeyPatch, cache: PromptCache, where: str) -> None:
    def append(ids: list[int], token: int) -> None:
        raise KeyboardInterrupt

    def accept(entries: list[Any], number: int) -> None:
        for entry in entries[:2]:
            entry.accept(number)
        raise KeyboardInterrupt

    if where == "commit":
        ids = type("Ids", (list,), {"append": append})(cache.ids)
        patch.setattr(cache, "_ids", ids)
    else:
        patch.setattr(prompt_cache.caches, "accept", accept)


@pytest.mark.parametrize("where", everyday(["commit", "accept"], 0))
def test_ctrl_c_inside_of_a_round_leaves_layers_that_agree(random_model: Model, where: str) -> None:
    cache = interrupted(random_model, where)
    cache._ids = list(cache._ids)
    cache.rewind(len(cache.ids))
    fresh = PromptCache(random_model)
    fresh.read(cache.ids[:5])
    for token in cache.ids[5:]:
        fresh.step(mx.array([token]))
        fresh.commit(token)
    # Two tokens were said, and before layers were told so nothing of them is certain.
    assert len(cache.ids) == (7 if where == "commit" else 5)
    assert_equal(([], cache), ([], fresh))


@pytest.mark.slow
def test_drafts_are_switched_in_a_chat_and_its_text_goes_on(demo: Any) -> None:
    options: dict[str, Any] = {"max_tokens": 8, "sampling": {"temperature": 0.0}}
    options |= {"enable_thinking": False}

    def talk(*modes: str) -> Iterator[tuple[Any, ...]]:
        chat = Chat(*demo, **options)
        for mode, question in zip(modes, [*QUESTIONS, *QUESTIONS], strict=True):
            chat.set_draft(mode, None if mode == "off" else 3)
            # Behind another chat that drafts otherwise, with the same prefixes.
            other = Chat(*demo, store=chat.prefixes, draft="off", **options)
            other.messages = list(chat.messages)
            text = "".join(piece.text for piece in chat.send(question))
            list(other.send("Who are you?"))
            assert chat._cache is not None
            yield text, list(chat._cache.ids), states(chat._cache)
        if modes[-1] == "mtp":
            # What was not read along makes drafts worse at first, and not for good.
            assert chat.drafter.stats.acceptance(MTP)[0] > 0.5

    for ours, plain in zip(talk("mtp", "off", "lookup", "mtp"), talk(*["off"] * 4), strict=True):
        assert ours[:2] == plain[:2]
        assert all(mx.array_equal(a, b).item() for a, b in zip(ours[2], plain[2], strict=True))


def test_a_drafter_goes_from_call_to_call(demo: Any) -> None:
    drafter = Drafter(demo[0], MTP, 2)
    settings: dict[str, Any] = {"max_tokens": 6, "temperature": 0.0, "draft": drafter}
    counts = []
    for _ in range(2):
        said = list(qwen35_mlx.stream_generate(*demo, "The capital of", **settings))
        counts.append((len(said), drafter.stats.num_passes))
    assert counts[0][0] == counts[1][0] == 6 and counts[1][1] == 2 * counts[0][1] > 0


def test_on_a_gpu_drafts_are_read_by_kernels_that_give_the_same_bits_alone(
    demo: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, tried = demo[0], []

    def agree(model: Model, rows: int) -> bool:
        tried.append(rows)
        return rows <= 4

    assert exact_rows.exact_rows(model) == 8
    monkeypatch.setattr(exact_rows, "runs_on_cpu", lambda: False)
    monkeypatch.setattr(exact_rows, "rows_agree", agree)
    # On MLX's own operations nothing is tried: their sums follow the number of rows.
    assert exact_rows._exact_rows_of(model) == 1 and not tried
    last = mx.array([5])
    cache = PromptCache(model, [5, 5, 5, 5, 5, 5])
    drafter = Drafter(model, LOOKUP, 4)
    assert drafter.propose(cache, last, Sampler(GREEDY, last), 7) is None
    assert [r.message for r in caplog.records] == [NOT_EXACT]
    # Nor is anything read for them.
    assert not Drafter(model).uses_mtp and len(caplog.records) == 1
    del model._exact_rows
    monkeypatch.setattr(model, "kernels", with_kernels())
    assert exact_rows._exact_rows_of(model) == 4 and tried == [8, 4]
    found = Drafter(model, LOOKUP, 4).propose(cache, last, Sampler(GREEDY, last), 7)
    assert found is not None and len(found) == 3
    del model._exact_rows


def test_all_states_are_compared_also_of_the_first_token(demo: Any) -> None:
    cache = demo[0].make_cache()
    mx.eval(demo[0].trunk(mx.array([[5, 6, 7]]), cache))
    of_keys = [entry for entry in cache if entry.is_trimmable()]
    assert of_keys and all(a.shape[2] == 3 for e in of_keys for a in exact_rows._states(e))


@pytest.mark.parametrize("missing", ["decode_attention", "router"])
def test_one_operation_without_a_kernel_is_enough_to_read_alone(missing: str) -> None:
    tiers = with_kernels([op for op in OPERATIONS if op != missing])
    assert exact_rows.kernel_rows(tiers, is_moe=True) == 0
    assert exact_rows.kernel_rows(tiers, is_moe=False) == (0 if missing != "router" else 8)


def test_rows_that_differ_from_single_ones_are_found(random_model: Model) -> None:
    assert all(exact_rows.rows_agree(random_model, rows) for rows in (2, 8))
    head = random_model.head

    class Other(type(random_model)):
        def head(self, hidden: mx.array) -> mx.array:
            return head(hidden) * (1.0 if hidden.shape[1] == 1 else 1.0001)

    random_model.__class__ = Other
    try:
        assert not exact_rows.rows_agree(random_model, 2)
    finally:
        random_model.__class__ = Model
