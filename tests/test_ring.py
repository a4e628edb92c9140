"""One model in several processes: the text is that of one process, and none waits for ever."""

import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ring_processes import outputs_of_ring, ring

from qwen35_mlx.chat.conversation import Chat
from qwen35_mlx.chat.sessions import read_conversation
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.model import link
from qwen35_mlx.model.adapters import attach_to_model
from qwen35_mlx.model.link import Link, uninterrupted
from qwen35_mlx.model.ring import Handle

# What both one process and several run: `tell(model, tokenizer, argument)` gives text.
PROGRAM = """
import sys, json, qwen35_mlx
{tell}
def main():
    model, tokenizer = qwen35_mlx.load(sys.argv[2], mtp=True)
    print(json.dumps(tell(model, tokenizer, *sys.argv[3:])))
"""
COPY = "Say these words again: red green blue red green blue red green blue red green"
ANSWERS = f"""
def tell(model, tokenizer):
    from qwen35_mlx.engine.speculate import Drafter
    drafter = Drafter(model, "auto", 3)
    options = dict(temperature=0, max_tokens=12, draft=drafter)
    ids = tokenizer._tokenizer.encode({COPY!r}, add_special_tokens=False)
    texts = [qwen35_mlx.generate(model, tokenizer, ids, **options)]
    chat = qwen35_mlx.Chat(model, tokenizer, sampling=dict(temperature=0), max_tokens=12,
                           enable_thinking=False)
    for question in ("What is the capital of France?", "And of Spain?"):
        texts.append("".join(event.text for event in chat.send(question) if hasattr(event, "text")))
    chat.undo()
    texts += [event.text for event in chat.send("Who?") if hasattr(event, "text")]
    return ["".join(texts), sum(map(sum, drafter.stats.drafted.values()))]
"""
PICTURE = """
def tell(model, tokenizer, picture):
    messages = [{"role": "user", "content": "What do you see?"}]
    return qwen35_mlx.generate(model, tokenizer, messages, images=[picture], temperature=0)
"""
SERVED = """
def tell(model, tokenizer):
    from qwen35_mlx.engine.requests import Request, Token
    from qwen35_mlx.engine.scheduler import Engine
    from qwen35_mlx.sampling import SamplingParams
    engine = Engine(model, tokenizer)
    engine.start()
    texts = ("What is the capital of France?", "Who?", "Count to ten.", "Count to ten. Now!")
    tickets = [
        engine.submit(Request(messages=[{"role": "user", "content": text}], max_tokens=16,
            n=1 + (text == "Who?"), params=SamplingParams(), stop_loops=False))
        for text in texts
    ]
    answers = [[e for e in ticket.events() if isinstance(e, Token)] for ticket in tickets]
    engine.stop()
    found = [sorted((e.index, e.token) for e in answer) for answer in answers]
    return [found, engine.stats().get("failed", 0)]
"""
READY = """
import sys, time, signal, os, qwen35_mlx
def main():
    model, tokenizer = qwen35_mlx.load(sys.argv[2])
    chat = qwen35_mlx.Chat(model, tokenizer, sampling=dict(temperature=0), max_tokens=8)
    for _ in chat.send("What is the capital of France?"):
        pass
    chat.save(sys.argv[3])
    print("ready", flush=True)
    while True:
        if sys.argv[4] == "idle":
            time.sleep(1)
        else:
            qwen35_mlx.generate(model, tokenizer, [1, 2, 3], max_tokens=400)
"""
# Ctrl-C at many places of a prompt and of an answer; then what one process says.
INTERRUPTED = """
import os, signal, threading, time
def tell(model, tokenizer, count):
    for number in range(1 + int(count)):
        chat = qwen35_mlx.Chat(model, tokenizer, sampling=dict(temperature=0), max_tokens=40)
        if number == int(count):
            return "".join(e.text for e in chat.send("What is 47 + 85?") if hasattr(e, "text"))
        stop = threading.Timer(0.02 + 0.01 * number, os.kill, (os.getpid(), signal.SIGINT))
        stop.start()
        try:
            for _ in chat.send("What is the capital of France? " * (1 + 3 * (number % 3))):
                pass
            stop.cancel()
        except KeyboardInterrupt:
            pass
        stop.join()
"""


