"""The command evaluate: tasks of lm-evaluation-harness, or the perplexity of a text."""

import json
import math
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import Qwen35Error, extra
from ..files import require_writable
from . import options


def evaluate(
    model: options.Model,
    tasks: Annotated[str | None, typer.Option(metavar="NAMES")] = None,
    text: options.TextFile = None,
    include_path: Annotated[Path | None, typer.Option(metavar="DIR")] = None,
    limit: Annotated[int | None, typer.Option(min=1)] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0)] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    chat_template: bool = False,
    think: options.Thinking = None,
    window: Annotated[int, typer.Option(min=2)] = 2048,
    stride: Annotated[int | None, typer.Option(min=1)] = None,
    out: Annotated[Path, typer.Option(metavar="FILE")] = Path("evaluation.json"),
    adapter_path: options.AdapterPath = None,
    kernels: options.Kernels = "auto",
) -> None:
    """Measure what a model can, with tasks or on a text.

    Reads the common beginning of prompts once. Writes the harness's JSON and prints its table.

    Args:
        tasks: Tasks of lm-evaluation-harness, with commas between them, such as mmlu,gsm8k.
            Default: the perplexity of a text.
        include_path: Folder with tasks of your own in YAML. It may name Python files, which are
            run. Default: the harness's tasks alone.
        limit: Only the first items of each task. Default: all.
        num_fewshot: Examples in front of each item. Default: as the task says.
        batch_size: Number of answers that are generated together.
        chat_template: Put each prompt into the model's chat template. Default: as plain text.
        window: Length in tokens of the parts of the text that the model reads.
        stride: Tokens between the starts of two windows; with fewer, each token has more text
            before it. Default: the window.
        out: File for the results. Until it is written, answers are kept in FILE.partial, and the
            same command continues after a stop.
    """
    if out.exists():
        raise Qwen35Error(f"{out} exists already", hint="name another file with --out")
    if not out.parent.is_dir():
        # Now, not after hours.
        raise Qwen35Error(f"no folder for {out.name}", got=out.parent, hint="make it, or --out")
    require_writable(out)
    if tasks:
        # No progress bars of the harness beside ours.
        os.environ |= {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        with extra("eval", "lm-evaluation-harness is not installed"):
            from ..evaluation.harness import evaluate as run
    from ..convert.calibration_text import (
        CONVERSATIONS,
        HELD_OUT_FILE,
        conversation_ids,
        read_text,
    )
    from ..files import write_json
    from ..model.loading import load
    from .progress import spinner, step_progress

    file = text or HELD_OUT_FILE
    given = "" if tasks else read_text(file)
    with spinner(f"Loading {model}"):
        loaded, tokenizer = load(model, kernels=kernels, mtp=False, adapter=adapter_path)
    result: dict[str, Any]
    if tasks is None:
        from ..evaluation.scoring import perplexity

        if file.suffix == CONVERSATIONS:
            ids = conversation_ids(tokenizer, file)
            given = tokenizer.decode(ids)
        else:
            ids = tokenizer.encode(given, add_special_tokens=False)
        with step_progress("Reading the text") as progress:
            result = perplexity(
                loaded,
                ids,
                window=min(window, loaded.config.context_length),
                stride=stride,
                progress=lambda done, total: progress(done, total, f"window {done + 1:,}"),
            )
        bits = result["nll_nats_per_token"] * result["num_tokens"] / math.log(2)
        result |= {"text": file.name, "bits_per_byte": bits / len(given.encode())}
        table = "\n".join(f"{key:20} {value}" for key, value in result.items())
    else:
        partial = out.with_name(f"{out.name}.partial")
        with step_progress("Evaluating") as progress:
            result, table = run(
                loaded,
                tokenizer,
                tasks.split(","),
                name=Path(model).name,
                include_path=include_path,
                journal=partial,
                batch_size=batch_size,
                limit=limit,
                num_fewshot=num_fewshot,
                chat_template=chat_template,
                enable_thinking=think,
                progress=progress,
            )
    write_json(out, result)
    if tasks:
        partial.unlink(missing_ok=True)
    print(table)
    print(json.dumps({"out": str(out)}), flush=True)
