"""Bytes that a round of drafting moves at the shapes of the largest model, from plans of convert.

A round makes K drafts and reads K + 1 tokens in one pass. It reads all weights once, those of
experts once for each distinct expert, and reads and writes the states of linear layers once. The
traffic of the state is counted in the emulator, from the source of the kernel. Ends with one JSON
line.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from metal.emulator import Launch, emulated

from qwen35_mlx.checkpoint.names import is_mtp
from qwen35_mlx.config import LINEAR, ModelConfig
from qwen35_mlx.convert.fit import fit
from qwen35_mlx.convert.mac_models import activation_bytes
from qwen35_mlx.convert.plan import Plan
from qwen35_mlx.convert.report import family_source
from qwen35_mlx.kernels import metal
from qwen35_mlx.kernels.delta_step import (
    DeltaInputs,
    DeltaParameters,
    Tape,
    delta_step_kernel,
    kept_delta_step,
)
from qwen35_mlx.kernels.tiers import with_kernels
from qwen35_mlx.memory import kv_bytes, read_share, state_bytes

MODEL = "Qwen3.5-397B-A17B"
BITS_PER_WEIGHT = (3.5, 4.5)
NUM_DRAFTS = (0, 1, 2, 3, 4)
CONTEXT = 4096
# Distinct experts of T tokens, 10 of 512 each, if consecutive tokens share a quarter of theirs:
# measured for two tokens, extrapolated for more.
OVERLAPPING = (10, 17.5, 24.1, 30.2, 35.9)


class Round(NamedTuple):
    """Bytes of one round, by kind."""

    num_drafts: int
    weights: int
    experts: int  # in the model of overlapping experts
    uniform_experts: int  # drawn by each token independently
    state: int
    tape: int
    keys_and_values: int
    drafts: int

    @property
    def total(self) -> int:
        """With overlapping experts."""
        *_, state, tape, kv, drafts = self
        return self.weights + self.experts + state + tape + kv + drafts

    @property
    def uniform_total(self) -> int:
        """With experts drawn by each token independently."""
        return self.total - self.experts + self.uniform_experts


def uniform_experts(config: ModelConfig, num_tokens: int) -> float:
    """Average number of distinct experts of tokens that draw theirs independently."""
    share = config.num_experts_per_tok / config.num_experts
    return config.num_experts * (1 - (1 - share) ** num_tokens)


def round_of(plan: Plan, num_drafts: int, context: int = CONTEXT) -> Round:
    """The bytes of a round; with no drafts, of a plain step."""
    config, num_tokens = plan.config, num_drafts + 1
    item_bytes = activation_bytes(plan)
    weights, an_expert = 0.0, 0.0
    for entry in plan.text_entries:
        if ".switch_mlp." in entry.module:
            an_expert += entry.output_bytes / config.num_experts
        elif read_share(config, entry.module) < 1:
            weights += entry.output_bytes * read_share(config, entry.module) * num_tokens
        else:
            weights += entry.output_bytes
    # Projections of the round before, from which the kernel replays the accepted tokens.
    per_token = (config.conv_dim + 2 * config.linear_num_value_heads) * item_bytes
    tape = per_token * config.layer_types.count(LINEAR) * num_tokens if num_drafts else 0
    return Round(
        num_drafts,
        int(weights),
        int(an_expert * OVERLAPPING[num_drafts]),
        int(an_expert * uniform_experts(config, num_tokens)),
        2 * state_bytes(config, item_bytes),
        tape,
        kv_bytes(config, context, item_bytes),
        num_drafts * draft_bytes(plan),
    )


def draft_bytes(plan: Plan) -> int:
    """Bytes of one draft: the MTP layer with the experts of one token, and the head."""
    config = plan.config
    layer = 0.0
    for entry in plan.entries:
        if is_mtp(entry.module):
            is_experts = ".switch_mlp." in entry.module
            share = config.num_experts_per_tok / config.num_experts if is_experts else 1
            layer += entry.output_bytes * share
    head = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    head_bytes = sum(e.output_bytes for e in plan.text_entries if e.module.endswith(head))
    return int(layer) + head_bytes


def round_bytes() -> dict[str, list[dict[str, float]]]:
    """Print the table; bits per weight -> rounds of K = 0..4."""
    print(f"{MODEL}, {CONTEXT} tokens of context; GB a round (experts and totals: overlapping /")
    print("uniform), cost against a plain step")
    print("bits  K  weights      experts  state   tape     KV  drafts        total         cost")
    table: dict[str, list[dict[str, float]]] = {}
    for bits in BITS_PER_WEIGHT:
        plan = fit(family_source(MODEL), bits_per_weight=bits).plan
        rounds = [round_of(plan, k) for k in NUM_DRAFTS]
        plain = rounds[0].total
        for r in rounds:
            gb = [n / 1e9 for n in r[1:]]
            print(
                f"{bits:4} {r.num_drafts:2} {gb[0]:8.2f} {gb[1]:5.2f} / {gb[2]:5.2f} {gb[3]:6.3f}"
                f" {gb[4]:6.4f} {gb[5]:6.3f} {gb[6]:7.2f} {r.total / 1e9:5.2f} /"
                f" {r.uniform_total / 1e9:5.2f}  {r.total / plain:4.2f} /"
                f" {r.uniform_total / plain:4.2f}"
            )
        table[str(bits)] = [
            r._asdict()
            | {
                "total": r.total,
                "cost": round(r.total / plain, 3),
                "uniform_cost": round(r.uniform_total / plain, 3),
            }
            for r in rounds
        ]
    return table


def state_traffic(launch: Launch) -> tuple[int, int]:
    """Bytes that a launch moves: of recurrent and convolution states, and of the tape."""
    traffic = launch.traffic
    # Heads of a group read the same channels of q and k; all but the first read them from a cache.
    states = traffic["state"].read_bytes + traffic["conv_state"].unique_read_bytes
    states += sum(traffic[n].written_bytes for n in ("new_state", "new_conv_state"))
    tape = sum(traffic[n].unique_read_bytes for n in ("tape_qkv", "tape_b", "tape_a"))
    return states, tape


def state_bytes_of_a_round(num_drafts: int = 4) -> dict[str, Any]:
    """Traffic of the delta step in rounds and in a plain step, for one key head of the model.

    `state_bytes_over_plain` is the largest ratio, over every number of accepted tokens.
    """
    config = ModelConfig.from_hf(family_source(MODEL).config)
    group = config.linear_num_value_heads // config.linear_num_key_heads
    key_dim, value_dim = config.linear_key_head_dim, config.linear_value_head_dim
    channels, taps = 2 * key_dim + group * value_dim, config.linear_conv_kernel_dim

    def draw(*shape: int, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
        return mx.random.normal(shape).astype(dtype)

    parameters = DeltaParameters(
        draw(channels, taps, 1), draw(group), draw(group), draw(value_dim), config.rms_norm_eps
    )
    states = draw(1, taps - 1, channels), draw(1, group, value_dim, key_dim, dtype=mx.float32)

    def tokens(count: int) -> list[mx.array]:
        return [draw(1, count, n) for n in (channels, group * value_dim, group, group)]

    kernels = with_kernels(["delta_step"])
    with emulated() as log:
        metal.clear()
        delta_step_kernel(DeltaInputs(*tokens(1), *states, parameters))
        _, tape = kept_delta_step(
            DeltaInputs(*tokens(num_drafts + 1), *states, parameters), kernels
        )
        assert isinstance(tape, Tape)
        for accepted in range(num_drafts + 2):
            tape = tape._replace(num_accepted=accepted)
            inputs = DeltaInputs(*tokens(num_drafts + 1), *tape[:2], parameters)
            kept_delta_step(inputs, kernels, tape)
    metal.clear()
    (plain, _), (first, _), *rounds = map(state_traffic, log.launches)
    layers = config.layer_types.count(LINEAR) * config.linear_num_key_heads
    return {
        "plain_state_bytes": plain * layers,
        "round_state_bytes": [states * layers for states, _ in rounds],
        "tape_bytes": [tape * layers for _, tape in rounds],
        "state_bytes_over_plain": max(first, *(states for states, _ in rounds)) / plain,
    }


def main() -> None:
    """Print the table and the JSON line."""
    table = round_bytes()
    states = state_bytes_of_a_round()
    tape = max(states["tape_bytes"])
    print(
        f"States of a round over those of a plain step: {states['state_bytes_over_plain']:.3f}"
        f" ({states['plain_state_bytes'] / 1e6:.1f} MB); tape: {tape / 1e6:.2f} MB are read again"
    )
    print(json.dumps({"rounds": table, **states}))


if __name__ == "__main__":
    main()
