"""How many tokens of a prompt are read at a time, by how long that may take."""

from ..memory import PREFILL_STEP_SIZE

# A piece is a multiple of it, of the delta rule's chunk.
PIECE_MULTIPLE = 64


class PieceSize:
    """Learns the speed of reading, which falls as the context grows."""

    def __init__(self) -> None:
        self._tokens_per_second = 0.0

    def next(self, seconds: float, first: int = PREFILL_STEP_SIZE) -> int:
        """Tokens that take about so long; `first` while no speed is known."""
        if not self._tokens_per_second:
            return first
        size = int(self._tokens_per_second * seconds) // PIECE_MULTIPLE * PIECE_MULTIPLE
        return min(max(size, PIECE_MULTIPLE), PREFILL_STEP_SIZE)

    def record(self, num_tokens: int, seconds: float) -> None:
        """What a piece took."""
        if num_tokens >= PIECE_MULTIPLE:
            rate = num_tokens / max(seconds, 1e-9)
            known = self._tokens_per_second or rate
            self._tokens_per_second = 0.5 * known + 0.5 * rate
