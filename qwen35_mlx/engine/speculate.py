"""Drafts for speculative decoding: from the MTP layer, or from earlier text (lookup).

A draft that differs from the sampled token is rejected and changes nothing. So the number of drafts
affects only the speed: it follows the acceptance and the measured times of passes.
"""

import itertools
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Sequence
from typing import cast

import mlx.core as mx
import numpy as np

from ..errors import Qwen35Error
from ..kernels.matrix import MAX_ROWS
from ..model.language import Model
from .exact_rows import exact_rows
from .prompt_cache import PromptCache
from .sampler import Sampler

AUTO, OFF, MTP, LOOKUP = "auto", "off", "mtp", "lookup"
MODES = (AUTO, OFF, MTP, LOOKUP)
# One row of a pass is for the certain token.
MAX_DRAFTS = MAX_ROWS - 1
# Shorter matches are often accidental.
MATCHED_TOKENS = 4
# A copy usually continues near its last place; beyond this distance the latest match is preferred.
COPY_WINDOW = 512
# Drafts of a new copy; and fully accepted passes after which a copy gets the maximum.
FIRST_LOOKUP_DRAFTS, HITS_TO_TRUST = 4, 2
# If drafting does not pay, passes until it is tried again; doubled each time.
PAUSE_PASSES = 64
LONGEST_PAUSE = 512
# Times that are kept for each size of a pass, and the minimum for a decision. The median counts,
# because a pass may include a compilation, or seem longer when the host was late.
REMEMBERED_PASSES, ENOUGH_PASSES = 6, 3
# A longer context makes passes slower, so all sizes are timed again after so many.
PASSES_TO_FORGET = 512
# Initial estimate of the acceptance, and the weight of a new observation.
FIRST_SHARE, NEW_SHARE = 0.8, 0.1
# Minimum chance of acceptance to try one more draft.
MIN_CHANCE = 0.3
# If the acceptance is below this after so many drafts, the layer's weights are wrong.
HOPELESS_SHARE, HOPELESS_AFTER = 0.05, 64
HOPELESS = (
    "the drafts of this model's MTP layer are hardly ever right; its weights may be damaged, or of "
    "another model: convert the checkpoint again, or draft without it"
)
NOT_EXACT = (
    "nothing is drafted: with the kernels in use on this GPU, a pass of several tokens would "
    "change the text; try --kernels metal, which is exact if its kernels passed the check here"
)
FROM_DISK = (
    "nothing is drafted: with experts from disk a pass of several tokens takes longer than passes "
    "of one token each"
)
log = logging.getLogger(__name__)


