"""Tokens read per turn of a scripted conversation, ours beside mlx-lm's chat and server.

Twenty turns on the bundled demo in float32, its context lengthened: a system prompt of 4,000
tokens, in one turn a pasted file of 8,000. Thoughts and answers are scripted, so that all three
continue the same conversation; every sampler is replaced by one that says the script's tokens.
mlx-lm's code is run, not modelled: `mlx_lm.chat.main`, and `mlx_lm.server` over HTTP with its
prompt cache, each with mlx-lm's model and caches of the same checkpoint; only the arithmetic of
its layers is left out, for at a hundred thousand tokens of context it takes an hour here.
Counted are the tokens that the model is given before the first token of an answer. Ours computes
everything, and its logits are compared with a fresh reading. Ends with one JSON line.
"""

import argparse
import functools
import json
import logging
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx_lm.chat
import mlx_lm.server
import numpy as np
from label import label

import qwen35_mlx.chat.conversation
from qwen35_mlx import Chat, load
from qwen35_mlx.cli.local_models import SOURCE
from qwen35_mlx.convert import convert
from qwen35_mlx.engine.prefix_store import PrefixStore
from qwen35_mlx.engine.prompt_cache import common_prefix
from qwen35_mlx.engine.sampler import Sampler
from qwen35_mlx.model.language import Model

NUM_TURNS, FILE_TURN = 20, 18
NUM_SYSTEM_TOKENS, NUM_FILE_TOKENS = 4_000, 8_000
CONTEXT_LENGTH = 262_144
MAX_MORE_THAN_NEW = 64
MAX_DIFFERENCE = 3e-4
WORDS = (
    "river stone paper north winter garden silver engine letter mountain copper window island "
    "bridge summer market shadow captain forest village"
).split()

# Logits behind a prompt.
Fresh = Callable[[list[int]], np.ndarray]


