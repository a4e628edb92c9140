"""What the terminal shows: progress, tables, the chat; answers to stdout, the rest to stderr."""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from .errors import Qwen35Error

if TYPE_CHECKING:
    from .chat import Chat
    from .convert import Plan

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def print_error(error: Exception) -> None:
    """One error in red: what, got, expected, hint."""
    err.print("[bold red]error:[/] ", end="")
    err.print(str(error), markup=False)


def note(text: str) -> None:
    """A remark that is no result."""
    err.print(text, style="dim", markup=False)


def quiet_libraries() -> None:
    """Keep the remarks of libraries out of the chat."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """A spinner while a model loads; on failure nothing is left of it."""
    with err.status(f"Loading {name}", spinner="dots"):
        yield


@contextmanager
def byte_progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar of bytes with the tensor and the time left; two plain lines where it is no terminal."""
    if not err.is_terminal:
        started = time.perf_counter()
        note(f"{title} …")
        state = {"total": 0}

        def remember(done: int, total: int, tensor: str) -> None:
            state["total"] = total

        yield remember
        seconds = time.perf_counter() - started
        note(f"{title}: {state['total'] / 1e6:,.1f} MB read in {seconds:.1f} s")
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[tensor]}", style="dim"),
        console=err,
    )
    with bar:
        task = bar.add_task(title, total=None, tensor="")

        def show(done: int, total: int, tensor: str) -> None:
            bar.update(task, completed=done, total=total, tensor=_short(tensor))

        yield show
        bar.update(task, tensor="")


def _short(tensor: str, width: int = 36) -> str:
    return tensor if len(tensor) <= width else "…" + tensor[-width + 1 :]


def print_plan(plan: "Plan") -> None:
    """The tensors folded over layers, and the totals."""
    table = Table(box=None, pad_edge=False)
    for name in ("module", "count", "shape", "source", "becomes", "MB"):
        left = name == "module"
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for row in plan.table():
        quantized = f"{row.bits}-bit group {row.group_size}" if row.bits else row.dtype
        table.add_row(
            row.name.removeprefix("language_model."),
            str(row.count),
            " x ".join(map(str, row.shape)),
            row.source_dtype,
            row.role if row.role == "dropped" else quantized,
            f"{row.nbytes / 1e6:,.2f}",
        )
    # A pipe has no width to fit: nothing is cut there.
    out.print(table, width=None if out.is_terminal else 120)
    out.print(_totals(plan))


def print_converted(plan: "Plan", folder: Path) -> None:
    """What came out of a conversion, and what to type next."""
    out.print(_totals(plan))
    out.print(f"written to {folder}", markup=False)
    out.print(f"next: qwen35-mlx chat {folder}", style="dim", markup=False)


def _totals(plan: "Plan") -> str:
    return (
        f"{plan.num_parameters / 1e6:,.1f} M parameters, "
        f"{plan.bits_per_weight:.3f} bits per weight of the text model, "
        f"{plan.output_bytes / 1e6:,.1f} MB in {len(plan.shards)} file(s), "
        f"from {plan.source_bytes / 1e6:,.1f} MB"
    )


class ChatSession:
    """Draws a conversation: input, dim thoughts, streamed answers, a line of figures."""

    HELP = "/exit or Ctrl-D leaves; Ctrl-C stops an answer and keeps what was said"

    def __init__(self, chat: "Chat"):
        self.chat = chat

    def run(self, prompts: Sequence[str] = ()) -> None:
        """Ask the given prompts in turn, or talk until the user leaves."""
        if prompts:
            for prompt in prompts:
                if len(prompts) > 1:
                    out.print(f"> {prompt}", style="bold", markup=False)
                self.turn(prompt)
            return
        with contextlib.suppress(ImportError):
            # Line editing and history for input().
            import readline  # noqa: F401
        note(self.HELP)
        while True:
            try:
                text = input("\n> ").strip()
            except EOFError:
                out.print()
                return
            except KeyboardInterrupt:
                out.print()
                note(self.HELP)
                continue
            if text in ("/exit", "/quit"):
                return
            if text == "/help":
                note(self.HELP)
            elif text:
                try:
                    self.turn(text)
                except Qwen35Error as error:
                    print_error(error)

    def turn(self, text: str) -> None:
        """Stream one answer; Ctrl-C stops it."""
        kind = None
        pieces = self.chat.send(text)
        try:
            for piece in pieces:
                if piece.kind != kind:
                    if kind is not None:
                        out.print("\n")
                    kind = piece.kind
                    if kind == "thought" and not _has_colour():
                        out.print("(thought) ", end="")
                style = "dim italic" if kind == "thought" else None
                shown = piece.text.rstrip("\n") if kind == "thought" else piece.text
                out.print(shown, end="", style=style, markup=False)
            out.print()
        except KeyboardInterrupt:
            out.print()
            note("stopped")
        finally:
            pieces.close()
        self._figures(self.chat.stats)

    def _figures(self, stats: Any) -> None:
        parts = [
            f"prompt {stats.prefilled_tokens} of {stats.prompt_tokens} tokens read, "
            f"{stats.prefill_tps:,.0f} tok/s",
            f"answer {stats.generation_tokens} tokens, {stats.decode_tps:,.1f} tok/s",
            f"peak memory {stats.peak_memory_gb:,.2f} GB",
        ]
        if stats.finish_reason == "length":
            parts.append("cut at the token limit")
        note(" · ".join(parts))


def _has_colour() -> bool:
    return out.is_terminal and not out.no_color
