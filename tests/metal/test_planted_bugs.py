"""Wrong lines in the decode kernels, each of which the tests beside this file have to find."""

import pytest
from metal import test_decode_attention as attention
from metal import test_decode_kernels as kernels
from metal.emulator import emulated
from metal.errors import EmulatorError
from metal.row_invariance import cases, different_rows

from qwen35_mlx.kernels import metal

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
# File, line, what it is made, and the specialisation of a test that meets it.
BUGS = [
    ("common", "150 + place - from", "151 + place - from", "projection", 2),
    ("common", "CONVERT ? 16 : count", "16", "expert_down", 8),
    ("common", "i * BITS % 16", "i * BITS % 32", "projection", 3),
    ("common", "BITS % 2 == 0 ? 4 : 2", "4", "projection", 6),
    ("common", "uint(chunk) / (GROUP / 32)", "uint(chunk)", "projection", 2),
    ("common", "metal::min(r * step, last)", "r * step", "projection", 2),
    ("common", "|| t < num_tokens", "|| t <= num_tokens", "projection", 0),
    ("common", "b.multiply(v, t)", "b.multiply(v, 0)", "expert_gate_up", 2),
    ("common", "float4(values[0], values[1]", "float4(values[1], values[1]", "delta_step", 10),
    ("projection", ": sum * factor", ": sum", "projection", 3),
    ("common", "/ float(in) + eps", "/ float(in)", "projection", 3),
    ("projection", "float(residual[at])", "float(residual[to])", "projection", 0),
    ("projection", "out - 1 - row", "out - 1", "projection", 2),
    ("projection", "to >= out", "false", "projection", 2),
    ("expert_gate_up", "size_t(expert) * out", "size_t(expert)", "expert_gate_up", 2),
    ("expert_gate_up", "(up.sums[r][t]) * factor", "(up.sums[r][t])", "expert_gate_up", 2),
    ("expert_gate_up", "silu(g) * u", "silu(u) * g", "expert_gate_up", 2),
    ("expert_down", "if (t == token)", "if (t != token)", "expert_down", 2),
    ("expert_down", "scores[pair]", "scores[token]", "expert_down", 2),
    ("expert_down", "size_t(indices[pair]) * width", "size_t(0) * width", "expert_down", 2),
    ("delta_step", "state_at + r * DK, s[r]", "state_at, s[r]", "delta_step", 4),
    ("delta_step", "k[row - num_tokens]", "k[0]", "delta_step", 4),
    ("delta_step", BARRIER, "", "delta_step", 4),
    ("qk_norm_rope", "-(values", "(values", "qk_norm_rope", 2),
    ("qk_norm_rope", "t) * D", "t + 1) * D", "qk_norm_rope", 2),
    ("decode_attention", "simdgroup * 8 + own_row;\n#", "own_row;\n#", "decode_attention", 0),
    ("decode_attention", "place / 2 * 8", "place / 2 * 4", "decode_attention", 3),
    ("decode_attention", "key < end, x", "true, x", "decode_attention", 3),
    ("decode_attention", "+ 1) - tile", ") - tile", "decode_attention", 3),
    ("decode_attention", "place / GROUP * token", "place % GROUP * token", "decode_attention", 6),
    ("decode_attention", "k_strides[1]", "v_strides[2]", "decode_attention", 6),
    ("decode_attention", "* scale", "", "decode_attention", 3),
    (
        "decode_attention",
        "thread_elements()[0] * factor",
        "thread_elements()[0]",
        "decode_attention",
        3,
    ),
    ("decode_attention", "metal::fma(totals[n], factor, ", "(", "decode_attention", 3),
    ("decode_attention", f"}}\n  {BARRIER}\n#pragma", "}\n#pragma", "decode_attention", 3),
    ("decode_attention", f"}}\n  {BARRIER}\n\n#pragma", "}\n#pragma", "decode_attention", 3),
    ("decode_attention", f"}}\n  {BARRIER}\n\n  //", "}\n  //", "decode_attention", 3),
    ("decode_attention", f"\n{BARRIER}\n\n// Of", "\n// Of", "decode_attention", 0),
    ("decode_attention", "part % 64 == 0", "part == 0", "packed_attention", 2),
    ("decode_attention", "+ simdgroup / 2]", "+ simdgroup]", "packed_attention", 2),
    ("decode_attention", "+ simdgroup / 2]", "]", "packed_attention", 2),
    ("decode_attention", "own_group % GROUPS]),", "0]),", "packed_attention", 2),
    ("decode_attention", "4 : 1;\n", "1 : 1;\n", "packed_attention", 2),
    ("decode_attention", "group_key < end)", "true)", "packed_attention", 2),
    ("decode_attention", "k_biases_strides[2]", "k_strides[2]", "packed_attention", 2),
    ("decode_attention", "group[0], group[1]", "group[0], 0.0f", "packed_attention", 2),
    ("decode_attention_combine", "* num_rows + row;", "* num_rows;", "decode_attention", 6),
    (
        "decode_attention_combine",
        "* num_tokens + token) * D",
        "* num_tokens) * D",
        "decode_attention",
        6,
    ),
    (
        "decode_attention_combine",
        "divisor += part_totals[i]",
        "divisor += 0",
        "decode_attention",
        3,
    ),
    (
        "decode_attention_combine",
        "threadgroup_barrier(mem_flags::mem_threadgroup);",
        "",
        "decode_attention",
        3,
    ),
    ("output_gate", "* 2 * D + D + d", "* 2 * D + d", "output_gate", 2),
]


@pytest.fixture
def plant(monkeypatch):
    """Puts another text in the place of one in a file."""
    read = metal._read.__wrapped__

    def change(file: str, old: str, new: str) -> None:
        def changed(name: str) -> tuple[str, str]:
            functions, body = read(name)
            if name != file:
                return functions, body
            assert old in functions + body
            return functions.replace(old, new), body.replace(old, new)

        monkeypatch.setattr(metal, "_read", changed)

    with emulated():
        metal.clear()
        yield change
    metal.clear()


@pytest.mark.slow
@pytest.mark.parametrize(("file", "old", "new", "test", "number"), BUGS)
def test_a_wrong_line_is_found(plant, monkeypatch, file, old, new, test, number):
    plant(file, old, new)
    extra = [monkeypatch] if test in ("projection", "expert_gate_up", "expert_down") else []
    with pytest.raises((AssertionError, EmulatorError)):
        module = attention if "attention" in test else kernels
        getattr(module, f"test_{test}")(number, 6, *extra)


@pytest.mark.slow
def test_keys_between_blocks_are_found(plant):
    plant("common", "end *= 4, block.size *= 2", "end *= 4")
    with pytest.raises((AssertionError, EmulatorError)):
        attention.test_blocks_that_grow_with_their_distance(5000)


@pytest.mark.slow
def test_an_order_of_sums_that_depends_on_the_number_of_rows_is_found(plant):
    order = "TOKENS > 2 ? 7 - i : i"
    plant("common", "weights[r][i], x[i]", f"weights[r][{order}], x[{order}]")
    _, run, inputs = next(cases(4))
    assert different_rows(run, inputs) == len(inputs[0]) > 2