class Script:
    """What is said: prompts, and the tokens of thoughts and answers."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.system = self._text(NUM_SYSTEM_TOKENS, 0)
        self.file = self._text(NUM_FILE_TOKENS, 1)
        self.questions = [self.question(turn) for turn in range(NUM_TURNS)]
        self.answers = [self._answer(turn) for turn in range(NUM_TURNS)]

    def question(self, turn: int) -> str:
        text = f"Turn {turn}: {self._text(12 + 3 * (turn % 5), 100 + turn)}?"
        return f"{self.file}\n\n{text}" if turn == FILE_TURN else text

    def _answer(self, turn: int) -> list[int]:
        thought, answer = self._text(30 + turn, 200 + turn), self._text(20 + turn, 300 + turn)
        text = f"{thought}\n</think>\n\n{answer}."
        return [*self.ids(text), self.tokenizer.eos_token_id]

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _text(self, num_tokens: int, seed: int) -> str:
        words = np.random.default_rng(seed).choice(WORDS, num_tokens)
        text = " ".join(words)
        return str(self.tokenizer.decode(self.ids(text)[:num_tokens])).strip()


class Said:
    """Stands in for a sampler: says a list of tokens, and calls back before the first."""

    def __init__(self, ids: list[int], on_first: Callable[[], None]):
        self._ids, self._at, self._on_first = ids, 0, on_first

    def __call__(self, logits: mx.array) -> mx.array:
        if self._at == 0:
            self._on_first()
        # One step is computed ahead of the last.
        token = self._ids[min(self._at, len(self._ids) - 1)]
        self._at += 1
        return mx.full(logits.shape[:1], token, dtype=mx.uint32)


class Counter:
    """Counts the tokens that models of ours read."""

    def __init__(self) -> None:
        self.num_tokens = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        real = Model.trunk

        def counted(model: Any, ids: mx.array, *args: Any, **options: Any) -> Any:
            self.num_tokens += ids.size
            return real(model, ids, *args, **options)

        with mock.patch.object(Model, "trunk", counted):
            yield


class ScriptedChat:
    """A `Chat` that says the script, and remembers the logits at the start of each answer."""

    def __init__(
        self, model: Any, tokenizer: Any, store: PrefixStore | None = None, **options: Any
    ):
        # Tokens of drafts are read and not counted as those of a prompt.
        self.chat = Chat(model, tokenizer, store=store, draft="off", **options)
        self.counter = Counter()
        self.logits = np.zeros(0)
        self.prompt: list[int] = []
        self.prefilled = 0

    def ask(self, pieces: Any, answer: list[int]) -> None:
        """Run a turn; afterwards `prefilled` are the tokens read before the first of the answer."""
        outer = self

        class Scripted(Sampler):
            def __init__(self, params: Any, prompt: mx.array, seed: Any = None, *_: Any):
                super().__init__(params, prompt, seed)
                outer.prompt = prompt.tolist()
                self.said = Said(answer, self.first)

            def first(self) -> None:
                outer.prefilled = outer.counter.num_tokens - before

            def __call__(self, logits: mx.array, *_: Any, **__: Any) -> mx.array:
                if self.said._at == 0:
                    outer.logits = np.array(logits[0].astype(mx.float32))
                return self.said(logits)

        before = self.counter.num_tokens
        with (
            mock.patch.object(qwen35_mlx.chat.conversation, "Sampler", Scripted),
            self.counter.counting(),
        ):
            for _ in pieces:
                pass


def fresh_reader(model: Any) -> Fresh:
    """Gives the logits behind a prompt that is read from its beginning; each is read once."""

    @functools.cache
    def read(prompt: tuple[int, ...]) -> np.ndarray:
        cache, ids = model.make_cache(), mx.array([prompt])
        for start in range(0, len(prompt), 2048):
            hidden = model.trunk(ids[:, start : start + 2048], cache, last_only=True)
            mx.eval(hidden, [entry.state for entry in cache])
        return np.array(model.head(hidden)[0, -1].astype(mx.float32))

    return lambda prompt: read(tuple(prompt))


def ours(model: Any, tokenizer: Any, script: Script, fresh: Fresh, ahead: bool) -> Any:
    """Per turn: prefilled, new, message and prompt tokens, and the largest difference of logits."""
    talk = ScriptedChat(model, tokenizer, system=script.system)
    known: list[list[int]] = []
    rows = []
    for question, answer in zip(script.questions, script.answers, strict=True):
        if ahead:
            talk.chat.start_reading_ahead()
            talk.chat.stop_reading_ahead(wait_for_end=True)
            if talk.chat._cache:
                known.append(list(talk.chat._cache.ids))
        talk.ask(talk.chat.send(question), answer)
        # All but the longest prefix it shares with what was read or generated so far.
        shared = (common_prefix(ids, talk.prompt) for ids in known)
        new = len(talk.prompt) - max(shared, default=0)
        known.append([*talk.prompt, *answer])
        assert talk.prefilled == talk.chat.stats.prefilled_tokens
        difference = float(np.abs(talk.logits - fresh(talk.prompt)).max())
        message = len(script.ids(question))
        rows.append((talk.prefilled, new, message, len(talk.prompt), difference))
    return rows


def switching(
    model: Any, tokenizer: Any, script: Script, fresh: Fresh, folder: Path
) -> dict[str, Any]:
    """Undo, retry, edit, three sessions in turns and one from disk: tokens read, and the bound."""
    talk = ScriptedChat(model, tokenizer, system=script.system)
    chat = talk.chat
    found: dict[str, Any] = {}

    def run(
        name: str, who: ScriptedChat, pieces: Any, num_changed: int, check: bool = True
    ) -> None:
        who.ask(pieces, script.answers[0])
        difference = float(np.abs(who.logits - fresh(who.prompt)).max()) if check else 0.0
        found[name] = (who.prefilled, num_changed + MAX_MORE_THAN_NEW, difference)

    for question in script.questions[:3]:
        talk.ask(chat.send(question), script.answers[0])
    run("retry", talk, chat.regenerate(), 0)
    question = "Edited: what else?"
    run("edit", talk, chat.edit(question), len(script.ids(question)))
    chat.undo()
    question = "Instead of what was taken back?"
    run("undo", talk, chat.send(question), len(script.ids(question)) + len(script.answers[0]))
    others = [ScriptedChat(model, tokenizer, chat.prefixes, system=script.system) for _ in range(2)]
    for n, other in enumerate(others):
        question = f"Another conversation, number {n}?"
        # The system prompt is known; all else is new.
        run(f"new {n}", other, other.chat.send(question), len(script.ids(question)), n == 0)
    previous = len(script.answers[0])
    for round_ in range(2):
        for n, who in enumerate([talk, *others]):
            question = f"Round {round_} of {n}?"
            num_new = previous + len(script.ids(question))
            run(f"switch {round_}.{n}", who, who.chat.send(question), num_new, round_ == 1)
    talk.chat.read_ahead()
    talk.chat.save(folder / "session")
    resumed = ScriptedChat(model, tokenizer)
    with resumed.counter.counting():
        warning = resumed.chat.load(folder / "session")
    assert warning is None
    found["resume"] = (resumed.counter.num_tokens, 0, 0.0)
    question = "And now?"
    run("after resume", resumed, resumed.chat.send(question), len(script.ids(question)))
    return found


@contextmanager
def without_layers(kind: type, counter: Counter) -> Iterator[None]:
    """mlx-lm's model moves its caches on as its layers would, and computes nothing."""

    def forward(model: Any, ids: mx.array, cache: Any = None, **_: Any) -> mx.array:
        counter.num_tokens += ids.size
        batch, length = ids.shape
        for entry in cache:
            if hasattr(entry, "update_and_fetch"):
                nothing = mx.zeros((batch, 1, length, 8))
                entry.update_and_fetch(nothing, nothing)
            else:
                entry[0], entry[1] = mx.zeros((batch, 3, 8)), mx.zeros((batch, 1, 8, 8))
                entry.advance(length)
        return mx.zeros((batch, length, 8))

    with mock.patch.object(kind, "__call__", forward):
        yield


