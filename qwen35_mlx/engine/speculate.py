"""Drafts of the next tokens: from the MTP layer, or from where the text stood before.

A draft that is not what the sampler draws is read in vain and changes nothing. So the number of
drafts is a matter of speed alone: it follows what was accepted and how long passes took.
"""

import logging
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import cast

import mlx.core as mx
import numpy as np

from ..errors import Qwen35Error
from ..kernels.matrix import MAX_ROWS
from ..model.language import Model
from .prompt_cache import PromptCache
from .sampler import Sampler

AUTO, OFF, MTP, LOOKUP = "auto", "off", "mtp", "lookup"
MODES = (AUTO, OFF, MTP, LOOKUP)
# A pass has one row for the token that is certain.
MAX_DRAFTS = MAX_ROWS - 1
# Fewer tokens repeat by chance.
MATCHED_TOKENS = 4
# A copy that goes on is worth the longest passes.
FIRST_LOOKUP_DRAFTS, HITS_TO_TRUST = 4, 2
# Where drafting does not pay, how many tokens until it is tried again.
PAUSE_TOKENS = 64
# Passes that are remembered of each size; their fastest counts, for others had to wait or compile.
REMEMBERED_PASSES = 6
# Of a new observation in the running share of accepted drafts.
NEW_SHARE = 0.1
# Below it after so many drafts, the layer's weights are not what they should be.
HOPELESS_SHARE, HOPELESS_AFTER = 0.05, 64
HOPELESS = (
    "the drafts of this model's MTP layer are hardly ever right, so it is not used; "
    "its weights may be damaged, or of another model: convert the checkpoint again"
)
log = logging.getLogger(__name__)