def same(
    size: int, tell: str, folder: Path, home: Path, demo: Any, *arguments: str, split: str = ""
) -> Any:
    """What one process says, which is what several say."""
    names: dict[str, Any] = {}
    exec("import qwen35_mlx" + tell, names)
    alone = json.loads(json.dumps(names["tell"](*demo, *arguments)))
    code = PROGRAM.format(tell=tell)
    outputs = outputs_of_ring(size, code, home, str(folder), *arguments, split=split)
    assert json.loads(outputs[0]) == alone
    assert outputs[1:] == [""] * (size - 1)
    return alone


def test_two_processes_draft_go_back_and_say_what_one_says(
    demo: Any, converted_demo: Path, tmp_path: Path
) -> None:
    text, num_drafted = same(2, ANSWERS, converted_demo, tmp_path, demo)
    assert "Paris" in text
    assert num_drafted


@pytest.mark.slow
def test_four_processes_do_so_with_fewer_key_heads(
    demo: Any, converted_demo: Path, tmp_path: Path
) -> None:
    same(4, ANSWERS, converted_demo, tmp_path, demo)


@pytest.mark.slow
def test_processes_with_whole_layers_draft_go_back_and_say_what_one_says(
    demo: Any, converted_demo: Path, tmp_path: Path
) -> None:
    text, num_drafted = same(2, ANSWERS, converted_demo, tmp_path, demo, split="2,1")
    assert "Paris" in text
    assert num_drafted


@pytest.mark.slow
@pytest.mark.parametrize("tell", [ANSWERS, SERVED])
def test_three_processes_do_so_of_which_two_have_no_keys(
    tell: str, demo: Any, converted_demo: Path, tmp_path: Path
) -> None:
    same(3, tell, converted_demo, tmp_path, demo, split="30,1,1")


@pytest.mark.slow
@pytest.mark.parametrize("split", ["", "2,1"])
def test_a_picture_is_seen_by_rank_0_alone(
    split: str, demo: Any, converted_demo: Path, tmp_path: Path
) -> None:
    picture = Path(link.__file__).parent.parent / "demo" / "picture.png"
    same(2, PICTURE, converted_demo, tmp_path, demo, str(picture), split=split)


@pytest.mark.slow
def test_rows_that_are_answered_together_come_apart_on_every_process(
    demo: Any, converted_demo: Path, tmp_path: Path
) -> None:
    found, num_failed = same(2, SERVED, converted_demo, tmp_path, demo)
    assert [len(tokens) for tokens in found[1:2]] != [0]
    assert num_failed == 0


@pytest.mark.slow
def test_an_interrupt_leaves_no_process_behind(
    demo: Any, converted_demo: Path, tmp_path: Path
) -> None:
    code = PROGRAM.format(tell=INTERRUPTED)
    outputs = outputs_of_ring(2, code, tmp_path, str(converted_demo), "12")
    assert "132" in outputs[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "victim", "sign", "state", "split"),
    [
        (2, 1, signal.SIGKILL, "busy", ""),
        (2, 0, signal.SIGKILL, "idle", ""),
        (2, 1, signal.SIGSTOP, "idle", ""),
        (4, 2, signal.SIGSTOP, "busy", ""),
        (4, 0, signal.SIGSTOP, "busy", ""),
        (3, 1, signal.SIGSTOP, "busy", "1,1,1"),
    ],
)
def test_all_others_name_a_process_that_is_lost_and_end_in_time(
    size: int, victim: int, sign: int, state: str, split: str, converted_demo: Path, tmp_path: Path
) -> None:
    session = tmp_path / "session.json"
    arguments = str(converted_demo), str(session), state
    with ring(size, READY, tmp_path, arguments, split) as processes:
        stream = processes[0].stdout
        assert stream
        assert stream.readline() == "ready\n"
        processes[victim].send_signal(sign)
        end = time.monotonic() + 60
        for rank, process in enumerate(processes):
            if rank != victim:
                errors = process.communicate(timeout=end - time.monotonic())[1]
                assert process.returncode == 1
                assert f"error: process {victim} of the model" in errors
    assert len(read_conversation(session)["messages"]) == 2


