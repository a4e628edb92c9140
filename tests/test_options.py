"""No option is ignored: alone and beside every other, it changes something or is refused."""

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import typer
from everyday import everyday
from option_values import CONVERT, FIDELITY, PLAN, SAMPLING
from typer.testing import CliRunner

from qwen35_mlx.chat import conversation
from qwen35_mlx.chat.conversation import Chat, TurnStats
from qwen35_mlx.cli import attachments, chat_view, command, convert_commands, main, options
from qwen35_mlx.cli.local_models import SOURCE
from qwen35_mlx.engine.output import Piece
from qwen35_mlx.engine.speculate import MAX_DRAFTS, MODES, DraftStats
from qwen35_mlx.quant.affine import BITS, GROUP_SIZES

GROUP: Any = typer.main.get_command(main.app)
COMMANDS: dict[str, Any] = GROUP.commands
HUB = "owner/name"
# Values that differ from the defaults, and the options that an option needs. Every option of every
# command is here: a new one fails until it is.
OPTIONS: dict[str, dict[str, list[str]]] = {
    "convert": CONVERT,
    "plan": PLAN
    | {
        "--calibration": ["{calibration}", "--fit", "24GB"],
        "--context": ["1000"],
        "--kv-bits": ["8"],
        "--mac": ["64GB"],
        "--macs": ["2"],
        "--png": ["x.png"],
    },
    "fidelity": FIDELITY,
    "upload": {"--public": [], "--card": [], "--yes": []},
    "generate": SAMPLING
    | {
        "--prompt": ["b"],
        "--raw": [],
        "--file": ["{text}"],
        "--cache-dir": ["c"],
        "--cache-limit": ["9", "--cache-dir", "c"],
        "--image": ["{text}"],
        "--video": ["{text}"],
        "--pdf": ["{text}"],
        "--pages": ["1-3", "--pdf", "{text}"],
        "--allow-url": ["--image", "http://a.b/c.png"],
        "--tools": ["{tools}"],
        "--schema": ["{schema}"],
        "--show-thoughts": [],
        "--json": [],
        "--stop": ["x"],
        "--context": ["1000"],
        "--kv-bits": ["8"],
        "--force": [],
        "--experts-memory": ["1GB"],
        "--adapter-path": ["a"],
    },
    "chat": SAMPLING
    | {
        "--demo": [],
        "--prompt": ["b"],
        "--image": ["{text}"],
        "--allow-url": [],
        "--session": ["s"],
        "--autosave": [],
        "--cache-limit": ["9"],
        "--think-budget": ["5"],
        "--on-loop": ["penalize"],
        "--snapshot-memory": ["1"],
        "--plain": [],
        "--preset": ["coding"],
        "--context": ["1000"],
        "--kv-bits": ["8"],
        "--force": [],
        "--experts-memory": ["1GB"],
        "--adapter-path": ["a"],
    },
    "sessions": {"--remove": ["s"]},
    "serve": {
        "--demo": [],
        "--port": ["1"],
        "--host": ["localhost"],
        "--api-key": ["k"],
        "--allow-host": ["h"],
        "--model-name": ["n"],
        "--max-context": ["600"],
        "--kv-bits": ["8"],
        "--queue": ["3"],
        "--adapter-path": ["n=a"],
        "--cache-dir": ["c"],
        "--cache-limit": ["9", "--cache-dir", "c"],
        "--kernels": ["ops"],
        "--force": [],
        "--experts-memory": ["1GB"],
    },
    "launch": {"--url": ["http://127.0.0.1:1"], "--api-key": ["k"]},
    "cluster": {
        "--hosts": ["a,b"],
        "--hostfile": ["{text}"],
        "--port": ["7000"],
        "--split": ["1,1"],
    },
    "train": {
        "--data": ["d"],
        "--adapter-path": ["a"],
        "--steps": ["7"],
        "--batch-size": ["2"],
        "--learning-rate": ["0.1"],
        "--max-tokens": ["9"],
        "--dora": [],
        "--rank": ["3"],
        "--scale": ["2"],
        "--dropout": ["0.1"],
        "--num-layers": ["2"],
        "--experts": [],
        "--mask-prompt": [],
        "--validate-every": ["3"],
        "--validation-batches": ["3"],
        "--save-every": ["3"],
        "--resume": [],
        "--seed": ["5"],
        "--png": ["x.png"],
        "--revision": ["v1"],
        "--force": [],
    },
    "fuse": {
        name: value for name, value in PLAN.items() if name not in ("--calibration", "--kv-bits")
    }
    | {"--adapter-path": ["b"]},
    "evaluate": {
        "--tasks": ["t"],
        "--text": ["{text}"],
        "--include-path": ["d", "--tasks", "t"],
        "--limit": ["2", "--tasks", "t"],
        "--num-fewshot": ["3", "--tasks", "t"],
        "--batch-size": ["5", "--tasks", "t"],
        "--chat-template": ["--tasks", "t"],
        "--think": ["--chat-template", "--tasks", "t"],
        "--no-think": ["--chat-template", "--tasks", "t"],
        "--window": ["9"],
        "--stride": ["7"],
        "--out": ["o.json"],
        "--adapter-path": ["a"],
        "--kernels": ["ops"],
    },
    "bench": {
        "--max-context": ["600"],
        "--runs": ["2"],
        "--vs-mlx-lm": [],
        "--recall": ["1K"],
        "--png": ["x.png"],
        "--json": [],
        "--experts-memory": ["1GB"],
        "--kernels": ["ops"],
    },
    "doctor": {"--json": [], "--bits": ["3"], "--group-size": ["32"]},
}
# Arguments of each call, and what comes on standard input.
BASE = {
    "convert": [HUB, "out"],
    "plan": [HUB],
    "fidelity": ["a", "b"],
    "upload": ["out", HUB],
    "generate": ["model"],
    "chat": [],
    "sessions": [],
    "serve": [],
    "launch": ["codex"],
    "cluster": ["chat", "model"],
    "train": ["model", "--data", "."],
    "fuse": [HUB, "out", "--adapter-path", "a"],
    "evaluate": ["model"],
    "bench": ["model"],
    "doctor": [],
}
Observe = Callable[..., tuple[int, str]]


