"""Progress on stderr: bars and spinners on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

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

from ..progress import ByteProgress, StepProgress
from . import terminal

LOG_SECONDS = 30.0
# Shorter prompts are prefilled before a bar would be visible.
MIN_BAR_TOKENS = 512


def spinner(text: str) -> Status:
    """A spinner, which disappears after the block."""
    return terminal.err.status(Text(text), spinner="dots")


class Pace:
    """Speed of work, and whether the next line of a log is due."""

    def __init__(self, first: int | None = None) -> None:
        self.started = self._logged = time.perf_counter()
        # Work done before this run, which does not count for the speed.
        self.first = first

    def rate(self, done: int) -> float:
        """Work per second of this run."""
        self.first = done if self.first is None else self.first
        return (done - self.first) / max(time.perf_counter() - self.started, 1e-9)

    def is_due(self, at_once: bool = False) -> bool:
        """Whether the next line is due; if so, it counts as printed."""
        due = at_once or time.perf_counter() - self._logged >= LOG_SECONDS
        self._logged = time.perf_counter() if due else self._logged
        return due


@contextmanager
def step_progress(title: str) -> Iterator[StepProgress]:
    """A spinner with the current step; lines if stderr is not a terminal."""
    pace, last = Pace(), -1

    def line(done: int, total: int, what: str) -> str:
        rate = pace.rate(done)
        left = (total - done) / rate if rate else 0
        # A few seconds are not worth showing.
        rest = f", {duration(left)} left" if left > LOG_SECONDS else ""
        return f"{title}: {what} ({min(done + 1, total)}/{total}{rest})"

    def log(done: int, total: int, what: str) -> None:
        nonlocal last
        text = line(done, total, what)
        if pace.is_due(at_once=done != last):
            last = done
            terminal.note(text)

    if not terminal.can_draw(terminal.err):
        yield log
        return
    with spinner(title) as status:

        def draw(done: int, total: int, what: str) -> None:
            status.update(line(done, total, what))
            if done >= total:
                status.stop()

        yield draw


def byte_progress(title: str) -> AbstractContextManager[ByteProgress]:
    """A bar with speed, time left, file and tensor; lines if stderr is not a terminal."""
    return _byte_bar(title) if terminal.can_draw(terminal.err) else _byte_lines(title)


@contextmanager
def _byte_lines(title: str) -> Iterator[ByteProgress]:
    pace, last_bytes = Pace(), 0
    terminal.note(f"{title} …")

    def update(done: int, total: int, tensor: str, file: str) -> None:
        nonlocal last_bytes
        last_bytes, speed = done, pace.rate(done)
        if done < total and pace.is_due():
            left = f", {duration((total - done) / speed)} left" if speed else ""
            terminal.note(
                f"{title}: {done / 1e9:,.2f} of {total / 1e9:,.2f} GB, {100 * done // total} %, "
                f"{speed / 1e6:,.1f} MB/s{left}; {file}: {tensor}"
            )

    yield update
    seconds, first_bytes = time.perf_counter() - pace.started, pace.first or 0
    before = f", {first_bytes / 1e6:,.1f} MB before" if first_bytes else ""
    megabytes = (last_bytes - first_bytes) / 1e6
    terminal.note(f"{title}: {megabytes:,.1f} MB read in {duration(seconds)}{before}")


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, for people."""
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
        # The rest of the line; of a tensor's name the end is the most useful.
        TextColumn(
            "{task.fields[file]} {task.fields[tensor]}",
            style="dim",
            markup=False,
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        ),
        console=terminal.err,
        expand=True,
        # Shards differ in speed, so the last minute is the best estimate.
        speed_estimate_period=60,
    )
    task = None
    try:

        def update(done: int, total: int, tensor: str, file: str) -> None:
            nonlocal task
            name = tensor.removeprefix("language_model.").removeprefix("model.")
            if task is None:
                # Started here, because other work may draw its own progress first.
                bar.start()
                task = bar.add_task(title, total=total, completed=done, tensor="", file="")
            file = file.removesuffix(".safetensors").removeprefix("model-")
            bar.update(task, completed=done, total=total, tensor=name, file=file)

        yield update
        if task is not None:
            bar.update(task, tensor="", file="")
    finally:
        bar.stop()


def _token_lines() -> Callable[[int, int], None]:
    pace = Pace(first=0)

    def update(done: int, total: int) -> None:
        tps = pace.rate(done)
        if 0 < done < total and pace.is_due():
            terminal.note(
                f"reading the prompt: {done:,} of {total:,} tokens, {tps:,.0f} tok/s, "
                f"{duration((total - done) / tps)} left"
            )

    return update


@contextmanager
def token_progress() -> Iterator[Callable[[int, int], None]]:
    """A bar while a long prompt is prefilled; lines if stderr is not a terminal."""
    if not terminal.can_draw(terminal.err):
        yield _token_lines()
        return
    bar = Progress(
        TextColumn("reading the prompt"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"),
        TextColumn("{task.fields[tps]:,.0f} tok/s"),
        TimeRemainingColumn(compact=True),
        console=terminal.err,
        transient=True,
    )
    pace, task = Pace(first=0), bar.add_task("", total=1, tps=0)

    def update(done: int, total: int) -> None:
        if total < MIN_BAR_TOKENS:
            return
        bar.start()
        bar.update(task, completed=done, total=total, tps=pace.rate(done))
        if done == total:
            bar.stop()

    try:
        yield update
    finally:
        bar.stop()


@contextmanager
def token_progress_then(text: str) -> Iterator[tuple[Status, Callable[[int, int], None]]]:
    """A bar while a long prompt is prefilled, then a spinner."""
    status = spinner(text)
    with token_progress() as update:

        def progress(done: int, total: int) -> None:
            update(done, total)
            if done == total:
                status.start()

        try:
            yield status, progress
        finally:
            status.stop()