SHARDED = """
import os, sys, mlx.core as mx, numpy as np
os.environ.pop("QWEN35_MLX_RING")
import qwen35_mlx
from qwen35_mlx.model.ring import follow
model, _ = qwen35_mlx.load(sys.argv[2])
group = mx.distributed.init(strict=True, backend="ring")
whole = np.array(model(mx.array([[1, 2, 3]])))
model.shard(group)
if group.rank():
    follow(model)
else:
    print(np.abs(np.array(model(mx.array([[1, 2, 3]]))) - whole).max())
sys.exit()
"""


@pytest.mark.slow
def test_a_model_that_is_loaded_whole_can_be_sharded(converted_demo: Path, tmp_path: Path) -> None:
    outputs = outputs_of_ring(2, SHARDED, tmp_path, str(converted_demo))
    assert float(outputs[0]) < 1e-4


FAILING = """
def tell(model, tokenizer, code):
    import mlx.core as mx
    cache = model.make_cache()
    mx.eval(model.trunk(mx.array([[1, 2, 3]]), cache))
    try:
        exec(code)
    except Exception:
        return "went on"
    return "went on"
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "model.trunk(mx.array([[1, 2]] * 2), cache, keep_states=True)",
            "keep_states is for a few tokens of one sequence",
        ),
        # As mlx-lm does.
        (
            "[c.trim(1) for c in cache if c.is_trimmable()]; mx.eval(model.trunk(ids, cache))",
            "a cache was changed in one process alone",
        ),
    ],
)
def test_processes_that_would_compute_different_things_end(
    code: str, said: str, converted_demo: Path, tmp_path: Path
) -> None:
    code = code.replace("ids", "mx.array([[1]])")
    program = PROGRAM.format(tell=FAILING)
    with ring(2, program, tmp_path, (str(converted_demo), code)) as processes:
        for process in processes:
            output, errors = process.communicate(timeout=60)
            assert process.returncode == 1
            assert "went on" not in output
            assert said in errors


@pytest.mark.slow
def test_what_one_process_refuses_is_said_by_all(converted_demo: Path, tmp_path: Path) -> None:
    code = PROGRAM.format(tell="").replace("mtp=True", "context=5_000_000")
    with ring(2, code, tmp_path, (str(converted_demo),)) as processes:
        for process in processes:
            errors = process.communicate(timeout=60)[1]
            assert process.returncode == 1
            assert "the context does not fit the model" in errors


def test_a_session_of_several_processes_is_read_again_and_not_from_a_part(
    demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = demo
    chat = Chat(model, tokenizer, sampling={"temperature": 0}, max_tokens=4)
    for _ in chat.send("hi"):
        pass
    monkeypatch.setattr(model, "ring", object())
    chat.save(tmp_path / "session.json")
    assert not list(tmp_path.rglob("*.safetensors"))
    monkeypatch.setattr(model, "ring", SimpleNamespace(hold=lambda *_: None))
    said = Chat(model, tokenizer).load(tmp_path / "session.json")
    assert said == "several Macs store no cache of a session; it is read again"


MOVED = """
def tell(model, tokenizer, session):
    chat = qwen35_mlx.Chat(model, tokenizer, sampling=dict(temperature=0), max_tokens=8)
    warning = chat.load(session)
    text = "".join(event.text for event in chat.send("And of Spain?") if hasattr(event, "text"))
    chat.save(session)
    chat.undo()
    return [text, chat.stats.prompt_tokens - chat.stats.prefilled_tokens, warning]
