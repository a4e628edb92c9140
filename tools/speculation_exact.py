"""Compares text and caches, bit by bit, of seeded conversations with and without drafts.

python tools/speculation_exact.py [--conversations 500] [--first 0]

Half of them are chats with the demo, the others texts of random checkpoints of every kind and
number of bits. The conversation with drafts runs first; where it is interrupted, the plain one is
interrupted at the same token. The last line is JSON.
"""

import argparse
import functools
import json
import logging
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx

TOOLS = Path(__file__).parent
sys.path[:0] = [str(TOOLS / "demo"), str(TOOLS.parent / "tests")]
from checkpoints import VOCAB, write_checkpoint  # noqa: E402
from evaluate import SOURCE  # noqa: E402
from rollback import held  # noqa: E402
from shown import ASK, shape  # noqa: E402

import qwen35_mlx  # noqa: E402
from qwen35_mlx import Chat  # noqa: E402
from qwen35_mlx.convert import convert  # noqa: E402
from qwen35_mlx.engine import loops, prompt_cache  # noqa: E402
from qwen35_mlx.engine.decode import decode  # noqa: E402
from qwen35_mlx.engine.prompt_cache import PromptCache  # noqa: E402
from qwen35_mlx.engine.sampler import Sampler  # noqa: E402
from qwen35_mlx.engine.speculate import AUTO, LOOKUP, MTP, OFF, Drafter  # noqa: E402
from qwen35_mlx.model.language import Model  # noqa: E402
from qwen35_mlx.model.loading import load_model  # noqa: E402
from qwen35_mlx.sampling import SamplingParams  # noqa: E402

BITS = (None, 2, 3, 4, 5, 6, 8)
WRONG = "often wrong"
KINDS = (MTP, LOOKUP, AUTO, WRONG)
LOOPING = "Spell: garden"
QUESTIONS = (
    "What is the capital of France?", "Repeat: the quick brown fox and the lazy dog",
    "What is 47 + 85?", "Repeat: one two one two one two one two", LOOPING,
)  # fmt: skip
# The figures of a conversation after each of its steps; the last is the caches' bits.
State = tuple[Any, ...]


class OftenWrong(Drafter):
    """A drafter that replaces about a third of its drafts by wrong ones."""

    def propose(self, cache: PromptCache, *arguments: Any) -> mx.array | None:
        drafts = super().propose(cache, *arguments)
        if drafts is None:
            return None
        place = mx.arange(len(drafts)) + len(cache.ids)
        return mx.where(place % 3 == 0, (drafts + 1) % VOCAB, drafts)


def sampling_of(rng: random.Random) -> dict[str, float]:
    """Greedy, or sampled with some of the settings."""
    settings = {
        "temperature": rng.choice([0.0, 0.6, 1.0, 1.5]),
        "top_k": rng.choice([0, 5, 20]),
        "top_p": rng.choice([1.0, 0.9, 0.5]),
        "min_p": rng.choice([0.0, 0.05, 0.2]),
        "presence_penalty": rng.choice([0.0, 1.0, 3.0]),
        "repetition_penalty": rng.choice([1.0, 1.2, 1.6]),
    }
    return settings | {"seed": rng.randrange(1 << 30)}


