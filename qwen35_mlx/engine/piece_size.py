"""Size of prefill pieces, so that each takes about a given time."""

from ..memory import PREFILL_STEP_SIZE

# Pieces are multiples of the delta rule's chunk.
PIECE_MULTIPLE = 64


class PieceSize:
    """Measures the prefill speed, which falls as the context grows."""

    def __init__(self) -> None:
        self._tokens_per_second = 0.0

    def next(self, seconds: float, first: int = PREFILL_STEP_SIZE) -> int:
        """Number of tokens that take about `seconds`; `first` if no speed is known."""
        if not self._tokens_per_second:
            return first
        size = int(self._tokens_per_second * seconds) // PIECE_MULTIPLE * PIECE_MULTIPLE
        return min(max(size, PIECE_MULTIPLE), PREFILL_STEP_SIZE)

    def record(self, num_tokens: int, seconds: float) -> None:
        """Record the time of a piece."""
        if num_tokens >= PIECE_MULTIPLE:
            rate = num_tokens / max(seconds, 1e-9)
            known = self._tokens_per_second or rate
            self._tokens_per_second = 0.5 * known + 0.5 * rate
