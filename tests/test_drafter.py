"""What is drafted, and how much of it: places that are copied from, times that decide."""

import logging
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from qwen35_mlx.engine import speculate
from qwen35_mlx.engine.prompt_cache import PromptCache
from qwen35_mlx.engine.sampler import Sampler
from qwen35_mlx.engine.speculate import LOOKUP, MAX_DRAFTS, MTP, Drafter
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.sampling import SamplingParams

PICTURE = -7


class Clock:
    """Stands still unless a pass moves it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def drafter_of(mode: str = LOOKUP, number: int | None = None) -> Any:
    """One whose model has an MTP layer, with a clock of its own."""
    drafter: Any = Drafter(SimpleNamespace(mtp="a layer"), mode, number)  # type: ignore[arg-type]
    drafter.clock = Clock()
    drafter.begin()
    return drafter


def passes(
    drafter: Any, kind: str, seconds: float, drafts: int, right: int, times: int = 1
) -> None:
    """Passes that end this long after one another."""
    for _ in range(times):
        drafter._kind, drafter._is_ahead = kind, not kind
        drafter.clock.now += seconds
        drafter.record(drafts, right)


def look_up(drafter: Any, ids: list[int], token: Any, most: int = 7) -> list[int] | None:
    """The drafts behind `ids` and a token."""
    cache: Any = SimpleNamespace(ids=ids, can_go_back=True)
    token = mx.array([token]) if isinstance(token, int) else token
    found = drafter.propose(cache, token, None, most)
    return None if found is None else found.tolist()


def test_a_text_that_repeats_is_looked_up(demo: Any) -> None:
    model, tokenizer = demo
    ids = tokenizer.encode("one two three four five six. one two three")
    drafter = Drafter(model, LOOKUP, 4)
    last = mx.array([ids[-1]])
    cache, sampler = (
        PromptCache(model, ids[:-1], model.make_cache()),
        Sampler(SamplingParams(), last),
    )
    found = drafter.propose(cache, last, sampler, 7)
    start = len(tokenizer.encode("one two three"))
    assert found is not None and found.tolist() == ids[start : start + 4]
    assert drafter.propose(cache, mx.array([2]), sampler, 7) is None
    assert drafter.propose(cache, last, sampler, 0) is None


def test_the_latest_place_is_copied_from_and_no_more_than_what_is_wanted() -> None:
    ids = [1, 2, 3, 4, 50, 51, 9, 1, 2, 3, 4, 60, 61, 9, 1, 2, 3]
    assert look_up(drafter_of(), ids, 4, most=2) == [60, 61]
    assert look_up(drafter_of(number=1), ids, 4) == [60]
    assert look_up(drafter_of(), ids, 5) is None
    assert look_up(drafter_of(), [1, 2, 3, 4, 9, 2, 3], 4) is None
    assert look_up(drafter_of(), [3, 4, 9, 3, 4, 9][:4], 9) is None


def test_a_copy_goes_on_where_it_was_though_the_same_came_later() -> None:
    head = [1, 2, 3, 4]
    # The old text; a part of it again, with another end; now its beginning is copied.
    ids = [*range(100, 110), *head, 50, 51, 52, 99, *head, 60, 61, 98, 100, 101, 102]
    drafter = drafter_of(number=7)
    assert look_up(drafter, ids, 103) == [104, 105, 106, 107, 108, 109, 1]
    drafter.record(7, 7)
    ids += [103, 104, 105, 106, 107, 108, 109, 1, 2, 3]
    assert look_up(drafter, ids, 4, most=3) == [50, 51, 52]
    # Another text has nothing to do with it.
    assert look_up(drafter, list(ids), 4, most=3) == [60, 61, 98]


@pytest.mark.parametrize(("text", "drafts"), [([5] * 6, [5] * 4), ([7, 8] * 4, [7, 8, 7, 8])])
def test_a_copy_that_reaches_its_own_end_goes_round(text: list[int], drafts: list[int]) -> None:
    assert look_up(drafter_of(number=4), text[:-1], text[-1]) == drafts


def test_nothing_is_copied_from_behind_a_picture() -> None:
    ids = [1, 2, 3, 4, 5, PICTURE, 6, 7, 1, 2, 3]
    assert look_up(drafter_of(), ids, 4) == [5]


def test_a_text_that_repeats_nothing_is_not_waited_for() -> None:
    class Unread:
        def item(self) -> int:
            raise AssertionError("the host waits for the device")

    assert look_up(drafter_of(), [1, 2, 3, 4, 5, 6, 7, 8], Unread()) is None


def test_another_text_of_the_same_length_is_looked_up_in_itself() -> None:
    drafter = drafter_of()
    assert look_up(drafter, [1, 2, 3, 4, 50, 51, 1, 2, 3], 4) == [50, 51, 1, 2]
    assert look_up(drafter, [1, 2, 3, 4, 60, 61, 1, 2, 3], 4) == [60, 61, 1, 2]


def test_kinds_of_drafts_that_are_refused(demo: Any, scripted: Any) -> None:
    with pytest.raises(Qwen35Error, match="unknown kind of drafts"):
        Drafter(demo[0], "eagle")
    for number in (0, 8, -1):
        with pytest.raises(Qwen35Error, match="num_draft_tokens is not usable"):
            Drafter(demo[0], MTP, number)
    assert MAX_DRAFTS == 7
    with pytest.raises(Qwen35Error, match="has no MTP layer"):
        Drafter(scripted([5], vocab_size=16), MTP)


def test_drafting_stops_where_it_does_not_pay_and_is_tried_again() -> None:
    drafter = drafter_of(MTP)
    assert drafter._best_number() == 0
    passes(drafter, "", 1.0, 0, 0, times=3)
    assert drafter._best_number() == 1
    # All are right at half the price a token: deeper is tried.
    passes(drafter, MTP, 1.1, 1, 1, times=3)
    assert drafter._best_number() == 2
    passes(drafter, MTP, 9.0, 2, 2, times=3)
    assert drafter._best_number() == 1
    passes(drafter, MTP, 3.0, 1, 0, times=speculate.REMEMBERED_PASSES)
    for _ in range(speculate.PAUSE_PASSES):
        assert drafter._best_number() == 0
        passes(drafter, "", 1.0, 0, 0)
    # Now the text is another one.
    assert drafter._best_number() == 1
    passes(drafter, MTP, 1.1, 1, 1, times=3)
    assert drafter._best_number() == 2


def test_drafts_that_never_pay_are_tried_less_and_less_until_they_do() -> None:
    drafter = drafter_of(MTP)

    def pause_after_trial() -> int:
        passes(drafter, "", 1.0, 0, 0, times=3)
        passes(drafter, MTP, 3.0, 1, 0, times=3)
        assert drafter._best_number() == 0
        passes(drafter, "", 1.0, 0, 0, times=drafter._pause[MTP] - 1)
        assert drafter._best_number() == 0
        return drafter._next_pause[MTP] // 2

    assert [pause_after_trial() for _ in range(4)] == [64, 128, 256, 256]
    passes(drafter, "", 1.0, 0, 0, times=3)
    passes(drafter, MTP, 1.1, 1, 1, times=3)
    assert drafter._best_number() == 2
    passes(drafter, MTP, 9.0, 2, 0, times=3)
    assert drafter._best_number() == 1
    passes(drafter, MTP, 3.0, 1, 0, times=speculate.REMEMBERED_PASSES)
    assert drafter._best_number() == 0
    assert drafter._pause[MTP] == speculate.PAUSE_PASSES


def test_a_size_that_was_slow_once_is_timed_again() -> None:
    drafter = drafter_of(MTP)
    passes(drafter, "", 1.0, 0, 0, times=3)
    passes(drafter, MTP, 1.1, 1, 1, times=3)
    passes(drafter, MTP, 9.0, 2, 2, times=3)
    assert drafter._best_number() == 1
    passes(drafter, MTP, 1.1, 1, 1, times=speculate.PASSES_TO_FORGET)
    passes(drafter, "", 1.0, 0, 0, times=3)
    assert drafter._best_number() == 2


def test_a_plain_pass_behind_drafts_does_not_count_as_free() -> None:
    drafter = drafter_of(MTP, 2)
    drafter.propose(SimpleNamespace(can_go_back=False), None, None, 7)
    # The first token is known: its pass has only been started.
    drafter.record()
    assert list(drafter._seconds[0]) == []
    drafter.clock.now += 1.0
    drafter.record()
    # Drafts need the token of the pass that runs.
    drafter.clock.now += 1.5
    drafter._wait_for(mx.array([3]))
    drafter._kind, drafter.clock.now = MTP, drafter.clock.now + 2.0
    drafter.record(2, 1)
    drafter._kind = ""
    drafter.record()
    assert list(drafter._seconds[0]) == [1.0, 1.5]
    assert list(drafter._seconds[2]) == [2.0]


def test_a_host_that_is_late_now_and_then_does_not_make_plain_passes_fast() -> None:
    drafter = drafter_of(MTP)
    for seconds in (1.0, 1.9, 0.1, 1.0, 1.9, 0.1):
        passes(drafter, "", seconds, 0, 0)
    passes(drafter, MTP, 1.2, 1, 1, times=3)
    assert drafter._rates()[0] == 1.0 and drafter._best_number() == 2


@pytest.mark.parametrize(("kind", "pays"), [("", True), (MTP, False)])
def test_lookups_are_left_where_the_mtp_layer_is_faster(kind: str, pays: bool) -> None:
    drafter = drafter_of("auto")
    passes(drafter, "", 1.0, 0, 0, times=3)
    if kind == MTP:
        passes(drafter, MTP, 1.1, 1, 1, times=3)
    text = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]
    # Three tokens for the price of two.
    passes(drafter, LOOKUP, 2.0, 4, 2, times=speculate.REMEMBERED_PASSES)
    assert (drafter._look_up(text, mx.array([4]), 4) == [5, 6, 7, 8]) is pays


def test_drafts_that_are_never_right_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    drafter = drafter_of(MTP)
    with caplog.at_level(logging.WARNING):
        passes(drafter, MTP, 1.0, 2, 0, times=3 * speculate.HOPELESS_AFTER)
    assert drafter.is_hopeless and not drafter.uses_mtp
    assert [r.message for r in caplog.records] == [speculate.HOPELESS]


def test_counts_are_by_kind_and_depth() -> None:
    drafter = drafter_of("auto")
    passes(drafter, MTP, 1.0, 3, 3)
    passes(drafter, MTP, 1.0, 3, 1)
    passes(drafter, LOOKUP, 1.0, 2, 0)
    passes(drafter, "", 1.0, 0, 0)
    stats = drafter.stats
    assert stats.summary == {MTP: [1.0, 0.5, 1.0], LOOKUP: [0.0]}
    assert stats.tokens_per_pass == (4 + 2 + 1 + 1) / 4
    assert stats.first_drafts == (2, 2)