class Reader:
    """mlx-lm reading the script: `read` are its tokens before the first of each answer."""

    def __init__(self, script: Script):
        self.counter, self.read = Counter(), []
        self._script, self._turn, self._started = script, -1, 0

    def question(self) -> str:
        """The next one, or what ends mlx-lm's chat."""
        self._turn, self._started = self._turn + 1, self.counter.num_tokens
        return self._script.questions[self._turn] if self._turn < NUM_TURNS else "q"

    def sampler(self, *_: Any, **__: Any) -> Said:
        """That says the answer."""
        return Said(self._script.answers[self._turn], self._first)

    def _first(self) -> None:
        self.read.append(self.counter.num_tokens - self._started)


def mlx_lm_chat(model: Any, tokenizer: Any, script: Script) -> list[int]:
    """Runs `mlx_lm.chat.main` with a person's side that reads from the script."""
    reader, screen = Reader(script), mock.MagicMock()
    screen.return_value.__enter__.return_value.prompt = reader.question
    argv = ["mlx_lm.chat", "--system-prompt", script.system, "--max-tokens", "4096"]
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(mlx_lm.chat, "load", lambda *_, **__: (model, tokenizer)),
        mock.patch.object(mlx_lm.chat, "ChatUI", screen),
        mock.patch.object(mlx_lm.chat, "make_sampler", reader.sampler),
        without_layers(type(model), reader.counter),
    ):
        mlx_lm.chat.main()
    return reader.read


def mlx_lm_server(model: Any, tokenizer: Any, script: Script) -> list[int]:
    """Runs mlx-lm's server; the client sends what a client has: the answers without thoughts."""
    reader, args = Reader(script), _server_arguments()
    provider = mlx_lm.server.ModelProvider(args)

    def loaded(self: Any, *_: Any, **__: Any) -> Any:
        self.model_key, self.model, self.tokenizer = ("demo", None, None), model, tokenizer
        self.is_batchable = True
        return model, tokenizer

    with (
        mock.patch.object(mlx_lm.server.ModelProvider, "load", loaded),
        mock.patch.object(mlx_lm.server.ModelProvider, "load_default", lambda self: None),
        mock.patch.object(mlx_lm.server, "_make_sampler", reader.sampler),
        mock.patch.object(mlx_lm.server.APIHandler, "log_message", lambda *_: None),
        without_layers(type(model), reader.counter),
    ):
        generator = mlx_lm.server.ResponseGenerator(
            provider, mlx_lm.server.LRUPromptCache(args.prompt_cache_size)
        )
        server = ThreadingHTTPServer(
            ("127.0.0.1", 0), lambda *a, **k: mlx_lm.server.APIHandler(generator, *a, **k)
        )
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            messages = [{"role": "system", "content": script.system}]
            for _ in range(NUM_TURNS):
                messages.append({"role": "user", "content": reader.question()})
                body = {"model": "default_model", "messages": messages, "max_tokens": 4096}
                request = urllib.request.Request(
                    f"http://127.0.0.1:{server.server_port}/v1/chat/completions",
                    json.dumps(body).encode(),
                    {"Content-Type": "application/json"},
                )
                with urllib.request.urlopen(request) as response:
                    said = json.load(response)["choices"][0]["message"]["content"]
                messages.append({"role": "assistant", "content": said})
        finally:
            server.shutdown()
            generator.stop_and_join()
            server.server_close()
    return reader.read


