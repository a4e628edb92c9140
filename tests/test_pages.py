"""Whole pages as people see them, against files; `REWRITE_PAGES=1 pytest tests/test_pages.py` makes
the files again."""

import inspect
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from unittest.mock import MagicMock

import mlx.core as mx
import pytest
from server import answers, mistakes
from server.fake_engine import FakeEngine
from server.running import MODEL, Running
from test_cli_report import fake_plan

from qwen35_mlx import memory
from qwen35_mlx.cli import main, report
from qwen35_mlx.config import FULL, LINEAR, ModelConfig, VisionConfig
from qwen35_mlx.convert import fidelity, plan, plots
from qwen35_mlx.convert import report as page
from qwen35_mlx.convert.fit import FitResult, MacBudget, budget_lines
from qwen35_mlx.convert.mac_models import Mac, find_macs
from qwen35_mlx.convert.report import family_source
from qwen35_mlx.family import FAMILY, family_config
from qwen35_mlx.memory import MemoryCount
from qwen35_mlx.quant.divergence import Divergence

PAGES = Path(__file__).parent / "pages"


def check(name: str, text: str) -> None:
    """The text is that of the file; escapes are spelled, so that a diff shows them."""
    text = text.replace("\x1b", "<ESC>")
    file = PAGES / f"{name}.txt"
    if os.environ.get("REWRITE_PAGES"):
        file.write_text(text, "utf-8")
    assert text == file.read_text("utf-8")


@pytest.fixture
def in_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


@pytest.fixture(params=["pipe", "terminal"])
def console(request: pytest.FixtureRequest, consoles: Any) -> Any:
    """A name and what was written; a terminal of 80 columns shows styles."""
    options = dict(force_terminal=True, width=80, legacy_windows=False, color_system="standard")
    out, err = consoles(**(options if request.param == "terminal" else dict(width=80)))
    return SimpleNamespace(
        name=request.param, text=lambda: f"{out.getvalue()}---- stderr\n{err.getvalue()}"
    )


def option_lines(parameter: inspect.Parameter) -> list[str]:
    """An option as the program declares it, whatever typer makes of it."""
    info = get_args(parameter.annotation)[1]
    facts = {name: getattr(info, name, None) for name in ("metavar", "min", "max", "is_eager")}
    facts["names"] = " ".join(info.param_decls or ())
    if parameter.default is not parameter.empty:
        facts["default"] = parameter.default
    known = (f"{name}={value!r}" for name, value in facts.items() if value not in (None, False, ""))
    return ["  ".join([parameter.name, *known]), f"    {info.help}"]


def test_commands_and_their_options() -> None:
    lines: list[str] = []
    for command in [main.app.registered_callback, *main.app.registered_commands]:
        assert command is not None and command.callback is not None
        signature = inspect.signature(command.callback, eval_str=True)
        lines += [
            "",
            f"== {command.name or command.callback.__name__}",
            inspect.getdoc(command.callback),
        ]
        for parameter in signature.parameters.values():
            if get_args(parameter.annotation):
                lines += option_lines(parameter)
    check("commands", "\n".join(map(str, lines)) + "\n")


def test_a_plan_and_a_conversion(console: Any) -> None:
    report.print_plan(fake_plan())
    report.print_converted(fake_plan(), Path("a folder/[x]"))
    check(f"plan-{console.name}", console.text())


def test_sessions(console: Any, in_utc: None) -> None:
    common: dict[str, Any] = dict(saved=86_400.0 * 365 + 62, problem="", num_pictures=0)
    infos: list[Any] = [
        SimpleNamespace(
            name="trip", num_turns=1, first_words="Where [to]?\x07", num_bytes=1_234_567, **common
        ),
        SimpleNamespace(
            name="a longer name", num_turns=12, first_words="word " * 30, num_bytes=98_765_432_100,
            **common | dict(num_pictures=3),
        ),
        SimpleNamespace(
            name="old", num_turns=0, first_words="", num_bytes=0,
            **common | dict(problem="cannot be read"),
        ),
    ]  # fmt: skip
    report.print_sessions(infos)
    report.print_sessions([])
    messages = [
        {"role": "system", "content": "Be [bold]brief[/]."},
        {"role": "user", "content": "Hi\x1b[2J\tthere\n"},
        {"role": "assistant", "content": "Hello.", "reasoning_content": "A greeting.\x00"},
    ]
    report.print_conversation(messages)
    check(f"sessions-{console.name}", console.text())