class Interrupts:
    """Ctrl-C inside a pass, after `at` tokens of a turn.

    `where`: "before" a pass; "after" its graph is built; "commit": at a later token of a round;
    "accept": when half of the layers have been told how many drafts were accepted. A plain pass has
    neither of the last two: there it comes before or after a pass, which leaves the same state.
    """

    def __init__(self, num_said: Callable[[], int], at: int, where: str):
        self.num_said, self.at, self.where = num_said, at, where
        self.came_at: int | None = None

    @property
    def for_plain(self) -> "tuple[int, str] | None":
        """The token and the place of the same interrupt without drafts."""
        if self.came_at is None:
            return None
        return self.came_at, {"commit": "before", "accept": "after"}.get(self.where, self.where)

    def _come(self) -> None:
        if self.came_at is None and self.num_said() >= self.at:
            self.came_at = self.num_said()
            raise KeyboardInterrupt

    @contextmanager
    def armed(self) -> Iterator[None]:
        step, commit, accept = PromptCache.step, PromptCache.commit, prompt_cache.caches.accept
        in_step = False

        def stepping(cache: PromptCache, tokens: mx.array) -> mx.array:
            nonlocal in_step
            if self.where == "before":
                self._come()
            in_step = True
            try:
                hidden = step(cache, tokens)
            finally:
                in_step = False
            if self.where == "after":
                self._come()
            return hidden

        def committing(cache: PromptCache, token: int) -> None:
            if self.where == "commit" and cache._pass and len(cache.ids) > cache._pass[1]:
                self._come()
            commit(cache, token)

        def accepting(entries: Sequence[Any], number: int) -> None:
            if self.where == "accept" and in_step and self.num_said() >= self.at:
                for entry in entries[: len(entries) // 2]:
                    entry.accept(number)
                self._come()
            accept(entries, number)

        with (
            mock.patch.object(PromptCache, "step", stepping),
            mock.patch.object(PromptCache, "commit", committing),
            mock.patch.object(prompt_cache.caches, "accept", accepting),
        ):
            yield


class Script:
    """The steps of one conversation with the demo, the same with drafts and without."""

    def __init__(self, number: int):
        rng = random.Random(number)
        self.rng_seed = rng.randrange(1 << 30)
        self.kind, self.num_drafts = KINDS[number % 4], 1 + number // 4 % 7
        self.options: dict[str, Any] = {
            "sampling": sampling_of(rng),
            "max_tokens": rng.randint(2, 20),
            "enable_thinking": rng.random() < 0.5,
            "think_budget": rng.choice([None, 1, 3, 6]),
            "on_loop": rng.choice(["off", "stop", "penalize"]),
            "stop": rng.choice([(), (), ("is",), ("a", "."), (" ",)]),
        }
        # The demo repeats itself after one of the questions if nothing prevents it.
        self.repeats = number % 9 == 3
        if self.repeats:
            loop = {"sampling": {"temperature": 0.0}, "max_tokens": 20, "enable_thinking": False}
            self.options |= loop | {"stop": (), "on_loop": rng.choice(["stop", "penalize"])}
        kinds = ["say", "say", "picture", "regenerate", "edit", "undo", "ahead", "reload"]
        self.turns = ["picture" if number % 5 == 0 else "say", *rng.choices(kinds, k=2)]
        # What stops each turn: nothing, the reader of the stream, or Ctrl-C.
        self.cuts = [rng.choice(["", "", "close", "before", "after", "commit", "accept"])
                     for _ in self.turns]  # fmt: skip
        self.cut_at = [rng.randint(1, 8) for _ in self.turns]

    def run(
        self, demo: tuple[Any, Any], kind: str, cuts: list[Any], folder: Path
    ) -> Iterator[State]:
        """Run it; `cuts` receives the places of Ctrl-C, or gives them."""
        rng = random.Random(self.rng_seed)
        chat = Chat(*demo, draft=OFF, **self.options)
        drafter = self._drafter(demo[0], kind)
        chat.drafter = drafter
        for turn, cut, at in zip(self.turns, self.cuts, self.cut_at, strict=True):
            question, fresh = rng.choice(QUESTIONS), rng.choice(QUESTIONS)
            question = LOOPING if self.repeats else question
            if turn == "reload":
                chat.save(folder / kind)
                chat = Chat(*demo, draft=OFF, **self.options)
                chat.load(folder / kind)
                chat.drafter = drafter
            elif turn == "ahead":
                chat.read_ahead()
            elif turn == "undo":
                chat.undo()
            actions: dict[str, Callable[[], Any]] = {
                "picture": partial(chat.send, ASK, images=[shape("square", "blue")]),
                "regenerate": chat.regenerate,
                "edit": partial(chat.edit, fresh),
            }
            action = actions.get(turn, partial(chat.send, question))
            yield self._turn(chat, action, cut, at, cuts, kind == OFF)

    def _drafter(self, model: Model, kind: str) -> Drafter:
        if kind == OFF:
            return Drafter(model, OFF)
        make = OftenWrong if kind == WRONG else Drafter
        return make(model, AUTO if kind == WRONG else kind, self.num_drafts)

    def _turn(
        self, chat: Chat, action: Callable[[], Any], cut: str, at: int, cuts: list[Any], plain: bool
    ) -> State:
        said: dict[str, list[str]] = {"thought": [], "answer": [], "tool_call": []}
        stats = chat.stats
        interrupt = None
        if cut not in ("", "close"):
            at, where = (cuts.pop(0) or (1 << 30, cut)) if plain else (at, cut)
            # Until this turn begins, the figures are those of the last one.
            interrupt = Interrupts(
                lambda: chat.stats.generation_tokens if chat.stats is not stats else 0, at, where
            )
        with suppress(KeyboardInterrupt), ExitStack() as stack:
            if interrupt:
                stack.enter_context(interrupt.armed())
            pieces = stack.enter_context(closing(action()))
            for number, piece in enumerate(pieces, 1):
                said[piece.kind].append(piece.text)
                if cut == "close" and number == at:
                    break
        if interrupt and not plain:
            cuts.append(interrupt.for_plain)
        cache = chat._cache
        assert cache is not None
        end = "Ctrl-C" if interrupt and interrupt.came_at is not None else chat.stats.finish_reason
        texts = {kind: "".join(parts) for kind, parts in said.items()}
        # After an interrupt layers may differ; the state to which the cache rewinds may not.
        cache.rewind(len(cache.ids))
        return (
            texts, end, chat.stats.generation_tokens, chat.stats.loops, chat.messages[-1],
            list(cache.ids), held(cache),
        )  # fmt: skip


def random_text(model: Model, number: int, kind: str, said: list[list[int]]) -> Iterator[State]:
    """Texts of a random model, with stopped answers, forced tokens and rewinds.

    `said` receives the tokens of each answer without drafts; later a drafter that knows them errs
    every third time.
    """
    rng = random.Random(number)
    settings = sampling_of(rng)
    seed = int(settings.pop("seed"))
    prompt = rng.choices(range(VOCAB - 1), k=rng.randint(1, 12)) * rng.choice([1, 3])
    drafter = (
        None if kind == OFF else Drafter(model, LOOKUP if kind == WRONG else kind, 1 + number % 7)
    )
    cache = PromptCache(model)
    cache.feeds_mtp = drafter is not None and drafter.uses_mtp
    for answer in range(3):
        num_tokens, cut = rng.randint(1, 24), rng.randint(1, 30)
        penalised, forced = rng.randint(1, 30), rng.choices(range(VOCAB), k=rng.randint(1, 12))
        hidden = cache.read(prompt if answer == 0 else forced, marks=[len(cache.ids) + 1])
        sampler = Sampler(SamplingParams(**settings), mx.array(cache.ids), seed, banned=[3])
        start, tokens = len(cache.ids), list[int]()
        if kind == WRONG:
            drafter = knowing(model, said[answer], start, 1 + number % 7)
        assert hidden is not None
        with closing(decode(cache, hidden, sampler, num_tokens, drafter)) as steps:
            for step in steps:
                tokens.append(step.token)
                if len(tokens) == penalised:
                    sampler.penalise_repeats(3.0, tokens)
                if len(tokens) == cut:
                    break
        if kind == OFF:
            said.append(tokens)
        yield tokens, list(cache.ids), held(cache)
        if answer == 1:
            cache.rewind(start)


def knowing(model: Model, said: Sequence[int], start: int, number: int) -> Drafter:
    """A drafter that knows the answer and is wrong about every third token."""
    drafter = Drafter(model, LOOKUP, number)

    def look_up(ids: Sequence[int], token: mx.array, most: int) -> list[int]:
        first = len(ids) - start + 1
        drafts = said[first : first + min(number, most)]
        return [d if (first + i) % 3 else (d + 1) % VOCAB for i, d in enumerate(drafts)]

    drafter._look_up = look_up  # type: ignore[method-assign]
    return drafter


@functools.cache
def random_model(home: Path, moe: bool, bits: int | None) -> Model:
    """A model of random weights, with an MTP layer."""
    out = home / f"{moe}-{bits}"
    write_checkpoint(out / "src", moe=moe, mtp=True)
    form: dict[str, Any] = {"bits": bits, "group_size": 32} if bits else {"dtype": "float32"}
    return load_model(convert(out / "src", out / "out", **form), mtp=True)[0]


def differences(
    ours: Iterator[State], plain: Callable[[], Iterator[State]], ends: Counter[str]
) -> list[str]:
    """The differences in a conversation; `ends` counts the reasons why answers ended."""
    drafted = list(ours)
    found = []
    for turn, (a, b) in enumerate(zip_longest(drafted, plain(), fillvalue=())):
        if len(a) != len(b):
            found.append(f"turn {turn}")
            continue
        if len(a) > 3:
            ends[str(a[1])] += 1
            ends["penalized"] += a[3]
        pairs = enumerate(zip(a, b, strict=True))
        found += [f"turn {turn}, {i}" for i, (one, other) in pairs if one != other]
    return found


def compare(home: Path, first: int, count: int) -> dict[str, Any]:
    """Run conversations; returns the figures of all."""
    demo = qwen35_mlx.load(convert(SOURCE, home / "demo", bits=4))
    ends: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    wrong = {}
    # Lower limits, so that loops are found in short answers.
    with (
        mock.patch.multiple(loops, GRAM=2, MIN_REPEATS=2, MAX_PROSE_TOKENS=3),
        mock.patch.object(loops.LoopDetector, "_limit_of", lambda self, ids: 3),
    ):
        for number in range(first, first + count):
            if number % 2:
                index = number // 2
                kind, bits = KINDS[index % 4], BITS[index // 8 % len(BITS)]
                model = random_model(home, bool(index // 4 % 2), bits)
                said: list[list[int]] = []
                plain = list(random_text(model, number, OFF, said))
                found = differences(
                    random_text(model, number, kind, said), lambda p=plain: iter(p), ends
                )
            else:
                script, cuts = Script(number // 2), list[Any]()
                kind = script.kind
                found = differences(
                    script.run(demo, kind, cuts, home),
                    lambda s=script, c=cuts: s.run(demo, OFF, c, home),
                    ends,
                )
            kinds[kind] += 1
            if found:
                wrong[number] = found
                print(f"conversation {number} ({kind}) differs: {', '.join(found)}", flush=True)
            if (number - first + 1) % 100 == 0:
                print(f"{number - first + 1} conversations, {len(wrong)} differ", flush=True)
    print("ends of answers of the demo:", ", ".join(f"{k} {n}" for k, n in ends.most_common()))
    return {
        "conversations": count,
        "differences": len(wrong),
        "answer_ends": dict(ends),
        "conversations_by_drafts": dict(kinds),
    }


def main() -> None:
    """Print the differences, then one JSON line; exit 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--conversations", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="number of the first, its seed")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as home:
        figures = compare(Path(home), args.first, args.conversations)
    print(json.dumps(figures))
    if figures["differences"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
