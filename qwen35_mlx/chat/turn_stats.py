"""Statistics of one turn of a conversation."""

from dataclasses import dataclass


@dataclass
class TurnStats:
    """Statistics of one turn; `prefilled_tokens` excludes tokens that were in the cache."""

    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    prefill_tps: float = 0.0
    generation_tokens: int = 0
    decode_tps: float = 0.0
    peak_memory_gb: float = 0.0
    # "stop", "length", "loop", or None if the caller stopped it.
    finish_reason: str | None = None
    thought_tokens: int = 0
    # Prefilled in the background before the turn began.
    read_ahead_tokens: int = 0
    # How often a loop raised the presence penalty.
    loops: int = 0
    # Accepted drafts: tokens of the answer without a pass of their own.
    draft_tokens: int = 0
    # Pictures and videos that went through the vision tower.
    pictures_encoded: int = 0