class Drafter:
    """Proposes drafts, and adapts their number to acceptance and times."""

    def __init__(self, model: Model, mode: str = AUTO, num_draft_tokens: int | None = None):
        """`num_draft_tokens`: a fixed number; None: chosen by acceptance and time."""
        if mode not in MODES:
            raise Qwen35Error("unknown kind of drafts", got=mode, expected=", ".join(MODES))
        if num_draft_tokens is not None and not 1 <= num_draft_tokens <= MAX_DRAFTS:
            raise Qwen35Error(
                "num_draft_tokens is not usable",
                got=num_draft_tokens,
                expected=f"1 to {MAX_DRAFTS}",
            )
        self.mode = mode
        has_mtp = getattr(model, "mtp", None) is not None
        if mode == MTP and not has_mtp:
            raise Qwen35Error(
                "the loaded model has no MTP layer to draft with",
                hint="use lookup, or load a model that has mtp.* tensors with mtp=True, which is "
                "--draft mtp",
            )
        # Maximum drafts of a pass; 0 if a pass with drafts would change the text.
        self.max_drafts = 0 if mode == OFF else MAX_DRAFTS
        if self.max_drafts and isinstance(model, Model):
            # With experts from disk, two tokens read 1.75 times the experts, for 1.85 kept tokens.
            self.max_drafts = 0 if model.experts else min(self.max_drafts, exact_rows(model) - 1)
            if not self.max_drafts and mode != AUTO:
                log.warning(FROM_DISK if model.experts else NOT_EXACT)
        self.uses_mtp = has_mtp and self.max_drafts > 0 and mode in (AUTO, MTP)
        self.uses_lookup = self.max_drafts > 0 and mode in (AUTO, LOOKUP)
        self.num_draft_tokens = num_draft_tokens
        self.stats = DraftStats()
        self.clock = time.perf_counter
        # Acceptance of the draft at each depth, given that those before it were accepted.
        self._acceptance = [FIRST_SHARE] * MAX_DRAFTS
        # Seconds of the last passes, by their number of MTP drafts; 0: plain passes.
        self._seconds = self._untimed()
        self._num_passes = 0
        self._kind, self._pause, self._hits = "", {MTP: 0, LOOKUP: 0}, 0
        self._next_pause = dict.fromkeys(self._pause, PAUSE_PASSES)
        # Tokens and seconds of the last passes with lookup drafts.
        self._looked_up: deque[tuple[int, float]] = deque(maxlen=REMEMBERED_PASSES)
        self._ids: Sequence[int] = ()
        self._text, self._num_known = np.zeros(0, dtype=np.int64), 0
        # Position in the text at which the last copy would continue.
        self._copy_end: int | None = None
        self.begin()

    def begin(self) -> None:
        """Start timing; the device is idle."""
        # Whether a plain pass was started before the host knew its token.
        self._is_ahead = False
        self._lap_start = self.clock()

    def propose(
        self, cache: PromptCache, token: mx.array, sampler: Sampler, most: int
    ) -> mx.array | None:
        """Up to `most` drafts `[K]` after `token` `[1]`, the next one to read; or None."""
        self._kind = ""
        most = min(most, self.max_drafts)
        if most < 1 or not cache.can_go_back:
            return None
        if self.uses_lookup and (found := self._look_up(cache.ids, token, most)):
            self._kind = LOOKUP
            return mx.array(found, dtype=token.dtype)
        if not self.uses_mtp or (number := min(most, self._best_number())) < 1:
            return None
        self._wait_for(token)
        drafts = cache.drafts(token, number, sampler)
        if not drafts:
            return None
        self._kind = MTP
        return mx.concatenate(drafts).astype(token.dtype)

    def record(self, num_drafts: int = 0, num_accepted: int = 0) -> None:
        """Record a pass and its number of accepted drafts."""
        seconds, was_hopeless = self._lap(), self.is_hopeless
        self._num_passes += 1
        self._pause = {kind: max(0, left - 1) for kind, left in self._pause.items()}
        self.stats.count(self._kind, num_drafts, num_accepted)
        if self._kind == LOOKUP:
            self._hits = self._hits + 1 if num_accepted == num_drafts else 0
            if self._copy_end is not None:
                self._copy_end += num_accepted
            self._looked_up.append((1 + num_accepted, seconds))
            if self.num_draft_tokens is None and len(self._looked_up) == REMEMBERED_PASSES:
                self._judge(LOOKUP, self._lookup_pays())
        elif self._kind == MTP:
            self._seconds[num_drafts].append(seconds)
            for depth in range(min(num_accepted + 1, num_drafts)):
                known = self._acceptance[depth]
                self._acceptance[depth] = known + NEW_SHARE * ((depth < num_accepted) - known)
        else:
            # The first plain pass has only been started, so it has no time yet.
            if self._is_ahead:
                self._seconds[0].append(seconds)
            self._is_ahead = True
        if self.is_hopeless and not was_hopeless:
            log.warning(HOPELESS)
            # A fixed number of drafts is kept.
            self.uses_mtp = self.num_draft_tokens is not None
        if self._num_passes % PASSES_TO_FORGET == 0:
            self._seconds = self._untimed()

    @property
    def is_hopeless(self) -> bool:
        """Whether almost no MTP draft is accepted, so its weights must be wrong."""
        drafted, accepted = self.stats.first_drafts
        return drafted >= HOPELESS_AFTER and accepted < HOPELESS_SHARE * drafted

    def _lap(self) -> float:
        """Seconds since the last call."""
        start, self._lap_start = self._lap_start, self.clock()
        return self._lap_start - start

    def _wait_for(self, token: mx.array) -> int:
        """The id of `token`; waits for the plain pass that computes it, and times that pass."""
        token_id = int(cast(int, token.item()))
        if self._is_ahead:
            self._seconds[0].append(self._lap())
            self._is_ahead = False
        return token_id

    def _look_up(self, ids: Sequence[int], token: mx.array, most: int) -> list[int]:
        """The tokens that followed an earlier place with the same last four tokens.

        Of several places, the nearest one to the end of the last copy, or else the latest.
        """
        if len(ids) <= MATCHED_TOKENS or self._pause[LOOKUP]:
            return []
        number = self.num_draft_tokens or (
            MAX_DRAFTS if self._hits >= HITS_TO_TRUST else FIRST_LOOKUP_DRAFTS
        )
        text = self._as_array(ids)
        # Match the three known tokens first, because reading the fourth waits for a pass. `places`
        # are those of the third one, with at least two tokens after it.
        *others, last = text[1 - MATCHED_TOKENS :]
        places = np.flatnonzero(text[MATCHED_TOKENS - 2 : -2] == last) + MATCHED_TOKENS - 2
        for distance, wanted in enumerate(reversed(others), 1):
            places = places[text[places - distance] == wanted]
        if not len(places):
            return []
        token_id = self._wait_for(token)
        places = places[text[places + 1] == token_id]
        if not len(places):
            return []
        start, number = self._nearest(places) + 2, min(number, most)
        self._copy_end = start
        found = [*text[start : start + number].tolist(), token_id]
        # If the copy reaches the end of the text, it repeats.
        period = len(text) + 1 - start
        while len(found) < number:
            found.append(found[-period])
        # Placeholders of pictures, and tokens after them, are no drafts.
        return list(itertools.takewhile(lambda i: i >= 0, found[:number]))

    def _nearest(self, places: np.ndarray) -> int:
        if self._copy_end is not None:
            distances = np.abs(places + 1 - self._copy_end)
            if distances.min() <= COPY_WINDOW:
                return int(places[distances.argmin()])
        return int(places[-1])

    def _as_array(self, ids: Sequence[int]) -> np.ndarray:
        """The ids as an array; only new ones are copied if the text continues."""
        # A cache appends to its list, and makes a new one when it is rewound.
        known = self._num_known if ids is self._ids else 0
        if not known:
            self._copy_end = None
        if len(ids) > len(self._text):
            grown = np.zeros(len(ids) + len(ids) // 4 + 1024, dtype=np.int64)
            grown[:known] = self._text[:known]
            self._text = grown
        self._text[known : len(ids)] = ids[known:]
        self._ids, self._num_known = ids, len(ids)
        return self._text[: len(ids)]

    def _best_number(self) -> int:
        """The number of MTP drafts with the most tokens per second; 0 if none pays."""
        if self.num_draft_tokens is not None:
            return self.num_draft_tokens
        if self._pause[MTP] or not (rates := self._rates()):
            return 0
        # The next number is not timed yet; try it while the number before it is the best.
        number, best = len(rates), max(range(len(rates)), key=rates.__getitem__)
        may_pay = best == number - 1 and math.prod(self._acceptance[:number]) > MIN_CHANCE
        if number == 1 or (may_pay and number <= self.max_drafts):
            return number
        self._judge(MTP, best > 0)
        return best

    def _judge(self, kind: str, pays: bool) -> None:
        """After a trial: continue to draft, or pause."""
        if pays:
            self._next_pause[kind] = PAUSE_PASSES
            return
        self._pause[kind] = self._next_pause[kind]
        self._next_pause[kind] = min(2 * self._pause[kind], LONGEST_PAUSE)
        # Forget the measurements, because text after the pause is different.
        if kind == LOOKUP:
            self._looked_up.clear()
        else:
            self._acceptance, self._seconds = [FIRST_SHARE] * MAX_DRAFTS, self._untimed()

    def _rates(self) -> list[float]:
        """Tokens per second with 0, 1, … MTP drafts, for the numbers that are timed."""
        rates, expected, chance = list[float](), 1.0, 1.0
        for passes, share in zip(self._seconds, [*self._acceptance, 0.0], strict=True):
            if len(passes) < ENOUGH_PASSES:
                break
            rates.append(expected / max(statistics.median(passes), 1e-9))
            chance *= share
            expected += chance
        return rates

    def _lookup_pays(self) -> bool:
        """Whether the last lookup passes had more tokens per second than others would."""
        rates = self._rates()
        if not rates:
            return True
        tokens, seconds = (sum(column) for column in zip(*self._looked_up, strict=True))
        return tokens >= max(rates) * seconds

    @staticmethod
    def _untimed() -> list[deque[float]]:
        return [deque(maxlen=REMEMBERED_PASSES) for _ in range(MAX_DRAFTS + 1)]


class DraftStats:
    """Statistics of a drafter: passes, and drafts by depth."""

    def __init__(self) -> None:
        self.num_passes = 0
        self.num_tokens = 0
        self.drafted: dict[str, list[int]] = {}
        self.accepted: dict[str, list[int]] = {}

    def count(self, kind: str, num_drafts: int, num_accepted: int) -> None:
        """Count one pass."""
        self.num_passes += 1
        self.num_tokens += 1 + num_accepted
        if kind:
            drafted = self.drafted.setdefault(kind, [0] * MAX_DRAFTS)
            accepted = self.accepted.setdefault(kind, [0] * MAX_DRAFTS)
            for depth in range(num_drafts):
                drafted[depth] += depth <= num_accepted
                accepted[depth] += depth < num_accepted

    @property
    def first_drafts(self) -> tuple[int, int]:
        """First drafts of the MTP layer: drafted and accepted."""
        return self.drafted.get(MTP, [0])[0], self.accepted.get(MTP, [0])[0]

    @property
    def summary(self) -> dict[str, list[float]]:
        """Rounded `acceptance` of each kind of drafts that was used."""
        return {kind: [round(share, 4) for share in self.acceptance(kind)] for kind in self.drafted}

    @property
    def tokens_per_pass(self) -> float:
        """Mean number of tokens per pass; 1.0 without drafts."""
        return self.num_tokens / self.num_passes if self.num_passes else 1.0

    def acceptance(self, kind: str) -> list[float]:
        """Acceptance by depth, given that the drafts before were accepted."""
        pairs = zip(self.drafted.get(kind, []), self.accepted.get(kind, []), strict=True)
        return [accepted / drafted for drafted, accepted in pairs if drafted]
