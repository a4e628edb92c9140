"""KL to the bf16 model at equal bytes: mlx-lm's ways to quantize, DWQ among them, and ours.

All read the same calibration texts. The demo reads conversations of its kind; judged are held-out
questions with the answers that the unquantized demo gives, which no method has seen. The models
of tools/prose read and are judged on prose of documents apart from each other.
"""

import io
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from dwq import NUM_EPOCHS, RATES, Targets, epochs, loaded
from mlx_lm.quant import awq, dynamic_quant, gptq
from mlx_lm.utils import compute_bits_per_weight, quantize_model, save

import qwen35_mlx
from qwen35_mlx.config import read_config
from qwen35_mlx.convert import convert
from qwen35_mlx.convert.calibrate import Calibration, calibrate
from qwen35_mlx.convert.distilled import Distillation, distillation_lines
from qwen35_mlx.convert.fit import fit
from qwen35_mlx.quant.divergence import kl_divergence

sys.path.insert(0, str(Path(__file__).parent / "demo"))
from data import conversations, held_out
from evaluate import prompt_ids

NUM_TEXTS, TEXT_TOKENS, NUM_QUESTIONS = 128, 256, 48
# mlx-lm's GPTQ runs on mlx-lm's model, which is slow on a CPU.
GPTQ_TEXTS = 32
GROUP_SIZE, GPTQ_BITS = 64, (2, 4)
# Learning rates of DWQ: how many at most, and how far apart those beyond RATES are.
MAX_RATES, RATE_STEP = 5, 3
# Another size of ours is made for a peer further away than this.
EQUAL_BYTES = 0.005
Table = dict[str, dict[str, float]]


class Checkpoint(NamedTuple):
    """A bf16 checkpoint, calibration ids `[N, T]`, and what gives the judged texts `[1, T]`."""

    name: str
    source: Path
    ids: mx.array
    judged: list[mx.array]


def demo(source: Path, work: Path) -> Checkpoint:
    """The bundled model; half of the judged questions are facts."""
    anew(work / "demo-bf16", partial(convert, source, dtype="bfloat16"))
    model, tokenizer = qwen35_mlx.load(work / "demo-bf16")
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
    ids = mx.array(conversations(tokenizer._tokenizer, NUM_TEXTS, TEXT_TOKENS))
    return Checkpoint("demo", source, ids, texts)


def prose(folder: Path) -> Checkpoint:
    """What tools/prose/pretrain.py wrote."""
    texts = mx.load(str(folder / "texts.safetensors"))
    assert isinstance(texts, dict)
    return Checkpoint(
        folder.name, folder / "model", texts["calibration"], list(texts["judged"][:, None])
    )


class Judge:
    """Mean KL over all tokens of the judged texts, in float32, so that only the weights differ."""

    def __init__(self, reference: nn.Module, texts: list[mx.array]):
        self.texts = texts
        self.logits = [reference(ids) for ids in texts]
        mx.eval(self.logits)

    def __call__(self, model: nn.Module) -> float:
        """Of a model in float32."""
        kls = []
        for ids, logits in zip(self.texts, self.logits, strict=True):
            kls.append(kl_divergence(logits, model(ids))[0])
            mx.eval(kls[-1])
        return mx.concatenate(kls).mean().item()


def distilled(
    source: Path, bits_per_weight: float, calibration: Calibration, ids: mx.array, folder: Path
) -> None:
    """Ours with distillation and its last pass over the whole model, written to `folder`."""
    choice = fit(source, bits_per_weight=bits_per_weight, calibration=calibration, method="distill")
    convert(
        source,
        folder,
        recipe=choice.recipe,
        method="distill",
        calibration=calibration,
        distillation=Distillation(ids, finish_tokens=ids.size),
    )
    print(*distillation_lines(folder), sep="\n")


def calibrated(
    source: Path, bits_per_weight: float, calibration: Calibration, ids: mx.array, folder: Path
) -> None:
    """Ours without distillation, written to `folder`."""
    choice = fit(source, bits_per_weight=bits_per_weight, calibration=calibration, method="gptq")
    convert(source, folder, recipe=choice.recipe, method="gptq", calibration=calibration)


def anew(folder: Path, make: Callable[[Path], Any]) -> None:
    """Make a folder, without what an earlier run has left there."""
    shutil.rmtree(folder, ignore_errors=True)
    make(folder)


