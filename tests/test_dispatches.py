"""What a Mac launches before anything was checked on it, against mlx-lm's own code."""

import pytest
from dispatches import default_model, family_text, mlx_lm_model, of_a_step, our_model, per_kind
from everyday import everyday

from qwen35_mlx.kernels import tiers

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.mark.parametrize("name", ["397B-A17B", "35B-A3B", "0.8B"])
@pytest.mark.parametrize("num_tokens", everyday([1, 5, 2048], 0, 2))
def test_auto_without_a_check_is_not_slower_than_mlx_lm_in_dispatches(name, num_tokens):
    text = family_text(name)
    ours, theirs = (
        of_a_step(per_kind(make, text, num_tokens), text) for make in (default_model, mlx_lm_model)
    )
    assert ours <= theirs
    # mlx-lm's own count, so that a change of the rule is seen.
    assert theirs > 500


def test_ops_alone_would_launch_far_more():
    """The rule tells tiers apart."""
    text = family_text("0.8B")

    def portable(text, layer_types):
        return our_model(text, layer_types, tiers.PORTABLE)

    assert of_a_step(per_kind(portable, text), text) > 1.5 * of_a_step(
        per_kind(default_model, text), text
    )