def bench_row(context: int, speed: float, percent: float | None) -> dict[str, Any]:
    figures = dict(
        prefill_tps=10 * speed,
        ttft_s=context / speed / 10,
        warm_prefill_tps=1234.5678,
        warm_ttft_s=0.05218,
        decode_tps=speed,
        peak_memory_bytes=12_345_678_901,
    )
    return figures | dict(context=context, decode_gb_per_s=543.21, percent_of_bandwidth=percent)


@pytest.mark.parametrize("limit", [None, 819.0])
def test_speeds(console: Any, limit: float | None) -> None:
    rows = [bench_row(512, 87.654, None), bench_row(32_768, 4321.09, 66.4)]
    if limit:
        rows[1]["mlx_lm"] = bench_row(32_768, 4000.0, None)
        rows[1]["vs_mlx_lm"] = dict(prefill_tps=1.084, warm_prefill_tps=0.996, decode_tps=1.234)
    result = dict(
        model="a/b", bits_per_weight=4.5012, machine="Apple M3 Ultra", os="macOS 26.1",
        mlx="0.32.0", bandwidth_limit_gbps=limit, warm_tokens=64, new_tokens=128, median_of=3,
        contexts=rows,
    )  # fmt: skip
    report.print_bench(result)
    check(f"bench-{'with' if limit else 'without'}-a-limit-{console.name}", console.text())


def kernel_row(op: str, **changed: Any) -> dict[str, Any]:
    row = dict(
        op=op, member="397B-A17B", bits=4, group_size=64, num_tokens=8, problem="", used=True,
        bandwidth_share=0.854, speedup=1.254, metal_us=1234.56, metal_gb_per_s=1699.6,
        mlx_us=1548.1,
    )  # fmt: skip
    return row | changed


@pytest.mark.parametrize("has_metal", [False, True])
def test_the_doctor(console: Any, has_metal: bool) -> None:
    machine = dict(
        chip="Apple M4", os="macOS 26.1", versions={"mlx": "0.32.0", "python": "3.13"},
        memory_gb=68.7194, disk_free_gb=1234.56, metal=has_metal, gpu_limit_gb=51.54,
        raise_gpu_limit="sudo sysctl iogpu.wired_limit_mb=57344" if has_metal else None,
        bandwidth_gb_per_s=120.0 if has_metal else None,
    )  # fmt: skip
    kernels = [
        kernel_row("projection"),
        kernel_row("router", problem="NaN"),
        kernel_row("projection", used=False, num_tokens=1, bandwidth_share=None, group_size=128),
        kernel_row("router", problem="NaN", num_tokens=1),
        kernel_row("delta_step", problem="off by 1"),
        kernel_row("delta_step"),
        kernel_row("other", problem="a"),
        kernel_row("other", problem="b"),
    ]
    report.print_doctor(dict(machine=machine, kernels=kernels if has_metal else None))
    check(f"doctor-{'with' if has_metal else 'without'}-metal-{console.name}", console.text())


@pytest.mark.slow
def test_what_a_model_needs_on_macs() -> None:
    planned = plan(family_source("Qwen3.5-35B-A3B"), bits=4)
    macs = [mac for name in ("M4 Max 36GB", "M1 16GB", "48GB") for mac in find_macs(name)]
    lines = [*page.conversion_lines(planned), *page.mac_lines(planned, macs)]
    lines += page.mac_lines(planned, macs, 100_000)
    check("macs", "\n".join(lines) + "\n")


@pytest.mark.slow
def test_what_a_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [member for member in FAMILY if member.name in ("9B", "35B-A3B")]
    monkeypatch.setattr(page, "FAMILY", few)
    memory = 32 * 2**30
    lines = page.family_lines(memory, "as asked")
    lines += page.family_lines(memory, "as asked", 50_000, lambda source: dict(bits=6))
    lines += page.fitting_lines(memory, "as asked", None)
    lines += page.fitting_lines(24 * 2**30, "as asked", 100_000)
    check("family", "\n".join(lines) + "\n")