"""


@pytest.mark.slow
def test_a_session_goes_on_with_another_number_of_processes_from_its_text(
    demo: Any, converted_demo: Path, tmp_path: Path
) -> None:
    session, names = tmp_path / "session.json", dict[str, Any]()
    exec("import qwen35_mlx" + MOVED, names)
    chat = Chat(*demo, sampling={"temperature": 0}, max_tokens=8)
    for _ in chat.send("What is the capital of France?"):
        pass
    chat.save(session)
    said, code = session.read_bytes(), PROGRAM.format(tell=MOVED)
    text, num_cached, warning = names["tell"](*demo, session)
    assert num_cached and warning is None
    for split in ("", "2,1"):
        session.write_bytes(said)
        outputs = outputs_of_ring(2, code, tmp_path, str(converted_demo), str(session), split=split)
        assert json.loads(outputs[0])[0] == text
        assert "it is read again" in json.loads(outputs[0])[2]
        later = Chat(*demo)
        assert "of several Macs; it is read again" in (later.load(session) or "")
        assert [message["role"] for message in later.messages] == ["user", "assistant"] * 2


def test_an_adapter_of_rank_0_alone_is_refused(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = demo
    monkeypatch.setattr(model, "ring", object())
    adapter: Any = SimpleNamespace(changes={})
    with pytest.raises(Qwen35Error, match="several Macs"):
        attach_to_model(model, adapter)
    assert not model.adapter_digest


def test_nobody_joins_without_the_secret() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        guests = [socket.create_connection(address) for _ in range(4)]
        lines = (b"00ff 1\n", b"\n", b"abcd x\n", b"abcd 1\n")
        for guest, line in zip(guests, lines, strict=True):
            guest.sendall(line)
        found = link._accepted(server, 1, b"abcd")
        assert list(found) == [1]
        assert found[1].getpeername() == guests[3].getsockname()
        assert [guest.recv(1) for guest in guests[:3]] == [b""] * 3
        for each in (*guests, *found.values()):
            each.close()


def test_a_missing_process_is_reported_in_the_time_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "CONNECT_S", 0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(Qwen35Error, match="0 of 1"),
    ):
        link._accepted(server, 1, b"abcd")


def test_a_message_is_sent_whole_where_ctrl_c_comes_in_between() -> None:
    order = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        order.append("the rest of the block")
    assert order
    # Of the next one it is told at once.
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_messages_come_in_order_whatever_pieces_they_come_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link, "CLOSE_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    reader = Link({0: ours})
    text = b"".join(json.dumps({"do": str(i)}).encode() + b"\n\n" for i in range(5))
    for start in range(0, len(text), 7):
        theirs.sendall(text[start : start + 7])
    assert [reader.messages.get(timeout=60)["do"] for _ in range(5)] == list("01234")
    reader.end()
    wait_for_threads("qwen35-mlx-link")
    ours.close()
    theirs.close()


TOLD_FIRST = """
import socket, time
from qwen35_mlx.model.link import Link

server = socket.create_server(("127.0.0.1", 0))
theirs = socket.create_connection(server.getsockname())
link = Link({0: server.accept()[0]})

def close(last):
    # Whom it tells ends at once, and this process is slow.
    theirs.close()
    time.sleep(1)

link._close = close
link.fail("the first mistake")
"""


def test_the_end_of_those_who_were_told_of_a_mistake_is_not_another_one() -> None:
    run = subprocess.run([sys.executable, "-c", TOLD_FIRST], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.split() == "error: the first mistake".split()


def wait_for_threads(name: str) -> None:
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(60)


def test_what_is_forgotten_here_is_forgotten_by_all() -> None:
    class Leader:
        def __init__(self) -> None:
            self.numbers, self.dropped, self.told = itertools.count(1), list[int](), list[Any]()

        def next_number(self) -> int:
            return next(self.numbers)

        def tell(self, do: str, **what: Any) -> None:
            self.told.append((do, what))

    leader: Any = Leader()
    handle = Handle(leader)
    point = handle.make("snapshot", num_tokens=3)
    assert leader.told == [("snapshot", {"cache": 1, "number": 2, "num_tokens": 3})]
    del point
    assert leader.dropped == [2]
