"""KL to the bf16 demo at equal bytes: mlx-lm's ways to quantize, and ours.

Calibration reads conversations of the demo's kind; judged are held-out questions with the answers
that the unquantized demo gives, which no method has seen.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.quant import awq, dynamic_quant, gptq
from mlx_lm.utils import compute_bits_per_weight

import qwen35_mlx
from qwen35_mlx.config import read_config
from qwen35_mlx.convert import convert
from qwen35_mlx.convert.calibrate import calibrate
from qwen35_mlx.convert.fit import fit
from qwen35_mlx.quant.divergence import kl_divergence

sys.path.insert(0, str(Path(__file__).parent / "demo"))
from data import conversations, held_out
from evaluate import prompt_ids

TEXT_TOKENS = 256
CALIBRATION_TEXTS, GRADIENT_TEXTS, NUM_QUESTIONS = 32, 8, 48
# Another size of ours is made for a peer further away than this.
EQUAL_BYTES = 0.005


def judged_texts(model: Any, tokenizer: Any) -> list[mx.array]:
    """Held-out questions, half of them facts, with the unquantized model's answers, `[1, T]`."""
    questions = [s for s in held_out(num_each=10) if s.picture is None]
    of_facts = [s for s in questions if s.skill == "facts"]
    others = [s for s in questions if s.skill != "facts"]
    texts = []
    for kind in (of_facts, others):
        for sample in kind[:: math.ceil(2 * len(kind) / NUM_QUESTIONS)]:
            prompt = prompt_ids(tokenizer, sample)
            said = qwen35_mlx.generate(model, tokenizer, prompt, temperature=0, max_tokens=64)
            ids = prompt + tokenizer.encode(said, add_special_tokens=False)
            if len(ids) <= 2 * TEXT_TOKENS:
                texts.append(mx.array([ids]))
    return texts


class Judge:
    """Mean KL over all tokens of the judged texts."""

    def __init__(self, reference: nn.Module, texts: list[mx.array]):
        self.texts = texts
        self.logits = [reference(ids) for ids in texts]
        mx.eval(self.logits)

    def __call__(self, model: nn.Module) -> float:
        """Computed in float32, so that only the weights differ."""
        model.set_dtype(mx.float32)
        kls = []
        for ids, logits in zip(self.texts, self.logits, strict=True):
            kls.append(kl_divergence(logits, model(ids))[0])
            mx.eval(kls[-1])
        return mx.concatenate(kls).mean().item()


def peers(source: Path, work: Path, ids: mx.array) -> Iterator[tuple[float, str, Callable]]:
    """About how many bits a weight, name of the method, and what makes the bf16 model."""
    plain_bpw: dict[int, float] = {}

    def plain(bits: int) -> nn.Module:
        folder = work / f"plain-{bits}"
        mlx_lm.convert(str(source), str(folder), quantize=True, q_bits=bits, q_group_size=64)
        model = mlx_lm.load(str(folder))[0]
        plain_bpw[bits] = compute_bits_per_weight(model)
        return model

    def dynamic(bits: int) -> nn.Module:
        low, high = max(bits - 1, 2), bits + 1
        model = mlx_lm.load(str(source))[0]
        # float32: bfloat16 is many times slower on a CPU.
        model.set_dtype(mx.float32)
        widths = (low, 64, high, 64)
        found = dict(
            dynamic_quant.estimate_sensitivities(model, ids[:GRADIENT_TEXTS], *widths, batch_size=4)
        )
        model = mlx_lm.load(str(source))[0]
        limit = dynamic_quant.estimate_threshold(model, found, plain_bpw[bits], *widths)

        def predicate(path: str, module: nn.Module) -> Any:
            if not hasattr(module, "to_quantized"):
                return False
            return {"bits": high, "group_size": 64} if found[path] > limit else True

        nn.quantize(model, group_size=64, bits=low, class_predicate=predicate)
        return model

    def with_gptq(bits: int) -> nn.Module:
        model = mlx_lm.load(str(source))[0]
        model.set_dtype(mx.float32)
        model, _ = gptq.gptq_quantize(model, ids, bits, 64, max(bits, 4), 64)
        model.set_dtype(mx.bfloat16)
        return model

    for bits in (2, 3, 4):
        yield bits + 0.5, "mlx_lm.convert", lambda bits=bits: plain(bits)
        yield bits + 0.5, "dynamic_quant", lambda bits=bits: dynamic(bits)
        if bits != 3:
            yield bits + 0.5, "gptq", lambda bits=bits: with_gptq(bits)


def kl_table(source: Path, work: Path) -> dict[str, dict[str, float]]:
    """Print the table; returns bits per weight -> method -> KL."""
    started = time.perf_counter()
    convert(source, work / "bf16", dtype="bfloat16")
    model, tokenizer = qwen35_mlx.load(work / "bf16")
    judge = Judge(model, judged_texts(model, tokenizer))
    ids = mx.array(conversations(tokenizer._tokenizer, CALIBRATION_TEXTS, TEXT_TOKENS))
    calibration = calibrate(source, ids, hessians=True, measure=True)
    print(
        f"\nKL to bf16 in nats a token, {sum(t.size for t in judge.texts)} held-out tokens;"
        f" calibrated on {ids.size} others in {time.perf_counter() - started:.0f} s"
    )
    print(f"{'about':>5}  {'method':15} {'bits/weight':>11} {'KL':>8}  ours at these bytes")
    ours: dict[float, float] = {}

    def ours_at(bits_per_weight: float) -> tuple[float, float]:
        for made, kl in ours.items():
            if made <= bits_per_weight <= made * (1 + EQUAL_BYTES):
                return made, kl
        choice = fit(
            source, bits_per_weight=bits_per_weight, calibration=calibration, method="gptq"
        )
        folder = work / f"ours-{len(ours)}"
        convert(source, folder, recipe=choice.recipe, method="gptq", calibration=calibration)
        mine = mlx_lm.load(str(folder))[0]
        made = compute_bits_per_weight(mine)
        ours[made] = judge(mine)
        return made, ours[made]

    table: dict[str, dict[str, float]] = {}
    for about, name, make in peers(source, work, ids):
        peer = make()
        bits_per_weight = compute_bits_per_weight(peer)
        kl = judge(peer)
        made, own = ours_at(bits_per_weight)
        row = table.setdefault(f"{made:.3f}", {"ours": round(own, 6)})
        row[name] = round(kl, 6)
        print(
            f"{about:5}  {name:15} {bits_per_weight:11.3f} {kl:8.5f}  "
            f"{own:.5f} at {made:.3f}, {own / kl:.2f} of it",
            flush=True,
        )
    print("  3.5  gptq            does not run: mlx-lm's packs 2, 4 and 8 bits only")
    kind = read_config(source)["model_type"]
    if kind not in awq.AWQ_MODEL_CONFIGS:
        print(f"       awq             does not run: mlx-lm's knows no {kind}")
    print(f"KL took {time.perf_counter() - started:.0f} s")
    return table
