"""The bytes of a round of drafting, against what is counted elsewhere."""

import itertools

import pytest
import speculation_bytes as bench

from qwen35_mlx.convert.mac_models import bytes_per_token
from qwen35_mlx.convert.plan import Plan, plan
from qwen35_mlx.convert.report import family_source
from qwen35_mlx.memory import state_bytes


@pytest.fixture(scope="module")
def planned() -> Plan:
    return plan(family_source(bench.MODEL), bits=4, group_size=64)


@pytest.mark.slow
def test_a_round_without_drafts_is_a_plain_step(planned: Plan):
    plain = bench.round_of(planned, 0)
    assert plain.total == plain.uniform_total
    assert plain.total == pytest.approx(bytes_per_token(planned, bench.CONTEXT), rel=1e-6)


def test_each_draft_adds_experts_that_no_token_before_it_took(planned: Plan):
    rounds = [bench.round_of(planned, k) for k in bench.NUM_DRAFTS]
    for one, other in itertools.pairwise(rounds):
        plain = rounds[0].experts
        assert 0 < other.experts - one.experts < other.uniform_experts - one.uniform_experts < plain
        assert other.drafts - one.drafts == bench.draft_bytes(planned)
        assert other.state == one.state


@pytest.mark.slow
def test_a_round_moves_the_states_as_often_as_a_plain_step(planned: Plan):
    counted = bench.state_bytes_of_a_round(num_drafts=1)
    assert counted["state_bytes_over_plain"] == 1
    assert counted["plain_state_bytes"] == 2 * state_bytes(planned.config)
    assert counted["tape_bytes"] == [k * counted["tape_bytes"][1] for k in range(3)]
    assert counted["tape_bytes"][2] == bench.round_of(planned, 1).tape
