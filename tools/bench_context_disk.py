"""Sessions on disk: bytes written for what was appended, kills at random moments, stopped prompts.

python tools/bench_context_disk.py [--kills 100]

All with the demo. Prints a line for each measurement; the last line is JSON.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import qwen35_mlx
from qwen35_mlx import Chat, files
from qwen35_mlx.chat import sessions
from qwen35_mlx.chat.sessions import read_conversation, session_file
from qwen35_mlx.engine import segment_file
from qwen35_mlx.engine.prompt_cache import PromptCache
from qwen35_mlx.model.cache import KVCache

DEMO = Path(qwen35_mlx.__file__).parent / "demo"
NUM_TURNS, TURN_TOKENS, PROMPT_TOKENS, NUM_KILLS = 50, 1200, 30_000, 100
CONTEXT, START_SECONDS = 131_072, 120
QUESTIONS = ("What is the capital of France?", "Who are you?", "What is 47 + 85?", "Spell: garden")
# A conversation begins anew behind so many turns.
MAX_TURNS = 30
SESSION = "one"
GREEDY = {"temperature": 0.0}


def long_demo(folder: Path) -> Path:
    """The demo at 4 bits, whose config allows more tokens than it was taught."""
    # Here, as it starts threads, which a fork would not have.
    from qwen35_mlx.convert import convert

    out: Path = convert(DEMO, folder / "demo", bits=4)
    config = json.loads((out / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = CONTEXT
    (out / "config.json").write_text(json.dumps(config))
    return out


def words(num_tokens: int, seed: int) -> str:
    """A text of about so many tokens."""
    generator = random.Random(seed)
    return " ".join(generator.choice(("word", "cat", "sun", "tree")) for _ in range(num_tokens))


def session_bytes(model: Any, tokenizer: Any) -> dict[str, Any]:
    """A conversation saved after every turn: bytes written over those of its tokens."""
    written = {"segments": 0, "states": 0, "words": 0}
    real = files.replacing

    @contextmanager
    def counting(file: Path, mode: int = 0o666) -> Iterator[Path]:
        with real(file, mode) as temporary:
            yield temporary
        kinds = {".json": "words", ".keys": "segments", ".states": "states"}
        kind = kinds[file.suffix if file.suffix == ".json" else file.suffixes[-2]]
        written[kind] += file.stat().st_size

    segment_file.replacing = sessions.replacing = counting  # type: ignore[attr-defined]
    try:
        chat = Chat(model, tokenizer, max_tokens=16, sampling=GREEDY, enable_thinking=False)
        for turn in range(NUM_TURNS):
            for _ in chat.send(words(TURN_TOKENS, turn)):
                pass
            chat.save("long", with_cache=False)
            chat.start_reading_ahead()
            chat.stop_reading_ahead(wait_for_end=True)
    finally:
        segment_file.replacing = sessions.replacing = real  # type: ignore[attr-defined]
    cache = chat._cache
    assert cache is not None
    kvs = [entry for entry in cache.all_entries if isinstance(entry, KVCache)]
    token_bytes = sum(a.nbytes for entry in kvs for a in entry.rows(0, 1).values())
    appended = token_bytes * len(cache.ids)
    return {
        "disk_bytes_over_appended": round((written["segments"] + written["words"]) / appended, 4),
        "session_tokens": len(cache.ids),
        "states_a_turn": round(written["states"] / NUM_TURNS / cache.end().nbytes, 3),
        "written_bytes": written,
    }


def digest(cache: PromptCache) -> str:
    """Of every bit that the layers hold."""
    arrays: list[mx.array] = []
    for entry in cache.all_entries:
        if isinstance(entry, KVCache):
            arrays += entry.rows(0, entry.offset).values()
        else:
            arrays += entry.cache
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.array(mx.contiguous(array).reshape(-1).view(mx.uint8)).tobytes())
    return found.hexdigest()


def said(messages: Any) -> str:
    """A digest of messages."""
    return hashlib.sha256(json.dumps(messages).encode()).hexdigest()


def save_turns(model_folder: str, log: Path) -> None:
    """Talk and save until somebody kills this process; `log` has what was saved when."""

    def note(*values: object) -> None:
        with log.open("a") as out:
            out.write(" ".join(map(str, values)) + "\n")

    chat = Chat(*qwen35_mlx.load(model_folder), max_tokens=8, sampling=GREEDY)
    if session_file(SESSION).exists():
        chat.load(SESSION)
    note("started")
    while True:
        for _ in chat.send(QUESTIONS[len(chat.messages) // 2 % len(QUESTIONS)]):
            pass
        chat.save(SESSION, with_cache=False)
        note("turn", len(chat.messages), said(chat.messages))
        chat.read_ahead()
        assert chat._cache is not None
        note("read", len(chat._cache.ids), digest(chat._cache))
        for _ in chat.write_cache():
            pass
        note("written", len(chat._cache.ids))


def savers(model_folder: str, log: Path) -> None:
    """Fork a process that saves for each line on standard input, and tell when it is gone.

    What it imports is there already. On a Mac a child cannot use the GPU, and starts anew.
    """
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            if sys.platform == "darwin":
                command = [sys.executable, __file__, "save", model_folder, str(log)]
                os.execv(sys.executable, command)
            save_turns(model_folder, log)
        print(child, flush=True)
        os.waitpid(child, 0)
        print("gone", flush=True)


def kill_savers(model_folder: Path, home: Path, num_kills: int) -> dict[str, Any]:
    """Kill a process that saves a session, at random moments, and look at what is there."""
    model, tokenizer = qwen35_mlx.load(model_folder)
    home.parent.mkdir(parents=True, exist_ok=True)
    log, generator = home.parent / "saved.log", random.Random(0)
    lost = in_a_write = turns = 0
    known: dict[tuple[str, int], str] = {}
    process = subprocess.Popen(
        [sys.executable, __file__, "savers", str(model_folder), str(log)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "QWEN35_MLX_SESSIONS": str(home)},
    )  # fmt: skip
    assert process.stdin and process.stdout
    os.environ["QWEN35_MLX_SESSIONS"] = str(home)
    with process:
        for kill in range(num_kills):
            log.write_text("")
            process.stdin.write("go\n")
            process.stdin.flush()
            pid = int(process.stdout.readline())
            end = time.monotonic() + START_SECONDS
            while "started" not in log.read_text():
                if time.monotonic() > end:
                    raise RuntimeError("the process that saves did not start")
                time.sleep(0.01)
            limit = time.monotonic() + generator.uniform(0.0, 1.5) + kill % 2
            # Every other time in the midst of a write.
            while time.monotonic() < limit:
                if kill % 2 and time.monotonic() > limit - 1 and any(home.rglob(".*.partial.*")):
                    break
            os.kill(pid, signal.SIGKILL)
            assert process.stdout.readline() == "gone\n"
            in_a_write += any(home.rglob(".*.partial.*"))
            # The last line may have been cut.
            lines = [line.split() for line in log.read_text().split("\n")[:-1]]
            known |= {(line[0], int(line[1])): line[2] for line in lines if len(line) == 3}
            turns += sum(line[0] == "turn" for line in lines)
            lost += not _is_whole(model, tokenizer, lines, known)
            file = session_file(SESSION)
            if file.exists() and len(read_conversation(file)["messages"]) > 2 * MAX_TURNS:
                sessions.remove_session(SESSION)
                known = {}
        process.stdin.close()
    return {"kills": num_kills, "kills_lost": lost, "kills_in_a_write": in_a_write, "turns": turns}


def _is_whole(model: Any, tokenizer: Any, lines: list[list[str]], known: dict[Any, str]) -> bool:
    """Whether words and cache are what a process has noted last, or what it saved after that."""
    chat = Chat(model, tokenizer, max_tokens=8, sampling=GREEDY)
    if not session_file(SESSION).exists():
        return not any(line[0] == "turn" for line in lines)
    warning = chat.load(SESSION)
    num_said = max((n for kind, n in known if kind == "turn"), default=0)
    wanted = known.get(("turn", len(chat.messages)))
    words_are_there = len(chat.messages) >= num_said and (
        wanted is None or said(chat.messages) == wanted
    )
    num_read = len(chat._cache.ids) if chat._cache else 0
    num_written = max((int(line[1]) for line in lines if line[0] == "written"), default=0)
    is_equal = num_read == 0 or digest(chat._cache) == known.get(("read", num_read))
    return warning is None and words_are_there and num_read >= num_written and is_equal


def read_prompt(model_folder: str) -> None:
    """Read a long prompt, or the rest of it; prints tokens while it reads, then what it did."""
    # What is started in the background ignores Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    model, tokenizer = qwen35_mlx.load(model_folder)
    chat = Chat(model, tokenizer, max_tokens=1, sampling=GREEDY, enable_thinking=False)
    chat.load(SESSION) if session_file(SESSION).exists() else chat.save(SESSION)
    num_read, trunk = 0, model.trunk

    def counted(ids: mx.array, *args: Any, **options: Any) -> Any:
        nonlocal num_read
        num_read += ids.shape[1]
        return trunk(ids, *args, **options)

    model.trunk = counted
    pieces = chat.send(words(PROMPT_TOKENS, 7), lambda done, total: print(done, flush=True))
    with suppress(KeyboardInterrupt):
        next(pieces, None)
    pieces.close()
    chat.save(SESSION)
    print(json.dumps({"read": num_read, "prompt": chat.stats.prompt_tokens}), flush=True)


def reread(model_folder: Path, home: Path) -> dict[str, Any]:
    """Stop a long prompt by Ctrl-C in the middle, and send it again to another process."""
    command = [sys.executable, __file__, "read", str(model_folder)]
    environment = {**os.environ, "QWEN35_MLX_SESSIONS": str(home)}
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert first.stdout
    line = ""
    with first:
        for line in first.stdout:
            if line.strip().isdigit() and int(line) >= PROMPT_TOKENS // 2:
                # In the midst of the next piece.
                time.sleep(0.2)
                first.send_signal(signal.SIGINT)
                break
        line = first.stdout.read().splitlines()[-1]
    before = json.loads(line)
    second = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    after = json.loads(second.stdout.splitlines()[-1])
    return {
        "reread_after_interrupt": before["read"] + after["read"] - after["prompt"],
        "read_before_interrupt": before["read"],
        "interrupted_prompt_tokens": after["prompt"],
    }


def measure(num_kills: int = NUM_KILLS) -> dict[str, Any]:
    """All figures."""
    folder = Path(tempfile.mkdtemp(prefix="qwen35-mlx-disk-"))
    try:
        model_folder = long_demo(folder)
        os.environ["QWEN35_MLX_SESSIONS"] = str(folder / "sessions")
        found = session_bytes(*qwen35_mlx.load(model_folder))
        print(found, file=sys.stderr)
        found |= reread(model_folder, folder / "stopped")
        print(found, file=sys.stderr)
        return found | kill_savers(model_folder, folder / "killed" / "sessions", num_kills)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Measure, or be one of the processes of a measurement."""
    parts = {"savers": savers, "save": save_turns}
    if len(sys.argv) > 3 and sys.argv[1] in parts:
        parts[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
    elif len(sys.argv) > 2 and sys.argv[1] == "read":
        read_prompt(sys.argv[2])
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("--kills", type=int, default=NUM_KILLS)
        print(json.dumps(measure(parser.parse_args().kills)))


if __name__ == "__main__":
    main()
