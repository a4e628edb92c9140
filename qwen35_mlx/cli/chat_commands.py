"""The commands that talk to a model: generate, chat, sessions."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import Qwen35Error
from . import options


def generate(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Converted folder, or hub id.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The text; standard input if unset.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")
    ] = False,
    system: options.System = None,
    think: options.Thinking = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    presence_penalty: options.Presence = None,
    repetition_penalty: options.Repetition = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; repeatable.")
    ] = None,
    seed: options.Seed = None,
    kernels: options.Kernels = "auto",
    context: options.RunContext = None,
    force: options.Force = False,
) -> None:
    """Answer once, in plain text on standard output, for scripts.

    A thought comes first and ends in </think>; --no-think goes without.
    """
    with options.user_errors():
        text = read_prompts([] if prompt is None else [prompt])[0]
        sampling = sampling_options(ctx)
        from ..engine.generate import LONG_ANSWER_TOKENS, stream_generate
        from ..model.loading import load
        from .terminal import quiet_libraries

        quiet_libraries()
        loaded, tokenizer = load(model, kernels=kernels, context=context, force=force)
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
            **sampling,
        ):
            print(response.text, end="", flush=True)
        print()


def chat(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Converted folder, or hub id; if unset, the newest model converted on this "
            "machine, else the bundled demo.",
        ),
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Take the bundled demo.")] = False,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="Ask this and exit; repeated: further turns."),
    ] = None,
    system: options.System = None,
    session: Annotated[
        str | None, typer.Option(help="Go on with the session of this name, and save to it.")
    ] = None,
    think: options.Thinking = None,
    think_budget: Annotated[
        int | None, typer.Option(min=1, help="Close a thought after this many tokens.")
    ] = None,
    on_loop: Annotated[
        str,
        typer.Option(
            callback=options.one_of("stop", "penalize", "off"),
            help="An answer that repeats itself: stop it, penalize repeats, or off.",
        ),
    ] = "stop",
    snapshot_memory: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Memory for prompt-cache snapshots, in GB. Default: what weights and context "
            "leave, at most 4 and at most a sixteenth of memory.",
        ),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Show Markdown as it is.")] = False,
    preset: Annotated[
        str | None,
        typer.Option(
            callback=options.one_of("auto", "thinking", "coding", "instruct", "checkpoint"),
            help="Sampling: thinking, coding or instruct as Qwen3.5's authors advise, auto by "
            "mode, or as the checkpoint says; auto if unset, for the demo checkpoint.",
        ),
    ] = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    presence_penalty: options.Presence = None,
    repetition_penalty: options.Repetition = None,
    seed: options.Seed = None,
    kernels: options.Kernels = "auto",
    context: options.RunContext = None,
    force: options.Force = False,
) -> None:
    """Chat in the terminal: streaming, thoughts apart from answers."""
    with options.user_errors():
        if demo and model is not None:
            raise typer.BadParameter(f"--demo and {model} exclude each other.")
        # A closed stream is None.
        can_type = sys.stdin and sys.stdin.isatty()
        prompts = [] if can_type and not prompt else read_prompts(prompt or [])
        sampling = sampling_options(ctx)
        from .chat_view import ChatSession
        from .line_input import can_edit, silent_keys
        from .terminal import loading, quiet_libraries

        quiet_libraries()
        name = newest() if model is None and not demo else model
        is_demo = name is None
        if name is None:
            name = bundled_demo()
        with loading(name), silent_keys(raw=can_edit()):
            from ..chat.conversation import Chat
            from ..engine.prefix_store import PrefixStore
            from ..model.loading import load

            loaded, tokenizer = load(name, kernels=kernels, context=context, force=force)
        suggest_doctor(kernels)
        conversation = Chat(
            loaded,
            tokenizer,
            system=system,
            enable_thinking=think,
            think_budget=think_budget,
            max_tokens=max_tokens,
            # The demo is too small for the penalty that the family's presets have.
            preset=preset or ("checkpoint" if is_demo else "auto"),
            sampling={"seed": seed, **sampling},
            on_loop=on_loop,
            store=PrefixStore(loaded, None if snapshot_memory is None else snapshot_memory * 1e9),
        )
        ChatSession(conversation, markdown=not plain).run(prompts, session)


def sessions(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show this session's messages.")
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option("--remove", help="Delete this session; repeatable.")
    ] = None,
) -> None:
    """List saved conversations, show one, or remove some."""
    with options.user_errors():
        from ..chat.sessions import list_sessions, read_conversation, remove_session, session_file
        from .terminal import note, print_conversation, print_sessions

        for each in remove or ():
            remove_session(each)
            note(f"removed {each}")
        if name is not None:
            print_conversation(read_conversation(session_file(name))["messages"])
        elif not remove:
            print_sessions(list_sessions())


def suggest_doctor(kernels: str) -> None:
    """Say that kernels wait for the doctor, where they could run and it was never asked."""
    from ..kernels.choice import read, unavailable
    from .terminal import note

    if kernels == "auto" and unavailable() is None and not read():
        note("Metal kernels are off until they are checked on this machine: qwen35-mlx doctor")


def newest() -> str | None:
    """The folder converted last on this machine, told to the user; None if there is none."""
    from .local_models import newest_conversion
    from .terminal import note

    folder = newest_conversion()
    if folder is None:
        return None
    note(f"This is {folder}, the newest model converted here; --demo takes the bundled demo.")
    return str(folder)


def bundled_demo() -> str:
    """The folder of the converted demo, made on the first call."""
    from ..convert import convert as run
    from .local_models import converted_demo
    from .terminal import byte_progress, note

    def convert_demo(source: Path, out: Path) -> None:
        with byte_progress("Converting the bundled demo to 4 bits") as progress:
            run(source, out, bits=4, progress=progress)

    folder = converted_demo(convert_demo)
    note(
        "This is the bundled demo: 5 M parameters that know 150 facts and a few tricks.\n"
        "For a real model: qwen35-mlx convert SRC OUT, then qwen35-mlx chat OUT."
    )
    return str(folder)


def sampling_options(ctx: typer.Context) -> dict[str, Any]:
    """The command's sampling options, refused before a model is loaded if they are no good."""
    from ..sampling import SamplingParams

    sampling = {name: ctx.params[name] for name in SamplingParams.__dataclass_fields__}
    try:
        SamplingParams().updated(**sampling)
    except Qwen35Error as error:
        raise typer.BadParameter(str(error)) from None
    return sampling


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
