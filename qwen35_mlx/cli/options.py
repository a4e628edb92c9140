"""Options that several commands share, with their help.

Attributes:
    Model: Converted folder, or hub id.
    Revision: Branch, tag or commit of a model on the hub. Default: main.
    RunContext: Maximum tokens of prompt and answers together. Their memory is counted before the
        weights are read. Up to 4 times as many as the model was trained for are possible with YaRN,
        which makes answers to short texts worse. Default: all that fits, 32768 at least.
    KvBits: Bits of keys and values, whose memory grows with the text. k8v4: 8 for keys, 4 for
        values; less exact. auto: 16, or 8 if 16 do not fit.
    Force: Load a model that does not fit in memory. Default: refuse it, with the numbers.
    ExpertsMemory: Keep experts in this much memory, such as 80GB, and read the others from disk
        when a token needs them. Default: all experts; if they do not fit, as many as do.
    AdapterPath: Folder of an adapter, of `qwen35-mlx train` or mlx-lm. Default: no adapter.
    CalibrationFile: Calibration data from an earlier --calibrate.
    TextFile: Text to run. Default: a text that comes with the program.
    Thinking: Whether to think before the answer. Default: as the model's chat template says.
    System: System prompt. Default: none.
    CacheDir: Folder for the prompt cache: a prompt that begins like an earlier one is read only
        from where they differ, also after a restart or Ctrl-C. Default: none.
    CacheLimit: Maximum size of the prompt cache on disk, in GB. The part that was used longest ago
        is deleted first.
    Key: Key that clients have to send as Authorization: Bearer or x-api-key. Default: none.
    Kernels: Kernels that compute the model. ops: portable operations of MLX. mlx: MLX's own kernels
        for the GPU. metal: the kernels of this package. auto: the fastest that are correct on this
        machine.
    Images: A picture that goes with the first prompt; - is standard input. Repeat the option for
        several. Default: none.
    AllowUrl: Fetch pictures, videos and PDFs that are named by an http or https URL.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

from ..errors import Qwen35Error
from . import completion
from .command import described

Model = Annotated[str, typer.Argument(metavar="MODEL", autocompletion=completion.models)]
Revision = Annotated[str | None, typer.Option()]
RunContext = Annotated[int | None, typer.Option(min=1)]
KvBits = Annotated[Literal["auto", "16", "8", "k8v4"], typer.Option()]
Force = Annotated[bool, typer.Option("--force")]
ExpertsMemory = Annotated[str | None, typer.Option(metavar="MEMORY")]
AdapterPath = Annotated[Path | None, typer.Option(metavar="DIR")]
CalibrationFile = Annotated[Path | None, typer.Option("--calibration", metavar="FILE")]
TextFile = Annotated[Path | None, typer.Option("--text", metavar="FILE")]
Thinking = Annotated[bool | None, typer.Option("--think/--no-think")]
System = Annotated[str | None, typer.Option()]
CacheDir = Annotated[Path | None, typer.Option(metavar="DIR")]
CacheLimit = Annotated[float, typer.Option(min=0)]
Key = Annotated[str | None, typer.Option(envvar="QWEN35_MLX_API_KEY")]
Kernels = Annotated[Literal["auto", "ops", "mlx", "metal"], typer.Option()]
Images = Annotated[list[str] | None, typer.Option("--image", metavar="FILE")]
AllowUrl = Annotated[bool, typer.Option("--allow-url")]
for name, text in described(__doc__)[1].items():
    get_args(globals()[name])[1].help = text
# By --draft: whether to load the MTP layer. auto takes one that is quantized and fits.
LOADS_MTP = {"off": False, "mtp": True, "lookup": False}


@dataclass
class Quantization:
    """How many bits the weights of a conversion get.

    Attributes:
        bits: Bits of each weight. Default: 4; unquantized if --dtype is given alone.
        group_size: Number of weights that share a scale.
        dtype: Type of scales, norms and all that is not quantized. Alone: quantize nothing.
            Default: the type in SRC.
        recipe: Mixed bits by kind of tensor: q8, q6, q5, q4, q3 or q2.
        fit: Choose the bits of each tensor so that the model fits a Mac with this memory, such as
            192GB.
        bits_per_weight: Choose the bits of each tensor to average this many per weight, scales
            included.
        prefer: With --fit or --bits-per-weight. quality: the lowest error. speed: fewer bytes read
            per token, for more error. Default: quality.
        context: Context length in tokens that must also fit in memory. Default: 32768, or the
            model's context length if that is less.
    """

    bits: Literal[2, 3, 4, 5, 6, 8] | None = None
    group_size: Literal[32, 64, 128] = 64
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    recipe: Annotated[str | None, typer.Option(autocompletion=completion.recipes)] = None
    fit: Annotated[str | None, typer.Option(metavar="MEMORY")] = None
    bits_per_weight: Annotated[float | None, typer.Option(min=0, max=32)] = None
    prefer: Literal["quality", "speed"] | None = None
    context: Annotated[int | None, typer.Option(min=1)] = None


@dataclass
class Generation:
    """How a model is loaded, and how its answers are drawn.

    Attributes:
        max_tokens: Maximum length of an answer, thought included. Default: 32768.
        temperature: Randomness of sampling. 0 takes the most likely token; --seed, --top-p, --top-k
            and --min-p then change nothing.
        top_p: Sample from the likeliest tokens that reach this probability. 1: off.
        top_k: Sample from this number of likeliest tokens. 0: off.
        min_p: Leave out tokens less likely than this fraction of the likeliest one. 0: off.
        presence_penalty: Subtract this from the logits of tokens in the answer so far. 0: off.
        frequency_penalty: Subtract this from the logits of a token for each time it is in the
            answer. 0: off.
        repetition_penalty: Divide the logits of tokens in the text so far by this. 1: off.
        seed: Seed of the random numbers: the same seed, the same answer. Default: a new one.
        draft: Speculative decoding: draft tokens and check several in one pass; the text stays the
            same. mtp: drafts of the model's MTP layer. lookup: what followed the same tokens
            earlier in the text. auto: both, where that is faster. off: no drafts.
        num_draft_tokens: Number of tokens to draft at a time. Default: by acceptance and speed.
    """

    max_tokens: Annotated[int | None, typer.Option(min=1)] = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1)] = None
    draft: Literal["auto", "off", "mtp", "lookup"] = "auto"
    num_draft_tokens: Annotated[int | None, typer.Option(min=1, max=7)] = None
    kernels: Kernels = "auto"
    adapter_path: AdapterPath = None
    context: RunContext = None
    kv_bits: KvBits = "auto"
    experts_memory: ExpertsMemory = None
    force: Force = False

    def of_load(self) -> dict[str, Any]:
        """What `load` takes."""
        names = ("kernels", "context", "force", "kv_bits", "experts_memory")
        asked = {name: getattr(self, name) for name in names}
        return {**asked, "mtp": LOADS_MTP.get(self.draft), "adapter": self.adapter_path}

    def of_chat(self) -> dict[str, Any]:
        """What `Chat` takes, checked before a model is loaded."""
        from ..sampling import SamplingParams

        names = SamplingParams.__dataclass_fields__
        sampling = {name: getattr(self, name) for name in names}
        try:
            SamplingParams().updated(**sampling)
        except Qwen35Error as error:
            raise typer.BadParameter(str(error)) from None
        drafts = {"draft": self.draft, "num_draft_tokens": self.num_draft_tokens}
        sampling["seed"] = self.seed
        return {"max_tokens": self.max_tokens, "sampling": sampling, **drafts}