def bits_of(folder: Path) -> float:
    """Bits per weight of a folder as mlx-lm loads it."""
    return compute_bits_per_weight(mlx_lm.load(str(folder), lazy=True)[0])


class Rivals:
    """mlx-lm's quantizations of a checkpoint, each a folder."""

    def __init__(self, checkpoint: Checkpoint, reference: nn.Module, work: Path):
        self.source, self.ids, self.work = checkpoint.source, checkpoint.ids, work
        self.reference = reference
        self.targets = Targets(reference)

    def plain(self, bits: int) -> Path:
        """`mlx_lm.convert`."""
        folder = self.work / f"plain-{bits}"
        mlx_lm.convert(
            str(self.source), str(folder), quantize=True, q_bits=bits, q_group_size=GROUP_SIZE
        )
        return folder

    def dynamic(self, bits: int) -> Path:
        """`dynamic_quant` at the bytes of `plain`; sensitivities through this package's model."""
        low, high = max(bits - 1, 2), bits + 1
        widths = (low, GROUP_SIZE, high, GROUP_SIZE)
        trained = loaded(self.work / "bf16")
        found = dict(dynamic_quant.estimate_sensitivities(trained, self.ids, *widths, batch_size=4))
        model, tokenizer, config = mlx_lm.load(str(self.source), return_config=True)
        target = bits_of(self.work / f"plain-{bits}")
        limit = dynamic_quant.estimate_threshold(model, found, target, *widths)

        def predicate(path: str, module: nn.Module) -> Any:
            return {"bits": high, "group_size": GROUP_SIZE} if found[path] > limit else True

        model, config = quantize_model(model, config, GROUP_SIZE, low, quant_predicate=predicate)
        folder = self.work / f"dynamic-{bits}"
        save(str(folder), str(self.source), model, tokenizer, config)
        return folder

    def gptq(self, bits: int) -> Path:
        """mlx-lm's GPTQ; of our widths it packs GPTQ_BITS only."""
        model, tokenizer, config = mlx_lm.load(str(self.source), return_config=True)
        model.set_dtype(mx.float32)
        ids = self.ids[:GPTQ_TEXTS]
        model, widths = gptq.gptq_quantize(model, ids, bits, GROUP_SIZE, max(bits, 4), GROUP_SIZE)
        model.set_dtype(mx.bfloat16)
        folder = self.work / f"gptq-{bits}"
        save(str(folder), str(self.source), model, tokenizer, config | {"quantization": widths})
        return folder

    def dwq(self, folder: Path, judge: Callable[[nn.Module], float]) -> tuple[float, str]:
        """The lowest KL on the judged texts: one epoch at each rate, all epochs at the best rate.

        Chosen by what is judged, in the rival's favour; while the best rate is the lowest or the
        highest, the next one is tried.
        """
        found: dict[float, tuple[float, nn.Module, Iterator[int]]] = {}
        rates = list(RATES)
        while rates:
            model, rate = loaded(folder), rates.pop()
            training = epochs(model, self.targets, self.ids, rate, NUM_EPOCHS)
            next(training)
            found[rate] = judge(model), model, training
            best = min(found, key=lambda tried: found[tried][0])
            if not rates and len(found) < MAX_RATES:
                lower, higher = best / RATE_STEP, best * RATE_STEP
                rates += [lower] if best == min(found) else [higher] if best == max(found) else []
        kl, model, training = found[best]
        later = [(judge(model), epoch) for epoch in training]
        kl, epoch = min([(kl, 1), *later])
        return kl, f"learning rate {best:.2g}, epoch {epoch}"


class Ours:
    """Our conversions of a checkpoint by bits per weight, each made once."""

    def __init__(self, checkpoint: Checkpoint, work: Path, judge: Judge, training: bool):
        self.source, self.ids, self.work, self.judge = *checkpoint[1:3], work, judge
        self.methods = {"ours": calibrated} | ({"ours distilled": distilled} if training else {})
        self.calibration = calibrate(self.source, self.ids, hessians=True, measure=True)
        self.made: dict[float, dict[str, float]] = {}

    def at(self, bits_per_weight: float) -> tuple[float, dict[str, float]]:
        """Bits per weight, no more than asked for and EQUAL_BYTES below at most; KL by method."""
        for made, kls in self.made.items():
            if made <= bits_per_weight <= made * (1 + EQUAL_BYTES):
                return made, kls
        kls, made = {}, 0.0
        for name, make in self.methods.items():
            folder = self.work / f"{name}-{bits_per_weight:.3f}"
            given = self.source, bits_per_weight, self.calibration, self.ids
            anew(folder, partial(make, *given))
            made = bits_of(folder)
            kls[name] = round(self.judge(loaded(folder)), 6)
        self.made[made] = kls
        return made, kls


