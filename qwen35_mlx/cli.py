"""The command line: parses, prints, and leaves the work to the package."""

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


Source = Annotated[Path, typer.Argument(help="Folder of a Hugging Face checkpoint.")]
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
    str,
    typer.Option(
        callback=one_of("minmax", "search"),
        help="How to choose scales: minmax as mlx does, or search for the least error: "
        "better at 2 and 3 bits, about ten times slower.",
    ),
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
Seed = Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Draw the same answer again.")]


@app.command()
def convert(
    source: Source,
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    bits: Bits = None,
    group_size: GroupSize = 64,
    dtype: Dtype = None,
    method: Method = "minmax",
) -> None:
    """Convert a Hugging Face checkpoint to grouped low-bit MLX weights."""
    with user_errors():
        from .convert import convert as run
        from .convert import plan as make_plan
        from .terminal import byte_progress, print_converted

        settings: Any = dict(bits=bits, group_size=group_size, dtype=dtype, method=method)
        plan = make_plan(source, **settings)
        with byte_progress(f"Converting {source.resolve().name}") as progress:
            folder = run(source, out, **settings, progress=progress)
        print_converted(plan, folder)
        remember(folder)


@app.command()
def plan(
    source: Source, bits: Bits = None, group_size: GroupSize = 64, dtype: Dtype = None
) -> None:
    """Show what convert would write: tensors, bits and bytes, from the headers alone."""
    with user_errors():
        from .convert import plan as make_plan
        from .terminal import print_plan

        print_plan(make_plan(source, bits=bits, group_size=group_size, dtype=dtype))


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
) -> None:
    """Answer once: plain text on standard output, for scripts."""
    with user_errors():
        text = read_prompts([] if prompt is None else [prompt])[0]
        options = sampling_options(ctx)
        from .generate import LONG_ANSWER_TOKENS, stream_generate
        from .terminal import quiet_libraries
        from .weights import load

        quiet_libraries()
        loaded, tokenizer = load(model)
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

            loaded, tokenizer = load(name)
        conversation = Chat(
            loaded,
            tokenizer,
            system=system,
            enable_thinking=think,
            max_tokens=max_tokens,
            sampling={"seed": seed, **options},
        )
        ChatSession(conversation).run(prompts)


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
        "This is the bundled demo: 5 M parameters that know some facts and a few tricks.\n"
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
