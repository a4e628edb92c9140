"""The two kinds of progress that long work reports to its caller."""

from collections.abc import Callable

# Steps done, steps in all, the current step in words.
StepProgress = Callable[[int, int, str], None]
# Bytes done, bytes in all, the current tensor or what the work waits for, the current file.
ByteProgress = Callable[[int, int, str, str], None]
