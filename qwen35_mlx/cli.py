"""The command line: parses, prints, and leaves the work to the package."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import Qwen35Error

app = typer.Typer(
    name="qwen35-mlx",
    help="Run Qwen3.5 on a Mac: convert a checkpoint, then chat with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def one_of(*allowed: object) -> Callable[[Any], Any]:
    """A check of an option's value."""

    def check(value: Any) -> Any:
        if value is not None and value not in allowed:
            raise typer.BadParameter(f"{value} is not one of {', '.join(map(str, allowed))}.")
        return value

    return check


Source = Annotated[
    str, typer.Argument(help="Folder of a Hugging Face checkpoint, or hub id such as Qwen/NAME.")
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a hub id; main if unset.")
]
KeepSource = Annotated[
    bool,
    typer.Option("--keep-source", help="Keep the shards from the hub, in OUT-source."),
]
Bits = Annotated[
    int | None,
    typer.Option(
        callback=one_of(2, 3, 4, 5, 6, 8),
        help="2, 3, 4, 5, 6 or 8 bits; 4 unless --dtype is given.",
    ),
]
GroupSize = Annotated[
    int,
    typer.Option(callback=one_of(32, 64, 128), help="Weights that share a scale: 32, 64 or 128."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        callback=one_of("bfloat16", "float16", "float32"),
        help="bfloat16, float16 or float32. Alone: do not quantize; "
        "with --bits: type of scales, norms and the rest. The source's if unset.",
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        callback=one_of("minmax", "search", "gptq"),
        help="How to choose scales: minmax as mlx does; search for the least error, about ten "
        "times slower; gptq, error feedback from a calibration made for it. "
        "minmax with --bits, else the best there is.",
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
    float | None, typer.Option(min=0, help="Best bits of this average, scales included.")
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
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Converted folder, or hub id.")]
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


@app.command()
def convert(
    ctx: typer.Context,
    source: Source,
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    bits: Bits = None,
    group_size: GroupSize = 64,
    dtype: Dtype = None,
    method: Method = None,
    recipe: RecipeName = None,
    fit: Fit = None,
    bits_per_weight: BitsPerWeight = None,
    prefer: Prefer = "quality",
    context: Context = None,
    calibration: CalibrationFile = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Run a text through the source first, a layer at a time, and weigh errors by what "
            "activations do; writes the file of --calibration, or OUT.calibration.safetensors.",
        ),
    ] = False,
    text: TextFile = None,
    revision: Revision = None,
    keep_source: KeepSource = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Read OUT again and compare checksums; converts first if need be."
        ),
    ] = False,
) -> None:
    """Convert a Hugging Face checkpoint to grouped low-bit MLX weights.

    From the hub, shards are fetched one after the other and deleted when they are converted.
    Stopped in any way, the same command goes on where it stopped.
    """
    with user_errors():
        from .convert import convert as run
        from .convert import plan as make_plan
        from .convert import verify as read_again
        from .convert.page import conversion_lines
        from .terminal import byte_progress, note, print_converted, print_lines

        if not (verify and out.exists()):
            found = calibration_for(source, out, calibration, calibrate, text, method)
            settings, spent = quality_settings(ctx, source, found)
            print_lines(spent)
            plan = make_plan(source, revision=revision, **settings)
            for line in conversion_lines(plan, keep_source):
                note(line)
            with byte_progress(f"Converting {plan.source.origin['source']}") as progress:
                folder = run(
                    source,
                    out,
                    revision=revision,
                    keep_source=keep_source,
                    progress=progress,
                    calibration=found,
                    **settings,
                )
            print_converted(plan, folder)
            remember(folder)
        if verify:
            with byte_progress(f"Verifying {out.name}") as progress:
                num_bytes = read_again(out, progress)
            print(f"{num_bytes / 1e6:,.1f} MB in {out} are as they were written")


@app.command()
def plan(
    ctx: typer.Context,
    source: Annotated[
        str | None,
        typer.Argument(help="Folder or hub id; without it, what fits this machine."),
    ] = None,
    bits: Bits = None,
    group_size: GroupSize = 64,
    dtype: Dtype = None,
    recipe: RecipeName = None,
    fit: Fit = None,
    bits_per_weight: BitsPerWeight = None,
    prefer: Prefer = "quality",
    context: Context = None,
    calibration: CalibrationFile = None,
    revision: Revision = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the page into this file.")
    ] = None,
) -> None:
    """Show what convert would write, what that takes, and which Macs run it; from headers alone."""
    with user_errors():
        from .convert import page
        from .convert import plan as make_plan
        from .convert.macs import machine_memory_bytes, this_mac
        from .terminal import print_lines, print_plan

        mac = this_mac()
        if source is None:
            print_lines(page.family_lines(machine_memory_bytes(), mac))
            return
        settings, spent = quality_settings(ctx, source, calibration_for(source, None, calibration))
        planned = make_plan(source, revision=revision, **settings)
        print_plan(planned)
        print_lines([*spent, ""] if spent else [])
        print_lines([*page.conversion_lines(planned), "", *page.mac_lines(planned, mac)])
        if png:
            page.draw(planned, png)