@pytest.mark.parametrize("memory_gib", [64, 96])
def test_what_a_fit_spends(memory_gib: int) -> None:
    counted = MemoryCount(*(10**8 * (i + 2) for i in range(len(MemoryCount._fields))))
    counted = counted._replace(context=32_768, query_block=64)
    budget = MacBudget(memory_gib * 2**30, memory_gib * 2**30 * 9 // 10, counted)
    choices: dict[str, Any] = {}
    for name, bits in (("quality", 4), ("speed", 3)):
        planned = plan(family_source("Qwen3.5-27B"), bits=bits)
        choices[name] = FitResult(
            planned, None, bits / 777, planned.text_bytes, None, False  # type: ignore[arg-type]
        )  # fmt: skip
    lines = [line for prefer in choices for line in budget_lines(budget, prefer, choices)]
    check(f"fit-{memory_gib}", "\n".join(lines) + "\n")


def counted(config: ModelConfig, context: int, gib: int | None, item_bytes: int) -> str:
    limit = gib and gib * 2**30
    sizes = {"vision_tower.a": 10**6, "mtp.a": 10**7, "a": 10**8, "model.embed_tokens": 10**9}
    if config.is_moe:
        sizes["layers.0.mlp.switch_mlp.up_proj"] = 10**10
    found = memory.count(config, 10**9, context, limit, item_bytes)
    layers = [memory.layer_bytes(config, k, 3, 100, item_bytes) for k in (LINEAR, FULL)]
    read = memory.decode_bytes(config, sizes.items(), context, item_bytes)
    if config.is_moe:
        layers.append(memory.sweep_bytes(config, context, item_bytes))
        layers.append(memory.room_for_experts(config, 10**9, context, item_bytes, 10**11))
    return " ".join(map(str, (gib, *found, read, *layers)))


def test_bytes_that_running_takes() -> None:
    """Each term of each formula: the bounds that test_memory.py measures are 1.5 times as wide."""
    lines = [f"GiB {' '.join(MemoryCount._fields)} read layers sweep room"]
    for member in FAMILY:
        given = family_config(member.full_name)
        config = ModelConfig.from_hf(given)
        sees = VisionConfig.from_hf(given, config.hidden_size)
        for kv_bits, item_bytes, num_mtp, vision in ((None, 2, 0, sees), ((8, 4), 4, 1, None)):
            lines.append(f"{member.name} {kv_bits} {item_bytes}")
            changed = replace(config, kv_bits=kv_bits, num_mtp_layers=num_mtp, vision=vision)
            for context, gib in ((1, 1), (1000, 8), (32_768, 96), (262_144, None)):
                lines.append(counted(changed, context, gib, item_bytes))
    check("memory", "\n".join(lines) + "\n")


class Drawn:
    """In place of a picture: what is drawn on it, a line each."""

    def __init__(self) -> None:
        self.parts = {name: MagicMock() for name in ("figure", "left", "right")}

    @contextmanager
    def picture(self, file: Path, inches: tuple[float, float]) -> Iterator[Any]:
        self.title = f"{file} {inches}"
        yield tuple(self.parts.values())

    def text(self) -> str:
        lines = [self.title]
        for name, part in self.parts.items():
            lines += [f"{name}{str(call).removeprefix('call')}" for call in part.mock_calls]
        return re.sub(r" id='\d+'", "", "\n".join(lines)) + "\n"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    drawn = Drawn()
    for module in (plots, page, fidelity):
        monkeypatch.setattr(module, "picture", drawn.picture)
    return drawn


def test_a_picture_of_a_plan(drawn: Drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MACS", find_macs("M4 Max"))
    page.draw(plan(family_source("Qwen3.5-27B"), bits=4), Path("plan.png"))
    check("picture-plan", drawn.text())


@pytest.mark.parametrize("with_peer", [False, True])
def test_a_picture_of_speeds(drawn: Drawn, with_peer: bool) -> None:
    rows = [bench_row(512, 87.5, None), bench_row(32_768, 43.25, 66.4)]
    for row in rows if with_peer else ():
        row["mlx_lm"] = bench_row(row["context"], 40.5, None)
    result = dict(model="a/b", bits_per_weight=4.5012, machine="Apple M3 Ultra", contexts=rows)
    report.draw_bench(result, Path("speed.png"))
    check(f"picture-speeds{'-with-a-peer' if with_peer else ''}", drawn.text())


def test_a_picture_and_lines_of_errors(drawn: Drawn) -> None:
    tokens = Divergence()
    p = mx.array([[0.0, 1.0, 2.0], [2.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    tokens.add(p, p * 0.75, mx.array([2, 0, -1]))
    layers = tuple(
        fidelity.LayerError(i, kind, 0.01 * (i + 1), 0.03 * (i + 1))
        for i, kind in enumerate(["linear_attention", "linear_attention", "full_attention"])
    )
    sides: list[Any] = [
        SimpleNamespace(bits_per_weight=bits, nbytes=int(bits * 10**9)) for bits in (16.0, 4.5)
    ]
    found = fidelity.Report(*sides, layers, tokens)
    fidelity.plot(found, Path("errors.png"))
    lines = [*fidelity.report_lines(found), ""]
    text = re.sub(r"\d\.\d{5,}", lambda m: f"{float(m[0]):.4f}", drawn.text())
    check("errors", "\n".join(lines) + re.sub(r"e-\d+", "e", text))


ANSWERS = dict(
    same_tokens=0.5, identical_answers=0.25, valid_tool_calls=1.0, valid_json=0.875,
    thought_tokens=1234.5, thought_ratio=None, cut_thoughts=0.0,
)  # fmt: skip


@pytest.mark.parametrize("kind", ["answers", "speeds", "neither"])
def test_a_comparison(drawn: Drawn, kind: str) -> None:
    p = mx.array([[0.0, 1.0, 2.0], [2.0, 0.0, 0.0]])
    reports = []
    for bits in (6.5, 4.5):
        tokens = Divergence()
        tokens.add(p, p * (bits / 8), mx.array([2, 0]))
        sides: list[Any] = [
            SimpleNamespace(
                bits_per_weight=bits, nbytes=int(bits * 10**9), decode_bytes=(10**9 * bits).__add__,
                config=ModelConfig.from_hf(family_config("Qwen3.5-27B")),
            )
            for bits in (16.0, bits)
        ]  # fmt: skip
        reports.append(fidelity.Report(*sides, (fidelity.LayerError(0, "", 1, 1, 0.5),), tokens))
    mac = Mac("M3 Ultra", 96, 0 if kind == "neither" else 819)
    tasks = [ANSWERS, ANSWERS | dict(thought_ratio=1.25), ANSWERS | dict(cut_thoughts=0.125)]
    given: dict[str, Any] = dict(tasks=tasks) if kind == "answers" else dict(overlaps=[0.5, None])
    found = fidelity.Comparison(["six", "four"], reports, mac, **given)
    found.plot(Path("kl.png"))
    lines = [*found.lines(), *(found.task_lines() if kind == "answers" else map(str, found.rows()))]
    text = re.sub(r"\d\.\d{5,}", lambda m: f"{float(m[0]):.4f}", "\n".join([*lines, drawn.text()]))
    check(f"comparison-{kind}", text)


def test_what_the_server_answers_to_mistakes(demo: tuple[Any, Any]) -> None:
    _, tokenizer = demo
    server = Running(FakeEngine(tokenizer), tokenizer)
    lines = []
    try:
        for method, path, body, headers, shown in mistakes.requests(MODEL):
            answer = server.request(method, path, body, headers)
            assert answer.status >= 400, shown
            text = re.sub(r"req_[0-9a-f]{24}", "req_…", answer.text)
            lines += [f"{method} {path[:40]} {shown[:90]}", f"    {answer.status} {text}"]
    finally:
        server.stop()
    check("server-mistakes", "\n".join(lines) + "\n")


# What differs in each run, and with the version: ids, dates and speeds, what zlib makes.
CHANGING = [
    (r"qwen35-mlx-[\w.]+", "qwen35-mlx-…"),
    (r'"q35\.[^"]*"', '"q35.…"'),
    (r"\b([a-z]+_)[0-9a-z_]*[0-9a-f]{24}\b", r"\1…"),
    (r"chatcmpl-[0-9a-f]{24}|cmpl-[0-9a-f]{24}", "cmpl-…"),
    (r'("[a-z_]*(?:created|_at|_ms|_second|_duration|time_ms)": ?)("[^"]*"|[\d.e+-]+)', r"\1…"),
]


def test_what_the_server_answers(demo: tuple[Any, Any]) -> None:
    engine = FakeEngine(demo[1])
    settings = dict(
        adapters=["one"], num_bytes=123, digest="abc", num_parameters=7, parameter_size="7.0M",
        quantization="4-bit", template="T", sees=True,
    )  # fmt: skip
    server = Running(engine, demo[1], **settings)
    lines = []
    try:
        for path, body, say in answers.ASKED:
            engine.say = say
            engine.finish = "tool_calls" if say in (answers.CALLS, answers.CALLS[2:3]) else "stop"
            lines += ["", f"POST {path} {body}", server.post(path, body).text]
        for path in answers.SHOWN:
            lines += ["", f"GET {path}", server.get(path).text]
    finally:
        server.stop()
    text = "\n".join(lines) + "\n"
    for pattern, shown in CHANGING:
        text = re.sub(pattern, shown, text)
    check("server-answers", text)
