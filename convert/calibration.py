"""Runs a text through a source checkpoint and collects what quantization should know."""

# B texts, T tokens, H hidden, I inputs of a matrix, E experts.

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qwen35_mlx import files
from qwen35_mlx.config import read_config
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.model.language import DecoderLayer
from qwen35_mlx.model.loading import load_tokenizer, read_generation_config
from qwen35_mlx.quant.calibrate import (
    Calibration,
    Moments,
    input_name,
    option_errors,
    rounded,
    search_gain,
    unit_of,
)
from qwen35_mlx.quant.fidelity import kl_divergence
from qwen35_mlx.quant.gptq import feedback_gain

from .layerwise import LAYER, Layerwise, SourceCheckpoint, matrices, run_layer, watched

TEXT_FILE = Path(__file__).parent / "calibration.txt"
TEXT_TOKENS = 512
# A model of this size and less is measured: each unit quantized alone, at these settings.
MEASURED_PARAMETERS = 3 * 10**9
MEASURED_BITS = (3, 5)
MEASURED_GROUP_SIZE = 64
MEASURED_TOKENS = 1024

# Steps done, steps in all, what is being done.
Progress = Callable[[int, int, str], None]


def read_text(file: Path | None) -> str:
    """A text file of the user's, or the text that comes with this package."""
    try:
        return files.read_text(file or TEXT_FILE)
    except OSError as error:
        raise Qwen35Error(f"{file} cannot be read", got=error, expected="text in UTF-8") from None


