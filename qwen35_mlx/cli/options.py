"""What the commands share: options with their help and checks, and how a mistake is told."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import Qwen35Error
from ..quantization import BITS, GROUP_SIZES


@contextmanager
def user_errors() -> Iterator[None]:
    """Print a user's mistake without a traceback and exit 1; Ctrl-C exits 130."""
    try:
        yield
    except BrokenPipeError:
        # The reader of a pipe went away: typer exits without a word.
        raise
    except (Qwen35Error, OSError) as error:
        from .terminal import print_error

        print_error(error)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def one_of(*allowed: object) -> Callable[[Any], Any]:
    """A check of an option's value."""

    def check(value: Any) -> Any:
        if value is not None and value not in allowed:
            raise typer.BadParameter(f"{value} is not one of {', '.join(map(str, allowed))}.")
        return value

    return check


Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a hub id; main if unset.")
]
Bits = Annotated[
    int | None,
    typer.Option(
        callback=one_of(*BITS),
        help="2, 3, 4, 5, 6 or 8 bits; 4 unless --dtype is given.",
    ),
]
GroupSize = Annotated[
    int,
    typer.Option(callback=one_of(*GROUP_SIZES), help="Weights that share a scale: 32, 64 or 128."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        callback=one_of("bfloat16", "float16", "float32"),
        help="bfloat16, float16 or float32. Alone: do not quantize; "
        "with --bits: type of scales, norms and the rest. The source's if unset.",
    ),
]
RecipeName = Annotated[
    str | None, typer.Option("--recipe", help="Mixed bits by kind of tensor: q8 q6 q5 q4 q3 q2.")
]
Fit = Annotated[
    str | None,
    typer.Option(metavar="MEMORY", help="Best bits that fit a Mac of this memory, such as 192GB."),
]
BitsPerWeight = Annotated[
    float | None, typer.Option(min=0, max=32, help="Best bits of this average, scales included.")
]
Prefer = Annotated[
    str, typer.Option(callback=one_of("quality", "speed"), help="With --fit: quality or speed.")
]
Context = Annotated[
    int | None,
    typer.Option(min=1, help="With --fit: tokens that have to fit beside; 32,768 if unset."),
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option("--calibration", metavar="FILE", help="What an earlier --calibrate found out."),
]
TextFile = Annotated[
    Path | None, typer.Option("--text", metavar="FILE", help="Text to run; the bundled if unset.")
]
Thinking = Annotated[
    bool | None,
    typer.Option(
        "--think/--no-think", help="Think before answering; the model's default if unset."
    ),
]
System = Annotated[str | None, typer.Option(help="System prompt.")]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Longest answer, thought included; 32,768 if unset.")
]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.")]
TopP = Annotated[float | None, typer.Option(help="Nucleus sampling; 1 is off.")]
TopK = Annotated[int | None, typer.Option(help="Only the k likeliest tokens; 0 is off.")]
MinP = Annotated[float | None, typer.Option(help="Least probability, relative to the best.")]
Presence = Annotated[
    float | None, typer.Option(help="Subtracted from the logits of tokens already in the answer.")
]
Repetition = Annotated[
    float | None, typer.Option(help="Divides the logits of tokens already in the text; 1 is off.")
]
Kernels = Annotated[
    str,
    typer.Option(
        callback=one_of("auto", "ops", "metal"),
        help="Metal kernels: auto runs those that doctor found faster, metal all, ops none.",
    ),
]
Seed = Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Draw the same answer again.")]
