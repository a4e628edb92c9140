"""Trains an adapter: mlx-lm's training loop, with our loss, memory bound and resumption.

B batch, T tokens, H hidden size.
"""

import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_unflatten

from ..checkpoint.adapter import LORA, Adapter, write_adapter
from ..errors import CheckpointError, Qwen35Error, extra, first_line
from ..files import made_folder, require_space, require_writable, save_arrays, write_errors
from ..kernels.matrix import arrays_of
from ..kernels.tiers import PORTABLE, use
from ..model.adapters import DEFAULT_KEYS, EXPERT_KEYS, add_new, changes_of
from ..model.language import DecoderLayer, Model
from .examples import Example, Examples, batches

STATE_FILE = "training_state.safetensors"
# Rows of logits that the loss computes at once; with 248,320 tokens they take an eighth of a GB.
LOSS_ROWS = 128
ANY_BYTES = 2**62


@dataclass(frozen=True)
class TrainSettings:
    """All settings that change the result; the same settings and data give the same adapter."""

    num_steps: int = 1000
    batch_size: int = 4
    learning_rate: float = 1e-4
    # Longer examples are cut.
    max_tokens: int = 2048
    kind: str = LORA
    rank: int = 8
    scale: float = 20.0
    dropout: float = 0.0
    # Number of last layers to change; None: all.
    num_layers: int | None = None
    # Whether to change the routed experts too.
    experts: bool = False
    mask_prompt: bool = False
    seed: int = 0

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the changed matrices within a layer."""
        return DEFAULT_KEYS + (EXPERT_KEYS if self.experts else ())


@dataclass(frozen=True)
class Step:
    """The report of one step."""

    step: int
    loss: float
    tokens_per_s: float
    peak_bytes: int
    seconds_left: float
    # On the validation examples, after this step.
    validation_loss: float | None = None


@dataclass
class Training:
    """The training of an adapter; `run` does it, and may be called again after a stop."""

    model: Model
    settings: TrainSettings
    train: Examples
    valid: Examples | None
    folder: Path
    validate_every: int = 200
    validation_batches: int = 25
    save_every: int = 100
    # Whether a layer's activations are computed again for its gradients instead of kept.
    checkpointing: bool = True
    report: Callable[[Step], None] = lambda step: None
    history: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        s, num_all = self.settings, len(self.model.layers)
        num_layers = num_all if s.num_layers is None else s.num_layers
        if not 1 <= num_layers <= num_all:
            raise Qwen35Error(
                "no such number of layers", got=num_layers, expected=f"1 to {num_all}"
            )
        use(self.model, PORTABLE)
        mx.random.seed(s.seed)
        self.modules = add_new(
            self.model, s.keys, num_layers, s.rank, s.scale, dropout=s.dropout, kind=s.kind
        )
        for layer in self.model.layers:
            if not layer.is_linear:
                # Query blocks are evaluated one by one, which gradients do not allow.
                layer.self_attn.max_scores_bytes = ANY_BYTES
            if self.checkpointing:
                layer.__class__ = CheckpointedLayer
        self.optimizer = optim.Adam(learning_rate=s.learning_rate)
        self.optimizer.init(self.model.trainable_parameters())
        parameters = {"rank": s.rank, "scale": s.scale, "dropout": s.dropout, "keys": [*s.keys]}
        # The keys that mlx-lm reads.
        self.adapter_settings = {
            "fine_tune_type": s.kind,
            "num_layers": num_layers,
            "lora_parameters": parameters,
        }

    @property
    def step(self) -> int:
        """Steps done."""
        return self.history[-1].step if self.history else 0

    def run(self) -> list[Step]:
        """Train to the last step and write the adapter; return the steps, with earlier runs'."""
        adapter, state = self._saved()
        num_bytes = sum(a.nbytes for a in (*adapter.arrays.values(), *state.values()))
        require_space(self.folder, num_bytes, "free disk space, or choose another folder")
        with made_folder(self.folder):
            require_writable(self.folder / STATE_FILE)
            self._train()
        return self.history

    def _train(self) -> None:
        from mlx_lm.tuner.trainer import TrainingArgs, train

        start, total = self.step, self.settings.num_steps
        mx.random.seed(self.settings.seed + start)
        began = time.perf_counter()
        if not self.history:
            loss = self.validation_loss()
            self._add(Step(0, float("nan"), 0.0, 0, 0.0, loss))
        self.model.train()
        mx.reset_peak_memory()

        def on_step(info: dict[str, Any]) -> None:
            step = start + info["iteration"]
            left = (time.perf_counter() - began) / info["iteration"] * (total - step)
            is_due = step == total or step % self.validate_every == 0
            loss = self.validation_loss() if is_due else None
            speed, peak = info["tokens_per_second"], mx.get_peak_memory()
            for value in filter(None, (info["train_loss"], loss)):
                if not math.isfinite(value):
                    # Before it is saved over the last weights that are numbers.
                    raise Qwen35Error(
                        "the training diverged",
                        got=f"a loss of {value} in step {step:,}",
                        expected="a number",
                        hint="a lower --learning-rate or --scale; what was saved before is kept",
                    )
            self._add(Step(step, info["train_loss"], speed, peak, left, loss))
            if step == total or step % self.save_every == 0:
                self.save()

        with TemporaryDirectory() as unused, redirect_stdout(io.StringIO()), compiled_on_gpu():
            args = TrainingArgs(
                iters=total - start,
                steps_per_report=1,
                steps_per_save=total + 1,
                # Its own saving is not safe against a stop; `save` is.
                adapter_file=str(Path(unused) / "adapters.safetensors"),
            )
            train(
                self.model,
                self.optimizer,
                self.train.examples,
                args=args,
                loss=loss_of_batch,
                iterate_batches=lambda **unused: self._batches(start),
                training_callback=cast(Any, SimpleNamespace(on_train_loss_report=on_step)),
            )
        self.model.eval()

    def _batches(self, start: int) -> Iterator[tuple[mx.array, mx.array]]:
        s = self.settings
        return batches(self.train.examples, s.batch_size, s.seed, start)

    def _add(self, step: Step) -> None:
        self.history.append(step)
        self.report(step)

    def validation_loss(self) -> float | None:
        """The mean loss over the tokens of the first batches; None without examples."""
        if self.valid is None:
            return None
        self.model.eval()
        total, num_tokens = 0.0, 0
        limit = self.validation_batches * self.settings.batch_size
        # Always the same examples, of all lengths.
        examples: list[Example] = list(self.valid.examples[:limit])
        for batch in batches(examples, self.settings.batch_size):
            loss, count = loss_of_batch(self.model, *batch)
            total += float(loss * count)
            num_tokens += int(count)
        self.model.train()
        return total / num_tokens

    def save(self) -> None:
        """Write the adapter, and what `resume` needs."""
        adapter, state = self._saved()
        metadata = {
            "identity": json.dumps(self._identity()),
            "history": json.dumps([asdict(step) for step in self.history]),
        }
        # The state first: it holds the adapter too, so after a stop the two files need not agree.
        with write_errors(self.folder, "free disk space; --resume continues from the last save"):
            self.folder.mkdir(parents=True, exist_ok=True)
            save_arrays(self.folder / STATE_FILE, state, metadata)
            write_adapter(self.folder, adapter)

    def _saved(self) -> tuple[Adapter, dict[str, mx.array]]:
        """The adapter, and the arrays that `resume` needs."""
        adapter = Adapter(changes_of(self.model), self.adapter_settings)
        state = {f"adapter.{name}": array for name, array in adapter.arrays.items()}
        state |= {f"optimizer.{n}": a for n, a in arrays_of(self.optimizer.state).items()}
        return adapter, state

    def resume(self) -> None:
        """Continue the training that was saved in the folder."""
        file = self.folder / STATE_FILE
        if not file.is_file():
            raise CheckpointError(
                "there is no training to resume", got=f"no {file}", hint="leave out --resume"
            )
        try:
            arrays, metadata = cast(
                tuple[dict[str, mx.array], dict[str, str]], mx.load(str(file), return_metadata=True)
            )
            identity = json.loads(metadata["identity"])
            history = [Step(**step) for step in json.loads(metadata["history"])]
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} cannot be read", got=first_line(error)) from None
        now = self._identity()
        if changed := [key for key in now if identity.get(key) != now[key]]:
            raise Qwen35Error(
                "the training was started with other settings or data",
                got=", ".join(f"{key}={now[key]}" for key in changed),
                expected=", ".join(f"{key}={identity.get(key)}" for key in changed),
                hint="give the same ones, or another folder",
            )
        weights = {n.partition(".")[2]: a for n, a in arrays.items() if n.startswith("adapter.")}
        state = {n.partition(".")[2]: a for n, a in arrays.items() if n.startswith("optimizer.")}
        self.model.load_weights([*weights.items()], strict=False)
        self.optimizer.state = tree_unflatten([*state.items()])
        self.history = history

    def _identity(self) -> dict[str, Any]:
        """Everything that must not change for a resumed training, except the number of steps."""
        settings = asdict(replace(self.settings, num_steps=0))
        return {**settings, "data": self.train.digest}


