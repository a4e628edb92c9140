"""The slash commands of a chat: a table with names, arguments and help, and their functions."""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ..engine.sampler import MAX_SEED
from ..engine.speculate import AUTO as AUTO_DRAFT
from ..engine.speculate import MODES, OFF
from ..errors import Qwen35Error
from ..sampling import AUTO, CHECKPOINT, PRESETS, SamplingParams
from . import terminal
from .attachments import attach, attach_files, attach_pdf, paste
from .line_input import LineReader
from .typed_paths import split_media, typed_path

if TYPE_CHECKING:
    from .chat_view import ChatView

NUMBERS: dict[str, Any] = {f.name: f.type for f in fields(SamplingParams)} | {"seed": int}
DRAFTS = ("draft", "num_draft_tokens")
OPTIONS = (*NUMBERS, "max_tokens", "image_tokens", "preset", "on_loop", *DRAFTS)
KEYS = "Enter sends; Alt-Enter, Ctrl-J or \\ at the end of a line: a new line"


class SlashCommand(NamedTuple):
    """A command; `words`: completions after it."""

    arguments: str
    help: str
    run: "Callable[[ChatView, str], None]"
    words: tuple[str, ...] = ()


def is_dropped(line: str) -> bool:
    """Whether a line that begins with a slash is the path of a picture, video or PDF."""
    return line.split()[0] not in COMMANDS and any(split_media(line)[1:])


def run_command(view: "ChatView", line: str) -> None:
    """Run a line that begins with a slash."""
    match = re.fullmatch(r"(/\S*)\s*(.*?)\s*", line, re.DOTALL)
    assert match
    name, rest = match[1].replace("/quit", "/exit"), match[2]
    if name not in COMMANDS:
        meant = [f"did you mean {each}?" for each in get_close_matches(name, COMMANDS, 1, 0.75)]
        ways = "/help lists them; /file PATH sends a file; a space before / makes it a message"
        raise Qwen35Error(f"no command {name}", hint="; ".join([*meant, ways]))
    if rest and not COMMANDS[name].arguments:
        raise Qwen35Error(f"{name} takes nothing behind it", got=repr(rest))
    COMMANDS[name].run(view, rest)


def show_help(view: "ChatView", rest: str) -> None:
    """List the commands."""
    for name, command in COMMANDS.items():
        terminal.note(f"{f'{name} {command.arguments}':28} {command.help}")
    terminal.note(KEYS)


def leave(view: "ChatView", rest: str) -> None:
    """End the chat."""
    view.is_open = False


def undo(view: "ChatView", rest: str) -> None:
    """Drop the last turn."""
    text = view.chat.undo()
    view.save_turn()
    terminal.note(f"taken back: {shortened(text)}")


def retry(view: "ChatView", rest: str) -> None:
    """Answer the last message again."""
    view.turn(view.chat.regenerate)


def edit(view: "ChatView", rest: str) -> None:
    """Replace the last message, or put it into the editor."""
    last = view.chat.last_message()
    if rest:
        view.is_edit = True
        view.say(rest)
    elif isinstance(view.reader, LineReader):
        raise Qwen35Error("there is no editor here", hint="/edit TEXT replaces the message")
    else:
        view.draft, view.is_edit = last, True


def set_system(view: "ChatView", rest: str) -> None:
    """Show or replace the system prompt."""
    if rest:
        view.chat.set_system(rest)
    terminal.note(f"system prompt: {view.chat.system or 'none'}")


def clear(view: "ChatView", rest: str) -> None:
    """Start a new conversation."""
    view.attached.clear()
    view.start_over()


def trim(view: "ChatView", rest: str) -> None:
    """Drop the oldest turns."""
    terminal.note(f"{terminal.count(view.chat.drop_oldest(), 'turn')} dropped")
    view.save_turn()


def set_thinking(view: "ChatView", rest: str) -> None:
    """Set whether to think, to show thoughts, and the budget."""
    word, number = (*rest.split(None, 1), "", "")[:2]
    if rest in ("on", "off", "hide"):
        view.hide_thoughts = word == "hide"
        view.chat.enable_thinking = word != "off"
    elif word == "budget":
        view.chat.think_budget = _number(number, int) or None
    else:
        raise Qwen35Error("/think what?", got=repr(rest), expected="on, off, hide or budget N")
    terminal.note(settings(view) + (" · thoughts hidden" if view.hide_thoughts else ""))


def set_option(view: "ChatView", rest: str) -> None:
    """Change sampling, preset, maximum length, loop detection or drafts."""
    name, value = (*rest.split(None, 1), "", "")[:2]
    name = name.replace("-", "_")
    if name not in OPTIONS:
        raise Qwen35Error("no such setting", got=repr(name), expected=", ".join(OPTIONS))
    chat = view.chat
    before = chat.preset, chat.sampling
    if name == "preset":
        chat.preset = value or view.default_preset
    elif name == "on_loop":
        chat.set_on_loop(value or None)
    elif name == "draft":
        number = None if value == OFF else chat.num_draft_tokens
        chat.set_draft(value or AUTO_DRAFT, number)
    elif name == "num_draft_tokens":
        if chat.draft == OFF and value:
            raise Qwen35Error("drafts are off", hint="/set draft auto, mtp or lookup first")
        chat.set_draft(chat.draft, _number(value or "0", int) or None)
    elif name == "max_tokens":
        chat.max_tokens = _number(value or "0", int) or None
    elif name == "image_tokens":
        view.attached.image_tokens = _number(value or "0", int) or None
    else:
        number = _number(value, NUMBERS[name]) if value else None
        if name == "seed" and number and number > MAX_SEED:
            raise Qwen35Error("seed is not usable", got=number, expected=f"0 to {MAX_SEED}")
        chat.sampling = {**chat.sampling, name: number}
    try:
        terminal.note(settings(view))
    except Qwen35Error:
        chat.preset, chat.sampling = before
        raise


