"""Trains the quantized weights of one layer after another to give what the source's layer gives."""

# B texts, T tokens, H hidden, N = B * T, E experts, K experts per token.

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qwen35_mlx.files import replacing, save_arrays
from qwen35_mlx.kernels.grouped_expert_matmul import expert_mlp
from qwen35_mlx.kernels.router import Routing, route
from qwen35_mlx.model.language import DecoderLayer, Model
from qwen35_mlx.quant.latent import Latent, Loss, Schedule, dequantized, train
from qwen35_mlx.quant.packing import Quantized
from qwen35_mlx.quant.statistics import Calibration

from . import activations
from .activations import Activations
from .calibrate import collecting
from .distilled import KINDS, MIN_EXPERT_TOKENS, Distillation, PartReport
from .goals import TINY, divergence, goal, relative_error, router_loss
from .layerwise import LAYER, TRUNK, Layerwise, SourceCheckpoint, matrices
from .modules import EXPERTS, Expert, Parts, Weights, module_at, read_parts
from .plan import Plan
from .transform import MLX_DTYPES, quantize_rows

# Of a step, and of a step of one expert.
BATCH_TOKENS, EXPERT_BATCH = 1024, 256
# Steps of an expert, whose tokens are few.
EXPERT_STEPS = 200
# Of the whole model: passes over the text, and how far scales and biases move in a step.
FINISH_EPOCHS, FINISH_RATE = 2, 0.002
ANY_BYTES = 2**62
# Activations of a text that a layer's training holds, and the bytes of each number at most.
HELD, DTYPE_BYTES = 9, 4
EMBEDDING, HEAD = TRUNK + "embed_tokens", "language_model.lm_head"


def distill(planned: Plan, distillation: Distillation, folder: Path) -> list[PartReport]:
    """Write the quantized matrices of `planned`, trained, into `folder` for `Distilled`.

    A layer reads what the quantized layers before it give, starts from error feedback for these
    inputs, and is trained to give what the source's layer gives from the source's activations.
    Holds one layer of the source, its quantized copy, its Hessians, and HELD times N * H
    activations, or has these on disk; routed experts are trained one at a time. With
    `finish_tokens` the whole model is then trained on the divergence of its logits.
    A second call goes on behind the last layer that was written, bit for bit.
    """
    (folder / "layers").mkdir(parents=True, exist_ok=True)
    distiller = _Distiller(planned, distillation, folder)
    seen = distiller.run_layers()
    if distillation.finish_tokens and not (folder / "finished").exists():
        distiller.finish(seen, distillation.finish_tokens)
    distillation.progress(distiller.num_layers, distiller.num_layers, "done")
    files = [f for part in ("layers", "finished") for f in sorted((folder / part).glob("*.json"))]
    return [PartReport(**json.loads(file.read_text("utf-8"))) for file in files]


