"""The delta step behind a tape: tokens that a pass before it has read and of which some count."""

import pytest
from metal import test_decode_kernels as kernels
from metal.draw import Draw
from metal.emulator import Log, emulated
from metal.errors import EmulatorError
from metal.row_invariance import bits
from metal.tape import KERNELS, accepted_only, one_by_one, rounds

from qwen35_mlx.kernels import metal
from qwen35_mlx.kernels.delta_step import DeltaInputs, delta_step_kernel, kept_delta_step

# A specialisation's most tokens of a pass.
MOST_TOKENS = (1, 2, 8, 4, 8)
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
BUGS = [
    ("TAPE ? num_accepted : 0", "TAPE ? int(tape_qkv_shape[1]) : 0"),
    ("KEEP ? first : end", "end"),
    ("KEEP ? first : end", "first"),
    ("tape_qkv_shape[1] + t;", "num_tokens + t;"),
    ("tape_qkv_shape[1] + lane;", "num_tokens + lane;"),
    ("float(tape_qkv[at])", "float(qkv[at])"),
    ("float(tape_a[at])", "float(a[at])"),
    ("float(tape_b[at])", "float(tape_a[at])"),
    ("batch * num_tokens + t - first", "batch * num_tokens + t"),
    ("num_tokens + lane - first", "num_tokens + lane"),
    ("is_new) q[t - first]", "true) q[t < TOKENS ? t : 0]"),
    ("row < num_tokens + end", "row < 2 * num_tokens"),
    ("k[TAPE + TOKENS]", "k[TOKENS]"),
    ("lane < end)", "lane < num_tokens)"),
    ("if (t == written_at && (i", "if (t == first && (i"),
    ("if (t == written_at && has_share)", "if (t == first && has_share)"),
    ("&& is_new) o[t - first]", ") o[t < TOKENS ? t : 0]"),
    ("is_new ? q[t - first][lane", "is_new ? q[0][lane"),
    (f"{BARRIER}\n\nfor (int row", "for (int row"),
    (f"{BARRIER}\n\nfor (int t = 0", "for (int t = 0"),
]


@pytest.fixture
def log():
    with emulated() as log:
        metal.clear()
        yield log
    metal.clear()


def assert_exact(number: int, num_cases: int) -> None:
    draw = Draw(number)
    for _ in range(num_cases):
        for got, want in rounds(draw, MOST_TOKENS[number % len(MOST_TOKENS)], 1 + number % 2):
            assert got.dtype == want.dtype
            assert bits(got) == bits(want)


def test_a_pass_behind_a_tape_has_the_bits_of_single_tokens(log: Log):
    draw = Draw(2)
    *tokens, conv_state, state, parameters, _ = draw.delta(1, 3)
    out, tape = kept_delta_step(DeltaInputs(*tokens, conv_state, state, parameters), KERNELS)
    states = accepted_only(tokens, (conv_state, state), parameters, 2)
    tape = tape._replace(num_accepted=2)
    again = kept_delta_step(DeltaInputs(*tokens, *tape[:2], parameters), KERNELS, tape)
    got = [out, *tape[:2], again[0], *again[1][:2]]
    outputs = [one_by_one(tokens, s, parameters)[0] for s in ((conv_state, state), states)]
    want = [outputs[0], conv_state, state, outputs[1], *states]
    assert [bits(a) for a in got] == [bits(a) for a in want]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(25))
def test_rounds_have_the_bits_of_single_tokens(log: Log, number: int):
    assert_exact(number, 12)


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new"), BUGS)
def test_a_wrong_line_is_found(log: Log, monkeypatch: pytest.MonkeyPatch, old: str, new: str):
    read = metal._read.__wrapped__

    def changed(name: str) -> tuple[str, str]:
        functions, body = read(name)
        if name != "delta_step":
            return functions, body
        assert old in body
        return functions, body.replace(old, new)

    monkeypatch.setattr(metal, "_read", changed)
    with pytest.raises((AssertionError, EmulatorError)):
        assert_exact(23, 4)
        # Single tokens run the wrong line, too.
        kernels.test_delta_step(4, 6)


@pytest.mark.slow
def test_the_states_of_a_round_are_read_and_written_once(log: Log):
    draw = Draw(0)
    *tokens, conv_state, state, parameters, _ = draw.delta(1, 5)
    delta_step_kernel(DeltaInputs(*(a[:, :1] for a in tokens), conv_state, state, parameters))
    _, tape = kept_delta_step(DeltaInputs(*tokens, conv_state, state, parameters), KERNELS)
    for num_accepted in (0, 5):
        tape = tape._replace(num_accepted=num_accepted)
        kept_delta_step(DeltaInputs(*tokens, *tape[:2], parameters), KERNELS, tape)
    plain, *rest = (launch.traffic for launch in log.launches)
    assert len(rest) == 3
    for traffic in rest:
        assert traffic["state"] == plain["state"]
        assert traffic["new_state"] == plain["new_state"]
    assert plain["state"].read_bytes == plain["new_state"].written_bytes == state.nbytes