def _server_arguments() -> argparse.Namespace:
    """The server's defaults, as its own parser gives them."""
    caught: list[argparse.Namespace] = []

    def stop(host: str, port: int, provider: Any, **_: Any) -> None:
        caught.append(provider.cli_args)

    with (
        mock.patch.object(sys, "argv", ["mlx_lm.server"]),
        mock.patch.object(mlx_lm.server, "run", stop),
    ):
        mlx_lm.server.main()
    return caught[0]


def main() -> None:
    """Run all three."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only-ours", action="store_true", help="leave mlx-lm out")
    only_ours = parser.parse_args().only_ours
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = convert(SOURCE, Path(temporary) / "demo", dtype="float32")
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["max_position_embeddings"] = CONTEXT_LENGTH
        (folder / "config.json").write_text(json.dumps(config))
        model, tokenizer = load(folder)
        script, fresh = Script(tokenizer), fresh_reader(model)
        plain = ours(model, tokenizer, script, fresh, ahead=False)
        ahead = ours(model, tokenizer, script, fresh, ahead=True)
        more = switching(model, tokenizer, script, fresh, Path(temporary))
        print(f"# ours: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
        theirs: dict[str, list[int]] = {"chat": [], "server": []}
        if not only_ours:
            logging.disable(logging.INFO)
            pair = mlx_lm.load(str(folder))
            theirs["server"] = mlx_lm_server(*pair, script)
            print(f"# server: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
            theirs["chat"] = mlx_lm_chat(*pair, script)
            print(f"# chat: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    report(plain, ahead, more, theirs, time.perf_counter() - begun)


def report(plain: Any, ahead: Any, more: Any, theirs: Any, seconds: float) -> None:
    """A table, a JSON line, and a failure where a bound is broken."""
    print("turn  prompt     new    ours  read ahead: new    ours  message  mlx-lm chat  server")
    for turn, (row, other) in enumerate(zip(plain, ahead, strict=True)):
        rest = [str(theirs[k][turn]) if theirs[k] else "-" for k in ("chat", "server")]
        print(
            f"{turn + 1:4}  {row[3]:6}  {row[1]:6}  {row[0]:6}  {other[1]:15}  {other[0]:6}  "
            f"{other[2]:7}  {rest[0]:>11}  {rest[1]:>6}"
        )
    for name, (num_read, bound, _) in more.items():
        print(f"{name:12} {num_read:6} tokens read, at most {bound}")
    difference = max(row[4] for row in [*plain, *ahead])
    difference = max([difference, *(d for _, _, d in more.values())])
    broken = [n for n, row in enumerate(plain, 1) if row[0] > row[1] + MAX_MORE_THAN_NEW]
    late = [n for n, row in enumerate(ahead[1:], 2) if row[0] > row[2] + MAX_MORE_THAN_NEW]
    worse = [name for name, (num_read, bound, _) in more.items() if num_read > bound]
    is_good = not (broken or late or worse) and difference <= MAX_DIFFERENCE
    print(
        json.dumps(
            {
                "benchmark": "chat",
                **label(),
                "model": "demo, float32",
                "seconds": round(seconds),
                "prefilled_tokens": [row[0] for row in plain],
                "new_tokens": [row[1] for row in plain],
                "mlx_lm_chat_prefilled_tokens": theirs["chat"],
                "mlx_lm_server_prefilled_tokens": theirs["server"],
                "read_ahead_prefilled_tokens": [row[0] for row in ahead],
                "message_tokens": [row[2] for row in ahead],
                "other_prefilled_tokens": {name: row[0] for name, row in more.items()},
                "max_logit_difference": difference,
                "passed": is_good,
            }
        )
    )
    if not is_good:
        print(f"broken: {broken} {late} {worse} {difference}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
