"""tools/dwq.py: mlx-lm's DWQ runs on this package's model and lowers the KL that it minimises."""

import copy
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoints import text_config

from qwen35_mlx.config import FULL, LINEAR, ModelConfig
from qwen35_mlx.model.language import Model
from qwen35_mlx.quant.divergence import kl_divergence

pytest.importorskip("mlx_lm")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from dwq import Targets, differentiable, epochs

GROUP_SIZE = 32


def model_and_quantized(moe: bool) -> tuple[Model, Model]:
    mx.random.seed(0)
    text = text_config(moe, tied=not moe)
    text |= dict(num_hidden_layers=2, layer_types=[LINEAR, FULL])
    model = Model(ModelConfig.from_hf(text))
    quantized = copy.deepcopy(model)

    def has_whole_groups(path: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % GROUP_SIZE == 0

    nn.quantize(quantized, GROUP_SIZE, 3, class_predicate=has_whole_groups)
    return differentiable(model), quantized


def texts(num: int, length: int, vocab_size: int) -> mx.array:
    return mx.array(np.random.default_rng(0).integers(1, vocab_size, (num, length)))


@pytest.mark.parametrize("moe", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_dequantized_products_give_the_logits_of_quantized_ones(moe):
    _, quantized = model_and_quantized(moe)
    ids = texts(2, 9, quantized.config.vocab_size)
    expected = quantized(ids)
    mx.eval(expected)
    assert mx.allclose(differentiable(quantized)(ids), expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("moe", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_dwq_lowers_the_kl_and_keeps_the_codes(moe):
    model, quantized = model_and_quantized(moe)
    ids = texts(8, 17, model.config.vocab_size)

    def kl() -> float:
        return kl_divergence(model(ids), quantized(ids)).mean().item()

    student = differentiable(quantized)
    codes = {n: m.weight for n, m in student.named_modules() if hasattr(m, "bits")}
    before, after = kl(), []
    for _ in epochs(student, Targets(model), ids, rate=1e-3, num_epochs=2):
        after.append(kl())
    assert after[-1] < after[0] < before
    for name, module in student.named_modules():
        assert name not in codes or mx.array_equal(module.weight, codes[name]), name


def test_targets_are_computed_once_a_batch_in_any_order():
    calls = []

    def reference(batch: mx.array) -> mx.array:
        calls.append(batch.tolist())
        return batch * 2

    targets = Targets(reference)
    one, other = mx.array([[1, 2]]), mx.array([[3, 4]])
    found = [targets(batch, place, "train") for place, batch in enumerate((one, other, one))]
    assert [f.tolist() for f in found] == [[[2, 4]], [[6, 8]], [[2, 4]]]
    assert len(calls) == 2
