"""A detector of answers that repeat themselves without end."""

# Tokens. Tables, lists of numbers and boilerplate repeat too, but not for so long.
MIN_REPEATED_TOKENS = 512
MIN_REPEATS = 4
GRAM = 8


class LoopDetector:
    """Watches the tail of a sequence of tokens; constant time a token.

    A loop is a passage that came `MIN_REPEATS` times in a row, word for word, with at least
    `MIN_REPEATED_TOKENS` after its first time.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        # Where the last tokens stood before: the distance is the length of a passage.
        self._last: dict[tuple[int, ...], int] = {}
        self._period = self._repeated = 0

    def feed(self, token: int) -> bool:
        """Whether the text is in a loop now."""
        ids = self._ids
        ids.append(token)
        at = len(ids) - 1
        if self._period and token == ids[at - self._period]:
            self._repeated += 1
        else:
            self._period = self._repeated = 0
        gram = tuple(ids[-GRAM:])
        if not self._period and (before := self._last.get(gram)) is not None:
            self._period = at - before
            self._repeated = self._matching(self._period)
        self._last[gram] = at
        enough = max(MIN_REPEATED_TOKENS, (MIN_REPEATS - 1) * self._period)
        return self._period > 0 and self._repeated >= enough

    def _matching(self, period: int) -> int:
        """How many of the last tokens equal those one period before."""
        ids, count = self._ids, 0
        most = min(period, len(ids) - period)
        while count < most and ids[-1 - count] == ids[-1 - count - period]:
            count += 1
        return count