class _Distiller:
    def __init__(self, planned: Plan, distillation: Distillation, folder: Path):
        self.folder = folder
        self.ids, self.schedule = distillation.ids, distillation.schedule
        self.progress = distillation.progress
        self.entries = {e.module: e for e in planned.text_entries if e.method == "gptq"}
        self.model = Layerwise(SourceCheckpoint(planned.source.folder))
        self.num_layers = self.model.config.num_hidden_layers
        self.per_token = self.model.config.num_experts_per_tok
        at_once = max(BATCH_TOKENS // self.ids.shape[1], 1)
        self.batches = [slice(i, i + at_once) for i in range(0, len(self.ids), at_once)]
        self.report, self.prefix = PartReport(""), ""
        self.done = 0
        held = HELD * self.ids.size * self.model.config.hidden_size * DTYPE_BYTES
        self.spill = folder if held > distillation.activations_bytes else None

    def run_layers(self) -> Activations:
        """Train layer after layer, then the head; returns the source's last activations."""
        found = [i for i in range(self.num_layers + 1) if self._streams(i).exists()]
        if not found:
            ends = Model(self.model.ends.config)

            def quantize(root: Any) -> Parts:
                return self._start(self.model.ends, root, EMBEDDING)

            self._trained(self.model.ends, ends, "", "embedding", quantize)
            # Activations of the source, and of what is quantized so far.
            streams = (
                self._joined(
                    root.language_model.model.embed_tokens(self.ids[b]) for b in self.batches
                )
                for root in (self.model.ends, ends)
            )
            self._save_streams(0, *streams)
            found = [0]
        loaded = activations.load(self._streams(found[-1]), self.spill is not None)
        seen, own = loaded["seen"], loaded["own"]
        for index in range(found[-1], self.num_layers):
            self.done = index
            seen, own = self._layer(index, seen, own)
            self._save_streams(index + 1, seen, own)

        def train_head(root: Any) -> Parts:
            return self._head(root, seen, own)

        self._trained(self.model.ends, Model(self.model.ends.config), "", "head", train_head)
        return seen

    def _streams(self, index: int) -> Path:
        return self.folder / f"streams-{index:03}.safetensors"

    def _save_streams(self, index: int, seen: Activations, own: Activations) -> None:
        activations.save(self._streams(index), {"seen": seen, "own": own}, self.batches)
        if index:
            self._streams(index - 1).unlink()

    def _layer(
        self, index: int, seen: Activations, own: Activations
    ) -> tuple[Activations, Activations]:
        """Train a layer; activations `[B, T, H]` behind it, of the source's and of the trained."""
        teacher, student = (
            self.model.layer(index),
            DecoderLayer(self.model.config, self.model.config.layer_types[index]),
        )
        _let_gradients_pass(teacher)
        _let_gradients_pass(student)
        mask = None if teacher.is_linear else "causal"

        def attend(layer: DecoderLayer, x: mx.array) -> mx.array:
            return layer.attend(x, mask, None, None)

        def feed(layer: DecoderLayer, x: mx.array) -> mx.array:
            return layer.mlp(x, layer.post_attention_layernorm)

        seen_middle = self._run(attend, teacher, seen)
        seen_out = self._run(feed, teacher, seen_middle)

        def train_parts(root: DecoderLayer) -> Parts:
            inner = "linear_attn." if teacher.is_linear else "self_attn."
            parts = self._start(teacher, root, inner, lambda rows: attend(root, own[rows]))
            losses = [goal(attend, x, seen_middle, self.batches) for x in (own, seen)]
            self._train("attention", teacher, root, parts, list(parts), *losses)
            middle = self._run(attend, root, own)
            of_mlp = self._start(teacher, root, "mlp.", lambda rows: feed(root, middle[rows]))
            if self.model.config.is_moe:
                self._experts(teacher, root, of_mlp, seen_middle, middle, seen_out)
            else:
                losses = [goal(feed, x, seen_out, self.batches) for x in (middle, seen_middle)]
                self._train("feed-forward", teacher, root, of_mlp, list(of_mlp), *losses)
            return parts | of_mlp

        prefix = LAYER.format(index)
        self._trained(teacher, student, prefix, f"layer-{index:03}", train_parts)
        return seen_out, self._run(feed, student, self._run(attend, student, own))

    def _trained(
        self,
        teacher: Any,
        student: Any,
        prefix: str,
        name: str,
        train_parts: Callable[[Any], Parts],
    ) -> None:
        """Give the student the weights of the teacher, quantized and trained, or as stored."""
        student.update(teacher.parameters())
        file = self.folder / "layers" / f"{name}.safetensors"
        if file.exists():
            self._put(
                student, {path.removeprefix(prefix): p for path, p in read_parts(file).items()}
            )
            return
        self.report, self.prefix = PartReport(name), prefix
        parts = train_parts(student)
        self._save(self.folder / "layers", name, {prefix + path: p for path, p in parts.items()})

    def _start(
        self,
        teacher: Any,
        student: Any,
        within: str,
        run: Callable[[slice], mx.array] | None = None,
    ) -> Parts:
        """Quantize the matrices whose paths begin so, for their inputs in `run` of each batch."""
        statistics = Calibration("", "", "", self.ids.size)
        if run is not None:
            parent, num_experts = within.rpartition(".")[0], self.model.config.num_experts
            root, prefix = module_at(student, parent), f"{self.prefix}{parent}."
            with collecting(root, prefix, num_experts, hessians=True) as moments:
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
        # Experts come one at a time: until then the student shares the teacher's stacks.
        self._put(student, {n: p for n, p in parts.items() if not n.startswith(EXPERTS)})
        return parts

    def _save(self, folder: Path, name: str, parts: Parts) -> None:
        # The report first: where the weights are, it is too.
        with replacing(folder / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(asdict(self.report)), "utf-8")
        arrays = {
            f"{path}.{kind}": array
            for path, found in parts.items()
            for kind, array in zip(KINDS, found, strict=True)
        }
        save_arrays(folder / f"{name}.safetensors", arrays, {})

    def _put(self, root: Any, parts: Parts) -> None:
        """Dequantized, as the converted model will have them."""
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
        names: Iterable[str],
        *losses: Callable[[Any, int], mx.array],
        num_batches: int = 0,
        schedule: Schedule | None = None,
    ) -> None:
        """Train the matrices of these names, from the teacher's; in `parts` and in `student`.

        A second loss is that from the source's own activations.
        """
        modules = {name: module_at(student, name) for name in names}
        if not modules:
            return
        latents = {n: Latent(parts[n], module_at(teacher, n).weight) for n in modules}

        def with_weights(loss: Callable[[Any, int], mx.array]) -> Loss:
            def of_batch(weights: Mapping[str, mx.array], batch: int) -> mx.array:
                for name, weight in weights.items():
                    modules[name].weight = weight
                return loss(student, batch)

            return of_batch

        trained = train(
            latents,
            [with_weights(loss) for loss in losses],
            num_batches or len(self.batches),
            schedule or self.schedule,
            lambda step, total, value: self.progress(
                self.done, self.num_layers, f"{part} {step}/{total}, loss {value:.3g}"
            ),
        )
        parts |= trained.parts
        mx.eval(trained.parts)
        self._put(student, trained.parts)
        self.report.losses[part] = trained.before, trained.after
        share = round(trained.after / trained.before, 4) if trained.before else 1.0
        self.report.left |= {self.prefix + name: share for name in latents}
        mx.clear_cache()

    def _experts(
        self,
        teacher: Any,
        student: Any,
        parts: Parts,
        seen: Activations,
        own: Activations,
        goal: Activations,
    ) -> None:
        """Train router, routed experts, then the shared one; activations amid the layer."""

        def norm(layer: DecoderLayer, x: mx.array) -> mx.array:
            return layer.post_attention_layernorm(x)

        seen_rows, rows = self._run(norm, teacher, seen), self._run(norm, student, own)
        wanted = self._run(lambda layer, x: layer.mlp.gate(x), teacher, seen_rows)
        gate = [name for name in parts if name == "mlp.gate"]
        self._train(
            "router",
            teacher,
            student,
            parts,
            gate,
            lambda root, i: router_loss(
                root.mlp.gate(rows[self.batches[i]]), wanted[self.batches[i]], self.per_token
            ),
        )
        mlp, found, missed = student.mlp, [], 0.0
        for batch in self.batches:
            x, of_teacher = (flat(each[batch]) for each in (rows, wanted))
            found.append(route(mlp.gate(x), mlp.shared_expert_gate(x), self.per_token))
            chosen = route(of_teacher, found[-1].shared_scores, self.per_token).indices
            miss = (chosen[..., None] != found[-1].indices[:, None]).all(axis=-1)
            mx.eval(found[-1], miss)
            missed += float(miss.sum()) / self.ids.size / self.per_token
        self.report.flips = round(missed, 6)
        routing = Routing(*(mx.concatenate(list(each)) for each in zip(*found, strict=True)))
        self._routed(teacher, student, parts, seen_rows, rows, routing)

        def with_routed() -> Iterator[mx.array]:
            for batch, (indices, scores, _) in zip(self.batches, found, strict=True):
                x = own[batch]
                out = expert_mlp(flat(rows[batch]), indices, scores, mlp.switch_mlp)
                yield x + out.reshape(x.shape)

        fixed = self._joined(with_routed())

        def with_shared(root: Any, i: int) -> mx.array:
            x, shared = rows[self.batches[i]], root.mlp.shared_expert
            out = shared.down_proj(nn.silu(shared.gate_proj(x)) * shared.up_proj(x))
            out = fixed[self.batches[i]] + mx.sigmoid(root.mlp.shared_expert_gate(x)) * out
            return relative_error(out, goal[self.batches[i]])

        names = [name for name in parts if name.startswith("mlp.shared_expert")]
        self._train("shared expert", teacher, student, parts, names, with_shared)

    def _routed(
        self,
        teacher: Any,
        student: Any,
        parts: Parts,
        seen: Activations,
        own: Activations,
        routing: Routing,
    ) -> None:
        """Train each expert on the tokens that go to it."""
        names = [name for name in parts if name.startswith(EXPERTS)]
        indices = np.array(routing.indices)
        num_experts = self.model.config.num_experts
        self.report.expert_tokens = np.bincount(indices.ravel(), minlength=num_experts).tolist()
        before = after = 0.0
        found: dict[str, list[Quantized]] = {name: [] for name in names}
        for expert in range(num_experts):
            at, slot = np.nonzero(indices == expert)
            mine: Parts = {name: tuple(a[expert] for a in parts[name]) for name in names}  # type: ignore[misc]
            if len(at) >= MIN_EXPERT_TOKENS and names:
                tokens = mx.array(at)
                weight = mx.square(routing.scores[tokens, mx.array(slot)])[:, None]
                inputs = seen.tokens(at), own.tokens(at)
                self._one_expert(teacher.mlp.switch_mlp, expert, mine, *inputs, weight)
                losses = self.report.losses.pop(f"expert {expert}")
                before, after = before + losses[0], after + losses[1]
            for name in names:
                found[name].append(mine[name])
        for name in names:
            words, scales, biases = (
                mx.stack(list(each)) for each in zip(*found.pop(name), strict=True)
            )
            parts[name] = words, scales, biases
            self._put(student, {name: parts[name]})
            # Needed no more, and half of the layer.
            module_at(teacher, name).weight = module_at(student, name).weight
        self.report.losses["experts"] = before / num_experts, after / num_experts
        share = round(after / before, 4) if before else 1.0
        self.report.left |= {self.prefix + name: share for name in names}

    def _one_expert(
        self,
        experts: Any,
        number: int,
        mine: Parts,
        seen: mx.array,
        x: mx.array,
        weight: mx.array,
    ) -> None:
        original, root = Expert(experts, number), Expert(experts, number)
        goal = original(seen)
        mx.eval(x, goal, weight)
        num_batches = -(-len(x) // EXPERT_BATCH)
        # An expert of zeros has none.
        energy = mx.maximum((weight * mx.square(goal)).mean(), TINY)

        def loss(expert: Any, i: int) -> mx.array:
            # Every so-manieth row, so that batches are equally long and mixed.
            lost = mx.square(expert(x[i::num_batches]) - goal[i::num_batches])
            return (weight[i::num_batches] * lost).mean() / energy

        epochs = max(round(EXPERT_STEPS / num_batches), self.schedule.epochs)
        schedule = replace(self.schedule, epochs=epochs)
        name = f"expert {number}"
        self._train(
            name, original, root, mine, list(mine), loss, num_batches=num_batches, schedule=schedule
        )

    def _head(self, root: Any, seen: Activations, own: Activations) -> Parts:
        """Train the head, if it is no embedding too, on the divergence of its logits."""
        ends = self.model.ends

        def logits(root: Any, x: mx.array) -> mx.array:
            return root.head(root.trunk(None, embeddings=x))

        def loss(root: Any, i: int) -> mx.array:
            rows = self.batches[i]
            return divergence(logits(ends, seen[rows]), logits(root, own[rows]))

        if self.model.config.tie_word_embeddings:
            return {}
        parts = self._start(ends, root, HEAD, lambda rows: logits(root, own[rows]))
        self._train("head", ends, root, parts, list(parts), loss)
        return parts

    def finish(self, seen: Activations, num_tokens: int) -> None:
        """Train all matrices at once on the divergence of the logits, with the model in memory."""
        self.report, self.prefix, self.done = PartReport("whole"), "", self.num_layers - 1
        ends = self.model.ends
        student = Model(replace(self.model.config, vision=None, num_mtp_layers=0))
        student.update(ends.parameters())
        for index, layer in enumerate(student.layers):
            layer.update(self.model.layer(index).parameters())
            _let_gradients_pass(layer)
        parts = Parts()
        for file in sorted((self.folder / "layers").glob("*.safetensors")):
            parts |= read_parts(file)

        def loss(root: Any, i: int) -> mx.array:
            rows = self.batches[i]
            wanted = ends.head(ends.trunk(None, embeddings=seen[rows]))
            return divergence(wanted, root(self.ids[rows]))

        num_batches = -(-num_tokens // BATCH_TOKENS)
        num_batches = min(max(num_batches, 1), len(self.batches))
        teacher = Weights({path: module_at(student, path).weight for path in parts})
        schedule = replace(self.schedule, epochs=FINISH_EPOCHS, rate=FINISH_RATE, codes=False)
        names = list(parts)
        self._train(
            "all", teacher, student, parts, names, loss, num_batches=num_batches, schedule=schedule
        )
        # Of the layers alone: this is of all modules together.
        self.report.left = {}
        folder = self.folder / "finishing"
        folder.mkdir(exist_ok=True)
        self._save(folder, "whole", parts)
        folder.rename(self.folder / "finished")


def flat(x: mx.array) -> mx.array:
    """`[B, T, H]` -> `[N, H]`."""
    return x.reshape(-1, x.shape[-1])


def _let_gradients_pass(layer: DecoderLayer) -> None:
    if not layer.is_linear:
        # Blocks of queries are evaluated one by one, which no gradient allows.
        layer.self_attn.max_scores_bytes = ANY_BYTES
