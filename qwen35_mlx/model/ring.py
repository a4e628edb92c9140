"""One model in several processes: rank 0 is used like a whole model, the others follow it.

Only rank 0 has ids, embeddings, head, drafts and pictures. It announces each pass through the
layers and each change of a cache over its `Link`, and sends the embeddings with the first
collective operation. Every process has its own part of each cache, under the same number.
"""

import atexit
import os
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache as once
from typing import Any, NoReturn, cast

import mlx.core as mx

from ..checkpoint.pipeline import read_split
from ..config import ModelConfig
from ..errors import Qwen35Error
from ..files import RING_VARIABLE, SPLIT_VARIABLE
from ..kernels.matrix import MAX_ROWS
from ..kernels.tiers import Tiers, use
from ..machine import MIB, describe
from ..memory import POOL_TOKENS, PREFILL_STEP_SIZE
from . import cache as caches
from .link import connect, uninterrupted

# Time within which the link notices that a process has ended.
WORD_S = 2.0
# Messages that measure the latency: 8 KB each, as of a token in bfloat16.
NUM_MEASURED, MEASURED_NUMBERS = 21, 2048
NOT_QUANTIZED = (16, 16)


def in_ring() -> bool:
    """Whether this process is one of several that share a model."""
    return bool(os.environ.get(RING_VARIABLE))


@once
def group() -> mx.distributed.Group:
    """All processes of the model."""
    backend = "jaccl" if "MLX_JACCL_COORDINATOR" in os.environ else "ring"
    try:
        return mx.distributed.init(strict=True, backend=backend)
    except RuntimeError as error:
        raise Qwen35Error(
            "the processes of the model cannot connect",
            got=error,
            expected=f"all of them under mlx.launch with the backend {backend}",
        ) from None


def no_adapter(got: object) -> Qwen35Error:
    """The error for an adapter, which only rank 0 would have."""
    hint = "qwen35-mlx fuse makes a model of both"
    return Qwen35Error("an adapter does not run on several Macs", got=got, hint=hint)


class Handle:
    """The number of a cache or snapshot in every process; they drop it when this is deleted."""

    def __init__(self, leader: "Leader"):
        self.leader, self.number = leader, leader.next_number()

    def __del__(self) -> None:
        self.leader.dropped.append(self.number)

    def tell(self, do: str, **what: Any) -> None:
        """Send a command about this cache."""
        self.leader.tell(do, cache=self.number, **what)

    def make(self, do: str, **what: Any) -> "Handle":
        """Send a command that makes something new from this cache."""
        made = Handle(self.leader)
        self.tell(do, number=made.number, **what)
        return made


class Leader:
    """Rank 0: sends the commands for the others."""

    def __init__(self) -> None:
        self.group, self.dropped = group(), deque[int]()
        self._link, self._number, self._has_model = connect(group()), 0, False
        atexit.register(self._link.end)

    def tell(self, do: str, **what: Any) -> None:
        """Send a command to all others, with the numbers that they may drop."""
        dropped = [self.dropped.popleft() for _ in range(len(self.dropped))]
        self._link.send({"do": do, "dropped": dropped, **what})

    def next_number(self) -> int:
        """A new number."""
        self._number += 1
        return self._number

    def hold(self, entries: Sequence[Any]) -> None:
        """Make an empty cache in every process."""
        handle = entries[0].handle = Handle(self)
        self.tell("hold", number=handle.number)

    def trunk(
        self,
        trunk: Any,
        ids: mx.array | None,
        cache: Sequence[Any] | None,
        embeddings: mx.array | None = None,
        positions: mx.array | None = None,
        rope_delta: Any = 0,
        **flags: bool,
    ) -> mx.array:
        """Run a pass in all processes; the evaluation of its hidden state has started."""
        handle = None if cache is None else getattr(cache[0], "handle", None)
        if cache is not None and handle is None:
            raise Qwen35Error(
                "this is no cache of the model on several Macs", expected="model.make_cache()"
            )
        x = trunk.embed_tokens(ids) if embeddings is None else embeddings
        # An announced pass must be computed, or the others wait forever.
        with uninterrupted(), self.all_or_none():
            self.tell(
                "trunk",
                cache=handle and handle.number,
                num_read=caches.cached_tokens(cache or []),
                shape=x.shape,
                dtype=str(x.dtype).rpartition(".")[2],
                positions=None if positions is None else positions.tolist(),
                rope_delta=rope_delta.tolist() if isinstance(rope_delta, mx.array) else rope_delta,
                flags=flags,
            )
            if trunk.stages is None:
                x = mx.distributed.all_sum(x, group=self.group)
            hidden: mx.array = trunk(
                None, cache, embeddings=x, positions=positions, rope_delta=rope_delta, **flags
            )
            if x.shape[1] > MAX_ROWS:
                # Saves memory, and a prefill waits for the result anyway.
                mx.eval(hidden)
            mx.async_eval(hidden)
        return hidden

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """End all processes if the block fails: their messages would be out of step."""
        try:
            yield
        except Exception as error:
            self.fail(error)

    def fail(self, error: Exception) -> NoReturn:
        """End all processes, because this one has failed in the middle of a pass."""
        wait_for_word(error)
        self._link.fail(f"process 0 of the model has failed: {error}")

    def load(self, path: str, options: dict[str, Any]) -> None:
        """Let all others load their parts."""
        if self._has_model:
            raise Qwen35Error("several Macs run only one model", got=path, expected="no second one")
        self._has_model = True
        self.tell("load", path=path, options=options)

    def latency_us(self) -> float:
        """The latency of one message; each layer sends two."""
        self.tell("measure")
        return measure_latency_us(self.group)