def encode(folder: Path, text: str, length: int = TEXT_TOKENS, most: int | None = None) -> mx.array:
    """Token ids `[B, T]` of a text in the tokens of `folder`, at most `most`; whole rows only.

    Passages apart by lines of `---`; one that begins with `Q: ` goes through the chat template.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise Qwen35Error(f"no checkpoint at {folder}", expected="a folder on this machine")
    config = read_config(folder)
    tokenizer = load_tokenizer(folder, config, read_generation_config(folder))
    ids: list[int] = []
    for passage in text.split("\n---\n"):
        question, found, answer = passage.removeprefix("Q: ").partition("\nA: ")
        if found and passage.startswith("Q: ") and getattr(tokenizer, "chat_template", None):
            turns = [("user", question), ("assistant", answer)]
            messages = [{"role": role, "content": content.strip()} for role, content in turns]
            passage = tokenizer._tokenizer.apply_chat_template(messages, tokenize=False)
        ids += tokenizer.encode(passage, add_special_tokens=False)
    ids = ids[:most]
    if len(ids) < 2:
        raise Qwen35Error(
            "the text is too short", got=f"{len(ids)} tokens", expected="2 tokens or more"
        )
    vocab = (config.get("text_config") or config)["vocab_size"]
    if max(ids) >= vocab:
        raise Qwen35Error(
            "the tokenizer gives ids that the model does not know",
            got=max(ids),
            expected=f"below {vocab}",
        )
    length = min(length, len(ids))
    num_rows = len(ids) // length
    return mx.array(ids[: num_rows * length]).reshape(num_rows, length)


def calibrate(
    source: str | Path,
    ids: mx.array,
    *,
    hessians: bool = False,
    measure: bool | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Statistics of every matrix's inputs for ids `[B, T]`, and what each option would lose.

    Holds one layer of the source (12.9 GB of the 397B in bf16, and 4.3 GB while its largest stack
    is put together), its moments, and B * T * H activations; with `hessians`, I * I float32 for
    each input, by expert where that is less than 3 GB. `measure` (default: up to 3 B parameters)
    adds the KL of each unit quantized alone, and holds the whole model.
    """
    checkpoint = SourceCheckpoint(Path(source).expanduser())
    planned = checkpoint.plan
    result = Calibration(planned.source.origin["source"], planned.layout, _digest(ids), ids.size)
    if measure is None:
        measure = checkpoint.num_parameters <= MEASURED_PARAMETERS
    run = Layerwise(checkpoint)
    num_layers = checkpoint.config.num_hidden_layers
    report = progress or (lambda done, total, what: None)
    hidden = run.embed(ids)
    num_measured = max(MEASURED_TOKENS // ids.shape[1], 1)
    inputs, layers = [], []
    gains: dict[str, float] = {}
    for index in range(num_layers):
        report(index, num_layers, f"layer {index}")
        layer = run.layer(index)
        if measure:
            layers.append(layer)
            inputs.append(hidden[:num_measured])
        with _collecting(result, layer, LAYER.format(index), checkpoint, hessians, gains):
            hidden = run_layer(layer, hidden)
    with _collecting(result, run.ends, "", checkpoint, hessians, gains):
        for _, _, logits in run.logits(hidden):
            mx.eval(logits)
    if measure:
        inputs.append(hidden[:num_measured])
        _measure(result, run, layers, inputs, ids[:num_measured], gains, report)
    return result


def _digest(ids: mx.array) -> str:
    return hashlib.sha256(np.array(ids.astype(mx.int32)).tobytes()).hexdigest()[:32]


@contextmanager
def _collecting(
    result: Calibration,
    root: nn.Module,
    prefix: str,
    checkpoint: SourceCheckpoint,
    hessians: bool,
    gains: dict[str, float],
) -> Iterator[None]:
    """Moments of all inputs within `root` while the block runs, then the errors of its options."""
    moments: dict[str, Moments] = {}
    first: dict[str, str] = {}

    def seen(module: str, x: mx.array, args: tuple[Any, ...]) -> None:
        name = input_name(prefix + module)
        # Modules that share an input are called with the same rows: the first one counts.
        if name is None or first.setdefault(name, module) != module:
            return
        experts = None
        if args:
            # The row of one of few tokens stands for all of its experts.
            x, experts = mx.broadcast_to(x, (*args[0].shape, *x.shape[-2:])), args[0].flatten()
        if name not in moments:
            num_experts = 0 if experts is None else checkpoint.config.num_experts
            moments[name] = Moments(x.shape[-1], num_experts, hessians)
        moments[name].add(x.reshape(-1, x.shape[-1]), experts)

    with watched(root, seen):
        yield
    for name, moment in moments.items():
        result.moments[name] = moment.means()
        if (hessian := moment.hessians()) is not None:
            result.hessians[name] = hessian
    for path, matrix in matrices(root).items():
        if (module := prefix + path) in checkpoint.quantizable:
            second, hessian = result.of(module)
            gain = 1.0 if hessian is None else feedback_gain(hessian)
            gains[module] = gain
            errors = option_errors(matrix.weight, second)
            result.errors[module] = {setting: gain * error for setting, error in errors.items()}
    mx.eval(result.moments, result.hessians)


def _measure(
    result: Calibration,
    run: Layerwise,
    layers: Sequence[DecoderLayer],
    inputs: Sequence[list[mx.array]],
    ids: mx.array,
    gains: dict[str, float],
    report: Progress,
) -> None:
    """KL of each unit alone: round it, run from there to the logits, compare with the model."""
    reference = [logits for _, _, logits in run.logits(inputs[-1])]
    mx.eval(reference)
    # Modules by unit, each with the first layer that has to run again.
    units: dict[str, list[tuple[str, nn.Module]]] = {}
    starts: dict[str, int] = {}
    parts = [(run.ends, "", -1), *((la, LAYER.format(i), i) for i, la in enumerate(layers))]
    for root, prefix, index in parts:
        for path, module in matrices(root).items():
            if (name := prefix + path) in result.errors:
                units.setdefault(unit_of(name), []).append((name, module))
                starts[unit_of(name)] = len(layers) if name.endswith("lm_head") else index
    for done, (unit, members) in enumerate(units.items()):
        for bits in MEASURED_BITS:
            setting = bits, _group_size([module for _, module in members])
            report(done, len(units), f"{unit} at {bits} bits")
            weights = [module.weight for _, module in members]
            for _, module in members:
                module.weight = rounded(module.weight, setting)
            start = starts[unit]
            hidden = run.embed(ids) if start < 0 else inputs[start]
            for layer in layers[max(start, 0) :]:
                hidden = run_layer(layer, hidden)
            kls = [
                kl_divergence(ref, logits)
                for ref, (_, _, logits) in zip(reference, run.logits(hidden), strict=True)
            ]
            # Less by what the search gains, and error feedback where there will be some.
            gain = sum(gains[name] for name, _ in members) / len(members) * search_gain(*setting)
            result.kls.setdefault(unit, {})[setting] = gain * float(mx.concatenate(kls).mean())
            for weight, (_, module) in zip(weights, members, strict=True):
                module.weight = weight


def _group_size(modules: Sequence[nn.Module]) -> int:
    return next(
        size
        for size in (MEASURED_GROUP_SIZE, 32)
        if all(module.weight.shape[-1] % size == 0 for module in modules)
    )
