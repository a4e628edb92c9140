"""One file format with mlx-lm: it loads what we write, we load what it writes, logits are equal."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from checkpoints import VOCAB, text_config, write_checkpoint
from everyday import everyday

import qwen35_mlx
from qwen35_mlx.config import ModelConfig, read_config
from qwen35_mlx.convert import convert

MAX_DIFFERENCE = 3e-4
NUM_PROMPT, NUM_DECODED = 67, 5
KINDS = pytest.mark.parametrize("moe", everyday([False, True], 1), ids=["dense", "moe"])


def write_source(folder: Path, moe: bool) -> None:
    """bfloat16, tied if dense, with the vision and MTP tensors that mlx-lm must step over."""
    # mlx-lm knows the pattern of the layers by its interval alone, and defaults to 4.
    text = text_config(moe, tied=not moe) | {"full_attention_interval": 2}
    write_checkpoint(
        folder,
        moe=moe,
        tied=not moe,
        num_shards=2,
        vision=True,
        mtp=True,
        tokenizer=True,
        config={"text_config": text},
    )


def assert_equal_logits(folder: Path) -> None:
    """Both programs on one folder, a prefill and then one token at a time."""
    ours, _ = qwen35_mlx.load(folder)
    theirs, _ = mlx_lm.load(str(folder))
    # We compute in float32 on the CPU whatever the folder holds.
    theirs.set_dtype(mx.float32)
    ids = mx.array(np.random.default_rng(0).integers(VOCAB, size=(1, NUM_PROMPT + NUM_DECODED)))
    results = [run(model, ids) for model in (ours, theirs)]
    assert np.abs(results[0] - results[1]).max() <= MAX_DIFFERENCE
    # A model that predicts nothing would agree with any other.
    assert results[0].std() > 0.5


def run(model: Any, ids: mx.array) -> np.ndarray:
    cache = model.make_cache()
    logits = [model(ids[:, :NUM_PROMPT], cache=cache)]
    for i in range(NUM_PROMPT, ids.shape[1]):
        logits.append(model(ids[:, i : i + 1], cache=cache))
    return np.array(mx.concatenate(logits, axis=1))


@KINDS
@pytest.mark.parametrize(
    "settings",
    everyday(
        [
            dict(bits=3, group_size=64),
            dict(bits=4, group_size=64),
            dict(bits=4, group_size=64, method="search"),
            dict(bits=4, group_size=128),
            dict(bits=8, group_size=32),
            dict(dtype="bfloat16"),
            dict(dtype="float32"),
        ],
        1,
    ),
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_mlx_lm_loads_what_we_write(tmp_path: Path, moe: bool, settings: dict[str, Any]) -> None:
    write_source(tmp_path / "source", moe)
    convert(tmp_path / "source", tmp_path / "converted", **settings)
    assert_equal_logits(tmp_path / "converted")


@KINDS
def test_mlx_lm_loads_a_text_model_that_was_nested(tmp_path: Path, moe: bool) -> None:
    """It knows the text types only inside; the outer one was left as it was."""
    text = text_config(moe, tied=False)
    nested = {"model_type": text["model_type"], "text_config": text}
    write_checkpoint(tmp_path / "source", moe=moe, tokenizer=True, config=nested)
    convert(tmp_path / "source", tmp_path / "converted", dtype="float32")
    assert_equal_logits(tmp_path / "converted")


@pytest.mark.parametrize(
    "yarn",
    everyday(
        [
            {},
            {"attention_factor": 0.7},
            {"mscale": 0.7},
            {"mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 8},
            {"beta_fast": None, "beta_slow": 0, "mscale": None},
        ],
        1,
        3,
    ),
    ids=str,
)
def test_yarn_is_written_in_the_words_of_mlx_lm(tmp_path: Path, yarn: dict[str, Any]) -> None:
    """It takes mscale alone, knows no attention_factor, and computes with a null or a 0."""
    text = text_config(moe=False, tied=False)
    text["rope_parameters"] |= {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 256,
        **yarn,
    }
    text["original_max_position_embeddings"] = 64
    write_checkpoint(tmp_path / "source", tokenizer=True, config={"text_config": text})
    convert(tmp_path / "source", tmp_path / "converted", dtype="float32")
    before, after = (
        ModelConfig.from_hf(read_config(tmp_path / f)) for f in ("source", "converted")
    )
    assert after.rope == before.rope
    assert_equal_logits(tmp_path / "converted")


@KINDS
@pytest.mark.parametrize(
    "settings",
    everyday(
        [
            dict(quantize=True, q_bits=4, q_group_size=32),
            dict(quantize=True, quant_predicate="mixed_3_6"),
            dict(dtype="bfloat16"),
        ],
        1,
    ),
    ids=lambda settings: "-".join(str(v) for k, v in settings.items() if k != "quantize"),
)
def test_we_load_what_mlx_lm_writes(tmp_path: Path, moe: bool, settings: dict[str, Any]) -> None:
    write_source(tmp_path / "source", moe)
    mlx_lm.convert(str(tmp_path / "source"), str(tmp_path / "converted"), **settings)
    assert_equal_logits(tmp_path / "converted")


def test_a_converted_qwen3_next_checkpoint_runs_in_both(tmp_path: Path) -> None:
    golden = Path(__file__).parent / "golden" / "next"
    out = convert(golden, tmp_path / "out", dtype="float32")
    theirs, _ = mlx_lm.utils.load_model(out)
    with np.load(golden / "golden.npz", allow_pickle=False) as file:
        ids, expected = mx.array(file["ids"][None]), file["prefill_logits"]
    assert np.abs(np.array(theirs(ids)[0]) - expected).max() <= MAX_DIFFERENCE