@once
def leader() -> Leader:
    """The leader of this process, which is rank 0."""
    return Leader()


def wait_for_word(error: Exception) -> None:
    """Wait for the link, which names a lost process; MLX may fail before the link notices."""
    if isinstance(error, RuntimeError):
        time.sleep(WORD_S)


def measure_latency_us(group: mx.distributed.Group) -> float:
    """The median time of a sum over all processes."""
    seconds = []
    for _ in range(NUM_MEASURED):
        start = time.perf_counter()
        mx.eval(mx.distributed.all_sum(mx.zeros(MEASURED_NUMBERS), group=group))
        seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds)


@once
def limits() -> tuple[list[int], bool]:
    """Bytes that each process may use, and False; or the user's shares of the layers, and True."""
    if split := os.environ.get(SPLIT_VARIABLE):
        return read_split(split, group().size()), True
    own = mx.array([describe().limit_bytes // MIB])
    found: Any = mx.distributed.all_gather(own, group=group()).tolist()
    return [each * MIB for each in found], False


def agreed(config: ModelConfig) -> ModelConfig:
    """The config with the context and the bits of keys and values that fit all processes."""
    own = [config.context_limit or config.context_length, *(config.kv_bits or NOT_QUANTIZED)]
    context, *bits = cast(list[int], mx.distributed.all_min(mx.array(own), group=group()).tolist())
    limit = context if context < config.context_length else config.context_limit
    kv_bits = None if tuple(bits) == NOT_QUANTIZED else (bits[0], bits[1])
    return replace(config, context_limit=limit, kv_bits=kv_bits)


def follow(model: Any = None, load: Callable[..., Any] | None = None) -> None:
    """The main loop of ranks above 0, until rank 0 ends.

    `model`: their part of a model; or `load(path, **options)`, which loads it when rank 0 does.
    """
    # A terminal sends it to all processes; rank 0 decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    link = connect(group())
    follower = Follower(model, load)
    while True:
        message = link.messages.get()
        if message["do"] == "end":
            return
        try:
            follower.take(**message)
        except Exception as error:
            wait_for_word(error)
            name = f"process {group().rank()} of the model"
            link.fail(f"{name} has failed: {error}")


class Follower:
    """A rank above 0: its caches and snapshots by number."""

    def __init__(self, model: Any, load: Callable[..., Any] | None):
        self._model, self._load = model, load
        self._held: dict[int, Any] = {}
        self._num_passes = 0

    def take(self, do: str, dropped: Sequence[int], **what: Any) -> None:
        """Execute one command of rank 0."""
        for number in dropped:
            self._held.pop(number, None)
        held, number = self._held, what.pop("number", 0)
        match do:
            case "load":
                assert self._load
                self._model = self._load(what["path"], **what["options"])
            case "measure":
                measure_latency_us(group())
            case "kernels":
                use(self._model, Tiers(**what))
            case "hold":
                held[number] = caches.make_cache(self._model.config)
            case "trunk":
                self._trunk(**what)
            case "accept":
                caches.accept(held[what["cache"]], what["num_tokens"])
            case "snapshot":
                held[number] = caches.snapshot(held[what["cache"]], what["num_tokens"])
            case "restore":
                caches.restore(held[what["cache"]], held[what["point"]])
            case "fork":
                held[number] = caches.fork(held[what["cache"]], held[what["point"]])
            case "join":
                held[number] = caches.join([held[n] for n in what["rows"]])
            case "part":
                caches.part(held[what["cache"]], [held[n] for n in what["rows"]])
            case _:
                raise Qwen35Error("not a command of this version", got=do)

    def _trunk(
        self,
        cache: int | None,
        num_read: int,
        shape: Sequence[int],
        dtype: str,
        positions: Any,
        rope_delta: Any,
        flags: dict[str, bool],
    ) -> None:
        entries = None if cache is None else self._held[cache]
        trunk, own = self._model.language_model.model, caches.cached_tokens(entries or [])
        # In a pipeline, this process may have no layer that counts tokens.
        if own != num_read and (trunk.stages is None or (own and num_read)):
            raise Qwen35Error(
                "a cache was changed in one process alone", got=own, expected=f"{num_read} tokens"
            )
        x = mx.zeros(shape, getattr(mx, dtype))
        if trunk.stages is None:
            x = mx.distributed.all_sum(x, group=group())
        hidden = trunk(
            None,
            entries,
            embeddings=x,
            positions=None if positions is None else mx.array(positions),
            rope_delta=mx.array(rope_delta) if isinstance(rope_delta, list) else rope_delta,
            **flags,
        )
        mx.async_eval(hidden)
        self._num_passes += 1
        # As rank 0 does.
        if shape[1] == PREFILL_STEP_SIZE or self._num_passes % POOL_TOKENS == 0:
            mx.eval(hidden)
            mx.clear_cache()
