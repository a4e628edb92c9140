"""What the terminal shows: errors, progress, tables; results to stdout, the rest to stderr."""

import logging
import os
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.status import Status
from rich.table import Column
from rich.text import Text
from rich.theme import Theme

from ..progress import ByteProgress, StepProgress

if TYPE_CHECKING:
    from ..chat.sessions import SessionInfo
    from ..convert import Plan

# rich's own style of code has a black background, on light terminals too.
THEME = Theme({"markdown.code": "cyan", "markdown.code_block": "cyan"})
out = Console(highlight=False, soft_wrap=True, emoji=False, theme=THEME)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
# What a model says must not move the cursor or rename the window.
CONTROL = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")})


def print_error(error: Exception) -> None:
    """One error in red: what, got, expected, hint."""
    err.print("[bold red]error:[/] ", end="")
    err.print(str(error), markup=False)


def note(text: str) -> None:
    """A remark that is no result."""
    err.print(text, style="dim", markup=False, soft_wrap=not err.is_terminal)


def quiet_libraries() -> None:
    """Keep the remarks of libraries out of the chat."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Where it is imported already.
    logging.getLogger("transformers").setLevel(logging.ERROR)


def can_draw(console: Console) -> bool:
    """Whether what is shown can be drawn over."""
    return console.is_terminal and not console.is_dumb_terminal


def count(number: int, noun: str) -> str:
    """A number of things in words."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def loading(name: str) -> Status:
    """A spinner while a model loads; on failure nothing is left of it."""
    return err.status(Text(f"Loading {name}"), spinner="dots")


LOG_SECONDS = 30.0
# Shorter prompts are read before a bar would be seen.
MIN_BAR_TOKENS = 512


def byte_progress(title: str) -> AbstractContextManager[ByteProgress]:
    """A bar of bytes with speed, time left, file and tensor; lines where it is no terminal."""
    return _byte_bar(title) if can_draw(err) else _byte_lines(title)


@contextmanager
def _byte_lines(title: str) -> Iterator[ByteProgress]:
    started = told = time.perf_counter()
    note(f"{title} …")
    first_bytes = last_bytes = 0
    seen = False

    def tell(done: int, total: int, tensor: str, file: str) -> None:
        nonlocal told, first_bytes, last_bytes, seen
        if not seen:
            # What an earlier run did is no speed of this one.
            seen, first_bytes = True, done
        last_bytes = done
        now = time.perf_counter()
        if now - told >= LOG_SECONDS and done < total:
            told = now
            speed = (done - first_bytes) / (now - started)
            left = f", {_duration((total - done) / speed)} left" if speed else ""
            note(
                f"{title}: {done / 1e9:,.2f} of {total / 1e9:,.2f} GB, {100 * done // total} %, "
                f"{speed / 1e6:,.1f} MB/s{left}; {file}: {tensor}"
            )

    yield tell
    seconds = time.perf_counter() - started
    read_bytes = last_bytes - first_bytes
    before = f", {first_bytes / 1e6:,.1f} MB before" if first_bytes else ""
    note(f"{title}: {read_bytes / 1e6:,.1f} MB read in {_duration(seconds)}{before}")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


@contextmanager
def _byte_bar(title: str) -> Iterator[ByteProgress]:
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        # What is left of the line; the end of a tensor's name says most.
        TextColumn(
            "{task.fields[file]} {task.fields[tensor]}",
            style="dim",
            markup=False,
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        ),
        console=err,
        expand=True,
        # Shards come and go: the speed of the last minute says most about what is left.
        speed_estimate_period=60,
    )
    with bar:
        task = None

        def show(done: int, total: int, tensor: str, file: str) -> None:
            nonlocal task
            name = tensor.removeprefix("language_model.").removeprefix("model.")
            if task is None:
                task = bar.add_task(title, total=total, completed=done, tensor="", file="")
            file = file.removesuffix(".safetensors").removeprefix("model-")
            bar.update(task, completed=done, total=total, tensor=name, file=file)

        yield show
        if task is not None:
            bar.update(task, tensor="", file="")