def show_stats(view: "ChatView", rest: str) -> None:
    """Print figures of the last turn, settings, context and memory."""
    chat = view.chat
    view.show_figures()
    terminal.note(settings(view))
    terminal.note(draft_figures(view))
    if experts := getattr(chat.model, "experts", None):
        terminal.note(f"experts: {experts}")
    used, length = chat.num_context_tokens(), chat.model.config.context_length
    terminal.note(f"context: {used:,} of {length:,} tokens, {100 * used // length} % full")
    store = chat.prefixes
    terminal.note(
        f"snapshots: {store.num_snapshots}, {store.nbytes / 1e6:,.1f} of "
        f"{store.memory_bytes / 1e6:,.0f} MB · read ahead {chat.stats.read_ahead_tokens} tokens"
        f" · thought {chat.stats.thought_tokens} tokens · session {view.session or 'not saved'}"
    )


def draft_figures(view: "ChatView") -> str:
    """Tokens per pass of this chat, and acceptance of drafts by depth."""
    from . import report

    stats = view.chat.drafter.stats
    figures = report.draft_figures(stats.tokens_per_pass, stats.summary)
    return " · ".join(figures if stats.drafted else [*figures, "no drafts"])


def save(view: "ChatView", rest: str) -> None:
    """Save the conversation, and every turn from now on."""
    name = typed_path(rest) or view.session
    if not name:
        raise Qwen35Error("save as what?", expected="/save NAME")
    terminal.note(f"saved: {view.save_as(name)}")


def load(view: "ChatView", rest: str) -> None:
    """Continue a saved conversation."""
    if not rest:
        from ..chat.sessions import list_sessions

        names = ", ".join(info.name for info in list_sessions()) or "none"
        raise Qwen35Error("load what?", expected=f"/load NAME, of: {names}")
    view.load(typed_path(rest))


def settings(view: "ChatView") -> str:
    """All settings in one line."""
    chat = view.chat
    params = ", ".join(f"{k} {v:g}" for k, v in asdict(chat.sampling_params()).items())
    thoughts = "thinks" if chat.thinks() else "does not think"
    budget = f", at most {chat.think_budget:,} tokens" if chat.think_budget else ""
    most = view.attached.image_tokens
    pictures = f" · pictures of at most {most:,} tokens" if most else ""
    bounds = f" · answers of at most {chat.max_tokens:,} tokens" if chat.max_tokens else ""
    seed = chat.sampling.get("seed")
    bounds += "" if seed is None else f" · seed {seed}"
    drafts = f" of {chat.num_draft_tokens} tokens" if chat.num_draft_tokens else ""
    return (
        f"{thoughts}{budget} · preset {chat.preset}: {params} · on loop: {chat.loop_action}"
        f" · drafts: {chat.draft}{drafts}{pictures}{bounds}"
    )


def shortened(text: str) -> str:
    """The beginning of a text, in one line."""
    line = " ".join(text.split()).translate(terminal.CONTROL)
    return line if len(line) <= 60 else line[:59] + "…"


def _number(text: str, kind: Callable[[str], Any]) -> Any:
    with suppress(ValueError):
        # A comma parts thousands of a whole number; in another it may stand for the point.
        if (number := kind(text.replace(",", "") if kind is int else text)) >= 0 or kind is float:
            return number
    raise Qwen35Error("not a number", got=repr(text), expected="0 or more" if kind is int else None)


COMMANDS = {
    "/help": SlashCommand("", "list the commands", show_help),
    "/retry": SlashCommand("", "answer the last message again", retry),
    "/edit": SlashCommand("[TEXT]", "change the last message and send it again", edit),
    "/undo": SlashCommand("", "take back the last message and its answer", undo),
    "/file": SlashCommand(
        "PATH...", "send texts, PDFs, folders, patterns with the next message", attach_files
    ),
    "/image": SlashCommand(
        "PATH...|clear", "send pictures with it; alone: list them", partial(attach, kind="image")
    ),
    "/video": SlashCommand("PATH...", "send videos with it", partial(attach, kind="video")),
    "/pdf": SlashCommand("PATH [PAGES]", "send pages of a PDF with it, such as 1-3,7", attach_pdf),
    "/paste": SlashCommand("", "send the picture in the clipboard with it", paste),
    "/system": SlashCommand("[TEXT]", "show or set the system prompt", set_system),
    "/think": SlashCommand(
        "on|off|hide|budget N",
        "think; do not; think without showing it; at most N tokens",
        set_thinking,
        ("on", "off", "hide", "budget"),
    ),
    "/set": SlashCommand(
        "NAME [VALUE]",
        "temperature, preset, draft and others; no VALUE: the default",
        set_option,
        (
            *OPTIONS,
            *(f"preset {name}" for name in (*PRESETS, AUTO, CHECKPOINT)),
            *(f"draft {mode}" for mode in MODES),
        ),
    ),
    "/stats": SlashCommand("", "show speed, settings, context and memory", show_stats),
    "/trim": SlashCommand("", "drop the oldest turns until half the context is free", trim),
    "/clear": SlashCommand("", "start over with the same system prompt", clear),
    "/save": SlashCommand("[NAME]", "save this conversation, and every turn from now on", save),
    "/load": SlashCommand("NAME", "save this session and continue another", load),
    "/exit": SlashCommand("", "leave; so do /quit and Ctrl-D", leave),
}
