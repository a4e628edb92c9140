"""The commands train and fuse, for adapters."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import Qwen35Error
from . import options


def train(
    ctx: typer.Context,
    model: options.Model,
    data: Annotated[Path, typer.Option(metavar="DIR")],
    adapter_path: Annotated[Path, typer.Option(metavar="DIR")] = Path("adapters"),
    steps: Annotated[int, typer.Option(min=1)] = 1000,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    learning_rate: Annotated[float, typer.Option(min=0, max=1)] = 1e-4,
    max_tokens: Annotated[int, typer.Option(min=2)] = 2048,
    dora: bool = False,
    rank: Annotated[int, typer.Option(min=1)] = 8,
    scale: float = 20.0,
    dropout: Annotated[float, typer.Option(min=0, max=0.99)] = 0.0,
    num_layers: Annotated[int | None, typer.Option(min=1)] = None,
    experts: bool = False,
    mask_prompt: bool = False,
    validate_every: Annotated[int, typer.Option(min=1)] = 200,
    validation_batches: Annotated[int, typer.Option(min=1)] = 25,
    save_every: Annotated[int, typer.Option(min=1)] = 100,
    resume: bool = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    png: Annotated[Path | None, typer.Option(metavar="FILE")] = None,
    revision: options.Revision = None,
    force: bool = False,
) -> None:
    """Train an adapter for a converted model, with mlx-lm's trainer.

    The model's own weights, its MTP layer and its vision tower stay as they are. generate, chat,
    serve, evaluate and fidelity take the adapter with --adapter-path, and so does mlx-lm.

    Args:
        data: Folder with train.jsonl and, to validate, valid.jsonl. A line holds messages, a prompt
            and a completion, or a text, as mlx-lm reads them.
        adapter_path: Folder to write the adapter to.
        steps: Number of steps, one batch each.
        batch_size: Number of examples in a batch.
        learning_rate: Learning rate of Adam.
        max_tokens: Cut examples that are longer than this.
        dora: Train DoRA, slower than LoRA and often better at a low rank.
        rank: Rank of the adapter's matrices.
        scale: Factor on the adapter's output.
        dropout: Dropout on the adapter's input.
        num_layers: Adapt only this number of layers, the last ones. Default: all.
        experts: Adapt the routed experts too, each by itself. Default: attention of both kinds and
            the shared expert, or the dense feed-forward.
        mask_prompt: Train on the last answer alone. Default: on all tokens.
        validate_every: Steps between validations; there is one before the first step and one after
            the last.
        validation_batches: Maximum number of batches of valid.jsonl in a validation.
        save_every: Steps between saves.
        resume: Continue from the last save in the adapter's folder, to the same result as without a
            stop. Settings and data must be the same, except --steps.
        seed: Seed of the adapter's first weights and of the order of batches.
        png: Also draw the losses as a PNG. Default: text alone.
        force: Train even if the estimate does not fit in memory.
    """
    from ..checkpoint.adapter import DORA, LORA, WEIGHTS_FILE
    from ..training.estimate import open_for_training, read_weights, require_memory
    from ..training.examples import TRAIN_FILE, VALID_FILE, read_examples
    from ..training.trainer import Step, Training, TrainSettings, require_trainer
    from .progress import spinner, step_progress
    from .report import print_lines
    from .terminal import note

    require_trainer()
    if not resume and (adapter_path / WEIGHTS_FILE).exists():
        raise Qwen35Error(
            f"{adapter_path} has an adapter already",
            hint="name another folder, or continue its training with --resume",
        )
    names = TrainSettings.__dataclass_fields__
    given = {name: value for name, value in ctx.params.items() if name in names}
    settings = TrainSettings(num_steps=steps, kind=DORA if dora else LORA, **given)
    with spinner(f"Opening {model}"):
        opened, tokenizer, weight_bytes = open_for_training(model, revision)
        reading: Any = dict(tokenizer=tokenizer, max_tokens=max_tokens, mask_prompt=mask_prompt)
        examples = read_examples(data / TRAIN_FILE, **reading)
        valid_file = data / VALID_FILE
        valid = read_examples(valid_file, **reading) if valid_file.exists() else None
    note(
        f"{len(examples.examples):,} examples of {examples.num_tokens:,} tokens, the longest "
        f"{examples.longest:,}; "
        + (f"{len(valid.examples):,} to validate" if valid else f"no {VALID_FILE}: no validation")
    )
    if examples.num_cut:
        note(
            f"{examples.num_cut:,} examples are longer than --max-tokens and were cut, "
            f"{examples.num_dropped:,} of them have nothing left to learn"
        )
    counted = require_memory(opened, weight_bytes, settings, examples.longest, force)
    note(f"memory: about {counted.total / 1e9:,.2f} GB")
    for name, num_bytes in counted.lines().items():
        note(f"  {name:42} {num_bytes / 1e9:9.3f} GB")
    training = Training(
        opened,
        settings=settings,
        train=examples,
        valid=valid,
        folder=adapter_path,
        validate_every=validate_every,
        validation_batches=validation_batches,
        save_every=save_every,
        checkpointing=counted.checkpointing,
    )
    if resume:
        training.resume()
        note(f"continuing after step {training.step:,}")
    if training.step >= steps:
        raise Qwen35Error(
            "the training is complete", got=f"{training.step:,} steps", hint="give more --steps"
        )
    with spinner(f"Loading {model}"):
        read_weights(opened)
    with step_progress("Training") as progress:

        def report(step: Step) -> None:
            if step.validation_loss is not None:
                note(f"step {step.step:,}: validation loss {step.validation_loss:.3f}")
            if step.step:
                progress(step.step - 1, steps, step_text(step))

        training.report = report
        history = training.run()
    validated = [step for step in history if step.validation_loss is not None]
    losses = [f"{step.validation_loss:.3f} after step {step.step:,}" for step in validated]
    print_lines(
        [
            *(f"validation loss {text}" for text in losses[:1] + losses[1:][-1:]),
            f"peak memory {max(step.peak_bytes for step in history) / 1e9:.3f} GB",
            f"adapter written to {adapter_path}",
        ]
    )
    # Last, because the adapter is written even if this file cannot be.
    if png:
        draw(history, png)


def step_text(step: Any) -> str:
    """Loss, speed, memory and time left, for the progress line."""
    minutes, seconds = divmod(round(step.seconds_left), 60)
    left = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes}:{seconds:02}"
    return (
        f"loss {step.loss:.3f}, {step.tokens_per_s:,.0f} tokens/s, "
        f"{step.peak_bytes / 1e9:.2f} GB, {left} left"
    )


def draw(history: list[Any], file: Path) -> None:
    """Draw losses and speed over the steps as a PNG."""
    from ..convert.plots import picture

    steps = [step for step in history if step.step]
    validated = [step for step in history if step.validation_loss is not None]
    with picture(file, (11, 4)) as (_, left, right):
        left.plot([s.step for s in steps], [s.loss for s in steps], label="training")
        left.plot(
            [s.step for s in validated],
            [s.validation_loss for s in validated],
            "o-",
            label="validation",
        )
        left.set(xlabel="step", ylabel="loss, nats a token", ylim=(0, None))
        left.legend()
        right.plot([s.step for s in steps], [s.tokens_per_s for s in steps])
        right.set(xlabel="step", ylabel="tokens/s", ylim=(0, None))


def fuse(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SRC")],
    out: Annotated[Path, typer.Argument(metavar="OUT")],
    adapter_path: Annotated[Path, typer.Option(metavar="DIR")],
    quantization: options.Quantization,
    revision: options.Revision = None,
) -> None:
    """Convert a checkpoint with an adapter added to its weights.

    The adapter is added in full precision before anything is quantized, because in weights of few
    bits most of it would be lost to rounding. The MTP layer and the vision tower are kept.

    Args:
        source: Folder or hub id of the checkpoint that the model was converted from.
        out: Folder to create.
        adapter_path: Folder of the adapter, of train or mlx-lm.
    """
    from ..checkpoint.adapter import read_adapter
    from ..convert.job import refuse_existing
    from .convert_commands import convert_as_asked

    refuse_existing(out)
    adapter = read_adapter(adapter_path)
    convert_as_asked(ctx, source, out, "Fusing {} and the adapter", adapter=adapter)
