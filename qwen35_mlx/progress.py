"""Types of the progress callbacks."""

from collections.abc import Callable

# Steps done, all steps, the current step in words.
StepProgress = Callable[[int, int, str], None]
# Bytes done, all bytes, the current tensor or the reason for waiting, the current file.
ByteProgress = Callable[[int, int, str, str], None]
