"""Passes of delta_step that are taken back in part, against the kernel on single tokens."""

from collections.abc import Iterator, Sequence

import mlx.core as mx
from metal.draw import Draw

from qwen35_mlx.kernels.delta_step import (
    DeltaInputs,
    DeltaParameters,
    Tape,
    delta_step_kernel,
    kept_delta_step,
)
from qwen35_mlx.kernels.tiers import with_kernels

KERNELS = with_kernels(["delta_step"])
Arrays = Sequence[mx.array]
# What was computed, and what single tokens give.
Pairs = Iterator[tuple[mx.array, mx.array]]


def one_by_one(tokens: Arrays, states: Arrays, parameters: DeltaParameters) -> list[mx.array]:
    """Output and states of the kernel called for each token alone, of one token or more."""
    outputs = []
    for t in range(tokens[0].shape[1]):
        token = [a[:, t : t + 1] for a in tokens]
        out, *states = delta_step_kernel(DeltaInputs(*token, *states, parameters))
        outputs.append(out)
    return [mx.concatenate(outputs, axis=1), *states]


def accepted_only(
    tokens: Arrays, states: Arrays, parameters: DeltaParameters, num_accepted: int
) -> Arrays:
    """The states after the first tokens."""
    if num_accepted == 0:
        return states
    return one_by_one([a[:, :num_accepted] for a in tokens], states, parameters)[1:]


def rounds(draw: Draw, most_tokens: int, batch: int = 1) -> Pairs:
    """Two kept passes and a plain one, each behind what was accepted of the one before."""

    def num_tokens() -> int:
        return draw.integer(most_tokens // 2 + 1, most_tokens)

    *tokens, conv_state, state, parameters, _ = draw.delta(batch, num_tokens())
    want: Arrays = (conv_state, state)
    given, tape = want, None
    for _ in range(2):
        out, made = kept_delta_step(DeltaInputs(*tokens, *given, parameters), KERNELS, tape)
        assert isinstance(made, Tape)
        yield out, one_by_one(tokens, want, parameters)[0]
        # What is written are the states before the tokens.
        given = made[:2]
        yield from zip(given, want, strict=True)
        num_accepted = draw.integer(0, tokens[0].shape[1])
        want = accepted_only(tokens, want, parameters, num_accepted)
        tape = made._replace(num_accepted=num_accepted)
        tokens = list(draw.delta(batch, num_tokens())[:4])
    assert tape is not None
    yield from zip(tape.states(), want, strict=True)
    results = delta_step_kernel(DeltaInputs(*tokens, *given, parameters), tape)
    yield from zip(results, one_by_one(tokens, want, parameters), strict=True)