def rows(
    rivals: Rivals, judge: Judge, bits: int, training: bool
) -> Iterator[tuple[str, str, float, str]]:
    """Each rival at about `bits` and a half: its name, folder in `work`, KL, how it was trained.

    Without `training`, those that DWQ trains are left out. What an interrupted run measured in
    the same folder is not measured again.
    """
    file = rivals.work / f"rivals-{bits}.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    done = {row[0]: row for row in map(json.loads, lines)}
    ways = [("mlx_lm.convert", rivals.plain), ("dynamic_quant", rivals.dynamic)]
    if bits in GPTQ_BITS:
        ways.append(("gptq", rivals.gptq))
    for name, make in ways:
        folder = rivals.work / f"{make.__name__}-{bits}"
        if name not in done:
            with redirect_stderr(io.StringIO()):
                anew(folder, lambda _, make=make: make(bits))
        with_dwq = training and make != rivals.gptq
        for row_name in (name, f"{name} + DWQ") if with_dwq else (name,):
            if row_name not in done:
                is_trained = row_name != name
                kl, how = rivals.dwq(folder, judge) if is_trained else (judge(loaded(folder)), "")
                done[row_name] = row_name, folder.name, kl, how
                with file.open("a") as appended:
                    appended.write(json.dumps(done[row_name]) + "\n")
            yield done[row_name]


def kl_table(
    checkpoint: Checkpoint, work: Path, all_bits: list[int], training: bool = True
) -> Table:
    """Print the table; returns bits per weight -> method -> KL.

    Without `training`, methods that train (DWQ and our distillation) are left out.
    """
    started = time.perf_counter()
    work.mkdir(parents=True, exist_ok=True)
    anew(work / "bf16", partial(convert, checkpoint.source, dtype="bfloat16"))
    reference = loaded(work / "bf16")
    judge = Judge(reference, checkpoint.judged)
    rivals, ours = Rivals(checkpoint, reference, work), Ours(checkpoint, work, judge, training)
    print(
        f"\n{checkpoint.name}: KL to bf16 in nats, {sum(t.size for t in judge.texts)} tokens;"
        f" calibrated on {checkpoint.ids.size} others in {time.perf_counter() - started:.0f} s"
    )
    print(f"{'about':>5}  {'method':20} {'bits/weight':>11} {'KL':>8}  ours at these bytes")
    table: Table = {}
    for bits in all_bits:
        for name, folder, kl, detail in rows(rivals, judge, bits, training):
            bits_per_weight = bits_of(work / folder)
            made, own = ours.at(bits_per_weight)
            table.setdefault(f"{made:.3f}", dict(own))[name] = round(kl, 6)
            beside = ", ".join(f"{n} {k:.5f} ({k / kl:.2f} of it)" for n, k in own.items())
            print(
                f"{bits + 0.5:5}  {name:20} {bits_per_weight:11.3f} {kl:8.5f}  "
                f"{beside} at {made:.3f} {detail and '; ' + detail}",
                flush=True,
            )
    kind = read_config(checkpoint.source)["model_type"]
    if kind not in awq.AWQ_MODEL_CONFIGS:
        print(f"       awq does not run: mlx-lm's knows no {kind}; its gptq packs {GPTQ_BITS}")
    print(f"KL took {time.perf_counter() - started:.0f} s")
    return table


def ratios(table: Table) -> dict[str, dict[str, float]]:
    """KL of our best method over that of each other one, by bits per weight."""
    result = {}
    for made, kls in table.items():
        best = "ours distilled" if "ours distilled" in kls else "ours"
        result[made] = {
            f"{best} / {name}": round(kls[best] / kl, 4) for name, kl in kls.items() if name != best
        }
    return result