def quality_settings(ctx: typer.Context, source: str, found: Any) -> tuple[Any, list[str]]:
    """Settings of plan and convert, and lines on what a budget is spent on."""
    from .convert.fit import quality_settings as decide

    given = ctx.params
    names = ("bits", "recipe", "bits_per_weight", "prefer", "context", "dtype", "revision")
    options = {name: given[name] for name in names}
    settings, spent = decide(
        source, **options, memory=given["fit"], method=given.get("method"), calibration=found
    )
    return settings | dict(group_size=given["group_size"], dtype=given["dtype"]), spent


def calibration_for(
    source: str,
    out: Path | None,
    file: Path | None,
    calibrate: bool = False,
    text: Path | None = None,
    method: str | None = None,
) -> Any:
    """What --calibration names, made first with --calibrate; None without either."""
    if not calibrate:
        if text:
            raise typer.BadParameter("--text goes with --calibrate.")
        if file is None:
            return None
        from .quant.calibrate import load

        return load(file)
    from .convert.calibration import calibrate as run
    from .convert.calibration import encode, read_text
    from .quant.calibrate import save
    from .terminal import note, quiet_libraries, step_progress

    quiet_libraries()
    assert out is not None
    file = file or out.with_name(f"{out.name}.calibration.safetensors")
    if file.exists():
        raise Qwen35Error(
            f"{file} exists already", hint="use it without --calibrate, or name another file"
        )
    ids = encode(Path(source), read_text(text))
    with step_progress(f"Calibrating on {ids.size:,} tokens") as progress:
        found = run(source, ids, hessians=method == "gptq", progress=progress)
    save(found, file)
    note(f"calibration written to {file}")
    return found


@app.command()
def fidelity(
    reference: Annotated[Path, typer.Argument(help="Folder of the original, or a converted one.")],
    quantized: Annotated[Path, typer.Argument(help="Converted folder to judge.")],
    text: TextFile = None,
    tokens: Annotated[int, typer.Option(min=2, help="Most tokens of the text.")] = 8192,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the errors into this file.")
    ] = None,
) -> None:
    """Compare a quantized model with its original: KL, top-1, perplexity, error of each layer.

    Both are read a layer at a time: neither has to fit in memory. The last line is JSON.
    """
    with user_errors():
        from .convert.calibration import encode, read_text
        from .convert.fidelity import fidelity as compare
        from .convert.fidelity import plot, report_lines
        from .terminal import print_lines, quiet_libraries, step_progress

        quiet_libraries()
        ids = encode(reference, read_text(text), most=tokens)
        with step_progress(f"Comparing on {ids.size:,} tokens") as progress:
            report = compare(reference, quantized, ids, progress)
        print_lines(report_lines(report))
        if png:
            plot(report, png)
        print(json.dumps(report.as_dict()))


