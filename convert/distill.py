"""Trains quantized weights layer by layer, so that each layer gives the output of the source's.

The teacher is the source, the student is the quantized model. B texts, T tokens, H hidden size,
N = B * T, E experts, K experts per token.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qwen35_mlx.files import replacing, save_arrays
from qwen35_mlx.kernels.grouped_expert_matmul import expert_mlp
from qwen35_mlx.kernels.router import Routing, route
from qwen35_mlx.model.language import DecoderLayer, Model
from qwen35_mlx.quant.latent import Latent, Schedule, dequantized, train
from qwen35_mlx.quant.packing import Quantized
from qwen35_mlx.quant.statistics import Calibration

from . import activations
from .activations import Activations
from .calibrate import collecting
from .distilled import KINDS, MIN_EXPERT_TOKENS, Distillation, PartReport
from .goals import TINY, divergence, half_loss, relative_error, router_loss
from .layerwise import LAYER, TRUNK, Layerwise, SourceCheckpoint, matrices
from .modules import EXPERTS, Expert, Parts, Weights, module_at, read_parts
from .plan import Plan
from .transform import MLX_DTYPES, quantize_rows

# Tokens of a step, and of a step of one expert.
BATCH_TOKENS, EXPERT_BATCH = 1024, 256
# Minimum number of steps of an expert, which has few tokens.
EXPERT_STEPS = 200
# The training of the whole model: epochs, and the learning rate of scales and biases.
FINISH_EPOCHS, FINISH_RATE = 2, 0.002
ANY_BYTES = 2**62
# How many activations of the whole text a layer's training holds, and the bytes of a number.
HELD, DTYPE_BYTES = 9, 4
# From a student and the number of a batch.
BatchLoss = Callable[[Any, int], mx.array]
EMBEDDING, HEAD = TRUNK + "embed_tokens", "language_model.lm_head"


class Streams(NamedTuple):
    """The activations `[B, T, H]` of teacher and student at one place of the model."""

    teacher: Activations
    student: Activations


def distill(planned: Plan, distillation: Distillation, folder: Path) -> list[PartReport]:
    """Train the quantized matrices of `planned` and write them to `folder`, for `Distilled`.

    The matrices of a layer start from GPTQ on the inputs that the quantized layers before it give.
    They are trained to give the output of the source's layer on the source's activations.
    With `finish_tokens`, the whole model is then trained on the KL divergence of its logits.
    Holds one layer of the source, its quantized copy, its Hessians, and HELD * N * H activations,
    which may be on disk; routed experts are trained one at a time.
    A second call continues after the last layer that was written, with the same bits as without
    the interruption.
    """
    (folder / "layers").mkdir(parents=True, exist_ok=True)
    distiller = _Distiller(planned, distillation, folder)
    teacher_x = distiller.run_layers()
    if distillation.finish_tokens and not (folder / "finished").exists():
        distiller.finish(teacher_x, distillation.finish_tokens)
    distillation.progress(distiller.num_layers, distiller.num_layers, "done")
    files = [f for part in ("layers", "finished") for f in sorted((folder / part).glob("*.json"))]
    return [PartReport(**json.loads(file.read_text("utf-8"))) for file in files]


def attend(layer: DecoderLayer, x: mx.array) -> mx.array:
    """The first half of a layer, with its residual: `[B, T, H]` -> the same."""
    return layer.attend(x, None if layer.is_linear else "causal", None, None)


def feed(layer: DecoderLayer, x: mx.array) -> mx.array:
    """The second half of a layer, with its residual: `[B, T, H]` -> the same."""
    return layer.mlp(x, layer.post_attention_layernorm)


class _Distiller:
    def __init__(self, planned: Plan, distillation: Distillation, folder: Path):
        self.folder = folder
        self.ids, self.schedule = distillation.ids, distillation.schedule
        self.progress = distillation.progress
        self.entries = {e.module: e for e in planned.text_entries if e.method == "gptq"}
        self.model = Layerwise(SourceCheckpoint(planned.source.folder))
        self.config, self.ends = self.model.config, self.model.ends
        self.num_layers = self.config.num_hidden_layers
        self.per_token = self.config.num_experts_per_tok
        texts_at_once = max(BATCH_TOKENS // self.ids.shape[1], 1)
        starts = range(0, len(self.ids), texts_at_once)
        self.batches = [slice(i, i + texts_at_once) for i in starts]
        self.report, self.prefix = PartReport(""), ""
        self.done = 0
        held = HELD * self.ids.size * self.config.hidden_size * DTYPE_BYTES
        self.spill = folder if held > distillation.activations_bytes else None

    def run_layers(self) -> Activations:
        """Train layer by layer, then the head; returns the source's activations before the norm."""
        found = [i for i in range(self.num_layers + 1) if self._file(i).exists()]
        ends = self.ends
        if not found:
            student = Model(ends.config)
            quantize = partial(self._quantize, ends, within=EMBEDDING)
            self._make_student(ends, student, "", "embedding", quantize)
            embeddings = [root.language_model.model.embed_tokens for root in (ends, student)]
            self._save_streams(
                0,
                Streams(*(self._joined(e(self.ids[b]) for b in self.batches) for e in embeddings)),
            )
            found = [0]
        loaded = activations.load(self._file(found[-1]), self.spill is not None)
        x = Streams(loaded["seen"], loaded["own"])
        for index in range(found[-1], self.num_layers):
            self.done = index
            x = self._layer(index, x)
            self._save_streams(index + 1, x)
        head = partial(self._head, x)
        self._make_student(ends, Model(ends.config), "", "head", head)
        return x.teacher

    def _file(self, index: int) -> Path:
        """The file with the activations before layer `index`."""
        return self.folder / f"streams-{index:03}.safetensors"

    def _save_streams(self, index: int, x: Streams) -> None:
        activations.save(self._file(index), {"seen": x.teacher, "own": x.student}, self.batches)
        if index:
            self._file(index - 1).unlink()

    def _layer(self, index: int, x: Streams) -> Streams:
        """Train a layer with input `x`; returns its output."""
        teacher, batches = self.model.layer(index), self.batches
        student = DecoderLayer(self.config, self.config.layer_types[index])
        for layer in (teacher, student):
            _allow_gradients(layer)
        teacher_mid = self._run(attend, teacher, x.teacher)
        wanted = self._run(feed, teacher, teacher_mid)

        def train_parts(root: DecoderLayer) -> Parts:
            inner = "linear_attn." if teacher.is_linear else "self_attn."
            parts = self._quantize(teacher, root, inner, lambda rows: attend(root, x.student[rows]))
            losses = [half_loss(attend, y, teacher_mid, batches) for y in (x.student, x.teacher)]
            self._train("attention", teacher, root, parts, losses)
            mid = Streams(teacher_mid, self._run(attend, root, x.student))
            of_mlp = self._quantize(teacher, root, "mlp.", lambda b: feed(root, mid.student[b]))
            if self.config.is_moe:
                self._experts(teacher, root, of_mlp, mid, wanted)
            else:
                losses = [half_loss(feed, y, wanted, batches) for y in (mid.student, mid.teacher)]
                self._train("feed-forward", teacher, root, of_mlp, losses)
            return parts | of_mlp

        prefix = LAYER.format(index)
        self._make_student(teacher, student, prefix, f"layer-{index:03}", train_parts)
        return Streams(wanted, self._run(feed, student, self._run(attend, student, x.student)))

    def _make_student(
        self,
        teacher: Any,
        student: Any,
        prefix: str,
        name: str,
        train_parts: Callable[[Any], Parts],
    ) -> None:
        """Give the student the teacher's weights, quantized and trained, or read from the disk."""
        student.update(teacher.parameters())
        file = self.folder / "layers" / f"{name}.safetensors"
        if file.exists():
            parts = {path.removeprefix(prefix): p for path, p in read_parts(file).items()}
            self._set_weights(student, parts)
            return
        self.report, self.prefix = PartReport(name), prefix
        parts = train_parts(student)
        self._save(self.folder / "layers", name, {prefix + path: p for path, p in parts.items()})

    def _quantize(
        self,
        teacher: Any,
        student: Any,
        within: str,
        run: Callable[[slice], mx.array] | None = None,
    ) -> Parts:
        """Quantize the matrices whose paths start with `within`.

        run: runs the student on a batch, to collect the inputs of these matrices for GPTQ.
        """
        statistics = Calibration("", "", "", self.ids.size)
        if run is not None:
            parent = within.rpartition(".")[0]
            root, prefix = module_at(student, parent), f"{self.prefix}{parent}."
            with collecting(root, prefix, self.config.num_experts, hessians=True) as moments:
                for rows in self.batches:
                    mx.eval(run(rows))
            statistics.add(moments)
        parts = Parts()
        for path, module in matrices(teacher).items():
            entry = self.entries.get(self.prefix + path)
            if entry is not None and path.startswith(within):
                rows = module.weight.astype(MLX_DTYPES[entry.dtype])
                found = quantize_rows(rows.reshape(-1, rows.shape[-1]), entry, 0, statistics)
                parts[path] = tuple(  # type: ignore[assignment]
                    part.reshape(*rows.shape[:-1], part.shape[-1]) for part in found
                )
        # Experts are trained one by one: until then, student and teacher share their stacks.
        self._set_weights(student, {n: p for n, p in parts.items() if not n.startswith(EXPERTS)})
        return parts

    def _save(self, folder: Path, name: str, parts: Parts) -> None:
        # The report first: if the weights exist, it exists too.
        with replacing(folder / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(asdict(self.report)), "utf-8")
        arrays = {
            f"{path}.{kind}": array
            for path, found in parts.items()
            for kind, array in zip(KINDS, found, strict=True)
        }
        save_arrays(folder / f"{name}.safetensors", arrays, {})

    def _set_weights(self, root: Any, parts: Parts) -> None:
        """Set the weights of `root` to the dequantized parts, as in the converted model."""
        for path, found in parts.items():
            module = module_at(root, path)
            weight = dequantized(found, module.weight.shape)
            module.weight = weight.astype(module.weight.dtype)
            mx.eval(module.weight)

    def _joined(self, parts: Iterable[mx.array]) -> Activations:
        return Activations.joined(parts, self.spill)

    def _run(
        self, half: Callable[[Any, mx.array], mx.array], layer: Any, x: Activations
    ) -> Activations:
        return self._joined(half(layer, x[rows]) for rows in self.batches)

    def _train(
        self,
        part: str,
        teacher: Any,
        student: Any,
        parts: Parts,
        losses: Sequence[BatchLoss],
        within: str = "",
        num_batches: int = 0,
        schedule: Schedule | None = None,
    ) -> None:
        """Train the matrices whose paths start with `within`; updates `parts` and `student`.

        losses: one or two, used as in `latent.train`.
        """
        modules = {name: module_at(student, name) for name in parts if name.startswith(within)}
        if not modules:
            return
        latents = {n: Latent(parts[n], module_at(teacher, n).weight) for n in modules}

        def with_weights(loss: BatchLoss, weights: Mapping[str, mx.array], batch: int) -> mx.array:
            for name, weight in weights.items():
                modules[name].weight = weight
            return loss(student, batch)

        trained = train(
            latents,
            [partial(with_weights, loss) for loss in losses],
            num_batches or len(self.batches),
            schedule or self.schedule,
            lambda step, total, value: self.progress(
                self.done, self.num_layers, f"{part} {step}/{total}, loss {value:.3g}"
            ),
        )
        parts |= trained.parts
        mx.eval(trained.parts)
        self._set_weights(student, trained.parts)
        self._report(part, modules, trained.before, trained.after)
        mx.clear_cache()

    def _report(self, part: str, names: Iterable[str], before: float, after: float) -> None:
        self.report.losses[part] = before, after
        share = round(after / before, 4) if before else 1.0
        self.report.left |= {self.prefix + name: share for name in names}

    def _experts(
        self, teacher: Any, student: Any, parts: Parts, mid: Streams, wanted: Activations
    ) -> None:
        """Train the router, the routed experts, then the shared expert; `wanted`: their output."""

        def norm(layer: DecoderLayer, x: mx.array) -> mx.array:
            return layer.post_attention_layernorm(x)

        x = Streams(self._run(norm, teacher, mid.teacher), self._run(norm, student, mid.student))
        choices = self._run(lambda layer, x: layer.mlp.gate(x), teacher, x.teacher)

        def of_router(root: Any, i: int) -> mx.array:
            rows = self.batches[i]
            return router_loss(root.mlp.gate(x.student[rows]), choices[rows], self.per_token)

        self._train("router", teacher, student, parts, [of_router], "mlp.gate")
        mlp, found, missed = student.mlp, [], 0.0
        for batch in self.batches:
            rows, right = flat(x.student[batch]), flat(choices[batch])
            found.append(route(mlp.gate(rows), mlp.shared_expert_gate(rows), self.per_token))
            chosen = route(right, found[-1].shared_scores, self.per_token).indices
            miss = (chosen[..., None] != found[-1].indices[:, None]).all(axis=-1)
            mx.eval(found[-1], miss)
            missed += float(miss.sum()) / self.ids.size / self.per_token
        self.report.flips = round(missed, 6)
        routing = Routing(*(mx.concatenate(list(each)) for each in zip(*found, strict=True)))
        self._routed(teacher, student, parts, x, routing)

        def with_routed() -> Iterator[mx.array]:
            for batch, (indices, scores, _) in zip(self.batches, found, strict=True):
                before = mid.student[batch]
                out = expert_mlp(flat(x.student[batch]), indices, scores, mlp.switch_mlp)
                yield before + out.reshape(before.shape)

        fixed = self._joined(with_routed())

        def of_shared(root: Any, i: int) -> mx.array:
            rows, shared = x.student[self.batches[i]], root.mlp.shared_expert
            out = shared.down_proj(nn.silu(shared.gate_proj(rows)) * shared.up_proj(rows))
            out = fixed[self.batches[i]] + mx.sigmoid(root.mlp.shared_expert_gate(rows)) * out
            return relative_error(out, wanted[self.batches[i]])

        self._train("shared expert", teacher, student, parts, [of_shared], "mlp.shared_expert")

    def _routed(
        self, teacher: Any, student: Any, parts: Parts, x: Streams, routing: Routing
    ) -> None:
        """Train each routed expert on its tokens."""
        names = [name for name in parts if name.startswith(EXPERTS)]
        indices = np.array(routing.indices)
        num_experts = self.config.num_experts
        self.report.expert_tokens = np.bincount(indices.ravel(), minlength=num_experts).tolist()
        before = after = 0.0
        found: dict[str, list[Quantized]] = {name: [] for name in names}
        for expert in range(num_experts):
            at, slot = np.nonzero(indices == expert)
            own: Parts = {name: tuple(a[expert] for a in parts[name]) for name in names}  # type: ignore[misc]
            if len(at) >= MIN_EXPERT_TOKENS and names:
                weight = mx.square(routing.scores[mx.array(at), mx.array(slot)])[:, None]
                inputs = x.teacher.tokens(at), x.student.tokens(at)
                self._one_expert(teacher.mlp.switch_mlp, expert, own, *inputs, weight)
                losses = self.report.losses.pop(f"expert {expert}")
                before, after = before + losses[0], after + losses[1]
            for name in names:
                found[name].append(own[name])
        for name in names:
            words, scales, biases = (
                mx.stack(list(each)) for each in zip(*found.pop(name), strict=True)
            )
            parts[name] = words, scales, biases
            self._set_weights(student, {name: parts[name]})
            # Frees the teacher's stack, which is no longer needed.
            module_at(teacher, name).weight = module_at(student, name).weight
        self._report("experts", names, before / num_experts, after / num_experts)

    def _one_expert(
        self,
        experts: Any,
        number: int,
        parts: Parts,
        teacher_x: mx.array,
        x: mx.array,
        weight: mx.array,
    ) -> None:
        """Train an expert on the student's inputs `x [n, H]`, to give the output for `teacher_x`.

        weight: `[n, 1]`, the squared scores of the router.
        """
        teacher, student = Expert(experts, number), Expert(experts, number)
        wanted = teacher(teacher_x)
        mx.eval(x, wanted, weight)
        num_batches = -(-len(x) // EXPERT_BATCH)
        # The energy of an expert with zero weights is 0.
        energy = mx.maximum((weight * mx.square(wanted)).mean(), TINY)

        def loss(expert: Any, i: int) -> mx.array:
            # Every num_batches-th row: batches of equal length with tokens of all texts.
            rows = slice(i, None, num_batches)
            error = mx.square(expert(x[rows]) - wanted[rows])
            return (weight[rows] * error).mean() / energy

        epochs = max(round(EXPERT_STEPS / num_batches), self.schedule.epochs)
        schedule = replace(self.schedule, epochs=epochs)
        name = f"expert {number}"
        self._train(name, teacher, student, parts, [loss], "", num_batches, schedule)

    def _head(self, x: Streams, root: Any) -> Parts:
        """Train the head, unless it is tied to the embedding, on the divergence of its logits."""
        ends = self.ends

        def logits(root: Any, x: mx.array) -> mx.array:
            return root.head(root.trunk(None, embeddings=x))

        def loss(root: Any, i: int) -> mx.array:
            rows = self.batches[i]
            return divergence(logits(ends, x.teacher[rows]), logits(root, x.student[rows]))

        if self.config.tie_word_embeddings:
            return {}
        parts = self._quantize(ends, root, HEAD, lambda rows: logits(root, x.student[rows]))
        self._train("head", ends, root, parts, [loss])
        return parts

    def finish(self, teacher_x: Activations, num_tokens: int) -> None:
        """Train the whole model in memory on the divergence of its logits: scales and biases."""
        self.report, self.prefix, self.done = PartReport("whole"), "", self.num_layers - 1
        ends = self.ends
        student = Model(replace(self.config, vision=None, num_mtp_layers=0))
        student.update(ends.parameters())
        for index, layer in enumerate(student.layers):
            layer.update(self.model.layer(index).parameters())
            _allow_gradients(layer)
        parts = Parts()
        for file in sorted((self.folder / "layers").glob("*.safetensors")):
            parts |= read_parts(file)

        def loss(root: Any, i: int) -> mx.array:
            rows = self.batches[i]
            wanted = ends.head(ends.trunk(None, embeddings=teacher_x[rows]))
            return divergence(wanted, root(self.ids[rows]))

        num_batches = min(max(-(-num_tokens // BATCH_TOKENS), 1), len(self.batches))
        teacher = Weights({path: module_at(student, path).weight for path in parts})
        schedule = replace(self.schedule, epochs=FINISH_EPOCHS, rate=FINISH_RATE, codes=False)
        self._train("all", teacher, student, parts, [loss], "", num_batches, schedule)
        # Shares are reported for the training of single layers only.
        self.report.left = {}
        folder = self.folder / "finishing"
        folder.mkdir(exist_ok=True)
        self._save(folder, "whole", parts)
        folder.rename(self.folder / "finished")


def flat(x: mx.array) -> mx.array:
    """`[B, T, H]` -> `[N, H]`."""
    return x.reshape(-1, x.shape[-1])


def _allow_gradients(layer: DecoderLayer) -> None:
    if not layer.is_linear:
        # Attention in blocks evaluates each block, which is not possible in a gradient.
        layer.self_attn.max_scores_bytes = ANY_BYTES