class CheckpointedLayer(DecoderLayer):
    """A layer that keeps only its input, and runs again for its gradients."""

    def __call__(self, x: mx.array, *args: Any) -> mx.array:
        """As DecoderLayer."""
        return nn.utils.checkpoint(self, super().__call__)(x, *args)


def loss_of_batch(model: Model, ids: mx.array, spans: mx.array) -> tuple[mx.array, mx.array]:
    """Mean cross entropy over the tokens to learn, and their number; arguments as from `batches`.

    Only LOSS_ROWS rows of logits are in memory at a time, also for the gradients.
    """
    targets = ids[:, 1:].reshape(-1)
    places = mx.arange(1, ids.shape[1])
    mask = mx.logical_and(places >= spans[:, :1], places < spans[:, 1:]).reshape(-1)
    hidden = model.trunk(ids[:, :-1]).reshape(targets.size, -1)

    def part(rows: mx.array, targets: mx.array, mask: mx.array) -> mx.array:
        logits = model.head(rows).astype(mx.float32)
        # mx.checkpoint differentiates by all arguments, and MLX has no gradient of indices.
        losses = nn.losses.cross_entropy(logits, mx.stop_gradient(targets))
        return (losses * mask).sum()

    total = mx.array(0.0)
    for start in range(0, targets.size, LOSS_ROWS):
        rows = slice(start, start + LOSS_ROWS)
        total = total + mx.checkpoint(part)(hidden[rows], targets[rows], mask[rows])
    return total / mask.sum(), mask.sum()


@contextmanager
def compiled_on_gpu() -> Iterator[None]:
    """Disable mx.compile on a CPU, where the C++ compiler takes longer than many steps."""
    if mx.metal.is_available():
        yield
        return
    mx.disable_compile()
    try:
        yield
    finally:
        if "MLX_DISABLE_COMPILE" not in os.environ:
            mx.enable_compile()


def require_trainer() -> None:
    """Raise Qwen35Error if mlx-lm, whose training loop is used, is not installed."""
    with extra("train", "training needs mlx-lm"):
        import mlx_lm.tuner.trainer  # noqa: F401
