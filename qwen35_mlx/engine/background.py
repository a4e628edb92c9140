"""One background thread for all chats, because MLX never frees what a thread allocated."""

import atexit
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Event, Lock, Thread, current_thread

import mlx.core as mx

# A job gets a function that returns whether it should stop.
Job = Callable[[Callable[[], bool]], None]

_jobs: SimpleQueue[tuple[Job, Callable[[], bool], Future[None]] | None] = SimpleQueue()
_at_exit, _starting = Event(), Lock()
_thread: Thread | None = None


class BackgroundJob:
    """Runs at most one job at a time for its owner; all owners share one thread."""

    def __init__(self) -> None:
        self._stopping = Event()
        self._running: Future[None] | None = None

    def start(self, job: Job) -> None:
        """Stop this owner's running job, then run `job(should_stop)`. Raises as `stop` does."""
        self.stop()
        # A new event for each job.
        self._stopping = stopping = Event()
        self._running = Future()
        _start_thread()
        _jobs.put((job, lambda: stopping.is_set() or _at_exit.is_set(), self._running))

    def stop(self, *, wait_for_end: bool = False) -> None:
        """Stop the job and wait for its end; with `wait_for_end`, wait without stopping it.

        Raises the error of the job. A call from the job itself does nothing.
        """
        if current_thread() is _thread:
            return
        running, self._running = self._running, None
        if running is None:
            return
        if not wait_for_end:
            self._stopping.set()
            # False if the job has started.
            if running.cancel():
                return
        running.result()


def _start_thread() -> None:
    global _thread
    with _starting:
        if _thread is None:
            _thread = Thread(target=_work, name="qwen35-mlx-background", daemon=True)
            _thread.start()
            atexit.register(_end)


def _work() -> None:
    while (item := _jobs.get()) is not None:
        job, should_stop, result = item
        if result.set_running_or_notify_cancel():
            try:
                job(should_stop)
                result.set_result(None)
            except BaseException as error:
                result.set_exception(error)
        # Otherwise a deleted chat stays in memory until the next job.
        del item, job, should_stop, result
    # MLX aborts a process that exits before the streams of a thread are freed.
    mx.clear_streams()


def _end() -> None:
    """End the thread, because a computation at exit would abort the process."""
    _at_exit.set()
    _jobs.put(None)
    if _thread is not None:
        _thread.join()