@contextmanager
def token_progress() -> Iterator[Callable[[int, int], None]]:
    """A bar for a long prompt, gone before the answer."""
    if not can_draw(err):
        yield lambda done, total: None
        return
    bar = Progress(
        TextColumn("reading the prompt"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"),
        TextColumn("{task.fields[tps]:,.0f} tok/s"),
        TimeRemainingColumn(compact=True),
        console=err,
        transient=True,
    )
    started = time.perf_counter()
    task = bar.add_task("", total=1, tps=0)

    def show(done: int, total: int) -> None:
        if total < MIN_BAR_TOKENS:
            return
        bar.start()
        tps = done / max(time.perf_counter() - started, 1e-9)
        bar.update(task, completed=done, total=total, tps=tps)
        if done == total:
            bar.stop()

    try:
        yield show
    finally:
        bar.stop()


def print_lines(lines: Iterable[str]) -> None:
    """Lines that are laid out already."""
    for line in lines:
        out.print(line, markup=False)


@contextmanager
def step_progress(title: str) -> Iterator[StepProgress]:
    """A spinner that says which of several steps runs; plain lines where it is no terminal."""
    if can_draw(err):
        with err.status(Text(title), spinner="dots") as status:
            yield lambda done, total, what: status.update(f"{title}: {what} ({done + 1}/{total})")
    else:
        yield lambda done, total, what: note(f"{title}: {what} ({done + 1}/{total})")


def print_doctor(report: dict[str, Any]) -> None:
    """Machine and kernels for a person to read."""
    machine, kernels = report["machine"], report["kernels"]
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
    lines = [
        f"{machine['chip']}, {machine['os']}, {versions}",
        f"memory {machine['memory_gb']:,.1f} GB, disk {machine['disk_free_gb']:,.1f} GB free",
    ]
    if machine["metal"]:
        lines.append(f"the GPU may use {machine['gpu_limit_gb']:,.1f} GB")
    if command := machine["raise_gpu_limit"]:
        lines += [
            "more until the next restart, all but a tenth of memory and 6 GiB at least:",
            f"  {command}",
        ]
    if kernels is None:
        lines.append("no GPU with Metal in use: the model runs on plain MLX operations")
    for op, result in (kernels or {}).items():
        verdict = "matches" if result["matched"] else f"not used: {result['problem']}"
        lines.append(f"{op}: {verdict}, relative error {result['error']:g}")
        for member, figures in result["members"].items():
            if isinstance(figures, str):
                lines.append(f"  {member:<10} {figures}")
                continue
            kernel, ops = (
                f"{figures[f'{way}_us']:,.1f} us {figures[f'{way}_gb_per_s']:,.0f} GB/s"
                for way in ("kernel", "ops")
            )
            lines.append(f"  {member:<10} {figures['speedup']:.2f}x: {kernel}, ops {ops}")
    print_lines(lines)


def print_plan(plan: "Plan") -> None:
    """The tensors folded over layers, and the totals; nothing is cut, a pipe has no width."""
    rows = [("module", "count", "shape", "source", "becomes", "bpw", "MB")]
    for row in plan.table():
        becomes = f"{row.bits}-bit g{row.group_size}" if row.bits else row.dtype
        rows.append(
            (
                row.name.removeprefix("language_model.").removeprefix("model."),
                str(row.count),
                "x".join(map(str, row.shape)),
                row.source_dtype,
                becomes,
                f"{8 * row.nbytes / max(row.num_parameters, 1):.2f}",
                f"{row.nbytes / 1e6:,.{2 if row.nbytes < 1e9 else 0}f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    is_narrow = out.is_terminal and sum(widths) + 2 * (len(widths) - 1) > out.width
    for name, *figures in rows:
        cells = [name.ljust(widths[0]), *map(str.rjust, figures, widths[1:])]
        if is_narrow:
            del cells[3], cells[-2]
        out.print("  ".join(cells), markup=False)
    out.print(_totals(plan))


def print_converted(plan: "Plan", folder: Path) -> None:
    """What came out of a conversion, and what to type next."""
    out.print(_totals(plan))
    out.print(f"written to {folder}", markup=False)
    note(f"next: qwen35-mlx chat {shlex.quote(str(folder))}")


def _totals(plan: "Plan") -> str:
    return (
        f"{plan.num_parameters / 1e6:,.1f} M parameters, "
        f"{plan.bits_per_weight:.3f} bits per weight of the text model, "
        f"{plan.output_bytes / 1e6:,.1f} MB in {len(plan.shards)} file(s), "
        f"from {plan.source_bytes / 1e6:,.1f} MB"
    )


def print_sessions(found: Sequence["SessionInfo"]) -> None:
    """One line a session, the last saved first."""
    if not found:
        note("no sessions yet; qwen35-mlx chat --session NAME makes one")
    width = max((len(info.name) for info in found), default=0)
    for info in found:
        saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.saved))
        what = info.problem or f"{count(info.num_turns, 'turn')}: {info.first_words}"
        line = f"{info.name:{width}}  {saved}  {info.num_bytes / 1e6:,.1f} MB  {what}"
        line = line.translate(CONTROL)
        if out.is_terminal:
            # What does not fit is seen with `sessions NAME`.
            line = line[: out.width]
        out.print(line, markup=False)


def print_conversation(messages: Sequence[dict[str, Any]]) -> None:
    """What was said, by whom."""
    for message in messages:
        out.print(f"[{message['role']}]", style="bold", markup=False)
        if thought := message.get("reasoning_content"):
            out.print(thought.translate(CONTROL), style="dim italic", markup=False)
        out.print(message["content"].translate(CONTROL) + "\n", markup=False)
