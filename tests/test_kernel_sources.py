"""What MLX and Metal demand of the text of a kernel, without a GPU."""

import importlib
import os
from pathlib import Path

import mlx.core as mx
import pytest

import qwen35_mlx.kernels as kernels
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.kernels import expert_step, metal, projection

FOLDER = Path(kernels.__file__).parent


def test_a_source_is_ascii_since_mlx_makes_an_ascii_string_of_it():
    files = sorted(FOLDER.glob("*.metal"))
    assert len(files) >= 10
    for file in files:
        assert file.read_bytes().isascii(), file.name
    generated = [projection._signature(n)[2] for n in range(1, 6)]
    for text in [*generated, expert_step.ROUTED_GATE_UP]:
        assert text.isascii()


def test_a_kernel_of_more_than_31_buffers_is_refused_by_name():
    inputs, outputs, generated = projection._signature(6)
    with pytest.raises(Qwen35Error, match="projection_6 takes too many arrays") as error:
        metal.kernel("projection", inputs, outputs, label="projection_6", generated=generated)
    assert "got: 35 buffers" in str(error.value)
    assert "expected: at most 31" in str(error.value)


@pytest.mark.skipif(not metal.OPTIONS, reason="an MLX that cannot be told")
def test_every_kernel_is_compiled_in_safe_mode(monkeypatch):
    options = []
    monkeypatch.setattr(mx.fast, "metal_kernel", lambda **o: options.append(o))
    metal.clear()
    metal.kernel("router", ("logits",), ("indices",))
    metal.clear()
    assert options[0]["compile_options"] == {"math_mode": "safe"}


@pytest.mark.parametrize(("before", "after"), [(None, "0"), ("1", "1")])
def test_float32_products_keep_their_digits_unless_the_user_wants_speed(monkeypatch, before, after):
    monkeypatch.delenv("MLX_ENABLE_TF32")
    if before is not None:
        monkeypatch.setenv("MLX_ENABLE_TF32", before)
    importlib.reload(kernels)
    assert os.environ["MLX_ENABLE_TF32"] == after