class Drafter:
    """Proposes drafts for one text after another; remembers what they brought."""

    def __init__(self, model: Model, mode: str = AUTO, num_draft_tokens: int | None = None):
        """`num_draft_tokens`: always so many; None lets acceptance and time decide."""
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
                "this model has no MTP layer to draft with",
                hint="use lookup, or convert a checkpoint that has mtp.* tensors",
            )
        self.uses_mtp = has_mtp and mode in (AUTO, MTP)
        self.uses_lookup = mode in (AUTO, LOOKUP)
        self.num_draft_tokens = num_draft_tokens
        self.stats = DraftStats()
        # Of the draft at each depth, given that those before it were accepted.
        self._acceptance = [0.8] * MAX_DRAFTS
        self._seconds: dict[tuple[str, int], deque[float]] = defaultdict(
            lambda: deque(maxlen=REMEMBERED_PASSES)
        )
        self._kind, self._pause, self._hits = "", {MTP: 0, LOOKUP: 0}, 0
        # Tokens and seconds of the last passes with drafts from the text.
        self._looked_up: deque[tuple[int, float]] = deque(maxlen=REMEMBERED_PASSES)
        self._text, self._num_known = np.zeros(0, dtype=np.int64), 0

    def propose(
        self, cache: PromptCache, token: mx.array, sampler: Sampler, most: int
    ) -> mx.array | None:
        """Up to `most` drafts `[K]` of what follows `token` `[1]`, drawn and not read; or None."""
        self._kind = ""
        most = min(most, MAX_DRAFTS)
        if most < 1 or not cache.can_go_back:
            return None
        if self.uses_lookup and (found := self._look_up(cache.ids, token, most)):
            self._kind = LOOKUP
            return mx.array(found, dtype=token.dtype)
        if not self.uses_mtp or (number := min(most, self._best_number())) < 1:
            return None
        drafts = cache.drafts(token, number, sampler)
        if not drafts:
            return None
        self._kind = MTP
        return mx.concatenate(drafts).astype(token.dtype)

    def record(self, seconds: float, num_drafts: int = 0, num_accepted: int = 0) -> None:
        """What the last pass took, and how many of its drafts were right."""
        self._seconds[self._kind, num_drafts].append(seconds)
        self._pause = {kind: max(0, left - 1) for kind, left in self._pause.items()}
        was_hopeless = self.is_hopeless
        self.stats.count(self._kind, num_drafts, num_accepted)
        if self.is_hopeless and not was_hopeless:
            log.warning(HOPELESS)
        if self._kind == LOOKUP:
            self._hits = self._hits + 1 if num_accepted == num_drafts else 0
            self._looked_up.append((1 + num_accepted, seconds))
            if self.num_draft_tokens is None and not self._lookup_pays():
                self._pause[LOOKUP] = PAUSE_TOKENS
                self._looked_up.clear()
        elif self._kind == MTP:
            for depth in range(min(num_accepted + 1, num_drafts)):
                known = self._acceptance[depth]
                self._acceptance[depth] = known + NEW_SHARE * ((depth < num_accepted) - known)

    @property
    def is_hopeless(self) -> bool:
        """Whether the MTP layer is hardly ever right: its weights are wrong."""
        drafted, accepted = self.stats.first_drafts
        return drafted >= HOPELESS_AFTER and accepted < HOPELESS_SHARE * drafted

    def _look_up(self, ids: Sequence[int], token: mx.array, most: int) -> list[int]:
        """What followed the last place where the text had the same four tokens."""
        if len(ids) <= MATCHED_TOKENS or self._pause[LOOKUP]:
            return []
        number = self.num_draft_tokens or (
            MAX_DRAFTS if self._hits >= HITS_TO_TRUST else FIRST_LOOKUP_DRAFTS
        )
        text = self._as_array(ids)
        key = [*text[1 - MATCHED_TOKENS :], int(cast(int, token.item()))]
        # Where the first of the four may stand, so that something follows the fourth.
        places = len(text) - MATCHED_TOKENS
        matches = np.ones(places, dtype=bool)
        for i, wanted in enumerate(key):
            matches &= text[i : i + places] == wanted
        found = np.flatnonzero(matches)
        if not len(found):
            return []
        start = int(found[-1]) + MATCHED_TOKENS
        return [int(i) for i in text[start : start + min(number, most)] if i >= 0]

    def _as_array(self, ids: Sequence[int]) -> np.ndarray:
        """The ids, of which only the new ones are copied where a text goes on."""
        known = self._num_known
        if not (0 < known <= len(ids) and ids[known - 1] == self._text[known - 1]):
            known = 0
        if len(ids) > len(self._text):
            grown = np.zeros(len(ids) + len(ids) // 4 + 1024, dtype=np.int64)
            grown[:known] = self._text[:known]
            self._text = grown
        self._text[known : len(ids)] = ids[known:]
        self._num_known = len(ids)
        return self._text[: len(ids)]

    def _best_number(self) -> int:
        """How many drafts of the MTP layer give the most tokens a second; 0 where none pays."""
        if self.num_draft_tokens is not None:
            return self.num_draft_tokens
        if self.is_hopeless or self._pause[MTP]:
            return 0
        plain = self._seconds["", 0]
        # Two plain passes first: the first one compiles.
        if len(plain) < 2:
            return 0
        rates = [1 / min(plain)]
        expected, chance = 1.0, 1.0
        for number in range(1, MAX_DRAFTS + 1):
            chance *= self._acceptance[number - 1]
            expected += chance
            passes = self._seconds[MTP, number]
            if len(passes) < 2:
                # Not measured yet: worth a try while the depth before it paid.
                if number == 1 or (rates[-1] >= rates[0] and chance > 0.3):
                    return number
                break
            rates.append(expected / min(passes))
        best = max(range(len(rates)), key=rates.__getitem__)
        if best == 0:
            self._pause[MTP] = PAUSE_TOKENS
        return best

    def _lookup_pays(self) -> bool:
        """Whether its last passes gave more tokens a second than plain ones."""
        plain = self._seconds["", 0]
        if len(plain) < 2 or len(self._looked_up) < REMEMBERED_PASSES:
            return True
        tokens, seconds = (sum(column) for column in zip(*self._looked_up, strict=True))
        return tokens / seconds >= 1 / min(plain)


class DraftStats:
    """Counts of one chat or call: passes, and drafts by depth."""

    def __init__(self) -> None:
        self.num_passes = 0
        self.num_tokens = 0
        self.drafted: dict[str, list[int]] = {}
        self.accepted: dict[str, list[int]] = {}

    def count(self, kind: str, num_drafts: int, num_accepted: int) -> None:
        """One pass and what came of it."""
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
        """Of the MTP layer: drafted, accepted."""
        return self.drafted.get(MTP, [0])[0], self.accepted.get(MTP, [0])[0]

    @property
    def tokens_per_pass(self) -> float:
        """1.0 where nothing was drafted."""
        return self.num_tokens / self.num_passes if self.num_passes else 1.0

    def acceptance(self, kind: str) -> list[float]:
        """By depth, given that the drafts before were accepted; as far as any were made."""
        pairs = zip(self.drafted.get(kind, []), self.accepted.get(kind, []), strict=True)
        return [accepted / drafted for drafted, accepted in pairs if drafted]