@app.command()
def generate(
    ctx: typer.Context,
    model: ModelName,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The text; standard input if unset.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")
    ] = False,
    system: System = None,
    think: Thinking = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    presence_penalty: Presence = None,
    repetition_penalty: Repetition = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; repeatable.")
    ] = None,
    seed: Seed = None,
    kernels: Kernels = "auto",
) -> None:
    """Answer once: plain text on standard output, for scripts."""
    with user_errors():
        text = read_prompts([] if prompt is None else [prompt])[0]
        options = sampling_options(ctx)
        from .generate import LONG_ANSWER_TOKENS, stream_generate
        from .terminal import quiet_libraries
        from .weights import load

        quiet_libraries()
        loaded, tokenizer = load(model, kernels=kernels)
        messages: Any = [{"role": "user", "content": text}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        for response in stream_generate(
            loaded,
            tokenizer,
            text if raw else messages,
            max_tokens=max_tokens or LONG_ANSWER_TOKENS,
            stop=stop,
            seed=seed,
            enable_thinking=think,
            **options,
        ):
            print(response.text, end="", flush=True)
        print()


@app.command()
def chat(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="Converted folder, or hub id; if unset, the newest model converted on this "
            "machine, else the bundled demo."
        ),
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Take the bundled demo.")] = False,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="Ask this and exit; repeated: further turns."),
    ] = None,
    system: System = None,
    think: Thinking = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    presence_penalty: Presence = None,
    repetition_penalty: Repetition = None,
    seed: Seed = None,
    kernels: Kernels = "auto",
) -> None:
    """Chat in the terminal: streaming, thoughts apart from answers."""
    with user_errors():
        if demo and model is not None:
            raise typer.BadParameter(f"--demo and {model} exclude each other.")
        prompts = read_prompts(prompt or []) if prompt or not is_terminal(sys.stdin) else []
        options = sampling_options(ctx)
        from .terminal import ChatSession, loading, quiet_libraries

        quiet_libraries()
        name = model
        if name is None:
            name = (None if demo else newest()) or bundled_demo()
        with loading(name):
            from .chat import Chat
            from .weights import load

            loaded, tokenizer = load(name, kernels=kernels)
        suggest_doctor(kernels)
        conversation = Chat(
            loaded,
            tokenizer,
            system=system,
            enable_thinking=think,
            max_tokens=max_tokens,
            sampling={"seed": seed, **options},
        )
        ChatSession(conversation).run(prompts)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print nothing but the report.")] = False,
) -> None:
    """Look at this machine; check and time the Metal kernels, and remember which to use."""
    with user_errors():
        import json

        from .doctor import run, store
        from .terminal import print_doctor, step_progress

        with step_progress("Checking kernels") as progress:
            report = run(progress)
        if not as_json:
            print_doctor(report)
        print(json.dumps(report), flush=True)
        # Last: a full disk takes nothing from the report.
        store(report)


def suggest_doctor(kernels: str) -> None:
    """Say that kernels wait for the doctor, where they could run and it was never asked."""
    from .kernels.choice import read, unavailable
    from .terminal import note

    if kernels == "auto" and unavailable() is None and not read():
        note("Metal kernels are off until they are checked on this machine: qwen35-mlx doctor")


def remember(folder: Path) -> None:
    """Record a conversion for `chat` without a model; without a cache that is merely said."""
    from .bundled import record_conversion
    from .terminal import note

    try:
        record_conversion(folder)
    except (Qwen35Error, OSError) as error:
        note(f"chat without a model will not find this folder: {error}")


def newest() -> str | None:
    """The folder converted last on this machine, told to the user; None if there is none."""
    from .bundled import newest_conversion
    from .terminal import note

    folder = newest_conversion()
    if folder is None:
        return None
    note(f"This is {folder}, the newest model converted here; --demo takes the bundled demo.")
    return str(folder)


def bundled_demo() -> str:
    """The folder of the converted demo, made on the first call."""
    from .bundled import converted_demo
    from .convert import convert as run
    from .terminal import byte_progress, note

    def convert_demo(source: Path, out: Path) -> None:
        with byte_progress("Converting the bundled demo to 4 bits") as progress:
            run(source, out, bits=4, progress=progress)

    folder = converted_demo(convert_demo)
    note(
        "This is the bundled demo: 3.6 M parameters that know a hundred facts.\n"
        "For a real model: qwen35-mlx convert SRC OUT, then qwen35-mlx chat OUT."
    )
    return str(folder)


def sampling_options(ctx: typer.Context) -> dict[str, Any]:
    """The command's sampling options, refused before a model is loaded if they are no good."""
    from .sampling import SamplingParams

    options = {name: ctx.params[name] for name in SamplingParams.__dataclass_fields__}
    try:
        SamplingParams().updated(**options)
    except Qwen35Error as error:
        raise typer.BadParameter(str(error)) from None
    return options


def read_prompts(given: list[str]) -> list[str]:
    """What -p gave, or all of standard input as one prompt."""
    try:
        prompts = given or [sys.stdin.read() if sys.stdin else ""]
    except UnicodeDecodeError as error:
        raise Qwen35Error(
            "standard input is not text", got=error, expected=f"text in {sys.stdin.encoding}"
        ) from None
    for text in prompts:
        if not text.strip():
            raise Qwen35Error(
                "the prompt is empty", got=repr(text), expected="text with -p or on standard input"
            )
    return prompts


def is_terminal(stream: Any) -> bool:
    """Whether a person is there; a closed stream is None."""
    return stream is not None and stream.isatty()


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


def version(show: bool) -> None:
    """Print the version and leave."""
    if show:
        from . import __version__

        typer.echo(f"qwen35-mlx {__version__}")
        raise typer.Exit


@app.callback()
def root(
    _: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Run Qwen3.5 on a Mac: convert a checkpoint, then chat with it."""


def main() -> None:
    """Entry point of the qwen35-mlx command."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal of another encoding than UTF-8 shows ? for what it cannot show.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    app()
