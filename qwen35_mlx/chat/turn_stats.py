"""What a turn of a conversation cost."""

from dataclasses import dataclass


@dataclass
class TurnStats:
    """What the last turn cost; `prefilled_tokens` leaves out what the cache already held."""

    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    prefill_tps: float = 0.0
    generation_tokens: int = 0
    decode_tps: float = 0.0
    peak_memory_gb: float = 0.0
    # "stop", "length", "loop", or None if it was stopped from outside
    finish_reason: str | None = None
    thought_tokens: int = 0
    # Read while nobody waited, before the turn began.
    read_ahead_tokens: int = 0
    # How often a loop was answered with a higher presence penalty.
    loops: int = 0
    # Tokens of the answer that were drafted, and cost no pass of their own.
    draft_tokens: int = 0
    # Pictures and videos that went through the vision tower.
    pictures_encoded: int = 0