class Fake:
    """Notes each call, and answers it."""

    def __init__(self, calls: list[str], name: str, answer: Any = None):
        self.calls, self.name, self.answer = calls, name, answer

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        shown = {k: getattr(v, "__name__", v) for k, v in options.items() if k != "progress"}
        if "adapters" in shown:
            shown["adapters"] = list(shown["adapters"])
        if "store" in shown:
            shown["store"] = shown["store"].memory_bytes
        shown_arguments = [a for a in arguments if isinstance(a, str | int | list | Path)]
        self.calls.append(f"{self.name} {shown_arguments} {sorted(shown.items(), key=str)}")
        return self.answer(*arguments, **options) if callable(self.answer) else self.answer


@pytest.fixture
def observe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Observe:
    """Run a command with all that is slow replaced; its exit code, and all that it did."""
    from qwen35_mlx import convert
    from qwen35_mlx import files as files_module
    from qwen35_mlx.checkpoint import adapter
    from qwen35_mlx.cli import cluster_command, serve_commands, train_commands
    from qwen35_mlx.cli import fidelity_command as comparing
    from qwen35_mlx.cli import report as cli_report
    from qwen35_mlx.convert import (
        calibrate,
        calibration_text,
        distilled,
        fidelity,
        fit,
        job,
        report,
        upload,
    )
    from qwen35_mlx.engine import scheduler, segments
    from qwen35_mlx.evaluation import bench as measuring
    from qwen35_mlx.evaluation import recall, scoring
    from qwen35_mlx.kernels import doctor
    from qwen35_mlx.model import adapters, hub, loading
    from qwen35_mlx.quant import statistics
    from qwen35_mlx.server import app as server_app
    from qwen35_mlx.server import clients, service
    from qwen35_mlx.server import run as server_run
    from qwen35_mlx.training import estimate, examples, trainer

    # Built once: a thousand calls follow.
    monkeypatch.setattr(sys.modules["typer.testing"], "_get_command", lambda app: GROUP)
    calls: list[str] = []
    plan_of = convert.plan

    def fake(module: Any, name: str, answer: Any = None) -> None:
        monkeypatch.setattr(module, name, Fake(calls, name, answer))

    def planned(source: Any, *, revision: Any = None, **settings: Any) -> Any:
        return plan_of(SOURCE if isinstance(source, str) else source, **settings)

    def answered(*arguments: Any, **options: Any) -> Any:
        pieces = [Piece("thought", "hm"), Piece("answer", "yes")]
        stats = TurnStats(finish_reason="stop")
        drafter = SimpleNamespace(stats=DraftStats())
        settings = {name: options.get(name) for name in ("max_tokens", "stop", "sampling")}
        return SimpleNamespace(
            model=None, tokenizer=SimpleNamespace(), stats=stats, drafter=drafter, **settings,
            send=lambda text, progress, **media: iter_of(text, media, pieces),
            write_cache=lambda **_: (),
        )  # fmt: skip

    def viewed(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(
            run=Fake(calls, "run"), attached=SimpleNamespace(add=Fake(calls, "add"))
        )

    def opened_media(kind: str, source: Any, settings: Any, **_: Any) -> list[Any]:
        frames = {"frames": 1} if kind == "video" else {}
        return [SimpleNamespace(num_tokens=1, describe=lambda: str(source), **frames)]

    def iter_of(text: str, media: dict[str, Any], pieces: list[Piece]) -> Any:
        calls.append(f"send {text} {sorted(media)}")
        yield from pieces

    data = SimpleNamespace(
        hessians={}, layout=plan_of(SOURCE).layout, kls={}, errors={}, left={}, source=""
    )
    fake(convert, "convert", tmp_path / "out")
    fake(convert, "plan", planned)
    fake(convert, "verify", 0)
    monkeypatch.setattr(fit, "open_any", lambda source, *_: SOURCE_OPENED)
    fake(calibrate, "calibrate", data)
    fake(calibration_text, "encode", lambda *_, **__: SimpleNamespace(size=1))
    fake(calibration_text, "overlap")
    for name in ("distillation_lines", "left_of"):
        fake(distilled, name, ())
    monkeypatch.setattr(convert_commands, "replace", lambda found, **_: found)
    fake(statistics, "load", data)
    fake(statistics, "save")
    fake(fidelity, "compare", [SimpleNamespace(as_dict=dict)])
    for name in ("check_memory", "answer_tasks"):
        fake(comparing, name, [{}])
    for name in ("report_lines", "plot", "open_with"):
        fake(fidelity, name, ())
    fake(fidelity.Comparison, "rows", [{"name": "b"}])
    for name in ("lines", "task_lines", "plot"):
        fake(fidelity.Comparison, name, ())
    fake(files_module, "write_json")
    fake(upload, "prepare", SimpleNamespace(card="card", files={}, num_bytes=0))
    fake(upload, "upload", "url")
    monkeypatch.setattr(typer, "confirm", Fake(calls, "confirm"))
    fake(scoring, "perplexity", {"nll_nats_per_token": 1.0, "num_tokens": 1})
    harness = SimpleNamespace(evaluate=Fake(calls, "evaluate", ({}, "table")))
    monkeypatch.setitem(sys.modules, "qwen35_mlx.evaluation.harness", harness)
    fake(adapters, "with_adapter")
    fake(report, "draw")
    mac_lines = report.mac_lines

    def shown(planned: Any, macs: Any, *asked: Any) -> list[str]:
        # The numbers of so small a model are the same with keys of any bits.
        calls.append(f"mac_lines {asked}")
        return mac_lines(planned, macs, *asked)

    monkeypatch.setattr(report, "mac_lines", shown)
    fake(adapter, "read_adapter")
    fake(trainer, "require_trainer")
    fake(estimate, "open_for_training", (None, SimpleNamespace(), 0))
    fake(estimate, "require_memory", SimpleNamespace(total=0, lines=dict, checkpointing=True))
    fake(estimate, "read_weights")
    read = SimpleNamespace(examples=[1], num_tokens=1, longest=1, num_cut=0, num_dropped=0)
    fake(examples, "read_examples", read)
    step = SimpleNamespace(step=1, validation_loss=1.0, peak_bytes=1)
    run = Fake(calls, "run", [step])
    fake(trainer, "Training", SimpleNamespace(step=0, resume=Fake(calls, "resume"), run=run))
    fake(train_commands, "draw")
    fake(job, "refuse_existing")
    fake(convert_commands, "remember")
    config = SimpleNamespace(context_length=4096)
    tokenizer = SimpleNamespace(encode=lambda text, **_: [len(text)])
    fake(loading, "load", (SimpleNamespace(config=config, experts=None), tokenizer))
    fake(conversation, "Chat", answered)
    fake(attachments, "picture_settings")
    fake(attachments, "open_media", opened_media)
    fake(sys.modules["qwen35_mlx.engine.generate"], "stream_generate", ())
    fake(chat_view, "ChatView", viewed)
    fake(sys.modules["qwen35_mlx.cli.chat_commands"], "newest", "newest")
    fake(sys.modules["qwen35_mlx.cli.chat_commands"], "bundled_demo", "demo")
    fake(doctor, "run", {"kernels": None, "machine": MACHINE})
    fake(doctor, "store")
    fake(hub, "resolve", tmp_path)
    fake(scheduler, "Engine", SimpleNamespace(start=lambda: None))
    fake(service.Settings, "of", SimpleNamespace(model_id="m", context_length=1))
    engine = SimpleNamespace(store=SimpleNamespace(model=None))
    service_of = SimpleNamespace(service=SimpleNamespace(engine=engine))
    fake(server_app, "make_app", SimpleNamespace(state=service_of))
    fake(segments, "open_folder", nullcontext())
    fake(attachments.Attachments, "add_texts")
    fake(server_run, "bind", SimpleNamespace(getsockname=lambda: ("127.0.0.1", 8080)))
    fake(server_run, "serve", lambda make, bound, on_ready: (make(), on_ready()))
    fake(serve_commands, "running_server", clients.Endpoint("http://h", "m", 1, None))
    fake(cluster_command, "model_of", ("model", False))
    fake(cluster_command, "read_hosts", ([{}, {}], "ring"))
    fake(cluster_command, "check")
    fake(cluster_command, "launched", 0)
    fake(clients, "command_of", ["true"])
    fake(clients, "prepared", {})
    monkeypatch.setattr(os, "execve", lambda *_: None)
    fake(measuring, "contexts", [1])
    fake(measuring, "bench", [])
    fake(measuring, "drafting")
    fake(recall, "measure", [recall.Recall(1, (1,), (1,))])
    fake(measuring, "label", {})
    fake(measuring, "mlx_lm_program")
    fake(cli_report, "draw_bench")
    fake(cli_report, "print_bench")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QWEN35_MLX_SESSIONS", str(tmp_path / "sessions"))
    files = {"calibration": tmp_path / "calibration.safetensors"}
    for name, text in (("tools", '[{"name": "f"}]'), ("schema", "{}"), ("text", "some text")):
        files[name] = tmp_path / name
        files[name].write_text(text)

    def observe(name: str, *arguments: str) -> tuple[int, str]:
        calls.clear()
        (tmp_path / "sessions").mkdir(exist_ok=True)
        (tmp_path / "sessions" / "s.json").touch()
        given = [a.format_map(files) for a in arguments]
        result = CliRunner().invoke(main.app, [name, *BASE[name], *given], input="from a pipe")
        assert result.exception is None or isinstance(result.exception, SystemExit), result
        return result.exit_code, "\n".join([*calls, result.output])

    return observe


MACHINE = {
    "chip": "M0", "os": "macOS", "versions": {}, "memory_gb": 1.0, "disk_free_gb": 1.0,
    "metal": False, "raise_gpu_limit": None, "bandwidth_gb_per_s": None,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def opened() -> None:
    from qwen35_mlx.convert.hub import open_any

    global SOURCE_OPENED
    SOURCE_OPENED = open_any(SOURCE)


SOURCE_OPENED: Any = None


def spellings(name: str) -> set[str]:
    """Every option of a command as it is typed."""
    options = [p for p in COMMANDS[name].params if p.param_type_name == "option"]
    return {o for p in options for o in (*p.opts, *p.secondary_opts) if o[:2] == "--"} - {"--help"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_the_table(name: str) -> None:
    assert spellings(name) == set(OPTIONS[name])


@pytest.mark.parametrize("name", everyday(COMMANDS, 3))
def test_no_option_is_ignored(observe: Observe, name: str) -> None:
    """Alone, and beside each other option: there is an effect, or the call is refused."""
    table = OPTIONS[name]
    code, base = observe(name)
    assert code == 0
    alone = {}
    for option, value in table.items():
        needed = observe(name, *value[value.index("--fit") :]) if "--fit" in value else (0, base)
        needed = observe(name, "--calibrate") if "--calibrate" in value else needed
        alone[option] = observe(name, option, *value)
        assert alone[option][0] == 0 and alone[option] != needed, option
    for first, second in combinations(table, 2):
        if {first, second} == {"--think", "--no-think"}:
            continue
        code, done = observe(name, first, *table[first], second, *table[second])
        pair = f"{first} {second}"
        assert code in (0, 2), pair
        if code == 0 and second not in table[first] and first not in table[second]:
            assert done not in (alone[first][1], alone[second][1]), pair
        if code == 2:
            assert any(option in done for option in (first, second)), pair


@pytest.mark.parametrize("name", COMMANDS)
def test_every_rule_is_about_options_that_there_are(name: str) -> None:
    known = spellings(name) | {str(p.metavar) for p in COMMANDS[name].params}
    for together, needed in command.RULES.get(name, ()):
        assert {n.split()[0] for n in (*together, *needed)} <= known


@pytest.mark.parametrize(
    "line",
    [
        "plan --png x", "plan --fit 24GB --mac 64GB",
        "convert x --bits 4 --recipe q4", "convert x --recipe q4 --group-size 32",
        "convert x --dtype bfloat16 --group-size 32", "convert x --dtype bfloat16 --calibrate",
        "convert x --prefer speed", "convert x --calibration-text t", "convert x --context 5",
        "convert /no/folder --keep-source", "convert x --bits 3 --method minmax --calibration c",
        "generate x --raw --system s", "generate x --raw --think", "generate x --raw --no-think",
        "generate x --raw --tools t", "generate x --raw --schema t", "generate x --raw --image i",
        "generate x --raw --video v", "generate x --raw --pdf p", "generate x --allow-url",
        "generate x --image -", "generate x --pages 1", "generate x --no-think --show-thoughts",
        "generate x --draft off --num-draft-tokens 2", "chat --draft off --num-draft-tokens 2",
        "chat x --demo", "chat x --image -", "plan --prefer speed",
        "train x --data d --dora --experts", "fuse x y --adapter-path a --prefer speed",
        "chat x --allow-url -p hi", "chat x --no-think --think-budget 5", "sessions a --remove b",
    ],
)  # fmt: skip
def test_a_call_with_an_option_that_would_do_nothing_is_refused(line: str) -> None:
    result = CliRunner().invoke(main.app, line.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: " in result.stderr
    assert any(word in result.stderr for word in ("exclude each other", " needs "))


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "x", "-p", "hi", "--stop", ""],
        ["chat", "x", "-p", "hi", "--session", ""],
        ["convert", "x", "--recipe", ""],
        ["convert", "x", "--fit", ""],
        ["convert", "a/b", "--revision", ""],
        ["sessions", "--remove", ""],
        ["convert", "x", ""],
        ["generate", "x", "-p", "hi", "--cache-dir", ""],
        ["train", "x", "--data", "d", "--adapter-path="],
    ],
)
def test_an_empty_value_is_refused(arguments: list[str]) -> None:
    result = CliRunner().invoke(main.app, arguments)
    assert (result.exit_code, result.stdout) == (2, "") and " is empty." in result.stderr


def test_the_choices_are_those_of_the_quantizer() -> None:
    hints = get_type_hints(options.Quantization)
    assert get_args(get_args(hints["bits"])[0]) == BITS
    assert get_args(hints["group_size"]) == GROUP_SIZES


def test_the_choices_of_drafts_are_those_of_the_engine() -> None:
    assert get_args(get_type_hints(options.Generation)["draft"]) == MODES
    hints = get_type_hints(options.Generation, include_extras=True)
    numbers = get_args(hints["num_draft_tokens"])[1]
    assert (numbers.min, numbers.max) == (1, MAX_DRAFTS)


def test_the_choices_of_chat_are_those_of_a_conversation(demo: Any) -> None:
    for parameter in COMMANDS["chat"].params:
        if parameter.name in ("on_loop", "preset"):
            for value in get_args(parameter.type_descriptor.annotation):
                Chat(*demo, **{parameter.name: value}).sampling_params(True)
