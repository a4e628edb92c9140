"""Options that several commands share, with their help."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import Qwen35Error
from . import completion

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", autocompletion=completion.models, help="Converted folder, or hub id."
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a model on the hub. Default: main."),
]
Bits = Annotated[
    Literal[2, 3, 4, 5, 6, 8] | None,
    typer.Option(help="Bits of each weight. Default: 4; unquantized if --dtype is given alone."),
]
GroupSize = Annotated[
    Literal[32, 64, 128], typer.Option(help="Number of weights that share a scale.")
]
Dtype = Annotated[
    Literal["bfloat16", "float16", "float32"] | None,
    typer.Option(
        help="Type of scales, norms and all that is not quantized. Alone: quantize nothing. "
        "Default: the type in SRC."
    ),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        autocompletion=completion.recipes,
        help="Mixed bits by kind of tensor: q8, q6, q5, q4, q3 or q2.",
    ),
]
Fit = Annotated[
    str | None,
    typer.Option(
        metavar="MEMORY",
        help="Choose the bits of each tensor so that the model fits a Mac with this memory, "
        "such as 192GB.",
    ),
]
BitsPerWeight = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=32,
        help="Choose the bits of each tensor to average this many per weight, scales included.",
    ),
]
Prefer = Annotated[
    Literal["quality", "speed"] | None,
    typer.Option(
        help="With --fit or --bits-per-weight. quality: the lowest error. speed: fewer bytes "
        "read per token, for more error. Default: quality."
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Context length in tokens that must also fit in memory. Default: 32768, or the "
        "model's context length if that is less.",
    ),
]
_RUN_CONTEXT = (
    "Maximum tokens of prompt and answers together. Their memory is counted before the weights are "
    "read. More than the model was trained for, up to 4 times as many, are reached by YaRN; "
    "shorter texts are then read less well. Default: all that fits, 32768 at least."
)
RunContext = Annotated[int | None, typer.Option("--context", min=1, help=_RUN_CONTEXT)]
MaxContext = Annotated[int | None, typer.Option(min=1, help=_RUN_CONTEXT)]
KvBits = Annotated[
    Literal["auto", "16", "8", "k8v4"],
    typer.Option(
        help="Bits of keys and values, the part of memory that grows with the text. k8v4: 8 for "
        "keys, 4 for values; less exact. auto: 16, or 8 where 16 do not fit."
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Load a model that does not fit in memory. Default: refuse it, with the numbers.",
    ),
]
ExpertsMemory = Annotated[
    str | None,
    typer.Option(
        metavar="MEMORY",
        help="Keep experts in this much memory, such as 80GB, and read others from disk when a "
        "token needs them. Default: all experts; if they do not fit, as many as do.",
    ),
]
ExpertsLayout = Annotated[
    Literal["stacked", "disk"],
    typer.Option(
        help="Where the matrices of an expert lie. stacked: in the stacks of all experts, as "
        "mlx-lm reads them. disk: side by side, so that --experts-memory reads them at once."
    ),
]
AdapterPath = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder of an adapter, of `qwen35-mlx train` or mlx-lm. Default: no adapter.",
    ),
]
NamedAdapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter-path",
        metavar="NAME=DIR",
        help="An adapter that requests may name: the model MODEL:NAME, or the field adapters. "
        "Repeat the option for several. Default: none.",
    ),
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        "--calibration", metavar="FILE", help="Calibration data from an earlier --calibrate."
    ),
]
TextFile = Annotated[
    Path | None,
    typer.Option(
        "--text", metavar="FILE", help="Text to run. Default: a text that comes with the program."
    ),
]
CalibrationText = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Text for --calibrate and --method distill: plain, or .jsonl with lines of "
        "conversations as for training. Default: a text that comes with the program.",
    ),
]
FinishTokens = Annotated[
    int,
    typer.Option(
        min=0,
        help="With --method distill: then train all layers at once on so many tokens of the text, "
        "which holds the whole model in memory. Default: no such training.",
    ),
]
Thinking = Annotated[
    bool | None,
    typer.Option(
        "--think/--no-think",
        help="Whether to think before the answer. Default: as the model's chat template says.",
    ),
]
System = Annotated[str | None, typer.Option(help="System prompt. Default: none.")]
MaxTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Maximum length of an answer, thought included. Default: 32768."),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        help="Randomness of sampling. 0 takes the most likely token; then --seed, --top-p, "
        "--top-k and --min-p change nothing."
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(help="Sample from the likeliest tokens that reach this probability. 1: off."),
]
TopK = Annotated[
    int | None, typer.Option(help="Sample from this number of likeliest tokens. 0: off.")
]
MinP = Annotated[
    float | None,
    typer.Option(
        help="Leave out tokens less likely than this fraction of the likeliest one. 0: off."
    ),
]
Presence = Annotated[
    float | None,
    typer.Option(help="Subtract this from the logits of tokens in the answer so far. 0: off."),
]
Frequency = Annotated[
    float | None,
    typer.Option(
        help="Subtract this from the logits of a token for each time it is in the answer. 0: off."
    ),
]
Repetition = Annotated[
    float | None,
    typer.Option(help="Divide the logits of tokens in the text so far by this. 1: off."),
]
Seed = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=2**63 - 1,
        help="Seed of the random numbers: the same seed, the same answer. Default: a new one.",
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder that keeps what was read: the same beginning of a prompt is not read again, "
        "after a restart or Ctrl-C neither. Default: none.",
    ),
]
CacheLimit = Annotated[
    float,
    typer.Option(
        min=0,
        help="Most GB on disk of what was read, so that it need not be read again; what was of no "
        "use for the longest time goes first.",
    ),
]
Kernels = Annotated[
    Literal["auto", "ops", "mlx", "metal"],
    typer.Option(
        help="What to compute with. ops: portable operations. mlx: MLX's own for the GPU. "
        "metal: the kernels of this package. auto: the fastest that is right on this machine."
    ),
]
Draft = Annotated[
    Literal["auto", "off", "mtp", "lookup"],
    typer.Option(
        help="Guess further tokens, to read several in one pass; the text stays the same. "
        "mtp: by the model's MTP layer. lookup: by what followed the same tokens before. "
        "auto: both, as far as it is faster. off: do not."
    ),
]
NumDraftTokens = Annotated[
    int | None,
    typer.Option(min=1, max=7, help="Guess this number of tokens. Default: what is fastest."),
]
# By --draft: whether to load the MTP layer. auto takes one that is quantized and fits.
LOADS_MTP = {"off": False, "mtp": True, "lookup": False}


Images = Annotated[
    list[str] | None,
    typer.Option(
        "--image",
        metavar="FILE",
        help="A picture that goes with the first prompt; - is standard input. Repeat the option "
        "for several. Default: none.",
    ),
]
Videos = Annotated[
    list[str] | None,
    typer.Option(
        "--video",
        metavar="FILE",
        help="A video that goes with the prompt, as --image. Default: none.",
    ),
]
Pdfs = Annotated[
    list[str] | None,
    typer.Option(
        "--pdf",
        metavar="FILE",
        help="A PDF whose pages go with the prompt, as --image. Default: none.",
    ),
]
AllowUrl = Annotated[
    bool,
    typer.Option(
        "--allow-url",
        help="Fetch pictures, videos and PDFs that are named by an http or https URL.",
    ),
]


def load_options(ctx: typer.Context) -> dict[str, Any]:
    """Options of a command as `load` takes them."""
    names = ("kernels", "context", "force", "kv_bits", "experts_memory")
    asked = {name: ctx.params[name] for name in names}
    mtp = LOADS_MTP.get(ctx.params["draft"])
    return {**asked, "mtp": mtp, "adapter": ctx.params["adapter_path"]}


def sampling_options(ctx: typer.Context) -> dict[str, Any]:
    """The sampling options of a command, checked before a model is loaded."""
    from ..sampling import SamplingParams

    sampling = {name: ctx.params[name] for name in SamplingParams.__dataclass_fields__}
    try:
        SamplingParams().updated(**sampling)
    except Qwen35Error as error:
        raise typer.BadParameter(str(error)) from None
    return sampling
