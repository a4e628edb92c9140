"""The commands chat and sessions."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import Qwen35Error
from . import completion, options


def chat(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", autocompletion=completion.models)
    ] = None,
    demo: bool = False,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p")] = None,
    image: options.Images = None,
    allow_url: options.AllowUrl = False,
    system: options.System = None,
    session: Annotated[str | None, typer.Option(autocompletion=completion.sessions)] = None,
    autosave: bool = False,
    cache_limit: options.CacheLimit = 50.0,
    think: options.Thinking = None,
    think_budget: Annotated[int | None, typer.Option(min=1)] = None,
    on_loop: Literal["stop", "penalize", "off"] | None = None,
    snapshot_memory: Annotated[float | None, typer.Option(min=0)] = None,
    plain: bool = False,
    preset: Literal["auto", "thinking", "coding", "instruct", "checkpoint"] | None = None,
    *,
    generation: options.Generation,
) -> None:
    """Chat with a model in the terminal.

    /help in the chat lists its commands. Answers go to standard output, figures and remarks to
    standard error. Sampling options default to the preset.

    Args:
        model: Converted folder, or hub id. Default: the model converted last on this machine, else
            the bundled demo.
        demo: Chat with the bundled demo model.
        prompt: Ask this and exit; standard input is not read. Repeat the option for further turns.
            Default: a conversation on a terminal, else all of standard input is one prompt.
        session: Continue the session of this name, or start it, and save every turn. Default: save
            nothing.
        autosave: Save every conversation as a session named by date and time. Default: only with
            --session or /save.
        think_budget: End a thought after this many tokens. Default: no limit.
        on_loop: What to do if an answer repeats itself without end. stop: end it. penalize: make
            repeated tokens less likely. off: nothing. Default: stop; off with --preset coding.
        snapshot_memory: Memory for snapshots of the prompt cache, in GB. With more snapshots, less
            text is read again after an edit, a retry or an undo. Default: what weights and context
            leave, at most 4 and at most a sixteenth of memory.
        plain: Print Markdown as source. Default: rendered on a terminal, source elsewhere.
        preset: Sampling parameters. thinking, coding, instruct: as Qwen recommends. auto: thinking
            or instruct, by mode. checkpoint: from generation_config.json. Default: auto; checkpoint
            for the demo.
    """
    # A closed stream is None.
    is_terminal = sys.stdin and sys.stdin.isatty()
    prompts = [] if is_terminal and not prompt else read_prompts(prompt or [])
    drawn = generation.of_chat()
    from .line_input import can_edit, silent_keys
    from .media_input import check_sources
    from .progress import spinner

    check_sources(image or (), allow_url)
    with silent_keys(raw=can_edit()):
        with spinner("Starting"):
            # Imported here: MLX takes seconds.
            from ..chat.conversation import Chat
            from ..chat.sessions import session_file
            from ..engine.prefix_store import PrefixStore
            from ..model.loading import load
            from .chat_view import ChatView
        if session is not None:
            # Raises for an invalid name before the model loads.
            session_file(session)
        name, is_demo = chosen_model(model, demo)
        with spinner(f"Loading {name}"):
            loaded, tokenizer = load(name, **generation.of_load())
    # The demo is too small for the penalty that the family's presets have.
    default_preset = "checkpoint" if is_demo else "auto"
    conversation = Chat(
        loaded,
        tokenizer,
        system=system,
        enable_thinking=think,
        think_budget=think_budget,
        preset=preset or default_preset,
        on_loop=on_loop,
        store=PrefixStore(loaded, None if snapshot_memory is None else snapshot_memory * 1e9),
        **drawn,
    )
    view = ChatView(
        conversation,
        markdown=not plain,
        allow_url=allow_url,
        autosave=autosave,
        cache_limit_bytes=cache_limit * 1e9,
        default_preset=default_preset,
    )
    if image:
        view.attached.add([("image", source) for source in image])
    view.run(prompts, session)


def sessions(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", autocompletion=completion.sessions)
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(metavar="NAME", autocompletion=completion.sessions)
    ] = None,
) -> None:
    """List saved conversations, print one, or delete some.

    `qwen35-mlx chat --session NAME` saves a conversation, and continues it.

    Args:
        name: Print the messages of this session. Default: list all sessions.
        remove: Delete the session of this name. Repeat the option for several.
    """
    from ..chat.sessions import list_sessions, read_conversation, remove_session, session_file
    from .report import print_conversation, print_sessions
    from .terminal import note

    for each in remove or ():
        remove_session(each)
        note(f"removed {each}")
    if name is not None:
        print_conversation(read_conversation(session_file(name))["messages"])
    elif not remove:
        print_sessions(list_sessions())


def chosen_model(model: str | None, demo: bool, hints: bool = True) -> tuple[str, bool]:
    """The named model, else the one converted last, else the demo; and whether it is the demo."""
    name = newest() if model is None and not demo else model
    return (bundled_demo(hints), True) if name is None else (name, False)


def newest() -> str | None:
    """The folder converted last on this machine, with a note; None if there is none."""
    from .local_models import newest_conversion
    from .terminal import note

    if folder := newest_conversion():
        note(f"This is {folder}, the newest model converted here; --demo takes the bundled demo.")
    return str(folder) if folder else None


def bundled_demo(hints: bool = True) -> str:
    """The folder of the converted demo, made on the first call; `hints`: print questions."""
    from ..convert import convert as run
    from .local_models import SOURCE, converted_demo
    from .progress import byte_progress
    from .terminal import note

    def convert_demo(source: Path, out: Path) -> None:
        with byte_progress("Converting the bundled demo to 4 bits") as progress:
            run(source, out, bits=4, progress=progress)

    folder = converted_demo(convert_demo)
    if hints:
        note(
            "This is the bundled demo: 5 M parameters that know 150 facts and a few tricks. Try:\n"
            "What is the capital of France?  What is 47 + 85?  What is the opposite of hot?\n"
            f"/image {SOURCE / 'picture.png'}, then: What do you see?\n"
            "For a real model: qwen35-mlx convert SRC, then qwen35-mlx chat."
        )
    return str(folder)


def read_prompts(given: list[str]) -> list[str]:
    """The prompts of -p, or all of standard input as one prompt."""
    from ..files import MAX_TEXT_BYTES, decode_text, read_stdin

    # `-p "$(cat FILE)"` keeps the byte order mark of a file.
    prompts = [text.removeprefix("\ufeff") for text in given]
    if not given:
        data = read_stdin(MAX_TEXT_BYTES)
        prompts = [decode_text(data, "standard input", sys.stdin.encoding if data else "utf-8")]
    for text in prompts:
        if not text.strip():
            raise Qwen35Error(
                "the prompt is empty", got=repr(text), expected="text with -p or on standard input"
            )
    return prompts
