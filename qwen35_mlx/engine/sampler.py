"""From logits to the next token: penalties, temperature, top-k, top-p, min-p, in that order.

The order is that of transformers; biases of single tokens are added after the penalties.
"""

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from numbers import Integral
from typing import Any, NamedTuple, cast

import mlx.core as mx

from ..errors import Qwen35Error
from ..sampling import SamplingParams

MAX_SEED = 2**63 - 1
KEYS_A_BLOCK = 64
# Dividing logits by less than this would overflow float32.
GREEDY_BELOW = 1e-5
# Active parameters by name; as arrays, so that compiled kernels do not depend on the values.
Scalars = dict[str, mx.array]
Mask = mx.array | None


class Masks(NamedTuple):
    """Masks and counts for the logits, `[V]` or one row each `[T, V]`; None: no effect."""

    in_text: Mask = None
    # Number of occurrences.
    in_answer: Mask = None
    is_banned: Mask = None
    bias: Mask = None


NO_MASKS = Masks()


class Sampler:
    """Samples tokens with noise that depends only on the seed and the position in the sequence.

    So the text does not depend on how many tokens are sampled at once. Counts for the penalties
    stay on the device.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: mx.array,
        seed: int | None = None,
        banned: Sequence[int] | mx.array = (),
        bias: Mapping[int, float] | None = None,
    ):
        """prompt: ids `[T]`; the repetition penalty counts them, the other penalties do not.

        Tokens of `banned`, ids or a mask `[V]`, are never sampled. `bias` is added to logits.
        """
        if seed is not None and not (isinstance(seed, Integral) and 0 <= seed <= MAX_SEED):
            raise Qwen35Error("seed is not usable", got=repr(seed), expected=f"0 to {MAX_SEED}")
        self.params = params
        key = mx.random.key(secrets.randbits(63) if seed is None else int(seed))
        # Split once, so that neighbouring seeds do not share keys at neighbouring positions.
        first, second = cast(list[int], mx.random.split(key, 1)[0].tolist())
        self._key = first, second
        self._prompt = prompt
        mask = banned if isinstance(banned, mx.array) else None
        self._banned = () if isinstance(banned, mx.array) else tuple(banned)
        self._is_banned: mx.array | None = mask
        self._bias = dict(bias or {})
        self._bias_row: mx.array | None = None
        self._in_text: mx.array | None = None
        self._in_answer: mx.array | None = None
        self._answered: mx.array | None = None

    def penalise_repeats(self, penalty: float, answered: Sequence[int]) -> None:
        """Set the presence penalty from here on; `answered`: the ids of the answer so far."""
        self.params = self.params.updated(presence_penalty=penalty)
        self._answered = mx.array(list(answered), dtype=mx.int32)
        self._in_answer = None

    def __call__(
        self,
        logits: mx.array,
        place: int,
        drafts: mx.array | None = None,
        forbidden: mx.array | None = None,
    ) -> mx.array:
        """logits `[T, V]` -> lazy tokens `[T]` at positions `place`, `place + 1`, ….

        Row r is sampled as if the first r of `drafts` `[T - 1]` were accepted. The mask `forbidden`
        `[V]` replaces the mask of banned tokens.
        """
        masks = self._masks(logits.shape[-1], drafts)
        if forbidden is not None:
            masks = masks._replace(is_banned=forbidden)
        if self.params.temperature < GREEDY_BELOW:
            return mx.argmax(penalise(logits, scalars(self.params), masks), axis=-1)
        return draw(logits, self.params, keys_at(self._key, place, len(logits)), masks)

    def accept(self, tokens: mx.array) -> None:
        """Count `tokens` `[N]`, sampled or forced, as part of the answer."""
        if self._in_answer is not None:
            self._in_answer = self._in_answer.at[tokens].add(1)
        if self._in_text is not None:
            self._in_text[tokens] = True

    def _masks(self, vocab: int, drafts: mx.array | None = None) -> Masks:
        """The active masks; each of T rows counts the drafts before it."""
        repetition = self.params.repetition_penalty != 1.0
        counts = self.params.presence_penalty != 0.0 or self.params.frequency_penalty != 0.0
        if repetition and self._in_text is None:
            self._in_text = mx.zeros(vocab, dtype=mx.bool_)
            self._in_text[self._prompt] = True
        if counts and self._in_answer is None:
            self._in_answer = mx.zeros(vocab)
            if self._answered is not None:
                self._in_answer = self._in_answer.at[self._answered].add(1)
        if self._banned and self._is_banned is None:
            self._is_banned = mx.zeros(vocab, dtype=mx.bool_)
            self._is_banned[mx.array(self._banned)] = True
        if self._bias and self._bias_row is None:
            self._bias_row = mx.zeros(vocab)
            self._bias_row[mx.array(list(self._bias))] = mx.array(list(self._bias.values()))
        return Masks(
            _with_drafts(self._in_text, drafts) if repetition else None,
            _with_drafts(self._in_answer, drafts) if counts else None,
            self._is_banned,
            self._bias_row,
        )

    @property
    def is_plain(self) -> bool:
        """Whether only the mask of banned tokens changes the logits."""
        params = self.params
        no_counts = params.presence_penalty == 0.0 and params.frequency_penalty == 0.0
        return not self._bias and not self._banned and no_counts and params.repetition_penalty == 1


def draw_rows(
    samplers: Sequence[Sampler],
    logits: mx.array,
    places: Sequence[int],
    forbidden: Sequence[mx.array | None],
) -> list[mx.array]:
    """A token `[1]` for each row of logits `[B, V]`, the same as from the row's sampler alone.

    Rows without penalties, biases or constraints are sampled together.
    """
    tokens: list[mx.array | None] = [None] * len(samplers)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, sampler in enumerate(samplers):
        if sampler.is_plain and forbidden[i] is None:
            params = sampler.params
            shape = tuple(scalars(params)), params.top_k, params.temperature < GREEDY_BELOW
            groups.setdefault((*shape, id(sampler._is_banned)), []).append(i)
        else:
            tokens[i] = sampler(logits[i : i + 1], places[i], forbidden=forbidden[i])
    for rows in groups.values():
        first = samplers[rows[0]]
        masks = Masks(is_banned=first._is_banned)
        chosen = logits if len(rows) == len(logits) else logits[mx.array(rows)]
        if first.params.temperature < GREEDY_BELOW:
            drawn = mx.argmax(penalise(chosen, {}, masks), axis=-1)
        else:
            keys = [keys_at(samplers[i]._key, places[i], 1) for i in rows]
            values = [scalars(samplers[i].params) for i in rows]
            columns = {
                name: mx.stack([value[name] for value in values])[:, None] for name in values[0]
            }
            top_k = _top_k(first.params, logits.shape[-1])
            key_rows = mx.concatenate(keys)
            drawn = _draw(chosen, key_rows, columns, top_k, *masks)
        for place, row in enumerate(rows):
            tokens[row] = drawn[place : place + 1]
    return cast(list[mx.array], tokens)


def _with_drafts(seen: Mask, drafts: mx.array | None) -> Mask:
    """`[V]` -> `[T, V]`: row r also counts the first r of T - 1 drafts."""
    if seen is None or drafts is None:
        return seen
    rows = [seen]
    for token in drafts:
        # A copy, because an update in place would change the rows before it.
        is_count = seen.dtype != mx.bool_
        counted = rows[-1][token[None]] + 1 if is_count else mx.array(True)
        rows.append(mx.put_along_axis(rows[-1], token[None], counted, axis=0))
    return mx.stack(rows)


@lru_cache(maxsize=8)
def _block(key: tuple[int, int], number: int) -> mx.array:
    """A block of keys `[64, 2]`, made at once to save an operation per token."""
    return mx.random.split(mx.array([key[0], (key[1] + number) % 2**32], mx.uint32), KEYS_A_BLOCK)


def keys_at(key: tuple[int, int], place: int, num_tokens: int) -> mx.array:
    """Keys `[N, 2]` for N positions of a sequence; a position always has the same key."""
    first, start = divmod(place, KEYS_A_BLOCK)
    end = start + num_tokens
    blocks = [_block(key, first + i) for i in range(-(-end // KEYS_A_BLOCK))]
    return (blocks[0] if len(blocks) == 1 else mx.concatenate(blocks))[start:end]


def draw(
    logits: mx.array, params: SamplingParams, keys: mx.array, masks: Masks = NO_MASKS
) -> mx.array:
    """Sample tokens `[B]` from logits `[B, V]` at a temperature above 0; rows are independent.

    keys: `[B, 2]`, from a split.
    """
    return _draw(logits, keys, scalars(params), _top_k(params, logits.shape[-1]), *masks)


def _top_k(params: SamplingParams, vocab: int) -> int:
    return int(params.top_k) if params.top_k < vocab else 0


@lru_cache(maxsize=64)
def scalars(params: SamplingParams) -> Scalars:
    """The active parameters; without top_k, which determines shapes."""
    off = {"top_p": 1.0, "min_p": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0}
    off["frequency_penalty"] = 0.0
    values = {name: getattr(params, name) for name in ("temperature", *off)}
    return {name: mx.array(v, mx.float32) for name, v in values.items() if v != off.get(name)}


def penalise(logits: mx.array, values: Scalars, masks: Masks) -> mx.array:
    """Apply penalties, bias and bans to logits `[B, V]`; float32 if any of them is active."""
    in_text, in_answer, is_banned, bias = masks
    if in_text is not None:
        penalty, logits = values["repetition_penalty"], logits.astype(mx.float32)
        weaker = mx.where(logits > 0, logits / penalty, logits * penalty)
        logits = mx.where(in_text, weaker, logits)
    if in_answer is not None:
        logits = logits.astype(mx.float32)
        if "presence_penalty" in values:
            logits = logits - values["presence_penalty"] * (in_answer > 0)
        if "frequency_penalty" in values:
            logits = logits - values["frequency_penalty"] * in_answer
    if bias is not None:
        logits = logits.astype(mx.float32) + bias
    if is_banned is not None:
        logits = mx.where(is_banned, -mx.inf, logits)
    return logits


# Retraced for new shapes and other active parameters, not for other values.
@mx.compile
def _draw(logits: mx.array, keys: mx.array, values: Scalars, top_k: int, *masks: Mask) -> mx.array:
    logits = penalise(logits, values, Masks(*masks)).astype(mx.float32)
    # Costs, because an ascending stable sort puts the likeliest first, and ties by id.
    costs = -logits / values["temperature"]
    if not top_k and "top_p" not in values:
        return _draw_unsorted(costs, keys, values)
    costs, ids = smallest(costs, top_k)
    # Probabilities relative to the likeliest token.
    weights = mx.exp(costs[:, :1] - costs)
    covered = mx.cumsum(weights, axis=-1)
    reached = covered
    if "top_p" in values:
        # The token that crosses top_p is kept.
        reached = mx.where(covered - weights < values["top_p"] * covered[:, -1:], covered, 0.0)
    if "min_p" in values:
        reached = mx.where(weights >= values["min_p"], reached, 0.0)
    # Kept tokens are a prefix; none after it is sampled, because uniform is less than 1.
    total = reached.max(axis=-1, keepdims=True)
    # A key from a split is random bits, and this one has no other use.
    uniform = (keys[:, :1] >> 8).astype(mx.float32) * 2**-24
    choice = (covered <= uniform * total).sum(axis=-1, keepdims=True)
    return ids(choice)[:, 0]


def _draw_unsorted(costs: mx.array, keys: mx.array, values: Scalars) -> mx.array:
    """Sample without top-k and top-p, by Gumbel noise."""
    if "min_p" in values:
        most = costs.min(axis=-1, keepdims=True) - mx.log(values["min_p"])
        costs = mx.where(costs <= most, costs, mx.inf)
    noise = mx.vmap(lambda key: mx.random.gumbel(shape=costs.shape[1:], key=key))(keys)
    return mx.argmin(costs - noise, axis=-1)


def smallest(costs: mx.array, k: int) -> tuple[mx.array, Callable[[mx.array], mx.array]]:
    """The k smallest costs `[B, k]` of `[B, V]` in order, and a function from places to ids.

    k = 0: all. Ties are in the order of ids, as in a stable sort. The vocabulary is not sorted: the
    k smallest costs are in the k blocks with the smallest minima.
    """
    rows, vocab = costs.shape
    # About as many blocks as candidates: MLX's Metal sort takes about 4,096 numbers per dispatch.
    width = 2 ** round(math.log2(vocab / max(k, 1)) / 2)
    num_blocks = -(-vocab // width)
    if k == 0 or num_blocks <= k:
        order = mx.argsort(costs, axis=-1)[:, : k or vocab]
        return mx.take_along_axis(costs, order, axis=-1), lambda places: mx.take_along_axis(
            order, places, axis=-1
        )
    if padding := num_blocks * width - vocab:
        costs = mx.pad(costs, [(0, 0), (0, padding)], constant_values=mx.inf)
    blocks = costs.reshape(rows, num_blocks, width)
    # Sorted by id again, so that the candidates are too.
    chosen = mx.sort(mx.argsort(blocks.min(axis=-1), axis=-1)[:, :k], axis=-1)
    costs = mx.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(rows, k * width)
    order = mx.argsort(costs, axis=-1)[:, :k]

    def ids(places: mx.array) -> mx.array:
        candidates = mx.take_along_axis(order, places, axis=-1)
        return mx.take_along_axis(chosen, candidates // width, axis=-1) * width + candidates % width

    return mx.take_along_axis(costs, order, axis=-1), ids
