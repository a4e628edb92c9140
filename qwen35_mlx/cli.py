"""The command line: parses, prints, and leaves the work to the package."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
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

Thinking = Annotated[
    bool | None,
    typer.Option(
        "--think/--no-think", help="Think before answering; the model's default if unset."
    ),
]
System = Annotated[str | None, typer.Option("--system", help="System prompt.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Longest answer, thought included.")]
Temperature = Annotated[float | None, typer.Option(min=0.0, help="0 is greedy.")]
TopP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Nucleus sampling; 1 is off.")]
TopK = Annotated[int | None, typer.Option(min=0, help="Only the k likeliest tokens; 0 is off.")]
MinP = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Least probability, relative to the best.")
]
Presence = Annotated[
    float | None, typer.Option(help="Subtracted from the logits of tokens already in the answer.")
]
Repetition = Annotated[
    float | None, typer.Option(help="Divides the logits of tokens already in the text; 1 is off.")
]
Seed = Annotated[int | None, typer.Option(min=0, help="Draw the same answer again.")]


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Folder of a Hugging Face checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    bits: Annotated[
        int | None, typer.Option(help="2, 3, 4, 5, 6 or 8 bits; 4 unless --dtype is given.")
    ] = None,
    group_size: Annotated[
        int, typer.Option(help="Weights that share a scale: 32, 64 or 128.")
    ] = 64,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="bfloat16, float16 or float32. Alone: do not quantize; "
            "with --bits: type of scales, norms and the rest. The source's if unset."
        ),
    ] = None,
) -> None:
    """Convert a Hugging Face checkpoint to grouped low-bit MLX weights."""
    from .convert import convert as run
    from .convert import plan as make_plan
    from .terminal import byte_progress, print_converted

    with user_errors():
        plan = make_plan(source, bits=bits, group_size=group_size, dtype=dtype)
        with byte_progress(f"Converting {source.name}") as progress:
            folder = run(
                source, out, bits=bits, group_size=group_size, dtype=dtype, progress=progress
            )
        print_converted(plan, folder)


@app.command()
def plan(
    source: Annotated[Path, typer.Argument(help="Folder of a Hugging Face checkpoint.")],
    bits: Annotated[
        int | None, typer.Option(help="2, 3, 4, 5, 6 or 8 bits; 4 unless --dtype is given.")
    ] = None,
    group_size: Annotated[
        int, typer.Option(help="Weights that share a scale: 32, 64 or 128.")
    ] = 64,
    dtype: Annotated[str | None, typer.Option(help="As in convert.")] = None,
) -> None:
    """Show what convert would write: tensors, bits and bytes, from the headers alone."""
    from .convert import plan as make_plan
    from .terminal import print_plan

    with user_errors():
        print_plan(make_plan(source, bits=bits, group_size=group_size, dtype=dtype))


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Converted folder, or hub id.")],
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
    from .generate import stream_generate
    from .terminal import quiet_libraries
    from .weights import load

    text = sys.stdin.read() if prompt is None else prompt
    with user_errors():
        if not text.strip():
            raise Qwen35Error(
                "the prompt is empty", got=repr(text), expected="text with -p or on standard input"
            )
        quiet_libraries()
        loaded, tokenizer = load(model)
        messages: Any = [{"role": "user", "content": text}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        for response in stream_generate(
            loaded,
            tokenizer,
            text if raw else messages,
            max_tokens=max_tokens,
            stop=stop or (),
            seed=seed,
            enable_thinking=think,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            presence_penalty=presence_penalty,
            repetition_penalty=repetition_penalty,
        ):
            print(response.text, end="", flush=True)
        print()


@app.command()
def chat(
    model: Annotated[
        str | None, typer.Argument(help="Converted folder, or hub id; the bundled demo if unset.")
    ] = None,
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
    from .terminal import ChatSession, byte_progress, loading, note, quiet_libraries

    with user_errors():
        quiet_libraries()
        if model is None:
            from .bundled import converted_demo
            from .convert import convert as run

            def convert_demo(source: Path, out: Path) -> Path:
                with byte_progress("Converting the bundled demo to 4 bits") as progress:
                    return run(source, out, bits=4, progress=progress)

            model = str(converted_demo(convert_demo))
            note(
                "This is the bundled demo: 3.6 M parameters that know a hundred facts.\n"
                "For a real model: qwen35-mlx convert SRC OUT, then qwen35-mlx chat OUT."
            )
        with loading(model):
            from .chat import Chat
            from .weights import load

            loaded, tokenizer = load(model)
        options = dict(
            seed=seed,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            presence_penalty=presence_penalty,
            repetition_penalty=repetition_penalty,
        )
        conversation = Chat(
            loaded,
            tokenizer,
            system=system,
            enable_thinking=think,
            max_tokens=max_tokens,
            sampling=options,
        )
        ChatSession(conversation).run(prompt or piped_prompt())


def piped_prompt() -> list[str]:
    """Standard input as one question where it is no terminal."""
    if sys.stdin is None or sys.stdin.isatty():
        return []
    text = sys.stdin.read()
    if not text.strip():
        raise Qwen35Error(
            "nothing to answer",
            got="empty standard input",
            expected="a terminal, a question on standard input, or -p TEXT",
        )
    return [text]


@contextmanager
def user_errors() -> Iterator[None]:
    """Print a user's mistake without a traceback and exit 1; Ctrl-C exits 130."""
    try:
        yield
    except (Qwen35Error, OSError) as error:
        from .terminal import print_error

        if isinstance(error, BrokenPipeError):
            # The reader of a pipe went away: nobody is left to tell.
            sys.stdout = None
            raise typer.Exit(1) from None
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
    app()
