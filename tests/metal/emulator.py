"""Runs Metal kernels on the CPU, thread by thread, with every access to memory checked."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np
from metal import errors
from metal.compiler import kernel_library, runtime_library
from metal.names import check_names
from metal.signature import Argument, Signature, sign

MAX_THREADS = 1024
NUM_ORDERS = 3  # ascending, descending, shuffled

ERRORS = [
    None,
    errors.OutOfBoundsError,
    errors.RaceError,
    errors.UninitializedError,
    errors.DivergenceError,
    errors.ThreadgroupMemoryError,
    errors.ReadOnlyError,
    errors.MisalignedError,
]


class _Buffer(ctypes.Structure):
    _fields_ = (
        [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("bytes", ctypes.c_uint64)]
        + [(n, ctypes.c_uint32) for n in ("element_bytes", "is_output", "is_written", "padding")]
        + [(n, ctypes.c_uint64) for n in ("read_bytes", "written_bytes")]
        + [(n, ctypes.c_uint64) for n in ("unique_read_bytes", "unique_written_bytes")]
        + [("unwritten_at", ctypes.c_uint64)]
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        [("entry", ctypes.c_void_p), ("buffers", ctypes.POINTER(_Buffer))]
        + [("num_buffers", ctypes.c_uint32), ("order", ctypes.c_uint32)]
        + [("grid", ctypes.c_uint32 * 3), ("group", ctypes.c_uint32 * 3)]
        + [("float_ops", ctypes.POINTER(ctypes.c_uint64))]
        + [(n, ctypes.c_uint64) for n in ("num_threads", "num_simd_ops", "num_barriers")]
        + [(n, ctypes.c_uint64) for n in ("threadgroup_bytes", "num_matrix_macs")]
        + [("error", ctypes.c_uint32), ("padding", ctypes.c_uint32)]
        + [("message", ctypes.c_char * 512)]
    )


@dataclass(frozen=True)
class Traffic:
    """Bytes of one buffer that a launch moves; the unique ones count each byte once."""

    buffer_bytes: int
    read_bytes: int
    written_bytes: int
    unique_read_bytes: int
    unique_written_bytes: int


@dataclass(frozen=True)
class Launch:
    """What one dispatch did, measured in the ascending order of threads."""

    kernel: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    num_threads: int
    num_simd_ops: int
    num_barriers: int
    # A fused multiply-add is two; without those of simd and matrix operations. Or what else the
    # kernel's library counts.
    num_float_ops: int
    num_matrix_macs: int
    threadgroup_bytes: int
    traffic: dict[str, Traffic]


@dataclass
class Log:
    """Every launch inside `emulated()`."""

    launches: list[Launch] = field(default_factory=list)

    @property
    def num_dispatches(self) -> int:
        return len(self.launches)


@functools.cache
def _runtime() -> ctypes.CDLL:
    return ctypes.CDLL(str(runtime_library()), mode=ctypes.RTLD_GLOBAL)


@functools.cache
def load(library: Path) -> ctypes.CDLL:
    """A compiled kernel, beside the runtime."""
    _runtime()
    return ctypes.CDLL(str(library))


@functools.cache
def _compiled(signature: Signature) -> ctypes.CDLL:
    check_names(signature)
    return load(kernel_library(signature))


def _strided(array: mx.array) -> np.ndarray:
    """The array as it lies in memory; numpy has no bfloat16, whose bits come as uint16."""
    mx.eval(array)
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)


def _constant(argument: Argument, views: list[np.ndarray]) -> tuple[np.ndarray, int]:
    """What an argument other than an output points to, and the bytes of an element."""
    view = views[argument.source]
    if argument.role == "input":
        # From the first to the last element, gaps included.
        last = sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))
        length = last + view.itemsize if view.size else 0
        raw = (ctypes.c_uint8 * max(length, 1)).from_address(view.ctypes.data)
        return np.frombuffer(raw, np.uint8, count=length), view.itemsize
    if argument.role == "strides":
        return np.array([s // view.itemsize for s in view.strides], np.int64), 8
    return np.array(view.shape if argument.role == "shape" else [view.ndim], np.int32), 4


class EmulatedKernel:
    """Stands for what mx.fast.metal_kernel returns; takes the same arguments."""

    def __init__(
        self,
        name: str,
        input_names: list[str],
        output_names: list[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        atomic_outputs: bool = False,
        compile_options: object | None = None,
        *,
        log: Log | None = None,
    ):
        if not output_names:
            raise ValueError("[metal_kernel] Must specify at least one output.")
        self.name = name
        self.input_names = list(input_names)
        self.output_names = list(output_names)
        self.source = source
        self.header = header
        self.ensure_row_contiguous = ensure_row_contiguous
        self.atomic_outputs = atomic_outputs
        self.log = log if log is not None else Log()

    def __call__(
        self,
        *,
        inputs,
        output_shapes,
        output_dtypes,
        grid,
        threadgroup,
        template=None,
        init_value=None,
        verbose=False,
        stream=None,
    ) -> list[mx.array]:
        arrays = [a if isinstance(a, mx.array) else mx.array(a) for a in inputs]
        if len(arrays) != len(self.input_names):
            raise ValueError(f"{self.name}: {len(arrays)} inputs for {len(self.input_names)} names")
        signature = sign(
            self.name,
            [(n, a.dtype, a.shape) for n, a in zip(self.input_names, arrays, strict=True)],
            list(zip(self.output_names, output_dtypes, strict=True)),
            list(template or []),
            header=self.header,
            source=self.source,
            atomic_outputs=self.atomic_outputs,
        )
        threads = threadgroup[0] * threadgroup[1] * threadgroup[2]
        if not 1 <= threads <= MAX_THREADS or min(grid) < 1:
            raise errors.ThreadgroupSizeError(
                f"{self.name}: {threads} threads in a threadgroup of {tuple(threadgroup)}, "
                f"grid {tuple(grid)}; from 1 to {MAX_THREADS} can run"
            )
        try:
            library = self._library(signature)
        except errors.EmulatorError as error:
            raise type(error)(f"{self.name}: {error}") from None
        if self.ensure_row_contiguous:
            arrays = [mx.contiguous(a) for a in arrays]
        views = [_strided(a) for a in arrays]
        constants = [
            None if a.role == "output" else _constant(a, views) for a in signature.arguments
        ]
        shapes = [tuple(s) for s in output_shapes]
        initialised = init_value is not None

        results: list[list[np.ndarray]] = []
        for order in range(NUM_ORDERS):
            outputs = [
                _blank(s, d, init_value, order) for s, d in zip(shapes, output_dtypes, strict=True)
            ]
            launch = self._run(
                library, signature, constants, outputs, grid, threadgroup, order, initialised
            )
            if order == 0:
                self.log.launches.append(launch)
            results.append(outputs)
        for order, other in enumerate(results[1:], 1):
            for label, a, b in zip(self.output_names, results[0], other, strict=True):
                if a.tobytes() != b.tobytes():
                    at = int(np.flatnonzero(a.view(np.uint8) != b.view(np.uint8))[0]) // a.itemsize
                    raise errors.OrderError(
                        f"{self.name}: {label}[{at}] is another number when threads run in order "
                        f"{order} (0 ascending, 1 descending, 2 shuffled)"
                    )
        return [
            mx.array(o).view(d).reshape(s)
            for o, d, s in zip(results[0], output_dtypes, shapes, strict=True)
        ]

    def _library(self, signature: Signature) -> ctypes.CDLL:
        return _compiled(signature)

    def _run(
        self, library, signature, constants, outputs, grid, threadgroup, order, initialised
    ) -> Launch:
        buffers = (_Buffer * len(signature.arguments))()
        for buffer, a, constant in zip(buffers, signature.arguments, constants, strict=True):
            output = a.role == "output"
            data = outputs[a.source] if output else constant[0]
            buffer.name = a.name.encode()
            buffer.data = data.ctypes.data
            buffer.bytes = data.nbytes
            buffer.element_bytes = data.itemsize if output else constant[1]
            buffer.is_output = output
            buffer.is_written = initialised or not output
        float_ops = ctypes.c_uint64.in_dll(library, "emu_float_ops")
        float_ops.value = 0
        launch = _Launch()
        launch.entry = ctypes.cast(library.emu_entry, ctypes.c_void_p).value
        launch.buffers = buffers
        launch.num_buffers = len(buffers)
        launch.order = order
        launch.grid = tuple(grid)
        launch.group = tuple(min(t, g) for t, g in zip(threadgroup, grid, strict=True))
        error = _runtime().emu_run(ctypes.byref(launch))
        if error:
            raise ERRORS[error](f"{self.name}: {launch.message.decode(errors='replace')}")
        for buffer, a in zip(buffers, signature.arguments, strict=True):
            if a.role == "output" and not initialised and buffer.unwritten_at != 2**64 - 1:
                raise errors.UninitializedError(
                    f"{self.name}: output {a.name}[{buffer.unwritten_at}] is left unwritten"
                )
        traffic = {
            a.name: Traffic(
                b.bytes, b.read_bytes, b.written_bytes, b.unique_read_bytes, b.unique_written_bytes
            )
            for a, b in zip(signature.arguments, buffers, strict=True)
        }
        return Launch(
            self.name,
            tuple(grid),
            tuple(threadgroup),
            launch.num_threads,
            launch.num_simd_ops,
            launch.num_barriers,
            float_ops.value,
            launch.num_matrix_macs,
            launch.threadgroup_bytes,
            traffic,
        )


def _blank(shape, dtype: mx.Dtype, init_value, order: int) -> np.ndarray:
    """An output before the launch: the initial value, or bytes that differ from order to order."""
    elements = int(np.prod(shape, dtype=np.int64))
    if init_value is None:
        plain = np.uint8 if dtype == mx.bool_ else f"u{dtype.size}"
        return np.full(elements * dtype.size, (0x7F, 0xFF, 0x55)[order], np.uint8).view(plain)
    return _strided(mx.full((elements,), init_value, dtype)).copy()


@contextlib.contextmanager
def emulated(
    kernel: type[EmulatedKernel] = EmulatedKernel, *, metal_available: bool = False
) -> Iterator[Log]:
    """Runs every kernel made and called inside on the emulator, and yields the log of launches.

    Arrays are evaluated as a kernel meets them, so mx.compile is switched off.
    `metal_available` makes libraries that ask believe in a GPU while they build their kernels.
    """
    log = Log()
    saved = mx.fast.metal_kernel, mx.metal.is_available, mx.device_info, mx.set_wired_limit
    mx.fast.metal_kernel = functools.partial(kernel, log=log)
    if metal_available:
        mx.metal.is_available = lambda: True
        mx.device_info = lambda *_: {"max_recommended_working_set_size": 2**37, **saved[2]()}
        mx.set_wired_limit = lambda limit: 0
    mx.disable_compile()
    try:
        yield log
    finally:
        if "MLX_DISABLE_COMPILE" not in os.environ:
            mx.enable_compile()
        mx.fast.metal_kernel, mx.metal.is_available, mx.device_info, mx.set_wired_limit = saved
