"""Detects answers that repeat themselves without end."""

import re
from typing import Any

MIN_REPEATS = 4
GRAM = 8
# Number of exactly repeated tokens that make a loop. Wanted repetition ends by itself: few users
# ask for more than 300 equal lines, or for a matrix of more than 64 x 64.
MAX_PROSE_TOKENS = 512
MAX_SENTENCE_LINES_TOKENS = 2_048
MAX_TEXT_TOKENS = 8_192
MAX_DATA_TOKENS = 12_288
# Users do not ask for hundreds of lines of this length, in characters.
PARAGRAPH_LINE = 120
WORD = re.compile(r"[^\W\d_]+")
# Thousands may be parted, as in 2,000 and 2.000 and 2 000 and 2'000.
PARTED = r"[1-9]\d{0,2}(?P<mark>[,.'\u2019_ \u00a0\u2009\u202f])\d{3}(?:(?P=mark)\d{3})*"
TIMES = r"\s*(?:(?:times|x|mal|fois|veces|vezes|volte|keer|раз)\b|[×次回遍번])"
# Letters of other scripts may touch a number.
NUMBER = re.compile(
    rf"(?<![A-Za-z\d_.,])(?P<number>{PARTED}|\d+)(?![.,]?\d)(?P<thousands>k\b)?(?P<times>{TIMES})?"
    rf"(?![A-Za-z_])|(?P<word>{WORD.pattern})",
    re.IGNORECASE,
)
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6}
ONES = "zero one two three four five six seven eight nine ten eleven twelve".split()
TENS = "ten twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBER_WORDS = {word: value for value, word in enumerate(ONES)}
NUMBER_WORDS |= {word: 10 * value for value, word in enumerate(TENS, 1)}
# In scripts without spaces, each character counts as a word.
CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
SENTENCE_ENDS = ".!?\u2026\u3002\uff01\uff1f"
SENTENCE_END = re.compile(f"[{SENTENCE_ENDS}]")
COMMA = re.compile(r"[,;\u3001\uff0c]")
NOT_PROSE = re.compile(r"[\[\]{}<>|=\\/_#\t]")


class LoopDetector:
    """Watches the end of a sequence of tokens, in constant time per token.

    A loop is a passage that was repeated exactly, at least `MIN_REPEATS` times in a row, for more
    tokens than its kind may: few for running text, more for lines and single words, most for
    numbers, tables and runs of characters. A passage may also repeat as often as a number in
    `question` says; a passage made of the question's words counts as lines.
    """

    def __init__(self, tokenizer: Any, question: str = "") -> None:
        self._tokenizer = tokenizer
        self._words_wanted = _words(question)
        self._most_wanted = largest_number(question)
        self._ids: list[int] = []
        # Last position of each gram; the distance to it is the length of a passage.
        self._last: dict[tuple[int, ...], int] = {}
        self._period = self._repeated = self._limit = 0

    def feed(self, token: int) -> bool:
        """Add a token; returns whether the text is in a loop."""
        ids = self._ids
        ids.append(token)
        at = len(ids) - 1
        gram = tuple(ids[-GRAM:])
        if self._period and token == ids[at - self._period]:
            self._repeated += 1
        else:
            # The whole gram occurred before, or the period is 0 and nothing repeats.
            self._period, self._repeated = at - self._last.get(gram, at), GRAM
        self._last[gram] = at
        least = max(MAX_PROSE_TOKENS, (MIN_REPEATS - 1) * self._period)
        if self._repeated == least:
            self._limit = self._limit_of(ids[-2 * self._period :])
        return self._repeated >= max(least, self._limit)

    def _limit_of(self, ids: list[int]) -> int:
        """How many tokens a passage may repeat; `ids` has the passage twice."""
        text = self._tokenizer.decode(ids)
        limit = passage_limit(text)
        # The first and last word may be cut.
        words = _words(text.partition(" ")[2].rpartition(" ")[0])
        if words and words <= self._words_wanted:
            limit = max(limit, MAX_TEXT_TOKENS)
        return max(limit, min(self._most_wanted * self._period * 11 // 10, MAX_DATA_TOKENS))


def largest_number(question: str) -> int:
    """The largest count in a question, in digits or English words; 0 without one.

    A number above 1,000 whose thousands are not parted may be a year, or one to calculate with: it
    counts only before "times".
    """
    largest = value = 0
    for match in NUMBER.finditer(question):
        if word := match["word"]:
            word = word.lower()
            if scale := SCALES.get(word):
                value = max(value, 1) * scale
            else:
                value = value + NUMBER_WORDS[word] if word in NUMBER_WORDS else 0
        else:
            value = int(re.sub(r"\D", "", match["number"])) * (1000 if match["thousands"] else 1)
            if value > 1000 and not (match["mark"] or match["thousands"] or match["times"]):
                value = 0
        largest = max(largest, value)
        if value >= 1000:
            value = 0
    return largest


def passage_limit(text: str) -> int:
    """How many tokens a passage like `text` may repeat."""
    words = WORD.findall(text)
    num_cjk = len(CJK.findall(text))
    if not any(len(word) > 1 for word in words) or not (num_cjk or re.search(r"\s", text)):
        # A row of punctuation is a separator line, not data.
        return MAX_DATA_TOKENS if re.search(r"[\w\n]", text) else MAX_TEXT_TOKENS
    num_words = num_cjk or len(words)
    is_prose = (
        sum(map(str.isalpha, text)) >= 0.75 * len(re.sub(r"\s", "", text))
        and not NOT_PROSE.search(text)
        and len(COMMA.findall(text)) <= num_words // 2
        # Three words of a sentence, or five without a full stop; the text has them twice.
        and num_words >= (6 if SENTENCE_END.search(text) else 10)
    )
    if not is_prose:
        return MAX_TEXT_TOKENS
    # The first and last line may be cut.
    lines = [line.strip() for line in text.split("\n")[1:-1] if line.strip()]
    if "\n" not in text or min(map(len, lines), default=0) >= PARAGRAPH_LINE:
        return MAX_PROSE_TOKENS
    are_sentences = len(set(lines)) > 1 and all(line[-1] in SENTENCE_ENDS for line in lines)
    return MAX_SENTENCE_LINES_TOKENS if are_sentences else MAX_TEXT_TOKENS


def _words(text: str) -> set[str]:
    return {word.lower() for word in WORD.findall(text)}
