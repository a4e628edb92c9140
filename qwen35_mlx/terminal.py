"""What the terminal shows: errors, progress, tables; results to stdout, the rest to stderr."""

import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text
from rich.theme import Theme

if TYPE_CHECKING:
    from .convert import Plan
    from .sessions import SessionInfo

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
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """A spinner while a model loads; on failure nothing is left of it."""
    with err.status(Text(f"Loading {name}"), spinner="dots"):
        yield


@contextmanager
def byte_progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar of bytes with time left and tensor; plain lines where it is no terminal."""
    if err.is_terminal and not err.is_dumb_terminal:
        with _byte_bar(title) as show:
            yield show
        return
    started = time.perf_counter()
    note(f"{title} …")
    tenth = total_bytes = 0

    def tell(done: int, total: int, tensor: str) -> None:
        nonlocal tenth, total_bytes
        total_bytes = total
        reached = 10 * done // max(total, 1)
        # Small jobs are over before a line about them is read.
        if tenth < reached < 10 and time.perf_counter() - started > 5:
            note(f"{title}: {10 * reached} % of {total / 1e6:,.1f} MB, {tensor}")
        tenth = reached

    yield tell
    seconds = time.perf_counter() - started
    note(f"{title}: {total_bytes / 1e6:,.1f} MB read in {seconds:.1f} s")


@contextmanager
def _byte_bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        DownloadColumn(),
        TimeRemainingColumn(compact=True),
        # What is left of the line; the end of a tensor's name says most.
        TextColumn(
            "{task.fields[tensor]}",
            style="dim",
            markup=False,
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        ),
        console=err,
        expand=True,
    )
    with bar:
        task = bar.add_task(title, total=None, tensor="")

        def show(done: int, total: int, tensor: str) -> None:
            name = tensor.removeprefix("language_model.").removeprefix("model.")
            bar.update(task, completed=done, total=total, tensor=name)

        yield show
        bar.update(task, tensor="")


def print_plan(plan: "Plan") -> None:
    """The tensors folded over layers, and the totals; nothing is cut, a pipe has no width."""
    rows = [("module", "count", "shape", "source", "becomes", "MB")]
    for row in plan.table():
        quantized = f"{row.bits}-bit g{row.group_size}" if row.bits else row.dtype
        rows.append(
            (
                row.name.removeprefix("language_model.").removeprefix("model."),
                str(row.count),
                "x".join(map(str, row.shape)),
                row.source_dtype,
                row.role if row.role == "dropped" else quantized,
                f"{row.nbytes / 1e6:,.{2 if row.nbytes < 1e9 else 0}f}",
            )
        )
    columns = list(zip(*rows, strict=True))
    if out.is_terminal and _width(columns) > out.width:
        del columns[3]
    for line in zip(*(_aligned(column) for column in columns), strict=True):
        out.print("  ".join(line), markup=False)
    out.print(_totals(plan))


def _width(columns: Sequence[Sequence[str]]) -> int:
    return sum(max(map(len, column)) for column in columns) + 2 * (len(columns) - 1)


def _aligned(column: Sequence[str]) -> list[str]:
    """Names to the left, all else to the right."""
    width = max(map(len, column))
    return [s.ljust(width) if column[0] == "module" else s.rjust(width) for s in column]


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
        what = info.problem or f"{info.num_turns} turns: {info.first_words}"
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
