"""What the emulator finds wrong with a kernel: one class a kind."""


class EmulatorError(AssertionError):
    """A kernel that would be wrong on a GPU; the message names kernel, buffer, index and thread."""


class OutOfBoundsError(EmulatorError):
    """A read or write outside every buffer, or to memory of another thread."""


class RaceError(EmulatorError):
    """Two threads use the same memory, one writes, and no barrier orders them."""


class UninitializedError(EmulatorError):
    """A read of memory that nobody wrote, or an output that is left unwritten."""


class DivergenceError(EmulatorError):
    """A barrier or simd operation that not all threads reach."""


class OrderError(EmulatorError):
    """Results that change with the order in which threads run."""


class ThreadgroupMemoryError(EmulatorError):
    """More than 32 KB of threadgroup memory."""


class ThreadgroupSizeError(EmulatorError):
    """A threadgroup of more than 1024 threads, or of none."""


class ReadOnlyError(EmulatorError):
    """A write to an input."""


class MisalignedError(EmulatorError):
    """An access at an address that is not a multiple of its size."""


class NotMetalError(EmulatorError):
    """A name, function, type or conversion that Metal does not have."""


class AddressSpaceError(EmulatorError):
    """A missing or wrong device, threadgroup, constant or thread."""
